// A picture with its title, what is said about the place under the cursor, and its copies: Python, PNG and CSV.

import { variable } from "./color.js";
import { make, say, toast } from "./dom.js";

export class Picture {
  // `name` is that of the files; `csv` returns rows; `png` returns canvases below one another.
  constructor(parent, { title, name, csv, png, said = "" }) {
    this.name = name;
    this.png = png;
    this.csv = csv;
    this.python = "";
    this.title = make("h3", { text: title });
    this.body = make("div");
    this.said = make("p", { class: "said", "aria-live": "polite", text: said });
    this.resting = said;
    const tools = make(
      "div",
      { class: "tools" },
      make("button", { type: "button", text: "Copy as Python", onclick: () => this.copy() }),
      png &&
        make("button", { type: "button", text: "PNG", "aria-label": "Save as PNG", onclick: () => this.savePng() }),
      csv &&
        make("button", { type: "button", text: "CSV", "aria-label": "Save as CSV", onclick: () => this.saveCsv() }),
    );
    const head = make("div", { class: "head" }, this.title, tools);
    this.element = make("figure", { class: "picture" }, head, this.body, said === null ? null : this.said);
    parent.append(this.element);
  }

  say(words) {
    say(this.said, words ?? this.resting);
  }

  async copy() {
    this.element.querySelector(".code")?.remove();
    try {
      await navigator.clipboard.writeText(this.python);
      toast("Copied: these lines give the numbers of this picture");
    } catch {
      const code = make("pre", { class: "code", tabindex: "0", text: this.python });
      this.element.append(code);
      getSelection().selectAllChildren(code);
    }
  }

  saveCsv() {
    const rows = this.csv().map((row) => row.map(cell).join(","));
    save(new Blob([rows.join("\r\n") + "\r\n"], { type: "text/csv" }), `${this.name}.csv`);
  }

  async savePng() {
    const parts = this.png();
    const ratio = devicePixelRatio || 1;
    const margin = 16 * ratio;
    const canvas = make("canvas");
    canvas.width = Math.max(...parts.map((part) => part.width), 400 * ratio) + 2 * margin;
    canvas.height = parts.reduce((sum, part) => sum + part.height, 0) + 3 * margin + 20 * ratio;
    const pen = canvas.getContext("2d");
    pen.fillStyle = variable("--panel");
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = variable("--text");
    pen.font = `600 ${15 * ratio}px system-ui, sans-serif`;
    pen.fillText(this.title.textContent, margin, margin + 14 * ratio);
    let top = 2 * margin + 16 * ratio;
    for (const part of parts) {
      pen.drawImage(part, margin, top);
      top += part.height;
    }
    save(await new Promise((done) => canvas.toBlob(done, "image/png")), `${this.name}.png`);
  }
}

// Numbers are written so that they are read back to the same float32; strings never begin a formula.
function cell(value) {
  if (typeof value === "number") return String(value);
  const words = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(words) ? `"${words.replaceAll('"', '""')}"` : words;
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// Sizes a canvas in CSS pixels and returns its pen, in CSS pixels too.
export function pen(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

export const FONT = 'ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace';
