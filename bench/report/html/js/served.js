// Rows of the scenarios throughput and server: a table for each way that batches came, all backends.
function drawServed({ served }) {
  for (const id of ["served", "served-link"]) byId(id).hidden = !served.length;
  byId("served-body").replaceChildren(...served.flatMap(({ title, meaning, note, columns, rows, failures }) => [
    el("h3", {}, title),
    el("p", { class: "note prose" }, [meaning, note].filter(Boolean).join(" ")),
    el("div", { class: "scroll" }, el("table", { class: "plain" },
      el("thead", {}, el("tr", {}, ...columns.map(({ title: name, right }) => el("th", { scope: "col", class: right ? "right" : null }, name)))),
      el("tbody", {}, ...rows.map((cells) => el("tr", {},
        ...cells.map((cell, i) => el("td", { class: columns[i].right ? "right" : null, "data-title": columns[i].title }, cell))))))),
    ...failures.map((failure) => el("p", { class: "note prose" }, failure)),
  ]));
}
