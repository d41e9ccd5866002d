"""Prompts paired with their sources, and the checks that the functions of ``circuits`` share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.circuits.metric import Metric, numbers, of_metric
from sae_lab.lm.model import LM
from sae_lab.lm.network import Network
from sae_lab.lm.tokens import Prompt, Texts
from sae_lab.nets.inputs import Call, InputBatch
from sae_lab.results import counted
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch

Acts = Mapping[Site, Tensor]


class Runs(NamedTuple):
    """The model's runs on prompts and on their sources: tokens, activations at some sites, the metric's mean.

    batch, x, base: those of the prompts. theirs, given, source: those of the sources.
    """

    batch: TokenBatch
    theirs: TokenBatch
    x: dict[Site, Tensor]
    given: dict[Site, Tensor]
    base: float
    source: float


def both_runs(lm: Network, prompts: Any, sources: Any, metric: Metric, at: Sequence[Site] = ()) -> Runs:
    """One pass over the prompts and one over their sources. ValueError as ``paired``, and for a metric that does not
    give one number a row."""
    batch, theirs = paired(lm, prompts, sources) if isinstance(lm, LM) else _same_form(lm, prompts, sources, at[0])
    acts, means = [], []
    for one in (batch, theirs):
        read, values = lm.run(one, list(at), logits=partial(of_metric, metric=metric))
        acts.append(read)
        means.append(float(numbers(values, one).float().mean()))
    return Runs(batch, theirs, *acts, *means)


def paired(lm: LM, prompts: Texts, sources: Texts) -> tuple[TokenBatch, TokenBatch]:
    """Prompts and sources as tokens. ValueError unless they are equal in number and all of one length."""
    if len(prompts) != len(sources) or not prompts:
        raise ValueError(
            "give one source for each prompt: got "
            f"{counted(len(prompts), 'prompt')} and {counted(len(sources), 'source')}"
        )
    lengths = [len(lm.tokenize(p).ids[0]) for p in [*prompts, *sources]]
    if odd := [i for i, n in enumerate(lengths) if n != lengths[0]]:
        which = f"prompt {odd[0]}" if odd[0] < len(prompts) else f"source {odd[0] - len(prompts)}"
        raise ValueError(
            f"patching needs prompts of equal token lengths, since a patch goes to the same position: prompt 0 has "
            f"{lengths[0]}, {which} has {lengths[odd[0]]} (lm.tokens(prompt) shows them)"
        )
    return lm.tokenize(prompts), lm.tokenize(sources)


def _same_form(net: Network, inputs: Any, sources: Any, site: Site) -> tuple[TokenBatch, TokenBatch]:
    """Inputs of a network and their sources. ValueError unless they have as many rows and places."""
    batch, theirs = net._batch(inputs, site), net._batch(sources, site)
    if batch.ids.shape != theirs.ids.shape:
        raise ValueError(
            f"give one source for each input, of its shape: at {site} the inputs have (batch, places) "
            f"{tuple(batch.ids.shape)}, the sources {tuple(theirs.ids.shape)}"
        )
    return batch, theirs


def copied(batch: TokenBatch, times: int) -> TokenBatch:
    """The batch several times over; copies keep their rows' numbers."""
    ids, mask, positions = (t.repeat(times, 1) for t in (batch.ids, batch.mask, batch.positions))
    rows = batch.row_numbers.repeat(times)
    if not isinstance(batch, InputBatch):
        return TokenBatch(ids, mask, positions, rows=rows)
    call = Call(batch.args, batch.kwargs).mapped(lambda t: torch.cat([t] * times))
    return replace(batch, ids=ids, mask=mask, positions=positions, rows=rows, args=call.args, kwargs=call.kwargs)


@as_annotated
def aligned_tokens(lm: LM, prompt: Prompt, source: Prompt) -> list[tuple[str | None, str | None]]:
    """``aligned_tokens(lm, prompt, source)``: the tokens of two texts, or two chats, side by side, as difflib matches
    them.

    Equal tokens share a pair; a token without a partner is paired with None.
    """
    ours, theirs = lm.tokens(prompt), lm.tokens(source)
    pairs: list[tuple[str | None, str | None]] = []
    matcher = SequenceMatcher(None, [t.id for t in ours], [t.id for t in theirs], autojunk=False)
    for _, i1, i2, j1, j2 in matcher.get_opcodes():
        pairs += zip_longest((t.label for t in ours[i1:i2]), (t.label for t in theirs[j1:j2]))
    return pairs


def require_together(lm: Network, coders: Sequence[SparseCoder]) -> None:
    """ValueError unless the coders lie on the model's device, as what computes with both at once needs."""
    for coder in coders:
        if coder.b_dec.device != lm.device:
            raise ValueError(
                f"this works on one device, and the coder lies on {coder.b_dec.device}, the model's activations on "
                f"{lm.device}: move the coder there with sae.to({str(lm.device)!r})"
            )


def kept(lm: Network, coders: Sequence[SparseCoder], *runs: tuple[TokenBatch, Acts]) -> Bool[Tensor, "batch pos"]:
    """The real tokens that no coder's mask leaves out at any site in any of these runs. ValueError if none is left, and
    for a coder on another device than the model's."""
    require_together(lm, coders)
    masks = [coder.mask or lm.mask() for coder in coders]
    keep = runs[0][0].mask.clone()
    for batch, acts in runs:
        for mask in masks:
            keep &= mask.of(batch, {s: x.cpu() for s, x in acts.items()})
    if not keep.any():
        raise ValueError(
            f"the coders' masks leave out every token of these prompts ({'; '.join(dict.fromkeys(map(str, masks)))}): "
            "give others"
        )
    return keep


def check_positions(positions: Sequence[int], length: int) -> None:
    """ValueError for a position that the prompts do not have."""
    if beyond := [p for p in positions if not 0 <= p < length]:
        raise ValueError(f"position {beyond[0]} is beyond the prompts, which have {counted(length, 'token')}")


def require_here(lm: LM, what: str) -> None:
    """ValueError for a model on a server. what: the function that needs weights, or gradients at several sites."""
    if lm.remote:
        raise ValueError(f"{what} needs the model on this machine: load it without remote=")


def require_sae(coder: SparseCoder, method: str = "attribution", name: str = "this one") -> None:
    """ValueError for a coder that does not reconstruct the one site that it reads."""
    if coder.transcodes or len(coder.reads) > 1 or (coder.writes and coder.writes != coder.reads):
        raise ValueError(
            f"{method} takes a coder that writes where it reads, an SAE of one site; {name} is a "
            f"{type(coder).__name__} that reads {coder.reads} and writes {coder.writes}: take an SAE at one of them"
        )


def require_linear(coder: SparseCoder, method: str, name: str = "this one") -> None:
    """ValueError for a coder that normalises what it reads: its codes are not linear in it."""
    if coder.input_norm != "none":
        raise ValueError(
            f"{method} needs pre-activations that are linear in what the coder reads; {name} has input_norm="
            f"{coder.input_norm!r}, which rescales each token: take a coder with input_norm='none'"
        )
