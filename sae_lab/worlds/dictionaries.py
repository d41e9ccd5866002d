"""Planted dictionaries: sparse sums of chosen directions."""

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.activations.world import World
from sae_lab.arguments import as_annotated, check_least
from sae_lab.types import Codes

Law = Literal["uniform", "zipf"]
LAWS: tuple[str, ...] = get_args(Law)

TAG = 0x504C414E54  # part of every world's seed: a coder of the same seed must not start from the world's dictionary
MAX_PROBABILITY = 0.5  # of a feature under the zipf law: one that nearly always fires is a bias, not a feature
MAGNITUDES = (0.5, 1.5)
_CHUNK = 8192  # rows made at once


@as_annotated
def planted(
    n: int = 128, d: int = 64, l0: float = 4.0, *, law: str = "uniform", correlation: float = 0.0, group: int = 2,
    hierarchy: int = 0, noise: float = 0.0, samples: int = 200_000, exponent: float = 1.2, seed: int = 0,
) -> World:  # fmt: skip
    """``sl.worlds.planted(n=128, d=64, l0=4)``: sparse sums of known random directions, x = Σᵢ fᵢ·dᵢ + noise.

    Feature i fires in a row with probability pᵢ, so that the count per row varies around ``l0 = Σ pᵢ``. Where it fires,
    fᵢ is uniform on [0.5, 1.5]. Directions dᵢ are random unit vectors; with n > d they overlap (superposition).

    Args:
        n, d: features and dimensions.
        l0: expected number of active features per row.
        law: "uniform": all p equal. "zipf": pᵢ ∝ rank^-``exponent``, none above 0.5 (the other features get what the
            cap cuts off), as in the ordered worlds of Wang et al. 2025 (arXiv:2512.02194).
        correlation: features fire together, ``group`` at a time: those of neighbouring rank share a Gaussian factor. A
            feature fires where √ρ·factor + √(1-ρ)·own > Φ⁻¹(1-p), so that each keeps its p. ρ is the correlation of
            these Gaussians; that of the firings is smaller.
        hierarchy: children per parent, 0 for none. n // (1 + hierarchy) features are parents; a child fires only where
            its parent does, and there with probability 1/(1 + hierarchy), independently of its siblings. Law and
            correlation are then those of the features without a parent.
        noise: standard deviation of Gaussian noise in every coordinate, in units of the root mean square coordinate of
            the clean x: noise² is noise energy over signal energy.
        samples: rows. seed: dictionary, firings, magnitudes and noise have separate streams, so that worlds which
            differ in noise only share all else.

    Raises ValueError for settings out of range, with what is possible.
    """
    settings = dict(locals())
    check_least(1, n=n, d=d, samples=samples)
    check_least(2, group=group)
    check_least(0, hierarchy=hierarchy, noise=noise, exponent=exponent)
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}; known: {', '.join(LAWS)}")
    if not 0 < l0 <= n:
        raise ValueError(f"l0 must be above 0 and at most n={n}, the number of features, got {l0}")
    if not 0 <= correlation < 1:
        raise ValueError(f"correlation must be from 0 to below 1, got {correlation}: 0 is independent features")
    if infinite := [name for name in ("noise", "exponent") if math.isinf(settings[name])]:
        raise ValueError(f"{infinite[0]} must be finite, got inf")
    if n < 1 + hierarchy:
        raise ValueError(f"hierarchy={hierarchy} children need a parent: n must be at least {1 + hierarchy}, got {n}")
    parents = n // (1 + hierarchy)
    roots = n - parents * hierarchy  # those without a parent come first
    if correlation and roots < group:
        raise ValueError(f"group must be at most {roots}, how many features have no parent, got {group}: lower group")
    parent = np.concatenate([np.full(roots, -1), np.repeat(np.arange(parents), hierarchy)]).astype(np.int64)
    probability, parent, groups = _rank(_root_probabilities(roots, parents, settings), parent, settings)
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence([TAG, seed]).spawn(4)]
    dictionary = _directions(streams[0], n, d)
    codes = _codes(probability, parent, groups, settings, streams[1], streams[2])
    x = _mix(codes, dictionary)
    if noise:
        scale = noise * float(x.pow(2).mean(dtype=torch.float64)) ** 0.5
        for rows in x.split(_CHUNK):
            rows += scale * torch.from_numpy(streams[3].standard_normal(rows.shape, dtype=np.float32))
    labels = {name: torch.from_numpy(of) for name, of in (("parent", parent), ("group", groups))}
    labels["probability"] = torch.from_numpy(probability).float()
    return World(x, codes, dictionary, labels, len(codes.values) / samples, settings)


