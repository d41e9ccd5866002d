"""PatchingGrid as a user has it: in JupyterLab, on a tiny random model."""

import pathlib
import re

import pytest
from playwright.sync_api import expect

from .lab import DARK, LIGHT, open_notebook, screenshots, write_notebook

REPOSITORY = pathlib.Path(__file__).parents[2]
MODEL = """
import torch, transformers, sae_lab as sl
from sae_lab.lm import bundled

tokenizer = transformers.AutoTokenizer.from_pretrained(bundled.folder())
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=8, num_attention_heads=4,
)
module = transformers.LlamaForCausalLM(config)
for p in module.parameters():
    torch.nn.init.normal_(p, std=0.2 if p.dim() > 1 else 1.0)
lm = sl.LM(module.eval(), tokenizer=tokenizer)
sae = sl.TopK(48, 96, 8).eval()
sae.reads = (sl.Site("resid_post", 4),)
"""
CELL = """
grid = sl.PatchingGrid(
    lm, "When Mary and John went to the store, Mary gave a drink to",
    "When Mary and John went to the store, John gave a drink to", answers=(" Mary", " John"), coder=sae,
)
grid
"""
CELL_AT = ".saelab-heat-cell[data-row='{}'][data-column='{}']"


@pytest.mark.browser
def test_the_patching_grid_in_jupyterlab(tmp_path: pathlib.Path) -> None:
    path = write_notebook(tmp_path / "patching.ipynb", [MODEL, CELL])
    with open_notebook(path, env={"PYTHONPATH": str(REPOSITORY)}, viewport=(1280, 1200)) as notebook:
        notebook.run_all()
        grid = notebook.ready(".saelab-patching")
        cells = grid.get_by_role("grid", name="Effects of patches, layers by tokens")
        expect(cells.get_by_role("row")).to_have_count(9)

        # A click patches a cell: layer 4 is the fourth row from the top of eight, token 10 the tenth column.
        cell = grid.locator(CELL_AT.format(3, 9))
        expect(cell).to_have_attribute("aria-label", re.compile("layer 4, “·Mary” ← “·John”: estimate"))
        cell.click()
        expect(cell).to_have_attribute("aria-label", re.compile("layer 4, “·Mary” ← “·John”: patched"))
        opened = grid.get_by_role("region", name="The open cell")
        feature = opened.get_by_role("button", name="Select feature").first
        feature.click()
        expect(opened.locator("[aria-pressed='true']")).to_have_count(1)
        number = feature.get_attribute("data-feature")
        told = notebook.python(
            "s = grid.session.selection; print(grid.cell, len(grid.truth), s.token, s.site, s.feature)"
        )
        assert told == f"[4, 10] 1 10 resid_post-4 {number}"

        # A block by dragging, and one by the keyboard alone; the notebook does not hear the keys.
        grid.locator(CELL_AT.format(0, 11)).hover()
        notebook.page.mouse.down()
        grid.locator(CELL_AT.format(1, 13)).hover()
        notebook.page.mouse.up()
        grid.get_by_role("button", name="Patch block (6)").click()
        expect(grid.locator("[data-cell][data-sure]")).to_have_count(7)
        count = notebook.page.locator(".jp-Cell").count()
        cell.focus()
        for key in ["a", "b", "Escape", "ArrowDown", "Shift+ArrowDown", "Shift+ArrowRight"]:
            notebook.page.keyboard.press(key)
        expect(grid.locator("[data-block]")).to_have_count(4)
        grid.get_by_role("button", name="Patch block (4)").press("Enter")
        expect(grid.locator("[data-cell][data-sure]")).to_have_count(11)
        expect(grid).to_have_attribute("data-ready", "1")
        assert notebook.page.locator(".jp-Cell").count() == count
        assert notebook.python("print(len(grid.truth), grid.progress)") == "11 []"

        # From the kernel to the screen.
        notebook.python("grid.session.selection.pick(token=14, site='attn_out-7')")
        expect(grid.get_by_role("button", name="attn_out")).to_have_attribute("aria-pressed", "true")
        expect(opened.get_by_role("heading", name="attn_out, layer 7, token 14")).to_be_visible()
        opened.get_by_role("button", name="Attention of layer 7 on the prompt").click()
        picture = grid.frame_locator("iframe[title='Attention of layer 7 on the prompt']")
        expect(picture.get_by_text("L7H3").first).to_be_visible(timeout=20_000)
        folder = screenshots(tmp_path)
        notebook.screenshot(grid, folder / "patching_attention.png")

        # Other texts: tokens side by side while typing, a refusal in words, then a run.
        prompt = grid.get_by_role("textbox", name="Prompt")
        prompt.fill("When <b>Mary</b> gave a drink to")
        expect(grid.get_by_text("a patch needs as many in both")).to_be_visible()
        prompt.press("Enter")
        expect(grid.get_by_role("alert")).to_contain_text("prompt and source need the same number of tokens")
        prompt.fill("When Mary and John went to the school, Mary gave a ring to")
        expect(grid.get_by_text("15 tokens each, 3 differ")).to_be_visible()
        grid.get_by_role("combobox", name="Metric").select_option("log-probability")
        grid.get_by_role("textbox", name="Right answer").fill(" John")
        grid.get_by_role("button", name="Run").click()
        expect(grid.locator(".saelab-patching-metric")).to_contain_text("log-probability ' John'")
        expect(grid.get_by_role("alert")).to_be_hidden()
        assert notebook.python("print(grid)") == (
            "PatchingGrid(log-probability ' John', 3 kinds × 8 layers × 14 positions, 0 patched)"
        )
        with notebook.page.expect_download() as saved:
            grid.locator("summary", has_text="Export").click()
            grid.get_by_role("button", name="Table").click()
        assert saved.value.path().read_text(encoding="utf-8").count("\n") == 1 + 3 * 8 * 14

        notebook.python("grid.patch('resid_post', layers=[3, 4, 5]); grid.kind = 'resid_post'; grid.cell = [4, 8]")
        expect(grid.locator("[data-cell][data-sure]")).to_have_count(42)
        # A column by its name, a row by the keyboard: together in one run, and each alone.
        column = grid.locator("[role='columnheader'][data-column='7']")
        expect(column).to_have_attribute("aria-label", re.compile("of 8 layers: a click or Enter patches all together"))
        column.click()
        expect(column).to_have_attribute("aria-label", re.compile("together in one run .*, the sum of each alone"))
        grid.locator(CELL_AT.format(2, 0)).focus()
        notebook.page.keyboard.press("ArrowLeft")
        notebook.page.keyboard.press("Enter")
        row = grid.locator("[role='rowheader'][data-row='2']")
        expect(row).to_have_attribute("aria-label", re.compile("layer 5 at 14 tokens: all .* in one run 1.00, the sum"))
        expect(row).to_be_focused()
        expect(grid).to_have_attribute("data-ready", "1")
        told = notebook.python("print([(layers, len(at)) for _, layers, at, _ in grid.joint], len(grid.truth))")
        assert told == "[([0, 1, 2, 3, 4, 5, 6, 7], 1), ([5], 14)] 47"
        for theme, name in [(LIGHT, "light"), (DARK, "dark")]:
            notebook.set_theme(theme)
            expect(grid).to_have_attribute("data-saelab-theme", name)
            assert notebook.accessibility_faults(".saelab-patching") == []
            notebook.screenshot(grid, folder / f"patching_{name}.png")

        # A chat stays one: a box for each message, and the template's tokens are told apart.
        notebook.python(
            "text = 'When Mary and John went to the store, {} gave a drink to'\n"
            "chat = lambda who: [{'role': 'user', 'content': text.format(who)}]\n"
            "grid.run(chat('Mary'), chat('John'), metric='logit difference', answers=(' Mary', ' John'))"
        )
        message = grid.get_by_role("textbox", name="Prompt, message of user")
        expect(message).to_have_value(re.compile("store, Mary"))
        message.fill("When Mary and John went to the school, Mary gave a drink to")
        message.press("Enter")
        expect(grid.locator(".saelab-old")).to_be_hidden()
        assert notebook.python("print(grid.view['prompt'][0]['content'][24:38], grid.error)") == "to the school,"
        template = grid.get_by_role("columnheader", name="of the chat template: “<|im_end|>”")
        expect(template.first).to_have_attribute("data-dim", "")
        parted = grid.locator("[role='columnheader'][data-marked]").first
        expect(parted).to_be_in_viewport()  # scrolled to, behind the template's system message
        notebook.screenshot(grid, folder / "patching_chat.png")
        assert notebook.problems == []
