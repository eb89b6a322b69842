// What each step did, over time: a line for each answer, a box for each step that computed something for it.

import { prepare, rem, style, type } from "./canvas.js";

const LEFT = 1.5, BOTTOM = 1.15, TYPE = 0.75; // rem: room for the answers' numbers and for the seconds, and their size

export class Timeline {
  constructor(canvas) {
    this.canvas = canvas;
    this.reset(0);
  }

  reset(answers) {
    this.answers = answers;
    this.boxes = []; // [answer, kind, begin, end]
    this.arrived = new Array(answers).fill(null);
    this.ended = new Array(answers).fill(null);
    this.preempted = []; // [answer, time]
    this.steps = 0;
  }

  apply(event) {
    if (event.event === "arrived") for (const answer of event.answers) this.arrived[answer] = event.t;
    if (event.event !== "step") return;
    this.steps++;
    for (const [answer, kind] of event.chunks) {
      const name = kind === "fork" ? "prefill" : kind;
      this.boxes.push([answer, name, event.begin, event.t]);
    }
    for (const answer of event.preempted) this.preempted.push([answer, event.begin]);
    for (const [answer, , , reason] of event.gained) if (reason) this.ended[answer] = event.t;
  }

  // span: seconds of the whole picture, the same for every lane; now: the time of the clock
  draw(span, now) {
    const { context, width, height } = prepare(this.canvas);
    if (!this.answers) return; // nothing is known yet
    const left = rem(LEFT), bottom = height - rem(BOTTOM);
    const scale = (width - left) / span, line = bottom / this.answers;
    const x = (seconds) => left + seconds * scale;
    const thick = Math.max(2, Math.min(rem(1.1), line - 2));
    const y = (answer) => answer * line + (line - thick) / 2;
    this.axis(context, x, span, width, bottom);
    for (let answer = 0; answer < this.answers; answer++) {
      context.fillStyle = style("--ink");
      context.font = type(Math.min(rem(TYPE), line + 1), "bold");
      context.textAlign = "right";
      context.textBaseline = "middle";
      context.fillText(answer + 1, left - rem(0.35), y(answer) + thick / 2);
      if (this.arrived[answer] === null) continue;
      const end = this.ended[answer] ?? now;
      const wide = Math.max(0, end - this.arrived[answer]) * scale;
      context.fillStyle = style("--waits");
      context.strokeStyle = style("--edge");
      context.fillRect(x(this.arrived[answer]), y(answer), wide, thick);
      if (wide > 1) context.strokeRect(x(this.arrived[answer]) + 0.5, y(answer) + 0.5, wide - 1, thick - 1);
    }
    const colours = Object.fromEntries(["prefill", "decode", "recompute", "idle"].map((k) => [k, style(`--${k}`)]));
    for (const [answer, kind, begin, end] of this.boxes) {
      context.fillStyle = colours[kind];
      const wide = (end - begin) * scale;
      context.fillRect(x(begin), y(answer), Math.max(0.7, wide > 4 ? wide - 1 : wide), thick);
    }
    context.fillStyle = style("--recompute");
    for (const [answer, at] of this.preempted) {
      context.beginPath();
      context.moveTo(x(at), y(answer) - 1);
      context.lineTo(x(at) - 5, y(answer) + thick + 1);
      context.lineTo(x(at) + 5, y(answer) + thick + 1);
      context.fill();
    }
    context.fillStyle = style("--ink");
    context.fillRect(x(Math.min(now, span)), 0, 1.5, bottom);
  }

  axis(context, x, span, width, bottom) {
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100].find((s) => span / s <= 8) || 200;
    context.font = type(rem(TYPE));
    context.textBaseline = "alphabetic";
    context.textAlign = "center";
    for (let at = 0; at <= span + 1e-9; at += step) {
      context.fillStyle = style("--line");
      context.fillRect(x(at), 0, 1, bottom);
      context.fillStyle = style("--quiet");
      const label = `${Number(at.toFixed(1))} s`;
      if (x(at) < width - rem(0.75)) context.fillText(label, x(at), bottom + rem(0.9));
    }
  }

  summary() {
    if (!this.answers) return "";
    return `${this.steps} steps; ${this.ended.filter((t) => t !== null).length} of ${this.answers} answers done`;
  }
}
