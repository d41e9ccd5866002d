"""The same function gives the same figures: every public function that takes a coder, of coders that are written
differently and do the same.

A coder's codes have a unit of their own: decoder rows of another norm, an input brought to one length, features in
another order, another library's file, half the bits. What is measured must not depend on that, up to rounding, or be
refused in a sentence. Codes themselves do, by a factor that is known here; figures in their unit are compared by it.

A function that is added and takes a coder must be given a case here, or a reason why it has no figures
(``test_every_public_function_is_here``).
"""

import copy
import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.saes.base import SparseCoder

D, D_SAE, WORDS = 48, 64, 44  # of the stream's coordinates, so many say which token it is
SITE, LATER, HEADS = sl.Site("resid_post", layer=0), sl.Site("resid_post", layer=1), sl.Site("attn_z", layer=1)
PROMPTS = [" the river was old and the city stood by", " the king was dead and the army came to"]
SOURCES = [" the garden was old and the church stood by", " the queen was dead and the people came to"]
TEXTS = ["The war began when the army crossed the river", "The king fled the old city in the winter"]
FEATURE = 5

# ---------------------------------------------------------------------------------------------- spellings


@dataclasses.dataclass
class Spelled:
    """A coder in another spelling. place: the number that each feature of the plain coder has in it. unit: a plain
    code over that code of it, feature by feature in the plain order."""

    kind: str
    coder: SparseCoder
    place: torch.Tensor
    unit: torch.Tensor
    size: float
    plain: SparseCoder

    def at(self, feature: int) -> int:
        return int(self.place[feature])

    def back(self, feature: int) -> int:
        return int((self.place == feature).nonzero()[0, 0]) if feature >= 0 else feature

    def of_features(self, values: Any) -> torch.Tensor:
        """Of figures by feature along the last axis: in the plain order."""
        return torch.as_tensor(values.copy() if isinstance(values, np.ndarray) else values).detach()[..., self.place]

    def codes(self, values: Any) -> torch.Tensor:
        """Of codes by feature: in the plain order and unit."""
        return self.of_features(values) * self.unit

    def again(self, coder: SparseCoder) -> "Spelled":
        """Another coder in this spelling."""
        return respelled(coder, self.kind, self.size)


def respelled(coder: SparseCoder, kind: str, size: float) -> Spelled:
    """size: the norm of each row of x over √d."""
    made, n = copy.deepcopy(coder), coder.d_sae
    place, unit = torch.arange(n), torch.ones(n)
    in_code_units = [made.get_parameter_or_buffer(name) for name in (*made.code_units, "f_scale")]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if kind in NORMED:
            scale = size if kind == "length" else size * math.sqrt(coder.d_in / (coder.d_in - 1))  # std has d - 1
            for tensor in (*in_code_units, made.b_dec):
                tensor.div_(scale)
            made.input_norm, unit = kind, unit * scale
        elif kind == "rows":
            unit = 2.0 ** (4 * torch.rand(n, generator=generator) - 2)
            for tensor in (*in_code_units, made.W_enc):
                tensor.div_(unit)
            made.W_dec.mul_(unit[:, None])
        elif kind == "order":
            order = torch.randperm(n, generator=generator)
            place = order.argsort()
            made.W_enc.copy_(made.W_enc[:, order].clone())
            for tensor in (*in_code_units, made.W_dec):
                tensor.copy_(tensor[order].clone())
        elif kind == "half":
            made.half()
    return Spelled(kind, made.eval(), place, unit, size, coder)


NORMED = ("length", "layer")
FORMATS = ("sae_lab", "float16", "saelens", "dictionary_learning", "sparsify")
KINDS = (*NORMED, "rows", "order", "half", *FORMATS)
ROUNDING = {"half": 2e-3, "float16": 2e-3}  # of float16's weights; else that of float32 sums, a good deal of them


def spelled_in(coder: SparseCoder, kind: str, size: float, folder: Any) -> Spelled:
    """In any of KINDS, also those that go through a file."""
    if kind not in FORMATS:
        return respelled(coder, kind, size)
    if kind == "float16":
        path = coder.save(folder / kind, dtype=torch.float16)
    else:
        path = coder.save(folder / kind, format=kind)
    loaded = sl.load(path)
    if loaded.meta.get("f_scale") == "unknown":
        loaded.f_scale.copy_(coder.f_scale)
    return Spelled(kind, loaded, torch.arange(coder.d_sae), torch.ones(coder.d_sae), size, coder)


# ---------------------------------------------------------------------------------------------- a lab


