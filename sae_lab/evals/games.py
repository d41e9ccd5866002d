"""Board games: does a coder find the board that a model of game transcripts tracks? (Karvonen et al. 2024,
arXiv:2408.00113)."""

import copy
import math
from dataclasses import field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.evals.sampling import by_content
from sae_lab.lm.model import LM
from sae_lab.results import Figure, Result, figure, filled, result
from sae_lab.saes import kernels
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import area, clustered_error, f1, jackknife, sparse_ranks
from sae_lab.types import Codes, Site, TokenBatch, TokenMask
from sae_lab.worlds.boards import Games, board_properties, square_name

OTHELLO_GPT = Path(__file__).parent.parent / "data" / "othello-6x6"  # made by benchmarks/othello.py
STATE, DISCS = ("mine", "theirs", "empty"), ("mine", "theirs")
LEVELS = 10  # thresholds: 0, .1 ... .9 of a feature's maximum
PRECISION = 0.95
LEAST_FIRINGS = 10  # on training positions; precision over fewer is too noisy
LEAST_CASES = 20  # of a property, and of its opposite, in either half of the games
AUROC = 0.9
_FROM_PRECISE = f"F1 of boards from features of precision {PRECISION}"
_OF_STATE = "of {of_state} properties (mine, theirs, empty)"
_FOLDS = 20
_GAMES_AT_ONCE = 64


@result
class BoardScores(Result):
    """How well one set of features tells boards.

    Attributes:
        features: how many features fire at all on training positions; l0: how many fire at one position.
        coverage: the best feature's test F1, mean over mine/theirs/empty of every square; ``coverage_se``: jackknife
            over 20 groups of test games. legal: the same mean over legal moves.
        above: properties (mine/theirs/empty) for which the best feature's test AUROC is above .9.
        reconstruction: F1 of test boards (mine and theirs) put together from features of high precision;
            ``reconstruction_se``: clustered by game. precise: how many features have a property with high precision.
        best, threshold, f1: for each property the feature that is best on training positions, its threshold (share of
            its maximum there) and its test F1. auroc_best, auroc: the feature of best training AUROC, its test AUROC.
        of_state: how many properties are mine/theirs/empty.
    """

    features: int
    l0: float
    coverage: float = figure("coverage", f"mean best F1 {_OF_STATE}", best="high")
    coverage_se: float
    legal: float = figure("coverage, legal", "mean best F1 of legal moves", best="high")
    above: int = figure(f"AUROC > {AUROC}", _OF_STATE, best="high", digits=0)
    reconstruction: float = figure("reconstruction", _FROM_PRECISE, best="high")
    reconstruction_se: float
    precise: int
    of_state: int = field(repr=False)
    best: np.ndarray = field(repr=False, compare=False)
    threshold: np.ndarray = field(repr=False, compare=False)
    f1: np.ndarray = field(repr=False, compare=False)
    auroc_best: np.ndarray = field(repr=False, compare=False)
    auroc: np.ndarray = field(repr=False, compare=False)


