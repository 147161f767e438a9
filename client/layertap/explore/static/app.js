// The page: what is typed, which view is open, which layer is chosen, and whether the server is there.

import { Gone, Refusal, ask } from "./api.js";
import { isDark } from "./color.js";
import { by, make } from "./dom.js";
import attention from "./attention.js";
import change from "./change.js";
import layers from "./layers.js";
import likeness from "./likeness.js";
import map from "./map.js";
import neighbours from "./neighbours.js";
import tokens from "./tokens.js";

const VIEWS = [tokens, layers, change, likeness, map, attention, neighbours];
const EXAMPLES = {
  "bank, in two senses": ["She sat on the bank of the river.", "He paid the cash into the bank."],
  "a word in pieces": ["Tokenization splits unbelievable words.", ""],
  "who does what": ["The dog bites the man.", "The man bites the dog."],
  "yes and no": ["The film was good.", "The film was not good."],
};
const TYPING_MS = 160;
const AWAY_MS = 1000;
const HERE_MS = 4000;

// What the views share. `layer` is that of the hidden states; `info` is the model.
export const page = { info: null, layer: 0, view: null, shown: null, key: "" };

const system = matchMedia("(prefers-color-scheme: dark)");
let theme = "system";
let typing = 0;
let asking = null;

export const fields = () => {
  const texts = [by("text-0").value, by("text-1").value];
  const length = by("max-length").value;
  return {
    texts: texts[1] === "" ? texts.slice(0, 1) : texts,
    truncation: by("truncation").value,
    max_length: length === "" ? null : Number(length),
  };
};

// Runs what asks the server for a view; what is asked later ends it. Errors are shown where the input is.
export async function run(work) {
  asking?.abort();
  const own = (asking = new AbortController());
  by("panel").setAttribute("aria-busy", "true");
  try {
    await work(own.signal);
    if (own === asking) fault(null);
  } catch (error) {
    if (error.name === "AbortError" || own !== asking) return;
    fail(error, fault);
  } finally {
    if (own === asking && !own.signal.aborted) by("panel").setAttribute("aria-busy", "false");
  }
}

// Shows an error: a lost server at the top and until it is back, a refusal by `refused`.
export function fail(error, refused) {
  if (error instanceof Gone || error.code === "UNAVAILABLE") setAway(error);
  else if (error instanceof Refusal) refused(error.message);
  else throw error;
}

function fault(words) {
  by("error").textContent = words ?? "";
  by("error").hidden = words === null;
  for (const id of ["text-0", "text-1"]) by(id).setAttribute("aria-invalid", String(words !== null));
}

export function refresh() {
  if (page.info && page.shown) run((signal) => page.shown.refresh(signal));
}

// Views.

