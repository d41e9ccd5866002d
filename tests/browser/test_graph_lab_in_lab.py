"""GraphLab as a user has it: nodes and edges under the pointer and the keys, pins, groups, sliders, tests, steering,
files, a saved notebook; and what panning costs with 500 nodes and 5,000 edges."""

import json
import pathlib
import statistics
from collections import Counter

import pytest
from playwright.sync_api import Page, expect

from sae_lab.circuits import AttributionGraph

from .lab import DARK, LIGHT, chromium, exported, open_notebook, screenshots, watch, write_notebook

REPOSITORY = pathlib.Path(__file__).parents[2]
TINY = (pathlib.Path(__file__).parent / "tiny_graph.py").read_text(encoding="utf-8")
LAB = """session = sl.Session()
tokens = sl.TokenFeatures(lm, coders[2], prompt, session=session)
lab = sl.GraphLab(graph, session=session)
lab"""
# Whether anything is drawn on the canvases of edges and nodes.
INK = """(stage) => [...stage.querySelectorAll('canvas')].slice(0, 2).map((canvas) => {
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width || 1, canvas.height || 1);
    return data.some((value) => value > 0);
})"""
# 500 nodes and 5,000 edges, made by numbers: 30 layers of 15 features each, 12 errors, 32 tokens, 6 outputs.
LARGE = """import torch
from sae_lab.circuits import AttributionGraph
generator = torch.Generator().manual_seed(0)
layers, tokens, outputs = 30, 32, 6
features = [(l, int(p), int(f)) for l in range(layers) for p, f in zip(
    sorted(torch.randint(1, tokens, (15,), generator=generator).tolist()), range(15))]
errors = [(l, tokens - 1, -1) for l in range(12)]
places = features + errors + [(-1, p, p) for p in range(tokens)] + [(layers, tokens - 1, i) for i in range(outputs)]
counts = (len(features), len(errors), tokens, outputs)
at = torch.tensor(places)
rows = torch.cat([at[: counts[0]], at[-outputs:]])
columns = at[: sum(counts[:3])]
allowed = (columns[None, :, 0] < rows[:, None, 0]) & (columns[None, :, 1] <= rows[:, None, 1])
weights = torch.randn(allowed.shape, generator=generator) * allowed
sizes = weights.abs()  # each node keeps its largest edge in and out: pruning then leaves all of them
first = (sizes == sizes.max(0).values) | (sizes == sizes.max(1, keepdim=True).values)
ranks = sizes + 100 * (first & allowed)
kept = ranks >= ranks.flatten().topk(5000).values[-1]
effects, n = weights * kept, len(places)
nan = torch.full((len(rows),), float("nan"))
big = AttributionGraph(
    effects=effects, places=at, counts=counts, values=torch.ones(n), pre=nan, bias=nan, rest=nan, rest_size=nan,
    weights=torch.full((outputs,), 1 / outputs), directions=torch.zeros(outputs, 4),
    influence=torch.full((n,), float("nan")), share=torch.ones(n),
    tokens=[f" w{i}" for i in range(tokens)], outputs=[f" o{i}" for i in range(outputs)],
    facts={"model": "none", "n_layers": layers}, active=counts[0], visited=1.0, left_out=0.0, replacement=0.0,
    completeness=0.0, completeness_inner=0.0,
)
import sae_lab as sl
lab = sl.GraphLab(big)
lab.nodes = lab.edges = 1.0
print(len(big.nodes), int(effects.count_nonzero()))
lab"""  # fmt: skip
# What the page's own thread does by scripts, for styles and for layout.
SCRIPT = {"FunctionCall", "EventDispatch", "FireAnimationFrame", "TimerFire", "RunMicrotasks"}
WORK = {*SCRIPT, "UpdateLayoutTree", "Layout"}
MOST_MS = 8.0  # half of a frame at 60 a second: the other half is the browser's, for painting


