// Tokens × layers: how each token changes.

import { ask } from "./api.js";
import { chooseLayer, fields } from "./app.js";
import { fixed, make, quoted, radios } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { Picture } from "./picture.js";

const MEASURES = {
  cosine_to_first: "to its own layer 0",
  cosine_to_previous: "to the layer below",
  norm: "length of the row",
};
const TITLES = {
  cosine_to_first: "cosine of each token to its own layer 0",
  cosine_to_previous: "cosine of each token to the layer below",
  norm: "length of each token’s row",
};

export default {
  id: "change",
  title: "Tokens × layers",
  about:
    "How each token changes from layer to layer, lowest layer at the bottom. A cosine of 1 means that the row still points where it did; near 0, that nothing of that direction is left.",

  mount(panel) {
    let measure = "cosine_to_first";
    let found = null;
    let parts = [];
    const place = make("div");
    panel.append(
      make(
        "div",
        { class: "controls" },
        radios("Compare", "measure", MEASURES, measure, (value) => {
          measure = value;
          if (found) draw();
        }),
      ),
      place,
    );

    async function load(signal) {
      found = await ask("change", fields(), { signal });
      draw();
    }

    function draw() {
      const count = found.tokens.length;
      if (parts.length !== count) {
        place.replaceChildren();
        parts = found.tokens.map((_, n) => build(n));
      }
      parts.forEach(({ picture, heat }, n) => {
        const {
          values,
          shape: [rows, columns],
        } = found.arrays[`${measure}_${n}`];
        const turned = new Float32Array(values.length);
        for (let row = 0; row < rows; row++)
          turned.set(values.subarray((rows - 1 - row) * columns, (rows - row) * columns), row * columns);
        const isNorm = measure === "norm";
        const low = values.reduce((a, b) => Math.min(a, b), isNorm ? Infinity : 0);
        const high = isNorm ? values.reduce((a, b) => Math.max(a, b), -Infinity) : 1;
        picture.title.textContent = `${count > 1 ? `${["First", "Second"][n]} sentence` : "Sentence"}: ${TITLES[measure]}${found.truncated[n] ? " (cut)" : ""}`;
        picture.python = found.python;
        heat.show({
          values: turned,
          rows,
          columns,
          low,
          high,
          map: "viridis",
          columnLabels: found.tokens[n],
          rowLabels: Array.from({ length: rows }, (_, row) => `layer ${found.layers[rows - 1 - row]}`),
          alt: summary(n, rows, columns),
        });
      });
    }

    function build(n) {
      const picture = new Picture(place, {
        title: "",
        name: `tokens-by-layers-${n + 1}`,
        said: "Move over a cell, or focus the picture and use the arrow keys, to read it in words.",
        csv: () => [["layer", "token", "piece", ...Object.keys(MEASURES)], ...rowsOf(n)],
        png: () => [heat.canvas],
      });
      const heat = new Heatmap(picture.body, {
        label: "",
        minCell: 6,
        height: 26,
        moved: (row, column) => picture.say(row === undefined ? null : words(n, row, column)),
        chosen: (row) => chooseLayer(found.layers[found.layers.length - 1 - row]),
      });
      return { picture, heat };
    }

    const at = (name, n, layer, token) => found.arrays[`${name}_${n}`].values[layer * found.tokens[n].length + token];

    function rowsOf(n) {
      return found.layers.flatMap((layer, k) =>
        found.tokens[n].map((piece, token) => [
          layer,
          token,
          piece,
          ...Object.keys(MEASURES).map((name) => at(name, n, k, token)),
        ]),
      );
    }

    function words(n, row, token) {
      const layer = found.layers.length - 1 - row;
      const [first, previous, norm] = Object.keys(MEASURES).map((name) => at(name, n, layer, token));
      const name = `**${quoted(found.tokens[n][token])}** (token ${token})`;
      if (layer === 0)
        return `${name} in layer 0: the word, its place and its segment, before any attention. Its row is **${fixed(norm, 2)}** long.`;
      const kept =
        first > 0.9
          ? "points almost where it began"
          : first > 0.6
            ? "still has much of where it began"
            : first > 0.3
              ? "has left most of where it began"
              : "has next to nothing of where it began";
      const step = previous > 0.97 ? "hardly turned it" : previous > 0.85 ? "turned it a little" : "turned it far";
      return `${name} in layer ${found.layers[layer]} ${kept}: cosine **${fixed(first)}** to its layer 0. The block before ${step}: **${fixed(previous)}** to layer ${found.layers[layer - 1]}. Its row is **${fixed(norm, 2)}** long.`;
    }

    function summary(n, rows, columns) {
      const last = found.layers.length - 1;
      const order = found.tokens[n]
        .map((_, token) => token)
        .sort((a, b) => at("cosine_to_first", n, last, a) - at("cosine_to_first", n, last, b));
      return `${columns} tokens by ${rows} layers. In the last layer ${quoted(found.tokens[n][order[0]])} has changed most, cosine ${fixed(at("cosine_to_first", n, last, order[0]), 2)} to its layer 0, and ${quoted(found.tokens[n][order.at(-1)])} least, ${fixed(at("cosine_to_first", n, last, order.at(-1)), 2)}.`;
    }

    return { refresh: load, redraw: () => parts.forEach(({ heat }) => heat.data && heat.draw()) };
  },
};
