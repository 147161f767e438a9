// Likeness: the tokens of two sentences against each other in a layer, and both sentences through all layers.

import { ask } from "./api.js";
import { fields, page, refresh, run } from "./app.js";
import { Chart } from "./chart.js";
import { checkbox, fixed, make, quoted, select } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { Picture } from "./picture.js";

const POOLINGS = {
  mean: "mean",
  cls: "first token",
  max: "max",
  last: "last token",
  mean_sqrt_len: "mean √length",
  mean_max: "mean and max",
};

const MOST_HELD = 16;

export default {
  id: "likeness",
  title: "Likeness",
  about:
    "How alike each pair of tokens is in the chosen layer, and how alike the two sentences are in each layer. Choose a cell to follow its two tokens through the layers: a word in two senses parts from itself.",
  layers: (info) => info.layer_count,

  mount(panel) {
    let pooling = "mean";
    let special = true;
    let pair = null;
    let found = null;
    const specials = checkbox("pool special tokens", true, (checked) => {
      special = checked;
      refresh();
    });
    panel.append(
      make(
        "div",
        { class: "controls" },
        select("Pooling", POOLINGS, pooling, (value) => {
          pooling = value;
          const first = value === "cls";
          specials.querySelector("input").disabled = first;
          if (first) {
            special = true;
            specials.querySelector("input").checked = true;
          }
          refresh();
        }),
        specials,
      ),
    );
    const place = make("div", { class: "two" });
    panel.append(place);
    const tokens = new Picture(place, {
      title: "Tokens",
      name: "similarity",
      said: "Move over a cell to read it; choose it to follow both tokens through the layers.",
      csv: () => {
        const [rows, columns] = sides();
        return [
          ["", ...columns],
          ...rows.map((piece, row) => [
            piece,
            ...found.arrays.similarity.values.subarray(row * columns.length, (row + 1) * columns.length),
          ]),
        ];
      },
      png: () => [heat.canvas],
    });
    const heat = new Heatmap(tokens.body, {
      label: "",
      minCell: 1,
      height: 38,
      moved: (row, column) => tokens.say(row === undefined ? null : words(row, column)),
      chosen: (row, column) => {
        pair = [
          [0, row],
          [found.tokens.length - 1, column],
        ];
        heat.kept = [row, column];
        heat.mark();
        refresh();
      },
    });
    const lines = new Picture(place, {
      title: "Through the layers",
      name: "trajectory",
      said: "",
      csv: () => [
        ["layer", ...chart.shown.lines.map(({ name }) => name)],
        ...chart.shown.layers.map((layer, n) => [layer, ...chart.shown.lines.map(({ values }) => values[n])]),
      ],
      png: () => [chart.canvas],
    });
    const chart = new Chart(lines.body, {
      label: "",
      moved: (index) =>
        lines.say(
          index === null || index === undefined
            ? null
            : chart.shown.lines
                .map(({ name, values }) => `${name} in layer ${found.layers[index]}: **${fixed(values[index])}**`)
                .join("; "),
        ),
    });

    const sides = () => [found.tokens[0], found.tokens.at(-1)];

    function words(row, column) {
      const [rows, columns] = sides();
      const value = found.arrays.similarity.values[row * columns.length + column];
      const how =
        value > 0.9
          ? "almost the same"
          : value > 0.6
            ? "much alike"
            : value > 0.3
              ? "somewhat alike"
              : value > -0.1
                ? "hardly alike"
                : "opposed";
      return `**${quoted(rows[row])}** (token ${row}) and **${quoted(columns[column])}** (token ${column}) are ${how} in layer ${found.layer}: cosine **${fixed(value)}**.`;
    }

    const held = new Map();

    // Asks for a layer, or returns what was asked before for the same texts.
    async function of(layer, signal) {
      const asked = { ...fields(), layer, pooling, special_tokens: special, pair };
      const key = JSON.stringify([page.info.fingerprint, asked]);
      if (!held.has(key)) {
        const message = await ask("likeness", asked, { signal });
        if (held.size >= MOST_HELD) held.delete(held.keys().next().value);
        held.set(key, message);
      }
      return held.get(key);
    }

    async function load(signal) {
      found = await of(page.layer, signal);
      if (pair && !found.arrays.token_trajectory) {
        pair = null;
        heat.kept = null;
      }
      draw();
      // The layers beside it, so that they are there when they are chosen.
      const beside = [page.layer - 1, page.layer + 1].filter((layer) => found.layers.includes(layer));
      Promise.allSettled(beside.map((layer) => of(layer, signal)));
    }

    function draw() {
      const [rows, columns] = sides();
      const isOne = found.tokens.length === 1;
      tokens.title.textContent = `Layer ${found.layer}: ${isOne ? "each token of the sentence with each other" : "first sentence (down) and second (across)"}`;
      heat.show({
        values: found.arrays.similarity.values,
        rows: rows.length,
        columns: columns.length,
        rowLabels: rows,
        columnLabels: columns,
        low: -1,
        high: 1,
        map: "diverging",
        alt: summary(rows, columns),
      });
      const shown = [];
      if (found.arrays.trajectory)
        shown.push({
          name: `both sentences, ${POOLINGS[pooling]}`,
          values: found.arrays.trajectory.values,
          color: "--first",
        });
      if (pair)
        shown.push({
          name: `${quoted(rows[pair[0][1]])} and ${quoted(columns[pair[1][1]])}`,
          values: found.arrays.token_trajectory.values,
          color: "--second",
          dash: [7, 4],
          mark: 9,
        });
      tokens.python = lines.python = found.python;
      lines.title.textContent = shown.length
        ? "Through the layers"
        : "Write a second sentence, or choose a cell, to follow it through the layers";
      lines.resting = shown
        .map(
          ({ name, values }) =>
            `${name}: from **${fixed(values[0], 2)}** in layer 0 to **${fixed(values.at(-1), 2)}** in the last`,
        )
        .join("; ");
      lines.say();
      chart.show(found.layers, shown, { layer: found.layer, alt: lines.resting.replaceAll("**", "") });
    }

    function summary(rows, columns) {
      const { values } = found.arrays.similarity;
      let best = -1;
      values.forEach((value, n) => {
        if (
          (best < 0 || value > values[best]) &&
          !(found.tokens.length === 1 && Math.floor(n / columns.length) === n % columns.length)
        )
          best = n;
      });
      const [row, column] = [Math.floor(best / columns.length), best % columns.length];
      return best < 0
        ? ""
        : `${rows.length} by ${columns.length} tokens in layer ${found.layer}. The most alike are ${quoted(rows[row])} and ${quoted(columns[column])}, cosine ${fixed(values[best], 2)}.`;
    }

    return { refresh: load, chooseLayer: () => run(load), redraw: () => found && draw() };
  },
};
