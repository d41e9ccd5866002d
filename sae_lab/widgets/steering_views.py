"""What SteeringSliders sends to the screen, and its form without scripts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sae_lab.edits.edit import Steer
from sae_lab.feature_index.dosing import DoseResponse
from sae_lab.lm.comparing import Comparison, differing
from sae_lab.lm.tokens import Token
from sae_lab.results import Html, joined, tag

from .static_html import block, code, dotted, figure, table

FEATURES = 12  # whose activations are shown: an edit may change all of them


def slider_row(key: int, edit: Steer, on: bool) -> dict[str, Any]:
    """A slider as the screen shows it. scales: f_scale of its features. more: its further settings, in words."""
    more = {k: v for k, v in edit._settings().items() if k not in ("feature", "strength")}
    return {
        "key": key, "on": on, "features": edit.features, "strength": float(edit.strength),
        "scales": [float(edit.coder.f_scale[f]) for f in edit.features],
        "more": ", ".join(f"{name}={value!r}" for name, value in more.items()),
    }  # fmt: skip


def compared_view(result: Comparison, before: Sequence[Token], prompt: str, ours: Sequence[str]) -> dict[str, Any]:
    """A comparison of the steered text, with the tokens that only one of the two continuations has.

    {baseline, steered: [{text, mark}], measures: [{name, group, values}], perplexity: [without, with], mean_kl,
    next: [[token, log-probability without, with]]}; a token's mark is "prompt", "new" (not in the other text) or "".
    Measures of one group share a scale. ours: the names of the sliders' features, whose activations come first.
    """
    names = [n for n in dict.fromkeys([*ours, *result.features]) if n in result.features]
    result = replace(result, features={name: result.features[name] for name in names[:FEATURES]})
    starts = [_first_new(tokens, prompt) for tokens in (before, result.tokens)]
    marks = differing([str(t) for t in before[starts[0] :]], [str(t) for t in result.tokens[starts[1] :]])
    strips = [
        [
            {"text": token.label, "mark": "prompt" if i < start else "new" if mark[i - start] else ""}
            for i, token in enumerate(tokens)
        ]
        for tokens, start, mark in zip((before, result.tokens), starts, marks, strict=True)
    ]
    return {
        "baseline": strips[0], "steered": strips[1],
        "measures": [
            {"name": name, "group": _group(name), "values": _plain(values)}
            for name, values in result.measures().items()
        ],
        "perplexity": _plain_numbers([result.perplexity, result.perplexity_edited]),
        "mean_kl": _plain_numbers([float(result.kl.mean())])[0],
        "next": [[token, *_plain_numbers(changes)] for token, *changes in result.next],
    }  # fmt: skip


def dose_view(result: DoseResponse, prompt: str) -> dict[str, Any]:
    """{feature, target, prompt, series: [{name, strength, log_odds, cost}]}: one line a method."""
    series = []
    for name in dict.fromkeys(row["method"] for row in result.rows):
        rows = [row for row in result.rows if row["method"] == name]
        columns = {key: _plain_numbers([row[key] for row in rows]) for key in ("strength", "log_odds", "cost")}
        series.append({"name": name, **columns})
    return {"feature": result.feature, "target": list(result.target), "prompt": prompt, "series": series}


def _first_new(tokens: Sequence[Token], prompt: str) -> int:
    """The first token with a character behind the prompt."""
    return next((i for i, token in enumerate(tokens) if token.end > len(prompt)), len(tokens))


def _group(name: str) -> str:
    return name.removesuffix(" with edits").removesuffix(" without")


def _plain(values: Tensor) -> list[float | None]:
    return _plain_numbers(values.tolist())


def _plain_numbers(values: Iterable[float]) -> list[float | None]:
    """JSON has neither NaN nor infinities."""
    return [value if math.isfinite(value) else None for value in values]


# ---- without scripts


def steering_html(
    sliders: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], texts: tuple[str, str],
    comparison: dict[str, Any], dose: dict[str, Any], note: str,
) -> Html:  # fmt: skip
    """Sliders, the two texts and the numbers, as script-free HTML."""
    rows = [
        [
            "on" if row["on"] else "off",
            ", ".join(map(str, row["features"])) + (f" ({row['more']})" if row["more"] else ""),
            f"{row['strength']:g}",
            ", ".join(f"{row['strength'] * scale:.3g}" for scale in row["scales"]),
        ]
        for row in sliders
    ]
    strips = (comparison.get("baseline"), comparison.get("steered"))
    cells = [_text(whole, tokens) for whole, tokens in zip(texts, strips, strict=True)]
    parts = [
        tag("p", tag("b", "Steering")),
        table(["", "feature", "strength (f_scale)", "added"], rows) or tag("p", "No sliders."),
        table(["", "other edits"], [["on" if r["on"] else "off", code(r["code"])] for r in others]),
        table(["baseline", "steered (marked: not in the other)"], [cells]),
        tag("p", note),
    ]
    if "measures" in comparison:
        parts += [tag("p", _in_words(comparison)), _measures(comparison)]
    elif comparison:
        parts.append(tag("p", comparison["note"]))
    return block(*parts, *(_dose(dose) if dose else []))


def _in_words(comparison: dict[str, Any]) -> str:
    without, with_, kl = map(figure, [*comparison["perplexity"], comparison["mean_kl"]])
    return f"The steered text: perplexity {without} without the edits, {with_} with them; mean KL {kl} nats."


def _text(whole: str, tokens: Sequence[dict[str, Any]] | None) -> object:
    if not tokens:
        return dotted(whole)
    pieces = []
    for number, token in enumerate(tokens):
        if number == 0 and not whole.startswith(token["text"]):
            continue  # the prefix token
        text = dotted(token["text"])
        pieces.append(tag("mark", text) if token["mark"] == "new" else text)
    return joined(pieces)


def _measures(comparison: dict[str, Any]) -> Html | None:
    """Token by token, the new ones."""
    measures = comparison["measures"]
    rows = [
        [dotted(token["text"]), *(figure(m["values"][i]) for m in measures)]
        for i, token in enumerate(comparison["steered"])
        if token["mark"] != "prompt"
    ]
    return table(["token", *(m["name"] for m in measures)], rows)


def _dose(dose: dict[str, Any]) -> list[Html | None]:
    head = ["strength", *(f"{s['name']}: {what}" for s in dose["series"] for what in ("log-odds", "cost"))]
    strengths = dose["series"][0]["strength"]
    rows = [
        [f"{x:g}", *(figure(s[key][i]) for s in dose["series"] for key in ("log_odds", "cost"))]
        for i, x in enumerate(strengths)
    ]
    target = joined(map(code, dose["target"]), ", ")
    return [tag("p", f"Dose response of feature {dose['feature']}, target ", target), table(head, rows)]
