// The rows as objects. Everything of this page that is a number comes from here.
const DATA = JSON.parse(document.getElementById("data").textContent);
const METRIC_NAMES = Object.keys(DATA.metrics);
const RATES = ["infer_samples_per_sec", "train_samples_per_sec"];
const INTERVAL = ["speedup_ci_low", "speedup_ci_high"];

function rowOf(values, id) {
  const row = { id, numbers: new Map() };
  DATA.fields.forEach((name, i) => { row[name] = values[i]; });
  METRIC_NAMES.forEach((name, i) => {
    const value = values[DATA.fields.length + i];
    if (value !== null) row.numbers.set(name, value);
  });
  row.rate = RATES.map((name) => row.numbers.get(name)).find((value) => value !== undefined);
  row.measured = row.rate !== undefined && row.numbers.has("p50_ms");
  const [low, high] = INTERVAL.map((name) => row.numbers.get(name));
  const ratio = row.numbers.get("speedup");
  row.interval = row.measured && ratio > 0 && low > 0 && high > 0 ? { ratio, low, high } : null;
  return row;
}

const COMPARISONS = DATA.comparisons.map((raw) => ({
  ...raw,
  at: DATA.environments[raw.environment],
  rows: raw.rows.map(rowOf),
}));
for (const comparison of COMPARISONS) comparison.models = modelsOf(comparison);

// The models of a comparison: the largest family first, each family from shallow to deep.
function modelsOf(comparison) {
  const sizes = new Map();
  const first = new Map(comparison.rows.map((row) => [row.model, row]).reverse());
  for (const row of first.values()) sizes.set(row.series, (sizes.get(row.series) ?? 0) + 1);
  const size = (row) => (row.series ? sizes.get(row.series) : 1);
  return [...first.values()].sort((a, b) => size(b) - size(a) || a.id - b.id).map((row) => row.model);
}

const distinct = (values) => [...new Set(values)];
const ascending = (a, b) => a - b;

// Three significant digits, as in the markdown report, but for the commas: 1.23e-7, 1.23, 12,345.
function number(value) {
  if (value === undefined || value === null) return "-";
  const rounded = Number(value.toExponential(2));
  if (rounded === 0) return "0";
  const exponent = Math.floor(Math.log10(Math.abs(rounded)) + 1e-9);
  if (exponent < -3) return value.toExponential(2);
  if (exponent >= 4) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return value.toFixed(Math.max(0, 2 - exponent));
}

// A value as its row has it, six digits: counts stay whole.
const exact = (value) => (Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(6))));

const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

// a, b and c
function listing(names) {
  return names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}

// Fastest first within a model and batch; what has no speed last.
function fastestFirst(a, b) {
  return b.measured - a.measured || (b.rate ?? 0) - (a.rate ?? 0) || a.id - b.id;
}
