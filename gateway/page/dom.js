// Builds elements. Whatever comes from outside becomes text and never markup.

export function el(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [property, value] of Object.entries(properties)) {
    if (property in element) element[property] = value;
    else element.setAttribute(property, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";
// In pixels.
const WIDTH = 96;
const HEIGHT = 18;

// A row of bars; heights from 0 to 1.
export function sparkline(bars, label) {
  const svg = document.createElementNS(SVG, "svg");
  const step = Math.min(WIDTH / bars.length, 5);
  svg.setAttribute("width", (bars.length * step).toFixed(2));
  svg.setAttribute("height", HEIGHT);
  svg.setAttribute("class", "spark");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  const path = document.createElementNS(SVG, "path");
  const lines = bars.map((bar, index) => `M${((index + 0.5) * step).toFixed(2)} ${HEIGHT}v-${Math.max(1, bar * HEIGHT).toFixed(2)}`);
  path.setAttribute("d", lines.join(""));
  path.setAttribute("stroke-width", (step * 0.6).toFixed(2));
  svg.append(path);
  return svg;
}
