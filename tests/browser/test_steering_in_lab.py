"""SteeringSliders as a user has them: in JupyterLab, over a tiny random model."""

import pathlib
import time

import pytest
from playwright.sync_api import Locator, expect

from .lab import DARK, LIGHT, Notebook, open_notebook, screenshots, watch, write_notebook

REPOSITORY = pathlib.Path(__file__).parents[2]

MODEL = """
import torch, transformers
import sae_lab as sl
from sae_lab.lm import bundled
torch.manual_seed(0)
torch.set_num_threads(1)
tokenizer = transformers.AutoTokenizer.from_pretrained(bundled.folder())
module = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None))
with torch.no_grad():
    for p in module.parameters():
        p.normal_(0, 1.0 if p.shape[0] == len(tokenizer) else 48**-0.5) if p.dim() > 1 else None
lm = sl.LM(module, tokenizer=tokenizer)
site = sl.Site("resid_post", 1)
x = lm.read("The ship went down the river to the sea, and a red fox crossed the white field", site)[site][0, 1:]
sae = sl.TopK(48, 64, k=6)
with torch.no_grad():
    sae.b_dec.copy_(x.mean(0))
sae.calibrate([x])
sae.reads = sae.writes = (site,)
live = sae.f_scale.nonzero().flatten().tolist()
"""
CELLS = [
    MODEL,
    "session = sl.Session()\n"
    "widget = sl.SteeringSliders(lm, sae, {live[0]: 2.0}, 'The ship went', session=session, max_new_tokens=12)\nwidget",
]

# When the first piece of the steered text is drawn after a slider has moved, in milliseconds.
WATCH = """(root) => {
    const column = root.querySelector('[aria-label="Steered"]');
    window.__first = new Promise((resolve) => {
        let start = null;
        root.querySelector('input[type=range]').addEventListener('input', () => { start ??= performance.now(); });
        new MutationObserver((_, observer) => {
            if (start === null || column.querySelector('.saelab-live').hidden) return;
            observer.disconnect();
            resolve(performance.now() - start);
        }).observe(column, { childList: true, subtree: true, attributes: true, characterData: true });
    });
}"""

OWN_TIME = """
import time
def first_token():
    start = time.perf_counter()
    stream = lm.stream(widget.prompt, list(session.edits), max_new_tokens=12)
    next(stream)
    stream.close()
    return time.perf_counter() - start
print(sorted(first_token() for _ in range(5))[2])
"""


def same_as_generate(notebook: Notebook) -> bool:
    code = (
        "want = lm.generate(widget.prompt, edits=session.edits, max_new_tokens=widget.max_new_tokens, "
        "temperature=widget.temperature, seed=widget.seed)\n"
        "print(widget.shown == widget.version, widget.steered == want)"
    )
    return notebook.python(code) == "True True"


def settled(notebook: Notebook, sliders: Locator) -> None:
    """Texts and comparison belong to what the controls say, in the kernel and on screen."""
    end = time.monotonic() + 20
    while notebook.python("print(widget.shown == widget.version)") != "True":
        assert time.monotonic() < end, notebook.python("print(widget.shown, widget.version, widget.error)")
    expect(sliders).to_have_attribute("data-ready", "1", timeout=10_000)


