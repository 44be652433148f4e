// Speed-up of every model, then throughput and latency of one.
const TALLEST = 900; // pixels of a panel of speed-ups
const NAME_HEIGHT = 22; // pixels above a model's lines, for its name

const batchesOf = (rows) => distinct(rows.map((row) => row.batch)).sort(ascending);

// Panels side by side while each has `least` pixels, below each other otherwise.
function grid(n, width, least) {
  const columns = Math.max(1, Math.min(n, Math.floor(width / least)));
  return { columns, lines: Math.ceil(n / columns) };
}

function speedupFigure(width) {
  const rows = shownRows().filter((row) => row.interval);
  if (!rows.length) return { why: "No row shown here has a speed-up with an interval." };
  const batches = batchesOf(rows);
  const models = state.comparison.models.filter((model) => rows.some((row) => row.model === model));
  const labels = state.comparison.labels.filter((label) => rows.some((row) => row.label === label));
  // pixels from backend to backend: with many models they close up, for the page's sake
  const step = Math.min(15, Math.max(2.5, (TALLEST / models.length - NAME_HEIGHT - 6) / labels.length));
  const band = NAME_HEIGHT + labels.length * step + 6;
  const { columns, lines: down } = grid(batches.length, width, 330);
  const panel = models.length * band;
  const between = 62;
  const height = down * (panel + between) + 14;
  const values = rows.flatMap(({ interval }) => [interval.low, interval.high]).concat([0.95, 1.05]);
  const layout = { annotations: [], shapes: [], margin: { l: 6, r: 10, t: 30, b: 52 } };
  const inside = height - 82;
  const traces = [];
  batches.forEach((batch, i) => {
    const [column, across] = [i % columns, Math.floor(i / columns)];
    const axis = i ? i + 1 : "";
    const gap = 0.03;
    const top = 1 - (across * (panel + between)) / inside;
    const left = (column * (1 + gap)) / columns;
    layout[`xaxis${axis}`] = { ...logAxis(values, { title: `speed-up over ${plain(state.comparison.baselineLabel)}` }, 0.04, width / columns < 420 ? 6 : 9),
      domain: [left, left + (1 + gap) / columns - gap], anchor: `y${axis}` };
    layout[`yaxis${axis}`] = axisLook({ domain: [Math.max(0, top - panel / inside), top], range: [panel, 0], showticklabels: false, showgrid: false, anchor: `x${axis}` });
    layout.annotations.push(note(`<b>batch ${batch}</b>`, { xref: `x${axis} domain`, yref: `y${axis} domain`, x: 0, y: 1, xanchor: "left", yanchor: "bottom", yshift: 5, font: { size: 13, color: css("--text") } }));
    models.forEach((model, m) => {
      layout.shapes.push({ type: "line", xref: `x${axis}`, yref: `y${axis}`, x0: 1, x1: 1, y0: m * band + NAME_HEIGHT - 2, y1: (m + 1) * band, line: { color: css("--text"), width: 1.2 }, layer: "between" });
      if (m) layout.shapes.push({ type: "line", xref: `x${axis} domain`, yref: `y${axis}`, x0: 0, x1: 1, y0: m * band, y1: m * band, line: { color: css("--line"), width: 1 }, layer: "below" });
      layout.annotations.push(note(plain(model), { xref: `x${axis} domain`, yref: `y${axis}`, x: 0, xshift: 4, y: m * band + 13, xanchor: "left", yanchor: "middle", font: { size: 12, color: css("--text") } }));
    });
    const heightOf = (row) => models.indexOf(row.model) * band + NAME_HEIGHT + (labels.indexOf(row.label) + 0.5) * step;
    for (const own of byLabel(rows.filter((row) => row.batch === batch))) {
      traces.push({ type: "scatter", mode: "markers", xaxis: `x${axis}`, yaxis: `y${axis}`, marker: marker(own[0], step > 10 ? 9 : 7),
        ...points(own, (row) => row.interval.ratio, heightOf),
        error_x: { type: "data", symmetric: false, color: colourOf(own[0]), thickness: 1.6, width: step > 10 ? 4 : 2.5,
          array: own.map(({ interval }) => Math.max(0, interval.high - interval.ratio)),
          arrayminus: own.map(({ interval }) => Math.max(0, interval.ratio - interval.low)) } });
    }
  });
  byId("speedup-note").textContent = `Paired and in turns with the baseline; median and 95 % interval, ${state.comparison.rounds}. `
    + "Left of 1 is slower, right of 1 faster, and twice as slow is as far from 1 as twice as fast. "
    + "The baseline's own mark is a second copy of itself: the noise.";
  return { traces, layout, height, told: `Speed-up of ${count(labels.length, "backend")} for ${count(models.length, "model")}.` };
}

function measuredModels() {
  const measured = new Set(shownRows().filter((row) => row.measured).map((row) => row.model));
  return state.comparison.models.filter((model) => measured.has(model));
}

// The model of plots that show one: the one chosen there, else the middle of the largest family.
function oneModel() {
  const models = measuredModels();
  if (models.includes(state.model)) return state.model;
  const { series } = state.comparison.rows.find((row) => row.model === models[0]) ?? {};
  const family = models.filter((model) => series && state.comparison.rows.some((row) => row.model === model && row.series === series));
  return family[Math.floor(family.length / 2)] ?? models[0] ?? null;
}

function drawModelPick() {
  const models = measuredModels();
  const pick = byId("rates-pick");
  pick.replaceChildren();
  if (!models.length) return;
  pick.append(select("Model", models.map((model) => [model, model]), oneModel(), (model) => {
    state.model = model;
    refresh();
  }));
}

