// Elements, and words for numbers.

// Returns an element: make("p", { class: "about", text: "…", onclick }, child, …).
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const by = (id) => document.getElementById(id);

// Returns a labelled group of radio buttons; `chosen` is called with the value.
export function radios(legend, name, choices, value, chosen) {
  return make(
    "fieldset",
    {},
    make("legend", { text: legend }),
    ...Object.entries(choices).map(([key, words]) =>
      make(
        "label",
        {},
        make("input", { type: "radio", name, value: key, checked: key === value, onchange: () => chosen(key) }),
        words,
      ),
    ),
  );
}

export function select(label, choices, value, chosen) {
  const list = make(
    "select",
    { onchange: (event) => chosen(event.target.value) },
    ...Object.entries(choices).map(([key, words]) => make("option", { value: key, text: words })),
  );
  list.value = value;
  return make("label", {}, label, list);
}

export function checkbox(label, checked, chosen) {
  return make(
    "label",
    {},
    make("input", { type: "checkbox", checked, onchange: (event) => chosen(event.target.checked) }),
    label,
  );
}

export const fixed = (value, digits = 3) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–");

// Returns a small number with two digits that matter.
export function small(value) {
  if (value === 0) return "0";
  return Math.abs(value) >= 0.001 ? fixed(value, 3) : value.toExponential(1).replace("-", "−").replace("e−", "e−");
}

export const quoted = (piece) => `“${piece}”`;

let toastTimer = 0;

export function toast(words) {
  by("toast").textContent = words;
  by("toast").classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => by("toast").classList.remove("shown"), 2200);
}

// Puts text with parts between ** in bold into an element.
export function say(element, words) {
  element.replaceChildren(...words.split("**").map((part, n) => (n % 2 ? make("b", { text: part }) : part)));
}
