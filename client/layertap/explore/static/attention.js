// Attentions: all heads of all layers small, one of them large, and lines between its tokens.

import { ask } from "./api.js";
import { fields, refresh, run } from "./app.js";
import { colors, css, position, variable } from "./color.js";
import { fixed, make, quoted, select } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { FONT, Picture, pen } from "./picture.js";

const LINE = 24;
const LEAST = 0.04;
const MOST_LINES = 4000;
const GAP = 3;

// Returns the layer and head whose tokens look most firmly at single ones that are no neighbours, nor the first or last.
function sharpest({ values, shape: [layers, heads, rows, columns] }) {
  const scores = Array.from({ length: layers * heads }, (_, n) => {
    let score = 0;
    for (let row = 1; row < rows - 1; row++) {
      let most = 0;
      for (let column = 1; column < columns - 1; column++)
        if (Math.abs(column - row) > 1) most = Math.max(most, values[(n * rows + row) * columns + column]);
      score += most;
    }
    return score;
  });
  const best = scores.indexOf(Math.max(...scores));
  return [Math.floor(best / heads), best % heads];
}

export default {
  id: "attention",
  title: "Attentions",
  about:
    "Where each token looks, in each block of the model and each head. Choose a head in the grid. Attention of layer k is that of the block which reads layer k and makes layer k + 1; each row adds up to 1.",

  mount(panel) {
    const state = { text: 0, layer: 0, head: 0, over: null };
    let found = null;
    const choice = make("div", { class: "controls" });
    panel.append(choice);
    const all = new Picture(panel, {
      title: "All heads",
      name: "attention-heads",
      said: "Layers go down, heads across. Choose a head, or focus the grid and use the arrow keys.",
      csv: () => [["layer", "head", "row", "column", "attention"], ...gridRows()],
      png: () => [grid],
    });
    const grid = make("canvas", { tabindex: "0", role: "img", "aria-label": "Heads by layers" });
    all.body.append(make("div", { class: "scroll" }, grid));
    const place = make("div", { class: "two" });
    panel.append(place);
    const one = new Picture(place, {
      title: "",
      name: "attention",
      said: "Rows look at columns.",
      csv: () => [["", ...found.tokens[0]], ...found.tokens[0].map((piece, row) => [piece, ...rowOf(row)])],
      png: () => [heat.canvas],
    });
    const heat = new Heatmap(one.body, {
      label: "",
      minCell: 2,
      height: 28,
      moved: (row, column) => over(row, column),
    });
    const lines = new Picture(place, {
      title: "Lines",
      name: "attention-lines",
      said: "From each token, left, to those it looks at, right. Shares below 4 % are left out.",
      csv: () => [
        ["from", "to", "attention"],
        ...drawnLines().map(([from, to, share]) => [found.tokens[0][from], found.tokens[0][to], share]),
      ],
      png: () => [drawing],
    });
    const drawing = make("canvas", { role: "img", "aria-label": "" });
    lines.body.append(make("div", { class: "scroll" }, drawing));
    drawing.addEventListener("pointermove", (event) => {
      if (!found) return;
      const box = drawing.getBoundingClientRect();
      const row = Math.floor((event.clientY - box.top) / LINE);
      over(row >= 0 && row < found.tokens[0].length && event.clientX - box.left < box.width / 2 ? row : undefined);
    });
    drawing.addEventListener("pointerleave", () => over());
    grid.addEventListener("click", (event) => {
      const box = grid.getBoundingClientRect();
      const side = state.side + GAP;
      pick(Math.floor((event.clientY - box.top - 16) / side), Math.floor((event.clientX - box.left - 30) / side));
    });
    grid.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      pick(state.layer + step[0], state.head + step[1]);
    });
    new ResizeObserver(() => {
      if (found) {
        drawGrid();
        drawLines();
      }
    }).observe(panel);

    const rowOf = (row) =>
      found.arrays.attention.values.subarray(row * found.tokens[0].length, (row + 1) * found.tokens[0].length);

    function gridRows() {
      const {
        values,
        shape: [, heads, rows, columns],
      } = found.grid;
      return Array.from(values, (value, n) => [
        Math.floor(n / (heads * rows * columns)),
        Math.floor(n / (rows * columns)) % heads,
        Math.floor(n / columns) % rows,
        n % columns,
        value,
      ]);
    }

    function pick(layer, head) {
      if (!found || layer < 0 || head < 0 || layer >= found.layers.length || head >= found.heads.length) return;
      [state.layer, state.head] = [layer, head];
      run((signal) => load(signal, false));
    }

    async function load(signal, isNew = true) {
      const asked = fields();
      state.text = Math.min(state.text, asked.texts.length - 1);
      const message = await ask(
        "attention",
        { ...asked, text: state.text, layer: state.layer, head: state.head, grid: isNew || !found },
        { signal },
      );
      message.grid = message.arrays.grid ?? found.grid;
      found = message;
      [state.layer, state.head] = [found.layer, found.head];
      if (!state.isChosen) {
        state.isChosen = true;
        [state.layer, state.head] = sharpest(found.grid);
        return load(signal, false);
      }
      choice.replaceChildren();
      if (asked.texts.length > 1)
        choice.append(
          select("Sentence", { 0: "first", 1: "second" }, String(state.text), (value) => {
            state.text = Number(value);
            refresh();
          }),
        );
      all.python = one.python = lines.python = found.python;
      draw();
    }

    function draw() {
      drawGrid();
      const [tokens] = found.tokens;
      one.title.textContent = `Layer ${found.layer}, head ${found.head}`;
      lines.title.textContent = `Layer ${found.layer}, head ${found.head}: lines`;
      const sums = tokens.map(
        (_, column) => tokens.reduce((sum, __, row) => sum + rowOf(row)[column], 0) / tokens.length,
      );
      const most = sums.indexOf(Math.max(...sums));
      const alt = `${quoted(tokens[most])} (token ${most}) is looked at most: ${fixed(100 * sums[most], 0)} % of all attention of layer ${found.layer}, head ${found.head}.`;
      one.resting = alt;
      one.say();
      heat.show({
        values: found.arrays.attention.values,
        rows: tokens.length,
        columns: tokens.length,
        rowLabels: tokens,
        columnLabels: tokens,
        low: 0,
        high: 1,
        map: "fade",
        alt,
      });
      drawing.setAttribute("aria-label", alt);
      drawLines();
    }

    function drawGrid() {
      const {
        values,
        shape: [layers, heads, rows, columns],
      } = found.grid;
      const room = all.body.clientWidth - 34;
      state.side = Math.max(22, Math.min(84, Math.floor(room / heads) - GAP));
      const side = state.side;
      const context = pen(grid, 30 + heads * (side + GAP), 18 + layers * (side + GAP));
      context.imageSmoothingEnabled = false;
      context.font = `11px ${FONT}`;
      context.textBaseline = "middle";
      const palette = colors("fade");
      const small = make("canvas");
      small.width = columns;
      small.height = rows;
      for (let layer = 0; layer < layers; layer++) {
        context.fillStyle = variable("--faint");
        context.fillText(String(layer), 8, 16 + (layer + 0.5) * (side + GAP));
        for (let head = 0; head < heads; head++) {
          const pixels = new ImageData(columns, rows);
          const packed = new Uint32Array(pixels.data.buffer);
          const start = (layer * heads + head) * rows * columns;
          for (let n = 0; n < packed.length; n++) packed[n] = palette[position(values[start + n])];
          small.getContext("2d").putImageData(pixels, 0, 0);
          const [x, y] = [30 + head * (side + GAP), 16 + layer * (side + GAP)];
          context.drawImage(small, x, y, side, side);
          const isChosen = layer === state.layer && head === state.head;
          context.strokeStyle = variable(isChosen ? "--second" : "--line");
          context.lineWidth = isChosen ? 3 : 1;
          context.strokeRect(x, y, side, side);
          if (!layer) {
            context.fillStyle = variable("--faint");
            context.fillText(String(head), x + side / 2 - 5, 7);
          }
        }
      }
      grid.setAttribute(
        "aria-label",
        `${layers} layers by ${heads} heads; layer ${state.layer}, head ${state.head} is chosen`,
      );
    }

    // Returns the strongest lines: from, to, share.
    function drawnLines() {
      const count = found.tokens[0].length;
      const kept = [];
      found.arrays.attention.values.forEach((share, n) => {
        if (share >= LEAST) kept.push([Math.floor(n / count), n % count, share]);
      });
      return kept.sort((a, b) => b[2] - a[2]).slice(0, MOST_LINES);
    }

    function drawLines() {
      const [tokens] = found.tokens;
      const width = Math.max(240, lines.body.clientWidth);
      const context = pen(drawing, width, tokens.length * LINE + 4);
      const middle = (row) => (row + 0.5) * LINE;
      context.font = `12px ${FONT}`;
      context.textBaseline = "middle";
      const wide = Math.min(width / 3, Math.max(...tokens.map((piece) => context.measureText(piece).width)) + 8);
      for (const [from, to, share] of drawnLines().reverse()) {
        const isOver = state.over === null || state.over === from;
        context.globalAlpha = isOver ? 0.4 + 0.6 * share : 0.06;
        context.strokeStyle = css("fade", 0.35 + 0.55 * share);
        context.lineWidth = 0.5 + 4.5 * share;
        context.beginPath();
        context.moveTo(wide, middle(from));
        context.bezierCurveTo(width / 2, middle(from), width / 2, middle(to), width - wide, middle(to));
        context.stroke();
      }
      context.globalAlpha = 1;
      tokens.forEach((piece, row) => {
        context.fillStyle = variable("--text");
        context.font = `${state.over === row ? "700 " : ""}12px ${FONT}`;
        context.textAlign = "right";
        context.fillText(piece, wide - 6, middle(row), wide);
        context.textAlign = "left";
        context.font = `12px ${FONT}`;
        const share = state.over === null ? 0 : rowOf(state.over)[row];
        context.fillStyle = variable(state.over === null || share >= LEAST ? "--text" : "--faint");
        context.fillText(piece, width - wide + 6, middle(row), wide);
      });
    }

    function over(row, column) {
      const next = row ?? null;
      if (column !== undefined)
        one.say(
          `**${quoted(found.tokens[0][row])}** (token ${row}) gives **${fixed(100 * rowOf(row)[column], 1)} %** of its attention to **${quoted(found.tokens[0][column])}** (token ${column}).`,
        );
      else one.say();
      if (next === state.over) return;
      state.over = next;
      if (next === null) lines.say();
      else {
        const best = Array.from(rowOf(next), (share, to) => [share, to])
          .sort((a, b) => b[0] - a[0])
          .slice(0, 3);
        lines.say(
          `**${quoted(found.tokens[0][next])}** looks most at ${best.map(([share, to]) => `${quoted(found.tokens[0][to])} (**${fixed(100 * share, 0)} %**)`).join(", ")}.`,
        );
      }
      drawLines();
    }

    return { refresh: load, redraw: () => found && draw() };
  },
};
