// Runs before anything is painted, so that a dark page never flashes white.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  let chosen = null; // "light" or "dark" once the button was pressed
  try {
    chosen = localStorage.getItem("resfuse-theme");
  } catch {
    // a browser may forbid storage for files; then the choice lasts as long as the page
  }
  const apply = () => {
    root.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
    window.dispatchEvent(new Event("theme-changed"));
  };
  dark.addEventListener("change", apply);
  window.toggleTheme = () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("resfuse-theme", chosen);
    } catch {
      // as above
    }
    apply();
  };
  apply();
})();
