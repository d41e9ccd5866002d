"""``trace``: the attribution graph of one prompt, features visited by their influence on the logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sae_lab import costs
from sae_lab.arguments import as_annotated, check_least
from sae_lab.circuits import resuming
from sae_lab.circuits.attribution_graph import AttributionGraph
from sae_lab.circuits.graph_scores import scores
from sae_lab.circuits.layout import as_set
from sae_lab.circuits.metric import one_token
from sae_lab.circuits.nodes import ERROR, Node
from sae_lab.circuits.replacement import CLOSE, LocalModel
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompts, is_single, label
from sae_lab.noting import Names
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.sets import TranscoderSet

PROBABILITY, MOST_LOGITS = 0.95, 10  # targets by default: the fewest tokens of this probability (circuit-tracer)
RANKED = 512  # features visited between two rankings of the others
SWEEP_BYTES = 24_000_000  # of a stream's gradients in a sweep: glibc maps and unmaps pieces above 32 MiB each time


class Logits(NamedTuple):
    """What the graph explains: names, numbers (token ids; from the vocabulary's size on: differences, directions),
    weights, directions "logits d_model" that read the final norm's output, what each is, and what biases add to it."""

    names: list[str]
    numbers: list[int]
    weights: list[float]
    directions: Float[Tensor, "logits d_model"]
    pre: Float[Tensor, " logits"]
    bias: Float[Tensor, " logits"]


@as_annotated
def trace(
    lm: LM,
    coders: TranscoderSet | SparseCoder | Sequence[SparseCoder],
    prompt: Prompts,
    targets: Sequence[Any] | str | int | Tensor | None = None,
    *,
    first: str = "keep",
    features: int = 4096,
    path: str | Path | None = None,
) -> AttributionGraph:
    """``graph = trace(lm, coders, "The capital of France is")``: what features, errors and tokens add to each other
    and to the logits after the prompt (attribution graphs, Ameisen et al. 2025, transformer-circuits.pub):

        A[t, s] = activation(s) · <what s writes, carried to the place that t reads, direction that t reads>

    Each layer's MLP is replaced by its transcoder; what that leaves unexplained is an error at each token, and so is
    the whole MLP of a layer without one. Attention patterns, norms' divisors and gates keep the prompt's values: then
    the effects are exact and add up. What all sources and the biases add to a feature or a logit is its pre-activation
    (a logit: less the mean over the vocabulary, before a final cap), within 1e-4 of the largest of these, in float32.
    Where it is not, there is no graph.

    Args:
        coders: ``sl.TranscoderSet``, a list of transcoders, or ``sl.CrossLayerTranscoder``, whose features write at
            all layers from their own on. A list may also have SAEs at attn_out or attn_z, one a layer: features of
            attention's output, and its error, are then nodes too, and ``graph.heads`` tells which heads write what
            they read. prompt: one, of at least two tokens.
        targets: None: the fewest tokens that have probability .95, at most 10; or a token (" Paris", or its id), a
            difference of two (" Paris", " Rome") as a tuple, a direction "d_model" that reads the final norm's output,
            or a list of these.
        first: "keep": tokens that a coder's mask leaves out, position 0 among them, have no features, and their whole
            MLP is an error; "drop", as circuit-tracer: all tokens but position 0 have features, and what the MLPs add
            at position 0, but for the skip, is no part of the graph; ``rest`` tells it.
        features: how many active features get a row. They are visited in the order of their influence, by the rows
            known so far. ``rest`` tells what the others add.
        path: a folder for the rows as they come. After an interruption, a SIGKILL too, the same call goes on from the
            last rows written, to the graph of an unbroken call; of a finished graph it reads them. It takes 4 bytes for
            each row and active feature, error and token. None: nothing is written.

    Raises ValueError for several prompts or one token, a target that is no single token, coders of another model or
    layer, weights that are not float32, a model on a server, one without the sites embed, resid_pre and mlp_out, and
    one in which something else lies between, so that the sums do not hold; and for a path with another graph's rows.
    """
    graph = _tracer(lm, coders, prompt, targets, first, features).graph(path)
    graph.local.close()  # the graph keeps it, for checks
    return graph


def _tracer(lm: LM, coders: Any, prompt: Prompts, targets: Any, first: str, features: int) -> "Tracer":
    """Everything but the rows. ValueError as from ``trace``."""
    check_least(1, features=features)
    if first not in ("keep", "drop"):
        raise ValueError(f"first must be 'keep' or 'drop', got {first!r}")
    if not is_single(prompt):
        raise ValueError("a graph is of one prompt, got several: call trace for each")
    coders = as_set(coders)
    batch = lm.tokenize(prompt)
    if batch.ids.shape[1] < 2:
        raise ValueError("a graph needs a prompt of at least two tokens, got one: write a longer one")
    wanted = _checked_targets(lm, targets)
    local = LocalModel(lm, coders, batch, first)
    return Tracer(local, _logits(local, wanted), min(features, len(local.layer)), wanted)


def cost(
    lm: LM, coders: Any, prompt: Prompts, targets: Any, first: str, features: int, path: str | Path | None = None
) -> costs.Cost:
    """The cost of ``trace`` with these arguments. The trial makes the local model and the rows of the logits, and one
    sweep for features drawn from all of them."""
    with costs.peak() as peak:
        tracer, once = costs.timed(_tracer, lm, coders, prompt, targets, first, features)
        local, most, active = tracer.local, tracer.most, len(tracer.local.layer)
        _, logits = costs.timed(tracer._visit_logits)
        tried = torch.linspace(active - 1, 0, min(tracer.at_once, most)).round().long().unique().flip(0)
        seconds = costs.timed(tracer._visit, tried)[1] if most else 0.0
    rows, columns = tracer.first + most, local.columns
    kept = rows * (most + columns - active)  # of the graph itself
    table = rows * (2 * active // 3 + columns - active)  # features of later layers, with longer rows, are visited more
    ranking = table / 2e9 * (most / RANKED)  # each ranking reads the rows known so far
    return costs.Cost(
        f"{len(tried):,} of {most:,} features visited in {seconds:.1f} s",
        seconds=once + logits + seconds * most / max(1, len(tried)) + ranking,
        ram=peak.ram + 4 * (table + 2 * kept),
        vram=peak.vram,
        disk=0 if path is None else 4 * most * columns,
        parts={"active features": active, "features visited": most, "MB that the graph takes": 4 * kept / 1e6},
    )


costs.ROOMS[trace] = cost


class Block(NamedTuple):
    """Rows of one part of the model (a layer; all logits are one part). ``values``: their effects, without columns of
    features of this part and later ones, which are 0."""

    begin: int  # number of its first row
    part: int
    values: Float[Tensor, "n some_columns"]


class Rows:
    """Rows in the order in which they come: about half of the memory of a table of all columns."""

    def __init__(self, layer: Int[Tensor, " features"], parts: int):
        self.active = len(layer)
        self.ends = torch.searchsorted(layer, torch.arange(parts + 1, device=layer.device)).tolist()
        self.blocks: list[Block] = []

    def add(self, begin: int, part: int, found: Float[Tensor, "n columns"]) -> None:
        end = self.ends[part]
        assert not found[:, end : self.active].any(), "features of this part and later ones add nothing to it"
        values = torch.cat([found[:, :end], found[:, self.active :]], 1)
        self.blocks.append(Block(begin, part, values))

    def of(self, part: int) -> list[Block]:
        return [block for block in self.blocks if block.part == part]


class Tracer:
    """Rows of a graph, computed in the order of influence, those of the logits first."""

    def __init__(self, local: LocalModel, logits: Logits, most: int, wanted: list[Any] | None):
        self.local, self.logits, self.most, self.wanted = local, logits, most, wanted
        self.first = len(logits.numbers)
        self.rows = Rows(local.layer, local.n_parts)
        self.rest, self.rest_size = torch.zeros(self.first + most), torch.zeros(self.first + most)
        errors = len(local.layer) + local.length * torch.arange(local.n_parts)  # columns of those at position 0
        self.dropped = errors if local.first == "drop" else errors[:0]
        self.visited = torch.zeros(0, dtype=torch.long)  # features by column, in the order of their rows
        width = 4 * local.length * local.embed.shape[-1]
        self.at_once = max(1, min(RANKED, SWEEP_BYTES // width))

    def graph(self, path: str | Path | None) -> AttributionGraph:
        self._visit_logits()
        with resuming.journal(path, self.local, self.wanted, self.most) as journal:
            self._visit_all(journal)
        local = self.local
        chosen, order = self.visited.sort()
        rows = torch.cat([self.first + order, torch.arange(self.first)])
        gone = torch.ones(local.columns, dtype=torch.bool)
        gone[chosen], gone[len(local.layer) :] = False, False
        tail = local.columns - len(local.layer)
        effects = torch.zeros(self.first + self.most, len(chosen) + tail)
        for begin, part, values in self.rows.blocks:
            end = self.rows.ends[part]
            at, here = slice(begin, begin + len(values)), chosen[chosen < end]
            effects[at, : len(here)], effects[at, len(chosen) :] = values[:, here], values[:, end:]
            for n, row in enumerate(values[:, :end], begin):  # row by row, since all columns that go would be large
                left = row[gone[:end]]
                self.rest[n] += left.sum()
                self.rest_size[n] += left.abs().sum()
        return _graph(local, effects[rows], chosen, self.logits, self.rest[rows], self.rest_size[rows])

    def _visit_all(self, journal: resuming.Journal | None) -> None:
        from tqdm.auto import tqdm

        planned = self.visited  # what is left of a round
        for found in () if journal is None else journal.rows():
            planned = found["planned"]
            self._keep(found["features"], found["rows"], found["rest"], found["rest_size"])
        done = len(self.visited)
        with tqdm(total=self.most, initial=done, unit="feature", desc="trace", dynamic_ncols=True, disable=None) as bar:
            while (done := len(self.visited)) < self.most:
                planned = planned if len(planned) else self._next(min(RANKED, self.most - done))
                part, planned = planned[: self.at_once], planned[self.at_once :]
                kept = self._visit(part)
                if journal is not None:
                    journal.write(part, planned, **kept)
                bar.update(len(part))

    def _next(self, count: int) -> Int[Tensor, " count"]:
        """The next features to visit, of the highest layers first: those with most influence by the rows so far."""
        active = len(self.local.layer)
        if self.most == active:  # all of them, from the last on
            return torch.arange(active).flip(0)[len(self.visited) :][:count]
        influence = self._influence()
        influence[self.visited] = -1.0
        best = influence.topk(count).indices
        return best[self.local.layer[best].cpu().argsort(descending=True, stable=True)]

    def _influence(self) -> Float[Tensor, " features"]:
        """Of all active features on the logits, through the features that have a row: one pass down the layers."""
        found = torch.zeros(self.rows.active)
        for part in range(self.local.n_parts, -1, -1):
            for begin, _, values in self.rows.of(part):
                own = self.visited[begin - self.first :][: len(values)]  # of the logits: their weights
                weights = torch.tensor(self.logits.weights) if part == self.local.n_parts else found[own]
                sizes = values.abs()
                passed = (weights / sizes.sum(1).clamp_min(1e-8)) @ sizes
                found[: self.rows.ends[part]] += passed[: self.rows.ends[part]]
        return found

    def _visit(self, features: Int[Tensor, " n"]) -> dict[str, Tensor]:
        """Make and keep the rows of these features, ordered by part. Returns what a journal writes of them."""
        local = self.local
        here = features.to(local.layer.device)
        layers = local.layer[here].tolist()
        groups = [here[torch.tensor(layers, device=here.device) == n] for n in dict.fromkeys(layers)]
        parts = [local.directions(group) for group in groups]
        width = max(part.shape[1] for part in parts)  # attn_z has another than the stream
        directions = torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])
        found = local.rows(layers, local.position[here], directions).cpu()
        nodes = [
            Node(local.sites[n], int(p), int(f))
            for n, p, f in zip(layers, local.position[here].tolist(), local.feature[here].tolist(), strict=True)
        ]
        require_sum(found, local.bias[here].cpu(), local.pre[here].cpu(), nodes)
        rest, rest_size = self._drop(found)
        self._keep(features, found, rest, rest_size)
        return {"rows": found, "rest": rest, "rest_size": rest_size}

    def _visit_logits(self) -> None:
        local, logits = self.local, self.logits
        last = torch.full((self.first,), local.length - 1, device=local.embed.device)
        found = local.rows([local.n_parts] * self.first, last, logits.directions).cpu()
        nodes = [Node(local.end, local.length - 1, number) for number in logits.numbers]
        require_sum(found, logits.bias, logits.pre, nodes)
        self.rest[: self.first], self.rest_size[: self.first] = self._drop(found)
        self.rows.add(0, local.n_parts, found)

    def _drop(self, found: Float[Tensor, "n columns"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Take the dropped columns out of rows; (their sums, the sums of their sizes)."""
        gone = found[:, self.dropped]
        found[:, self.dropped] = 0.0
        return gone.sum(1), gone.abs().sum(1)

    def _keep(self, features: Int[Tensor, " n"], found: Tensor, rest: Tensor, rest_size: Tensor) -> None:
        begin = self.first + len(self.visited)
        at = slice(begin, begin + len(features))
        self.rest[at], self.rest_size[at] = rest, rest_size
        parts = self.local.layer.cpu()[features].tolist()
        for part in dict.fromkeys(parts):
            own = [n for n, other in enumerate(parts) if other == part]
            self.rows.add(begin + own[0], part, found[own])
        self.visited = torch.cat([self.visited, features])


def require_sum(
    rows: Float[Tensor, "n sources"], bias: Float[Tensor, " n"], pre: Float[Tensor, " n"], nodes: Sequence[Node]
) -> None:
    """ValueError unless each row and its bias sum to the node's pre-activation, within 1e-4 of the largest of these."""
    total = rows.sum(1) + bias
    largest = torch.stack([rows.abs().max(1).values, bias.abs(), pre.abs()]).max(0).values
    off = (total - pre).abs() / largest.clamp_min(1e-12)
    worst = int(off.nan_to_num(torch.inf).argmax())
    if not float(off[worst]) <= CLOSE:
        raise ValueError(
            f"the sum rule fails at {nodes[worst]!r}: its sources and biases add up to {float(total[worst]):.6g}, and "
            f"its pre-activation is {float(pre[worst]):.6g}: something that is not linear lies between, and no "
            "graph is made of this model"
        )


def _checked_targets(lm: LM, targets: Any) -> list[Any] | None:
    """Token ids, pairs of them and directions. ValueError for anything else."""
    if targets is None:
        return None
    listed = [targets] if isinstance(targets, str | int | tuple | Tensor) else list(targets)
    if not listed:
        raise ValueError("targets must name at least one token, got none: leave it out for the likeliest ones")
    return [_checked_target(lm, target) for target in listed]


def _checked_target(lm: LM, target: Any) -> Any:
    if isinstance(target, tuple):
        if len(target) != 2:
            raise ValueError(f"a tuple in targets is a difference of two tokens, got {len(target)}: (' a', ' b')")
        return tuple(_checked_target(lm, one) for one in target)
    if isinstance(target, Tensor):
        width = lm._module.get_output_embeddings().weight.shape[1]
        if target.shape != (width,) or not bool(target.isfinite().all()) or not bool(target.any()):
            raise ValueError(f"a direction in targets has d_model={width} finite numbers, got {tuple(target.shape)}")
        return target.float().to(lm.device)
    if isinstance(target, bool) or not isinstance(target, str | int):
        raise ValueError(f"targets are tokens, pairs of tokens or directions, got {target!r:.60}")
    return one_token(lm, target)


@torch.no_grad()
def _logits(local: LocalModel, targets: list[Any] | None) -> Logits:
    """The logits that the graph explains; None: the fewest tokens of probability .95, at most 10."""
    lm, chances = local.lm, local.chances
    if targets is None:
        best = chances.topk(min(MOST_LOGITS, len(chances)))
        cut = int(torch.searchsorted(best.values.cumsum(0), PROBABILITY)) + 1
        targets = best.indices[:cut].tolist()
    names, numbers, weights, directions, shift = [], [], [], [], []
    centre, bias = local.mean, local.b_U - local.b_U.mean()
    for i, target in enumerate(targets):
        virtual = len(lm.vocabulary) + i
        if isinstance(target, Tensor):
            found = f"direction {i}", virtual, 1.0, target, bias.new_zeros(())
        elif isinstance(target, tuple):
            a, b = target
            name = f"{label(lm.tokenizer, a)} − {label(lm.tokenizer, b)}"
            found = name, virtual, 1.0, local.W_U[a] - local.W_U[b], bias[a] - bias[b]
        else:
            name = label(lm.tokenizer, target)
            found = name, target, float(chances[target]), local.W_U[target] - centre, bias[target]
        for column, value in zip((names, numbers, weights, directions, shift), found, strict=True):
            column.append(value)
    D, shifts = torch.stack(directions), torch.stack(shift)
    silent = local.silent[local.out][-1]
    pre, own = D @ local.normed[-1] + shifts, D @ silent + shifts
    return Logits(names, numbers, weights, D, pre.cpu(), own.cpu())


def _graph(
    local: LocalModel, effects: Tensor, chosen: Int[Tensor, " features"], logits: Logits, rest: Tensor,
    rest_size: Tensor,
) -> AttributionGraph:  # fmt: skip
    """The graph of a local model. effects: rows of the chosen features, then of the logits. rest, rest_size: theirs."""
    length, layers, active = local.length, local.n_parts, len(local.layer)
    errors = [(layer, p, ERROR) for layer in range(layers) for p in range(length)]
    ids = local.batch.ids[0].tolist()
    places = [
        torch.stack([local.layer, local.position, local.feature], 1)[chosen].cpu(),
        torch.tensor([*errors, *((-1, p, i) for p, i in enumerate(ids))]),
        torch.tensor([(layers, length - 1, number) for number in logits.numbers]),
    ]
    counts = (len(chosen), len(errors), length, len(logits.numbers))
    none = torch.full((len(errors) + length,), float("nan"))
    weights = torch.tensor(logits.weights)
    facts = {
        "model": local.lm.id, "model_fingerprint": local.lm.fingerprint(), "n_layers": local.lm.n_layers,
        "ids": ids, "first": local.first,
    }  # fmt: skip
    if local.coders.attends:
        facts["sites"] = [site.key for site in local.sites]
    return AttributionGraph(
        effects=effects, places=torch.cat(places), counts=counts,
        values=torch.cat([local.value[chosen].cpu(), none, logits.pre]),
        pre=torch.cat([local.pre[chosen].cpu(), logits.pre]), bias=torch.cat([local.bias[chosen].cpu(), logits.bias]),
        rest=rest, rest_size=rest_size, weights=weights, directions=logits.directions.cpu(),
        tokens=[token.label for token in local.lm.tokens(ids)],
        outputs=logits.names, facts=facts, active=active, visited=len(chosen) / max(1, active),
        names={layer: Names(coder) for layer, coder in zip(local.coders.layers, local.coders, strict=True)},
        local=local, **scores(effects, rest_size, weights, counts),
    )  # fmt: skip
