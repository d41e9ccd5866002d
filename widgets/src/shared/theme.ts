// Light or dark, as the host page says; the root element carries the answer for the style sheet.

export type Theme = "light" | "dark";

// marimo and Sphinx-like pages mark an ancestor; Colab marks <html>.
const DARK_ANCESTOR = '.dark, .dark-theme, [data-theme="dark"], html[theme="dark"]';
const DARK_BODY = ["vscode-dark", "vscode-high-contrast"];

/** The theme of the page around `root`: JupyterLab, VS Code, marimo or Colab; light where nobody says. */
export function themeOf(root: Element): Theme {
  const body = document.body;
  const jupyter = body.getAttribute("data-jp-theme-light");
  if (jupyter !== null) return jupyter === "false" ? "dark" : "light";
  if (body.classList.contains("vscode-high-contrast-light")) return "light";
  if (DARK_BODY.some((name) => body.classList.contains(name))) return "dark";
  for (let node = root.parentElement; node !== null; node = hostOf(node)) {
    if (node.closest(DARK_ANCESTOR)) return "dark";
  }
  // Not on the page yet: <html> is all that can be asked.
  return document.documentElement.matches(DARK_ANCESTOR) ? "dark" : "light";
}

/** The element that hosts the shadow root around `node` (marimo renders widgets in one), or null. */
function hostOf(node: Element): HTMLElement | null {
  const root = node.getRootNode();
  return root instanceof ShadowRoot ? (root.host as HTMLElement) : null;
}

/** Keep `data-saelab-theme` and `color-scheme` of `root` in step with the page until `signal` aborts. */
export function followTheme(root: HTMLElement, signal: AbortSignal): void {
  const apply = () => {
    const theme = themeOf(root);
    root.dataset.saelabTheme = theme;
    root.style.colorScheme = theme; // native inputs, menus and scrollbars
  };
  const observer = new MutationObserver(apply);
  const watched = { attributes: true, attributeFilter: ["class", "data-theme", "theme", "data-jp-theme-light"] };
  observer.observe(document.documentElement, watched);
  observer.observe(document.body, watched);
  signal.addEventListener("abort", () => observer.disconnect());
  apply();
  // `render` runs before the host puts the element on the page, so ancestors are only known afterwards.
  requestAnimationFrame(apply);
}
