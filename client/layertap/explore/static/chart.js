// Lines over layers, drawn by uPlot.

import uPlot from "./vendor/uPlot.esm.js";
import { variable } from "./color.js";
import { fixed, make } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";

// Returns a piece of a line, for the legend.
function sample(color, dash) {
  const picture = document.createElementNS(SVG, "svg");
  const line = document.createElementNS(SVG, "path");
  for (const [name, value] of [
    ["width", 30],
    ["height", 8],
    ["aria-hidden", true],
  ])
    picture.setAttribute(name, value);
  for (const [name, value] of [
    ["d", "M0 4h30"],
    ["stroke", variable(color)],
    ["stroke-width", 2.5],
    ["stroke-dasharray", (dash ?? []).join(" ")],
  ])
    line.setAttribute(name, value);
  picture.append(line);
  return picture;
}

export class Chart {
  // `moved(layer)` is called with the layer under the cursor.
  constructor(parent, { label, moved }) {
    this.place = make("div", { role: "img", "aria-label": label });
    this.legend = make("div", { class: "legend" });
    this.moved = moved;
    parent.append(this.place, this.legend);
    new ResizeObserver(() => this.chart?.setSize({ width: this.place.clientWidth, height: 250 })).observe(this.place);
  }

  get canvas() {
    return this.place.querySelector("canvas");
  }

  // lines: [{ name, values, color, dash }]; `layer` is marked.
  show(layers, lines, { alt, layer }) {
    this.place.setAttribute("aria-label", alt);
    this.shown = { layers, lines };
    this.layer = layer;
    this.chart?.destroy();
    this.legend.replaceChildren(
      ...lines.map(({ name, color, dash }) => make("span", { class: "key" }, sample(color, dash), name)),
    );
    const axis = {
      stroke: variable("--faint"),
      grid: { stroke: variable("--line"), width: 1 },
      ticks: { stroke: variable("--line"), width: 1 },
      font: "12px system-ui, sans-serif",
    };
    const series = lines.map(({ name, color, dash, mark }) => ({
      label: name,
      stroke: variable(color),
      width: 2,
      dash,
      points: { show: true, size: mark ?? 7, fill: dash ? variable("--panel") : variable(color) },
      value: (_, value) => (value === null ? "–" : fixed(value)),
    }));
    this.chart = new uPlot(
      {
        width: Math.max(200, this.place.clientWidth),
        height: 250,
        scales: { x: { time: false } },
        axes: [
          {
            ...axis,
            label: "layer",
            labelSize: 18,
            labelFont: axis.font,
            incrs: [1, 2, 4, 6, 12],
            values: (_, found) => found.map((one) => (Number.isInteger(one) ? String(one) : "")),
          },
          { ...axis, label: "cosine", labelSize: 18, labelFont: axis.font, size: 52 },
        ],
        series: [{ label: "layer" }, ...series],
        legend: { show: false },
        cursor: { drag: { x: false, y: false } },
        hooks: { draw: [(chart) => this.rule(chart)], setCursor: [(chart) => this.moved?.(chart.cursor.idx)] },
      },
      [Array.from(layers), ...lines.map(({ values }) => Array.from(values))],
      this.place,
    );
  }

  mark(layer) {
    this.layer = layer;
    this.chart?.redraw(false);
  }

  // Draws a line at the chosen layer.
  rule(chart) {
    if (this.layer === undefined) return;
    const x = Math.round(chart.valToPos(this.layer, "x", true));
    const context = chart.ctx;
    context.save();
    context.strokeStyle = variable("--faint");
    context.setLineDash([4, 4]);
    context.beginPath();
    context.moveTo(x, chart.bbox.top);
    context.lineTo(x, chart.bbox.top + chart.bbox.height);
    context.stroke();
    context.restore();
  }
}
