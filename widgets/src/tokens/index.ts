// TokenFeatures: a prompt as a strip of tokens, and the features of the chosen one.
import { button, choice, h, setText } from "../shared/dom";
import { counted, number } from "../shared/format";
import { type FrozenModel, freezer } from "../shared/frozen";
import { onChange, send } from "../shared/model";
import { nameOf } from "../shared/name";
import { type Prompt, promptWords } from "../shared/prompt";
import { panel, widget } from "../shared/panel";
import { latest } from "../shared/rpc";
import { type StripToken, tokenStrip } from "../shared/strip";
import { tokenLabel } from "../shared/tokens";
import { detailBox } from "./detail";
import { promptBox } from "./prompt";
import type { Detail, State, StripValue, Text, Wish } from "./types";

const TYPING_PAUSE_MS = 350;
const MEANINGS: [StripValue, string][] = [
  ["strongest", "strongest activation"],
  ["active", "number of active features"],
  ["feature", "chosen feature"],
  ["loss", "loss (nats)"],
];
// Hebrew, Arabic and their kin.
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/;
const LETTER = /\p{L}/u;

const it = widget<State>((model, el, signal) => {
  const frame = panel(model, el, "tokens", "Token features", signal);
  const typing = latest(TYPING_PAUSE_MS, signal);
  const running = latest(0, signal);

  // ---- what the screen asks for
  const read = (text: Prompt, live: boolean) => {
    const run = async (abort: AbortSignal) => {
      frame.complain("");
      frame.ready(false);
      prompt.say("reading…");
      await frame.call("read", { prompt: text }, { signal: abort });
      frame.ready(true);
      frame.stale("");
      prompt.say("");
    };
    frame.stale((model.get("text") as Text).labels ? `Below: the text before, ${quoted(model.get("prompt"))}.` : "");
    for (const other of [typing, running]) other(() => undefined); // the text before is no longer wanted
    (live ? typing : running)((abort) => void run(abort));
  };
  let unmeasured: number | null = null; // a feature chosen here whose values are on their way
  const wish = (what: Wish) => {
    frame.complain("");
    const differs = (name: keyof Wish) => what[name] !== undefined && what[name] !== model.get(name);
    if (differs("token") || differs("target") || differs("coder")) frame.ready(false); // another detail will come
    if (differs("feature")) unmeasured = what.feature ?? null;
    send(model, what);
  };

  // ---- the parts
  const prompt = promptBox({ read, complain: frame.complain }, signal);
  const strip = tokenStrip({ label: "Tokens", choose: (token) => wish({ token }), hover: (position) => readOut(position) }, signal);
  const detail = detailBox(wish, signal);
  const empty = h("p", { class: "saelab-dim", hidden: true }, "No text yet: type one above.");
  const readout = h("small", { class: "saelab-strip-readout" });
  const meaning = choice("Colour tokens by", MEANINGS, (value) => wish({ strip: value as StripValue }), signal);
  meaning.dataset.needs = "model";
  const coder = choice("Coder", model.get("coders").map(({ name }) => [name, name]), (name) => wish({ coder: name }), signal);
  coder.dataset.needs = "kernel";
  const site = h("small", {});
  const target = h("input", {
    type: "text",
    class: "saelab-target",
    "aria-label": "Token whose logit effects are on",
    placeholder: "the next token",
    title: "One token, with its space: “ Paris”. Empty: the prompt's next token",
    spellcheck: "false",
    autocomplete: "off",
  });
  target.addEventListener("change", () => wish({ target: target.value }), { signal });

  const about = h("span", { class: "saelab-feature-about" });
  const done = h("small", { role: "status" });
  const edit = async (name: "steer" | "ablate") => {
    frame.complain("");
    setText(done, await frame.call<string>(name));
  };
  const adds = (title: string) => ({ "data-needs": "kernel", title });
  const none = button("×", () => wish({ feature: null }), signal, { "data-needs": "model", "aria-label": "Choose no feature", title: "Choose no feature" });
  const chosen = h(
    "div",
    { class: "saelab-bar-row saelab-feature-bar", hidden: true },
    about,
    button("Steer", () => void edit("steer"), signal, adds("Add it to the session's edits, at strength 1 (in units of f_scale)")),
    button("Ablate", () => void edit("ablate"), signal, adds("Add to the session's edits that it is taken out")),
    none,
    done,
  );

  // ---- drawing
  const values = () => {
    const text = model.get("text") as Text;
    return { strongest: text.strongest, active: text.active, feature: model.get("fires"), loss: model.get("losses") }[model.get("strip")];
  };
  const readOut = (position: number | null) => {
    const { labels } = model.get("text") as Text;
    const along = labels ? values() : [];
    if (position !== null && labels?.[position] !== undefined) {
      setText(readout, `${position}: ${tokenLabel(labels[position])} ${noteOf(along[position], model.get("strip"))}`);
      return;
    }
    const largest = Math.max(0, ...along.map((value) => value ?? 0));
    setText(readout, largest > 0 ? `${counted(along.length, "token")}, largest ${number(largest)}` : "");
  };
  const showText = () => {
    const text = model.get("text") as Text;
    const labels = text.labels ?? [];
    empty.hidden = labels.length > 0;
    strip.element.hidden = labels.length === 0;
    meaning.value = model.get("strip");
    // A value that has not come yet colours nothing.
    const along = labels.length > 0 ? values() : [];
    const by = model.get("strip");
    strip.element.dir = direction(labels, text.strongest ?? []);
    strip.show(labels.map((label, i): StripToken => cell(label, along[i], by)));
    isolate(strip.element);
    choose();
    setText(site, `${text.site ?? model.get("coders").find(({ name }) => name === model.get("coder"))?.site ?? ""}`);
    readOut(null);
  };
  const shownDetail = () => {
    const found = model.get("detail") as Detail;
    return found.rows ? found : null;
  };
  const showDetail = () => {
    const found = shownDetail();
    targetRow.hidden = !found?.effects;
    detail.show(found, model.get("sort"), model.get("names"));
    target.value = model.get("target");
    target.placeholder = found?.target && found.target_is !== "chosen" ? `${found.target_is}: ${tokenLabel(found.target)}` : "the next token";
  };
  const showFeature = () => {
    const feature = model.get("feature");
    const fires = model.get("fires");
    chosen.hidden = feature === null;
    detail.select(feature);
    meaning.querySelector<HTMLOptionElement>('[value="feature"]')!.disabled = feature === null;
    setText(done, "");
    if (feature === null) return;
    const name = nameOf(model.get("names")[feature]);
    const head = [h("b", {}, `Feature ${feature}`), ...(name ? [" ", name] : [])];
    if (feature === unmeasured) return about.replaceChildren(...head);
    const here = fires[model.get("token") ?? -1];
    const most = Math.max(0, ...fires.map((value) => value ?? 0));
    about.replaceChildren(...head, ` ${number(here ?? 0)} here, at most ${number(most)} in this text`);
  };
  const choose = () => {
    strip.select(model.get("token"));
    requestAnimationFrame(() => reveal(strip.element)); // not on the page yet, when it is first drawn
  };
  const showToken = () => {
    choose();
    showFeature();
  };
  const showCoder = () => {
    coder.value = model.get("coder");
    coder.hidden = model.get("coders").length < 2;
  };

  const targetRow = h("label", { class: "saelab-target-row", "data-needs": "kernel" }, h("small", {}, "Effects on"), target);
  const by = h("label", { class: "saelab-by" }, h("small", {}, "Colour by"), meaning);
  const stage = h("div", { class: "saelab-stage", "data-needs": "model" }, strip.element);
  frame.root.append(
    h("div", { class: "saelab-bar-row" }, h("h3", {}, "Token features"), coder, site, frame.codeButton),
    prompt.element,
    frame.old,
    h("div", { class: "saelab-bar-row" }, by, readout),
    empty,
    stage,
    chosen,
    h("div", { class: "saelab-token-body" }, targetRow, detail.element),
  );
  onChange(model, ["prompt"], () => (prompt.show(model.get("prompt")), frame.stale("")), signal);
  onChange(model, ["text", "losses", "strip"], showText, signal);
  onChange(model, ["fires"], () => ((unmeasured = null), showText(), showFeature()), signal);
  onChange(model, ["detail", "sort", "target", "names"], () => (showDetail(), showFeature()), signal);
  onChange(model, ["detail", "error"], () => frame.ready(true), signal);
  onChange(model, ["token"], showToken, signal);
  onChange(model, ["feature"], showFeature, signal);
  onChange(model, ["coder"], showCoder, signal);
  prompt.show(model.get("prompt"));
  showCoder();
  showText();
  showDetail();
  showFeature();
  frame.ready(true);
});

