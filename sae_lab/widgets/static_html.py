"""Script-free HTML that reads without CSS: for GitHub, nbconvert and saved notebooks."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# A saved notebook carries this beside every displayed panel: show enough to read, not everything.
TOP_CONTEXTS = 8
CONTEXTS_PER_QUANTILE = 1
TOKENS_EACH_SIDE = 20
LENS_TOKENS = 8

_GLYPHS = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"})


class Snapshot:
    """What a widget showed: text and HTML, no JavaScript, no link to a kernel."""

    def __init__(self, html: str, text: str) -> None:
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"Snapshot({self.text})"


def feature_html(view: Mapping[str, Any], note: Mapping[str, str] | None = None) -> str:
    """The static summary of one feature, from ``FeatureView.to_dict()``, and your note; every text is escaped."""
    label = f": {escape(note['label'])}" if note and note["label"] else ""
    text = [f"<p>{escape(note['text'])}</p>"] if note and note["text"] else []
    return "\n".join(
        [
            "<div>",
            f"<p><b>Feature {view['feature']}</b> of {view['d_sae']:,}{label}</p>",
            *text,
            *(_explanation(said) for said in view.get("explanations", [])),
            _numbers(view),
            _contexts(view["groups"]),
            _lens(view),
            _neighbours(view["neighbours"]),
            "</div>",
        ]
    )


def _explanation(said: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{name} {value:.2f}" for name, value in said["scores"].items())
    return f"<p>{escape(said['text'])} ({escape(said['source'])}{': ' * bool(scores)}{escape(scores)})</p>"


def _numbers(view: Mapping[str, Any]) -> str:
    cells = {
        "density": f"{100 * view['density']:.3g} %",
        "fires on": f"{view['count']:,} of {view['tokens_seen']:,} tokens",
        "mean": f"{view['mean']:.3g}",
        "max": f"{view['max']:.3g}",
        "f_scale": f"{view['f_scale']:.3g}",
    }
    return table(list(cells), [list(cells.values())])


def _contexts(groups: Sequence[Mapping[str, Any]]) -> str:
    rows: list[list[str]] = []
    for number, group in enumerate(groups):
        for context in group["contexts"][: TOP_CONTEXTS if number == 0 else CONTEXTS_PER_QUANTILE]:
            value = context["values"][context["peak"]]
            rows.append([escape(group["label"]), _number(value), _context(context)])
    if not rows:
        return "<p>It fires on none of these tokens.</p>"
    return table(["group", "peak", "context (marked: the feature fires)"], rows)


def _context(context: Mapping[str, Any]) -> str:
    start = max(0, context["peak"] - TOKENS_EACH_SIDE)
    stop = context["peak"] + TOKENS_EACH_SIDE + 1
    pairs = zip(context["tokens"][start:stop], context["values"][start:stop], strict=True)
    before = "… " if start > 0 else ""
    after = " …" if stop < len(context["tokens"]) else ""
    return before + "".join(_token(token, value) for token, value in pairs) + after


def _token(token: str, value: float | None) -> str:
    text = visible(token)
    # A leading space stays outside the mark: without style sheets, marked words would seem to touch.
    space, word = (" ", text[1:]) if text.startswith(" ") else ("", text)
    if value is None:
        return f'{space}<i title="excluded by the token mask">{word}</i>'
    return f'{space}<mark title="{_number(value)}">{word}</mark>' if value > 0 else text


def _lens(view: Mapping[str, Any]) -> str:
    def words(pairs: Sequence[Sequence[Any]]) -> str:
        return ", ".join(f"<code>{visible(token)}</code> {value:.2f}" for token, value in pairs[:LENS_TOKENS])

    caution = f"<p><b>Caution:</b> {escape(view['lens_note'])}</p>\n" if view["lens_note"] else ""
    rows = [["promoted", words(view["promoted"])], ["suppressed", words(view["suppressed"])]]
    return caution + table(["logit lens", "tokens (arbitrary units)"], rows)


def _neighbours(pairs: Sequence[Sequence[Any]]) -> str:
    words = ", ".join(f"{feature} ({cosine:.2f})" for feature, cosine in pairs)
    return f"<p>Nearest decoder rows (cosine): {words or 'none'}</p>"


def visible(token: str) -> str:
    """A token as escaped text: line breaks and tabs as glyphs, a token of only spaces as dots."""
    text = token.translate(_GLYPHS)
    return escape(text if text.strip(" ") else text.replace(" ", "·"))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    # Jupyter aligns cells right by default, which tears running text apart.
    left = 'style="text-align:left"'
    lines = ["".join(f"<th {left}>{name}</th>" for name in head)]
    lines += ["".join(f"<td {left}>{cell}</td>" for cell in row) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"
