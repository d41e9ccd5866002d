import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import widget, { freeze } from "../src/inspector/index";
import { ATTACK, MockModel, state, view } from "./mock";

let model: MockModel;
let el: HTMLElement;
let cleanup: () => void;

function mount(changes = {}): HTMLElement {
  model = new MockModel(state(changes));
  el = document.createElement("div");
  document.body.append(el);
  cleanup = widget.render({ model: model as never, el });
  return el.querySelector<HTMLElement>(".saelab-inspector")!;
}

const all = (selector: string) => [...el.querySelectorAll<HTMLElement>(selector)];
const one = (selector: string) => el.querySelector<HTMLElement>(selector)!;
const token = (text: string) => all(".saelab-token").find((span) => span.textContent === text)!;
const marker = () => one(".saelab-marker");

function press(target: HTMLElement, key: string, more: KeyboardEventInit = {}): void {
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, composed: true, ...more }));
}

function type(input: HTMLInputElement, value: string, event: string): void {
  input.value = value;
  input.dispatchEvent(new Event(event, { bubbles: true }));
}

/** The lines below the first group come after the first paint. */
const painted = () => new Promise<void>((done) => requestAnimationFrame(() => setTimeout(done)));

afterEach(() => {
  cleanup();
  document.body.replaceChildren();
  vi.useRealTimers();
});

describe("render", () => {
  it("is ready and names the feature", () => {
    const root = mount();
    expect(root.dataset.ready).toBe("1");
    expect(one("h3").textContent).toBe("Feature 812");
    expect(one(".saelab-stats").textContent).toContain("0.21 %");
    expect(one(".saelab-stats").textContent).toContain("1,024 of 478,120");
  });

  it("shows markup in tokens as text", () => {
    mount();
    expect(token(ATTACK)).toBeDefined();
    expect(el.querySelector("img, script, b")).toBeNull();
    expect(all(".saelab-result")[1]!.textContent).toContain(ATTACK);
  });

  it("makes the strongest contexts at once, the others after the first paint, in room kept for them", async () => {
    mount();
    const [first, second] = all(".saelab-group");
    expect(first!.querySelectorAll("[data-row]").length).toBe(Number(first!.style.getPropertyValue("--saelab-lines")));
    expect(second!.getAttribute("aria-busy")).toBe("true");
    expect(second!.querySelectorAll("[data-row]").length).toBe(0);
    await painted();
    expect(second!.querySelectorAll("[data-row]").length).toBe(Number(second!.style.getPropertyValue("--saelab-lines")));
    expect(all(".saelab-group[aria-busy]")).toEqual([]);
  });

  it("shows an item of another network as a picture, and no other address", () => {
    const picture = "data:image/png;base64,iVBORw0KGgo=";
    const context = { tokens: ["0", "1"], values: [0.5, 2], peak: 1, document: 7, position: 1, picture };
    const elsewhere = { ...context, picture: "https://example.org/a.png" };
    mount({ view: { ...view(812), groups: [{ label: "top", contexts: [context, elsewhere] }] } });
    const pictures = all(".saelab-tile img") as HTMLImageElement[];
    expect(pictures.map((img) => img.getAttribute("src"))).toEqual([picture]);
    expect(one(".saelab-tile").textContent).toMatch(/^2(\.0+)? at 1$/);
    expect(one(".saelab-tile").title).toBe("item 7, place 1");
    expect(all(".saelab-context").length).toBe(1);
  });

  it("makes no contexts of a feature that is no longer on show", async () => {
    mount();
    const second = all(".saelab-group")[1]!;
    model.fromPython("view", view(405));
    await painted();
    expect(second.querySelectorAll("[data-row]").length).toBe(0);
  });

  it("shows white space, excluded tokens and the peak's value", async () => {
    mount();
    await painted();
    expect(token("↵").dataset.state).toBe("active");
    expect(token("··").dataset.state).toBe("silent");
    expect(token("<|endoftext|>").dataset.state).toBe("excluded");
    expect(token("<|endoftext|>").title).toContain("excluded by the token mask");
    const peak = token(" cat");
    expect(peak.title).toBe("“·cat” 4.00, peak");
    expect(peak.getAttribute("aria-label")).toBe(peak.title);
    expect(peak.style.getPropertyValue("--saelab-share")).toBe("1.000");
    expect(token(" dog").style.getPropertyValue("--saelab-share")).toBe("0.512");
  });

  it("shows a caution only with a lens note", () => {
    mount();
    expect(el.querySelector(".saelab-caution")).toBeNull();
    expect(one(".saelab-lens h4").textContent).toContain("arbitrary units");
    model.fromPython("view", { ...view(812), lens_note: "no final norm" });
    expect(one(".saelab-lens details").hasAttribute("open")).toBe(false); // read only by who asks for it
    expect(one(".saelab-caution").textContent).toBe("no final norm");
  });

  it("says densities as shares, and goes on to an f_scale beyond all activations", () => {
    mount({ view: { ...view(812), f_scale: 8, max: 4 } });
    const axes = all(".saelab-histogram .saelab-axis").map((axis) => [...axis.children].map((part) => part.textContent));
    expect(axes[0]!.slice(1)).toEqual(["┆ f_scale 8.00", "8.00"]);
    expect(one(".saelab-reference").getAttribute("x1")).toBe("400.00");
    expect(Number([...one(".saelab-activations .saelab-histogram-plot").querySelectorAll(".saelab-bar")].at(-1)!.getAttribute("x"))).toBeCloseTo(195);
    expect(axes[1]).toEqual(["0.01 %", "10 %"]);
    expect(one(".saelab-density .saelab-bar title").textContent).toBe("0.01 % to 0.1 %: 1 feature");
  });

  it("calls a feature the same in the list and in its header", () => {
    const explanations = [{ text: "small animals", source: "a model", scores: {} }];
    mount({ note: { label: "", text: "" }, view: { ...view(812), explanations } });
    expect(one(".saelab-heading bdi").textContent).toBe("small animals");
    model.fromPython("note", { label: ATTACK, text: "" });
    model.fromPython("results", [{ ...state().results[0]!, label: ATTACK }]);
    model.fromPython("view", { ...view(812), explanations });
    expect(one(".saelab-heading bdi").textContent).toBe(one(".saelab-result bdi").textContent);
    expect(one(".saelab-heading bdi").title).toBe(ATTACK);
  });

  it("shows a dead feature", () => {
    const dead = { ...view(0), count: 0, density: 0, max: 0, mean: 0, f_scale: 0, groups: [], promoted: [] };
    dead.histogram = { counts: Array(40).fill(0), edges: Array(41).fill(0) };
    mount({ feature: 0, view: dead });
    expect(one("h3").textContent).toBe("Feature 0");
    expect(el.textContent).toContain("fires on none of these 478,120 tokens");
    expect(el.outerHTML).not.toContain("NaN");
  });

  it("stops listening when the view ends", () => {
    mount();
    expect(model.listenerCount()).toBeGreaterThan(0);
    cleanup();
    expect(model.listenerCount()).toBe(0);
  });
});

