"""Script-free HTML that reads without CSS: for GitHub, nbconvert and saved notebooks."""

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lab.arguments import as_annotated
from sae_lab.results import Html, html_table, joined, tag, visible

# A saved notebook carries this beside every displayed panel: show enough to read, not everything.
TOP_CONTEXTS = 8
CONTEXTS_PER_QUANTILE = 1
TOKENS_EACH_SIDE = 20
LENS_TOKENS = 8


@as_annotated
class Snapshot:
    """What a widget showed: text and HTML, no JavaScript, no link to a kernel."""

    def __init__(self, html: Html, text: str) -> None:
        self.html, self.text = html, text

    def _repr_html_(self) -> Html:
        return self.html

    def __repr__(self) -> str:
        return f"Snapshot({self.text})"


def block(*lines: object) -> Html:
    """Lines of HTML in one element; None is none."""
    return tag("div", joined(["", *(line for line in lines if line is not None), ""], "\n"))


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Html | None:
    """A table; None without rows."""
    return html_table([head, *rows], wraps=True) if rows else None


def feature_html(view: Mapping[str, Any], note: Mapping[str, str] | None = None) -> Html:
    """The static summary of one feature, from ``FeatureView.to_dict()``, and your note."""
    label = f": {note['label']}" if note and note["label"] else ""
    return block(
        tag("p", tag("b", "Feature ", view["feature"]), f" of {view['d_sae']:,}{label}"),
        tag("p", note["text"]) if note and note["text"] else None,
        *(_explanation(said) for said in view.get("explanations", [])),
        _numbers(view),
        _contexts(view["groups"]),
        *_lens(view),
        _neighbours(view["neighbours"]),
    )


def _explanation(said: Mapping[str, Any]) -> Html:
    scores = ", ".join(f"{name} {value:.2f}" for name, value in said["scores"].items())
    return tag("p", f"{said['text']} ({said['source']}{': ' * bool(scores)}{scores})")


def _numbers(view: Mapping[str, Any]) -> Html | None:
    cells = {
        "density": f"{100 * view['density']:.3g} %",
        "fires on": f"{view['count']:,} of {view['tokens_seen']:,} tokens",
        "mean": f"{view['mean']:.3g}",
        "max": f"{view['max']:.3g}",
        "f_scale": f"{view['f_scale']:.3g}",
    }
    return table(list(cells), [list(cells.values())])


def _contexts(groups: Sequence[Mapping[str, Any]]) -> Html:
    rows: list[list[object]] = []
    for number, group in enumerate(groups):
        for context in group["contexts"][: TOP_CONTEXTS if number == 0 else CONTEXTS_PER_QUANTILE]:
            value = context["values"][context["peak"]]
            rows.append([group["label"], figure(value), _context(context)])
    found = table(["group", "peak", "context (marked: the feature fires)"], rows)
    return found or tag("p", "It fires on none of these tokens.")


def _context(context: Mapping[str, Any]) -> Html:
    start = max(0, context["peak"] - TOKENS_EACH_SIDE)
    stop = context["peak"] + TOKENS_EACH_SIDE + 1
    pairs = zip(context["tokens"][start:stop], context["values"][start:stop], strict=True)
    before = "… " if start > 0 else ""
    after = " …" if stop < len(context["tokens"]) else ""
    return joined([before, *(marked(token, value) for token, value in pairs), after])


def marked(token: str, value: float | None, chosen: bool = False) -> Html:
    """A token within a text, marked where it is active (None: left out by the mask)."""
    text = dotted(token)
    # A leading space stays outside the mark: without style sheets, marked words would seem to touch.
    space, word = (" ", text[1:]) if text.startswith(" ") else ("", text)
    inside = tag("b", "[", word, "]") if chosen else word
    if value is None:
        return joined([space, tag("i", inside, title="excluded by the token mask")])
    return joined([space, tag("mark", inside, title=figure(value)) if value > 0 else inside])


def _lens(view: Mapping[str, Any]) -> list[Html | None]:
    def words(pairs: Sequence[Sequence[Any]]) -> Html:
        return joined((joined([code(token), f" {value:.2f}"]) for token, value in pairs[:LENS_TOKENS]), ", ")

    caution = tag("p", tag("b", "Caution:"), " ", view["lens_note"]) if view["lens_note"] else None
    rows = [["promoted", words(view["promoted"])], ["suppressed", words(view["suppressed"])]]
    return [caution, table(["logit lens", "tokens (arbitrary units)"], rows)]


def _neighbours(pairs: Sequence[Sequence[Any]]) -> Html:
    words = ", ".join(f"{feature} ({cosine:.2f})" for feature, cosine in pairs)
    return tag("p", f"Nearest decoder rows (cosine): {words or 'none'}")


def dotted(token: str) -> str:
    """A token as visible text; one of only spaces as dots."""
    text = visible(token)
    return text if text.strip(" ") else text.replace(" ", "·")


def code(token: str) -> Html:
    return tag("code", dotted(token))


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
