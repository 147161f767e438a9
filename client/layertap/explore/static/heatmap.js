// A matrix as coloured cells with labels, a scale, and a cursor that the mouse, a finger or the arrow keys move.

import { colors, css, isLight, position, variable } from "./color.js";
import { fixed, make } from "./dom.js";
import { FONT, pen } from "./picture.js";

const MAX_CELL = 46;
const LABEL = 12;
const WITH_NUMBER = 36;
const GAP = 8;

export class Heatmap {
  // `moved(row, column)` is called with the cell under the cursor, or without any; `chosen` when one is clicked.
  constructor(parent, { label, moved, chosen, minCell = 4, height = 22, hasScale = true }) {
    Object.assign(this, { label, moved, chosen, minCell, height, hasScale, cell: null });
    this.canvas = make("canvas", { tabindex: "0", role: "img", "aria-label": label });
    this.cursor = make("canvas", { class: "cursor", "aria-hidden": "true" });
    this.stack = make("div", { class: "stack" }, this.canvas, this.cursor);
    this.scroll = make("div", { class: "scroll" }, this.stack);
    parent.append(this.scroll);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.move(null));
    this.canvas.addEventListener("click", (event) => {
      this.point(event);
      if (this.cell) this.chosen?.(...this.cell);
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("blur", () => this.move(null));
    new ResizeObserver(() => {
      if (this.data && this.scroll.clientWidth !== this.drawnFor) this.draw();
    }).observe(this.scroll);
  }

  // data: { values, rows, columns, rowLabels, columnLabels, low, high, map, alt }.
  show(data) {
    this.data = data;
    this.canvas.setAttribute("aria-label", data.alt ?? this.label);
    this.draw();
    if (this.cell && (this.cell[0] >= data.rows || this.cell[1] >= data.columns)) this.cell = null;
    this.mark();
    if (this.cell) this.moved?.(...this.cell);
  }

  draw() {
    const { rows, columns, rowLabels, columnLabels } = this.data;
    this.drawnFor = this.scroll.clientWidth;
    const measure = pen(this.canvas, 1, 1);
    measure.font = `${LABEL}px ${FONT}`;
    const widest = (labels) => Math.ceil(Math.max(0, ...labels.map((one) => measure.measureText(clip(one)).width)));
    this.left = rowLabels ? widest(rowLabels) + GAP + 3 : 0;
    const room = Math.max(80, this.drawnFor - this.left - 2);
    const fits = columnLabels ? Math.floor(room / columns) : room / columns;
    this.width = columnLabels ? Math.min(MAX_CELL, Math.max(this.minCell, fits)) : fits;
    this.tall = Math.min(this.height, Math.max(this.minCell, rowLabels && rows === columns ? this.width : this.height));
    if (rows > 64) this.tall = Math.max(this.minCell, Math.min(this.tall, Math.floor(640 / rows)));
    const hasNames = columnLabels && this.width >= LABEL;
    this.top = hasNames ? widest(columnLabels) + GAP : 0;
    const inner = [this.width * columns, this.tall * rows];
    const scale = this.hasScale ? 34 : 0;
    const total = [this.left + inner[0] + 1, this.top + inner[1] + scale];
    const context = pen(this.canvas, Math.max(total[0], this.hasScale ? 230 : 0), total[1]);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image(), this.left, this.top, ...inner);
    context.font = `${LABEL}px ${FONT}`;
    context.fillStyle = variable("--text");
    context.textBaseline = "middle";
    context.textAlign = "right";
    if (rowLabels && this.tall >= LABEL - 1)
      rowLabels.forEach((one, n) => context.fillText(clip(one), this.left - GAP, this.top + (n + 0.5) * this.tall));
    context.textAlign = "left";
    if (hasNames)
      columnLabels.forEach((one, n) => {
        context.save();
        context.translate(this.left + (n + 0.5) * this.width, this.top - GAP + 2);
        context.rotate(-Math.PI / 2);
        context.fillText(clip(one), 0, 0);
        context.restore();
      });
    if (hasNames && this.width >= WITH_NUMBER && this.tall >= 18) this.numbers(context);
    if (this.hasScale) this.scale(context, this.left, this.top + inner[1] + 12);
    this.mark();
  }

