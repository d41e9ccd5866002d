"""TokenFeatures as a user has it: typing, clicks, keys, a linked session, with a live kernel behind it."""

import pathlib

import pytest
from playwright.sync_api import Locator, expect

from .lab import DARK, LIGHT, open_notebook, screenshots, watch, write_notebook

REPOSITORY = pathlib.Path(__file__).parents[2]
CELLS = [
    """import torch, transformers as tf
import sae_lab as sl
from sae_lab.lm import bundled
tokenizer = tf.AutoTokenizer.from_pretrained(bundled.folder())
torch.manual_seed(0)
config = tf.LlamaConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=512)
lm = sl.LM(tf.LlamaForCausalLM(config).eval(), tokenizer=tokenizer)
def coder(kind, seed):
    made = sl.TopK(48, 256, k=12, seed=seed).eval()
    made.reads = made.writes = (sl.Site(kind, layer=1),)
    made.f_scale.fill_(0.5)
    return made
stream, into_mlp = coder("resid_post", 0), coder("mlp_in", 1)""",
    """session = sl.Session()
TEXT = "The capital of France is Paris, on the Seine; <b>bold</b> 👩‍🚀 and\\n\\tmore"
panel = sl.TokenFeatures(lm, {"stream": stream, "into the MLP": into_mlp}, TEXT, session=session)
panel""",
]


@pytest.mark.browser
def test_token_features_in_jupyterlab(tmp_path: pathlib.Path) -> None:
    path = write_notebook(tmp_path / "tokens.ipynb", CELLS)
    with open_notebook(path, env={"PYTHONPATH": str(REPOSITORY)}, viewport=(1280, 1200)) as notebook:
        notebook.run_all()
        panel = notebook.ready(".saelab-tokens")
        strip, page = panel.get_by_role("listbox", name="Tokens"), notebook.page

        # A click on a token goes to the kernel, and its features come back.
        strip.get_by_role("option").nth(4).click()
        expect(panel.get_by_role("heading", name="Token 4")).to_be_visible()
        assert notebook.python("print(panel.token, session.selection.token)") == "4 4"
        rows = panel.locator("tbody tr")
        expect(rows).to_have_count(12)
        expect(panel.locator(".saelab-token-sum")).to_contain_text("= ")
        expect(strip.locator("b, script")).to_have_count(0)

        # A feature becomes the session's; steering with it too.
        feature = notebook.python("print(panel.detail['rows'][2]['feature'])")
        panel.get_by_role("button", name=f"Feature {feature},").click()
        expect(panel.locator(".saelab-feature-about")).to_contain_text(f"Feature {feature}")
        expect(panel.get_by_label("Colour tokens by")).to_have_value("feature")
        panel.get_by_role("button", name="Steer", exact=True).click()
        expect(panel.get_by_text("is in session.edits, 1 on")).to_be_visible()
        said = notebook.python("print(session.selection.feature, session.selection.site, list(session.edits))")
        assert said == f"{feature} resid_post-1 [Steer(Site('resid_post', layer=1), feature={feature})]"

        # From the kernel to the screen.
        notebook.python("session.selection.token = 7; panel.strip = 'loss'")
        expect(panel.get_by_role("heading", name="Token 7")).to_be_visible()
        expect(strip.get_by_role("option", selected=True)).to_have_attribute("data-position", "7")

        # By keyboard alone; the notebook must not hear the keys ("a" would add a cell).
        cells = page.locator(".jp-Cell").count()
        strip.locator("[tabindex='0']").focus()
        for key in ["a", "ArrowRight", "ArrowRight", "Enter"]:
            page.keyboard.press(key)
        expect(panel.get_by_role("heading", name="Token 9")).to_be_visible()
        panel.get_by_role("button", name="effect on").press("Enter")
        expect(panel.locator("th[aria-sort='descending']")).to_contain_text("effect on")
        panel.locator("tbody [tabindex='0']").press("ArrowDown")
        page.keyboard.press("Enter")
        expect(rows.nth(1)).to_have_attribute("data-chosen", "true")
        assert page.locator(".jp-Cell").count() == cells
        target = panel.get_by_label("Token whose logit effects are on")
        target.fill(" Paris")
        target.press("Enter")
        expect(panel.locator(".saelab-token-sum")).to_contain_text("the chosen token")
        target.fill("two words")
        target.press("Enter")
        expect(panel.get_by_role("alert")).to_contain_text("a target is one token, 'two words' is 2")

        # Typing reads live; what is too long is refused in words; nothing is no error.
        prompt = panel.get_by_label("Prompt")
        prompt.fill("שלום עולם, مرحبا")
        expect(strip).to_have_attribute("dir", "rtl")
        expect(panel.get_by_role("alert")).to_be_hidden()
        assert notebook.python("print(panel.prompt)") == "שלום עולם, مرحبا"
        prompt.fill("word " * 20_000)
        panel.get_by_role("button", name="Run").click()
        expect(panel.get_by_role("alert")).to_contain_text("this model reads at most 512: split or shorten it")
        expect(strip).to_have_attribute("dir", "rtl")
        prompt.fill("")
        expect(panel.get_by_text("No text yet")).to_be_visible()
        prompt.fill(" a b" * 240)
        expect(strip.get_by_role("option")).to_have_count(481)
        panel.get_by_label("Coder").select_option("into the MLP")
        expect(panel.get_by_text("No direct effects: this coder writes at")).to_be_visible()

        notebook.python(
            "panel.coder, panel.prompt, panel.target, panel.sort = 'stream', TEXT, '', 'activation'\n"
            "panel.token = 5\npanel.feature = panel.detail['rows'][1]['feature']"
        )
        expect(panel.get_by_role("heading", name="Token 5")).to_be_visible()
        assert notebook.accessibility_faults(".saelab-tokens") == []

        # The page without a kernel: tokens and features still open, what would ask the model is gone.
        notebook.python("panel.to_html('page.html')")
        assert page.context.browser is not None
        saved = page.context.browser.new_page()
        problems = watch(saved)
        saved.goto((tmp_path / "page.html").as_uri())
        frozen = saved.locator(".saelab-tokens")
        frozen.locator(".saelab-token").nth(8).click()
        expect(frozen.get_by_role("heading", name="Token 8")).to_be_visible()
        frozen.locator("tbody tr").nth(3).click()
        expect(frozen.locator("tbody tr").nth(3)).to_have_attribute("data-chosen", "true")
        expect(frozen.get_by_role("button", name="Steer")).to_be_hidden()
        expect(frozen.get_by_label("Prompt")).to_be_hidden()
        assert problems == []
        saved.close()

        folder = screenshots(tmp_path)
        for theme, name in [(LIGHT, "light"), (DARK, "dark")]:
            notebook.set_theme(theme)
            expect(panel).to_have_attribute("data-saelab-theme", name)
            notebook.screenshot(panel, folder / f"tokens_{name}.png")
        assert notebook.problems == []


