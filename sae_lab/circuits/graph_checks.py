"""Edges of an attribution graph beside what the model does when their sources are taken out of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.circuits.invariant import EdgeCheck
from sae_lab.circuits.layout import ATTENTION, as_set
from sae_lab.circuits.nodes import ERROR, Edge, Node
from sae_lab.circuits.replacement import CLOSE, LocalModel
from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.sets import TranscoderSet
from sae_lab.types import Codes, Site, Write


class Taken(NamedTuple):
    """A node that is taken out. layer: where, -1: of the embeddings. source: the node's layer. what: what it adds
    there."""

    layer: int
    source: int
    position: int
    number: int
    what: Tensor


def local_of(graph: Any, what: str) -> LocalModel:
    """The graph's local model. ValueError for a graph that was read without one."""
    if graph.local is None:
        raise ValueError(
            f"{what} runs the model, and this graph was read without one: load a file that graph.save wrote with "
            "AttributionGraph.load(path, lm, coders)"
        )
    return graph.local


@torch.no_grad()
def check(graph: Any, source: Any, targets: Any, pause: Callable[[], object] = lambda: None) -> EdgeCheck:
    """See ``AttributionGraph.check``. pause: called before each run of the model; what it raises ends the check."""
    local = local_of(graph, "a check")
    if isinstance(source, Edge):
        source, targets = source.upstream, source.downstream if targets is None else targets
    sources = [source] if isinstance(source, Node) else list(source)
    numbers = [graph.number(node) for node in sources]
    if not sources or any(n >= graph.effects.shape[1] for n in numbers):
        raise ValueError(f"a source is a feature, an error or a token, got {sources}: a logit adds to nothing")
    if graph.facts["first"] == "drop" and (gone := [n for n in sources if (n.position, n.feature) == (0, ERROR)]):
        raise ValueError(f"{gone[0]!r} is no part of a graph made with first='drop': trace it with first='keep'")
    minus = -graph.effects[:, numbers].sum(1)
    if targets is None:
        edges = zip(graph.targets, minus.tolist(), strict=True)
        listed = [node for node, effect in edges if effect and node not in sources]
    else:
        listed = [targets] if isinstance(targets, Node) else list(targets)
    if not listed:
        raise ValueError(f"{sources} has no edge in this graph: take another source, or name targets=")
    rows = [graph.row(node) for node in listed]
    taken, before, changes = written(local, sources), _read(graph, local, local.base, listed), {}
    for way in ("frozen", "responding", "free"):
        pause()
        now = _read(graph, local, changed(local, taken, way), listed)
        changes[way] = (now - before).cpu().numpy()[None]
    called = {node: graph.name(node) for node in [*sources, *listed]}
    return EdgeCheck(
        predicted=minus[rows].numpy()[None], total=_total(graph, numbers)[rows].numpy()[None], **changes,
        pre=graph.pre[rows].numpy()[None], feature=sources, features=listed, names=(called, called),
        largest=graph.effects.abs().max(1).values[rows].numpy(),
    )  # fmt: skip


def written(local: LocalModel, sources: Sequence[Node]) -> list[Taken]:
    """What each node adds to the stream, at each layer that it writes to."""
    found = []
    for site, position, number in sources:
        layer = local.coders.part.get(site, -1)
        if layer < 0:
            what = local.embed[position]
        elif number == ERROR:
            what = local.parts[layer].error[position]
        else:
            codes = local.parts[layer].codes
            here = ((codes.rows == position) & (codes.features == number)).nonzero()[0]
            for at in range(layer, local.n_parts):
                if layer in local.coders.sources(at):
                    what = local.coders.written(layer, at, codes.features[here], codes.values[here])[0]
                    found.append(Taken(at, layer, position, number, what))
            continue
        found.append(Taken(layer, layer, position, number, what))
    return found


def changed(local: LocalModel, taken: Sequence[Taken], way: str) -> dict[Site, Tensor]:
    """Activations after the sources were taken out. way: what else stays: see ``AttributionGraph.check``."""

    now: dict[int, Codes] = {}

    def mlp(layer: int, x: Tensor, read: Tensor | None) -> Tensor:
        here = [one for one in taken if one.layer == layer]
        if way == "free":
            return _less(x, here)
        if way == "frozen" or read is None:
            return _less(local.held_mlp(layer, read), here)
        features = [(one.position, one.number) for one in here if one.number != ERROR and one.source == layer]
        return _less(local.responding_mlp(layer, read, features, now), [one for one in here if one.number == ERROR])

    tokens = [one for one in taken if one.layer < 0]
    return local.run(mlp, _less(local.embed, tokens) if tokens else None, held=way != "free")


