// What each step did, over time: a line for each answer, a box for each step that computed something for it.

import { colourOf, prepare, style } from "./canvas.js";

const LEFT = 26, BOTTOM = 20; // pixels: the answers' numbers, and the seconds

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

  // span: seconds of the whole picture, the same for every lane; now: where the clock stands
  draw(span, now) {
    const { context, width, height } = prepare(this.canvas);
    const scale = (width - LEFT) / span, line = (height - BOTTOM) / Math.max(1, this.answers);
    const x = (seconds) => LEFT + seconds * scale;
    const thick = Math.max(2, Math.min(18, line - 2));
    const y = (answer) => answer * line + (line - thick) / 2;
    this.axis(context, x, span, width, height);
    for (let answer = 0; answer < this.answers; answer++) {
      if (line >= 9) {
        context.fillStyle = colourOf(answer);
        context.font = `bold ${Math.min(13, line)}px system-ui, sans-serif`;
        context.textAlign = "right";
        context.textBaseline = "middle";
        context.fillText(answer + 1, LEFT - 6, y(answer) + thick / 2);
      }
      if (this.arrived[answer] === null) continue;
      const end = this.ended[answer] ?? now;
      context.fillStyle = style("--waits");
      context.fillRect(x(this.arrived[answer]), y(answer), Math.max(0, end - this.arrived[answer]) * scale, thick);
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
    context.fillRect(x(Math.min(now, span)), 0, 1.5, height - BOTTOM);
  }

  axis(context, x, span, width, height) {
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100].find((s) => span / s <= 8) || 200;
    context.font = "13px system-ui, sans-serif";
    context.textBaseline = "alphabetic";
    context.textAlign = "center";
    for (let at = 0; at <= span + 1e-9; at += step) {
      context.fillStyle = style("--line");
      context.fillRect(x(at), 0, 1, height - BOTTOM);
      context.fillStyle = style("--quiet");
      const label = `${Number(at.toFixed(1))} s`;
      if (x(at) < width - 12) context.fillText(label, Math.max(x(at), LEFT), height - 5);
    }
  }

  summary() {
    return `${this.steps} steps; ${this.ended.filter((t) => t !== null).length} of ${this.answers} answers done`;
  }
}