@pytest.fixture(scope="module")
def lab(make_module, tokenizer, small_text, tmp_path_factory):
    """A model whose stream behind its first block has one norm and mean 0 at every token, so that each coder there has
    a twin that normalises: embeddings are the same numbers in another order, all exact in float16 as stores keep them,
    and the block adds its biases only, on coordinates of their own. Letters of words can be told from embeddings, and
    some features read them."""
    module = make_module("llama", len(tokenizer), attention_bias=True, mlp_bias=True)
    torch.manual_seed(0)
    block, table = module.model.layers[0], module.model.embed_tokens.weight
    letters = torch.zeros(26, D)
    letters[:, :WORDS] = torch.randn(26, WORDS)
    with torch.no_grad():
        scores = torch.randn(len(tokenizer), WORDS)
        for number, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
            if found := re.fullmatch(r"Ġ([a-z])[a-z]*", token):
                scores[number] += 2 * letters[ord(found[1]) - ord("a"), :WORDS]
        values = (torch.linspace(-2, 2, WORDS) * 32).round() / 32
        table.zero_()
        table[:, :WORDS] = values[scores.argsort(1).argsort(1)]
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.weight.zero_()
            layer.bias.zero_()
            layer.bias[WORDS:] = torch.tensor([1.0, -1.0, 0.5, -0.5])
        norm = float((values.square().sum() + 4 * (4 + 1) / 2).sqrt())
    lm = sl.LM(module, tokenizer=tokenizer)
    store = sl.harvest(lm, SITE, small_text, tokens=1500, path=tmp_path_factory.mktemp("store"), context=32)
    x = store.rows(np.arange(len(store)), SITE.key).float()
    assert float((x.norm(dim=1) - norm).abs().max()) < 1e-5 and float(x.mean(1).abs().max()) < 1e-6
    every = [lm.read(text, [SITE, LATER, HEADS]) for text in [*TEXTS, *PROMPTS, *SOURCES, *small_text[:2]]]
    later, heads = (torch.cat([one[site][0, 1:] for one in every]).float() for site in (LATER, HEADS))
    jump = _coder(x.unique(dim=0), SITE, 0, letters[:8])
    jump.calibrate([x])
    topk = sl.TopK(D, D_SAE, k=8, seed=4)  # what sparsify holds
    with torch.no_grad():
        topk.b_dec.copy_(x.mean(0))
        for tensor in (topk.W_enc, topk.W_dec):
            tensor.mul_(0.6)
    topk.reads = topk.writes = (SITE,)
    topk.calibrate([x])
    made = {
        "lm": lm, "store": store, "x": x, "text": small_text, "jump": jump, "topk": topk,
        "folder": tmp_path_factory.mktemp("coders"),
        "other": _coder(x.unique(dim=0), SITE, 1), "later": _coder(later, LATER, 2), "heads": _coder(heads, HEADS, 3),
        "metric": sl.circuits.logit_difference(lm, " river", " king"), "size": norm / math.sqrt(D), "norm": norm,
        "indexes": {},
    }  # fmt: skip
    made["other"].calibrate([x])
    made["later"].calibrate([later])
    made["heads"].calibrate([heads])
    return SimpleNamespace(**made)


def _coder(x: torch.Tensor, site: sl.Site, seed: int, reads: torch.Tensor | None = None) -> SparseCoder:
    """A JumpReLU whose thresholds lie in gaps of what these rows give, so that rounding turns nothing on or off."""
    coder = sl.JumpReLU(D, D_SAE, seed=seed)
    with torch.no_grad():
        if reads is not None:
            unit = torch.nn.functional.normalize(reads - reads.mean(1, keepdim=True), dim=1)
            coder.W_dec[: len(unit)], coder.W_enc[:, : len(unit)] = unit, unit.T
        coder.b_dec.copy_(x.mean(0))
        coder.threshold.zero_()
        coder.b_enc.copy_(0.1 * torch.randn(D_SAE, generator=torch.Generator().manual_seed(seed)))
        pre = (x - coder.b_dec) @ coder.W_enc + coder.b_enc
        ascending = pre.sort(dim=0).values[int(0.82 * len(x)) : int(0.95 * len(x))]
        widest = ascending.diff(dim=0).argmax(0, keepdim=True)
        coder.threshold.copy_((ascending.gather(0, widest) + ascending.gather(0, widest + 1))[0] / 2)
        coder.W_enc.mul_(0.4)  # few of so many unit rows fit x best so
        for tensor in (coder.b_enc, coder.threshold):
            tensor.mul_(0.4)
        for tensor in (coder.W_enc, coder.b_enc, coder.threshold, coder.b_dec):
            tensor.copy_(tensor.half())  # half of the bits then change what is written, and not what fires
    coder.reads = coder.writes = (site,)
    return coder.eval()


# ---------------------------------------------------------------------------------------------- cases

CASES: dict[str, Callable[[Spelled, Any], Any]] = {}
REFUSED: dict[str, tuple[str, ...]] = {}  # by case: the spellings that it refuses
LEFT_OUT: dict[str, tuple[str, ...]] = {}  # by case: the spellings that are not the same function there


def case(*names: str, refuses: tuple[str, ...] = (), without: tuple[str, ...] = ()):
    def register(fn):
        for name in names:
            assert name not in CASES
            CASES[name], REFUSED[name], LEFT_OUT[name] = fn, refuses, without
        return fn

    return register


def numbers(result: Any, *leave_out: str) -> dict[str, Any]:
    """The fields of a result that hold figures."""
    names = [f.name for f in dataclasses.fields(result)] if dataclasses.is_dataclass(result) else result._fields
    found = {name: getattr(result, name) for name in names if name not in leave_out}
    return {name: value for name, value in found.items() if _is_figure(value)}


def _is_figure(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_figure(v) for v in value)
    if isinstance(value, dict):
        return all(_is_figure(v) for v in value.values())
    return isinstance(value, int | float | torch.Tensor | np.ndarray | np.generic)


@case("SparseCoder")
def _(s, lab):
    c, x = s.coder, lab.x[:200]
    codes = c.encode(x)
    sparse = c.strengths(c.sparse_codes(x), x).dense()
    change = torch.zeros(len(x), 2)
    change[:, 0] = 1 / s.unit[FEATURE]
    return {
        "x_hat": c(x).x_hat, "codes": s.codes(codes), "sparse": s.codes(c.sparse_codes(x).dense()),
        "strengths": s.of_features(c.strengths(codes, x)), "the same": s.of_features(sparse), "silent": c.silent(x),
        "sum": c.strengths(codes, x) @ c.directions() + c.silent(x) - c(x).x_hat + 1,
        "directions": c.directions()[s.place], "f_scale": s.codes(c.f_scale),
        "write_of": c.write_of(change, [s.at(FEATURE), s.at(0)], x), "calibrated": s.codes(_calibrated(c, x)),
    }  # fmt: skip


