"""How much of a prompt's logits the features of an attribution graph keep by themselves."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.circuits.faithfulness import Faithfulness
from sae_lab.circuits.graph_checks import local_of
from sae_lab.circuits.replacement import LocalModel
from sae_lab.saes import kernels
from sae_lab.types import Codes

NEAR = 5  # a control is drawn from so many features of the nearest norms


@torch.no_grad()
def faithfulness(graph: Any, sizes: Sequence[int] | None, errors: bool, draws: int, seed: int) -> Faithfulness:
    """See ``AttributionGraph.faithfulness``."""
    local, count = local_of(graph, "faithfulness"), graph.counts[0]
    usual = [n for n in (4, 16, 64, 256, 1024, 4096) if n < count] + [count] * (count > 0)
    many: list[int] = usual if sizes is None else list(sizes)
    if wrong := [n for n in many if not 0 < n <= count]:
        raise ValueError(f"sizes are numbers of features from 1 to {count}, those of this graph, got {wrong[0]}")
    columns = columns_of(graph, local)
    weights, directions = graph.weights.to(local.embed), graph.directions.to(local.embed)

    def value(kept: Int[Tensor, " some"], errors: bool) -> float:
        x = local.run(_mlp(local, kept, errors), held=False)[local.out][-1]
        return float(weights @ (directions @ x)) / float(weights.sum())

    everything, nothing = torch.arange(len(local.layer)), torch.zeros(0, dtype=torch.long)
    full, empty = value(everything, True), value(nothing, False)
    if abs(full - empty) < 1e-6 * max(abs(full), abs(empty)):
        raise ValueError(f"faithfulness is undefined: the logits are {full:.4g} with no feature or error as with all")

    def share(kept: Int[Tensor, " some"], errors: bool) -> float:
        return (value(kept, errors) - empty) / (full - empty)

    def curve(order: Int[Tensor, " features"], errors: bool = errors) -> tuple[float, ...]:
        return tuple(share(columns[order[:n]], errors) for n in many)

    best = graph.influence[:count].argsort(descending=True)
    generator, norms = torch.Generator().manual_seed(seed), norms_of(local)
    picks = [[matched(local, columns[best[:n]], norms, generator) for n in many] for _ in range(draws)]
    enough = [[len(pick) == n for pick, n in zip(some, many, strict=True)] for some in picks]
    drawn = [[share(pick, errors) for pick in some] for some in picks]
    others = np.where(enough, drawn, np.nan)
    gradient = _by_gradient(graph)
    return Faithfulness(
        full=full, empty=empty, complete=value(everything, True), sizes=tuple(many), circuit=curve(best),
        no_errors=curve(best, errors=False), random=tuple(others.mean(0).tolist()),
        random_sd=tuple(others.std(0).tolist()), draws=draws,
        all_features=share(everything, False), all_errors=share(nothing, True),
        activation=curve(norms[columns].argsort(descending=True)),
        gradient=() if gradient is None else curve(gradient.argsort(descending=True)),
    )  # fmt: skip


def columns_of(graph: Any, local: LocalModel) -> Int[Tensor, " features"]:
    """The graph's features among all active ones."""
    listed = zip(local.layer.tolist(), local.position.tolist(), local.feature.tolist(), strict=True)
    own = {place: i for i, place in enumerate(listed)}
    return torch.tensor([own[tuple(place)] for place in graph.places[: graph.counts[0]].tolist()], dtype=torch.long)


def norms_of(local: LocalModel) -> Float[Tensor, " active"]:
    """Of each active feature, the norm of what it writes to its own layer."""
    found = torch.zeros(len(local.layer))
    for layer in local.layer.unique().tolist():
        here = local.layer == layer
        found[here] = local.coders.written(layer, layer, local.feature[here], local.value[here]).norm(dim=1).cpu()
    return found


def matched(
    local: LocalModel, chosen: Int[Tensor, " some"], norms: Tensor, generator: torch.Generator
) -> Int[Tensor, " others"]:
    """As many other features, or fewer where a layer has no more: each at the same layer and position as one of the
    chosen, or, where none is left, in the same layer, and of a near norm."""
    free = torch.ones(len(norms), dtype=torch.bool)
    free[chosen] = False
    found = []
    for i in chosen.tolist():
        layer = free & (local.layer == local.layer[i]).cpu()
        here = layer & (local.position == local.position[i]).cpu()
        left = (here if here.any() else layer).nonzero()[:, 0]
        if len(left):
            near = left[(norms[left] - norms[i]).abs().argsort()[:NEAR]]
            found.append(int(near[torch.randint(len(near), (1,), generator=generator)]))
            free[found[-1]] = False
    return torch.tensor(found, dtype=torch.long)


def _by_gradient(graph: Any) -> Float[Tensor, " features"] | None:
    """|f·gradient| of the logits, attention and norms held, along all paths through the graph's features."""
    features = graph.counts[0]
    if not graph.local.coders.linear or not torch.allclose(graph.values[:features], graph.pre[:features], rtol=1e-3):
        return None  # a unit of the code is no unit of what it reads
    per_unit = graph.effects[:, :features] / graph.values[:features].clamp_min(1e-12)
    ends = (graph.weights @ per_unit[features:])[:, None]
    between = torch.eye(features) - per_unit[:features]
    return (torch.linalg.solve_triangular(between.T, ends, upper=True)[:, 0] * graph.values[:features]).abs()


def _mlp(local: LocalModel, kept: Int[Tensor, " some"], errors: bool) -> Callable[[int, Tensor, Tensor | None], Tensor]:
    """MLPs of which only these features stay, and the errors or not. Codes and errors are those of the run itself: if
    all stay, nothing changes. A token without features (the mask leaves it out) keeps its whole MLP."""
    made: dict[int, Codes] = {}
    stays: dict[int, Codes] = {}

    def mlp(layer: int, x: Tensor, read: Tensor | None) -> Tensor:
        part = local.parts[layer]
        if read is None:
            return x if errors else torch.zeros_like(x)
        coder = local._plain(layer)
        codes = coder.encode(read.to(coder.W_dec.device)).to(read) * part.fires[:, None]
        made[layer] = kernels.where(codes, codes > 0)
        stays[layer] = kernels.where(codes, codes.gt(0) & _flags(local, kept, layer, codes))
        whole, own = local._written(layer, made), local._written(layer, stays)
        rest = x - whole - local._skipped(layer, read, part.open) - part.fixed
        return x - (whole - own) - (0.0 if errors else rest * part.open[:, None])

    return mlp


def _flags(local: LocalModel, kept: Tensor, layer: int, codes: Tensor) -> Bool[Tensor, "pos d_sae"]:
    flags = torch.zeros(codes.shape, dtype=torch.bool, device=codes.device)
    here = kept[(local.layer[kept] == layer).cpu()]
    flags[local.position[here], local.feature[here]] = True
    return flags
