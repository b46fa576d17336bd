// The chat box: one conversation, streamed from /v1/chat/completions.

import { byId, make, say } from "./dom.js";
import { authorized, events } from "./stream.js";

const MOST_MESSAGES = 100;

export class Chat {
  /** `key` returns the API key, `model` the name of the model; both may be empty. */
  constructor(key, model) {
    this.key = key;
    this.model = model;
    this.messages = [];
    this.running = null;
    this.list = byId("messages");
    this.state = byId("chat-state");
    byId("chat").addEventListener("submit", (event) => this.submit(event));
    byId("stop").addEventListener("click", () => this.running?.abort());
    byId("clear").addEventListener("click", () => this.clear());
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        byId("chat").requestSubmit();
      }
    });
  }

  clear() {
    if (this.running) {
      this.running.dropped = true;
      this.running.abort();
    }
    this.messages = [];
    this.list.replaceChildren();
    say(this.state, "");
    byId("prompt").focus();
  }

  async submit(event) {
    event.preventDefault();
    const text = byId("prompt").value;
    if (this.running || !text.trim()) return;
    byId("prompt").value = "";
    const asked = { role: "user", content: text };
    this.show("user", "You").textContent = text;
    const running = (this.running = new AbortController());
    this.enable(false);
    const conversation = [...this.messages, asked].slice(-MOST_MESSAGES);
    const body = { model: this.model() || undefined, messages: conversation, stream: true };
    this.list.setAttribute("aria-busy", "true");
    const answer = await this.receive(body, running);
    this.list.removeAttribute("aria-busy");
    this.running = null;
    this.enable(true);
    if (answer && !running.dropped) {
      this.messages = [...conversation, { role: "assistant", content: answer }];
    }
  }

  /** Shows the answer as it comes; returns its text, also of one that was stopped. */
  async receive(body, running) {
    const began = performance.now();
    const reasoning = make("span", { className: "reasoning" });
    const place = this.show("assistant", "Model");
    const words = document.createTextNode("");
    place.append(reasoning, words);
    let answer = "";
    let first = null;
    let finish = null;
    try {
      const stream = events("v1/chat/completions", {
        method: "POST",
        headers: authorized(this.key(), { "content-type": "application/json" }),
        body: JSON.stringify(body),
        signal: running.signal,
      });
      for await (const data of stream) {
        if (data === "[DONE]") break;
        const event = JSON.parse(data);
        if (event.error) throw new Error(event.error.message);
        const choice = event.choices?.[0];
        const text = choice?.delta?.content ?? "";
        const thought = choice?.delta?.reasoning_content ?? "";
        finish = choice?.finish_reason ?? finish;
        if ((text || thought) && first === null) first = performance.now() - began;
        answer += text;
        if (thought) reasoning.append(thought);
        words.appendData(text);
        this.list.scrollTop = this.list.scrollHeight;
      }
      const time = first === null ? "" : `, first token after ${first.toFixed(0)} ms`;
      say(this.state, `Ended (${finish ?? "no reason given"})${time}.`);
    } catch (error) {
      const stopped = running.signal.aborted;
      say(this.state, stopped ? "Stopped." : `Failed: ${error.message}`, !stopped);
    }
    if (!answer && !reasoning.textContent) place.remove();
    return answer;
  }

  show(kind, who) {
    const place = make("li", { className: kind }, make("span", { className: "who" }, who));
    const text = make("span");
    place.append(text);
    this.list.append(place);
    while (this.list.children.length > MOST_MESSAGES) this.list.firstChild.remove();
    this.list.scrollTop = this.list.scrollHeight;
    return Object.assign(text, { remove: () => place.remove() });
  }

  enable(on) {
    byId("send").disabled = !on;
    byId("stop").disabled = on;
    if (!on) say(this.state, "The model answers …");
  }
}