def _calibrated(coder, x):
    made = copy.deepcopy(coder)
    made.calibrate([x])
    return made.f_scale


def _edited(*names):
    def register(make):
        @case(*names)
        def _(s, lab):
            return {i: lab.lm.logits(PROMPTS, edits=[edit]) for i, edit in enumerate(make(s, s.at(FEATURE), s.at(0)))}

    return register


_edited("Steer")(lambda s, i, j: [sl.Steer(s.coder, i, 2.0), sl.Steer(s.coder, [i, j], 1.0, error="drop")])
_edited("Clamp")(lambda s, i, j: [sl.Clamp(s.coder, [i, j], 1.5)])
_edited("Scale")(lambda s, i, j: [sl.Scale(s.coder, list(range(D_SAE)), 2.0)])
_edited("Ablate")(
    lambda s, i, j: [
        sl.Ablate(s.coder, list(range(D_SAE))), sl.Ablate(s.coder, [i, j], to="mean", reference=TEXTS),
        sl.Ablate(s.coder, [i, j], to="resample", reference=TEXTS),
    ]
)
_edited("Patch")(
    lambda s, i, j: [sl.Patch(s.coder, SOURCES), sl.Patch(s.coder, SOURCES, feature=i, error="patch"),
                     sl.Patch(s.coder, SOURCES, error="drop")]
)  # fmt: skip
_edited("Splice")(lambda s, i, j: [sl.Splice(s.coder)])
_edited("Project")(lambda s, i, j: [sl.Project(s.coder, [i, j])])


def _index(s, lab):
    if s.coder.fingerprint() not in lab.indexes:
        lab.indexes[s.coder.fingerprint()] = sl.index_features(s.coder, lab.lm, lab.store)
    return lab.indexes[s.coder.fingerprint()]


@case("index_features", "FeatureIndex", "FeatureIndex.activations", "FeatureIndex.density_histogram")
def _(s, lab):
    index = _index(s, lab)
    view = index[s.at(FEATURE)]
    rows, values = index.activations(s.at(FEATURE))
    return {
        "density": s.of_features(index.density), "mean": s.codes(index.mean), "max": s.codes(index.max),
        "norm": s.of_features(index.norm), "rows": rows, "values": values * float(s.unit[FEATURE]),
        "histogram": view.histogram["counts"], "promoted": view.promoted, "suppressed": view.suppressed,
        "lens": view.lens_note, "neighbours": sorted((s.back(i), c) for i, c in view.neighbours[:4]),
        "cofiring": sorted(j for _, j, _ in view.cofiring[:5]), "densities": index.density_histogram["counts"],
        "contexts": [c.tokens for c in view.top[:3]],
    }  # fmt: skip


@case(
    "FeatureIndex.order", "FeatureIndex.best", "FeatureIndex.search", "FeatureIndex.top_tokens",
    "FeatureIndex.norm",
)
def _(s, lab):
    index = _index(s, lab)
    return {
        "by norm": index.norm[index.order("norm")], "by density": sorted(index.density[index.order()]),
        "found": sorted(map(s.back, index.search("density>1%", limit=D_SAE).features)),
        "norm": s.of_features(index.norm),
        "searched": sorted(map(s.back, index.search("the", limit=D_SAE).features)),
        "top": [index.top_tokens(s.at(i)) for i in range(0, D_SAE, 7)],
        "best": sorted(index._readability[index.best(4)]),
    }  # fmt: skip


@case("FeatureIndex.score", "FeatureIndex.compare", "FeatureIndex.weakest")
def _(s, lab):
    index, i, unit = _index(s, lab), s.at(FEATURE), float(s.unit[FEATURE])
    scored, pair = index.score(i, TEXTS[0]), index.compare(i, s.at(0))
    return {
        "score": [math.nan if v is None else round(v * unit, 2) for v in scored.values], "peak": scored.peak,
        "pair": [pair.cosine, pair.both, *pair.only, pair.jaccard], "weakest": [c.tokens for c in index.weakest(i, 2)],
    }  # fmt: skip


@case("features")
def _(s, lab):
    table = sl.features(lab.lm, s.coder, TEXTS)
    found = torch.zeros(len(TEXTS), 20, D_SAE)
    found[table.prompt, table.position, table.feature] = table.value
    return {"codes": s.codes(found), "left out": len(table.left_out)}


@case("harvest")
def _(s, lab):
    path = lab.folder / f"codes-{s.kind}-{s.coder.fingerprint()}"
    store = sl.harvest(lab.lm, SITE, lab.text, tokens=100, path=path, coder=s.coder, context=32)
    return {"codes": s.codes(store.codes(0, 100, D_SAE).dense())}


@case("find_features")
def _(s, lab):
    texts, against = lab.text[:6], lab.text[6:12]
    table = sl.find_features(lab.lm, s.coder, [t[:200] for t in texts], [t[:200] for t in against], permutations=99)
    rows = {}
    for row in table.to_pandas().to_dict("records"):
        feature = s.back(int(row.pop("feature")))
        row["mean_difference"] *= float(s.unit[feature])
        rows[feature] = row
    return rows


@case("dose_response", refuses=NORMED)
def _(s, lab):
    result = sl.dose_response(
        lab.lm, s.coder, s.at(FEATURE), PROMPTS, [" river"], TEXTS, strengths=(0, 1, 2), examples=(PROMPTS, SOURCES),
        seeds=1,
    )  # fmt: skip
    return result.rows


