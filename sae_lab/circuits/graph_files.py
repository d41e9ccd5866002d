"""Attribution graphs in files: our own (tensors and JSON), and the JSON that Neuronpedia and circuit-tracer read."""

import itertools
import json
import logging
import math
from collections.abc import Collection, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lab import cache, files
from sae_lab.circuits.nodes import ERROR, Node
from sae_lab.results import counted
from sae_lab.types import Site

log = logging.getLogger(__name__)

VERSION, SCHEMA = 1, 1
NOTE = "sae_lab graph"
MOST_EFFECTS = 1 << 28  # numbers in memory for the edges of a graph in JSON, which names only those it has
REFUSED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError)
TENSORS = ("effects", "places", "values", "pre", "bias", "rest", "rest_size", "weights", "directions", "influence",
           "share")  # fmt: skip
PLAIN = ("counts", "tokens", "outputs", "facts", "active", "visited", "left_out", "replacement", "completeness",
         "completeness_inner")  # fmt: skip
TYPES = {"feature": "cross layer transcoder", "error": "mlp reconstruction error", "token": "embedding",
         "logit": "logit"}  # fmt: skip


def save(graph: Any, path: Path) -> Path:
    tensors = {name: getattr(graph, name).contiguous() for name in TENSORS}
    assert {*TENSORS, *PLAIN, "names", "supernodes", "local"} == {f.name for f in fields(graph)}
    plain = {name: _unnan(getattr(graph, name)) for name in PLAIN}
    labels = {repr(n): name for n, name in list(_named(graph).items())[: graph.counts[0]] if name}
    note = {"version": VERSION, "labels": labels, "supernodes": _numbers(graph), **plain}
    with cache.atomic(path) as temporary:
        files.write_tensors(tensors, temporary, {NOTE: json.dumps(note)})
    return path


def _numbers(graph: Any) -> list[list[Any]]:
    """The graph's groups: name, numbers of nodes."""
    return [[name, *map(graph.number, nodes)] for name, nodes in graph.supernodes.items()]


def named(made: Any, found: dict[str, Any]) -> Any:
    """The graph of these fields, in which groups are numbers of nodes."""
    groups = found.pop("supernodes")
    graph = made(**found)
    return graph.with_groups({name: [graph.nodes[i] for i in numbers] for name, *numbers in groups})


def _named(graph: Any) -> dict[Any, str]:
    """What each node is called."""
    return dict(zip(graph.nodes, graph._names_of(range(len(graph.nodes))), strict=True))


class Labels:
    """Names of features that a file tells."""

    def __init__(self, known: dict[int, str]):
        self.known = known

    def of(self, features: Iterable[int]) -> dict[int, str]:
        return {feature: self.known[feature] for feature in features if feature in self.known}


