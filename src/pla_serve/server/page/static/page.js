// The page: watches the server while it is visible, and shows each sample.

import { Chat } from "./chat.js";
import { byId, say } from "./dom.js";
import { authorized, events } from "./stream.js";
import { Events, Latencies, rates, showBatches, showInstances, Tiles } from "./views.js";

const KEY = "pla-serve key";
const FIRST_PAUSE = 1000;
const MOST_PAUSE = 15000;

const tiles = new Tiles();
const latencies = new Latencies();
const changes = new Events();
let last = null;
let watching = null;

const paused = () => byId("pause").getAttribute("aria-pressed") === "true";
const key = () => sessionStorage.getItem(KEY) ?? "";

function show(sample) {
  const now = performance.now() / 1000;
  if (sample.error) {
    say(byId("state"), `The server cannot tell its state: ${sample.error}.`, true);
    return;
  }
  const passed = last ? now - last.now : 0;
  const rate = rates(last?.sample.counters, sample.counters, passed);
  say(byId("model"), sample.model);
  say(byId("version"), sample.version);
  const what = sample.kind === "router" ? "Router" : `Instance (${sample.engine?.policy ?? "no policy yet"})`;
  say(byId("state"), `${what}: ${sample.status}`, sample.status !== "ready");
  document.title = `${sample.model} – PLA-Serve`;
  tiles.show(sample, rate);
  latencies.show(sample);
  changes.show(sample);
  byId("runs").hidden = sample.kind !== "instance";
  byId("fleet").hidden = sample.kind !== "router";
  if (sample.kind === "instance") {
    showBatches(sample.counters?.batches, rates(last?.sample.counters?.batches, sample.counters?.batches, passed));
  } else {
    showInstances(sample);
  }
  last = { sample, now };
}

/** Watches until `signal` is aborted or the server asks for a key, and tries again after losses. */
async function watch(signal) {
  let pause = FIRST_PAUSE;
  while (!signal.aborted) {
    try {
      for await (const data of events("ui/events", { headers: authorized(key()), signal })) {
        byId("login").hidden = true;
        pause = FIRST_PAUSE;
        show(JSON.parse(data));
      }
      if (!signal.aborted) say(byId("state"), "The server has ended. Trying again …", true);
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 401) {
        askForKey();
        return;
      }
      const why = error.status ? error.message : "the server cannot be reached";
      say(byId("state"), `Not connected: ${why}. Trying again …`, true);
    }
    await sleep(pause, signal);
    pause = Math.min(2 * pause, MOST_PAUSE);
  }
}

function sleep(time, signal) {
  return new Promise((done) => {
    const timer = setTimeout(done, time);
    signal.addEventListener("abort", () => (clearTimeout(timer), done()));
  });
}

function askForKey() {
  say(byId("state"), key() ? "This key is wrong." : "An API key is needed.", true);
  byId("login").hidden = false;
  byId("key").focus();
}

/** Watches while the page is visible: one that nobody sees costs the server nothing. */
function begin() {
  watching?.abort();
  watching = null;
  if (document.visibilityState !== "visible" || paused()) return;
  watching = new AbortController();
  watch(watching.signal);
}

byId("pause").addEventListener("click", () => {
  byId("pause").setAttribute("aria-pressed", String(!paused()));
  if (paused()) say(byId("state"), "Paused.");
  begin();
});
byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  say(byId("state"), "Connecting …");
  begin();
});
document.addEventListener("visibilitychange", begin);
new Chat(key, () => last?.sample.model);
begin();