@result
class BoardGames(Result):
    """Result of ``sl.evals.board_games``.

    Attributes:
        coder: the scores of the coder's features. controls: the scores of "untrained" (a coder of a model with random
            weights, if one was given), "neurons" (of the MLP of the same block), "basis" (coordinates of the
            activations, either sign), "probe" (one linear probe for each property: a ceiling, the information in the
            activations) and "shuffled" (the coder's features, with boards of other games at the same move: what the
            move number alone predicts).
        always: coverage of a feature that is always on.
        properties: names of the properties; of_state: which of them are mine/theirs/empty. dropped: how many were too
            rare or too common to measure.
        positions, games: their numbers; half serve to choose features. excluded: share of positions outside the mask.
    """

    coder: BoardScores
    controls: dict[str, BoardScores]
    always: float
    properties: tuple[str, ...] = field(repr=False)
    of_state: int
    dropped: int
    positions: int
    games: int
    excluded: float
    mask: str

    @property
    def coverage(self) -> float:
        """The coder's coverage of mine/theirs/empty."""
        return self.coder.coverage

    @property
    def above(self) -> int:
        """Properties that one of the coder's features tells with AUROC > .9."""
        return self.coder.above

    @property
    def reconstruction(self) -> float:
        """F1 of boards put together from the coder's features of high precision."""
        return self.coder.reconstruction

    def figures(self) -> list[Figure]:
        said = {"untrained": "of an untrained model", "shuffled": "of other games' boards"}
        name = next(name for name in said if name in self.controls)
        both = zip(self.coder.figures(), self.controls[name].figures(), strict=True)
        return [own._replace(control=other.value, control_name=said[name]) for own, other in both]

    @property
    def _sets(self) -> dict[str, BoardScores]:
        return {"coder": self.coder, **self.controls}

    _records = "_sets"

    def by_property(self):
        """One row per property: the coder's best feature, with threshold and test F1; its feature of best AUROC, with
        that AUROC; the test F1 of each control's best feature."""
        import pandas as pd

        own = self.coder
        table = {"property": self.properties, "feature": own.best, "threshold": own.threshold, "f1": own.f1}
        table |= {"auroc_feature": own.auroc_best, "auroc": own.auroc}
        return pd.DataFrame(table | {f"f1_{name}": s.f1 for name, s in self.controls.items()})

    _columns = {  # noqa: RUF012
        "": "{index}", "coverage": "{coverage:.3f} ± {coverage_se:.3f}", "of legal moves": "{legal:.3f}",
        f"AUROC > {AUROC}": "{above:.0f}", "reconstruction": "{reconstruction:.3f} ± {reconstruction_se:.3f}",
        "features": "{features:,.0f}", "L0": "{l0:.1f}",
    }  # fmt: skip
    _below = (
        "always on: coverage {always:.3f}; AUROC of {of_state} properties; {positions:,} positions of {games:,} games, "
        "chosen on one half, measured on the other{_dropped}; {excluded:.1%} of positions {mask}"
    )

    @property
    def _dropped(self) -> str:
        return filled("; {dropped} properties too rare or too common", self) * (self.dropped > 0)