function ratesFigure(width) {
  const model = oneModel();
  if (!model) return { why: "No row shown here has a speed." };
  const rows = shownRows().filter((row) => row.model === model);
  const batches = batchesOf(rows.filter((row) => row.measured));
  // what cannot run here at all would be empty lines; the list of failures has it
  const labels = state.comparison.labels.filter((label) => rows.some((row) => row.label === label && row.status !== "unavailable"));
  const samples = new Map(rows.map((row) => [row.label, row]));
  const pair = width >= 700;
  const panel = labels.length * (pair ? 24 : 31) + 6;
  const between = 80;
  const down = batches.length * (pair ? 1 : 2);
  const height = down * (panel + between) + 20;
  const margin = { t: 32, b: 54, r: 16 };
  const inside = height - margin.t - margin.b;
  const names = labels.map((label) => plain(label) + (samples.get(label).isBaseline ? " (baseline)" : ""));
  const longest = Math.max(...labels.map((label) => label.length + (samples.get(label).isBaseline ? 11 : 0)));
    const short = names.map((name) => (pair ? name : name.replace(" ", "<br>")));
  const layout = { annotations: [], shapes: [], bargap: 0.28, margin: { ...margin, l: Math.min(width * 0.36, 22 + 6.6 * (pair ? longest : Math.min(longest, 16))) } };
  const traces = [];
  let used = 0;
  const panelAt = (line, column, title, xaxis, withNames) => {
    used += 1;
    const axis = used === 1 ? "" : used;
    const top = 1 - (line * (panel + between)) / inside;
    const domain = pair ? [column * 0.53, column * 0.53 + 0.47] : [0, 1];
    layout[`xaxis${axis}`] = { ...xaxis, domain, anchor: `y${axis}` };
    layout[`yaxis${axis}`] = axisLook({ domain: [Math.max(0, top - panel / inside), top], anchor: `x${axis}`, range: [labels.length - 0.5, -0.5], automargin: false,
      tickvals: labels.map((_, i) => i), ticktext: short, showticklabels: withNames, showgrid: false, tickfont: { size: pair ? 12 : 11, color: css("--text") } });
    layout.annotations.push(note(title, { xref: `x${axis} domain`, yref: `y${axis} domain`, x: 0, y: 1, xanchor: "left", yanchor: "bottom", yshift: 5, font: { size: 13, color: css("--text") } }));
    return { xaxis: `x${axis}`, yaxis: `y${axis}`, axis };
  };
  batches.forEach((batch, b) => {
    const here = rows.filter((row) => row.batch === batch);
    const measured = here.filter((row) => row.measured);
    const level = (row) => labels.indexOf(row.label);
    const top = Math.max(...measured.map((row) => row.rate));
    const left = panelAt(pair ? b : 2 * b, 0, `<b>batch ${batch}</b>, throughput`,
      axisLook({ title: "images/s", range: [0, 1.2 * top], nticks: 6 }), true);
    traces.push({ type: "bar", orientation: "h", textposition: "none", xaxis: left.xaxis, yaxis: left.yaxis, ...points(measured, (row) => row.rate, level),
      marker: { color: measured.map(colourOf), line: { width: 0 }, pattern: { shape: measured.map((row) => (row.memoryFormat === "contiguous" ? "" : "/")), fgcolor: css("--surface"), size: 7, solidity: 0.25 } } });
    const times = (row) => ["p50_ms", "p90_ms", "p99_ms"].map((name) => row.numbers.get(name)).filter((value) => value > 0);
    const right = panelAt(pair ? b : 2 * b + 1, 1, pair ? "time of a batch" : `<b>batch ${batch}</b>, time of a batch`,
      logAxis(measured.flatMap(times), { title: "ms, p50 to p99 (tick: p90)" }, 0.08, pair ? 7 : 5), !pair);
    for (const row of measured) {
      const [low, ...rest] = times(row);
      if (low === undefined) continue;
      const middle = rest.length > 1 ? rest[0] : undefined;
      traces.push({ type: "scatter", mode: "lines", xaxis: right.xaxis, yaxis: right.yaxis, hoverinfo: "skip", showlegend: false, x: [low, rest.at(-1) ?? low], y: [level(row), level(row)], line: { color: colourOf(row), width: 2 } });
      if (middle !== undefined) traces.push({ type: "scatter", mode: "markers", xaxis: right.xaxis, yaxis: right.yaxis, hoverinfo: "skip", showlegend: false, x: [middle], y: [level(row)], marker: { symbol: "line-ns", size: 9, line: { width: 1.8, color: colourOf(row) } } });
    }
    for (const own of byLabel(measured)) {
      traces.push({ type: "scatter", mode: "markers", xaxis: right.xaxis, yaxis: right.yaxis, marker: marker(own[0]), ...points(own, (row) => row.numbers.get("p50_ms"), level) });
    }
    labels.forEach((label, i) => {
      const row = here.find((one) => one.label === label);
      const text = row?.measured ? number(row.rate) : (row?.status ?? "not measured");
      layout.annotations.push(note(row?.measured ? text : `<i>${text}</i>`, { xref: left.xaxis, yref: left.yaxis, x: row?.measured ? row.rate : 0, y: i, xanchor: "left", xshift: 4, font: { size: 11.5, color: row?.measured ? css("--text") : css("--muted") } }));
    });
  });
  byId("rates-note").textContent = `Medians of ${state.comparison.rounds.replace("n = ", "")}. Bars begin at zero, each panel has an axis of its own; a time's line reaches from the median to the 99th percentile. Hatched and hollow: channels_last.`;
  return { traces, layout, height, told: `Throughput and time of a batch of ${model}, by backend and batch.` };
}

listeners.push(drawModelPick);
register("speedup-figure", speedupFigure);
register("rates-figure", ratesFigure);
