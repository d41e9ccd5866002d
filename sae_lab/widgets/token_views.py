"""What TokenFeatures sends to the screen, and its form without scripts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_lab.circuits.direct import direct_effects
from sae_lab.circuits.prompt import PromptReading
from sae_lab.results import Html, counted, joined, tag
from sae_lab.saes.base import SparseCoder

from .static_html import block, code, figure, marked, numbered, table

PROMOTED = 4  # tokens named for each feature
PAGE_TOKENS, PAGE_FEATURES = 128, 20  # whose features a page without a kernel keeps: it stays small
STATIC_TOKENS, STATIC_FEATURES = 200, 10  # what a saved notebook carries


def figures(values: Tensor) -> list[float | None]:
    """Numbers for the screen, with five digits; None for NaN."""
    return [float(f"{v:.5g}") if v == v else None for v in values.tolist()]


def along(reading: PromptReading, coder: SparseCoder | None = None, feature: int = 0) -> list[float | None]:
    """A feature's activation at each token, or without a coder the loss of each token, nats."""
    return figures(reading.losses() if coder is None else reading.along(coder, feature))


def text_of(reading: PromptReading, coder: SparseCoder) -> dict[str, Any]:
    """The tokens, their strongest activation and number of active features; None where the mask leaves a token out."""
    return {
        "labels": [token.label for token in reading.tokens],
        "strongest": figures(reading.along(coder, "strongest")),
        "active": figures(reading.along(coder, "active")),
        "site": coder.site.key,
    }


def detail_of(
    reading: PromptReading, coder: SparseCoder, token: int, target: str, n: int, sort: str, why_not: str = ""
) -> dict[str, Any]:
    """The features active at a token, with their direct effects, or with ``why_not``: why there are none."""
    shown: dict[str, Any] = {"position": token, "label": reading.tokens[token].label, "effects": False, "rows": []}
    if not bool(reading.codes(coder).keep[0, token]):
        return shown | {"active": None, "note": "The coder's mask leaves this token out: no feature is active here."}
    if why_not:
        features, values = reading.active(coder, token)
        scale = coder.f_scale[features].cpu()
        rows = _rows(features[:n], values[:n], torch.where(scale > 0, values / scale, float("nan"))[:n])
        return shown | {"active": len(features), "note": why_not, "rows": rows}
    found = direct_effects(reading.lm, coder, reading, token, on=target or None, n=n, by=sort, promoted=PROMOTED)
    rows = _rows(found.features, found.values, found.scaled)
    for row, effect, promoted in zip(rows, figures(found.effects[:, 0]), found.promoted, strict=True):
        row |= {"effect": effect, "promoted": [[name, float(f"{v:.3g}")] for name, v in promoted]}
    is_next = "chosen" if target else "next" if token + 1 < len(reading) else "likeliest"
    return shown | {
        "effects": True, "active": found.active, "note": found.note, "rows": rows, "target": found.names[0],
        "target_is": is_next, "parts": {name: float(f"{v[0]:.5g}") for name, v in found.parts().items()},
    }  # fmt: skip


def _rows(features: Tensor, values: Tensor, scaled: Tensor) -> list[dict[str, Any]]:
    columns = (features.tolist(), figures(values), figures(scaled))
    return [{"feature": f, "value": v, "scaled": s} for f, v, s in zip(*columns, strict=True)]


def pages_of(
    reading: PromptReading, coder: SparseCoder, token: int, target: str, n: int, shown: Mapping[str, Any]
) -> dict[str, Any]:
    """For a page without a kernel, of the tokens around the chosen one: {"pages": {position: detail}, "firing":
    {feature: {position: activation}}}."""
    start = max(0, min(token - PAGE_TOKENS // 2, len(reading) - PAGE_TOKENS))
    positions = range(start, min(len(reading), start + PAGE_TOKENS))
    why_not = "" if shown.get("effects") else str(shown.get("note", ""))
    if shown.get("active") is None:  # the note is that token's own
        why_not = "" if reading.is_through else "No direct effects."
    count = min(n, PAGE_FEATURES)
    pages = {p: detail_of(reading, coder, p, target, count, "activation", why_not) for p in positions}
    wanted = {row["feature"] for page in pages.values() for row in page["rows"]}
    firing: dict[int, dict[int, float | None]] = {feature: {} for feature in wanted}
    codes, keep = reading.codes(coder)
    places = keep[0].nonzero().flatten()[codes.rows].tolist()
    for place, feature, value in zip(places, codes.features.tolist(), figures(codes.values), strict=True):
        if feature in wanted:
            firing[feature][place] = value
    return {"pages": pages, "firing": firing}


def html_of(
    text: Mapping[str, Any], detail: Mapping[str, Any], fires: Sequence[float | None] | None, feature: int | None,
    names: Mapping[str, str],
) -> Html:  # fmt: skip
    """The text, marked where features are active, or the chosen one; and the features of the chosen token."""
    if not text:
        return block(tag("p", "No text yet."))
    values = text["strongest"] if fires is None else fires
    what = ["strongest activation"] if fires is None else ["activation of feature ", numbered(feature or 0, names)]
    at = detail.get("position", 0)
    start = max(0, min(at - STATIC_TOKENS // 2, len(values) - STATIC_TOKENS))
    pairs = list(zip(text["labels"], values, strict=True))[start : start + STATIC_TOKENS]
    shown = (marked(label, value, start + i == at) for i, (label, value) in enumerate(pairs))
    before, after = "… " if start else "", " …" if start + STATIC_TOKENS < len(values) else ""
    head = tag("p", tag("b", text["site"]), ", marked: ", *what)
    lines = [head, tag("p", before, *shown, after, dir="auto")]
    return block(*lines, *_detail_html(detail, names))


def _detail_html(detail: Mapping[str, Any], names: Mapping[str, str]) -> list[Html | None]:
    if not detail:
        return []
    active = "left out" if detail["active"] is None else counted(detail["active"], "active feature")
    lines: list[Html | None] = [tag("p", f"Token {detail['position']} ", code(detail["label"]), f", {active}")]
    if detail["note"]:
        lines.append(tag("p", detail["note"]))
    if not detail["rows"]:
        return lines
    head: list[object] = ["feature", "activation", "× f_scale"]
    rows: list[list[object]] = [
        [numbered(r["feature"], names), figure(r["value"]), figure(r["scaled"])]
        for r in detail["rows"][:STATIC_FEATURES]
    ]
    if detail["effects"]:
        head += [joined(["direct effect on ", code(detail["target"]), " (logits)"]), "promotes"]
        for row, r in zip(rows, detail["rows"], strict=False):
            words = (joined([code(name), " ", figure(value, "+.2f")]) for name, value in r["promoted"])
            row += [figure(r["effect"], "+.3g"), joined(words, ", ")]
    lines.append(table(head, rows))
    if detail["effects"]:
        parts = detail["parts"]
        named = {name: f"{name} {figure(value, '+.2f')}" for name, value in parts.items()}
        lines.append(tag("p", f"Its centred {named.pop('logit')} = {', '.join(named.values())}"))
    return lines