@case("match")
def _(s, lab):
    one, two = sl.match(s.coder, lab.other, live=True), sl.match(lab.other, s.coder)
    return {
        "one": numbers(one, "orderedness", "permutation", "control"),
        "two": numbers(two, "orderedness", "permutation", "best", "cosines", "control"),
        "permutation": [s.back(int(i)) for i in one.permutation], "best": s.of_features(two.best),
    }  # fmt: skip


# ---- saes


@case("saes.unsuppress")
def _(s, lab):
    made = sl.saes.unsuppress(s.coder, lab.x)
    return {"x_hat": made(lab.x).x_hat, "codes": s.codes(made.encode(lab.x))}


@case("saes.realign")
def _(s, lab):
    return {"x_hat": sl.saes.realign(s.coder, lab.x[:700])(lab.x).x_hat}


@case("saes.optimise_codes")
def _(s, lab):
    x = lab.x[:60]
    return {k: s.codes(sl.saes.optimise_codes(s.coder, x, k=k).dense()) for k in (None, 3)}


@case("saes.resample")
def _(s, lab):
    made = copy.deepcopy(s.coder)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[s.place[[3, 11, 40]]] = True
    sl.saes.resample(made, lab.x, dead)
    return {"x_hat": made(lab.x).x_hat}


@case("saes.baselines")
def _(s, lab):
    return {name: coder(lab.x[:50]).x_hat for name, coder in sl.saes.baselines(s.coder, lab.x).items()}


# ---- circuits


@case("circuits.attribution")
def _(s, lab):
    found = sl.circuits.attribution(lab.lm, s.coder, PROMPTS, SOURCES, lab.metric, steps=2, check=6)
    truth = {(p, s.back(f)): v for (p, f), v in found.true_effects.items() if abs(v) > 1e-5}  # others are as good
    return {"effects": s.of_features(found.effects), "error": found.error, "truth": truth, "base": found.base}


@case("circuits.patched_directions")
def _(s, lab):
    prompts, sources = PROMPTS * 2, [*SOURCES, *reversed(SOURCES)]
    found = sl.circuits.patched_directions(lab.lm, s.coder, prompts, sources, numbers=(1, 4, 100), steps=2)
    return {"kl": found.kl, "edit": found.edit, "directions": found.directions}


@case("circuits.read_prompt", "circuits.PromptReading")
def _(s, lab):
    reading = sl.circuits.read_prompt(lab.lm, s.coder, TEXTS[0])
    features, values = reading.active(s.coder, 4)
    active = {s.back(f): v * float(s.unit[s.back(f)]) for f, v in zip(features.tolist(), values.tolist(), strict=True)}
    along = reading.along(s.coder, s.at(FEATURE)) * s.unit[FEATURE]
    return {"active": active, "along": along, "counts": reading.along(s.coder, "active"), "losses": reading.losses()}


@case("circuits.direct_effects")
def _(s, lab):
    found = sl.circuits.direct_effects(lab.lm, s.coder, TEXTS[0], on=[" river", " king"], n=None)
    effects = {s.back(f): e for f, e in zip(found.features.tolist(), found.effects.tolist(), strict=True)}
    scaled = {s.back(f): v for f, v in zip(found.features.tolist(), found.scaled.tolist(), strict=True)}
    by_feature = ("features", "values", "effects", "scaled", "promoted")
    return {"effects": effects, "scaled": scaled} | numbers(found, *by_feature)


@case("circuits.effects_of")
def _(s, lab):
    back = respelled(lab.later, "" if s.kind in NORMED else s.kind, s.size)
    later = back.coder
    ways: dict[str, dict[str, Any]] = {
        "ablated": {}, "steered": {"strength": 1.0}, "directions": {"against": "directions"},
    }  # fmt: skip
    found = {}
    for name, settings in ways.items():
        texts = list(lab.text[:2])
        one = sl.circuits.effects_of(lab.lm, s.coder, s.at(FEATURE), texts, [later], controls=6, **settings)
        found[name] = {
            "changes": back.codes(one.changes[LATER]), "z": back.of_features(one.z[LATER]), "beyond": one.beyond,
            "largest": one.largest, "by chance": one.largest_controls, "controls": [s.back(i) for i in one.controls],
        }  # fmt: skip
    return found


@case("circuits.feature_circuit", refuses=NORMED)
def _(s, lab):
    later = s.again(lab.later)

    def back(node):
        spelled = s if node.site == SITE else later
        return node.site.key, node.position, spelled.back(node.feature)

    found = sl.circuits.feature_circuit(
        lab.lm, [s.coder, later.coder], PROMPTS, SOURCES, lab.metric, steps=2, sizes=(3,), draws=1, edges=4, check=3
    )
    return {
        "nodes": {back(n): e for n, e in found.nodes.items()},
        "edges": {(back(e.upstream), back(e.downstream)): e.effect for e in found.edges},
        "truth": {back(n): e for n, e in found.true_effects.items()}, "faithfulness": numbers(found.faithfulness),
    }  # fmt: skip


@case("circuits.head_attribution", "circuits.head_shares", refuses=NORMED)
def _(s, lab):
    heads = s.again(lab.heads)
    found = sl.circuits.head_attribution(lab.lm, heads.coder, heads.at(FEATURE), TEXTS[0])
    unit = float(heads.unit[FEATURE])
    shares = sl.circuits.head_shares(lab.lm, heads.coder, TEXTS)
    return {
        "parts": found.parts * unit, "pre": found.pre * unit, "bias": found.bias * unit, "shares": found.shares,
        "written": found.written, "position": found.position, "all": heads.of_features(shares.T),
    }  # fmt: skip


