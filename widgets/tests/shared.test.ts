import { describe, expect, it } from "vitest";
import { h, setText } from "../src/shared/dom";
import { integer, number, percent } from "../src/shared/format";
import { tokenChip, tokenLabel, tokenNodes } from "../src/shared/tokens";
import { visible } from "../src/shared/visible";

const text = (nodes: Node[]) => nodes.map((node) => node.textContent).join("");

describe("numbers", () => {
  it.each([
    [0, "0"], [3.456, "3.46"], [12.34, "12.3"], [360.4, "360"], [4608, "4,608"], [-0.25, "−0.25"],
    [0.0123, "0.012"], [0.00001, "1.00e-5"], [null, "–"], [NaN, "–"],
  ])("%s reads %s", (value, shown) => expect(number(value)).toBe(shown));

  it.each([[0, "0 %"], [0.0000214, "0.0021 %"], [0.025, "2.5 %"], [0.5, "50 %"]])("%s reads %s", (share, shown) =>
    expect(percent(share)).toBe(shown),
  );

  it("separates thousands", () => expect(integer(1234567)).toBe("1,234,567"));
});

describe("tokens", () => {
  it.each([
    [" cat", " cat", "·cat"],
    ["  cat", "··cat", "··cat"],
    [" ", "·", "·"],
    ["\n\t", "↵⇥", "↵⇥"],
    ["\u200b", "U+200B", "U+200B"],
    ["⟨E2⟩", "⟨E2⟩", "⟨E2⟩"],
    ["", "∅", "∅"],
  ])("%j is visible", (token, gap, dot) => {
    expect(text(tokenNodes(token, "gap"))).toBe(gap);
    expect(text(tokenNodes(token, "dot"))).toBe(dot);
  });

  it("a very long one on its own is cut between letters, and whole on hovering", () => {
    const long = "👩".repeat(40);
    expect(tokenChip(long).textContent).toBe("👩".repeat(31) + "…");
    expect(tokenChip(long).title).toBe(long);
    expect(tokenChip("x".repeat(32)).textContent).toBe("x".repeat(32));
    expect(tokenChip("x").hasAttribute("title")).toBe(false);
  });

  it("labels stay on one line", () => expect(tokenLabel(" a\n")).toBe("“·a↵”"));
});

describe("what is not seen", () => {
  const evil = "<img src=x onerror=alert(1)>\x00\x1b[2J\u202egpj\ud800\u{E0041}";
  const marked = "<img src=x onerror=alert(1)>U+0000U+001B[2JU+202EgpjU+D800U+E0041";

  it("has a mark in text, and in what is read aloud or on hovering", () => {
    const made = h("b", { title: `${evil}\n`, "aria-label": evil, "data-text": evil }, evil, "a\tb\nc");
    expect(made.textContent).toBe(`${marked}a\tb\nc`); // lines of code stay lines
    expect(made.children.length).toBe(0);
    expect([made.title, made.getAttribute("aria-label"), made.dataset.text]).toEqual([`${marked}↵`, marked, evil]);
    setText(made, evil);
    expect(made.textContent).toBe(marked);
    expect(tokenLabel(evil)).toBe(`“${marked}”`);
  });

  it("is known by one list, and letters of any script are not in it", () => {
    expect(visible("a\nb\tc\rd\u00a0e")).toBe("a↵b⇥c␍d⍽e");
    expect(visible("Zürich, Ελλάδα, שלום, 東京, नमस्ते, 🙂")).toBe("Zürich, Ελλάδα, שלום, 東京, नमस्ते, 🙂");
  });
});
