// Layers arriving: the rows of each layer as the server streams them, with their times.

import { messages } from "./api.js";
import { fields, page, refresh } from "./app.js";
import { fixed, make, quoted, select } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { FONT, Picture, pen } from "./picture.js";
import { variable } from "./color.js";

const REPLAY_MS = 4000;
const SHOWN_TOKENS = 64;
const STRIP_HEIGHT = 72;

// Draws a strip with its layer and time, for the PNG.
function named({ layer, heat, time }) {
  const canvas = make("canvas");
  const ratio = devicePixelRatio || 1;
  const context = pen(canvas, heat.canvas.width / ratio + 90, heat.canvas.height / ratio + 8);
  context.fillStyle = variable("--text");
  context.font = `12px ${FONT}`;
  context.fillText(`layer ${layer}`, 0, 14);
  context.fillText(time.textContent, 0, 32);
  context.drawImage(heat.canvas, 90, 0, heat.canvas.width / ratio, heat.canvas.height / ratio);
  return canvas;
}

export default {
  id: "layers",
  title: "Layers arriving",
  about:
    "The server sends each layer while it computes the next. Each strip is a layer: a line for each token, a point for each of its values. Ask for copies of the sentences to give the server more work.",

  mount(panel) {
    let copies = 1;
    let replaying = 0;
    let events = [];
    let strips = [];
    let labels = [];
    const replayed = make("button", { type: "button", text: "Replay slowly", onclick: () => replay() });
    panel.append(
      make(
        "div",
        { class: "controls" },
        select("Copies of the sentences", { 1: "1", 16: "16", 64: "64", 256: "256" }, "1", (value) => {
          copies = Number(value);
          refresh();
        }),
        make("button", { type: "button", class: "main", text: "Ask again", onclick: () => refresh() }),
        replayed,
      ),
    );
    const picture = new Picture(panel, {
      title: "Rows of each layer",
      name: "layers-arriving",
      said: "Move over a strip, or focus it and use the arrow keys, to read a value.",
      csv: () => [
        ["layer", "text", "token", "piece", ...Array.from({ length: page.info.hidden_size }, (_, k) => `value_${k}`)],
        ...strips.flatMap((strip) => rowsOf(strip)),
      ],
      png: () => strips.filter((strip) => strip.heat.data).map((strip) => named(strip)),
    });

    function rowsOf(strip) {
      return Object.entries(strip.rows).flatMap(
        ([
          text,
          {
            values,
            shape: [count, size],
          },
        ]) =>
          Array.from({ length: count }, (_, token) => [
            strip.layer,
            Number(text),
            token,
            labels[text][token],
            ...values.subarray(token * size, (token + 1) * size),
          ]),
      );
    }

    function build() {
      picture.body.replaceChildren();
      strips = Array.from({ length: page.info.layer_count + 1 }, (_, layer) => {
        const time = make("span", { class: "time", text: "waiting" });
        const area = make("div", { class: "area" });
        const bar = make("i");
        const element = make(
          "div",
          { class: "strip waiting" },
          make("b", { text: `layer ${layer}` }),
          area,
          time,
          make("div", { class: "bar" }, bar),
        );
        picture.body.append(element);
        const strip = { layer, element, time, bar, count: 0, rows: {} };
        strip.heat = new Heatmap(area, {
          label: `Layer ${layer}`,
          minCell: 2,
          height: 7,
          hasScale: false,
          moved: (row, column) => {
            if (row === undefined) return picture.say();
            const [text, token] = strip.order[row];
            const { values, shape } = strip.rows[text];
            picture.say(
              `Layer ${layer}, token **${quoted(labels[text][token])}**${Object.keys(strip.rows).length > 1 ? ` of sentence ${Number(text) + 1}` : ""}: value ${column} of ${shape[1]} is **${fixed(values[token * shape[1] + column], 5)}**.`,
            );
          },
        });
        return strip;
      });
    }

    function draw(strip) {
      const texts = Object.entries(strip.rows);
      strip.order = texts
        .flatMap(([text, { shape }]) => Array.from({ length: shape[0] }, (_, token) => [text, token]))
        .slice(0, SHOWN_TOKENS);
      const size = page.info.hidden_size;
      const values = new Float32Array(strip.order.length * size);
      strip.order.forEach(([text, token], row) =>
        values.set(strip.rows[text].values.subarray(token * size, (token + 1) * size), row * size),
      );
      const sorted = Float32Array.from(values, Math.abs).sort();
      const high = sorted[Math.floor(sorted.length * 0.98)] || 1;
      strip.heat.height = Math.max(2, Math.min(7, STRIP_HEIGHT / strip.order.length));
      strip.heat.show({
        values,
        rows: strip.order.length,
        columns: size,
        low: -high,
        high,
        map: "diverging",
        alt: `Layer ${strip.layer}: ${strip.order.length} rows of ${size} values, most between ${fixed(-high, 2)} and ${fixed(high, 2)}`,
      });
    }

    // Applies one message to its strip.
    function arrive({ layer, text_count: count, elapsed_ms: elapsed, arrays, total }) {
      const strip = strips[layer];
      for (const [name, array] of Object.entries(arrays)) strip.rows[name.slice(5)] = array;
      strip.first ??= elapsed;
      strip.count += count;
      strip.element.classList.remove("waiting");
      strip.bar.style.transform = `scaleX(${strip.count / total})`;
      strip.time.textContent =
        strip.first === elapsed ? `${fixed(elapsed, 1)} ms` : `${fixed(strip.first, 1)} – ${fixed(elapsed, 1)} ms`;
      if (Object.keys(arrays).length) draw(strip);
    }

    async function load(signal) {
      cancelAnimationFrame(replaying);
      events = [];
      let total = 0;
      for await (const message of messages("layers", { ...fields(), copies }, { signal })) {
        if (message.done) {
          const tokens = labels.reduce((sum, own) => sum + own.length, 0) * copies;
          picture.title.textContent = `${strips.length} layers of ${tokens} tokens in ${fixed(message.elapsed_ms, 1)} ms`;
          replayed.disabled = false;
        } else if (message.tokens) {
          labels = message.tokens;
          total = message.text_count;
          picture.python = message.python;
          build();
        } else {
          events.push({ ...message, total });
          arrive(events.at(-1));
        }
      }
    }

    function replay() {
      if (!events.length) return;
      cancelAnimationFrame(replaying);
      build();
      const began = performance.now();
      const factor = REPLAY_MS / events.at(-1).elapsed_ms;
      let next = 0;
      const step = () => {
        while (next < events.length && events[next].elapsed_ms * factor <= performance.now() - began)
          arrive(events[next++]);
        if (next < events.length) replaying = requestAnimationFrame(step);
      };
      step();
    }

    return {
      refresh: load,
      redraw: () =>
        strips.forEach((strip) => {
          if (strip.heat.data) strip.heat.draw();
        }),
    };
  },
};