@pytest.mark.browser
def test_steering_in_jupyterlab(tmp_path: pathlib.Path) -> None:
    path = write_notebook(tmp_path / "steering.ipynb", CELLS)
    with open_notebook(path, env={"PYTHONPATH": str(REPOSITORY)}) as notebook:
        page = notebook.page
        notebook.run_all()
        sliders = notebook.ready(".saelab-steering")
        steered = sliders.get_by_role("region", name="Steered", exact=True)
        assert same_as_generate(notebook)
        feature = notebook.python("print(live[0])")
        span = sliders.get_by_label(f"Strength of feature {feature}", exact=True)

        # A slider moved by keyboard; the time until its first token is drawn, over the model's own.
        own = float(notebook.python(OWN_TIME))
        sliders.evaluate(WATCH)
        cells = page.locator(".jp-Cell").count()
        span.focus()
        page.keyboard.press("ArrowRight")
        first = page.evaluate("window.__first") / 1000
        print(f"slider to first streamed token {first:.3f} s, of which the model {own:.3f} s")
        assert first - own < 1.0
        page.keyboard.press("a")  # the notebook must not hear it
        expect(span).to_have_value("2.25")
        settled(notebook, sliders)
        assert page.locator(".jp-Cell").count() == cells
        assert notebook.python("print([e.strength for e in session.edits])") == "[2.25]"
        assert same_as_generate(notebook)

        # Dragged with the pointer to its right end.
        box = span.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
        page.mouse.down()
        for share in (0.8, 0.9, 1.0):
            page.mouse.move(box["x"] + box["width"] * share - 2, box["y"] + box["height"] / 2)
        page.mouse.up()
        expect(span).to_have_value("4")
        page.wait_for_timeout(400)  # the pause behind the last move
        settled(notebook, sliders)
        assert same_as_generate(notebook) and notebook.python("print(widget.sliders[0]['strength'])") == "4.0"
        expect(steered.locator("[data-mark=new]").first).to_be_visible()

        # From the kernel: another widget's edit, a selected feature, sampling.
        notebook.python(
            "session.edits.add(sl.Ablate(sae, live[1])); session.selection.pick(feature=live[2], site=site.key)"
        )
        expect(sliders.get_by_role("region", name="Other edits")).to_contain_text("sl.Ablate")
        notebook.python("widget.temperature, widget.seed = 0.8, 5")
        sliders.get_by_role("button", name="Add selected").click()
        expect(sliders.locator(".saelab-sliders > li")).to_have_count(2)
        settled(notebook, sliders)
        assert same_as_generate(notebook) and notebook.python("print(len(session.edits))") == "3"

        # Refused: a feature that never fires, an empty prompt; then text with markup in it.
        dead = notebook.python("print(int((sae.f_scale == 0).nonzero()[0]))")
        sliders.get_by_label("Feature to add").fill(dead)
        sliders.get_by_label("Feature to add").press("Enter")
        expect(sliders.get_by_role("alert")).to_contain_text(f"feature {dead} never fired")
        prompt = sliders.get_by_label("Prompt")
        prompt.fill("")
        expect(sliders.get_by_role("alert")).to_contain_text("the prompt is empty")
        prompt.fill("A <b>red</b> fox")
        prompt.press("Shift+Enter")
        expect(steered).to_contain_text("<b>red</b>")
        settled(notebook, sliders)
        expect(sliders.get_by_role("alert")).to_be_hidden()
        assert same_as_generate(notebook) and notebook.python("print(session.selection.prompt)") == "A <b>red</b> fox"

        # Stop ends a long generation, and what came stays.
        notebook.python("widget.max_new_tokens = 400")
        expect(sliders.get_by_role("button", name="Stop", exact=True)).to_be_visible()
        expect(steered).to_contain_text("tokens…")
        sliders.get_by_role("button", name="Stop", exact=True).click()
        expect(sliders.get_by_role("button", name="Run", exact=True)).to_be_visible(timeout=5_000)
        assert notebook.python("print(widget.shown == widget.version, widget.running)") == "False False"
        notebook.python("widget.max_new_tokens = 14; widget.temperature = 0")
        settled(notebook, sliders)

        # The comparison by keyboard; the dose response; a preset.
        sliders.get_by_label("Value of each token").select_option(index=4)
        strip = sliders.get_by_role("listbox", name="Steered text, token by token")
        strip.locator("[tabindex='0']").focus()
        page.keyboard.press("End")
        expect(sliders.locator(".saelab-comparison .saelab-readout")).to_contain_text("change of log-probability")
        sliders.get_by_label("Target tokens").fill(" the")  # no index is open that would name some
        sliders.get_by_label("Target tokens").press("Enter")
        sliders.get_by_role("button", name="Dose response").click()
        expect(sliders.get_by_role("img", name="Cost")).to_be_visible(timeout=30_000)
        expect(sliders.get_by_role("button", name="Dose response")).to_be_visible(timeout=30_000)
        sliders.get_by_label("Preset file").fill("war")
        sliders.get_by_role("button", name="Save preset").click()
        expect(sliders).to_contain_text("saved as war.json")
        assert notebook.python("import os; print(os.path.exists('war.json'))") == "True"

        # A chat: a box for each message, which stay messages; the template's tokens are shown as what they are.
        notebook.python(
            "widget.prompt = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Where?'}]"
        )
        expect(sliders.get_by_label("Message of system")).to_have_value("Be brief.")
        sliders.get_by_label("Message of user").fill("A <b>red</b> fox")
        sliders.get_by_label("Message of user").press("Shift+Enter")
        expect(steered.locator("[data-role='user']").first).to_be_visible()
        settled(notebook, sliders)
        assert same_as_generate(notebook)
        assert notebook.python("print(widget.prompt[1])") == "{'role': 'user', 'content': 'A <b>red</b> fox'}"
        expect(steered.locator("[data-role='template']").first).to_have_text("<|im_start|>")
        expect(steered).to_contain_text("A <b>red</b> fox<|im_end|>")

        folder = screenshots(tmp_path)
        for theme, name in [(LIGHT, "light"), (DARK, "dark")]:
            notebook.set_theme(theme)
            expect(sliders).to_have_attribute("data-saelab-theme", name)
            assert notebook.accessibility_faults(".saelab-steering") == []
            notebook.screenshot(sliders, folder / f"steering_{name}.png")

        # As a file without a kernel: texts, strips and their values are there, what asks Python is not.
        notebook.python("widget.to_html('page.html')")
        browser = page.context.browser
        assert browser is not None
        alone = browser.new_page()
        problems = watch(alone)
        alone.goto((tmp_path / "page.html").as_uri())
        frozen = alone.locator(".saelab-steering[data-ready='1']")
        expect(frozen.get_by_role("button", name="Run")).to_be_hidden()
        expect(frozen.get_by_role("region", name="Steered", exact=True)).to_contain_text("<b>red</b>")
        expect(frozen.locator(".saelab-amount").first).to_be_visible()
        frozen.locator(".saelab-comparison [data-position='3']").hover()
        expect(frozen.locator(".saelab-comparison .saelab-readout")).to_contain_text("KL")
        frozen.get_by_label("Value of each token").select_option(index=1)
        frozen.screenshot(path=folder / "steering_page.png")
        assert problems == []
        alone.close()

        # The output goes away while it generates.
        notebook.python("widget.max_new_tokens = 400")
        expect(steered).to_contain_text("tokens…")
        notebook.python("widget.close()")
        expect(sliders).to_have_count(0)
        assert notebook.python("print(len(lm.generate('The ship', max_new_tokens=3)) > 8)") == "True"
        assert notebook.errors() == []
        assert notebook.problems == []