def _less(x: Tensor, taken: Sequence[Taken]) -> Tensor:
    x = x.clone()
    for one in taken:
        x[one.position] -= one.what.to(x)
    return x


def _read(
    graph: Any, local: LocalModel, acts: dict[Site, Tensor], targets: Sequence[Node]
) -> Float[Tensor, " targets"]:
    """What the targets read, without their biases."""
    found = []
    for node in targets:
        if node.site in local.coders.part:
            coder = local.coders[local.coders.part[node.site]]
            x = acts[coder.reads[0]][node.position]
            found.append(x @ coder.W_enc[:, node.feature].detach().to(x))
        else:
            at = graph.number(node) - sum(graph.counts[:3])
            x = acts[local.out][-1]
            found.append(x @ graph.directions[at].to(x))
    return torch.stack(found)


@torch.no_grad()
def heads(graph: Any, node: Node) -> Float[Tensor, " head"]:
    """See ``AttributionGraph.heads``."""
    local = local_of(graph, "a list of heads")
    if graph.kinds[graph.number(node)] != "feature" or node.site.kind not in ATTENTION:
        raise ValueError(f"heads write what features of attention read, {node!r} is none: take one at attn_out")
    site, z_site = node.site, Site("attn_z", node.site.layer)
    reads = local.coders[local.coders.part[site]].W_enc[:, node.feature].detach()
    z = local.lm.run(local.batch, [z_site], logits=False)[0][z_site]
    many = local.lm._module.config.get_text_config().num_attention_heads
    if site.kind == "attn_z":
        return (z[0, node.position].float() * reads.to(z)).view(many, -1).sum(1).cpu()

    def read(head: int | None) -> Tensor:
        """What the feature reads when the other heads write nothing; None: when all write nothing."""
        kept = torch.zeros_like(z).unflatten(-1, (many, -1))
        if head is not None:
            kept[..., head, :] = z.unflatten(-1, (many, -1))[..., head, :]
        with local.lm._lock, local.held.replaying():
            write = Write(z_site, lambda x, tokens: kept.flatten(-2).to(x))
            out = local.lm.run(local.batch, [site], [write], logits=False)[0][site]
        return out[0, node.position].float() @ reads.to(out.device)

    silent = read(None)
    return torch.stack([read(head) - silent for head in range(many)]).cpu()


def _total(graph: Any, numbers: Sequence[int]) -> Float[Tensor, " targets"]:
    """The change of each target when the sources are taken out and the features of the graph respond: one unit of a
    feature adds effects / activation, along all paths, the sources themselves left at 0."""
    features = graph.counts[0]
    if not graph.local.coders.linear or not torch.allclose(graph.values[:features], graph.pre[:features], rtol=1e-3):
        return torch.full_like(graph.pre, float("nan"))  # a unit of the code is no unit of what it reads
    per_unit = graph.effects[:, :features] / graph.values[:features].clamp_min(1e-12)
    direct = -graph.effects[:, numbers].sum(1)
    alive = torch.ones(features)
    alive[[n for n in numbers if n < features]] = 0.0
    between = torch.eye(features) - per_unit[:features] * alive[:, None]
    change = torch.linalg.solve_triangular(between, (direct[:features] * alive)[:, None], upper=False)[:, 0]
    return direct + per_unit @ change


def connected(graph: Any, lm: LM, coders: TranscoderSet | SparseCoder | Sequence[SparseCoder]) -> Any:
    """The graph with its local model. ValueError for a model or coders that give other activations."""
    ids = graph.facts.get("ids")
    if ids is None:
        raise ValueError("this graph does not tell its token ids, on which a model would run: trace the prompt anew")
    local = LocalModel(lm, as_set(coders), lm.tokenize(ids), graph.facts["first"])
    columns = (column.tolist() for column in (local.layer, local.position, local.feature))
    own = {place: i for i, place in enumerate(zip(*columns, strict=True))}
    places = [tuple(place) for place in graph.places[: graph.counts[0]].tolist()]
    same = graph.sites == local.sites and len(own) == graph.active and all(place in own for place in places)
    if same and places:
        values, now = graph.values[: len(places)], local.value.cpu()[[own[place] for place in places]]
        same = float((values - now).abs().max()) <= CLOSE * float(values.abs().max())
    if not same:
        raise ValueError(
            "this model and these coders give other activations than this graph has: load it with those of its making"
        )
    local.close()
    return replace(graph, local=local)
