// Tokens: pieces, ids, words, specials, offsets and truncation; and how far padding and masks move the rows.

import { ask } from "./api.js";
import { fields, refresh } from "./app.js";
import { checkbox, make, quoted, radios, small } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { FONT, Picture, pen } from "./picture.js";
import { variable } from "./color.js";

const COLUMNS = ["tokens", "input_ids", "attention_mask", "token_type_ids", "word_ids", "special_tokens_mask"];

export default {
  id: "tokens",
  title: "Tokens",
  about:
    "What the model reads: pieces of words with their ids. Choose a 1 or 0 below a token to show it to the others or hide it, and see how far that moves the rows of all layers.",

  mount(panel) {
    const state = { padding: null, special: true, mode: "own", masks: null, parts: [] };
    const length = make("input", {
      type: "number",
      min: 1,
      max: 512,
      "aria-label": "Pad to so many tokens",
      placeholder: "none",
      onchange: () => {
        state.padding = length.value === "" ? null : Number(length.value);
        state.masks = null;
        refresh();
      },
    });
    const setMode = (mode) => {
      state.mode = mode;
      if (mode !== "hand") state.masks = null;
      refresh();
    };
    const modes = radios(
      "Attention mask",
      "mask",
      { own: "the tokenizer’s", inverted: "inverted", seen: "all 1", hand: "by hand" },
      "own",
      setMode,
    );
    panel.append(
      make(
        "div",
        { class: "controls" },
        make("label", {}, "Pad to", length),
        checkbox("special tokens", true, (checked) => {
          state.special = checked;
          state.masks = null;
          refresh();
        }),
        modes,
      ),
    );
    const place = make("div");
    panel.append(place);

    async function masksOf(asked, signal) {
      if (state.mode === "own") return null;
      if (state.mode === "hand" && state.masks) {
        const counts = state.tables?.map((table) => table.tokens.length);
        if (counts && state.masks.length === asked.texts.length && state.key === JSON.stringify(asked))
          return state.masks;
      }
      const { tokens } = await ask("tokens", asked, { signal });
      const masks = { inverted: (bit) => 1 - bit, seen: () => 1, hand: (bit) => bit }[state.mode];
      return tokens.map((table) => table.attention_mask.map(masks));
    }

    async function load(signal) {
      const asked = { ...fields(), pad_to: state.padding, special_tokens: state.special };
      const masks = await masksOf(asked, signal);
      const found = await ask("tokens", { ...asked, masks }, { signal });
      state.key = JSON.stringify(asked);
      state.tables = found.tokens;
      if (state.mode === "hand") state.masks = masks;
      const focused = document.activeElement?.dataset?.place;
      place.replaceChildren();
      state.parts = found.tokens.map((table, n) =>
        show(n, table, asked.texts[n], masks?.[n] ?? table.attention_mask, found),
      );
      if (focused) place.querySelector(`[data-place="${focused}"]`)?.focus();
    }

    function show(n, table, text, mask, found) {
      const name = found.tokens.length > 1 ? ["First sentence", "Second sentence"][n] : "Sentence";
      const padded = table.attention_mask.filter((bit) => bit === 0).length;
      const title = `${name}: ${table.tokens.length - padded} tokens${padded ? ` and ${padded} of padding` : ""}${table.truncated ? ", cut" : ""}`;
      const picture = new Picture(place, {
        title,
        name: `tokens-${n + 1}`,
        said: null,
        csv: () => [
          ["position", ...COLUMNS, "start", "end"],
          ...table.tokens.map((_, k) => [
            k,
            ...COLUMNS.map((column) => (column === "attention_mask" ? mask : table[column])[k]),
            ...table.offset_mapping[k],
          ]),
        ],
        png: () => [drawn(table, mask), ...(heat ? [heat.canvas] : [])],
      });
      picture.python = found.python;
      picture.body.append(original(table, text), pieces(n, table, mask));
      const values = found.arrays[`difference_${n}`];
      let heat = null;
      if (values) heat = effect(picture, table, found, n);
      return heat;
    }

    function pieces(n, table, mask) {
      return make(
        "ol",
        { class: "pieces", "aria-label": "Tokens" },
        ...table.tokens.map((piece, k) => {
          const isPadding = table.attention_mask[k] === 0;
          const isSpecial = table.special_tokens_mask[k] === 1;
          const [start, end] = table.offset_mapping[k];
          const kind = isPadding ? "padding" : isSpecial ? "special" : `word ${table.word_ids[k]}`;
          return make(
            "li",
            { class: `piece${isPadding ? " padding" : isSpecial ? " special" : ""}` },
            make("b", { text: piece }),
            make("span", { text: table.input_ids[k] }),
            make("span", { text: kind }),
            make("span", { text: isSpecial ? "–" : `${start}:${end}` }),
            make("button", {
              type: "button",
              text: mask[k],
              "data-place": `${n} ${k}`,
              "aria-pressed": String(mask[k] === 1),
              "aria-label": `Attention mask of ${piece} at ${k}`,
              onclick: () => flip(n, k),
            }),
          );
        }),
      );
    }

    function flip(n, k) {
      if (!state.masks)
        state.masks = state.tables.map((table) => {
          const masks = { own: (bit) => bit, inverted: (bit) => 1 - bit, seen: () => 1, hand: (bit) => bit }[
            state.mode
          ];
          return table.attention_mask.map(masks);
        });
      state.masks[n][k] = 1 - state.masks[n][k];
      state.mode = "hand";
      modes.querySelector("[value=hand]").checked = true;
      refresh();
    }

    return { refresh: load, redraw: () => state.parts.forEach((heat) => heat?.draw()) };
  },
};