@case("circuits.invariant_edges", "circuits.check_edges", refuses=NORMED)
def _(s, lab):
    later = s.again(lab.later)
    edges = sl.circuits.invariant_edges(lab.lm, s.coder, later.coder)
    edges = later.codes(edges)[s.place] / s.unit[:, None]
    feature = s.at(_often(s, lab)[0])
    check = sl.circuits.check_edges(lab.lm, s.coder, later.coder, feature, [text[:500] for text in lab.text[:4]])
    numbers_there = [later.back(f) for f in check.features]
    frozen = {f: check.frozen[:, i] * float(later.unit[f]) for i, f in enumerate(numbers_there)}
    return {"edges": edges, "frozen": frozen, "error is rounding": check.error < 1e-3}


@case("circuits.trace", without=NORMED)  # its edges are those of the coder's own norm
def _(s, lab):
    transcoder = s.again(_transcoder(lab))
    graph = sl.circuits.trace(lab.lm, sl.TranscoderSet([transcoder.coder]), TEXTS[0], [" king"])
    sources, features = graph.nodes[: graph.effects.shape[1]], graph.nodes[: graph.counts[0]]
    name = {n: (n.site.key, n.position, transcoder.back(n.feature) if n.site.kind == "mlp_out" else n.feature)
            for n in graph.nodes}  # fmt: skip
    unit = {n: float(transcoder.unit[name[n][2]]) for n in features}
    effects = {(name[a], name[b]): float(graph.effects[graph.row(b), graph.number(a)]) * unit.get(b, 1.0)
               for b in graph.targets for a in sources}  # fmt: skip
    pruned, groups = graph.prune(), graph.groups(alike=0.3)
    return {
        "effects": effects, "replacement": graph.replacement, "kept": sorted(name[n] for n in pruned.nodes),
        "groups": sorted(sorted(name[n] for n in group.nodes) for group in groups.groups), "share": groups.share,
    }  # fmt: skip


@case("circuits.trace_many", without=NORMED)
def _(s, lab):
    transcoder = s.again(_transcoder(lab))
    coders = sl.TranscoderSet([transcoder.coder])
    task = sl.circuits.trace_many(lab.lm, coders, [text[:40] for text in lab.text[:4]], [" king"] * 4, edges=1.0)

    def at(key):
        return (*key[:2], transcoder.back(key[2]) if key[0] == "feature" else key[2], key[3])

    unit = {e.downstream: float(transcoder.unit[at(e.downstream)[2]]) if e.downstream[0] == "feature" else 1.0
            for e in task.edges}  # fmt: skip
    edges = {(at(e.upstream), at(e.downstream)): e.effect * unit[e.downstream] for e in task.edges}
    return {"edges": edges, "carried": task.carried, "common": task.common}