function quoted(prompt: Prompt): string {
  const text = promptWords(prompt).replaceAll("\n", " / ");
  return `“${text.length > 60 ? `${text.slice(0, 60)}…` : text}”`;
}

function cell(text: string, value: number | null | undefined, by: StripValue): StripToken {
  if (value === undefined || (value === null && by === "loss")) return { text, value: 0, note: "no value" };
  return { text, value, note: noteOf(value, by) };
}

function noteOf(value: number | null | undefined, by: StripValue): string {
  if (value === undefined || (value === null && by === "loss")) return "no value";
  if (value === null) return "excluded by the token mask";
  if (by === "active") return counted(value, "active feature");
  if (by === "loss") return `loss ${number(value)} nats`;
  return value === 0 ? "silent" : number(value);
}

/** Bytes and special tokens run from left to right in every text: else its brackets would turn around. */
function isolate(strip: HTMLElement): void {
  for (const token of strip.querySelectorAll<HTMLElement>("[data-cell]")) {
    if (token.dataset.state === "excluded" || token.dataset.text?.startsWith("⟨")) token.dir = "ltr";
  }
}

/** Scroll the strip, and nothing else, to the chosen token. */
function reveal(strip: HTMLElement): void {
  const token = strip.querySelector('[aria-selected="true"]')?.getBoundingClientRect();
  const box = strip.getBoundingClientRect();
  if (!token || (token.top >= box.top && token.bottom <= box.bottom)) return;
  strip.scrollTop += token.top - box.top - box.height / 2;
}

