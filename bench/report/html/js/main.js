let themeOfScreen = "light"; // while the page is being printed

function start() {
  const themeButton = byId("theme");
  const nameTheme = () => {
    themeButton.textContent = document.documentElement.dataset.theme === "dark" ? "Light" : "Dark";
    themeButton.setAttribute("aria-label", `Switch to the ${themeButton.textContent.toLowerCase()} theme`);
  };
  themeButton.addEventListener("click", window.toggleTheme);
  nameTheme();
  window.addEventListener("theme-changed", () => { nameTheme(); redraw(); });
  if (matchMedia("(max-width: 899px)").matches) byId("filters").open = false;
  drawGuide();
  const row = readAddress();
  if (!state.comparison) {
    nothing();
    return;
  }
  refresh();
  openRow(row);
  window.addEventListener("plotly-is-here", watchFigures);
  window.addEventListener("hashchange", () => {
    if (!location.hash.includes("show=")) return; // a heading of this page
    const asked = readAddress();
    refresh();
    openRow(asked);
  });
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
}

// Paper is white, and shows what would be below the window, too.
function print(on) {
  const { dataset } = document.documentElement;
  if (on) themeOfScreen = dataset.theme;
  paper = on;
  dataset.theme = on ? "light" : themeOfScreen;
  refresh();
}

function nothing() {
  for (const id of ["content", "filters"]) byId(id).hidden = true;
  document.querySelector("nav").hidden = true;
  const [environment] = DATA.environments;
  byId("device").textContent = "No network has been measured batch by batch";
  byId("empty").hidden = Boolean(environment?.served.length);
  byId("empty").textContent = environment
    ? "Convolutions measured one by one are in DETAILS.md beside this page."
    : "There is nothing to report: rows.csv holds no rows.";
  if (environment) accountFor(environment);
  else byId("provenance").querySelector("h2").hidden = true;
}

start();