def load(path: Path) -> dict[str, Any]:
    """The fields of a graph."""
    try:
        tensors, notes = files.read_tensors(path)
        found = files.parse_json(notes[NOTE])
        version = found["version"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{path} holds no graph ({_short(err)}): give a file that graph.save(path) wrote") from err
    if version != VERSION:
        raise ValueError(f"{path} holds a graph of version {version}, this sae_lab reads version {VERSION}: trace anew")
    try:
        named: dict[str, Any] = {name: tensors[name] for name in TENSORS}
        named |= {name: math.nan if found[name] is None else found[name] for name in PLAIN}
        named["counts"] = tuple(map(int, named["counts"]))
        named["names"] = _by_part(named, found["labels"])
        named["supernodes"] = found.get("supernodes", [])
        _require_consistent(named)
    except REFUSED as err:
        raise ValueError(f"{path} holds a graph that contradicts itself ({_short(err)}): trace anew") from err
    return named


def _by_part(named: dict[str, Any], labels: dict[str, str]) -> dict[int, Labels]:
    """Names of features by part, from those by node."""
    found: dict[int, dict[int, str]] = {}
    keys = named["facts"].get("sites") or [f"mlp_out-{n}" for n in range(int(named["facts"]["n_layers"]))]
    for part, position, number in named["places"][: named["counts"][0]].tolist():
        name = labels.get(f"{keys[part]}@{position}/{number}")
        if isinstance(name, str):
            found.setdefault(part, {})[number] = name
    return {part: Labels(known) for part, known in found.items()}


def _require_consistent(named: dict[str, Any]) -> None:
    features, errors, tokens, logits = named["counts"]
    targets, sources, nodes = features + logits, features + errors + tokens, sum(named["counts"])
    shapes = {"effects": (targets, sources), "places": (nodes, 3), "weights": (logits,)}
    shapes |= dict.fromkeys(("values", "influence", "share"), (nodes,))
    shapes |= dict.fromkeys(("pre", "bias", "rest", "rest_size"), (targets,))
    for name, shape in shapes.items():
        if tuple(named[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(named[name].shape)}, its counts say {shape}")
    facts, length = named["facts"], len(named["tokens"])
    last = len([Site.of(key) for key in facts["sites"]] if facts.get("sites") else range(int(facts["n_layers"]))) - 1
    least, most = torch.tensor([[0, 0, -1, last + 1], [last, last, -1, last + 1]]).repeat_interleave(
        torch.tensor(named["counts"]), dim=1
    )  # layers, by kind
    layers, positions, numbers = named["places"].unbind(1)
    right = (least <= layers) & (layers <= most) & (positions >= 0) & (positions < length)
    right &= (numbers >= 0) | ((numbers == ERROR) & (torch.arange(nodes) >= features))
    if not bool(right.all()) or last < 0:
        raise ValueError(f"a node stands outside its {counted(length, 'token')} and {counted(last + 1, 'layer')}")
    if len(named["outputs"]) != logits or len(named["directions"]) != logits:
        raise ValueError(f"it has {logits} logits and {len(named['outputs'])} names of them")
    grouped = [i for name, *numbers in named["supernodes"] for i in numbers]
    if any(type(i) is not int or not 0 <= i < nodes for i in grouped) or len(set(grouped)) < len(grouped):
        raise ValueError("a group has a node that does not exist, or that is in another group too")
    if not all(type(group[0]) is str for group in named["supernodes"]):
        raise ValueError("the name of a group is no text")
    if not bool(named["effects"].isfinite().all()):
        raise ValueError("an effect is no finite number")


def _short(err: Exception) -> str:
    return f"{'' if type(err) is ValueError else f'{type(err).__name__} '}{str(err)[:120]}"


def _unnan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


# ---- Neuronpedia's JSON


def to_json(graph: Any, path: Path, slug: str, scan: str | None) -> Path:
    content = as_json(graph, slug, scan)
    with cache.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def as_json(
    graph: Any, slug: str, scan: str | None = None, pinned: Iterable[Node] = (),
    groups: Iterable[tuple[str, Iterable[Node]]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A graph as Neuronpedia reads it. pinned: what its page shows as pinned. groups: by name; None: the graph's."""
    if "sites" in graph.facts:
        raise ValueError("Neuronpedia's schema 1 has no features of attention: trace with transcoders alone")
    ids, renumbered = _ids(graph)
    at = dict(zip(graph.nodes, ids, strict=True))
    listed = [_node(graph, i, ids[i], name) for i, name in enumerate(_named(graph).values())]
    rows = [*range(graph.counts[0]), *range(sum(graph.counts[:3]), len(ids))]
    links = [
        {"source": ids[s], "target": ids[rows[t]], "weight": float(graph.effects[t, s])}
        for t, s in graph.effects.nonzero().tolist()
    ]
    meta = {
        "slug": slug, "scan": scan or str(graph.facts["model"]), "transcoder_list": [],
        "prompt_tokens": list(graph.tokens), "prompt": "".join(graph.tokens),
        "node_threshold": graph.facts.get("nodes"), "schema_version": SCHEMA, "generator": {"name": "sae_lab"},
        "renumbered": renumbered,
    }  # fmt: skip
    grouped = [[name, *(ids[i] for i in numbers)] for name, *numbers in _numbers(graph)]
    if groups is not None:
        grouped = [[name, *(at[node] for node in nodes if node in at)] for name, nodes in groups]
    view = {
        "pinnedIds": [at[node] for node in pinned if node in at], "supernodes": grouped,
        "linkType": "both", "clickedId": "", "sg_pos": "",
    }  # fmt: skip
    return {"metadata": meta, "qParams": view, "nodes": listed, "links": links}


def _ids(graph: Any) -> tuple[list[str], dict[str, str]]:
    """(the node ids, {id of a feature that an error has too: the id it has instead}). A feature n of layer 0 and the
    error of layer n at the same token have the same id in this schema."""
    ids, renumbered, largest = [], {}, int(graph.places[:, 2].max()) + graph.n_layers
    errors = {(layer, position) for (layer, position, number) in graph.places.tolist() if number == ERROR}
    for kind, (layer, position, number) in zip(graph.kinds, graph.places.tolist(), strict=True):
        if kind == "feature" and layer == 0 and (number, position) in errors:
            renumbered[f"0_{number}_{position}"] = f"0_{largest + 1 + number}_{position}"
            number = largest + 1 + number
        parts = {
            "feature": (layer, number), "error": (0, layer), "token": ("E", number), "logit": (layer + 1, number)
        }  # fmt: skip
        ids.append("{}_{}_{}".format(*parts[kind], position))
    return ids, renumbered


def _node(graph: Any, i: int, id: str, name: str) -> dict[str, Any]:
    kind, (layer, position, number) = graph.kinds[i], graph.places[i].tolist()
    logit = i - sum(graph.counts[:3])
    facts = {
        "feature": (_cantor(layer, number), str(layer), f"{layer}_{number}-0", name),
        "error": (ERROR, str(layer), f"{layer}_{position}-0", ""),
        "token": (position, "E", f"E_{number}-{position}", ""),
        "logit": (number, str(layer + 1), f"L_{number}-{position}", f'Output "{name}"'),
    }
    feature, at, js, clerp = facts[kind]
    weight = float(graph.weights[logit]) if kind == "logit" else 0.0
    return {
        "node_id": id, "feature": feature, "layer": at, "ctx_idx": position, "feature_type": TYPES[kind],
        "token_prob": weight, "is_target_logit": logit == 0, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": js,
        "clerp": f"{clerp} (p={weight:.3f})" if kind == "logit" else clerp,
        "influence": None if kind == "logit" else _unnan(float(graph.share[i])),
        "activation": _unnan(float(graph.values[i])) if kind == "feature" else None,
    }  # fmt: skip


def _cantor(a: int, b: int) -> int:
    return (a + b) * (a + b + 1) // 2 + b


def _uncantor(code: int) -> tuple[int, int]:
    total = (math.isqrt(8 * code + 1) - 1) // 2
    b = code - total * (total + 1) // 2
    return total - b, b


def from_json(path: Path) -> dict[str, Any]:
    """The fields of a graph in Neuronpedia's JSON."""
    try:
        content = files.read_json(path)
        meta = content["metadata"]
        schema = meta.get("schema_version", SCHEMA)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{path} is no graph of Neuronpedia ({_short(err)}): give JSON of nodes and links") from err
    if schema not in (SCHEMA, None):
        raise ValueError(f"{path} is a graph of schema {schema}, this sae_lab reads schema {SCHEMA}: export it anew")
    try:
        found = _read_nodes(content["nodes"], meta)
        number, counts = found.pop("number"), found["counts"]
        found["effects"] = _read_links(content["links"], number, counts)
        found["supernodes"] = _read_groups(content.get("qParams") or {}, number)
        _require_consistent(found)
    except REFUSED as err:
        raise ValueError(f"{path} holds a graph that contradicts itself ({_short(err)})") from err
    return found


def unused(name: str, taken: Collection[str]) -> str:
    """The name, or, where it is taken, the name and the first number from 2 on that makes it free."""
    again = (f"{name} {n}" for n in itertools.count(2))
    return name if name not in taken else next(other for other in again if other not in taken)


def _read_groups(view: dict[str, Any], number: dict[str, int]) -> list[list[Any]]:
    """Groups as names and numbers of nodes. Neuronpedia's page lets a group keep ids of nodes that were pruned away:
    these are left out."""
    found, gone, taken = [], 0, set()
    for name, *ids in view.get("supernodes") or []:
        known = [number[id] for id in dict.fromkeys(ids) if id in number and number[id] not in taken]
        taken |= set(known)
        gone += len(set(ids)) - len(known)
        named = unused(str(name).strip() or "group", [group[0] for group in found])
        found += [[named, *known]] if known else []
    if gone:
        log.warning(
            "%s of this graph's groups are no nodes of it, or in an earlier group: left out", counted(gone, "id")
        )
    return found


def _read_nodes(nodes: list[dict[str, Any]], meta: dict[str, Any]) -> dict[str, Any]:
    """All fields but the effects, and "number": the place of each node id."""
    kinds = {name: kind for kind, name in TYPES.items()}
    if unknown := [n["feature_type"] for n in nodes if n["feature_type"] not in kinds]:
        raise ValueError(f"a node has the unknown type {str(unknown[0])[:40]!r}, known are {', '.join(kinds)}")
    tokens, logits = list(map(str, meta["prompt_tokens"])), [n for n in nodes if n["feature_type"] == "logit"]
    if not logits:
        raise ValueError("it has no logit, from whose layer the number of layers is told")
    layers = int(logits[0]["layer"]) - 1
    places, order = [], []
    for kind, name in TYPES.items():
        mine = [(_place(node, kind, layers), node) for node in nodes if node["feature_type"] == name]
        mine = mine if kind == "logit" else sorted(mine, key=lambda pair: pair[0])
        places.append([place for place, _ in mine])
        order += [node for _, node in mine]
    number = {node["node_id"]: i for i, node in enumerate(order)}
    if len(number) < len(order):
        twice = next(node["node_id"] for i, node in enumerate(order) if number[node["node_id"]] != i)
        raise ValueError(f"two nodes have the id {twice!r}, so that its links are of either")
    counts, nan = tuple(map(len, places)), math.nan
    targets = counts[0] + counts[3]
    told = torch.tensor([nan if (v := node.get("influence")) is None else float(v) for node in order])
    names: dict[int, dict[int, str]] = {}
    for place, node in zip(places[0], order, strict=False):
        if node.get("clerp"):
            names.setdefault(place[0], {})[place[2]] = str(node["clerp"])
    weights = torch.tensor([float(node.get("token_prob") or 0.0) for node in order[-counts[3] :]])
    activations = [node.get("activation") for node in order]
    return {
        "number": number, "counts": counts, "places": torch.tensor([p for part in places for p in part]),
        "values": torch.tensor([nan if v is None else float(v) for v in activations]),
        "names": {layer: Labels(known) for layer, known in names.items()},
        "weights": weights, **{name: torch.full((targets,), nan) for name in ("pre", "bias", "rest", "rest_size")},
        "directions": torch.zeros(counts[3], 0), "influence": torch.full((len(order),), nan), "share": told,
        "tokens": tokens, "active": counts[0],
        "outputs": [_output(node) for node in order[-counts[3] :]],
        "facts": {"model": meta.get("scan"), "n_layers": layers, "nodes": meta.get("node_threshold")},
        **dict.fromkeys(("visited", "left_out", "replacement", "completeness", "completeness_inner"), nan),
    }  # fmt: skip


def _place(node: dict[str, Any], kind: str, layers: int) -> list[int]:
    """(layer, position, number) of a node; its feature's number is told by ``feature``, since ids may be renumbered."""
    position = int(node["ctx_idx"])
    if kind == "token":
        return [-1, position, int(node["node_id"].split("_")[1])]
    if kind == "logit":
        return [layers, position, int(node["feature"])]
    layer, number = int(node["layer"]), ERROR
    if kind == "feature":
        at, number = _uncantor(int(node["feature"]))
        if at != layer:  # some exporters give the feature's own number
            number = int(node["node_id"].split("_")[1])
    return [layer, position, number]


def _output(node: dict[str, Any]) -> str:
    """The token of a logit: 'Output " Paris" (p=0.9)' or another text."""
    text = str(node.get("clerp") or node["feature"])
    begin, end = text.find('"'), text.rfind('"')
    return text[begin + 1 : end] if text.startswith("Output") and end > begin else text


def _read_links(links: list[dict[str, Any]], number: dict[str, int], counts: tuple[int, ...]) -> Tensor:
    features, sources = counts[0], sum(counts[:3])
    if (size := (features + counts[3]) * sources) > MOST_EFFECTS:
        raise ValueError(f"its {len(number):,} nodes could have {size:,} edges, more than {MOST_EFFECTS:,}")
    effects = torch.zeros(features + counts[3], sources)
    for link in links:
        source, target = number[link["source"]], number[link["target"]]
        row = target if target < features else target - sources + features
        if source >= sources or not (target < features or target >= sources):
            raise ValueError(f"a link leads from {link['source']} to {link['target']}, which are no source and target")
        effects[row, source] = float(link["weight"])
    return effects
