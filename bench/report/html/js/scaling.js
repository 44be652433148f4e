// How time, throughput and memory grow with depth and with the batch.
const QUANTITIES = {
  time: { text: "Time", axis: "time of a batch, ms (median)", of: (row) => row.numbers.get("p50_ms") },
  rate: { text: "Throughput", axis: "throughput, images/s", of: (row) => row.rate },
  memory: { text: "Memory", axis: "peak memory, MB", of: (row) => row.numbers.get("peak_mem_mb") },
};

const known = (row) => row.measured && QUANTITIES[state.quantity].of(row) > 0;

// title of a family -> its rows, where at least two depths are left
function families() {
  const found = new Map();
  for (const row of shownRows().filter((row) => row.series && row.measured)) {
    if (!found.has(row.series)) found.set(row.series, []);
    found.get(row.series).push(row);
  }
  return new Map([...found].filter(([, rows]) => distinct(rows.map((row) => row.depth)).length > 1));
}

function chosenFamily() {
  const found = families();
  const name = found.has(state.series) ? state.series : [...found].sort((a, b) => b[1].length - a[1].length)[0]?.[0];
  return name === undefined ? null : { name, rows: found.get(name) };
}

// The batch asked for, else the one with most depths, then the largest.
function depthBatch(rows) {
  const batches = batchesOf(rows);
  if (batches.includes(state.depthBatch)) return state.depthBatch;
  const depths = (batch) => distinct(rows.filter((row) => row.batch === batch).map((row) => row.depth)).length;
  return batches.sort((a, b) => depths(b) - depths(a) || b - a)[0];
}

function drawScalingPick() {
  const pick = byId("scaling-pick");
  pick.replaceChildren(segmented("Quantity", Object.entries(QUANTITIES).map(([key, { text }]) => [key, text]), state.quantity, (value) => {
    state.quantity = value;
    refresh();
  }));
  const family = chosenFamily();
  if (family) {
    const names = [...families().keys()];
    const batches = batchesOf(family.rows);
    if (names.length > 1) pick.append(select("Family", names.map((name) => [name, name]), family.name, (name) => { state.series = name; refresh(); }));
    if (batches.length > 1) pick.append(select("Batch of the plot over depth", batches.map((batch) => [batch, batch]), depthBatch(family.rows), (batch) => { state.depthBatch = batch; refresh(); }));
  }
  const model = oneModel();
  byId("depth-title").textContent = family ? `With depth: ${family.name}, batch ${depthBatch(family.rows)}` : "With depth";
  byId("batch-title").textContent = model ? `With the batch: ${model}` : "With the batch";
  byId("scaling-note").textContent = "Both axes are logarithmic: of two parallel lines one is slower by a constant factor. "
    + "A line stays open where a case was not measured or failed. The model of the right plot is the one chosen above.";
}

function curves(rows, x, ticks, title) {
  const { axis, of } = QUANTITIES[state.quantity];
  const traces = byLabel(rows).map((own) => {
    const there = new Map(own.map((row) => [x(row), row]));
    const line = ticks.map((tick) => there.get(tick)); // a gap stays open
    return { type: "scatter", mode: "lines+markers", marker: marker(own[0]), line: { color: colourOf(own[0]), width: 1.8, dash: dash(own[0]) }, connectgaps: false, showlegend: false,
      x: ticks, y: line.map((row) => (row ? of(row) : null)), text: line.map((row) => (row ? hover(row) : "")), customdata: line.map((row) => row?.id), ...HOVER };
  });
  const apart = (ticks.at(-1) / ticks[0]) ** (1 / 12); // labels closer than this would touch
  const told = [];
  for (const tick of ticks) if (!told.length || tick / told.at(-1) >= apart) told.push(tick);
  const layout = {
    xaxis: { ...logAxis(ticks, { title }), tickvals: told, ticktext: told.map(String) },
    yaxis: logAxis(rows.map(of), { title: axis }),
    margin: { l: 10, r: 14, t: 10, b: 46 },
  };
  return { traces, layout, height: 380 };
}

function depthFigure() {
  const family = chosenFamily();
  const batch = family && depthBatch(family.rows);
  const rows = family?.rows.filter((row) => row.batch === batch && known(row)) ?? [];
  const depths = distinct(rows.map((row) => row.depth)).sort(ascending);
  if (depths.length < 2) return { why: "It takes two depths of a family at one batch; these rows hold fewer." };
  return { ...curves(rows, (row) => row.depth, depths, "depth, layers"), told: `${QUANTITIES[state.quantity].axis} against depth, a line for each backend.` };
}

function batchFigure() {
  const model = oneModel();
  const rows = shownRows().filter((row) => row.model === model && known(row));
  const batches = batchesOf(rows);
  if (batches.length < 2) return { why: "It takes two batch sizes of a model; these rows hold fewer." };
  return { ...curves(rows, (row) => row.batch, batches, "batch, images"), told: `${QUANTITIES[state.quantity].axis} against the batch, a line for each backend.` };
}

listeners.push(drawScalingPick);
register("depth-figure", depthFigure);
register("batch-figure", batchFigure);