def _transcoder(lab: Any) -> SparseCoder:
    """A JumpReLU from mlp_in to mlp_out whose thresholds lie in gaps, as those of ``_coder``."""
    reads, writes = sl.Site("mlp_in", layer=1), sl.Site("mlp_out", layer=1)
    x = lab.lm.read(TEXTS[0], reads)[reads][0].float()
    coder = sl.JumpReLU(D, D_SAE, seed=6, d_out=D)
    with torch.no_grad():
        for tensor in (coder.W_enc, coder.W_dec):
            tensor.copy_(tensor.half())
        ascending = (x @ coder.W_enc + coder.b_enc).sort(dim=0).values[len(x) // 2 :]
        widest = ascending.diff(dim=0).argmax(0, keepdim=True)
        middle = (ascending.gather(0, widest) + ascending.gather(0, widest + 1))[0] / 2
        coder.threshold.copy_(middle.clamp_min(0.05).half())
    coder.reads, coder.writes = (reads,), (writes,)
    return coder.eval()


@case("circuits.pull_back", refuses=NORMED)
def _(s, lab):
    later = s.again(lab.later)
    found = sl.circuits.pull_back(lab.lm, later.coder, later.at(FEATURE), TEXTS)
    return numbers(found, "feature", "directions") | {"directions": found.directions * float(later.unit[FEATURE])}


# ---- evals


@case("evals.absorption", without=("dictionary_learning", "float16"))  # it fits a hundred probes
def _(s, lab):
    found = {}
    for convention in ("sae_lab", "saebench"):
        one = sl.evals.absorption(s.coder, lab.lm, words=400, convention=convention)
        assert one.defined > 0
        letters = {x.letter: [x.rate, x.silent, x.fraction, x.control, *map(s.back, x.main)] for x in one.letters}
        found[convention] = {"letters": letters, "cases": [(c.word, s.back(c.feature), c.share) for c in one.cases]}
        found[convention] |= numbers(one, "letters", "cases")
    return found


@case("evals.board_games", without=(*NORMED, *FORMATS))  # a model of games, whose stream has many norms
def _(s, lab):
    lm, games = sl.evals.othello_gpt(), sl.worlds.othello(6, games=40, seed=1)
    coder = sl.JumpReLU(lm.width(LATER), D_SAE)
    with torch.no_grad():
        coder.threshold.fill_(2.0)
        coder.W_enc.copy_(coder.W_enc.half())
    coder.reads = coder.writes = (LATER,)
    spelled = s.again(coder)
    found = sl.evals.board_games(spelled.coder, lm, games)
    scores = found.coder
    return numbers(scores, "best", "auroc_best") | {"best": [spelled.back(int(i)) for i in scores.best]}


@case("evals.reconstruction", "evals.transfer", "evals.by_position", "evals.pathological_errors")
def _(s, lab):
    few: dict[str, Any] = {"tokens": 120, "context": 32}
    s.coder.meta["context"] = 32
    transfer = sl.evals.transfer(s.coder, lab.lm, lab.text[:4], other_text=lab.text[4:8], tokens=120)
    return {
        "home": numbers(transfer.at_home), "elsewhere": numbers(transfer.elsewhere), "transfer": numbers(transfer),
        "position": numbers(sl.evals.by_position(s.coder, lab.lm, lab.text[:4], **few)),
        "errors": numbers(sl.evals.pathological_errors(s.coder, lab.lm, lab.text[:4], **few)),
    }  # fmt: skip


@case("evals.choose_l0")
def _(s, lab):
    return numbers(sl.evals.choose_l0([s.coder, lab.other], lab.x))


@case("evals.cones")
def _(s, lab):
    concepts = torch.randn(6, D, generator=torch.Generator().manual_seed(0))
    found = sl.evals.cones(s.coder, concepts, lab.x, sizes=(1, 2, 4))
    return numbers(found, "features") | {"features": [[s.back(int(i)) for i in row] for row in found.features]}


@case("evals.consistency")
def _(s, lab):
    [pair] = sl.evals.consistency(s.coder, lab.other, x=lab.x).pairs
    [turned] = sl.evals.consistency(lab.other, s.coder, x=lab.x).pairs
    leave_out = ("orderedness", "orderedness_random", "correlations", "match")
    r = s.of_features(turned.correlations)
    return {"one": numbers(pair, *leave_out), "two": numbers(turned, *leave_out), "r": r}


@case("evals.description_length")
def _(s, lab):
    return numbers(sl.evals.description_length([s.coder, lab.other], lab.x), "coders")


@case("evals.monosemanticity")
def _(s, lab):
    found = sl.evals.monosemanticity(s.coder, lab.x)
    return {n: s.of_features(v) if np.shape(v) == (D_SAE,) else v for n, v in numbers(found, "best", "worst").items()}


@case("evals.stitching")
def _(s, lab):
    leave_out = ("cosines", "nearest", "inserted", "swapped")
    small, large = sl.evals.stitching(s.coder, lab.other, lab.x), sl.evals.stitching(lab.other, s.coder, lab.x)
    return {
        "small": numbers(small, *leave_out), "large": numbers(large, *leave_out),
        "each": [s.of_features(getattr(large, name)) for name in leave_out], "one": [small.inserted, small.swapped],
    }  # fmt: skip


@case("evals.positional")
def _(s, lab):
    found = sl.evals.positional(s.coder, lab.lm, lab.store, tokens=600, bins=4, min_firings=5)
    return numbers(found, "best", "r2", "r2_shuffled", "firings", "profile") | {
        "best": [s.back(i) for i in found.best], "r2": s.of_features(found.r2), "profile": s.codes(found.profile),
        "shuffled": s.of_features(found.r2_shuffled), "firings": s.of_features(found.firings),
    }  # fmt: skip


@case("evals.probing")
def _(s, lab):
    texts = [d[i : i + 60] for d in lab.text[:6] for i in range(0, 600, 100)]
    labels = ["e" in text[:4] for text in texts]
    found = {}
    for convention in ("sae_lab", "saebench"):
        one = sl.evals.probing(s.coder, lab.lm, (texts, labels), k=(1, 4), shuffles=1, convention=convention)
        found[convention] = {(x.probe, x.setting): numbers(x) for x in one.scores}
    return found


@case("evals.composition", "evals.planted_absorption")
def _(s, lab):
    world = sl.worlds.planted(n=40, d=D, l0=3, hierarchy=6, samples=1500, seed=0)
    x = world.x - world.x.mean(1, keepdim=True)
    world = dataclasses.replace(world, x=lab.norm * torch.nn.functional.normalize(x, dim=1))
    composition = sl.evals.composition(s.coder, world)
    per_row = ("one", "two", "pair")
    return {
        "absorption": numbers(sl.evals.planted_absorption(s.coder, world, rows=1500)),
        "composition": numbers(composition, *per_row), "one": s.of_features(composition.one),
        "two": s.of_features(composition.two), "pair": composition.pair[s.place],
    }  # fmt: skip


@case("evals.token_injection")
def _(s, lab):
    index = _index(s, lab)
    features = [s.at(i) for i in _often(s, lab)]
    found = sl.evals.token_injection(s.coder, lab.lm, index, features, lab.text[:3], tokens=2, texts=6, length=12)
    return numbers(found) | {"found": [numbers(f, "feature") for f in found.found]}


def _often(s, lab):
    """Plain features that fire, but not everywhere."""
    index = _index(respelled(s.plain, "", s.size), lab)
    return sorted(index.order("density")[-20:][:3].tolist())


@case("evals.uncertainty")
def _(s, lab):
    lm = lab.lm
    prompts = [text[i : i + 50].rpartition(" ")[0] for text in lab.text[:12] for i in (0, 90, 180)]
    ends = [lm.logits(p)[0, -1].topk(2).indices.tolist() for p in prompts]
    answers = [lm.tokenizer.decode([ids[i % 2]]) for i, ids in enumerate(ends)]
    lengths = [[len(lm.tokenize(text).ids[0]) for text in (p, p + a)] for p, a in zip(prompts, answers, strict=True)]
    kept = [i for i, (alone, both) in enumerate(lengths) if both == alone + 1]
    prompts, answers = [prompts[i] for i in kept], [answers[i] for i in kept]
    found = sl.evals.uncertainty(s.coder, lm, prompts, answers, threshold=1.0, suppress=2, splits=3)
    features = {name: sorted(map(s.back, of)) for name, of in found.features.items()}
    features["suppressed"] = sorted(map(s.back, found.suppressed))
    return numbers(found, "suppressed", "features") | {"features": features}


# ---- explain, geometry


@case("explain.token_features", "explain.token_list", "explain.lens_shape")
def _(s, lab):
    chosen = [s.at(i) for i in range(0, D_SAE, 9)]
    words = sl.explain.token_features(s.coder, lab.lm, lab.text, share=0.3, n=6)
    lens = sl.explain.lens_shape(s.coder, lab.lm, chosen, dict.fromkeys(chosen, "the"))
    lists = sl.explain.token_list(s.coder, lab.lm, chosen, tokens=range(300, 500))
    return {
        "words": {s.back(f): word for f, word in words.items()},
        "lens": numbers(lens, "features") | {"promoted": lens.promoted},
        "lists": numbers(lists, "features", "codes", "top"),
        "top": [[(t, v * float(s.unit[s.back(f)])) for t, v in top] for f, top in zip(chosen, lists.top, strict=True)],
    }  # fmt: skip


@case("explain.self_explain", "explain.definition_tree")
def _(s, lab):
    found = sl.explain.self_explain(s.coder, lab.lm, [s.at(FEATURE), s.at(0)], tokens=3, scales=(1.0,))
    tree = sl.explain.definition_tree(s.coder, lab.lm, s.at(FEATURE), width=2, depth=2, scales=(1.0,))
    return {
        "self": numbers(found, "features"), "texts": [found.texts, found.random_texts],
        "tree": [tree.scale, tree.similarity, tree.overlap, [(b.token, b.probability) for b in tree.branches]],
    }  # fmt: skip


@case("explain.evolve_prompts")
def _(s, lab):
    found = sl.explain.evolve_prompts(
        s.coder, lab.lm, lab.text[:6], [s.at(FEATURE)], length=5, generations=2, children=8, population=3
    )
    in_codes = ("activation", "ce_weight", "corpus_max", "random_activation", "activation_of_text")
    unit = float(s.unit[FEATURE])
    figures = {name: [v * unit for v in getattr(found, name)] for name in in_codes}
    return figures | numbers(found, "features", *in_codes) | {"prompts": found.prompts}


@case("explain.sage_explain")
def _(s, lab):
    feature = _often(s, lab)[0]
    found = sl.explain.sage_explain(
        s.coder, lab.lm, lab.text[:8], s.at(feature), sl.explain.ScriptedAgent(), rounds=2, trials=4, examples=4
    )
    generated = [(text, v * float(s.unit[feature])) for text, v in found.generated]
    said = {"explanation": found.explanation, "generated": generated}
    return numbers(found, "feature", "threshold", "generated") | said


@case("explain.explain", "explain.Corpus")
def _(s, lab):
    index = _index(s, lab)
    features = sorted(_index(respelled(s.plain, "", s.size), lab).order("density")[:2].tolist())
    found = sl.explain.explain(index, [s.at(i) for i in features], resume=False)
    return {s.back(r.feature): (r.text, numbers(r.score), numbers(r.control), s.back(r.other)) for r in found.rows}


@case("geometry.circular")
def _(s, lab):
    templates = ["See you on {}", "It was on {}", "They came on {}", "On {}"]
    features = [s.at(i) for i in range(30)]
    found = sl.geometry.circular(s.coder, lab.lm, templates=templates, features=features, draws=5)
    return numbers(found, "features", "points", "raw_points")


@case("geometry.clusters")
def _(s, lab):
    found = sl.geometry.clusters(s.coder, min_cluster_size=2, min_samples=1)
    return numbers(found, "labels", "points", "controls") | {"controls": [numbers(c) for c in found.controls]}


# ---------------------------------------------------------------------------------------------- what is here, and not

WITHOUT_FIGURES = {
    "Edit": "the base of edits, which does nothing itself",
    "FeatureInspector": "a widget: it shows a FeatureIndex",
    "FeatureIndex.draw": "it says how items look",
    "GraphLab": "a widget: it shows an AttributionGraph",
    "PatchingGrid": "a widget: what it shows is made by circuits and edits",
    "SteeringSliders": "a widget: its sliders are Steer",
    "TokenFeatures": "a widget: it shows read_prompt and direct_effects",
    "TrainingMonitor": "a widget: it shows a training",
    "TrainConfig": "settings: what it calls downstream are sites",
    "Run": "what a training gave", "Sweep": "what trainings gave",
    "train": "it makes a coder, and refuses one with an input_norm",
    "sweep": "it makes coders", "meta_sae": "it trains on rows at unit norm, in their order",
    "saes.inform": "it makes a coder afresh",
    "circuits.Edge": "a result", "circuits.TaskEdge": "a result", "TranscoderSet": "coders side by side",
    "evals.report": "its sections are the functions here",
    "evals.BoardGames": "a result", "evals.DescriptionLength": "a result", "evals.L0Choice": "a result",
    "FeatureIndex.bytes": "the size of files", "FeatureIndex.unit": "what a row is called",
    "FeatureIndex.names": "what features are called", "FeatureIndex.names_around": "what features are called",
    "FeatureIndex.to_site": "files of what the index shows", "FeatureIndex.to_neuronpedia": "files of what it shows",
    "FeatureIndex.token_labels": "of token ids", "FeatureIndex.annotate": "it keeps what it is told",
    "FeatureIndex.load_labels": "it keeps what a file says", "notes": "it keeps what it is told",
}  # fmt: skip
KNOWN = ("SparseCoder", "FeatureIndex", "PromptReading")  # what an annotation names where a coder goes in
NAMED = ("coder", "coders", "sae", "saes", "upstream", "downstream")  # or a parameter without one


def _takes_a_coder(fn: Any) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name in NAMED or any(name in str(p.annotation) for name in KNOWN) for p in parameters)


