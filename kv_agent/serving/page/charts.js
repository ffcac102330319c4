// Drawings of numbers, each with its meaning in words. Colours are the style sheet's.

import { el, svg } from "./dom.js";
import { clockText, count, line, percent, some } from "./format.js";

/** Where the tokens of a prompt came from, from the bottom of a bar to its top. */
export const SOURCES = [
  ["exact", "put back as they were"],
  ["adapted", "put back elsewhere"],
  ["local", "of vLLM's own prefix cache"],
  ["computed", "computed"],
];

const HEIGHT = 190;
const LEFT = 44; // room for the numbers beside the drawing
const BELOW = 24;
const ABOVE = 10;
const BAR = 16; // least width of a bar with its gap

let drawings = 0;

const total = (request) => SOURCES.reduce((sum, [name]) => sum + request[name], 0);

/** Share of a prompt that memory saved computing. */
export const reused = (request) => (total(request) ? (request.exact + request.adapted) / total(request) : 0);

/** A drawing that is made anew for the width there is; `draw(width)` gives its parts. */
function drawing(title, description, draw) {
  const id = `drawing-${++drawings}`;
  const labels = { role: "img", "aria-labelledby": `${id}-title ${id}-text` };
  const picture = svg("svg", { class: "chart", height: HEIGHT, ...labels });
  const meaning = [
    svg("title", { id: `${id}-title` }, title),
    svg("desc", { id: `${id}-text` }, description),
  ];
  picture.append(...meaning);
  const box = el("div", { class: "drawing" }, picture);
  let drawn = 0;
  new ResizeObserver(() => {
    const width = box.clientWidth;
    if (!width || width === drawn) return;
    drawn = width;
    picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const parts = [...meaning, ...draw(width)];
    picture.replaceChildren(...parts.filter(Boolean));
  }).observe(box);
  return box;
}

const yOf = (share) => ABOVE + (HEIGHT - ABOVE - BELOW) * (1 - share);

function scale(width, labels) {
  return labels.flatMap(([share, text]) => [
    svg("line", { class: "grid", x1: LEFT, x2: width, y1: yOf(share), y2: yOf(share) }),
    svg("text", { class: "label", x: LEFT - 8, y: yOf(share) + 4, "text-anchor": "end" }, text),
  ]);
}

/** The times of the first and the last request below a drawing, one where there is room for one only. */
function times(width, oldest, newest) {
  const at = (x, anchor, request) =>
    svg("text", { class: "label", x, y: HEIGHT - 6, "text-anchor": anchor }, clockText(request.at));
  return [at(LEFT, "start", oldest), oldest !== newest && at(width, "end", newest)];
}

/** Tokens of each request by where their KV came from; `requests` oldest first. */
export function tokenBars(requests) {
  const sums = SOURCES.map(([name, meaning]) => {
    const sum = requests.reduce((all, request) => all + request[name], 0);
    return `${count(sum)} ${meaning}`;
  });
  const description = `${some(requests.length, "request")}: ${sums.join(", ")}.`;
  return drawing("Prompt tokens of each request", description, (width) => {
    const shown = requests.slice(-Math.max(1, Math.floor((width - LEFT) / BAR)));
    const most = Math.max(1, ...shown.map(total));
    const step = Math.min(48, (width - LEFT) / shown.length);
    const bars = shown.map((request, index) => {
      let below = 0;
      const parts = SOURCES.map(([name]) => {
        const part = svg("rect", {
          class: `source-${name}`,
          x: LEFT + index * step + 2,
          y: yOf((below + request[name]) / most),
          width: Math.max(1, step - 4),
          height: yOf(below / most) - yOf((below + request[name]) / most),
        });
        below += request[name];
        return request[name] ? part : null;
      });
      const said = SOURCES.map(([name]) => `${name} ${count(request[name])}`).join(", ");
      return svg("g", {}, svg("title", {}, `${clockText(request.at)}: ${said}`), parts);
    });
    const labels = [[0, "0"], [0.5, count(Math.round(most / 2))], [1, count(most)]];
    return [...scale(width, labels), ...bars, ...times(LEFT + shown.length * step, shown[0], shown.at(-1))];
  });
}

/** Share of each prompt that was put back, over time; `requests` oldest first. */
export function shareLine(requests) {
  const [oldest, newest] = [requests[0], requests.at(-1)];
  const average = requests.reduce((sum, request) => sum + reused(request), 0) / requests.length;
  const [first, last] = [percent(reused(oldest)), percent(reused(newest))];
  const description = `From ${first} to ${last}, ${percent(average)} on average.`;
  return drawing("Share of prompt tokens put back", description, (width) => {
    const length = newest.at - oldest.at;
    const x = (request) => LEFT + 6 + (length ? (request.at - oldest.at) / length : 0) * (width - LEFT - 12);
    const points = requests.map((request) => [x(request), yOf(reused(request)), request]);
    return [
      ...scale(width, [[0, "0 %"], [0.5, "50 %"], [1, "100 %"]]),
      svg("polyline", { class: "share", points: points.map(([a, b]) => `${a},${b}`).join(" ") }),
      ...points.map(([cx, cy, request]) =>
        svg(
          "circle",
          { class: "dot", cx, cy, r: 3.5 },
          svg("title", {}, `${clockText(request.at)}: ${percent(reused(request))}`),
        ),
      ),
      ...times(width, oldest, newest),
    ];
  });
}

/** What the colours of the bars mean. */
export function legend() {
  return el(
    "ul",
    { class: "legend" },
    SOURCES.map(([name, meaning]) =>
      el(
        "li",
        {},
        svg(
          "svg",
          { viewBox: "0 0 12 12", "aria-hidden": "true" },
          svg("rect", { class: `source-${name}`, x: 1, y: 1, width: 10, height: 10 }),
        ),
        name === meaning ? name : `${name}: ${meaning}`,
      ),
    ),
  );
}

/** How long the chunks of a memory are, one after the other. */
export function chunkStrip(chunks) {
  const all = chunks.reduce((sum, chunk) => sum + chunk.tokens, 0);
  const id = `drawing-${++drawings}`;
  const parts = chunks.map((chunk, index) =>
    svg(
      "rect",
      {
        class: `chunk-${chunk.damaged ? "damaged" : index % 2}`,
        x: (1000 * chunk.start) / all,
        width: (1000 * chunk.tokens) / all,
        height: 10,
      },
      svg("title", {}, `${some(chunk.tokens, "token")}: ${line(chunk.text, 60)}`),
    ),
  );
  const lengths = `Chunks of ${chunks.map((chunk) => chunk.tokens).join(", ")} tokens`;
  const box = { viewBox: "0 0 1000 10", preserveAspectRatio: "none" };
  const labels = { role: "img", "aria-labelledby": id };
  return svg("svg", { class: "strip", ...box, ...labels }, svg("title", { id }, lengths), parts);
}