describe("opening a feature", () => {
  it("by a click on a result, and is ready only with its view", () => {
    const root = mount();
    all(".saelab-result")[1]!.click();
    expect(model.saved).toEqual([{ feature: 17 }]);
    expect(root.dataset.ready).toBe("0");
    model.fromPython("view", view(17));
    expect(root.dataset.ready).toBe("1");
    expect(one('.saelab-result[aria-selected="true"]').dataset.feature).toBe("17");
  });

  it("by a click on a neighbour, and keeps the focus inside", () => {
    mount();
    const button = all(".saelab-neighbour")[1]!;
    button.focus();
    button.click();
    expect(model.saved).toEqual([{ feature: 405 }]);
    model.fromPython("view", view(405));
    expect(document.activeElement).toBe(one("h3"));
  });

  it("by number, previous and next", () => {
    mount();
    one('[aria-label="Next feature"]').click();
    type(one(".saelab-feature") as HTMLInputElement, "405", "change");
    expect(model.saved).toEqual([{ feature: 813 }, { feature: 405 }]);
  });

  it("refuses a number out of range and says why", () => {
    mount();
    type(one(".saelab-feature") as HTMLInputElement, "9999", "change");
    expect(model.saved).toEqual([]);
    expect(one(".saelab-error").textContent).toContain("from 0 to 4607, got “9999”");
    expect((one(".saelab-feature") as HTMLInputElement).value).toBe("812");
  });

  it("has no previous before 0 and no next after the last", () => {
    mount({ feature: 0, view: view(0) });
    expect(one('[aria-label="Previous feature"]').matches(":disabled")).toBe(true);
    model.fromPython("view", view(4607));
    expect(one('[aria-label="Next feature"]').matches(":disabled")).toBe(true);
  });

  it("follows Python", () => {
    const root = mount();
    model.fromPython("feature", 17);
    expect(root.dataset.ready).toBe("0");
    model.fromPython("view", view(17));
    expect(root.dataset.feature).toBe("17");
  });

  it("shows an error from Python", () => {
    const root = mount();
    all(".saelab-result")[1]!.click();
    model.fromPython("error", `OSError: ${ATTACK}`);
    expect(one(".saelab-error").textContent).toBe(`OSError: ${ATTACK}`);
    expect(one(".saelab-error").hidden).toBe(false);
    expect(root.dataset.ready).toBe("1");
    model.fromPython("error", "");
    expect(one(".saelab-error").hidden).toBe(true);
  });
});

