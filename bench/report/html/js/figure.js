// What all plots share: fonts and colours of the theme, markers of the backends, when they are
// drawn, and that a click on a point opens its row.
const figures = []; // { id of the element, build(width) -> { traces, layout, height, told } or null }
const DRAWN_FROM = 400; // pixels below the window: a plot is there before the reader is
const visible = new Set();
let paper = false; // being printed: everything at once

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (row) => DATA.looks[row.backend][document.documentElement.dataset.theme];
// plotly reads a little markup in its texts; a name is none
const plain = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);

function register(id, build) {
  figures.push({ id, build, stale: true });
}

function marker(row, size = 9) {
  const solid = row.memoryFormat === "contiguous";
  return {
    symbol: DATA.looks[row.backend].symbol, size, color: solid ? colourOf(row) : css("--surface"),
    opacity: 1, line: { width: solid ? 1 : 1.8, color: colourOf(row) },
  };
}

const dash = (row) => (row.memoryFormat === "contiguous" ? "solid" : "dash");

// What a point says when the pointer rests on it.
function hover(row) {
  const { interval } = row;
  const lines = [
    `<b>${plain(row.label)}</b>`,
    `${plain(row.model)}, batch ${row.batch}`,
    `${number(row.rate)} images/s, p50 ${number(row.numbers.get("p50_ms"))} ms`,
  ];
  if (interval) lines.push(`speed-up ${plain(row.speedupText)}`);
  if (row.numbers.has("peak_mem_mb")) lines.push(`peak ${number(row.numbers.get("peak_mem_mb"))} MB`);
  if (row.gflopPerS) lines.push(`${number(row.gflopPerS)} GFLOP/s`);
  return lines.join("<br>");
}

const HOVER = { hovertemplate: "%{text}<extra></extra>" };

function points(rows, x, y) {
  return { x: rows.map(x), y: rows.map(y), text: rows.map(hover), customdata: rows.map((row) => row.id), showlegend: false, ...HOVER };
}

// The rows of each label, in the order of the legend.
function byLabel(rows) {
  const found = new Map(state.comparison.labels.map((label) => [label, []]));
  for (const row of rows) found.get(row.label).push(row);
  return [...found].filter(([, own]) => own.length).map(([, own]) => own);
}

function axisLook(extra = {}) {
  return {
    gridcolor: css("--line"), linecolor: css("--line-strong"), zeroline: false, ticks: "", automargin: true,
    tickangle: 0, tickfont: { size: 11.5, color: css("--muted") }, fixedrange: true,
    ...extra,
    title: extra.title && { text: extra.title, font: { size: 12.5, color: css("--text") }, standoff: 8 },
  };
}

// Ticks of a logarithmic axis between two values: 1, 2, 5, or 1 where that would be too many.
function logTicks(low, high, most = 9) {
  const found = (steps) => {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const step of steps) {
        const tick = Number((step * 10 ** power).toPrecision(3));
        if (tick >= low && tick <= high) ticks.push(tick);
      }
    }
    return ticks;
  };
  const dense = [[1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8], [1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]];
  return dense.map(found).find((ticks) => ticks.length <= most) ?? found([1]);
}

function logAxis(values, extra = {}, margin = 0.06, most = 9) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = Math.max((high / low) ** margin, 1.02);
  const ticks = logTicks(low / room, high * room, most);
  return axisLook({
    type: "log", range: [Math.log10(low / room), Math.log10(high * room)],
    tickvals: ticks, ticktext: ticks.map((tick) => (tick < 1e4 ? String(tick) : tick.toLocaleString("en"))), ...extra,
  });
}

const note = (text, extra) => ({ text, showarrow: false, font: { size: 12, color: css("--muted") }, ...extra });

function draw(figure) {
  const box = byId(figure.id);
  const width = box.clientWidth;
  if (!window.Plotly || !width) return;
  figure.stale = false;
  figure.width = width;
  const built = figure.build(width);
  if (!built || built.why) {
    Plotly.purge(box);
    box.replaceChildren(el("p", { class: "note" }, built?.why ?? ""));
    box.style.minHeight = "";
    return;
  }
  if (!box.classList.contains("js-plotly-plot")) box.replaceChildren();
  box.style.minHeight = `${built.height}px`;
  const layout = {
    width, height: built.height, margin: { l: 8, r: 12, t: 26, b: 44 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: css("--sans"), size: 12.5, color: css("--text") },
    hovermode: "closest", hoverdistance: 24, dragmode: false, showlegend: false,
    hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line-strong"), align: "left", font: { family: css("--sans"), size: 12.5, color: css("--text") } },
    ...built.layout,
  };
  Plotly.react(box, built.traces, layout, { displayModeBar: false, responsive: false });
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", `${built.told} Every point is a line of the table of rows.`);
  if (!figure.wired) {
    figure.wired = true;
    box.on("plotly_click", ({ points: [point] }) => {
      if (point.customdata !== undefined) openRow(state.comparison.rows[point.customdata]);
    });
  }
}

function redraw() {
  document.body.dataset.plots = "stale"; // until drawTheRest has seen to all; tests wait for it
  for (const figure of figures) {
    figure.stale = true;
    if (paper || visible.has(figure.id)) draw(figure);
  }
  if (window.Plotly) drawTheRest();
}

function watchFigures() {
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) visible.add(target.id);
      else visible.delete(target.id);
      const figure = figures.find(({ id }) => id === target.id);
      if (isIntersecting && figure.stale) draw(figure);
    }
  }, { rootMargin: `${DRAWN_FROM}px` });
  const resized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const figure = figures.find(({ id }) => id === target.id);
      if (figure.width && target.clientWidth !== figure.width) {
        figure.stale = true;
        if (visible.has(figure.id)) requestAnimationFrame(() => draw(figure));
      }
    }
  });
  for (const { id } of figures) {
    near.observe(byId(id));
    resized.observe(byId(id));
  }
  drawTheRest();
}

// One at a time while nothing else is asked for, so that headings stay where links lead to.
function drawTheRest() {
  const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 100));
  idle(() => {
    const next = figures.find(({ stale }) => stale);
    if (!next) {
      document.body.dataset.plots = "drawn";
      return;
    }
    next.stale = false; // also where it has no width yet
    draw(next);
    drawTheRest();
  });
}

listeners.push(redraw);
