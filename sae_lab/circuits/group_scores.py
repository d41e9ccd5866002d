"""How alike nodes of an attribution graph are, clusters of them, and what taking a group out of the model does."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.circuits.graph_checks import changed, local_of, written
from sae_lab.circuits.graph_faithfulness import columns_of, matched, norms_of
from sae_lab.circuits.graph_scores import influence_of, shares
from sae_lab.circuits.layout import ATTENTION
from sae_lab.circuits.nodes import Node
from sae_lab.feature_index.index import FeatureIndex
from sae_lab.stats import permutation_p

NAN = float("nan")
TINY = 1e-30  # beside sums of squares: a node without an edge is like none


class Scored(NamedTuple):
    """See ``groups.Group``."""

    effect: float
    random: float
    random_sd: float
    p: float


# ---- alike


def similarity(
    graph: Any, effects: Float[Tensor, "targets sources"], fires: Float[Tensor, "features features"] | None
) -> Float[Tensor, "features features"]:
    """How much two features do the same: the geometric mean of the cosines of what they read, of what they write and,
    where it is known, of when they fire; 0 where one of these is not above 0.

    What a feature reads is its row of effects. What it writes is its column, each effect as a share of all that the
    target reads and times the target's influence: the flow to the logits along that edge, with its sign."""
    features = graph.counts[0]
    targets = torch.cat([influence_of(shares(effects), graph.weights, features)[:features], graph.weights])
    flows = shares(effects) * effects.sign() * targets[:, None]
    cosines = [_cosines(effects[:features]), _cosines(flows[:, :features].T)] + ([] if fires is None else [fires])
    return torch.stack([one.clamp_min(0.0) for one in cosines]).prod(0) ** (1 / len(cosines))


def _cosines(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    unit = rows / rows.square().sum(1, keepdim=True).clamp_min(TINY).sqrt()
    return unit @ unit.T


def fires_alike(graph: Any, index: FeatureIndex | Sequence[FeatureIndex]) -> Float[Tensor, "features features"]:
    """Cosines of the graph's features' activations over the tokens of a store. ValueError for indexes of several
    stores, and where a layer of the graph has none."""
    from scipy import sparse
    from sklearn.preprocessing import normalize

    listed = [index] if isinstance(index, FeatureIndex) else list(index)
    known = {(one.site.kind in ATTENTION, one.site.layer): one for one in listed}
    wanted = [((node.site.kind in ATTENTION, node.site.layer), node) for node in graph.nodes[: graph.counts[0]]]
    if missing := [node.site for part, node in wanted if part not in known]:
        raise ValueError(f"index= has none for {missing[0].key}, where this graph has features: pass one of each coder")
    if len({str(one.store.path) for one in listed}) > 1:
        raise ValueError("the indexes are of several stores, so that their tokens are not the same: index one store")
    parts = [known[part].activations(node.feature) for part, node in wanted]
    ends = np.cumsum([0, *(len(rows) for rows, _ in parts)])
    rows, values = (np.concatenate([np.zeros(0), *(part[i] for part in parts)]) for i in (0, 1))
    shape = (len(parts), max((one.tokens_seen for one in listed), default=0))
    codes: Any = normalize(sparse.csr_matrix((values, rows.astype(np.int64), ends), shape))
    return torch.from_numpy((codes @ codes.T).toarray().astype(np.float32))


def clustered(alike: Float[Tensor, "n n"], least: float) -> np.ndarray:
    """Numbers of clusters in which any two are at least so much alike (complete linkage)."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(alike) < 2:
        return np.arange(len(alike))
    distances = (1 - alike.double().numpy()).clip(0.0)
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform((distances + distances.T) / 2, checks=False), method="complete")
    return fcluster(tree, 1 - least, criterion="distance") - 1


def shuffled(graph: Any, generator: torch.Generator) -> Float[Tensor, "targets sources"]:
    """The graph's effects, each row's dealt anew among the nodes that could add to its target: those of lower layers
    and of no later position."""
    effects, rows = graph.effects, [graph.number(node) for node in graph.targets]
    sources, targets = graph.places[: effects.shape[1]], graph.places[rows]
    may = (sources[:, 0] < targets[:, :1]) & (sources[:, 1] <= targets[:, 1:2])
    keys = torch.rand(effects.shape, generator=generator).masked_fill(~may, 2.0)
    dealt = keys.argsort(1)  # of each row first the places that it may read, in any order
    own = (~may).byte().argsort(dim=1, stable=True)  # the same places in their own order
    return torch.zeros_like(effects).scatter_(1, dealt, effects.gather(1, own)) * may


# ---- taken out


@torch.no_grad()
def score(graph: Any, groups: Sequence[Sequence[Node]], draws: int, seed: int) -> list[Scored]:
    """See ``GraphGroups.score``."""
    from tqdm.auto import tqdm

    local = local_of(graph, "a score")
    if logits := [node for nodes in groups for node in nodes if graph.number(node) >= graph.effects.shape[1]]:
        raise ValueError(f"{logits[0]!r} is a logit, which cannot be taken out: move it out of its group")
    columns, norms = columns_of(graph, local), norms_of(local)
    weights, directions = graph.weights.to(local.embed), graph.directions.to(local.embed)

    def value(taken: Sequence[Node]) -> float:
        x = changed(local, written(local, taken), "free")[local.out][-1]
        return float(weights @ (directions @ x)) / float(weights.sum())

    whole, found = value(()), []
    for nodes in tqdm(groups, unit="group", desc="score", dynamic_ncols=True, disable=None):
        effect, generator = value(nodes) - whole, torch.Generator().manual_seed(seed)
        numbers = [graph.number(node) for node in nodes]
        picks = []
        if max(numbers) < graph.counts[0]:
            picks = [matched(local, columns[numbers], norms, generator).sort().values for _ in range(draws)]
        different = {tuple(pick.tolist()): pick for pick in picks if len(pick) == len(nodes)}  # few may exist
        drawn = np.array([value(_features(local, pick)) - whole for pick in different.values()])
        mean = float(drawn.mean()) if len(drawn) else NAN
        sd = float(drawn.std()) if len(drawn) > 1 else NAN
        found.append(Scored(effect, mean, sd, permutation_p(abs(effect), np.abs(drawn)) if len(drawn) else NAN))
    return found


@torch.no_grad()
def others_like(graph: Any, nodes: Sequence[Node], seed: int) -> list[Node]:
    """See ``AttributionGraph.matched``."""
    local = local_of(graph, "a choice among all active features")
    numbers = [graph.number(node) for node in nodes]
    if not numbers or max(numbers) >= graph.counts[0]:
        raise ValueError(f"matched takes features of the graph, at least one, got {list(nodes)!r:.100}")
    generator = torch.Generator().manual_seed(seed)
    columns = columns_of(graph, local)[list(dict.fromkeys(numbers))]
    return _features(local, matched(local, columns, norms_of(local), generator).sort().values)


def _features(local: Any, columns: Tensor) -> list[Node]:
    places = zip(*(part[columns].tolist() for part in (local.layer, local.position, local.feature)), strict=True)
    return [Node(local.sites[part], position, feature) for part, position, feature in places]