describe("search and sort", () => {
  it("sends the query once, after a pause", () => {
    vi.useFakeTimers();
    mount();
    const search = one(".saelab-search") as HTMLInputElement;
    type(search, "c", "input");
    type(search, "ca", "input");
    expect(model.saved).toEqual([]);
    vi.advanceTimersByTime(300);
    expect(model.saved).toEqual([{ query: "ca" }]);
  });

  it("sends the query at once on Enter", () => {
    mount();
    const search = one(".saelab-search") as HTMLInputElement;
    type(search, "cat", "input");
    press(search, "Enter");
    expect(model.saved).toEqual([{ query: "cat" }]);
  });

  it("searches by two lists of examples, and says when Python has read them", async () => {
    mount();
    const toggle = all("button").find((b) => b.textContent === "By examples")!;
    expect(one(".saelab-examples").hidden).toBe(true);
    toggle.click();
    expect(toggle.getAttribute("aria-expanded")).toBe("true");
    expect(one(".saelab-examples").hidden).toBe(false);
    const [texts, against] = all(".saelab-examples textarea") as HTMLTextAreaElement[];
    expect(document.activeElement).toBe(texts);
    texts!.value = "a\nb";
    against!.value = "c";
    all("button").find((b) => b.textContent === "Find features")!.click();
    expect(model.sent.at(-1)).toMatchObject({ method: "find_by_examples", args: { examples: "a\nb", against: "c" } });
    expect(one(".saelab-examples small").textContent).toBe("reading…");
    model.reply("find_by_examples", true);
    await vi.waitFor(() => expect(one(".saelab-examples small").textContent).toContain("AUROC on the other half"));
  });

  it("says why a feature was found", () => {
    mount();
    model.fromPython("results", [{ feature: 405, density: 0.01, max: 2, tokens: [" red"], label: "", why: "AUROC 0.97 held out" }]);
    expect(one(".saelab-result-why").textContent).toBe("AUROC 0.97 held out");
    expect(one(".saelab-result").getAttribute("aria-label")).toContain("AUROC 0.97 held out");
  });

  it("lists what Python found and sends the order", () => {
    const root = mount();
    const sort = one("select") as HTMLSelectElement;
    sort.value = "density";
    sort.dispatchEvent(new Event("change"));
    expect(model.saved).toEqual([{ sort: "density" }]);
    model.fromPython("results", [{ feature: 405, density: 0.01, max: 2, tokens: [" red"], label: "" }]);
    expect(all(".saelab-result").map((row) => row.dataset.feature)).toEqual(["405"]);
    expect(root.dataset.ready).toBe("1");
  });
});

describe("the histogram marker", () => {
  const over = (target: Element) => target.dispatchEvent(new Event("pointerover", { bubbles: true }));

  it("follows the hovered token", async () => {
    mount();
    await painted();
    expect(marker().getAttribute("visibility")).toBe("hidden");
    over(token(" dog"));
    expect(marker().getAttribute("visibility")).toBe("visible");
    expect(marker().getAttribute("data-value")).toBe("2.05");
    expect(Number(marker().getAttribute("x1"))).toBeCloseTo((400 * 2.05) / 4, 1);
    expect(all(".saelab-bar-marked").length).toBe(1);
    expect(one(".saelab-readout").textContent).toBe("“·dog” 2.05, 51 % of max");
    over(token("The"));
    expect(marker().getAttribute("visibility")).toBe("hidden");
    expect(one(".saelab-readout").textContent).toBe("“The” silent");
  });

  it("follows the keyboard", () => {
    mount();
    token(" cat").focus();
    expect(marker().getAttribute("data-value")).toBe("4");
    press(token(" cat"), "ArrowRight");
    expect(document.activeElement).toBe(token("↵"));
    expect(marker().getAttribute("data-value")).toBe("1");
  });
});

