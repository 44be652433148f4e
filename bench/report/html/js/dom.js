// Building elements. Text goes in as text, never as markup: a name from a CSV file stays a name.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

const byId = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";
const CORNERS = { // symbol: number of corners, degrees the first one is turned from the top
  square: [4, 45], diamond: [4, 0], pentagon: [5, 0], "triangle-up": [3, 0],
  "triangle-down": [3, 180], "triangle-left": [3, 270], "triangle-right": [3, 90],
  hexagon: [6, 30], hexagon2: [6, 0], octagon: [8, 22.5], "diamond-tall": [4, 0],
  star: [10, 0],
};
const PLUS = "M-1.6,-4.6H1.6V-1.6H4.6V1.6H1.6V4.6H-1.6V1.6H-4.6V-1.6H-1.6Z";

function outline(symbol) {
  if (symbol === "cross" || symbol === "x") return PLUS
  if (!(symbol in CORNERS)) return "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z";
  const [corners, turn] = CORNERS[symbol];
  const points = Array.from({ length: corners }, (_, i) => {
    const angle = ((turn + (360 * i) / corners) * Math.PI) / 180;
    const radius = symbol === "star" && i % 2 ? 2.1 : 4.6;
    const flat = symbol === "diamond-tall" ? 0.6 : 1;
    return `${(flat * radius * Math.sin(angle)).toFixed(2)},${(-radius * Math.cos(angle)).toFixed(2)}`;
  });
  return `M${points.join("L")}Z`;
}

const LOOK_INDEX = new Map(Object.keys(DATA.looks).map((name, i) => [name, i]));

// The marker of a backend as plots draw it: solid for contiguous, hollow for another format.
function glyph(row) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "-6 -6 12 12");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", `glyph look-${LOOK_INDEX.get(row.backend)}`
    + (row.memoryFormat === "contiguous" ? "" : " hollow"));
  const path = document.createElementNS(SVG, "path");
  const { symbol } = DATA.looks[row.backend];
  path.setAttribute("d", outline(symbol));
  if (symbol === "x") path.setAttribute("transform", "rotate(45)");
  svg.append(path);
  return svg;
}

const named = (row) => el("span", { class: "named" }, glyph(row), row.label);
const button = (text, onclick, attributes = {}) =>
  el("button", { type: "button", onclick, ...attributes }, text);

// One of a few: what is pressed is what is shown.
function segmented(name, options, chosen, choose) {
  return el("span", { class: "segmented", role: "group", "aria-label": name },
    ...options.map(([value, text]) =>
      button(text, () => choose(value), { "aria-pressed": String(value === chosen) })));
}

function select(name, options, chosen, choose) {
  const list = el("select", { onchange: () => choose(options[list.selectedIndex][0]) },
    ...options.map(([value, text]) => el("option", { selected: value === chosen }, text)));
  return el("label", { class: "select" }, el("span", {}, name), list);
}
