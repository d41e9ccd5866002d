// Baseline and steered text, side by side: plain while they come, then token by token with their differences.
import { h, setText } from "../shared/dom";
import { counted } from "../shared/format";
import { type StripToken, tokenStrip } from "../shared/strip";
import { readable } from "../shared/visible";
import type { Comparison, Side, TextToken } from "./types";

export interface Texts {
  element: HTMLElement;
  /** What is there belongs to other settings. */
  stale(yes: boolean): void;
  /** New texts are asked for. */
  begin(prompt: string): void;
  hear(side: Side, piece: string): void;
  show(baseline: string, steered: string, comparison: Comparison): void;
}

export function texts(signal: AbortSignal): Texts {
  const sides = { baseline: column("Baseline", signal), steered: column("Steered", signal) };
  const element = h("div", { class: "saelab-texts" }, sides.baseline.element, sides.steered.element);
  return {
    element,
    stale(yes) {
      for (const side of Object.values(sides)) side.element.dataset.stale = String(yes);
    },
    begin(prompt) {
      for (const side of Object.values(sides)) side.begin(prompt);
    },
    hear: (side, piece) => sides[side].hear(piece),
    show(baseline, steered, comparison) {
      sides.baseline.show(baseline, comparison.baseline);
      sides.steered.show(steered, comparison.steered);
    },
  };
}

function column(name: string, signal: AbortSignal) {
  const strip = tokenStrip({ label: `${name} text` }, signal);
  const live = h("div", { class: "saelab-strip saelab-live", dir: "auto", hidden: true });
  const count = h("small", {});
  let prompt = "";
  let pieces = 0;
  let text: HTMLElement | null = null; // grows while pieces come
  const element = h("section", { "aria-label": name }, h("h4", {}, `${name} `, count), live, strip.element);
  return {
    element,
    begin(of: string) {
      prompt = of;
      pieces = 0;
      text = null;
      setText(count, "");
    },
    hear(piece: string) {
      if (!text) {
        text = h("span", {});
        live.replaceChildren(h("span", { class: "saelab-prompt-part" }, prompt), text);
        live.hidden = false;
        strip.element.hidden = true;
      }
      element.dataset.stale = "false";
      text.append(readable(piece));
      pieces++;
      setText(count, `${counted(pieces, "token")}…`);
    },
    show(whole: string, tokens: TextToken[] | undefined) {
      text = null;
      live.hidden = tokens !== undefined;
      strip.element.hidden = tokens === undefined;
      if (!tokens) {
        setText(live, whole);
        setText(count, "");
        return;
      }
      const whose = tokens[0]?.role !== undefined; // a chat's template is shown as what it is
      const first = whose || whole.startsWith(tokens[0]?.text ?? "") ? 0 : 1; // the prefix token is no part of the text
      strip.show(tokens.slice(first).map(plain));
      const news = tokens.filter((token) => token.mark !== "prompt");
      const differ = news.filter((token) => token.mark === "new").length;
      setText(count, `${counted(news.length, "token")}${differ ? `, ${differ} not in the other text` : ""}`);
    },
  };
}

function plain(token: TextToken): StripToken {
  const of = token.role === "template" ? "of the chat template" : token.role ? `of the ${token.role}'s message` : "of the prompt";
  const note = { prompt: of, new: "not in the other text", "": "in both texts" }[token.mark];
  return { text: token.text, value: 0, note, mark: token.mark, role: token.role };
}
