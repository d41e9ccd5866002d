"""The folder that ``index.to_site`` writes, opened from disk in a real Chromium that can reach no other host."""

import shutil

import pytest
from playwright.sync_api import expect

import sae_lab as sl
from sae_lab.widgets import site
from tests.browser.lab import accessibility_faults, chromium, screenshots, watch

ATTACK = "</script><img src=http://evil.test/x onerror=alert(1)>\u2028'\"`${1}"
RIGHT_TO_LEFT = "\u05e9\u05dc\u05d5\u05dd \u202eevil"


@pytest.fixture(scope="module")
def index(make_tiny, small_text, tmp_path_factory):
    """A tiny coder's, whose text and labels try to be more than text."""
    folder = tmp_path_factory.mktemp("site")
    lm = make_tiny("llama")
    text = sl.load_text([f"{ATTACK} {document}" for document in small_text[:5]])
    store = sl.harvest(lm, sl.Site("resid_post", 1), text, 700, context=48, path=folder / "store")
    coder = sl.TopK(48, 120, k=4).eval()
    coder.reads = coder.writes = (sl.Site("resid_post", 1),)
    return sl.index_features(coder, lm, store, path=folder / "index")


@pytest.fixture
def folder(index, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "SIZE", 50)  # three files
    live = index.order("best")
    index.annotate(int(live[0]), ATTACK, f"{RIGHT_TO_LEFT} 👩‍🚀 " + "long " * 2_000)
    index.annotate(int(live[1]), "x" * 10_000)
    index.annotate(int(live[2]), RIGHT_TO_LEFT)
    return index.to_site(tmp_path / "site").parent


@pytest.mark.browser
def test_from_disk(index, folder, tmp_path):
    best = index.order("best").tolist()
    pictures = screenshots(tmp_path)
    with chromium((1400, 1000)) as page:
        problems = watch(page)
        page.goto(f"file://{folder}/index.html")
        panel, rows = page.locator(".saelab-inspector"), page.locator(".saelab-result")
        expect(panel).to_have_attribute("data-feature", str(best[0]))
        expect(panel).to_have_attribute("data-ready", "1")
        # Text is text: neither elements nor a turned direction of reading come of it.
        assert page.locator("img, main script, main a").count() == 0
        expect(panel.locator(".saelab-heading .saelab-name")).to_contain_text("</script><img")
        expect(panel).to_contain_text("U+202Eevil")
        widest = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert widest == 0, "a label of 10,000 characters does not widen the page"

        # Each feature has an address; another file is loaded when one of its features is opened.
        for feature in (3, 60, 119):
            page.evaluate(f"location.hash = '{feature}'")
            expect(panel.locator("h3")).to_have_text(f"Feature {feature}")
        page.go_back()
        expect(panel.locator("h3")).to_have_text("Feature 60")
        page.goto(f"file://{folder}/index.html#999")
        expect(panel.get_by_role("alert")).to_contain_text("no feature “999” here")

        # All live features can be reached in the list, by the pointer and by keys.
        for _ in range(12):
            rows.last.focus()
            if rows.count() == len(best):
                break
            page.wait_for_timeout(50)
        assert [int(i or "") for i in rows.evaluate_all("all => all.map(r => r.dataset.feature)")] == best
        rows.first.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        expect(panel).to_have_attribute("data-feature", str(best[1]))
        assert page.url.endswith(f"#{best[1]}")

        # Search: words in tokens and labels, conditions, labels alone; a condition that is none is said.
        page.locator("h1").click()
        page.keyboard.press("/")
        search = page.get_by_role("searchbox")
        expect(search).to_be_focused()
        limit = float(sorted(index.density[best])[len(best) // 2])
        dense = {int(i) for i in best if index.density[i] > limit * 1.001}
        for line, expected in (
            (f"density>{limit * 1.001}", dense), ("label:evil.test", {best[0]}), ("x" * 50, {best[1]}),
        ):  # fmt: skip
            search.fill(line)
            expect(page.locator(".saelab-results-note")).to_contain_text(f"{len(expected)} for “{line[:20]}")
            found = rows.evaluate_all("all => all.map(r => Number(r.dataset.feature))")
            assert set(found) <= expected and len(found) == min(len(expected), 100)
        search.fill("density>much")
        expect(panel.get_by_role("alert")).to_contain_text("density is compared with a number, got “much”")
        search.fill("")
        page.get_by_label("Sort features by").select_option("density")
        expect(rows.first).to_have_attribute("data-feature", str(index.order("density")[0]))
        assert accessibility_faults(page, "body") == []

        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            expect(panel).to_have_attribute("data-saelab-theme", scheme)
            for width in (1400, 700):
                page.set_viewport_size({"width": width, "height": 1000})
                page.screenshot(path=pictures / f"site_{scheme}_{width}.png")
                assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert accessibility_faults(page, "body") == []
        # axe itself asks for the style sheet, which the policy forbids.
        assert [problem for problem in problems if "connect-src" not in problem] == []

        # The page's own policy forbids another host, also to a script that is already in it.
        blocked = page.evaluate(
            """() => new Promise((done) => {
                document.addEventListener("securitypolicyviolation", (e) => done(e.blockedURI), { once: true });
                document.body.append(Object.assign(new Image(), { src: "https://127.0.0.1:9/x.png" }));
            })"""
        )
        assert blocked.startswith("https://127.0.0.1:9")

        # A file that was left behind is named, and what is shown stays.
        (folder / "features-50.js").unlink()
        page.goto("about:blank")
        page.goto(f"file://{folder}/index.html#1")
        page.evaluate("location.hash = '60'")
        expect(panel.get_by_role("alert")).to_contain_text("features-50.js is not beside this page")
        expect(panel.locator("h3")).to_have_text("Feature 1")
        shutil.rmtree(folder)
