// One stage: what its events have made of it so far, and how that is shown. The figures come with the events.

import { colourOf } from "./canvas.js";
import { MemoryMap } from "./memory.js";
import { Timeline } from "./timeline.js";

const STATES = { prefill: "reads", recompute: "computes again", idle: "done", fork: "writes" };
const REASONS = { stop: "ended by itself", length: "at its limit", abort: "stopped" };

export class Lane {
  constructor(side, figures, template) {
    this.root = template.content.firstElementChild.cloneNode(true);
    this.part = (name) => this.root.querySelector(`.${name}`);
    this.stage = side.stage;
    this.part("name").textContent = side.title;
    this.root.setAttribute("aria-label", side.title);
    this.memory = new MemoryMap(this.part("memory"));
    this.timeline = new Timeline(this.part("timeline"));
    this.values = {};
    for (const [key, figure] of Object.entries(figures)) {
      const tile = document.createElement("div"), title = document.createElement("dt");
      title.textContent = figure.title;
      this.values[key] = { tile, unit: figure.unit, value: document.createElement("dd") };
      tile.append(title, this.values[key].value);
      this.part("figures").append(tile);
    }
    this.reset(null);
  }

  watch(key) {
    for (const [name, { tile }] of Object.entries(this.values)) tile.classList.toggle("watched", name === key);
  }

  badge(text, playing = false) {
    this.part("badge").textContent = text;
    this.root.classList.toggle("playing", playing);
  }

  // prepared: the event of that name, or null before there is one
  reset(prepared) {
    this.clock = 0;
    this.ended = false;
    this.failed = false;
    this.cards = [];
    this.part("answers").replaceChildren();
    this.part("note").textContent = "";
    this.memory.reset(prepared);
    this.timeline.reset(prepared ? prepared.answers.length : 0);
    this.show({});
    const count = prepared ? prepared.answers.length : 0;
    this.part("answers").classList.toggle("few", count <= 4);
    this.part("answers").classList.toggle("many", count > 6);
    this.part("answers").classList.toggle("one", count === 1);
    for (const [index, answer] of (prepared ? prepared.answers : []).entries()) this.cards.push(this.card(index, answer));
    this.describe();
  }

  card(index, answer) {
    const item = document.createElement("li"), head = document.createElement("div");
    const title = document.createElement("b"), state = document.createElement("span");
    const text = document.createElement("div"), inner = document.createElement("span");
    item.style.setProperty("--own", colourOf(index));
    head.className = "head";
    state.className = "state";
    text.className = "text";
    title.textContent = `${index + 1}. ${answer.title}`;
    title.title = `${answer.title} (${answer.prompt_tokens} tokens)`;
    head.append(title, state);
    text.append(inner);
    item.append(head, text);
    this.part("answers").append(item);
    return { state, text: inner, tokens: 0, done: false, item };
  }

  apply(event) {
    this.clock = Math.max(this.clock, event.t ?? 0);
    this.timeline.apply(event);
    if (event.kv) this.memory.apply(event.kv);
    if (event.figures) this.show(event.figures);
    if (event.event === "arrived") for (const answer of event.answers) this.cards[answer].state.textContent = "waits";
    if (event.event === "step") this.step(event);
    if (event.event === "ended") {
      this.ended = true;
      this.part("note").textContent =
        `Recording these events took ${(event.cost * 100).toFixed(1)} % of the time.`;
    }
  }

  fail(message) {
    this.failed = true;
    this.badge("failed");
    this.part("note").textContent = message;
  }

  step(event) {
    for (const [answer, kind] of event.chunks) {
      const card = this.cards[answer];
      if (!card.done && STATES[kind]) card.state.textContent = STATES[kind];
    }
    for (const answer of event.preempted) this.cards[answer].state.textContent = "steps back";
    for (const [answer, text, tokens, reason] of event.gained) {
      const card = this.cards[answer];
      card.text.textContent += text;
      card.tokens += tokens;
      card.done = reason !== null;
      card.state.textContent = `${card.done ? "done" : "writes"}, ${card.tokens}`;
      if (card.done) card.state.title = `${card.tokens} tokens, ${REASONS[reason]}`;
    }
  }

  show(figures) {
    for (const [key, { value, unit }] of Object.entries(this.values)) {
      const number = figures[key];
      const small = document.createElement("small");
      let text = "–", shown = unit;
      if (number !== null && number !== undefined) {
        const milliseconds = unit === "s" && key !== "time" && number < 0.1;
        text = milliseconds ? (number * 1000).toFixed(0) : unit === "s" ? number.toFixed(2) : Math.round(number).toLocaleString("en");
        shown = milliseconds ? "ms" : key === "together" && number === 1 ? unit.replace(/s$/, "") : unit;
      }
      small.textContent = ` ${shown}`;
      value.replaceChildren(text, small);
    }
  }

  draw(span, now) {
    this.timeline.draw(span, Math.max(now, this.clock));
    this.memory.draw();
    this.part("held").textContent = this.memory.summary();
  }

  // For screen readers: before a turn and at its end is enough.
  describe() {
    const nothing = "nothing yet";
    this.part("timeline").setAttribute("aria-label", `Steps of ${this.stage}: ${this.timeline.summary() || nothing}`);
    this.part("memory").setAttribute("aria-label", `KV memory of ${this.stage}: ${this.memory.summary() || nothing}`);
  }
}