def _public() -> set[str]:
    """Names under ``sl`` and its rooms of what takes a coder, and what a FeatureIndex has."""
    found = {f"FeatureIndex.{name}" for name in vars(sl.FeatureIndex) if not name.startswith("_")}
    for name in {*dir(sl), *sl.saes.FAMILIES}:
        value = getattr(sl, name)
        if not inspect.ismodule(value):
            found |= {name} if callable(value) and _takes_a_coder(value) else set()
            continue
        listed = getattr(value, "__all__", None)  # a room may list what stands in a lower one
        for inner in listed or [n for n in vars(value) if not n.startswith("_")]:
            one = getattr(value, inner)
            home = "sae_lab" if listed else value.__name__
            if callable(one) and one.__module__.startswith(home) and _takes_a_coder(one):
                found.add(f"{name}.{inner}")
    return found


def test_every_public_function_is_here():
    named = {*CASES, *WITHOUT_FIGURES}
    assert not (missing := sorted(_public() - named)), f"give these a case, or a reason why they have none: {missing}"
    assert not (gone := sorted(named - _public() - {"SparseCoder"})), f"no such function takes a coder: {gone}"
    assert not CASES.keys() & WITHOUT_FIGURES.keys()


def test_a_function_without_a_case_would_be_missed(monkeypatch):
    def fresh(coder: SparseCoder) -> float:
        return float(coder.W_dec.norm())

    fresh.__module__ = "sae_lab.evals.fresh"
    monkeypatch.setattr(sl.evals, "fresh", fresh, raising=False)
    monkeypatch.setattr(sl.evals, "__all__", [*sl.evals.__all__, "fresh"])
    assert _public() - {*CASES, *WITHOUT_FIGURES} == {"evals.fresh"}