describe("keyboard", () => {
  it("moves in the list and opens with Enter", () => {
    mount();
    const rows = all(".saelab-result");
    expect(rows.map((row) => row.tabIndex)).toEqual([0, -1, -1]);
    rows[0]!.focus();
    press(rows[0]!, "ArrowDown");
    expect(document.activeElement).toBe(rows[1]);
    press(rows[1]!, "End");
    expect(document.activeElement).toBe(rows[2]);
    expect(rows.map((row) => row.tabIndex)).toEqual([-1, -1, 0]);
    press(rows[2]!, "Enter");
    expect(model.saved).toEqual([{ feature: 405 }]);
  });

  it("moves over tokens: rows up and down, one tab stop", async () => {
    mount();
    await painted();
    expect(all('.saelab-token[tabindex="0"]')).toEqual([token(" cat")]);
    token(" cat").focus();
    press(token(" cat"), "ArrowDown");
    expect(document.activeElement).toBe(token(" dog"));
    press(token(" dog"), "Home");
    expect(document.activeElement).toBe(token("a"));
    expect(token("a").closest(".saelab-open")).not.toBeNull();
    press(token("a"), "Enter");
    expect(token("a").closest(".saelab-open")).toBeNull();
  });

  it("does not leak keys to the notebook, but lets Ctrl chords pass", () => {
    const root = mount();
    const heard: string[] = [];
    const listen = (event: KeyboardEvent) => heard.push(event.key);
    document.body.addEventListener("keydown", listen);
    for (const target of [one(".saelab-search"), all(".saelab-result")[0]!, token(" cat")]) {
      for (const key of ["a", "b", "d", "Enter"]) press(target, key);
    }
    press(root, "s", { ctrlKey: true });
    document.body.removeEventListener("keydown", listen);
    expect(heard).toEqual(["s"]);
  });
});

describe("theme", () => {
  const theme = () => one(".saelab-inspector").dataset.saelabTheme;
  const settled = () => new Promise((resolve) => setTimeout(resolve));
  beforeEach(() => document.body.removeAttribute("data-jp-theme-light"));
  afterEach(() => {
    document.body.removeAttribute("data-jp-theme-light");
    document.body.className = "";
    document.documentElement.className = "";
  });

  it("is light where nobody says", () => {
    mount();
    expect(theme()).toBe("light");
  });

  it("follows JupyterLab while it changes", async () => {
    document.body.setAttribute("data-jp-theme-light", "true");
    const root = mount();
    expect(theme()).toBe("light");
    document.body.setAttribute("data-jp-theme-light", "false");
    await settled();
    expect(theme()).toBe("dark");
    expect(root.style.colorScheme).toBe("dark");
  });

  it.each(["dark", "dark-theme"])("knows marimo's .%s", (name) => {
    document.documentElement.classList.add(name);
    mount();
    expect(theme()).toBe("dark");
  });

  it("knows VS Code", () => {
    document.body.classList.add("vscode-dark");
    mount();
    expect(theme()).toBe("dark");
  });

  it("looks out of a shadow root", async () => {
    const host = document.createElement("div");
    host.dataset.theme = "dark";
    document.body.append(host);
    const inside = host.attachShadow({ mode: "open" });
    mount();
    inside.append(el);
    document.body.classList.add("changed");
    await settled();
    expect(theme()).toBe("dark");
  });
});