  // Returns the cells as an image of one pixel each.
  image() {
    const { values, rows, columns, low, high, map } = this.data;
    const picture = make("canvas");
    picture.width = columns;
    picture.height = rows;
    const pixels = new ImageData(columns, rows);
    const packed = new Uint32Array(pixels.data.buffer);
    const palette = colors(map);
    const factor = 1 / (high - low || 1);
    for (let n = 0; n < packed.length; n++)
      packed[n] = Number.isNaN(values[n]) ? 0 : palette[position((values[n] - low) * factor)];
    picture.getContext("2d").putImageData(pixels, 0, 0);
    return picture;
  }

  // Writes each number in its cell.
  numbers(context) {
    const { values, rows, columns, low, high, map } = this.data;
    context.textAlign = "center";
    context.font = `10.5px ${FONT}`;
    for (let n = 0; n < rows * columns; n++) {
      const share = (values[n] - low) / (high - low || 1);
      context.fillStyle = isLight(map, share) ? "#14161c" : "#f4f6fb";
      const digits = Math.abs(high - low) >= 10 ? 1 : 2;
      context.fillText(
        fixed(values[n], digits)
          .replace(/^−(0\.0+)$/, "$1")
          .replace(/^(−?)0\./, "$1."),
        this.left + ((n % columns) + 0.5) * this.width,
        this.top + (Math.floor(n / columns) + 0.5) * this.tall,
      );
    }
  }

  scale(context, left, top) {
    const { low, high, map } = this.data;
    for (let n = 0; n < 120; n++) {
      context.fillStyle = css(map, n / 119);
      context.fillRect(left + n, top, 1.5, 9);
    }
    context.fillStyle = variable("--faint");
    context.textBaseline = "top";
    context.font = `11px ${FONT}`;
    [low, (low + high) / 2, high].forEach((value, n) => {
      context.textAlign = ["left", "center", "right"][n];
      context.fillText(fixed(value, Math.abs(high - low) >= 10 ? 0 : 2), left + 60 * n, top + 12);
    });
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - this.left) / this.width);
    const row = Math.floor((event.clientY - box.top - this.top) / this.tall);
    const inside = row >= 0 && row < this.data.rows && column >= 0 && column < this.data.columns;
    this.move(inside ? [row, column] : null);
  }

  key(event) {
    const step = {
      ArrowUp: [-1, 0],
      ArrowDown: [1, 0],
      ArrowLeft: [0, -1],
      ArrowRight: [0, 1],
      Home: [0, -1e9],
      End: [0, 1e9],
    }[event.key];
    if ((event.key === "Enter" || event.key === " ") && this.cell) {
      event.preventDefault();
      this.chosen?.(...this.cell);
    } else if (step) {
      event.preventDefault();
      const [row, column] = this.cell ?? [0, 0];
      const inside = (value, most) => Math.max(0, Math.min(most - 1, value));
      this.move(
        this.cell ? [inside(row + step[0], this.data.rows), inside(column + step[1], this.data.columns)] : [0, 0],
      );
    }
  }

  move(cell) {
    if (String(cell) === String(this.cell)) return;
    this.cell = cell;
    this.mark();
    this.moved?.(...(cell ?? []));
  }

  // Draws a frame around the cell under the cursor, and around the one that was chosen.
  mark() {
    const context = pen(this.cursor, parseFloat(this.canvas.style.width), parseFloat(this.canvas.style.height));
    for (const [cell, dashes] of [
      [this.kept, [3, 2]],
      [this.cell, []],
    ]) {
      if (!cell) continue;
      context.setLineDash(dashes);
      const frame = [
        this.left + cell[1] * this.width,
        this.top + cell[0] * this.tall,
        Math.max(3, this.width),
        Math.max(3, this.tall),
      ];
      context.lineWidth = 3;
      context.strokeStyle = variable("--panel");
      context.strokeRect(...frame);
      context.lineWidth = 1.5;
      context.strokeStyle = variable("--text");
      context.strokeRect(...frame);
    }
  }
}

const clip = (label) => (label.length > 14 ? `${label.slice(0, 13)}…` : label);
