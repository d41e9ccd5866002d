"""Tests use public names; a private one needs a reason: beside it, above it, or here for those that many tests need."""

import ast
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
# Of Jupyter, Python, transformers, matplotlib and torch.
OTHERS = {
    "_repr_html_", "_repr_mimebundle_", "_replace", "_fields", "_asdict", "_exit", "_attn_implementation",
    "_dash_pattern", "_python_dispatch", "_utils", "_rebuild_tensor_v2", "_C", "_make_wrapper_subclass",
    "_make_subclass", "_disabled_torch_function_impl", "_to_copy", "_copy_from", "_index_put_impl_",
    "_local_scalar_dense", "_unique2",
}  # fmt: skip
REASONS = {
    "_module": "the transformers model itself: plain hooks, weights and generate are what results are compared with",
    "_sites": "the path of a block in that model, to put a plain hook there",
    "_on_message": "what a browser sends to a widget arrives here",
    "_reply": "what a widget answers to a browser leaves here",
    "_jobs": "whether a widget has work in the background: there is no other way to wait for its end",
    "_html": "the page without a kernel; the browser tests see the same through to_html",
    "_CHUNK": "the size of a piece, made small enough for a test's rows to fill several",
    "_writes": "one pass with the edits of lm.logits, of which a test needs the activations too",
    "_nn": "nnsight's model: edits are also applied inside a trace of one's own",
    "_lm": "the model behind a widget, made slow or counted",
    "_index": "the index behind a widget: what its panel shows is compared with it",
    "_on": "the grid's measurement, to be stopped between two of its passes",
    "_stats": "the arrays of an index file, compared with sums over dense codes",
    "_places": "the rows on which a word stands, compared with the text",
    "_score": "the figures of planted labels by hand; board_games itself needs a model of the game",
    "_Data": "planted labels, as above",
    "_measurable": "of planted labels, as above",
    "_jackknife": "of planted labels, as above",
    "_Examples": "planted examples; find_features itself needs a model that reads texts",
    "_p_values": "of planted examples, as above",
    "_auroc": "of planted examples, as above",
    "_permuted": "the control's labels themselves: what they must keep and what they must break",
    "_held_out_texts": "which planted texts no choice may see",
    "_by_context": "of planted codes by hand, without an index",
    "_decompose": "of planted codes, as above",
    "_spread": "of planted codes, as above",
    "_convert": "the bundled model's conversion: whether it runs, and what it says of a broken file",
    "_at": "a part of plain_model.py, which is the tests' own",
    "_gradients": "arrays that training uses again: that they are the same ones shows nowhere else",
    "_orders": "the orders that circles tries: a planted circle must be the best of them",
    "_order": "of a planted circle, as above",
    "_any_dead": "what a training knows of dead features without asking the device: no figure shows it",
    "_multiplies_bfloat16": "a CPU without the instructions makes the same numbers, slowly",
    "_visit": "where the time of a trace goes: it is ended there",
    "_shuffled": "the control alone: what it must keep and what it must break",
}
WITHOUT = 28  # private names without a reason: this number may only fall


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OTHERS


def reached(node: ast.AST) -> list[str]:
    """The private names that this node takes from something else than self."""
    if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
        return [node.attr] * private(node.attr)
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_lab"):
        return [alias.name for alias in node.names if private(alias.name)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
        names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        return [name for name in names if private(name)]
    return []


def without_reason(source: str) -> list[tuple[int, str]]:
    """(line, name) of every private name that neither REASONS nor a comment on its line or the one above explains."""
    lines = ["", *source.splitlines()]

    def explained(line: int) -> bool:
        return ("  # " in lines[line] and "  # fmt" not in lines[line]) or lines[line - 1].lstrip().startswith("# ")

    found = [(node.lineno, name) for node in ast.walk(ast.parse(source)) for name in reached(node)]
    return [(line, name) for line, name in sorted(found) if name not in REASONS and not explained(line)]


def test_what_counts():
    source = """
from sae_lab.lm.text import _split
from sae_lab.lm.text import _split  # the borders of chunks, which texts do not show
monkeypatch.setattr(text, "_pieces", 3)
# of every size
monkeypatch.setattr(text, "_pieces", 3)
lm._module, frame._repr_html_(), self._rows, lm.__dict__
lm._cache._far
"""
    assert without_reason(source) == [(2, "_split"), (4, "_pieces"), (8, "_cache"), (8, "_far")]


def test_private_names_have_a_reason():
    found = {file: without_reason(file.read_text(encoding="utf-8")) for file in sorted(HERE.rglob("*.py"))}
    per_file = Counter({str(file.relative_to(HERE)): len(names) for file, names in found.items() if names})
    total = sum(per_file.values())
    assert total <= WITHOUT, f"say why in a comment on the line or above it: {per_file.most_common(10)}"
