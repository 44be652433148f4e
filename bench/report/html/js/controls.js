// The left column. Above: which comparison, one thing after the other, each offering only what the
// ones before it leave. There is no way to choose two. Below: which of its rows.
const CASCADE = [
  { title: "Device", of: (c) => c.device, always: true },
  { title: "Environment", of: (c) => c.at.id, text: (c) => `${c.at.id}, ${c.at.last.slice(0, 10)}`, always: true },
  { title: "Mode", of: (c) => c.mode, text: (c) => DATA.modes[c.mode], always: true },
  { title: "Precision", of: (c) => `${c.precision} ${c.mathMode}`, text: (c) => `${c.precision} (${c.mathMode} arithmetic)`, always: true },
  { title: "Weights", of: (c) => c.weights },
  { title: "Images", of: (c) => c.images },
  { title: "Baseline", of: (c) => c.baseline, always: true },
];

function drawPicker() {
  let left = COMPARISONS;
  const picker = byId("picker");
  const focused = document.activeElement?.closest?.("label")?.textContent;
  picker.replaceChildren();
  CASCADE.forEach(({ title, of, text = of, always }, level) => {
    const candidates = left;
    const found = new Map(left.map((c) => [of(c), text(c)]));
    left = left.filter((c) => of(c) === of(state.comparison));
    if (found.size > 1) {
      picker.append(select(title, [...found], of(state.comparison), (value) => {
        // as much as possible of what was chosen further down stays
        const rest = candidates.filter((c) => of(c) === value);
        const alike = (c) => CASCADE.slice(level + 1)
          .filter((later) => later.of(c) === later.of(state.comparison)).length;
        chooseComparison(rest.sort((a, b) => alike(b) - alike(a))[0]);
      }));
    } else if (always) {
      picker.append(el("p", { class: "only" }, el("span", {}, title), text(state.comparison)));
    }
  });
  if (focused) for (const label of picker.querySelectorAll("label")) {
    if (label.firstChild.textContent === focused.slice(0, label.firstChild.textContent.length)) {
      label.querySelector("select").focus();
    }
  }
}

function drawNarrowing() {
  const form = byId("narrow");
  const { rows } = state.comparison;
  const focused = document.activeElement?.id;
  form.replaceChildren();
  let active = 0;
  for (const { key, title, of } of NARROWING) {
    const samples = new Map(rows.map((row) => [of(row), row]));
    const values = ordered(key, [...samples.keys()]);
    if (values.length < 2) continue;
    const chosen = state.chosen.get(key);
    active += chosen.size;
    form.append(el("fieldset", { "data-key": key, class: key === "backend" ? "lines" : null },
      el("legend", {}, title),
      ...values.map((value, i) => {
        const box = el("input", {
          type: "checkbox", id: `${key}-${i}`, value, checked: chosen.has(value),
          onchange: () => narrowTo(key, value, box.checked),
        });
        const shown = key === "backend" ? named(samples.get(value)) : value;
        // dim: in the list, and yet nothing of it ran
        const dim = key === "backend" && !rows.some((row) => row.label === value && row.measured);
        return el("label", { class: dim ? "chip dim" : "chip" }, box, shown);
      })));
  }
  if (active) form.append(button("Show all", showAll, { class: "quiet" }));
  const shown = shownRows().length;
  byId("filters-told").textContent = active ? `${shown} of ${count(rows.length, "row")}` : "";
  if (focused && form.contains(byId(focused))) byId(focused).focus();
}

function ordered(key, values) {
  if (key === "batch") return values.sort(ascending);
  if (key === "backend") return state.comparison.labels;
  if (key === "model") return state.comparison.models;
  return key === "status" ? Object.keys(DATA.statuses).filter((s) => values.includes(s)) : values;
}

function drawLegends() {
  const samples = new Map(shownRows().filter((row) => row.measured).map((row) => [row.label, row]));
  const shown = state.comparison.labels.filter((label) => samples.has(label));
  for (const legend of document.querySelectorAll(".legend")) {
    legend.replaceChildren(...shown.map((label) => named(samples.get(label))));
  }
}

listeners.push(drawPicker, drawNarrowing, drawLegends);