BUNDLED = [
    'import sae_lab as sl\nlm, sae = sl.LM(), sl.load("smollm2-135m/resid_post-8")\ndocument = sl.load_text()[0]',
    "ids = lm.tokenize(document[:2000]).ids[0, 1:128].tolist()\npanel = sl.TokenFeatures(lm, sae)\npanel",
]


@pytest.mark.browser
def test_how_long_it_takes_with_the_bundled_model(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """128 tokens typed until the strip shows them, and a click until its features stand there: the fastest of a few,
    which another process disturbs least. The bounds are loose; what is printed is what it took."""
    path = write_notebook(tmp_path / "tokens.ipynb", BUNDLED)
    with open_notebook(path, env={"PYTHONPATH": str(REPOSITORY)}) as notebook:
        notebook.run_all(timeout=180)
        panel = notebook.ready(".saelab-tokens")
        text = notebook.python("print(lm.tokenizer.decode(ids).replace('\\n', ' '))")
        read, click = [], []
        for run in range(4):
            read.append(_until(panel, "Run", f"{run} {text}"))
            live = notebook.python("print(*[i for i, active in enumerate(panel.text['active']) if active])").split()
            click.append(_until(panel, "token", live[40 + 7 * run]))
        tokens = int(notebook.python("print(len(panel.text['labels']))"))
        with capsys.disabled():
            print(f"\nbundled model, layer 8: {tokens} tokens in {min(read):.0f} ms, a click {min(click):.0f} ms")
        assert 120 <= tokens <= 140 and min(read) < 3000 and min(click) < 1500
        # Effects follow the features when the model is through.
        wait = "import time\nfor _ in range(600):\n    if panel.detail['effects']: break\n    time.sleep(0.05)\n"
        assert notebook.python(f"{wait}print(panel.detail['effects'])") == "True"
        assert notebook.problems == []


def _until(panel: Locator, what: str, value: str) -> float:
    """Milliseconds on the page, from a press of Run (or a token) until the strip (or the list) shows what it asked."""
    took = panel.evaluate(
        """(root, [what, value]) => new Promise((resolve, reject) => {
            const strip = root.querySelector('.saelab-strip');
            const shown = () => what === 'Run'
                ? strip.querySelectorAll('.saelab-token')[1]?.dataset.text === value.split(' ')[0]
                : root.querySelector('h4')?.textContent.startsWith(`Token ${value} `);
            setTimeout(() => reject(new Error(`${what} ${value.slice(0, 20)} never came`)), 30000);
            const start = performance.now();
            const observer = new MutationObserver(() => {
                if (!shown()) return;
                observer.disconnect();
                resolve(performance.now() - start);
            });
            observer.observe(root, { subtree: true, childList: true, characterData: true });
            if (what === 'Run') {
                root.querySelector('textarea').value = value;
                root.querySelector('.saelab-run').click();
            } else strip.querySelectorAll('.saelab-token')[Number(value)].click();
        })""",
        [what, value],
    )
    expect(panel).to_have_attribute("data-ready", "1", timeout=60_000)
    return float(took)
