"""What SteeringSliders sends to the screen, and its form without scripts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sae_lab.edits.edit import Push, Steer
from sae_lab.feature_index.dosing import DoseResponse
from sae_lab.lm.comparing import Comparison, differing
from sae_lab.lm.tokens import Prompt, Token
from sae_lab.results import Html, Name, joined, tag

from .prompting import in_words
from .static_html import block, code, dotted, figure, numbered, table

FEATURES = 12  # whose activations are shown: an edit may change all of them


def slider_row(key: int, edit: Steer | Push, on: bool) -> dict[str, Any]:
    """A slider as the screen shows it. vector: the name of the vector that it has in place of features. scales: f_scale
    of its features, or of the vector. more: its further settings, in words."""
    more = {k: v for k, v in edit._settings().items() if k not in ("feature", "strength", "when")}
    more |= {} if edit.condition is None else {"when": edit.condition}
    vector = (edit.vector.name or "unnamed vector") if isinstance(edit, Push) else ""
    return {
        "key": key, "on": on, "features": [] if vector else edit.features, "vector": vector,
        "strength": float(edit.strength),
        "scales": [float(edit.coder.f_scale[f]) for f in edit.features],
        "more": ", ".join(f"{name}={value!r}" for name, value in more.items()),
    }  # fmt: skip


def limited(result: Comparison, ours: Sequence[str]) -> Comparison:
    """A comparison with few of its features, those of the sliders (``ours``, their names) first."""
    names = [n for n in dict.fromkeys([*ours, *result.features]) if n in result.features]
    return replace(result, features={name: result.features[name] for name in names[:FEATURES]})


def compared_view(
    result: Comparison, before: Sequence[Token], length: int, roles: Sequence[str], called: Mapping[str, str]
) -> dict[str, Any]:
    """A comparison of the steered text, with the tokens that only one of the two continuations has.

    length: the prompt's, in characters. roles: those of a chat's tokens, else none. called: what measures of features
    are called, by their name.

    {baseline, steered: [{text, mark, role of the prompt's in a chat}], measures: [{name, label, group, values}],
    perplexity: [without, with], mean_kl, next: [[token, log-probability without, with]]}; a token's mark is "prompt",
    "new" (not in the other text) or "". Measures of one group share a scale.
    """
    starts = [_first_new(tokens, length) for tokens in (before, result.tokens)]
    marks = differing([str(t) for t in before[starts[0] :]], [str(t) for t in result.tokens[starts[1] :]])
    strips = [
        [{"text": t.label, "mark": "prompt" if i < at else "new" if mark[i - at] else ""} for i, t in enumerate(tokens)]
        for tokens, at, mark in zip((before, result.tokens), starts, marks, strict=True)
    ]
    for strip in strips:
        for token, role in zip(strip, roles, strict=False):
            token["role"] = role
    measures = [
        {"name": name, "label": f"{name} {Name(called.get(group, ''))}".strip(), "group": group,
         "values": _sent(v.tolist())}
        for name, v in result.measures().items()
        for group in [name.removesuffix(" with edits").removesuffix(" without")]
    ]  # fmt: skip
    return {
        "baseline": strips[0], "steered": strips[1], "measures": measures,
        "perplexity": _sent([result.perplexity, result.perplexity_edited]),
        "mean_kl": _sent([float(result.kl.mean())])[0],
        "next": [[token, *_sent(changes)] for token, *changes in result.next],
    }  # fmt: skip


def dose_view(result: DoseResponse, prompt: Prompt) -> dict[str, Any]:
    """{feature, target, prompt, series: [{name, strength, log_odds, cost}]}: one line a method."""
    series = []
    for name in dict.fromkeys(row["method"] for row in result.rows):
        rows = [row for row in result.rows if row["method"] == name]
        columns = {key: _sent([row[key] for row in rows]) for key in ("strength", "log_odds", "cost")}
        series.append({"name": name, **columns})
    return {"feature": result.feature, "target": list(result.target), "prompt": in_words(prompt), "series": series}


def _first_new(tokens: Sequence[Token], length: int) -> int:
    """The first token with a character after the prompt."""
    return next((i for i, token in enumerate(tokens) if token.end > length), len(tokens))


def _sent(values: Iterable[float]) -> list[float | None]:
    """Numbers for the screen: JSON has neither NaN nor infinities."""
    return [value if math.isfinite(value) else None for value in values]


def steering_html(
    sliders: Sequence[dict[str, Any]], names: Mapping[str, str], others: Sequence[dict[str, Any]],
    texts: tuple[str, str], comparison: dict[str, Any], tables: Sequence[Comparison | DoseResponse | None], note: str,
) -> Html:  # fmt: skip
    """Sliders, the two texts and the results, as script-free HTML."""
    rows = [
        [
            "on" if row["on"] else "off",
            joined([row["vector"] or joined((numbered(f, names) for f in row["features"]), ", "),
                    f" ({row['more']})" if row["more"] else ""]),
            f"{row['strength']:g}",
            ", ".join(figure(row["strength"] * scale) for scale in row["scales"]),
        ]
        for row in sliders
    ]
    strips = (comparison.get("baseline"), comparison.get("steered"))
    cells = [_text(whole, tokens) for whole, tokens in zip(texts, strips, strict=True)]
    return block(
        tag("p", tag("b", "Steering")),
        table(["", "feature", "strength (f_scale)", "added"], rows) or tag("p", "No sliders."),
        table(["", "other edits"], [["on" if r["on"] else "off", code(r["code"])] for r in others]),
        table(["baseline", "steered (marked: not in the other)"], [cells]),
        tag("p", note),
        tag("p", comparison["note"]) if "note" in comparison else None,
        *(result._repr_html_() for result in tables if result is not None),
    )


def _text(whole: str, tokens: Sequence[dict[str, Any]] | None) -> object:
    if not tokens:
        return dotted(whole)
    if "role" not in tokens[0] and not whole.startswith(tokens[0]["text"]):
        tokens = tokens[1:]  # the prefix token
    texts = ((dotted(token["text"]), token["mark"]) for token in tokens)
    return joined(tag("mark", text) if mark == "new" else text for text, mark in texts)
