"""Hostile strings in pages that a real browser opens: nothing of them runs."""

import random
from functools import partial

import pytest
from batteries import scripts
from playwright.sync_api import expect

from .lab import chromium


@pytest.mark.browser
def test_nothing_that_data_brings_runs(tmp_path):
    for _name, shown in scripts.surfaces(partial(scripts.hostile, random.Random(1)), tmp_path):
        shown()
    (tmp_path / "control.html").write_text("<img src=x onerror=window.ran=1>")
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) == 7
    ran = {}
    with chromium() as page:
        for file in pages:
            page.goto(f"file://{file}")
            if file.stem == "attention":
                expect(page.locator("canvas, img, svg").first).to_be_visible(timeout=20_000)
            elif file.stem != "control":
                expect(page.locator(".saelab[data-ready='1']")).to_be_visible(timeout=20_000)
            page.wait_for_timeout(300)
            ran[file.stem] = page.evaluate("window.ran === 1")
    assert ran.pop("control")  # a page in which it does run
    assert not any(ran.values()), ran