@as_annotated
@torch.no_grad()
def board_games(
    coder: SparseCoder, lm: LM, games: Games, *, untrained: tuple[SparseCoder, LM] | None = None, seed: int = 0
) -> BoardGames:
    """``sl.evals.board_games(sae, lm, games)``: how well features tell the board: coverage, AUROC, reconstruction.

    A classifier is a feature and a threshold t of 0, .1 ... .9: on where f > t·max f. Coverage is the mean over
    properties of the largest F1 of any classifier. The reconstruction predicts a property where any classifier is on
    whose precision for it is at least .95; F1 is taken over each board (mine and theirs of all
    squares), then averaged. Maxima, classifiers and precisions are found on the first half of the games, all scores
    on the other half; the paper takes the largest F1 on the positions it is measured on.

    Positions are those after a move and before another, boards as the next player sees them. Precision needs 10 firings
    or more.

    Controls: MLP neurons of the same block (models with ``h.N.mlp.act``, else none), coordinates of the activations
    themselves, boards of other games at the same move, and, if given, a coder trained on a model with random weights.
    A feature that is always on has an F1 of 2p/(1 + p) for a property of probability p; dense features reach about
    that, sparse ones may score lower.

    Args:
        games: held out from the model's training and the coder's: ``sl.worlds.othello(6, games=600, seed=1)``.
        untrained: (coder, model): the same family, trained on ``untrained_twin(lm)``.
        seed: of the shuffling.

    Raises ValueError for a model whose tokenizer has not one token for every square, and for too few games.
    """
    if len(games) < 40:
        raise ValueError(f"board_games needs 40 games or more, half of them to choose features on, got {len(games)}")
    site, mask = coder.site, coder.mask or lm.mask()
    path = f"transformer.h.{site.layer}.mlp.act"  # its output: the block's neurons, in models like GPT-2
    has_neurons = site.layer is not None and any(name == path for name, _ in lm._module.named_modules())
    neurons = [Site(path)] if has_neurons else []
    read = _read(lm, [site, *neurons], games, mask)
    x, which = read.acts[site], read.which
    labels, names = board_properties(games)
    labels, train = labels[which], read.game < len(games) // 2
    kept = _measurable(labels, train)
    names = [names[i] for i in np.flatnonzero(kept)]
    data = _Data(labels[:, kept], train, read.game, np.array([name.split()[0] for name in names]))
    codes = coder.codes_of(x, strengths=True)
    controls = {}
    if untrained is not None:  # on the same positions, whatever that coder's mask leaves out
        other, its_lm = untrained
        its = _read(its_lm, [other.site], games, TokenMask())
        its_x = its.acts[other.site][torch.from_numpy(which[its.which])]
        controls["untrained"] = _score(other.codes_of(its_x, strengths=True), data)
    if neurons:
        controls["neurons"] = _score(_positive(read.acts[neurons[0]], train), data)
    controls["basis"] = _score(_positive(torch.cat([x, -x], 1), train), data)
    controls["probe"] = _score(_positive(_probed(x, data), train), data)
    controls["shuffled"] = _score(codes, _shuffled(data, read.move, seed))
    of_state = np.isin(data.kinds, STATE)
    true = data.labels[~train].sum(0)
    return BoardGames(
        coder=_score(codes, data),
        controls=controls,
        always=float(f1(true, (~train).sum(), true)[of_state].mean()),
        properties=tuple(names),
        of_state=int(of_state.sum()),
        dropped=int((~kept).sum()),
        positions=len(train),
        games=len(games),
        excluded=1 - len(train) / int(games.going_on.sum()),
        mask=str(mask),
    )


def othello_gpt() -> LM:
    """The Othello-GPT that comes with the library: three layers of width 128, one token a move of 6x6 Othello."""
    return LM(str(OTHELLO_GPT))


@as_annotated
def untrained_twin(lm: LM, seed: int = 0) -> LM:
    """A model of the same architecture and tokenizer with random weights: a control for what the model has learnt."""
    module: Any = lm._module
    config = copy.deepcopy(module.config)
    config._name_or_path = f"untrained-{seed}-{Path(lm.id).name}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = type(module)(config)
    return LM(twin.to(lm.device).eval(), tokenizer=lm.tokenizer, prefix=lm.prefix_id)


class _Read(NamedTuple):
    acts: dict[Site, Tensor]
    which: np.ndarray  # "games length", True at the positions read, whose order is that of rows
    game: np.ndarray
    move: np.ndarray


def game_batch(lm: LM, games: Games) -> TokenBatch:
    """Games as the model reads them: the prefix, then all moves but a full game's last; position t + 1 holds move t.
    ValueError for a model without one token for each square, or without a prefix."""
    names = [square_name(s, games.size) for s in range(games.size**2)]
    known = lm.tokenizer.get_vocab()
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"the model's tokenizer must have a token for each square of a {games.size}x{games.size} board, and has "
            f"none for {', '.join(missing[:3])}: take games of the model's own size"
        )
    if lm.prefix_id is None:
        raise ValueError("the model must read a start token before the first move: LM(..., prefix=its id)")
    ids = torch.tensor([known[name] for name in names])[torch.from_numpy(games.moves[:, :-1]).long().clamp(min=0)]
    ids = torch.cat([torch.full((len(games), 1), lm.prefix_id), ids], 1)
    real = torch.cat([torch.ones(len(games), 1, dtype=torch.bool), torch.from_numpy(games.real[:, :-1])], 1)
    return TokenBatch(ids, real, torch.arange(ids.shape[1]).expand_as(ids))


