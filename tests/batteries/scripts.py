"""Scripts: hostile strings wherever a checkpoint, a tokenizer or a text can bring one, and what the lab then shows."""

import io
import random
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

import sae_lab as sl
from sae_lab.results import visible

TITLE = "hostile strings in what is shown"
RUNS = "window.ran=1"
PARTS = (
    f"<img src=x onerror={RUNS}>", f"<script>{RUNS}</script>", f"</script><script>{RUNS}</script>", "<!--<script>",
    f"</noscript></title></style><svg onload={RUNS}>", f"\"'><b onmouseover={RUNS}>", f"javascript:{RUNS}", "-->",
    f"${{{RUNS}}}", "]]>", "&lt;", "$\\frac{", "\\$", "_", "CircuitsVis.render(", "{}", "{0}", "\x00", "\x1b[2J",
    "\x1b]0;owned\x07", "\u202e", "\u200b", "\u2066", "\ufeff", "\u2028", "\r\n", "\u00ad", "\U000e0041", "\x9b31m",
)  # fmt: skip
ELEMENTS = {"table", "tr", "th", "td", "p", "br", "b", "i", "div", "mark", "code", "bdi"}
PAGE = {"html", "head", "meta", "title", "style", "body", "noscript", "script"}
ATTRIBUTES = {"style", "title", "dir", "id", "type", "lang", "charset", "name", "content", "crossorigin"}
SITE = sl.Site("resid_post", 1)


def run(full: bool, seed: int = 0) -> dict[str, object]:
    found: dict[str, Any] = {"tries": 0, "executions": 0, "unmarked": 0, "failed": 0, "bad": []}
    for number in range(10 if full else 1):
        rng = random.Random(seed + number)
        with tempfile.TemporaryDirectory() as folder:
            for name, shown in surfaces(partial(hostile, rng), Path(folder)):
                found["tries"] += 1
                try:
                    kind, words = check(shown())
                except Exception as err:
                    kind, words = "failed", repr(err)
                if kind:
                    found[kind] += 1
                    found["bad"].append(f"{number} {name}: {words}")
    return found


def hostile(rng: random.Random) -> str:
    return "".join(rng.sample(PARTS, 5))


# ---- what is shown


