// What is seen first: for each model and batch the fastest backend, by how much, and how sure.
const STRIP_TICKS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100];

// model and batch -> its rows, fastest first; only where something has a speed
function races(rows) {
  const found = new Map();
  for (const row of rows) {
    const key = JSON.stringify([row.model, row.batch]);
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(row);
  }
  return [...found.values()].map((race) => race.sort(fastestFirst)).filter(([first]) => first.measured);
}

// Others whose interval reaches the leader's: their places might be the other way round.
function level(race) {
  const [leader, ...others] = race.filter((row) => row.measured);
  if (!leader.interval) return others;
  return others.filter((row) => !row.interval || row.interval.high >= leader.interval.low);
}

function drawFastest() {
  const found = races(shownRows());
  byId("noise").textContent = state.comparison.noise;
  byId("lead").textContent = leadSentence(found);
  const shown = byId("fastest-table");
  shown.replaceChildren();
  if (!found.length) return;
  const scale = stripScale(found.flat());
  shown.append(el("table", { class: "fastest" },
    el("thead", {}, el("tr", {},
      ...["model", "batch", "fastest", "images/s", "p50, ms", `speed-up [95 % interval]`].map((title, i) =>
        el("th", { scope: "col", class: i === 1 || i === 3 || i === 4 ? "right" : null }, title)),
      el("th", { scope: "col", class: "strip-head" },
        el("span", { class: "strip-title" }, `every backend; 1 = ${state.comparison.baseline}`), axis(scale)),
      el("th", { scope: "col" }, "how sure"))),
    el("tbody", {}, ...found.map((race, i) =>
      raceLine(race, scale, i > 0 && found[i - 1][0].model === race[0].model)))));
}

function leadSentence(found) {
  if (!found.length) {
    return shownRows().length ? "No row shown here has a speed; the reasons stand below." : "No row is left by the filters.";
  }
  const wins = new Map();
  let clear = 0;
  for (const race of found) {
    wins.set(race[0].label, (wins.get(race[0].label) ?? 0) + 1);
    clear += race.filter((row) => row.measured).length > 1 && level(race).length === 0;
  }
  const ranked = [...wins].sort((a, b) => b[1] - a[1]);
  const led = found.map((race) => race[0]).filter((row) => row.label === ranked[0][0] && row.interval && !row.isBaseline);
  const ratios = led.map((row) => row.interval.ratio).sort(ascending);
  const times = (value) => `${value.toFixed(2)}`;
  const span = ratios.length === 0 ? ""
    : `, at ${times(ratios[0])}${ratios.length > 1 ? ` to ${times(ratios.at(-1))}` : ""} times the speed of ${state.comparison.baseline}`;
  const others = ranked.slice(1).map(([label, n]) => `${label} in ${n}`);
  return `Of ${count(found.length, "pair")} of model and batch, ${ranked[0][0]} is fastest in ${ranked[0][1]}${span}`
    + `${others.length ? `; ${listing(others)}` : ""}. In ${clear} of them the fastest one's interval is clear of every other's.`;
}

function raceLine(race, scale, again) {
  const [leader] = race;
  return el("tr", {},
    el("th", { scope: "row", class: again ? "again" : null }, el("span", {}, leader.model)),
    el("td", { class: "right", "data-title": "batch" }, leader.batch),
    el("td", {}, button(named(leader), () => openRow(leader), { class: "link" })),
    el("td", { class: "right", "data-title": "images/s" }, number(leader.rate)),
    el("td", { class: "right", "data-title": "p50, ms" }, number(leader.numbers.get("p50_ms"))),
    el("td", { class: "tabular" }, leader.speedupText),
    el("td", { class: "strip-cell" }, strip(race, scale)),
    el("td", { class: "sure" }, sureness(race)));
}

function sureness(race) {
  const measured = race.filter((row) => row.measured);
  const failed = race.length - measured.length;
  const without = failed ? `; ${failed} without a speed` : "";
  if (measured.length === 1) return `the only one with a speed${without}`;
  const near = level(race);
  if (!near.length) return `clear of all ${measured.length - 1} others${without}`;
  return `not told apart from ${listing(near.map((row) => row.label))}${without}`;
}

// Speed-ups on a logarithmic line: twice as slow is as far from 1 as twice as fast.
function stripScale(rows) {
  const values = rows.filter((row) => row.interval).flatMap(({ interval }) => [interval.low, interval.high]);
  const low = Math.log(Math.min(0.9, ...values) * 0.94);
  const high = Math.log(Math.max(1.1, ...values) * 1.06);
  const place = (value) => (100 * (Math.log(value) - low)) / (high - low);
  const inside = STRIP_TICKS.filter((tick) => place(tick) >= 0 && place(tick) <= 100);
  const more = inside.length < 3 ? [...inside, 0.7, 1.5, 3] : inside;
  return { place, ticks: distinct(more).filter((tick) => place(tick) >= 0 && place(tick) <= 100) };
}

const at = (percent) => `left: ${percent.toFixed(2)}%`;

function axis({ place, ticks }) {
  return el("span", { class: "axis" }, ...ticks.map((tick) => el("span", { style: at(place(tick)) }, tick)));
}

function strip(race, { place, ticks }) {
  const marks = race.filter((row) => row.interval).reverse(); // the fastest lies on top
  return el("div", { class: "strip" },
    ...ticks.map((tick) => el("i", { class: tick === 1 ? "one" : null, style: at(place(tick)) })),
    ...marks.map((row) => {
      const { low, high } = row.interval;
      return el("b", { class: `look-${LOOK_INDEX.get(row.backend)}`,
        style: `${at(place(low))}; width: ${(place(high) - place(low)).toFixed(2)}%` });
    }),
    ...marks.map((row) => {
      const told = `${row.label}: ${row.speedupText}`;
      const mark = button("", () => openRow(row), { style: at(place(row.interval.ratio)), title: told, "aria-label": told, tabindex: -1 });
      mark.append(glyph(row));
      return mark;
    }));
}

listeners.push(drawFastest);