def _read(lm: LM, sites: list[Site], games: Games, mask: TokenMask) -> _Read:
    """Activations at all positions after a move and before another that the mask keeps, in the order of games."""
    parts: dict[Site, list[Tensor]] = {s: [] for s in sites}
    which = np.zeros(games.moves.shape, bool)
    for start in range(0, len(games), _GAMES_AT_ONCE):
        part = games[start : start + _GAMES_AT_ONCE]
        batch = game_batch(lm, part)
        acts, _ = lm.run(batch, sites, logits=False)
        acts = {s: x.float().cpu() for s, x in acts.items()}
        keep = mask.keep(batch.ids, batch.positions, acts)[:, 1:] & torch.from_numpy(part.going_on[:, :-1])
        which[start : start + len(part), :-1] = keep.numpy()
        for s, x in acts.items():
            parts[s].append(x[:, 1:][keep])
    game, move = which.nonzero()
    return _Read({s: torch.cat(x) for s, x in parts.items()}, which, game, move)


class _Data(NamedTuple):
    """The labels of every position, ``positions properties``, and the half and game that it belongs to."""

    labels: np.ndarray
    train: np.ndarray
    game: np.ndarray
    kinds: np.ndarray


def _positive(x: Tensor, train: np.ndarray) -> Codes:
    """Coordinates as features: each minus its least value on training positions."""
    return kernels.above(x - x[torch.from_numpy(train)].min(0).values, 0.0)


def _probed(x: Tensor, data: _Data) -> Tensor:
    """Ridge regression of every property on the activations, fitted on training positions: "positions properties"."""
    train = torch.from_numpy(data.train)
    rows, y = (x - x[train].mean(0)).double(), torch.from_numpy(data.labels).double()
    square = rows[train].T @ rows[train]
    square += 1e-4 * square.trace() / len(square) * torch.eye(len(square), dtype=square.dtype)
    return (rows @ torch.linalg.solve(square, rows[train].T @ (y - y[train].mean(0))[train])).float()