@pytest.mark.browser
def test_a_graph_is_read_tested_and_kept(tmp_path: pathlib.Path) -> None:
    path = write_notebook(tmp_path / "graph.ipynb", [TINY, LAB])
    env = {"PYTHONPATH": str(REPOSITORY), "SAE_LAB_DATA": str(tmp_path / "data")}
    folder = screenshots(tmp_path)
    with open_notebook(path, env=env) as notebook:
        notebook.run_all(timeout=300)
        lab = notebook.ready(".saelab-graph_lab")
        stage, side = lab.get_by_role("application"), lab.get_by_role("region", name="What is open")
        said = lab.locator(".saelab-graph_lab-said")

        # Keys: from the node with most influence, and Enter opens.
        stage.scroll_into_view_if_needed()
        stage.press("ArrowUp")
        expect(said).to_contain_text("influence")
        stage.press("Enter")
        expect(side.get_by_role("button", name="Pin", exact=True)).to_be_visible()
        number = notebook.python("print(lab.node)")

        # The pointer: the opened node's row in the list is another's.
        row = lab.get_by_role("listbox").get_by_role("option").filter(has_text="feature").first
        row.click()
        opened = notebook.python("print(lab.node)")
        node, chosen = "lab.graph.nodes[lab.node]", "session.selection"
        same = f"{node}.feature == {chosen}.feature and {node}.site.layer == sl.Site.of({chosen}.site).layer"
        assert notebook.python(f"print({same})") == "True"
        assert notebook.python("print(session.selection.prompt == prompt)") == "True"
        stage.press("p")
        expect(lab.get_by_role("button", name="Pinned (1)")).to_be_visible()
        assert notebook.python("print(lab.pinned)") == f"[{opened}]"
        label = side.get_by_role("textbox", name="Label")
        label.fill("<b>bridges</b>")
        label.press("Enter")
        expect(side.get_by_role("heading").first).to_contain_text("<b>bridges</b>")
        assert notebook.python(f"print(sl.notes(coders[{node}.site.layer])[{node}.feature].label)") == "<b>bridges</b>"

        # Sliders prune: what is shown is what Python prunes.
        edges = lab.get_by_role("slider").nth(1)
        edges.fill("0.6")
        nodes = notebook.page.wait_for_function(
            "() => document.querySelector('.saelab-graph_lab-count').textContent.match(/^(\\d+) of/)[1]"
        ).json_value()
        notebook.page.wait_for_timeout(500)
        shown = "len(lab.part.nodes), int(lab.part.effects.count_nonzero())"
        assert notebook.python("print(lab.edges, len(lab.part.nodes))") == f"0.6 {nodes}"
        counts = lab.locator(".saelab-graph_lab-count").inner_text()
        n, m = notebook.python(f"print(*({shown}))").split()
        assert counts.startswith(f"{n} of ") and f" {int(m):,} of " in counts
        edges.fill("1")

        # A test of an edge, beside what it predicts; and of a node.
        side.get_by_role("button", name="The edge to").first.click()
        expect(side.get_by_role("heading").first).to_contain_text("Edge that")
        side.get_by_role("button", name="Test").click()
        tests = lab.get_by_role("region", name="Tests")
        expect(tests).to_contain_text("predicted and measured agree")
        assert notebook.python("print(len(lab.tests), lab.tests[0]['error'] < 1e-3)") == "1 True"

        # A group of two, tested together.
        options = lab.get_by_role("listbox").get_by_role("option").filter(has_text="layer")
        for i in (1, 2):
            options.nth(i).click()
            stage.press("s")
        lab.get_by_role("textbox", name="Name of the group").fill("two")
        lab.get_by_role("button", name="Group 2 selected").click()
        expect(lab.get_by_role("button", name="Dissolve the group two")).to_be_visible()
        assert notebook.python("print([(g['name'], len(g['nodes'])) for g in lab.groups])") == "[('two', 2)]"
        lab.get_by_role("region", name="Pinned and groups").get_by_role("button", name="Test").first.click()
        expect(tests.locator("summary").first).to_contain_text("two")

        # Steering: both texts, and the edit on the stack.
        options.filter(has_text="feature").first.click()
        side.get_by_role("button", name="Steer", exact=True).click()
        expect(lab.get_by_role("region", name="Steered")).to_contain_text("sl.Steer(coder, ", timeout=60_000)
        side.get_by_role("button", name="Add to edits").click()
        assert notebook.python("print(len(session.edits))") == "1"

        # In both themes, wide and narrow.
        for theme, name in ((LIGHT, "light"), (DARK, "dark")):
            notebook.set_theme(theme)
            expect(lab).to_have_attribute("data-saelab-theme", name)
            notebook.page.wait_for_timeout(300)
            assert stage.evaluate(INK) == [True, True]
            for view in ("Pinned", "Graph"):
                lab.get_by_role("group", name="View").get_by_role("button", name=view).click()
                assert notebook.accessibility_faults(".saelab-graph_lab") == []
                notebook.screenshot(lab, folder / f"graph_lab_{view.lower()}_{name}.png")
        before = notebook.page.viewport_size or {"width": 1280, "height": 1000}
        notebook.page.set_viewport_size({"width": 700, "height": before["height"]})
        notebook.page.wait_for_timeout(300)
        assert lab.evaluate("(root) => root.scrollWidth <= root.clientWidth"), "nothing stands out of a narrow page"
        notebook.screenshot(lab, folder / "graph_lab_narrow.png")
        notebook.page.set_viewport_size(before)
        notebook.set_theme(LIGHT)

        # Files.
        page, data, drawn, other, code = (
            exported(notebook.page, lab, what, folder) for what in ("Page", "Data", "SVG", "Neuronpedia", "Code")
        )
        assert json.loads(data.read_text(encoding="utf-8"))["groups"][0]["name"] == "two"
        assert drawn.read_text(encoding="utf-8").count("<line") > 5
        assert AttributionGraph.from_json(other).tokens and "graph.check(" in code.read_text(encoding="utf-8")
        assert json.loads(other.read_text(encoding="utf-8"))["qParams"]["supernodes"][0][0] == "two"
        notebook.page.wait_for_timeout(1500)  # until the kept form is renewed
        notebook.page.keyboard.press("Control+s")
        notebook.page.wait_for_function(
            "() => !window.jupyterapp.shell.currentWidget.context.model.dirty", timeout=10_000
        )
        assert number and notebook.problems == []

    outputs = json.loads(path.read_text(encoding="utf-8"))["cells"][1]["outputs"]
    form = "".join(outputs[-1]["data"]["text/html"])
    assert "Attribution graph" in form and "two" in form and "Taken out: " in form and "&lt;b&gt;bridges" in form
    with chromium() as alone:
        problems = watch(alone)
        alone.goto(f"file://{page}")
        lab = alone.locator(".saelab-graph_lab[data-ready='1']")
        expect(lab).to_contain_text("Pinned (")
        expect(lab.get_by_role("button", name="Test")).to_have_count(0)
        lab.get_by_role("slider").first.fill("0.5")
        assert problems == []