describe("trying a text", () => {
  beforeEach(() => vi.useFakeTimers());
  afterEach(() => vi.useRealTimers());
  const field = () => one('[aria-label="Try a text"]') as HTMLTextAreaElement;
  const answer = async (values: (number | null)[], feature = 812) => {
    model.reply("score", { feature, tokens: ["<|endoftext|>", " dog"], values, peak: 1 });
    await vi.advanceTimersByTimeAsync(0);
  };

  it("asks after a pause, and shows tokens, the largest value and its place", async () => {
    mount();
    type(field() as never, "a", "input");
    type(field() as never, "a dog", "input");
    vi.advanceTimersByTime(300);
    expect(model.sent.map(({ method, args }) => [method, args])).toEqual([["score", { text: "a dog" }]]);
    await answer([null, 2]);
    expect(all(".saelab-strip .saelab-token").map((cell) => cell.dataset.state)).toEqual(["excluded", "active"]);
    expect(one(".saelab-trial small").textContent).toBe("largest 2.00, 50 % of the maximum on the store");
    expect(one(".saelab-pinned").getAttribute("x1")).toBe("200.00");
  });

  it("cancels what is no longer wanted", () => {
    mount();
    type(field() as never, "a", "input");
    vi.advanceTimersByTime(300);
    type(field() as never, "ab", "input");
    vi.advanceTimersByTime(300);
    const [first, cancel, second] = model.sent;
    expect(cancel).toEqual({ cancel: first!.call });
    expect(second!.args).toEqual({ text: "ab" });
  });

  it("keeps the text and scores it again when another feature opens", async () => {
    mount();
    type(field() as never, "a dog", "input");
    vi.advanceTimersByTime(300);
    await answer([null, 2]);
    model.fromPython("view", view(17));
    vi.advanceTimersByTime(300);
    expect(field().value).toBe("a dog");
    expect(model.sent.filter((m) => m.method === "score").length).toBe(2);
  });

  it("shows a refusal", async () => {
    mount();
    type(field() as never, "x", "input");
    vi.advanceTimersByTime(300);
    model.reply("score", `too long ${ATTACK}`, "error");
    await vi.advanceTimersByTimeAsync(0);
    expect(one(".saelab-error").textContent).toBe(`too long ${ATTACK}`);
  });
});

describe("notes", () => {
  it("are written when typed, and not overwritten while typing", () => {
    vi.useFakeTimers();
    mount();
    const label = one(".saelab-note-label") as HTMLInputElement;
    expect(label.value).toBe("pets");
    type(label, ATTACK, "input");
    model.fromPython("note", { label: "from Python", text: "" });
    expect(label.value).toBe(ATTACK);
    vi.advanceTimersByTime(700);
    expect(model.sent[0]).toMatchObject({ method: "write_note", args: { feature: 812, label: ATTACK, text: "" } });
  });

  it("follow Python field by field, and say what was shown while typing", async () => {
    vi.useFakeTimers({ now: 5_000 });
    mount();
    const label = one(".saelab-note-label") as HTMLInputElement;
    const text = one(".saelab-note textarea") as HTMLTextAreaElement;
    type(label, "cats", "input");
    model.fromPython("note", { label: "from Python", text: "and this" });
    expect([label.value, text.value]).toEqual(["cats", "and this"]);
    vi.advanceTimersByTime(700);
    expect(model.sent[0]).toMatchObject({
      method: "write_note",
      args: { label: "cats", text: "and this", was: { label: "pets", text: "and this" }, typed: { label: 5 } },
    });
    model.reply("write_note", { label: "from Python", text: "and this" });
    await vi.advanceTimersByTimeAsync(0);
    expect(label.value).toBe("from Python");
    expect(one(".saelab-note small").textContent).toContain("you had typed “cats”");
    type(label, "dogs", "input");
    vi.advanceTimersByTime(700);
    expect(model.sent[1]!.args).toMatchObject({ label: "dogs", was: { label: "from Python" } });
    model.reply("write_note", { label: "dogs", text: "and this" });
    await vi.advanceTimersByTimeAsync(0);
    expect(one(".saelab-note small").textContent).toBe("saved");
  });

  it("send nothing where nothing differs from what Python has", () => {
    vi.useFakeTimers();
    mount();
    const label = one(".saelab-note-label") as HTMLInputElement;
    type(label, "cats", "input");
    type(label, "pets", "input");
    vi.advanceTimersByTime(700);
    expect(model.sent).toEqual([]);
  });

  it("are saved before another feature opens, and when the view goes", () => {
    vi.useFakeTimers();
    mount();
    type(one(".saelab-note-label") as HTMLInputElement, "cats", "input");
    model.fromPython("view", view(17));
    expect(model.sent[0]).toMatchObject({ args: { feature: 812, label: "cats" } });
    type(one(".saelab-note-label") as HTMLInputElement, "colours", "input");
    cleanup();
    expect(model.sent.some((m) => m.args?.["label"] === "colours")).toBe(true);
  });
});

