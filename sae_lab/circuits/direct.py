"""Direct effects of the features active at a token on the next token's logits, without later layers."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.arguments import Count, as_annotated
from sae_lab.circuits.metric import one_token
from sae_lab.circuits.prompt import PromptReading, WayOut, reaches_the_stream, read_prompt, written
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompts, Token, label
from sae_lab.noting import Names
from sae_lab.results import Result, counted, result
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site

ORDERS = ("activation", "effect")


@result
class DirectEffects(Result):
    """Result of ``circuits.direct_effects``: effects on logits, centred over the vocabulary, in nats. Its table has
    one row a listed feature, with a column for each target.

    For every target  effects.sum(0) + others + error + bias + rest = logits,  up to rounding.

    Attributes:
        features, values: " n": the listed features and their codes. scaled: the codes in units of ``f_scale``, NaN if
            that is unknown. active: the number of features active at the token.
        effects: "n targets". promoted: of each feature, the tokens that it promotes most, with their effects.
        others: " targets", of active features that are not listed. error: of the part that the coder does not
            reconstruct. bias: of what the coder writes besides features (b_dec, a skip). rest: of the rest of the
            stream, and of the biases of norm and head.
        logits: " targets", the model's own, centred over the vocabulary.
        targets: token ids. names: their texts. position, tokens, site: of the token and the coder.
        note: a limit of these numbers, or "". called: the names of features.
    """

    features: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    scaled: Float[Tensor, " n"]
    effects: Float[Tensor, "n targets"]
    promoted: list[list[tuple[str, float]]]
    others: Float[Tensor, " targets"]
    error: Float[Tensor, " targets"]
    bias: Float[Tensor, " targets"]
    rest: Float[Tensor, " targets"]
    logits: Float[Tensor, " targets"]
    targets: list[int]
    names: list[str]
    active: int
    position: int
    site: Site
    tokens: list[Token] = field(repr=False)
    note: str = ""
    called: Names = field(default_factory=Names, repr=False)

    _records, _shown = "_listed", 1000
    _below = "{note}"

    @property
    def _listed(self) -> dict[str, list[Any]]:
        own = {"feature": self.features, "activation": self.values, "in_f_scale": self.scaled}
        effects = {f"effect on {name!r}": column for name, column in zip(self.names, self.effects.T, strict=True)}
        table = {name: column.tolist() for name, column in (own | effects).items()}
        names = self.called.of(features := table.pop("feature"))
        table = {"feature": features, "name": [names.get(f, "") for f in features]} | table
        return table | {"promotes": [", ".join(repr(t) for t, _ in row) for row in self.promoted]}

    def parts(self) -> dict[str, list[float]]:
        """The parts of each target's logit: features, error, bias and rest; and the logit, which is their sum."""
        features = self.effects.sum(0) + self.others
        parts = {"features": features, "error": self.error, "bias": self.bias, "rest": self.rest, "logit": self.logits}
        return {name: part.tolist() for name, part in parts.items()}

    def _header(self) -> str:
        sums = {name: ", ".join(f"{v:+.2f}" for v in part) for name, part in self.parts().items()}
        total = f"{sums.pop('logit')} = " + ", ".join(f"{name} {part}" for name, part in sums.items())
        return (
            f"{self.site.key} at {self.tokens[self.position].label!r} (position {self.position}), "
            f"{counted(self.active, 'active feature')}; "
            f"logits, centred over the vocabulary, of {', '.join(map(repr, self.names))}: {total}"
        )


