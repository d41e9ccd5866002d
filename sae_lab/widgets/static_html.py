"""HTML without scripts or style sheets: for GitHub, nbconvert and saved notebooks."""

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lab.arguments import as_annotated
from sae_lab.results import Html, Name, counted, html_table, joined, number, tag, visible

# A saved notebook has this HTML beside every panel that was shown: these limits keep it small.
TOP_CONTEXTS = 8
CONTEXTS_PER_QUANTILE = 1
TOKENS_EACH_SIDE = 20
LENS_TOKENS = 8


@as_annotated
class Snapshot:
    """What a widget showed, as text and HTML without JavaScript or a kernel."""

    def __init__(self, html: Html, text: str) -> None:
        self.html, self.text = html, text

    def _repr_html_(self) -> Html:
        return self.html

    def __repr__(self) -> str:
        return f"Snapshot({self.text})"


def block(*lines: object) -> Html:
    """Parts in one element, those that are None left out."""
    return tag("div", *(line for line in lines if line is not None))


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Html | None:
    """A table, or None without rows."""
    return html_table([head, *rows], wraps=True) if rows else None


def numbered(feature: int, names: Mapping[str, str]) -> Html:
    """A feature's number, and its name if it has one."""
    return joined([feature, *([" ", Name(name)] if (name := names.get(str(feature), "")) else [])])


def feature_html(view: Mapping[str, Any], note: Mapping[str, str] | None = None) -> Html:
    """A feature, from ``FeatureView.to_dict()``, and your note on it."""
    names, unit = view.get("names", {}), view.get("unit", "token")
    numbers = {
        "density": f"{figure(100 * view['density'])} %",
        "fires on": f"{view['count']:,} of {counted(view['tokens_seen'], unit)}",
        **{name: figure(view[name]) for name in ("mean", "max", "f_scale")},
    }
    near = joined((joined([numbered(i, names), f" ({cosine:.2f})"]) for i, cosine in view["neighbours"]), ", ")
    return block(
        tag("p", tag("b", "Feature ", numbered(view["feature"], names)), f" of {view['d_sae']:,}"),
        tag("p", note["text"]) if note and note["text"] else None,
        *(_explanation(said) for said in view.get("explanations", [])),
        table(list(numbers), [list(numbers.values())]),
        _contexts(view["groups"], unit),
        *(_lens(view) if unit == "token" else []),
        tag("p", "Nearest decoder rows (cosine): ", near or "none"),
    )


def _explanation(said: Mapping[str, Any]) -> Html:
    scores = ", ".join(f"{name} {value:.2f}" for name, value in said["scores"].items())
    return tag("p", f"{said['text']} ({said['source']}{': ' * bool(scores)}{scores})")


def _contexts(groups: Sequence[Mapping[str, Any]], unit: str) -> Html:
    rows: list[list[object]] = []
    for i, group in enumerate(groups):
        shown = group["contexts"][: CONTEXTS_PER_QUANTILE if i else TOP_CONTEXTS]
        peaks = [figure(context["values"][context["peak"]]) for context in shown]
        if any(context.get("picture") for context in shown):  # side by side: pictures are small
            rows.append([group["label"], ", ".join(peaks), joined(map(_picture, shown, peaks))])
        else:
            rows += [[group["label"], *row] for row in zip(peaks, map(_context, shown), strict=True)]
    found = table(["group", "peak", "context (marked: the feature fires)"], rows)
    return found or tag("p", f"It fires on none of these {unit}s.")


def _picture(context: Mapping[str, Any], peak: str) -> Html:
    where = f"item {context['document']}, place {context['tokens'][context['peak']]}: {peak}"
    return joined([tag("img", src=context["picture"], alt=where, title=where), " "])


def _context(context: Mapping[str, Any]) -> Html:
    start = max(0, context["peak"] - TOKENS_EACH_SIDE)
    stop = context["peak"] + TOKENS_EACH_SIDE + 1
    pairs = zip(context["tokens"][start:stop], context["values"][start:stop], strict=True)
    before = "… " if start > 0 else ""
    after = " …" if stop < len(context["tokens"]) else ""
    return joined([before, *(marked(token, value) for token, value in pairs), after])


def marked(token: str, value: float | None, chosen: bool = False) -> Html:
    """A token within a text, marked if it is active. value: None if the mask leaves the token out."""
    text = dotted(token)
    # A leading space stays outside the mark, else marked words touch.
    space, word = (" ", text[1:]) if text.startswith(" ") else ("", text)
    inside = tag("b", "[", word, "]") if chosen else word
    if value is None:
        return joined([space, tag("i", inside, title="excluded by the token mask")])
    return joined([space, tag("mark", inside, title=figure(value)) if value > 0 else inside])


def _lens(view: Mapping[str, Any]) -> list[Html | None]:
    def words(pairs: Sequence[Sequence[Any]]) -> Html:
        return joined((joined([code(token), f" {value:.2f}"]) for token, value in pairs[:LENS_TOKENS]), ", ")

    rows = [["promoted", words(view["promoted"])], ["suppressed", words(view["suppressed"])]]
    found = table(["logit lens", "tokens (arbitrary units)"], rows)
    if not view["lens_note"]:
        return [found]
    return [tag("details", tag("summary", "Logit lens: ", view["lens_note"]), *([found] if view["promoted"] else []))]


def dotted(token: str) -> str:
    """A token as visible text; of one that is only spaces, each as a dot."""
    text = visible(token)
    return text if text.strip(" ") else text.replace(" ", "·")


def code(token: str) -> Html:
    return tag("code", dotted(token))


def figure(value: float | None, digits: str = ".3g") -> str:
    return "–" if value is None else number(value, digits)