describe("comparing and editing", () => {
  it("pins, shows the pair and unpins", () => {
    mount();
    const button = (name: string) => all(".saelab-actions button").find((b) => b.textContent === name)!;
    button("Pin").click();
    expect(model.saved).toEqual([{ pinned: 812 }]);
    model.fromPython("pair", {
      features: [17, 812], cosine: 0.25, both: 12, only: [3, 4], jaccard: 0.5, view: view(812), tokens: [" x"], tokens_here: ["y"],
    });
    expect(one(".saelab-compare small").textContent).toContain("cosine 0.25 · both fire on 12 tokens");
    model.fromPython("view", view(812));
    expect(button("Unpin").getAttribute("aria-pressed")).toBe("true");
  });

  it("puts edits on the stack", () => {
    mount();
    all(".saelab-actions button")[1]!.click();
    expect(model.sent[0]).toMatchObject({ method: "add_edit", args: { kind: "ablate" } });
  });
});

describe("contexts", () => {
  it("show as lines, snippets or whole, and the weakest on demand", async () => {
    mount();
    const mode = one('[aria-label="How contexts are shown"]') as HTMLSelectElement;
    mode.value = "snippet";
    mode.dispatchEvent(new Event("change"));
    expect(one(".saelab-contexts").dataset.mode).toBe("snippet");
    all("button").find((b) => b.textContent === "Show the weakest too")!.click();
    model.reply("weakest", [{ tokens: [" mouse"], values: [0.01], peak: 0, document: 1, position: 2 }]);
    await Promise.resolve();
    await Promise.resolve();
    expect(all(".saelab-group-label").at(-1)!.textContent).toContain("bottom");
    model.fromPython("view", view(17));
    expect(one(".saelab-contexts").dataset.mode).toBe("snippet");
  });

  it("copy as text", () => {
    mount();
    const selection = document.getSelection()!;
    selection.selectAllChildren(one(".saelab-context-text"));
    const data = new Map<string, string>();
    const event = Object.assign(new Event("copy", { bubbles: true }), {
      clipboardData: { setData: (kind: string, text: string) => data.set(kind, text) },
    });
    token(" cat").dispatchEvent(event);
    selection.removeAllRanges();
    expect(data.get("text/plain")).toBe(`<|endoftext|>The cat\n${ATTACK}`);
  });
});

describe("the kernel", () => {
  it("says when it is gone and leaves no dead control", () => {
    const root = mount();
    model.fire("comm_live_update");
    expect(root.dataset.connection).toBe("lost");
    expect(one(".saelab-lost").hidden).toBe(false);
    expect(all("[data-needs]").every((part) => part.inert)).toBe(true);
    expect(one(".saelab-contexts").closest("[inert]")).toBeNull(); // reading goes on
  });

  it("gives code to copy", async () => {
    mount();
    one(".saelab-code-button").click();
    model.reply("copy_code", `print("${ATTACK}")`);
    await vi.waitFor(() => expect(one(".saelab-code pre").textContent).toBe(`print("${ATTACK}")`));
  });
});

describe("a page without a kernel", () => {
  it("opens, finds and sorts what it holds", () => {
    el = document.createElement("div");
    document.body.append(el);
    const rows = state().results.map((row) => ({ ...row, norm: row.max }));
    const kept = Object.fromEntries([812, 17].map((i) => [i, { view: view(i), note: { label: "", text: "" } }]));
    freeze(el, { ...state(), results: rows, kept, live: false });
    cleanup = () => undefined;
    all(".saelab-result")[1]!.click();
    expect(one(".saelab-inspector").dataset.feature).toBe("17");
    const sort = one('[aria-label="Sort features by"]') as HTMLSelectElement;
    sort.value = "max";
    sort.dispatchEvent(new Event("change"));
    expect(all(".saelab-result").map((row) => row.dataset.feature)).toEqual(["17", "812", "405"]);
    const search = one(".saelab-search") as HTMLInputElement;
    type(search, "pets", "input");
    press(search, "Enter");
    expect(all(".saelab-result").map((row) => row.dataset.feature)).toEqual(["812"]);
    type(one(".saelab-feature") as HTMLInputElement, "99", "change");
    expect(one(".saelab-error").textContent).toContain("not kept in this page");
  });
});
