// Shows a sample: tiles, latencies, batches, instances, moves and failures.

import { byId, count, draw, fillRows, make, percent, say, seconds } from "./dom.js";

const KEPT = 240;
const MOST_EVENTS = 200;

/** Rates of counters between two samples; a counter that fell has begun again. */
export function rates(before, after, passed) {
  const found = {};
  for (const [name, value] of Object.entries(after ?? {})) {
    if (typeof value !== "number") continue;
    const last = before?.[name];
    found[name] = last === undefined || value < last || !passed ? null : (value - last) / passed;
  }
  return found;
}

export class Tiles {
  constructor() {
    this.places = new Map();
  }

  show(sample, rate) {
    const load = sample.load ?? total(sample.instances);
    this.set("Requests in flight", count(sample.in_flight));
    this.set("Decoding", count(load?.running));
    this.set("Short, waiting", count(load?.short_waiting));
    this.set("Long, waiting", count(load?.long_waiting));
    this.set("Queued work", load ? seconds(load.queued_short_seconds + load.queued_long_seconds) : "–");
    this.set("Waiting for memory", count(load?.parked));
    this.set("KV in use", percent(load?.kv_usage), load?.kv_usage);
    if (sample.kind === "instance") {
      this.set("Prompt tokens/s", count(rate.prompt_tokens));
      this.set("Output tokens/s", count(rate.generation_tokens));
      this.set("Batches between layers/s", count(rate.express_batches));
      const looked = sample.counters?.prefix_queries;
      this.set("Prompts found in cache", looked ? percent(sample.counters.prefix_hits / looked) : "–");
    } else {
      this.set("Without an instance", count(sample.parked));
    }
  }

  set(name, text, share) {
    if (!this.places.has(name)) {
      const value = make("span");
      const place = make("dd", {}, value);
      if (share !== undefined || name === "KV in use") {
        place.append(make("meter", { min: 0, max: 1, high: 0.9, optimum: 0 }));
        place.lastChild.setAttribute("aria-hidden", "true");
      }
      byId("tiles").append(make("div", {}, make("dt", {}, name), place));
      this.places.set(name, place);
    }
    const place = this.places.get(name);
    say(place.firstChild, text);
    if (place.lastChild !== place.firstChild) place.lastChild.value = share ?? 0;
  }
}

/** Sums of the loads of instances; KV in use is their mean. */
function total(instances) {
  const loads = (instances ?? []).map((each) => each.load).filter(Boolean);
  if (!loads.length) return null;
  const sum = {};
  for (const load of loads) {
    for (const [name, value] of Object.entries(load)) sum[name] = (sum[name] ?? 0) + value;
  }
  sum.kv_usage /= loads.length;
  return sum;
}

export class Latencies {
  constructor() {
    this.history = { short: [], long: [] };
  }

  show(sample) {
    const rows = [];
    for (const kind of ["short", "long"]) {
      const of = sample.latency?.[kind];
      const [firsts, half, most] = of?.ttft ?? [0, null, null];
      const [, between, slow] = of?.itl ?? [0, null, null];
      const history = this.history[kind];
      history.push(most);
      if (history.length > KEPT) history.shift();
      const first = [count(firsts), seconds(half), seconds(most), spark(kind, history)];
      rows.push([kind, ...first, seconds(between), seconds(slow)]);
    }
    fillRows(byId("latency").tBodies[0], rows);
    say(
      byId("boundary"),
      sample.boundary_tokens
        ? `Short: at most ${count(sample.boundary_tokens)} tokens that are not in the cache.`
        : "The boundary between short and long is not known yet.",
    );
  }
}

function spark(kind, history) {
  const known = history.filter((value) => value !== null);
  if (!known.length) return "–";
  const top = Math.max(...known);
  const points = history
    .map((value, place) => [KEPT - history.length + place, value])
    .filter(([, value]) => value !== null)
    .map(([x, value]) => `${x},${(30 - (value / top) * 28).toFixed(1)}`);
  const text = `from ${seconds(Math.min(...known))} to ${seconds(top)}`;
  return draw(
    "svg",
    { class: "spark", viewBox: `0 0 ${KEPT} 31`, preserveAspectRatio: "none", role: "img", "aria-label": text },
    draw("polyline", { class: kind, points: points.join(" ") }),
  );
}

