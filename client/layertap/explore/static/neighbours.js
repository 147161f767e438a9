// Neighbours: a list of sentences, embedded once, and those nearest to the first sentence in each layer.

import { Refusal, ask, messages } from "./api.js";
import { fail, fields, page, refresh } from "./app.js";
import { Chart } from "./chart.js";
import { fixed, make, select } from "./dom.js";
import { Picture } from "./picture.js";

const POOLINGS = {
  mean: "mean",
  cls: "first token",
  max: "max",
  last: "last token",
  mean_sqrt_len: "mean √length",
  mean_max: "mean and max",
};
const EXAMPLE = [
  "The boat drifted to the bank of the stream.",
  "She asked the bank for a loan.",
  "The river rose after the rain.",
  "Interest rates went up again.",
  "He fished from the shore.",
  "The cashier counted the money.",
  "Ducks swam past the reeds.",
  "They opened a new account.",
  "The recipe needs two eggs.",
  "A man is playing the guitar.",
];

export default {
  id: "neighbours",
  title: "Neighbours",
  about:
    "Paste sentences, one a line (up to 2,000), or choose a .txt, .jsonl or .parquet file that layertap embed made. They are embedded once; then the ones nearest to the first sentence above are shown for each layer. Nothing leaves this machine and the server you chose.",
  layers: (info) => info.layer_count,

  mount(panel) {
    const state = { pooling: "mean", corpus: null, column: null, count: 0 };
    let found = null;
    const list = make("textarea", {
      id: "sentences",
      rows: 6,
      spellcheck: "false",
      "aria-label": "Sentences, one a line",
      oninput: () => {
        state.column = null;
        chosenFile.textContent = "";
      },
    });
    list.value = EXAMPLE.join("\n");
    const file = make("input", {
      type: "file",
      id: "file",
      accept: ".txt,.jsonl,.parquet",
      "aria-label": "A file of sentences or vectors",
      onchange: () => file.files[0] && read(file.files[0]),
    });
    const chosenFile = make("span", { class: "faint" });
    const progress = make("progress", { max: 1, value: 0, hidden: true, "aria-label": "Sentences embedded" });
    const told = make("span", { role: "status", class: "faint" });
    const wrong = make("p", { class: "error", role: "alert", hidden: true });
    const go = make("button", { type: "button", class: "main", text: "Embed the sentences", onclick: () => embed() });
    panel.append(
      make(
        "div",
        { class: "picture" },
        make("label", { for: "sentences", text: "Sentences" }),
        list,
        make("div", { class: "controls" }, make("label", { for: "file", text: "or a file" }), file, chosenFile),
        make(
          "div",
          { class: "controls" },
          select("Pooling", POOLINGS, state.pooling, (value) => {
            state.pooling = value;
            forget();
          }),
          go,
          progress,
          told,
        ),
        wrong,
      ),
    );
    const place = make("div", { hidden: true });
    panel.append(place);
    const nearest = new Picture(place, {
      title: "",
      name: "neighbours",
      said: null,
      csv: () => [
        ["layer", "rank", "cosine", "sentence"],
        ...found.layers.flatMap((layer, k) =>
          row(k).map(({ cosine, sentence }, rank) => [layer, rank + 1, cosine, sentence]),
        ),
      ],
      png: () => [chart.canvas],
    });
    const table = make("table", {}, make("caption", { hidden: true, text: "The nearest sentences" }));
    nearest.body.append(table);
    const lines = new Picture(place, {
      title: "The nearest sentences of this layer, in each layer",
      name: "neighbours-through-layers",
      said: "A line ends where its sentence is not among the ten nearest.",
      csv: nearest.csv,
      png: () => [chart.canvas],
    });
    const chart = new Chart(lines.body, { label: "" });

    function fault(error) {
      wrong.hidden = error === null;
      wrong.textContent = error ?? "";
    }

    // What is held belongs to other settings.
    function forget() {
      state.corpus = null;
      place.hidden = true;
      told.textContent = "Embed the sentences again for this pooling.";
    }

    async function read(chosen) {
      fault(null);
      try {
        const header = await ask("sentences", null, { file: chosen });
        state.column = header.columns[0] ?? null;
        list.value = header.sentences.join("\n");
        chosenFile.textContent = state.column
          ? `${header.sentences.length} vectors ${state.column}: choose the pooling that made them`
          : `${header.sentences.length} sentences`;
        go.textContent = state.column ? "Use the vectors" : "Embed the sentences";
        forget();
      } catch (error) {
        if (!(error instanceof Refusal)) throw error;
        fault(error.message);
      }
    }

    let embedding = null;

    // Embeds the sentences. What is typed meanwhile does not end it; another view, or another list, does.
    async function embed() {
      const sentences = list.value
        .split("\n")
        .map((line) => line.trim())
        .filter((line) => line);
      embedding?.abort();
      const { signal } = (embedding = new AbortController());
      fault(null);
      go.disabled = true;
      progress.hidden = false;
      progress.value = 0;
      told.textContent = `0 of ${sentences.length}`;
      try {
        const { texts, ...cut } = fields();
        const source = state.column ? { column: state.column } : { sentences };
        for await (const message of messages("corpus", { ...cut, pooling: state.pooling, ...source }, { signal })) {
          if (message.corpus) finish(message);
          else {
            progress.value = message.done_count / message.total;
            told.textContent = `${message.done_count} of ${message.total}`;
          }
        }
      } catch (error) {
        told.textContent = "";
        if (error.name !== "AbortError") fail(error, fault);
      } finally {
        go.disabled = false;
        progress.hidden = true;
      }
    }

    function finish({ corpus, sentence_count: count, bad }) {
      state.corpus = corpus;
      const [first] = bad;
      const failed = first ? `; ${bad.length} failed, the first: line ${first.index + 1}: ${first.details}` : "";
      told.textContent = `${count} sentences${failed}`;
      refresh();
    }

    async function load(signal) {
      if (!state.corpus) return;
      const { texts, ...cut } = fields();
      try {
        found = await ask("nearest", { ...cut, texts, corpus: state.corpus }, { signal });
      } catch (error) {
        if (error.code === "FAILED_PRECONDITION") return forget();
        throw error;
      }
      nearest.python = lines.python = found.python;
      place.hidden = false;
      draw();
    }

    function row(layer) {
      const {
        values,
        shape: [, count],
      } = found.arrays.positions;
      return Array.from({ length: count }, (_, rank) => {
        const position = values[layer * count + rank];
        return {
          position,
          sentence: found.sentences[position],
          cosine: found.arrays.cosines.values[layer * count + rank],
        };
      });
    }

    const layerAt = () => Math.min(page.layer, found.layers.length - 1);

    function draw() {
      const own = row(layerAt());
      nearest.title.textContent =
        found.layers.length > 1 ? `Nearest in layer ${found.layers[layerAt()]}` : "Nearest by the vectors of the file";
      table.replaceChildren(
        make("caption", { hidden: true, text: nearest.title.textContent }),
        make(
          "thead",
          {},
          make(
            "tr",
            {},
            make("th", { scope: "col", class: "number", text: "#" }),
            make("th", { scope: "col", text: "sentence" }),
            make("th", { scope: "col", class: "number", text: "cosine" }),
          ),
        ),
        make(
          "tbody",
          {},
          ...own.map(({ sentence, cosine }, rank) => {
            const meter = make("i", { class: "meter", "aria-hidden": "true" });
            meter.style.width = `${Math.max(0, 100 * cosine)}%`;
            return make(
              "tr",
              {},
              make("td", { class: "number", text: rank + 1 }),
              make("td", {}, sentence, meter),
              make("td", { class: "number", text: fixed(cosine) }),
            );
          }),
        ),
      );
      lines.element.hidden = found.layers.length < 2;
      if (lines.element.hidden) return;
      const shown = own.slice(0, 5).map(({ position, sentence }, n) => ({
        name: sentence.length > 40 ? `${sentence.slice(0, 39)}…` : sentence,
        color: ["--first", "--second", "--good", "--special", "--text"][n],
        dash: [undefined, [7, 4], [2, 3], [10, 3, 2, 3], [4, 2]][n],
        values: found.layers.map((_, layer) => row(layer).find((one) => one.position === position)?.cosine ?? null),
      }));
      chart.show(found.layers, shown, {
        layer: found.layers[layerAt()],
        alt: `Cosines of the five nearest sentences of layer ${found.layers[layerAt()]} in each layer`,
      });
    }

    return {
      refresh: (signal) => load(signal),
      chooseLayer: () => found && state.corpus && draw(),
      redraw: () => found && state.corpus && draw(),
      leave: () => embedding?.abort(),
    };
  },
};