@as_annotated
def product(values: tuple[int, ...] = (8, 8), d: int = 64, *, samples: int = 200_000, seed: int = 0) -> World:
    """``sl.worlds.product((8, 8))``: things with attributes, such as coloured shapes.

    In each row every attribute has one of its values, equally likely and independent of the other attributes:
    x = Σ_a f_a·d_(a, v_a), sizes f and directions as in ``planted``. The truth is Σ values features, of which one an
    attribute fires; a coder with one feature a row must learn the Π values combinations (after "Sparse autoencoders
    find composed features in small toy models", Anders et al. 2024, LessWrong).

    Args: values: how many, of each attribute. labels["attribute"]: the attribute of each feature.

    Raises ValueError for fewer than two attributes, or one with a single value.
    """
    if len(values) < 2 or min(values) < 2:
        raise ValueError(f"values must be two numbers or more, each at least 2, got {values}: try (8, 8)")
    n = sum(values)
    settings = {"values": tuple(values), "d": d, "samples": samples, "seed": seed}
    check_least(1, d=d, samples=samples)
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence([TAG, seed, len(values)]).spawn(3)]
    dictionary = _directions(streams[0], n, d)
    starts = np.cumsum([0, *values[:-1]])
    features = starts + streams[1].integers(0, values, (samples, len(values)))
    sizes = streams[2].uniform(*MAGNITUDES, features.shape).astype(np.float32)
    offsets = torch.arange(0, samples * len(values) + 1, len(values))
    codes = Codes(torch.from_numpy(sizes.ravel()), torch.from_numpy(features.ravel()), offsets, n)
    none = torch.full((n,), -1)
    labels = {
        "probability": torch.tensor([1 / v for v in values for _ in range(v)]), "parent": none, "group": none,
        "attribute": torch.arange(len(values)).repeat_interleave(torch.tensor(values)),
    }  # fmt: skip
    return World(_mix(codes, dictionary), codes, dictionary, labels, float(len(values)), settings)


def _directions(stream: np.random.Generator, n: int, d: int) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(torch.from_numpy(stream.standard_normal((n, d), dtype=np.float32)), dim=1)


def _root_probabilities(roots: int, parents: int, s: dict[str, Any]) -> np.ndarray:
    """Probabilities of the features without a parent, so that with their children they sum to l0."""
    h = s["hierarchy"]
    count = np.ones(roots)  # features that one firing of each brings on average, its children among them
    count[:parents] += h / (1 + h)
    exponent, cap = (0.0, 1.0) if s["law"] == "uniform" else (s["exponent"], MAX_PROBABILITY)
    weight = np.arange(1, roots + 1.0) ** -exponent
    most = cap * count.sum()
    if s["l0"] > most * (1 + 1e-9):
        why = f"no feature fires in more than {cap:.0%} of rows under the {s['law']} law"
        why += f", and a child in 1 of {1 + h} of its parent's" if h else ""
        raise ValueError(f"l0 must be at most {most:.4g} here ({why}), got {s['l0']}: lower l0 or raise n")
    probability, capped = np.zeros(roots), np.zeros(roots, bool)
    while not capped.all():  # what the cap takes goes to the rest, which may reach the cap in turn
        left = s["l0"] - (cap * count[capped]).sum()
        probability = np.where(capped, cap, weight * left / (weight * count)[~capped].sum())
        above = ~capped & (probability > cap)
        if not above.any():
            break
        capped |= above
    return probability.clip(0, cap)


def _rank(root: np.ndarray, parent: np.ndarray, s: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(probability, parent, group) of all features, in descending order of probability."""
    probability = np.concatenate([root, root[parent[len(root) :]] / (1 + s["hierarchy"])])
    groups = np.full(len(probability), -1)
    if s["correlation"]:
        whole = len(root) // s["group"] * s["group"]  # a rest too small for a group stays independent
        groups[:whole] = np.arange(whole) // s["group"]
    order = np.argsort(-probability, kind="stable")
    place = np.argsort(order)
    parent = np.where(parent >= 0, place[parent], -1)
    return probability[order], parent[order], groups[order]


def _codes(
    probability: np.ndarray, parent: np.ndarray, groups: np.ndarray, s: dict[str, Any],
    firing: np.random.Generator, sizes: np.random.Generator,
) -> Codes:  # fmt: skip
    """The codes of all rows, made in chunks: no matrix of samples × n is ever held."""
    child = np.flatnonzero(parent >= 0)
    chance = probability.copy()
    chance[child] = 1 / (1 + s["hierarchy"])
    bar = torch.special.ndtri(torch.from_numpy(1 - chance)).numpy().astype(np.float32)
    grouped = np.flatnonzero(groups >= 0)
    own, shared = np.float32(math.sqrt(1 - s["correlation"])), np.float32(math.sqrt(s["correlation"]))
    features, counts = [], []
    for start in range(0, s["samples"], _CHUNK):
        rows = min(_CHUNK, s["samples"] - start)
        if s["correlation"]:
            latent = firing.standard_normal((rows, len(chance)), dtype=np.float32)
            factor = firing.standard_normal((rows, groups.max() + 1), dtype=np.float32)
            latent[:, grouped] = own * latent[:, grouped] + shared * factor[:, groups[grouped]]
            fires = latent > bar
        else:
            fires = firing.random((rows, len(chance)), dtype=np.float32) < chance.astype(np.float32)
        fires[:, child] &= fires[:, parent[child]]
        counts.append(fires.sum(1))
        features.append(np.nonzero(fires)[1])
    every = np.concatenate(features)
    low, high = MAGNITUDES
    values = low + (high - low) * sizes.random(len(every), dtype=np.float32)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return Codes(torch.from_numpy(values), torch.from_numpy(every), torch.from_numpy(offsets), len(chance))


def _mix(codes: Codes, dictionary: Tensor) -> Float[Tensor, "samples d"]:
    """codes · dictionary, a chunk of rows at a time."""
    x = torch.empty(len(codes.offsets) - 1, dictionary.shape[1])
    for start in range(0, len(x), _CHUNK):
        offsets = codes.offsets[start : start + _CHUNK + 1]
        here = slice(int(offsets[0]), int(offsets[-1]))
        part = Codes(codes.values[here], codes.features[here], offsets - offsets[0], codes.d_sae)
        torch.mm(part.dense(), dictionary, out=x[start : start + len(offsets) - 1])
    return x