// Returns the text with its tokens marked, and what was cut away.
function original(table, text) {
  const points = Array.from(text);
  const line = make("p", { class: "original", "aria-label": "The text, divided into its tokens" });
  let at = 0;
  const spans = table.offset_mapping.filter((_, k) => !table.special_tokens_mask[k]);
  const cutStart = table.truncated && spans.length ? spans[0][0] : 0;
  const plain = (from, to, isCut) => {
    if (to > from) line.append(make(isCut ? "s" : "span", { text: points.slice(from, to).join("") }));
  };
  for (const [start, end] of spans) {
    plain(at, start, at < cutStart);
    if (end > start) line.append(make("mark", { text: points.slice(start, end).join("") }));
    at = Math.max(at, end);
  }
  plain(at, points.length, table.truncated);
  return line;
}

// Draws how far each token's row moves in each layer.
function effect(picture, table, found, n) {
  const {
    values,
    shape: [rows, columns],
  } = found.arrays[`cosine_${n}`];
  const difference = found.arrays[`difference_${n}`].values;
  const last = difference.subarray((rows - 1) * columns);
  const largest = last.reduce((a, b) => Math.max(a, b), 0);
  const said = make("p", { class: "said", "aria-live": "polite" });
  const verdict =
    largest < 1e-4
      ? `The largest change of a value in the last layer is ${small(largest)}: what the mask hides changes nothing.`
      : `The largest change of a value in the last layer is ${small(largest)}: the model now sees something else.`;
  said.textContent = verdict;
  picture.body.append(make("h3", { text: "Cosine of each row to the one without padding and with every token seen" }));
  const order = (row) => rows - 1 - row;
  const turned = new Float32Array(values.length);
  for (let row = 0; row < rows; row++)
    turned.set(values.subarray(order(row) * columns, (order(row) + 1) * columns), row * columns);
  const heat = new Heatmap(picture.body, {
    label: "",
    minCell: 12,
    moved: (row, column) => {
      if (row === undefined) said.textContent = verdict;
      else
        said.textContent = `${quoted(table.tokens[column])} in layer ${order(row)}: cosine ${small(turned[row * columns + column])} to its row before, largest difference ${small(difference[order(row) * columns + column])}.`;
    },
  });
  picture.body.append(said);
  heat.show({
    values: turned,
    rows,
    columns,
    low: Math.min(
      0,
      values.reduce((a, b) => Math.min(a, b), 1),
    ),
    high: 1,
    map: "viridis",
    alt: verdict,
    rowLabels: Array.from({ length: rows }, (_, row) => `layer ${order(row)}`),
    columnLabels: table.tokens.slice(0, columns),
  });
  return heat;
}

// Draws the tokens as a table, for the PNG.
function drawn(table, mask) {
  const canvas = make("canvas");
  const rows = table.tokens.map((piece, k) => [
    piece,
    table.input_ids[k],
    mask[k],
    table.word_ids[k],
    table.offset_mapping[k].join(":"),
  ]);
  const context = pen(canvas, 420, 24 + 20 * rows.length);
  [["token", "id", "mask", "word", "offsets"], ...rows].forEach((row, n) => {
    context.font = `${n ? "" : "600 "}12px ${FONT}`;
    context.fillStyle = variable(n ? "--text" : "--faint");
    row.forEach((words, column) =>
      context.fillText(String(words).slice(0, 18), [0, 150, 220, 270, 330][column], 14 + 20 * n),
    );
  });
  return canvas;
}
