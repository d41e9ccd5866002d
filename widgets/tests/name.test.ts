import { expect, it } from "vitest";
import { counted } from "../src/shared/format";
import { inWords, nameOf, numbered } from "../src/shared/name";
import { visible } from "../src/shared/visible";

const FAMILY = "👨‍👩‍👧‍👦";

it("a name is text of its own: cut by whole characters, the whole on hovering", () => {
  const made = nameOf(`${FAMILY.repeat(30)}<img src=x onerror=alert(1)>`, 10)!;
  expect(made.localName).toBe("bdi"); // a name from right to left turns nothing around it
  expect(made.textContent).toBe(`${FAMILY.repeat(9)}…`);
  expect(made.title).toContain(`${FAMILY}<img src=x onerror=alert(1)>`);
  expect(made.children.length).toBe(0);
  expect(nameOf("שלום עולם")!.textContent).toBe("שלום עולם");
  expect(nameOf("a\nb")!.textContent).toBe("a b");
});

it("of a very long one ten thousand characters stay", () => {
  const made = nameOf("x".repeat(30_000))!;
  expect(made.textContent!.length).toBe(60);
  expect(made.title.length).toBe(10_000);
});

it("without a name the number stands alone", () => {
  expect(nameOf("")).toBeNull();
  expect(numbered(7, {}).map((part) => part.textContent)).toEqual(["7"]);
  expect(numbered(7, { "7": "months" }).map((part) => part.textContent)).toEqual(["7", "months"]);
  expect([inWords(7, {}), inWords(7, { "7": "months" })]).toEqual(["7", "7 months"]);
});

it("an emoji's own marks are no hidden characters, those behind letters are", () => {
  expect(visible(`❤️ ${FAMILY}`)).toBe(`❤️ ${FAMILY}`);
  expect(visible("a\ufe0f\u200db")).toBe("aU+FE0FU+200Db");
  expect(visible("❤\u202e")).toBe("❤U+202E");
});

it("one is singular", () => {
  expect([counted(1, "token"), counted(0, "token"), counted(1024, "token")]).toEqual(["1 token", "0 tokens", "1,024 tokens"]);
});
