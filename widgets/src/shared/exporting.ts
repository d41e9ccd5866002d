// What can be handed on from the screen: a page, a picture, the data. Files are made in the page and need no network.
import { button, h, setText } from "./dom";

export interface Exports {
  /** The data as Python gives them, and the page of `to_html`. */
  ask(what: "page" | "data"): Promise<unknown>;
  root: HTMLElement;
  name: string;
}

/** A row of buttons behind the word "Export". */
export function exportMenu({ ask, root, name }: Exports, signal: AbortSignal): HTMLDetailsElement {
  const needs = { "data-needs": "kernel" };
  const page = async () => download(`${name}.html`, "text/html", String(await ask("page")));
  const data = async () => download(`${name}.json`, "application/json", JSON.stringify(await ask("data"), null, 1));
  const menu = h(
    "details",
    { class: "saelab-export" },
    h("summary", {}, "Export"),
    button("Page", () => void page(), signal, { ...needs, title: "One HTML file that needs no kernel and no network" }),
    button("Picture", () => void savePicture(root, name), signal, { title: "What is shown now, as a PNG file" }),
    button("Data", () => void data(), signal, { ...needs, title: "What is shown now, as a JSON file" }),
  );
  menu.addEventListener("click", (event) => (event.target as Element).closest("button") && (menu.open = false), { signal });
  menu.addEventListener("keydown", (event) => event.key === "Escape" && (menu.open = false), { signal });
  return menu;
}

/** Offer a file as a download. */
export function download(name: string, type: string, content: BlobPart): void {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = h("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** As a PNG; as an SVG in a browser that does not let a page read what it has drawn (Safari). */
async function savePicture(root: HTMLElement, name: string): Promise<void> {
  const source = drawing(root);
  try {
    download(`${name}.png`, "image/png", await painted(source));
  } catch {
    download(`${name}.svg`, "image/svg+xml", source);
  }
}

async function painted(source: string): Promise<Blob> {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(source)}`;
  await image.decode();
  const scale = Math.max(2, window.devicePixelRatio);
  const canvas = h("canvas", { width: Math.round(scale * image.width), height: Math.round(scale * image.height) });
  canvas.getContext("2d")?.drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("too large")))));
}

/** The widget as an SVG that holds its HTML and the style sheets that it has. */
export function drawing(root: HTMLElement): string {
  root.dataset.whole = ""; // what is out of sight is laid out too
  const copy = root.cloneNode(true) as HTMLElement;
  const [live, copied] = [root, copy].map((from) => [...from.querySelectorAll<HTMLElement>("*")]) as [HTMLElement[], HTMLElement[]];
  live.forEach((element, i) => keep(element, copied[i]!));
  const css = rules(root);
  const own = getComputedStyle(root);
  for (const name of new Set(css.match(/--(?!saelab)[\w-]+/g))) copy.style.setProperty(name, own.getPropertyValue(name));
  const [width, height] = [root.offsetWidth, root.offsetHeight];
  delete root.dataset.whole;
  copy.style.width = `${width}px`;
  copy.prepend(h("style", {}, css));
  const body = new XMLSerializer().serializeToString(copy);
  const inside = `<foreignObject width="100%" height="100%">${body}</foreignObject>`;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}">${inside}</svg>`;
}

/** What a clone loses: what is drawn on a canvas, typed or chosen. */
function keep(element: HTMLElement, copied: HTMLElement): void {
  if (element instanceof HTMLCanvasElement) {
    const { position, inset, width, height } = getComputedStyle(element);
    const image = h("img", { src: element.toDataURL() });
    Object.assign(image.style, { position, inset, width, height });
    copied.replaceWith(image);
  } else if (element instanceof HTMLTextAreaElement) setText(copied, element.value);
  else if (element instanceof HTMLOptionElement) copied.toggleAttribute("selected", element.selected);
  else if (element instanceof HTMLInputElement) {
    copied.setAttribute("value", element.value);
    copied.toggleAttribute("checked", element.checked);
  } else if (element instanceof HTMLDetailsElement && element.matches(".saelab-export")) copied.removeAttribute("open");
}

function rules(root: HTMLElement): string {
  const home = root.getRootNode() as Document | ShadowRoot;
  const sheets = [...document.styleSheets, ...home.styleSheets, ...(home.adoptedStyleSheets ?? [])];
  return [...new Set(sheets)].flatMap(textsOf).join("\n");
}

function textsOf(sheet: CSSStyleSheet): string[] {
  try {
    return [...sheet.cssRules].map((rule) => rule.cssText).filter((text) => text.includes(".saelab"));
  } catch {
    return []; // of another host
  }
}
