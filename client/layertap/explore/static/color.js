// Colours for numbers, told apart by readers who see few of them: viridis for amounts, blue to red around 0, and a fade
// from the background for shares of a whole. Each map is 256 colours, packed as pixels of an ImageData.

const VIRIDIS = [
  [0.2777273272, 0.0054073445, 0.3340998053],
  [0.1050930431, 1.4046135299, 1.3845901626],
  [-0.3308618287, 0.2148475595, 0.095095163],
  [-4.634230499, -5.7991009734, -19.3324409563],
  [6.2282699363, 14.1799333668, 56.6905526007],
  [4.7763849977, -13.7451453777, -65.3530326334],
  [-5.4354558559, 4.6458526122, 26.3124352496],
];
const DIVERGING = {
  light: ["#134b8a", "#2f79b5", "#7eb6d9", "#cfe3f0", "#f7f7f8", "#fbd9c7", "#f0a27c", "#cf5246", "#8e0f26"],
  dark: ["#9ad0ff", "#56a3e4", "#2f6da8", "#22415f", "#1d212a", "#5a3128", "#a54c39", "#e8805f", "#ffc3a8"],
};
const FADE = {
  light: ["#ffffff", "#d6e6f7", "#8fbde6", "#3f85c6", "#154b8b", "#08264d"],
  dark: ["#1a1d25", "#23395a", "#2f66a0", "#4b9bd8", "#97d0f7", "#e8f6ff"],
};

const made = new Map();

export const isDark = () => document.documentElement.dataset.theme === "dark";

export const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Returns a map by its name: "viridis", "diverging" or "fade".
export function colors(name) {
  const key = `${name} ${isDark()}`;
  if (!made.has(key))
    made.set(
      key,
      name === "viridis" ? viridis() : between((name === "fade" ? FADE : DIVERGING)[isDark() ? "dark" : "light"]),
    );
  return made.get(key);
}

// Returns the colour of a share between 0 and 1 in CSS.
export function css(name, share) {
  const packed = colors(name)[position(share)];
  return `rgb(${packed & 255} ${(packed >> 8) & 255} ${(packed >> 16) & 255})`;
}

// Returns whether text on that colour is to be dark.
export function isLight(name, share) {
  const packed = colors(name)[position(share)];
  return 0.299 * (packed & 255) + 0.587 * ((packed >> 8) & 255) + 0.114 * ((packed >> 16) & 255) > 140;
}

export const position = (share) => Math.max(0, Math.min(255, Math.round(share * 255)));

function viridis() {
  return Uint32Array.from({ length: 256 }, (_, n) => {
    const t = n / 255;
    return pack([0, 1, 2].map((c) => 255 * VIRIDIS.reduceRight((sum, factors) => sum * t + factors[c], 0)));
  });
}

function between(stops) {
  const parts = stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  return Uint32Array.from({ length: 256 }, (_, n) => {
    const place = (n / 255) * (parts.length - 1);
    const low = Math.min(Math.floor(place), parts.length - 2);
    return pack([0, 1, 2].map((c) => parts[low][c] + (parts[low + 1][c] - parts[low][c]) * (place - low)));
  });
}

function pack([red, green, blue]) {
  const whole = (value) => Math.max(0, Math.min(255, Math.round(value)));
  return ((255 << 24) | (whole(blue) << 16) | (whole(green) << 8) | whole(red)) >>> 0;
}
