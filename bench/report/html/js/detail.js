// A row in full: what was asked, every metric, its environment, and the command that measures it.
function openRow(row) {
  if (!row) return;
  const dialog = byId("detail");
  const { comparison } = state;
  const environment = comparison.at;
  dialog.replaceChildren(
    el("header", {},
      el("div", {},
        el("p", { class: "kicker" }, `${DATA.modes[comparison.mode]}, ${comparison.precision} (${comparison.mathMode} arithmetic)`),
        el("h2", { id: "detail-title" }, `${row.model}, batch ${row.batch}, `, named(row))),
      button("Close", () => dialog.close(), { class: "quiet" })),
    outcome(row),
    el("h3", {}, "Measure it again"),
    commandLine(row),
    el("p", { class: "note" }, "Timed seconds and the seed are not recorded in a row and are left to "
      + `their defaults. Commit ${row.commit || "unknown"}, ${row.timestamp}.`),
    el("h3", {}, "Everything in the row"),
    facts([["place", row.place], ["memory format", row.memoryFormat], ["image size", `${row.imgSize} px`],
      ["weights", comparison.weights], ["images", comparison.images], ["baseline", comparison.baseline]]),
    metricsTable(row),
    el("h3", {}, `Environment ${environment.id}`),
    facts(Object.entries(environment.facts)),
    ...(environment.note ? [el("p", { class: "note" }, environment.note)] : []),
  );
  dialog.showModal();
  dialog.scrollTop = 0;
  state.row = row;
  writeAddress(row);
  markRow(row);
}

function outcome(row) {
  const parts = [el("strong", { class: `status ${row.status}` }, row.status), `: ${DATA.statuses[row.status]}.`];
  if (row.measured) parts.push(` ${number(row.rate)} images/s, ${number(row.numbers.get("p50_ms"))} ms a batch; `
    + `speed-up over ${state.comparison.baselineLabel}: ${row.speedupText}.`);
  if (row.throttle) parts.push(` Slowed by: ${row.throttle}.`);
  const told = el("p", { class: "prose" }, ...parts);
  return row.error ? el("div", {}, told, el("pre", { class: "reason" }, row.error)) : told;
}

function commandLine(row) {
  const copied = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(row.command);
      copied.textContent = "Copied";
    } catch { // a page from a file may not reach the clipboard; the text is then selected
      getSelection().selectAllChildren(code);
      copied.textContent = "Selected";
    }
  });
  const code = el("code", {}, row.command);
  return el("div", { class: "command" }, code, copied);
}

function facts(pairs) {
  return el("dl", { class: "facts" },
    ...pairs.filter(([, value]) => value).flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)]));
}

function metricsTable(row) {
  const body = METRIC_NAMES.filter((name) => row.numbers.has(name)).map((name) => {
    const { unit, meaning } = DATA.metrics[name];
    return el("tr", {}, el("th", { scope: "row" }, name),
      el("td", { class: "right" }, exact(row.numbers.get(name))), el("td", {}, unit), el("td", { class: "muted" }, meaning));
  });
  if (!body.length) return el("p", { class: "note" }, "No metric: it never ran to an end.");
  return el("div", { class: "scroll" }, el("table", { class: "plain" }, el("tbody", {}, ...body)));
}

byId("detail").addEventListener("close", () => {
  const { row } = state;
  state.row = null;
  writeAddress();
  if (row) focusRow(row);
});
byId("detail").addEventListener("click", (event) => { // beside the dialog
  if (event.target === event.currentTarget) event.currentTarget.close();
});