def _measurable(labels: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Whether each property has enough positive and negative cases in both halves."""
    halves = [labels[train], labels[~train]]
    return np.all([(h.sum(0) >= LEAST_CASES) & ((~h).sum(0) >= LEAST_CASES) for h in halves], 0)


def _shuffled(data: _Data, move: np.ndarray, seed: int) -> _Data:
    """Every position with the board of another game at the same move, from the same half."""
    rng = np.random.default_rng(np.random.SeedSequence([0x424F415244, seed]))
    place, other = (np.lexsort((order, move, data.train)) for order in (np.arange(len(move)), rng.random(len(move))))
    labels = np.empty_like(data.labels)
    labels[place] = data.labels[other]
    return data._replace(labels=labels)


def _score(codes: Codes, data: _Data) -> BoardScores:
    """Choose classifiers on one half, measure them on the other. Tables are ``features levels properties``."""
    train, y = data.train, data.labels.astype(np.float32)
    order = by_content(codes)  # so that the choice among equal classifiers ignores feature numbers
    codes = codes._replace(features=order.argsort()[codes.features])
    onehot, level, most = _levels(codes, train)
    hits = _at_least((onehot[train].T @ y[train]).reshape(codes.d_sae, LEVELS, -1))
    firings = _at_least(np.asarray(onehot[train].sum(0)).reshape(codes.d_sae, LEVELS, 1))
    table = f1(hits, firings, y[train].sum(0)).reshape(codes.d_sae * LEVELS, -1)
    best, least = np.divmod(table.argmax(0), LEVELS)
    on = level[~train][:, best].toarray() > least
    test = data.labels[~train]
    scores = f1((on & test).sum(0), on.sum(0), test.sum(0))
    state = np.isin(data.kinds, STATE)
    precise = (hits >= PRECISION * firings) & (firings >= LEAST_FIRINGS)
    # A feature on at a threshold is on at all lower ones: levels from the lowest precise threshold on predict "yes".
    discs = np.isin(data.kinds, DISCS)
    says = np.maximum.accumulate(precise[:, :, discs], 1).astype(np.float32)
    said = onehot[~train] @ says.reshape(-1, int(discs.sum())) > 0
    boards = f1((said & test[:, discs]).sum(1), said.sum(1), test[:, discs].sum(1))
    training, tested = (auroc_table(codes, data.labels, half) for half in (train, ~train))
    auroc_best = training.argmax(0)
    aurocs = tested[auroc_best, np.arange(len(auroc_best))]
    return BoardScores(
        features=int((most > 0).sum()),
        l0=len(codes.values) / len(train),
        coverage=float(scores[state].mean()),
        coverage_se=_jackknife(on[:, state], test[:, state], data.game[~train]),
        legal=float(scores[~state].mean()) if (~state).any() else math.nan,
        above=int((aurocs[state] > AUROC).sum()),
        reconstruction=float(boards.mean()),
        reconstruction_se=clustered_error(torch.from_numpy(boards), torch.from_numpy(data.game[~train])),
        precise=int(says.any((1, 2)).sum()),
        of_state=int(state.sum()),
        best=order.numpy()[best],
        threshold=least / LEVELS,
        f1=scores,
        auroc_best=order.numpy()[auroc_best],
        auroc=aurocs,
    )


def _at_least(counts: np.ndarray) -> np.ndarray:
    """From counts at each level to counts at that level or a higher one."""
    return counts[:, ::-1].cumsum(1)[:, ::-1]


def _levels(codes: Codes, train: np.ndarray) -> tuple[Any, Any, np.ndarray]:
    """(a 1 for every firing, "positions features·levels"; level + 1, "positions features"; each feature's maximum on
    training positions). A feature is at level l from l/10 to (l + 1)/10 of its maximum; level 9 has no upper end."""
    from scipy.sparse import csr_matrix

    rows, n = codes.rows.numpy(), len(codes.offsets) - 1
    values, features = codes.values.double().numpy(), codes.features.numpy()
    most = np.zeros(codes.d_sae)
    np.maximum.at(most, features[train[rows]], values[train[rows]])
    use = most[features] > 0
    rows, features, values = rows[use], features[use], values[use]
    level = np.clip(np.ceil(LEVELS * values / most[features]) - 1, 0, LEVELS - 1).astype(np.int32)
    ones = np.ones(len(rows), np.float32)
    onehot = csr_matrix((ones, (rows, features * LEVELS + level)), shape=(n, codes.d_sae * LEVELS))
    return onehot, csr_matrix((level + 1, (rows, features)), shape=(n, codes.d_sae)), most


def auroc_table(codes: Codes, labels: np.ndarray, half: np.ndarray) -> np.ndarray:
    """AUROC of every feature for every label over some rows, "features properties"."""
    from scipy.sparse import csr_matrix

    rows, n = codes.rows.numpy(), int(half.sum())
    here = half[rows]
    ranks = sparse_ranks(codes.features.numpy()[here], codes.values.numpy()[here], codes.d_sae, n)
    places = (ranks.features, (np.cumsum(half) - 1)[rows[here]][ranks.order])
    true = labels[half].astype(np.float64)
    sums = csr_matrix((ranks.above, places), shape=(codes.d_sae, n)) @ true
    return area(sums, ranks.silent[:, None], true.sum(0), n - true.sum(0))


def _jackknife(on: np.ndarray, true: np.ndarray, game: np.ndarray) -> float:
    """Standard error of the mean F1 over properties, from leaving out each of 20 groups of games."""
    groups = np.unique(game, return_inverse=True)[1] % _FOLDS
    counts = np.stack([np.stack([(m[groups == g]).sum(0) for g in range(_FOLDS)]) for m in (on & true, on, true)])
    return jackknife(f1(*(counts.sum(1, keepdims=True) - counts)).mean(1))