/** How a text runs: as its first letter does, tokens that the mask leaves out (a prefix) aside. */
export function direction(labels: string[], values: (number | null)[]): "ltr" | "rtl" {
  const first = labels.find((label, i) => values[i] !== null && LETTER.test(label)) ?? "";
  return RIGHT_TO_LEFT.test(LETTER.exec(first)?.[0] ?? "") ? "rtl" : "ltr";
}

// ---- a page without a kernel: Python put the features of the tokens around the open one into it

type Kept = { pages: Record<string, Detail>; firing: Record<string, Record<string, number>> };

function follow(model: FrozenModel): void {
  const { pages, firing } = { pages: model.get("pages"), firing: model.get("firing") } as Kept;
  model.on("change:feature", () => {
    const found = firing[String(model.get("feature"))];
    const { strongest } = model.get("text") as Text;
    model.set("fires", found ? strongest.map((value, i) => (value === null ? null : (found[i] ?? 0))) : []);
    model.set("strip", found ? "feature" : "strongest");
  });
  model.on("change:token", () => {
    const token = model.get("token") as number;
    const label = (model.get("text") as Text).labels[token] ?? "";
    const note = "This page keeps the features of the tokens around the one that was open.";
    model.set("detail", pages[token] ?? { position: token, label, active: null, effects: false, rows: [], note });
  });
}

export const freeze = freezer(it, follow);
export default it;
