// What is shown: one comparison, and which of its rows. It stands in the address, so that a view
// can be sent to others or bookmarked.
const NARROWING = [ // what rows of one comparison may be narrowed to; nothing chosen shows all
  { key: "model", title: "Model", of: (row) => row.model },
  { key: "batch", title: "Batch, images", of: (row) => String(row.batch) },
  { key: "backend", title: "Backend", of: (row) => row.label },
  { key: "status", title: "Status", of: (row) => row.status },
];
const state = {
  comparison: null,
  chosen: new Map(NARROWING.map(({ key }) => [key, new Set()])),
  row: null,
  sort: null, // { index of a column, descending }
  model: null, // of plots that show a single one
  series: null, // of the plot over depth
  depthBatch: null,
  everyRace: false, // the table of the fastest in full
  quantity: "time",
};
const listeners = [];

function shownRows() {
  return state.comparison.rows.filter((row) =>
    NARROWING.every(({ key, of }) => {
      const chosen = state.chosen.get(key);
      return chosen.size === 0 || chosen.has(of(row));
    }));
}

function byModelAndBatch(a, b) {
  const place = (row) => state.comparison.models.indexOf(row.model);
  return place(a) - place(b) || a.batch - b.batch || fastestFirst(a, b);
}

function refresh() {
  if (state.comparison) for (const listener of listeners) listener();
}

function narrowTo(key, value, on) {
  const chosen = state.chosen.get(key);
  if (on) chosen.add(value);
  else chosen.delete(value);
  writeAddress();
  refresh();
}

function showAll() {
  for (const chosen of state.chosen.values()) chosen.clear();
  writeAddress();
  refresh();
}

function chooseComparison(comparison) {
  state.comparison = comparison;
  for (const { key, of } of NARROWING) { // a choice that means nothing here would hide everything
    const known = new Set(comparison.rows.map(of));
    state.chosen.set(key, new Set([...state.chosen.get(key)].filter((v) => known.has(v))));
  }
  writeAddress();
  refresh();
}

function writeAddress(row = null) {
  const parts = new URLSearchParams();
  parts.set("show", COMPARISONS.indexOf(state.comparison));
  for (const [key, chosen] of state.chosen) for (const value of chosen) parts.append(key, value);
  if (row) parts.set("row", row.id);
  history.replaceState(null, "", `#${parts}`);
}

// The comparison that was measured most, of the environment that was measured last.
function usualComparison() {
  const measured = (comparison) => comparison.rows.filter((row) => row.measured).length;
  return [...COMPARISONS].sort((a, b) =>
    (a.at.last < b.at.last) - (a.at.last > b.at.last) || measured(b) - measured(a))[0] ?? null;
}

// Returns the row that the address names, if any.
function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  state.comparison = COMPARISONS[parts.get("show")] ?? usualComparison();
  if (!state.comparison) return null;
  for (const { key, of } of NARROWING) {
    const known = new Set(state.comparison.rows.map(of));
    state.chosen.set(key, new Set(parts.getAll(key).filter((value) => known.has(value))));
  }
  return state.comparison.rows[parts.get("row") ?? -1] ?? null;
}