@pytest.mark.browser
def test_panning_a_large_graph(tmp_path: pathlib.Path) -> None:
    """Script, style and layout of a frame take at most 8 ms of the page's thread (its own time: other programs on this
    machine do not count) for 95 of 100 frames, at the first zoom and at a larger one."""
    path = write_notebook(tmp_path / "large.ipynb", [LARGE])
    with open_notebook(path, env={"PYTHONPATH": str(REPOSITORY)}) as notebook:
        notebook.run_all(timeout=300)
        lab = notebook.ready(".saelab-graph_lab")
        assert lab.locator(".saelab-graph_lab-count").inner_text().startswith("500 of 500 nodes, 5,000 of 5,000 edges")
        stage = lab.get_by_role("application")
        stage.scroll_into_view_if_needed()
        for larger in (0, 3):
            for _ in range(larger):
                stage.press("+")
            times = frames_of_a_drag(notebook.page, stage.bounding_box())
            middle, most = statistics.median(times), sorted(times)[int(0.95 * len(times))]
            print(f"zoom {stage.get_attribute('data-zoom') or 1}: {len(times)} frames, median {middle:.2f} ms, "
                  f"95 % below {most:.2f} ms")  # fmt: skip
            assert len(times) > 20 and most <= MOST_MS


def frames_of_a_drag(page: Page, box: dict[str, float] | None) -> list[float]:
    """Milliseconds of work (``WORK``) of the page's thread in each frame of a drag, by Chromium's trace."""
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    browser = page.context.browser
    assert browser is not None
    browser.start_tracing(page=page, categories=["devtools.timeline", "disabled-by-default-devtools.timeline"])
    for i in range(60):
        page.mouse.move(x + 5 * (i % 30), y + 2 * (i % 20))
        page.wait_for_timeout(20)
    events = json.loads(browser.stop_tracing())["traceEvents"]
    page.mouse.up()
    mine = [event for event in events if event.get("ph") == "X" and event["name"] in WORK]
    thread = Counter((e["pid"], e["tid"]) for e in mine if e["name"] == "FireAnimationFrame").most_common(1)[0][0]
    found, sum_, end = [], 0.0, -1.0
    for event in sorted((e for e in mine if (e["pid"], e["tid"]) == thread), key=lambda e: e["ts"]):
        if event["ts"] < end:  # inside of another, whose time has it
            continue
        end = event["ts"] + event.get("dur", 0)
        sum_ += event.get("tdur", event.get("dur", 0)) / 1000
        if event["name"] == "FireAnimationFrame":
            found.append(sum_)
            sum_ = 0.0
    return found
