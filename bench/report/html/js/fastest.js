// What is seen first: for each model and batch the fastest backend, by how much, and how sure.
const MOST_RACES = 12; // more than a window holds; the sentence above speaks of all
const STRIP_TICKS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100];

// model and batch -> its rows, fastest first; only where something has a speed
function races(rows) {
  const found = new Map();
  for (const row of [...rows].sort(byModelAndBatch)) {
    const key = JSON.stringify([row.model, row.batch]);
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(row);
  }
  return [...found.values()].filter(([first]) => first.measured);
}

// Other backends whose interval reaches the leader's: their places might be the other way round.
// Its own other memory format is the same backend, and no rival.
function level(race) {
  const [leader] = race;
  const others = rivals(race);
  if (!leader.interval) return others;
  return others.filter((row) => !row.interval || row.interval.high >= leader.interval.low);
}

const rivals = (race) => race.filter((row) => row.measured && row.backend !== race[0].backend);

function drawFastest() {
  const found = races(shownRows());
  byId("noise").textContent = state.comparison.noise;
  byId("lead").textContent = leadSentence(found);
  const shown = byId("fastest-table");
  shown.replaceChildren();
  if (!found.length) return;
  const some = state.everyRace || paper ? found : found.slice(0, MOST_RACES);
  const scale = stripScale(found.flat());
  shown.append(el("table", { class: "fastest" },
    el("thead", {}, el("tr", {},
      ...["model", "batch", "fastest", "images/s", "speed-up [95 %]"].map((title, i) =>
        el("th", { scope: "col", class: i === 1 || i === 3 ? "right" : null }, title)),
      el("th", { scope: "col", class: "strip-head" },
        el("span", { class: "strip-title" }, `every backend; 1 = ${state.comparison.baselineLabel}`), axis(scale)),
      el("th", { scope: "col" }, "how sure"))),
    el("tbody", {}, ...some.map((race, i) =>
      raceLine(race, scale, i > 0 && found[i - 1][0].model === race[0].model)))));
  if (some.length < found.length) {
    shown.append(button(`Show all ${found.length}`, () => {
      state.everyRace = true;
      refresh();
    }));
  }
}

function leadSentence(found) {
  if (!found.length) {
    return shownRows().length ? "No row shown here has a speed; the reasons stand below." : "No row is left by the filters.";
  }
  const wins = new Map();
  let clear = 0;
  for (const race of found) {
    wins.set(race[0].backend, (wins.get(race[0].backend) ?? 0) + 1);
    clear += rivals(race).length > 0 && level(race).length === 0;
  }
  const ranked = [...wins].sort((a, b) => b[1] - a[1]);
  const [[first, won], ...rest] = ranked;
  const ratios = found.map(([leader]) => leader)
    .filter((row) => row.backend === first && row.interval && !row.isBaseline)
    .map((row) => row.interval.ratio).sort(ascending);
  const range = distinct([ratios[0], ratios.at(-1)]).filter((ratio) => ratio !== undefined).map((ratio) => ratio.toFixed(2));
  const ahead = range.length ? `, at ${range.join(" to ")} times the speed of ${state.comparison.baselineLabel}` : "";
  if (found.length === 1) {
    return `Of every way shown here ${first} is fastest${ahead}. `
      + `Its interval is ${clear ? "" : "not "}clear of every other backend's.`;
  }
  const others = rest.map(([name, n]) => `${name} in ${n}`);
  return `Of ${found.length} combinations of model and batch, ${first} is fastest in ${won === found.length ? "all" : won}${ahead}`
    + `${others.length ? `; ${listing(others)}` : ""}. `
    + `In ${clear === found.length ? "all of them" : clear} the fastest one's interval is clear of every other backend's.`;
}

function raceLine(race, scale, again) {
  const [leader] = race;
  return el("tr", {},
    el("th", { scope: "row", class: again ? "again" : null }, el("span", {}, leader.model)),
    el("td", { class: "right", "data-title": "batch" }, leader.batch),
    el("td", {}, button(named(leader), () => openRow(leader), { class: "link" })),
    el("td", { class: "right", "data-title": "images/s" }, number(leader.rate)),
    el("td", { class: "tabular" }, leader.speedupText),
    el("td", { class: "strip-cell" }, strip(race, scale)),
    el("td", { class: "sure" }, sureness(race)));
}

function sureness(race) {
  const failed = race.filter((row) => !row.measured && row.status !== "unavailable").length;
  const without = failed ? `; ${failed} failed` : "";
  if (!rivals(race).length) return `the only backend with a speed${without}`;
  if (!race[0].interval) return `no interval, so not known${without}`;
  const near = level(race);
  if (!near.length) return `clear of the others${without}`;
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
