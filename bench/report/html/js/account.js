// Where the page accounts for itself: what failed, on what it was measured, how to read it.
function drawFailures() {
  const { failures, nothingFailed, rows } = state.comparison;
  const body = byId("failures-body");
  if (!failures.length) {
    body.replaceChildren(el("p", { class: "prose" }, nothingFailed));
    return;
  }
  const titles = ["status", "cases", "which", "reason"];
  body.replaceChildren(el("div", { class: "scroll" }, el("table", { class: "failures" },
    el("thead", {}, el("tr", {}, ...titles.map((title) => el("th", { scope: "col", class: title === "cases" ? "right" : null }, title)))),
    el("tbody", {}, ...failures.map((failure) => el("tr", {},
      el("td", {}, el("span", { class: `status ${failure.status}` }, failure.status)),
      el("td", { class: "right", "data-title": "cases" }, failure.rows.length),
      el("td", {}, failure.which, " ", openers(failure, rows)),
      el("td", {}, failure.reason)))))));
}

function openers({ rows: ids }, rows) {
  if (ids.length === 1) return button("row", () => openRow(rows[ids[0]]), { class: "link" });
  return el("details", { class: "openers" }, el("summary", {}, `${ids.length} rows`),
    ...ids.map((id) => button(`${rows[id].label}, ${rows[id].model}, batch ${rows[id].batch}`, () => openRow(rows[id]), { class: "link" })));
}

function drawAccount() {
  const { at: environment, mode, precision, mathMode, device } = state.comparison;
  byId("kicker").textContent = `${DATA.modes[mode]}, ${precision} (${mathMode} arithmetic)`;
  byId("device").textContent = device;
  accountFor(environment);
}

function accountFor(environment) {
  drawServed(environment);
  byId("opening").textContent = environment.opening;
  byId("made-from").textContent = environment.madeFrom
    + (environment.convolutions ? " Convolutions measured one by one are in DETAILS.md." : "")
    + (DATA.environments.length > 1 ? " Rows of other environments are never put beside these: choose another on the left." : "")
    + (environment.note ? ` ${environment.note}` : "");
  byId("facts").replaceChildren(...facts(Object.entries(environment.facts)).childNodes);
}

function drawGuide() {
  const rules = [...DATA.rules,
    "Fastest is the most images/s among those that passed. Its place is called clear where the speed-up interval of no other backend reaches its own; otherwise the two are not told apart."];
  byId("guide").replaceChildren(
    el("ul", { class: "prose" }, ...rules.map((rule) => el("li", {}, rule))),
    el("dl", { class: "facts" }, ...Object.entries(DATA.statuses).flatMap(([name, meaning]) => [el("dt", {}, name), el("dd", {}, meaning)])),
    el("div", { class: "scroll" }, el("table", { class: "plain" },
      el("thead", {}, el("tr", {}, ...["column of rows.csv", "unit", "meaning"].map((title) => el("th", { scope: "col" }, title)))),
      el("tbody", {}, ...METRIC_NAMES.map((name) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, DATA.metrics[name].unit), el("td", {}, DATA.metrics[name].meaning)))))));
}

listeners.push(drawFailures, drawAccount);