function open(view) {
  if (page.view === view && page.shown) return;
  page.view = view;
  for (const tab of by("tabs").children) {
    const chosen = tab.id === `tab-${view.id}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  history.replaceState(null, "", `#${view.id}`);
  by("panel").setAttribute("aria-labelledby", `tab-${view.id}`);
  page.shown?.leave?.();
  by("panel").replaceChildren();
  by("about").textContent = view.about;
  stop();
  page.shown = view.mount(by("panel"));
  setLayers();
  refresh();
}

function makeTabs() {
  by("tabs").append(
    ...VIEWS.map((view) =>
      make("button", {
        type: "button",
        role: "tab",
        id: `tab-${view.id}`,
        "aria-controls": "panel",
        text: view.title,
        onclick: () => open(view),
      }),
    ),
  );
  by("tabs").addEventListener("keydown", (event) => {
    const step = {
      ArrowRight: 1,
      ArrowLeft: -1,
      Home: -VIEWS.indexOf(page.view),
      End: VIEWS.length - 1 - VIEWS.indexOf(page.view),
    }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const next = VIEWS[(VIEWS.indexOf(page.view) + step + VIEWS.length) % VIEWS.length];
    open(next);
    by(`tab-${next.id}`).focus();
  });
}

// The layer.

function setLayers() {
  const most = page.info && page.view?.layers?.(page.info);
  by("layer-bar").hidden = most === undefined || most === null;
  if (most) {
    by("layer").max = most;
    by("layer").value = Math.min(page.layer, most);
    showLayer();
  }
}

function showLayer() {
  const layer = Number(by("layer").value);
  by("layer-number").textContent = `${layer} of ${by("layer").max}`;
  by("layer").setAttribute("aria-valuetext", `layer ${layer}`);
}

export function chooseLayer(layer) {
  by("layer").value = layer;
  page.layer = layer;
  showLayer();
  page.shown?.chooseLayer?.(layer);
}

let playing = 0;

function stop() {
  clearInterval(playing);
  playing = 0;
  by("play").textContent = "▶";
  by("play").setAttribute("aria-label", "Play through the layers");
}

function play() {
  if (playing) return stop();
  by("play").textContent = "■";
  by("play").setAttribute("aria-label", "Stop");
  chooseLayer(Number(by("layer").value) === Number(by("layer").max) ? 0 : Number(by("layer").value) + 1);
  playing = setInterval(() => {
    if (by("layer").value === by("layer").max) stop();
    else chooseLayer(Number(by("layer").value) + 1);
  }, 900);
}

// The server.

function setState(state, words) {
  by("server").dataset.state = state;
  by("server").querySelector(".words").textContent = words;
}

function setAway(error) {
  setState("away", "server away");
  by("away").hidden = false;
  by("away").textContent = `${error.message} — waiting for it to come back.`;
  watch(AWAY_MS);
}

let watching = 0;

function watch(delay) {
  clearTimeout(watching);
  watching = setTimeout(async () => {
    if (!document.hidden || by("server").dataset.state === "away") await look();
    else watch(HERE_MS);
  }, delay);
}

async function look() {
  try {
    const info = await ask("info", {});
    const isNew = info.fingerprint !== page.info?.fingerprint;
    const wasAway = by("server").dataset.state !== "here";
    page.info = info;
    setState("here", `connected to ${info.target}`);
    by("away").hidden = true;
    if (isNew) showModel(info);
    if (isNew || wasAway) {
      setLayers();
      refresh();
    }
    watch(HERE_MS);
  } catch (error) {
    if (!(error instanceof Gone || error instanceof Refusal)) throw error;
    setAway(error);
  }
}

function showModel(info) {
  page.layer = info.layer_count;
  const facts = `${info.model_type}, layers 0 to ${info.layer_count}, ${info.hidden_size} wide, up to ${info.max_length} tokens, ${info.compute_dtype} on ${info.devices.join(", ")}`;
  by("model").replaceChildren(make("b", { text: info.model_id }), ` · ${facts}`);
}

// Colours.

function setTheme() {
  const dark = theme === "dark" || (theme === "system" && system.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  by("theme").setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
  by("theme").textContent = theme === "system" ? "◐" : isDark() ? "☾" : "☀";
  page.shown?.redraw?.();
}

// The start.

function start() {
  system.addEventListener("change", setTheme);
  by("theme").addEventListener("click", () => {
    theme = {
      system: system.matches ? "light" : "dark",
      light: system.matches ? "dark" : "system",
      dark: system.matches ? "system" : "light",
    }[theme];
    setTheme();
  });
  setTheme();
  makeTabs();
  [by("text-0").value, by("text-1").value] = Object.values(EXAMPLES)[0];
  by("examples").append(
    ...Object.entries(EXAMPLES).map(([words, texts]) =>
      make("button", {
        type: "button",
        text: words,
        onclick: () => {
          [by("text-0").value, by("text-1").value] = texts;
          refresh();
        },
      }),
    ),
  );
  by("inputs").addEventListener("submit", (event) => event.preventDefault());
  by("inputs").addEventListener("input", () => {
    clearTimeout(typing);
    asking?.abort();
    by("panel").setAttribute("aria-busy", "true");
    typing = setTimeout(refresh, TYPING_MS);
  });
  by("layer").addEventListener("input", () => chooseLayer(Number(by("layer").value)));
  by("play").addEventListener("click", play);
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) look();
  });
  open(VIEWS.find((view) => `#${view.id}` === location.hash) ?? tokens);
  look();
}

start();