@as_annotated
@torch.no_grad()
def direct_effects(
    lm: LM,
    coder: SparseCoder,
    prompt: Prompts | PromptReading,
    position: int | None = None,
    *,
    on: str | int | Sequence[str | int] | None = None,
    n: Count | None = 20,
    by: str = "activation",
    promoted: Count = 5,
) -> DirectEffects:
    """``direct_effects(lm, sae, "I went to the")``: effects of the features active at a token on the logits of the next
    one (logit attribution; Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"):

        effect_iv = (z_i·W_dec_i / s)·diag(gain)·(W_U[v] - mean W_U)

    s: what the final norm divides by at this position in the full model, held fixed; the direction is centred if that
    norm centres, and gain is the norm's (1+w for Gemma). With s fixed, logits are linear in the residual stream: the
    effects of all features, of the coder's error, of what it writes beside features (b_dec, a skip) and of the rest of
    the stream add up to the model's own centred logits. A coder at attn_z writes through W_O, and through a norm after
    it if the model has one, with fixed scale. Effects through later layers are left out: see ``circuits.attribution``
    or an ablation for these. With Gemma 2's softcapping the effects are on the logits before the cap (``note``).

    Args:
        coder: an SAE or transcoder that writes to the residual stream, or at attn_z.
        prompt: one prompt, or the result of ``circuits.read_prompt`` for it. position: None: the last token.
        on: the tokens whose logits count: texts of one token each, or ids. None: the prompt's next token, or after the
            last token the model's most likely one.
        n: how many features are listed, None: all; by: the strongest by "activation", or by "effect" (its size) on the
            first target.
        promoted: how many of the tokens that a feature promotes most are named.

    Raises ValueError for a coder at mlp_in or a module's path, which do not lead to the stream directly; a token that
    the coder's mask leaves out, a position that does not exist, targets that are not one token, a model on a server,
    and a model that makes its logits in another way.
    """
    site = written(coder)
    if not reaches_the_stream(site):
        raise ValueError(
            f"direct effects need a coder that writes to the residual stream or at attn_z, this one writes at {site}: "
            "its features reach the output through later layers only"
        )
    if by not in ORDERS:
        raise ValueError(f"by must be 'activation' or 'effect', got {by!r}")
    reading = prompt if isinstance(prompt, PromptReading) else read_prompt(lm, coder, prompt)
    way = reading.way_out()
    position = reading.position(len(reading) - 1 if position is None else position)
    if not bool(reading.codes(coder).keep[0, position]):
        raise ValueError(f"the coder's mask leaves out token {position}, so no feature is active there: take another")
    targets = _targets(lm, reading, way, position, on)
    features, values = reading.active(coder, position)
    vectors, others = _vectors(coder, way, reading, position, features, values)
    W = (way.W_U[targets].float() - way.mean).T
    effects = vectors @ W
    error, bias, rest = (others @ W).cpu()
    order = effects[:, 0].abs().argsort(descending=True, stable=True) if by == "effect" else torch.arange(len(effects))
    shown, hidden = order[:n], order[len(order) if n is None else n :]
    fixed = (way.shift @ W + (0.0 if way.bias is None else way.bias[targets] - way.bias.mean())).cpu()
    rest, scale = rest + fixed, coder.f_scale[features].cpu()[shown]
    logits = (way.normed[position] @ W).cpu() + fixed - (way.shift @ W).cpu()
    left = effects.sum(0).cpu() + error + bias + rest - logits
    off = float(left.abs().max() / way.normed[position].norm().cpu().clamp_min(1e-6))
    if not off < (1e-2 if lm._module.dtype == torch.float32 else 0.1) * float(W.norm(dim=0).max()):
        raise ValueError(
            f"the effects of all parts of the stream do not add up to this model's logits (off by {off:.2g}): direct "
            "effects are not known for it"
        )
    return DirectEffects(
        features=features[shown], values=values[shown], effects=effects[shown].cpu(),
        scaled=torch.where(scale > 0, values[shown] / scale, float("nan")),
        promoted=_promoted(lm, way, vectors[shown], promoted), others=effects[hidden].sum(0).cpu(), error=error,
        bias=bias, rest=rest, logits=logits, targets=targets, names=[label(lm.tokenizer, t) for t in targets],
        active=len(features), position=position, site=site, tokens=reading.tokens,
        note=f"This model caps its logits at ±{way.cap:g}, effects are on those before the cap." if way.cap else "",
        called=Names(coder),
    )  # fmt: skip


def _vectors(
    coder: SparseCoder, way: WayOut, reading: PromptReading, position: int, features: Tensor, values: Tensor
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "3 d"]]:
    """(the features' parts of the stream at a token; the parts of error, bias and rest), as W_U reads them: divided by
    the norms' scales."""
    site = written(coder)
    matrix, scales = way.maps[site]
    device = coder.W_dec.device
    x, there = way.acts[coder.site][position].to(device), way.acts[site][position].to(device)
    with coder.evaluating():
        x_hat = coder(x[None], reading.batch.ids[0, position : position + 1].to(device)).x_hat[0]
    rows = x.expand(len(features), -1)
    parts = coder.write_of(torch.diag(values.to(device)), features.tolist(), rows)
    bias, error = x_hat - parts.sum(0), there - x_hat
    stack = torch.cat([parts, error[None], bias[None], there[None]]).to(matrix) @ matrix / scales[position]
    last = Site("resid_post", reading.lm.n_layers - 1)
    whole = way.stream[position : position + 1] @ way.maps[last][0] / way.scale[position]
    return stack[:-3], torch.cat([stack[-3:-1], whole - stack[-1:]])


def _targets(
    lm: LM, reading: PromptReading, way: WayOut, position: int, on: str | int | Sequence[str | int] | None
) -> list[int]:
    if on is None and position + 1 < len(reading):
        return [int(reading.batch.ids[0, position + 1])]
    if on is None:
        return [int(way.logits(way.normed[position : position + 1])[0].argmax())]
    found = [one_token(lm, one) for one in ([on] if isinstance(on, str | int) else on)]
    if not found:
        raise ValueError("no targets: pass at least one token, or on=None for the prompt's next one")
    return found


def _promoted(lm: LM, way: WayOut, x: Float[Tensor, "n d"], count: int) -> list[list[tuple[str, float]]]:
    """The tokens with the largest effects of each vector."""
    logits = x @ way.W_U.float().T
    best = logits.topk(min(count, logits.shape[1]))
    values = best.values - (x @ way.mean)[:, None]
    names = {i: label(lm.tokenizer, i) for i in set(best.indices.flatten().tolist())}
    pairs = zip(best.indices.tolist(), values.tolist(), strict=True)
    return [[(names[i], v) for i, v in zip(ids, row, strict=True)] for ids, row in pairs]
