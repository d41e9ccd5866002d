"""Faithfulness of circuits: how much of the model's metric a circuit alone keeps."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_lab.circuits.metric import Metric, measured
from sae_lab.circuits.nodes import ERROR, Node, Scene
from sae_lab.results import Result, result
from sae_lab.types import Site, Write

Kept = dict[Site, tuple[Tensor, Tensor]]  # which features "pos d_sae" and errors " pos" belong to the circuit


@result
class Faithfulness(Result):
    """``circuit.faithfulness``, ``graph.faithfulness()``: how much of the metric circuits of growing size keep,

        (m(C) - m(∅)) / (m(M) - m(∅)),   m the mean over prompts.

    C runs with every node outside it, errors included, at the node's mean; ∅ has all nodes at their means; M is the
    model. The table has a row for each size, and rows for the empty circuit (0 by definition) and the complete graph.
    Of an attribution graph, whose prompt is one: at 0 in place of the mean, and m are the logits, weighted as there.

    Attributes:
        full, empty: m(M) and m(∅). complete: m of the complete graph, run as a circuit.
        sizes: numbers of nodes, the strongest first. circuit, no_errors: faithfulness of those nodes, and of the
            features among them.
        random, random_sd: of equal numbers of active nodes drawn at random: mean and standard deviation over ``draws``.
        all_features, all_errors: of all features without an error, and of all errors without a feature.
        activation, gradient: of an attribution graph: of equal numbers of features with the largest writes, and with
            the largest f·gradient; () where they were not measured.
    """

    full: float
    empty: float
    complete: float
    sizes: tuple[int, ...]
    circuit: tuple[float, ...]
    no_errors: tuple[float, ...]
    random: tuple[float, ...]
    random_sd: tuple[float, ...]
    draws: int
    all_features: float
    all_errors: float
    activation: tuple[float, ...] = ()
    gradient: tuple[float, ...] = ()

    _records = "_curve"
    _above = (
        "faithfulness: metric {full:.3f} of the model = 1, {empty:.3f} without all nodes = 0; "
        "all errors without a feature: {all_errors:.3f}"
    )

    @property
    def _curve(self) -> dict[str, list[Any]]:
        whole, nan = (self.complete - self.empty) / (self.full - self.empty), float("nan")
        more = {"activation": self.activation, "gradient": self.gradient}
        return {
            "nodes": ["0", *map(str, self.sizes), "all"],
            "circuit": [0.0, *self.circuit, whole],
            "no_errors": [0.0, *self.no_errors, self.all_features],
            "random": [nan, *self.random, nan],
            "random_sd": [nan, *self.random_sd, nan],
            **{name: [0.0, *values, nan] for name, values in more.items() if values},
        }


def faithfulness(
    scene: Scene, nodes: Sequence[Node], metric: Metric, full: float, sizes: Sequence[int], draws: int, seed: int
) -> Faithfulness:
    """Faithfulness of circuits of the first n nodes, for each n of sizes, and of their controls. full: m(M)."""

    def value(stays: Kept) -> float:
        return float(measured(scene.lm, scene.batch, metric, _writes(scene, stays)).mean())

    empty = value(_kept(scene, ()))
    if abs(full - empty) < 1e-6 * max(abs(full), abs(empty)):
        raise ValueError(
            f"faithfulness is undefined: the metric is {full:.4g} with everything at its mean as without; take sites "
            "and prompts on which the answer depends, or sizes=()"
        )

    def share(stays: Kept) -> float:
        return (value(stays) - empty) / (full - empty)

    generator = torch.Generator().manual_seed(seed)
    circuit = [share(_kept(scene, nodes[:size])) for size in sizes]
    bare = [share(_kept(scene, [node for node in nodes[:size] if node.feature != ERROR])) for size in sizes]
    picks = [[torch.randperm(len(nodes), generator=generator)[:size].tolist() for _ in range(draws)] for size in sizes]
    drawn = np.array([[share(_kept(scene, [nodes[i] for i in pick])) for pick in some] for some in picks])
    return Faithfulness(
        full=full, empty=empty, complete=value(_everything(scene)), sizes=tuple(sizes), circuit=tuple(circuit),
        no_errors=tuple(bare), random=tuple(drawn.mean(1).tolist()), random_sd=tuple(drawn.std(1).tolist()),
        draws=draws, all_features=share(_everything(scene, errors=False)),
        all_errors=share(_everything(scene, features=False)),
    )  # fmt: skip


def _kept(scene: Scene, nodes: Collection[Node]) -> Kept:
    stays = _everything(scene, features=False, errors=False)
    for s, position, feature in nodes:
        features, errors = stays[s]
        if feature == ERROR:
            errors[position] = True
        else:
            features[position, feature] = True
    return stays


def _everything(scene: Scene, features: bool = True, errors: bool = True) -> Kept:
    flags = partial(torch.full_like, dtype=torch.bool)
    return {s: (flags(part.z, features), flags(part.error[:, 0], errors)) for s, part in scene.means.items()}


def _writes(scene: Scene, stays: Kept) -> list[Write]:
    """At every site: x + (mean codes - codes)·W_dec outside the circuit + (mean error - error) outside it.

    Codes and errors are those of the activation in the circuit's run, so that a node's value follows from the circuit
    before it. If all nodes stay, nothing is added and x is bit-equal.
    """

    def write(x: Tensor, tokens: Any, at: Site) -> Tensor:
        features, errors = stays[at]
        out, mean = scene.coders[at](x, tokens.ids.to(x.device)), scene.means[at]
        codes = (mean.z - out.f).masked_fill(features, 0.0)
        wrong = (mean.error - (x.float() - out.x_hat)).masked_fill(errors.unsqueeze(-1), 0.0)
        added = (codes @ scene.coders[at].W_dec + wrong) * scene.keep.unsqueeze(-1).to(wrong)
        return x + added.to(x)

    return [Write(s, partial(write, at=s)) for s in scene.coders]
