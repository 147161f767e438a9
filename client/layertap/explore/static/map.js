// Map: all tokens on the two axes along which tokens of all layers differ most; the axes stay, the tokens move.

import { ask } from "./api.js";
import { chooseLayer, fields, page, refresh } from "./app.js";
import { variable } from "./color.js";
import { fixed, make, quoted, select } from "./dom.js";
import { FONT, Picture, pen } from "./picture.js";

const MOVE_MS = 450;
const HEIGHT = 520;
const SIDE = 46;
const MOST_LABELS = 160;
const NEAR = 18;

export default {
  id: "map",
  title: "Map",
  about:
    "All tokens, seen from the two directions in which tokens differ most (principal components). The axes are the same in every layer, so what moves has moved. Play through the layers, or choose a token to see its way.",
  layers: (info) => info.layer_count,

  mount(panel) {
    let axesOf = "all";
    let found = null;
    let shown = null;
    let frame = 0;
    let near = null;
    const choice = make("div", { class: "controls" });
    panel.append(choice);
    const picture = new Picture(panel, {
      title: "",
      name: "map",
      said: "Move over a token, or focus the map and use the arrow keys, to see its way through the layers.",
      csv: () => [
        ["layer", "text", "token", "piece", "first", "second"],
        ...found.layers.flatMap((layer, k) => points(k).map(([x, y], n) => [layer, ...whose(n), x, y])),
      ],
      png: () => [canvas],
    });
    const canvas = make("canvas", { tabindex: "0", role: "img", "aria-label": "" });
    picture.body.append(
      make("div", { class: "scroll" }, canvas),
      make(
        "div",
        { class: "legend" },
        make("span", { class: "key first", text: "● first sentence" }),
        make("span", { class: "key second", text: "■ second sentence" }),
        make("span", { class: "key", text: "hollow: special tokens" }),
      ),
    );
    canvas.addEventListener("pointermove", (event) => look(event));
    canvas.addEventListener("pointerdown", (event) => look(event));
    canvas.addEventListener("pointerleave", () => mark(null));
    canvas.addEventListener("blur", () => mark(null));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step || !found) return;
      event.preventDefault();
      const count = found.arrays.points.shape[1];
      mark(near === null ? 0 : (near + step + count) % count);
    });
    new ResizeObserver(() => {
      if (found) draw(shown);
    }).observe(picture.body);

    const layerAt = () => Math.min(page.layer, found.layers.length - 1);

    function points(layer) {
      const {
        values,
        shape: [, count],
      } = found.arrays.points;
      return Array.from({ length: count }, (_, n) => [
        values[2 * (layer * count + n)],
        values[2 * (layer * count + n) + 1],
      ]);
    }

    function whose(n) {
      const first = found.tokens[0].length;
      return n < first ? [0, n, found.tokens[0][n]] : [1, n - first, found.tokens[1][n - first]];
    }

    async function load(signal) {
      found = await ask("map", { ...fields(), axes_of: axesOf === "all" ? null : Number(axesOf) }, { signal });
      const choices = {
        all: "all layers together",
        ...Object.fromEntries(found.layers.map((layer) => [layer, `layer ${layer}`])),
      };
      choice.replaceChildren(
        select("Axes of", choices, axesOf, (value) => {
          axesOf = value;
          refresh();
        }),
      );
      picture.python = found.python;
      near = null;
      const { values } = found.arrays.points;
      const range = (at) => {
        let [low, high] = [Infinity, -Infinity];
        for (let n = at; n < values.length; n += 2) {
          low = Math.min(low, values[n]);
          high = Math.max(high, values[n]);
        }
        const space = (high - low) * 0.06 || 1;
        return [low - space, high + space];
      };
      found.ranges = [range(0), range(1)];
      move(false);
    }

    // Moves all tokens to the chosen layer.
    function move(isSmooth) {
      cancelAnimationFrame(frame);
      const target = points(layerAt());
      const from = shown;
      picture.title.textContent = `Layer ${layerAt()}`;
      canvas.setAttribute(
        "aria-label",
        `Map of ${target.length} tokens in layer ${layerAt()}, ${fixed(100 * (found.arrays.explained.values[0] + found.arrays.explained.values[1]), 0)} % of the variance`,
      );
      if (!isSmooth || from?.length !== target.length || matchMedia("(prefers-reduced-motion: reduce)").matches)
        return draw(target);
      const began = performance.now();
      const step = (now) => {
        const part = Math.min(1, Math.max(0, (now - began) / MOVE_MS));
        const eased = part * part * (3 - 2 * part);
        draw(target.map(([x, y], n) => [from[n][0] + (x - from[n][0]) * eased, from[n][1] + (y - from[n][1]) * eased]));
        if (part < 1) frame = requestAnimationFrame(step);
      };
      frame = requestAnimationFrame(step);
    }

    function place([x, y]) {
      const [[left, right], [bottom, top]] = found.ranges;
      return [
        SIDE + ((x - left) / (right - left)) * (canvas.clientWidth - SIDE - 14),
        HEIGHT - 34 - ((y - bottom) / (top - bottom)) * (HEIGHT - 48),
      ];
    }

    function draw(now) {
      shown = now;
      const context = pen(canvas, Math.max(280, picture.body.clientWidth), HEIGHT);
      axes(context);
      if (near !== null) way(context, near);
      const taken = [];
      const isSpecial = (piece) => /^(\[.+\]|<.+>)$/.test(piece);
      now.forEach((point, n) => {
        const [text, , piece] = whose(n);
        const [x, y] = place(point);
        context.beginPath();
        if (text) context.rect(x - 4.5, y - 4.5, 9, 9);
        else context.arc(x, y, 5, 0, 7);
        context.strokeStyle = context.fillStyle = variable(text ? "--second" : "--first");
        context.lineWidth = 1.8;
        if (isSpecial(piece)) context.stroke();
        else context.fill();
      });
      context.font = `12px ${FONT}`;
      context.textBaseline = "middle";
      const order = near === null ? now.keys() : [near, ...now.keys()];
      let count = 0;
      for (const n of order) {
        if (count >= MOST_LABELS) break;
        const [x, y] = place(now[n]);
        const piece = whose(n)[2];
        const box = [x + 8, y - 7, x + 10 + context.measureText(piece).width, y + 7];
        if (taken.some((one) => box[0] < one[2] && one[0] < box[2] && box[1] < one[3] && one[1] < box[3])) continue;
        taken.push(box);
        count++;
        context.fillStyle = variable(n === near ? "--text" : "--faint");
        context.fillText(piece, x + 8, y);
      }
    }

    function axes(context) {
      const [width] = [canvas.clientWidth];
      context.strokeStyle = variable("--line");
      context.lineWidth = 1;
      context.strokeRect(SIDE, 14, width - SIDE - 14, HEIGHT - 48);
      const [x, y] = place([0, 0]);
      context.setLineDash([3, 4]);
      context.beginPath();
      context.moveTo(x, 14);
      context.lineTo(x, HEIGHT - 34);
      context.moveTo(SIDE, y);
      context.lineTo(width - 14, y);
      context.stroke();
      context.setLineDash([]);
      context.fillStyle = variable("--faint");
      context.font = "12px system-ui, sans-serif";
      context.textAlign = "center";
      context.textBaseline = "alphabetic";
      const share = (n) => `${fixed(100 * found.arrays.explained.values[n], 0)} % of the variance`;
      context.fillText(`first component, ${share(0)}`, SIDE + (width - SIDE) / 2, HEIGHT - 14);
      context.save();
      context.translate(24, HEIGHT / 2);
      context.rotate(-Math.PI / 2);
      context.fillText(`second component, ${share(1)}`, 0, 0);
      context.restore();
      context.textAlign = "left";
    }

    // Draws where a token was in each layer.
    function way(context, n) {
      const places = found.layers.map((_, layer) => place(points(layer)[n]));
      context.strokeStyle = variable("--text");
      context.fillStyle = variable("--text");
      context.lineWidth = 1.5;
      context.beginPath();
      places.forEach(([x, y], layer) => (layer ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.stroke();
      context.font = `600 11px ${FONT}`;
      places.forEach(([x, y], layer) => {
        context.beginPath();
        context.arc(x, y, 2.5, 0, 7);
        context.fill();
        context.fillText(String(found.layers[layer]), x - 3, y - 9);
      });
    }

    function look(event) {
      if (!found) return;
      const box = canvas.getBoundingClientRect();
      let best = null;
      let distance = NEAR;
      shown.forEach((point, n) => {
        const [x, y] = place(point);
        const own = Math.hypot(x - event.clientX + box.left, y - event.clientY + box.top);
        if (own < distance) [best, distance] = [n, own];
      });
      mark(best);
    }

    function mark(n) {
      if (n === near || !found) return;
      near = n;
      draw(shown);
      if (n === null) return picture.say();
      const [text, token, piece] = whose(n);
      const own = found.layers.map((_, layer) => points(layer)[n]);
      const length = own.slice(1).reduce((sum, [x, y], k) => sum + Math.hypot(x - own[k][0], y - own[k][1]), 0);
      const here = own[layerAt()];
      picture.say(
        `**${quoted(piece)}** (token ${token} of sentence ${text + 1}) is at **${fixed(here[0], 2)}, ${fixed(here[1], 2)}** in layer ${layerAt()}; its way through all layers is ${fixed(length, 1)} long on this map.`,
      );
    }

    return {
      refresh: load,
      chooseLayer: () => found && move(true),
      redraw: () => found && draw(shown),
      choose: chooseLayer,
    };
  },
};
