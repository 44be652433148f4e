// Every row of the comparison, sortable by any column. Lines are made once and then shown, hidden
// and moved: making thousands anew at each click would be felt.
let lines = null; // { comparison, columns, of: Map(row -> tr), body }

function columnsOf(comparison) {
  const known = DATA.columns.map((column) => ({ ...column, ...filling(column) }));
  const used = known.filter((column) => !column.optional || comparison.rows.some((row) => column.text(row) !== "-"));
  return [{ title: "model", right: false, value: (row) => row.model, text: (row) => row.model }, ...used];
}

// What a column shows, and what it is sorted by.
function filling({ title, metrics }) {
  const metric = (row) => metrics.map((name) => row.numbers.get(name)).find((value) => value !== undefined);
  if (title === "batch") return { value: (row) => row.batch, text: (row) => String(row.batch) };
  if (title === "backend") return { value: (row) => row.label, text: (row) => row.label };
  if (title === "status") return { value: (row) => row.status, text: (row) => row.status };
  if (metrics.includes("throttle")) return { value: (row) => row.throttle || undefined, text: (row) => row.throttle || "-" };
  if (metrics.includes("speedup")) return { value: (row) => row.interval?.ratio, text: (row) => row.speedupText };
  if (metrics.includes("rounds")) return { value: metric, text: (row) => metric(row)?.toFixed(0) ?? "-" };
  return { value: metric, text: (row) => number(metric(row)) };
}

function makeLines(comparison) {
  const columns = columnsOf(comparison);
  const body = el("tbody");
  const of = new Map(comparison.rows.map((row) => [row, line(row, columns)]));
  lines = { comparison, columns, of, body };
  const heads = columns.map((column, i) =>
    el("th", { scope: "col", class: column.right ? "right" : null },
      button(column.title, () => sortBy(i), { class: "sort" })));
  byId("rows-table").replaceChildren(el("table", { class: "rows" }, el("thead", {}, el("tr", {}, ...heads)), body));
}

function line(row, columns) {
  const cells = columns.map((column) => {
    const text = column.text(row);
    if (column.title === "model") {
      return el("th", { scope: "row" }, button(text, () => openRow(row), { class: "link" }));
    }
    if (column.title === "backend") return el("td", {}, named(row));
    if (column.title === "status") return el("td", {}, el("span", { class: `status ${row.status}` }, text));
    const told = column.metrics.includes("speedup") ? row.told : "";
    return el("td", { class: [column.right ? "right" : "", "tabular", told].join(" ") }, text);
  });
  const tr = el("tr", { id: `row-${row.id}` }, ...cells);
  tr.addEventListener("click", (event) => {
    if (!event.target.closest("button") && !String(getSelection())) openRow(row);
  });
  return tr;
}

function sortBy(index) {
  const { right } = lines.columns[index];
  const same = state.sort?.index === index;
  // numbers start with the largest, names with the first of the alphabet
  state.sort = { index, descending: same ? !state.sort.descending : right || lines.columns[index].title.startsWith("speed-up") };
  drawRows();
}

function inOrder() {
  const rows = [...state.comparison.rows];
  if (!state.sort) {
    return rows.sort(byModelAndBatch);
  }
  const { value } = lines.columns[state.sort.index];
  const sign = state.sort.descending ? -1 : 1;
  return rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // empty ones last, both ways
    return sign * (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true })) || a.id - b.id;
  });
}

function drawRows() {
  const { comparison } = state;
  if (lines?.comparison !== comparison) {
    state.sort = null;
    makeLines(comparison);
  }
  const shown = new Set(shownRows());
  lines.body.append(...inOrder().map((row) => lines.of.get(row)));
  for (const [row, tr] of lines.of) tr.hidden = !shown.has(row);
  lines.body.parentElement.querySelectorAll("thead th").forEach((th, i) => {
    if (state.sort?.index === i) th.setAttribute("aria-sort", state.sort.descending ? "descending" : "ascending");
    else th.removeAttribute("aria-sort");
  });
  const all = comparison.rows.length;
  byId("rows-note").textContent = (shown.size === all ? `${count(all, "row")}. ` : `${shown.size} of ${count(all, "row")}. `)
    + "A heading sorts; a row opens its environment and the command that measures it again. A dash is a value that does not exist, never a zero.";
}

function markRow(row) {
  for (const tr of lines.body.querySelectorAll(".marked")) tr.classList.remove("marked");
  const tr = lines.of.get(row);
  tr.classList.add("marked");
  return tr;
}

// After its details are closed the reader stands at the row.
function focusRow(row) {
  const tr = markRow(row);
  if (tr.hidden) return;
  tr.querySelector("button").focus({ preventScroll: true });
  tr.scrollIntoView({ block: "center" });
}

listeners.push(drawRows);