# ---------------------------------------------------------------------------------------------- the comparison


def differences(a: Any, b: Any, tolerance: float, where: str = "") -> list[str]:
    """Where two figures differ by more than a share of the largest of their kind."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))[:4]} are in one only"]
        if any(isinstance(key, int | tuple) for key in a) and all(isinstance(v, float) for v in a.values()):
            return differences(list(a.values()), [b[key] for key in a], tolerance, where)  # figures of one kind
        return [d for key in a for d in differences(a[key], b[key], tolerance, f"{where}/{key}")]
    if isinstance(a, str | bool) or a is None:
        return [] if a == b else [f"{where}: {a!r}, {b!r}"]
    if isinstance(a, list | tuple) and not all(isinstance(v, int | float) for v in a):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} entries"]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (v, w) in pairs for d in differences(v, w, tolerance, f"{where}/{i}")]
    a, b = (v.detach().double() if isinstance(v, torch.Tensor) else torch.tensor(np.array(v, float)) for v in (a, b))
    if a.shape != b.shape:
        return [f"{where}: shapes {tuple(a.shape)} and {tuple(b.shape)}"]
    both = a.isfinite() & b.isfinite()
    if not bool((both | (a.isnan() & b.isnan()) | (a == b)).all()):
        return [f"{where}: not finite in one only"]
    if not bool(both.any()):
        return []
    a, b = a[both], b[both]
    off, size = float((a - b).abs().max()), float(a.abs().max())
    return [f"{where}: off by {off:.2g} of {size:.3g}"] if off > tolerance * size + 1e-6 else []


@pytest.fixture(scope="module")
def plain(lab):
    """The figures of a plain coder, by case; made once."""
    made: dict[Any, Any] = {}

    def of(name, coder):
        if (name, id(coder)) not in made:
            made[name, id(coder)] = CASES[name](respelled(coder, "", lab.size), lab)
        return made[name, id(coder)]

    return of


def is_the_same(a: SparseCoder, b: SparseCoder) -> bool:
    """Whether two coders agree in every bit that figures are made of, so that nothing is left to compare."""
    settings = [(type(c), c.pre_bias, c.input_norm, c.reads, c.writes, c.mask) for c in (a, b)]
    own = b.state_dict()
    return settings[0] == settings[1] and all(torch.equal(t, own[n]) for n, t in a.state_dict().items())


FIRST = {fn: name for name, fn in reversed(CASES.items())}  # one test for the names that share a case


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FIRST.values())
def test_the_same_function_gives_the_same_figures(name, kind, lab, plain, tmp_path):
    coder = lab.topk if kind == "sparsify" else lab.jump
    spelled = spelled_in(coder, kind, lab.size, tmp_path)
    known = respelled(coder, "half", lab.size).coder if kind == "float16" else coder
    known.f_scale.copy_(coder.f_scale)
    if kind in LEFT_OUT[name] or is_the_same(spelled.coder, known):  # "half" stands for what was saved in float16
        return
    if kind in REFUSED[name]:
        with pytest.raises(ValueError, match=r"input_norm|normalise"):
            CASES[name](spelled, lab)
        return
    found = differences(plain(name, coder), CASES[name](spelled, lab), ROUNDING.get(kind, 2e-4))
    assert not found, "\n".join(found[:6])
