// The KV memory as a map of cells: 16 token slots each, in the order of their addresses. The same picture for every
// stage: a row of 512 slots is 32 neighbouring cells with one owner, a block of 16 is one cell.

import { colourOf, prepare, rem, style, type } from "./canvas.js";

const CELL = 16;
const LARGEST = 2.6, TYPE = 1.1; // rem: of a cell, and of the numbers in it

export class MemoryMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.reset(null);
  }

  // prepared: the event of that name, or null before there is one
  reset(prepared) {
    this.known = prepared !== null;
    this.capacity = prepared?.capacity ?? 0;
    this.size = Math.min(CELL, prepared?.row || CELL);
    this.regions = new Map(); // start -> [length, stored, owners]
  }

  apply(changes) {
    for (const start of changes.free) this.regions.delete(start);
    for (const [start, length, stored, owners] of changes.set) this.regions.set(start, [length, stored, owners]);
  }

  summary() {
    if (!this.known) return "";
    if (!this.capacity) return "none: everything is recomputed in each step";
    let held = 0, filled = 0, shared = 0, kept = 0;
    for (const [length, stored, owners] of this.regions.values()) {
      if (!owners.length) {
        kept += length;
        continue;
      }
      held += length;
      filled += stored;
      shared += owners.length > 1 ? length : 0;
    }
    const also = (shared ? `, ${shared.toLocaleString("en")} shared` : "") +
      (kept ? `; ${kept.toLocaleString("en")} kept for later` : "");
    return `${held.toLocaleString("en")} of ${this.capacity.toLocaleString("en")} tokens held, ` +
      `${filled.toLocaleString("en")} filled${also}`;
  }

  draw() {
    const { context, width, height } = prepare(this.canvas);
    if (!this.capacity) return;
    const count = Math.ceil(this.capacity / this.size);
    let side = Math.floor(Math.min(rem(LARGEST), Math.sqrt((width * height) / count)));
    while (side > 3 && Math.ceil(count / Math.floor(width / side)) * side > height) side--;
    const columns = Math.max(1, Math.floor(width / side));
    const edge = side - (side > 6 ? 2 : 1);
    const at = (cell) => [(cell % columns) * side, Math.floor(cell / columns) * side];
    const cells = this.cells(count);
    for (let cell = 0; cell < count; cell++) this.cell(context, ...at(cell), edge, cells[cell]);
    // The number of the owner, once for neighbouring cells of the same one: small cells have room for it together.
    for (let first = 0, last = 0; first < count; first = last) {
      const label = cells[first]?.label, row = Math.floor(first / columns);
      for (last = first + 1; last < count && cells[last]?.label === label && Math.floor(last / columns) === row;) last++;
      if (label) this.number(context, label, ...at(first), (last - first) * side - (side - edge), edge);
    }
  }

  // What is in each cell: { owners, fill, label }, or nothing. `owners` is empty for what is kept for later prompts.
  cells(count) {
    const cells = new Array(count);
    for (const [start, [length, stored, all]] of this.regions) {
      const owners = all[0] < 0 ? [] : all;
      const label = owners.length > 1 ? `×${owners.length}` : owners.length ? `${owners[0] + 1}` : "";
      for (let offset = 0; offset < length; offset += this.size) {
        const fill = Math.max(0, Math.min(1, (stored - offset) / this.size));
        cells[Math.floor((start + offset) / this.size)] = { owners, fill, label };
      }
    }
    return cells;
  }

  // Filled from the bottom, in the colours of all its owners; hatched where it is held and empty; a dot if free.
  cell(context, x, y, edge, what) {
    context.save();
    context.beginPath();
    context.rect(x, y, edge, edge);
    context.clip();
    context.lineWidth = 1;
    if (!what) {
      const dot = Math.max(2, Math.round(edge / 8));
      context.fillStyle = style("--edge");
      context.fillRect(x + (edge - dot) / 2, y + (edge - dot) / 2, dot, dot);
    }
    const colours = !what ? [] : what.owners.length ? what.owners.map(colourOf) : [style("--kept")];
    const share = edge / Math.max(1, colours.length);
    for (const [index, colour] of colours.entries()) {
      context.fillStyle = context.strokeStyle = colour;
      context.fillRect(x + index * share, y + edge * (1 - what.fill), share, edge * what.fill);
      if (what.fill === 1) continue;
      context.beginPath();
      for (let line = -edge; line < edge; line += 5) {
        context.moveTo(x + line, y + edge);
        context.lineTo(x + line + edge, y);
      }
      context.rect(x, y, edge, edge);
      context.stroke();
    }
    context.restore();
  }

  number(context, label, x, y, wide, edge) {
    const size = Math.min(rem(TYPE), edge + 1);
    context.font = type(size, "bold");
    if (context.measureText(label).width > wide + 2) return;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineWidth = size / 6;
    context.lineJoin = "round";
    context.strokeStyle = style("--paper");
    context.strokeText(label, x + wide / 2, y + edge / 2 + 1);
    context.fillStyle = style("--ink");
    context.fillText(label, x + wide / 2, y + edge / 2 + 1);
  }
}
