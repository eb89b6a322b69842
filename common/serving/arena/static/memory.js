// The KV memory as a map of cells: 16 token slots each, in the order of their addresses. The same picture for every
// stage: a row of 512 slots is 32 neighbouring cells with one owner, a block of 16 is one cell.

import { colourOf, prepare, style } from "./canvas.js";

const CELL = 16;
const LARGEST = 34; // pixels

export class MemoryMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.reset({ capacity: 0, row: CELL });
  }

  reset(prepared) {
    this.capacity = prepared.capacity;
    this.size = Math.min(CELL, prepared.row || CELL);
    this.regions = new Map(); // start -> [length, stored, owners]
  }

  apply(changes) {
    for (const start of changes.free) this.regions.delete(start);
    for (const [start, length, stored, owners] of changes.set) this.regions.set(start, [length, stored, owners]);
  }

  summary() {
    if (!this.capacity) return "none: everything is computed anew in each step";
    let held = 0, filled = 0, shared = 0;
    for (const [length, stored, owners] of this.regions.values()) {
      held += length;
      filled += stored;
      shared += owners.length > 1 ? length : 0;
    }
    const also = shared ? `, ${shared.toLocaleString("en")} shared` : "";
    return `${held.toLocaleString("en")} of ${this.capacity.toLocaleString("en")} tokens held, ` +
      `${filled.toLocaleString("en")} filled${also}`;
  }

  draw() {
    const { context, width, height } = prepare(this.canvas);
    if (!this.capacity) {
      context.fillStyle = style("--quiet");
      context.font = `${style("font-size")} system-ui, sans-serif`;
      context.fillText("no KV cache", 0, 24);
      return;
    }
    const cells = Math.ceil(this.capacity / this.size);
    let side = Math.min(LARGEST, Math.floor(Math.sqrt((width * height) / cells)));
    while (side > 3 && Math.ceil(cells / Math.floor(width / side)) * side > height) side--;
    const columns = Math.max(1, Math.floor(width / side));
    const at = (cell) => [(cell % columns) * side, Math.floor(cell / columns) * side, side - (side > 6 ? 2 : 1)];
    context.fillStyle = style("--free");
    for (let cell = 0; cell < cells; cell++) {
      const [x, y, edge] = at(cell);
      context.fillRect(x, y, edge, edge);
    }
    for (const [start, [length, stored, owners]] of this.regions) {
      for (let offset = 0; offset < length; offset += this.size) {
        const fill = Math.max(0, Math.min(1, (stored - offset) / this.size));
        this.cell(context, ...at((start + offset) / this.size), fill, owners, offset === 0);
      }
    }
  }

  // One cell: filled from the bottom, in the colours of all its owners; hatched where it is held and empty.
  cell(context, x, y, edge, fill, owners, first) {
    const kept = owners.length === 0 || owners[0] < 0;
    const share = edge / Math.max(1, owners.length);
    context.save();
    context.beginPath();
    context.rect(x, y, edge, edge);
    context.clip();
    (kept ? [-1] : owners).forEach((owner, index) => {
      const colour = kept ? style("--kept") : colourOf(owner);
      context.fillStyle = colour;
      context.globalAlpha = kept ? 0.45 : 1;
      context.fillRect(x + index * share, y + edge * (1 - fill), kept ? edge : share, edge * fill);
      if (fill < 1) {
        context.strokeStyle = colour;
        context.globalAlpha = 0.75;
        context.beginPath();
        for (let line = -edge; line < edge; line += 5) {
          context.moveTo(x + line, y + edge);
          context.lineTo(x + line + edge, y);
        }
        context.rect(x, y, edge, edge);
        context.stroke();
      }
    });
    context.restore();
    const label = owners.length > 1 ? `×${owners.length}` : first && !kept ? `${owners[0] + 1}` : "";
    if (label && edge >= 15) {
      context.font = `bold ${Math.min(14, edge * 0.55)}px system-ui, sans-serif`;
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.lineWidth = 3;
      context.strokeStyle = style("--paper");
      context.strokeText(label, x + edge / 2, y + edge / 2);
      context.fillStyle = style("--ink");
      context.fillText(label, x + edge / 2, y + edge / 2);
    }
  }
}