export function showBatches(batches, rate) {
  const rows = Object.entries(batches ?? {}).map(([kind, made]) => {
    const each = rate[kind];
    const often = each === null || each === undefined ? "–" : each.toFixed(1);
    return [kind, often, count(made)];
  });
  fillRows(byId("batches").tBodies[0], rows);
}

export function showInstances(sample) {
  const rows = sample.instances.map((each) => {
    const load = each.load;
    const queued = load && load.queued_short_seconds + load.queued_long_seconds;
    const waiting = [count(load?.short_waiting), count(load?.long_waiting), count(load?.running)];
    const state = stateOf(each);
    return [each.url, each.role ?? "", state, ...waiting, seconds(queued), percent(load?.kv_usage)];
  });
  const body = byId("instances").tBodies[0];
  fillRows(body, rows);
  for (const row of body.rows) {
    row.cells[2].toggleAttribute("data-bad", /^(down|unfit|up,)/.test(row.cells[2].textContent));
  }
  const hidden = sample.instances_total - sample.instances.length;
  const pools = Object.entries(sample.pools).map(([role, many]) => `${many} ${role}`);
  const wanted = sample.desired
    ? `There should be ${sample.desired.prefill} for prefill` +
      (sample.desired.decode ? `, ${sample.desired.decode} for decode.` : ".")
    : "";
  say(
    byId("pools"),
    `Connected: ${pools.join(", ") || "none"}. Controller: ${sample.controller}, ` +
      `${sample.moves_total} moves. ${wanted}` +
      (hidden ? ` ${hidden} more instances are not shown.` : ""),
  );
}

function stateOf(each) {
  if (each.unfit) return `unfit: ${each.unfit}`;
  if (!each.connected) return `down: ${each.last_loss ?? "not connected yet"}`;
  if (each.circuit !== "closed") return `up, circuit ${each.circuit}`;
  return each.open ? "up" : "draining";
}

/** Tells what has changed since the last sample: losses, returns, roles, restarts. */
export class Events {
  constructor() {
    this.last = null;
  }

  show(sample) {
    const before = this.last;
    this.last = sample;
    if (!before || before.kind !== sample.kind) return;
    if (sample.status !== before.status) this.add(`The server is ${sample.status}.`);
    if (sample.restarts > before.restarts) {
      this.add(`The engine was started again: ${sample.last_loss ?? "no reason given"}`, true);
    }
    const known = new Map((before.instances ?? []).map((each) => [each.url, each]));
    for (const each of sample.instances ?? []) this.compare(known.get(each.url), each);
  }

  compare(before, each) {
    if (!before) return;
    if (before.connected && !each.connected) {
      this.add(`${each.url} was lost: ${each.last_loss ?? "no reason given"}`, true);
    } else if (!before.connected && each.connected) {
      this.add(`${each.url} is connected.`);
    }
    if (before.circuit !== each.circuit) {
      this.add(`The circuit of ${each.url} is ${each.circuit}.`, each.circuit === "open");
    }
    if (before.role && each.role && before.role !== each.role) {
      this.add(`${each.url} moved from ${before.role} to ${each.role}.`);
    }
    if (before.connected && each.connected && before.draining !== each.draining) {
      this.add(`${each.url} ${each.draining ? "drains" : "takes requests again"}.`);
    }
  }

  add(text, bad = false) {
    const now = new Date();
    const time = make("time", { dateTime: now.toISOString() }, now.toLocaleTimeString());
    const place = make("li", {}, time, text);
    place.toggleAttribute("data-bad", bad);
    byId("events").prepend(place);
    while (byId("events").children.length > MOST_EVENTS) byId("events").lastChild.remove();
    byId("no-events").hidden = true;
  }
}