def surfaces(text: Callable[[], str], folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, what gives HTML, a file's path, a figure, or an object to print). text: a new hostile string."""
    lm, sae, index, prompt, source = made(text, folder)
    other, target = lm.tokenizer.decode([lm.vocab_size - 1]), [lm.tokenizer.decode([lm.vocab_size - 2])]
    docs = [f"{text()} ships {text()}" for _ in range(4)], [f"{text()} sea {text()}" for _ in range(4)]
    live = int(index.counts.argmax())
    index.annotate(live, label=text(), text=text())
    results = {
        "features": lambda: sl.features(lm, sae, prompt),
        "find_features": lambda: sl.find_features(lm, sae, *docs, permutations=5),
        "compare": lambda: lm.compare(prompt, sl.Steer(sae, live, strength=5.0)),
        "dose": lambda: sl.dose_response(lm, sae, live, prompt, target, text(), strengths=[0.0, 4.0]),
        "reconstruction": lambda: sl.evals.reconstruction(sae, lm, docs[0], tokens=64, context=32),
        "match": lambda: sl.match(sae, sae),
        "patches": lambda: sl.PatchingGrid(lm, prompt, source, answers=(target[0], other))._on.estimate,
    }
    widgets = {
        "inspector": lambda: sl.FeatureInspector(index, feature=live),
        "tokens": lambda: sl.TokenFeatures(lm, sae, prompt),
        "steering": lambda: sl.SteeringSliders(lm, sae, live, prompt, max_new_tokens=4),
        "patching": lambda: sl.PatchingGrid(lm, prompt, source, answers=(target[0], other)),
        "map": lambda: sl.FeatureMap(index, torch.rand(sae.d_sae, 2).numpy(), torch.zeros(sae.d_sae).long().numpy()),
    }
    for name, make in results.items():
        result = make()
        yield f"{name} repr", partial(repr, result)
        if hasattr(result, "_repr_html_"):
            yield f"{name} html", result._repr_html_
        if name in ("dose", "patches"):
            yield f"{name} plot", partial(sl.plot, result)
    yield "density plot", partial(sl.plot, index)
    for name, make in widgets.items():
        panel = make()
        yield f"{name} repr", partial(repr, panel)
        yield f"{name} form", panel._html
        yield f"{name} page", partial(panel.to_html, folder / f"{name}.html")
        panel.close()
    drawing = sl.PatchingGrid(lm, prompt, source, answers=(target[0], other)).attention(0)
    yield "attention", lambda: without_bundle(drawing._repr_html_())
    (folder / "attention.html").write_text(f"<!doctype html><meta charset=utf-8>{drawing._repr_html_()}")
    for name, one in {"mask": str(sae.mask), "lm": repr(lm), "sae": repr(sae), "view": repr(index[live])}.items():
        yield f"{name} repr", lambda one=one: one


def made(text: Callable[[], str], folder: Path) -> tuple[Any, Any, Any, str, str]:
    """A model whose name and tokens are hostile, a coder whose mask is, an index of a hostile text, and two prompts."""
    import transformers as tf

    from sae_lab.lm import bundled

    tokenizer = tf.AutoTokenizer.from_pretrained(bundled.folder())
    words = [text() for _ in range(12)]
    tokenizer.add_tokens(words)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        name_or_path=text(), attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    lm = sl.LM(tf.LlamaForCausalLM(config).eval(), tokenizer=tokenizer)
    rng = random.Random(0)
    documents = ["".join(rng.choice([*words, " ship", " sea", " the"]) for _ in range(60)) for _ in range(30)]
    store = sl.harvest(lm, SITE, documents, tokens=1500, path=folder / "store", context=64)
    sae = sl.TopK(32, 64, k=4)
    sl.train(sae, store, sl.TrainConfig(steps=20, batch_size=128))
    sae.meta["mask"]["max_norm"][text()] = 1e9
    index = sl.index_features(sae, lm, store, folder / "index")
    return lm, sae, index, "".join(words[:4]) + " sea", "".join(words[4:8]) + " sea"


def without_bundle(page: str) -> str:
    """CircuitsVis' own page without the code that it brings, which holds markup of its own."""
    start, _, rest = page.partition('<script crossorigin type="module">')
    return f"{start}<script>{rest[rest.index('CircuitsVis.AttentionHeads,') :]}"


# ---- what is wrong with it


class Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.scripts += tag == "script"
        if tag not in ELEMENTS | PAGE or any(name not in ATTRIBUTES for name, _ in attrs):
            self.wrong.append(f"<{tag} {attrs}>")

    def handle_comment(self, data: str) -> None:
        self.wrong.append(f"<!--{data[:40]}")


def check(shown: Any) -> tuple[str, str]:
    """("", "") where nothing of the data is more than text that can be seen."""
    if hasattr(shown, "savefig"):
        file = io.BytesIO()
        shown.savefig(file, format="svg")
        shown.savefig(io.BytesIO(), format="png")
        every = list(ElementTree.fromstring(file.getvalue()).iter())
        attributes = [name for e in every for name in e.attrib if name.startswith("on")]
        wrong = attributes + [e.tag for e in every if e.tag.endswith(("}script", "}img"))]
        return ("executions", str(wrong)) if wrong else ("", "")
    page = isinstance(shown, Path)
    text = shown.read_text(encoding="utf-8") if page else str(shown)
    if page or text.startswith("<"):
        parser = Parser()
        parser.feed(text)
        if parser.wrong or parser.scripts > (2 if page else 1) or "<script>window.ran" in text:
            return "executions", str(parser.wrong[:2] or parser.scripts)
        text = "" if page else text  # its bundle and its JSON are no text to read
    hidden = [c for c in text if c != "\n" and visible(c) != c]
    return ("unmarked", repr(hidden[:5])) if hidden else ("", "")
