"""The local replacement model of one prompt: transcoders in place of MLPs, attention and norms held at the prompt's
values, and what the transcoders leave unexplained as errors. In it every activation is linear in features, errors and
tokens."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple, cast, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.reading import require_fits
from sae_lab.circuits.layout import Layout, WithAttention, by_layer
from sae_lab.circuits.pairs import require_here
from sae_lab.circuits.prompt import _cap, _check_way_out, _unembedding
from sae_lab.lm import passes
from sae_lab.lm.holding import Holding
from sae_lab.lm.model import LM
from sae_lab.saes import kernels, portable
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.sets import TranscoderSet
from sae_lab.types import Codes, Site, TokenBatch, Write

log = logging.getLogger(__name__)

CLOSE = 1e-4  # share of the largest number in a sum, up to which float32 may be off
Mlp = Callable[[int, Tensor, Tensor | None], Tensor]  # (layer, mlp_out, what its coder reads) -> mlp_out


class Segment(NamedTuple):
    """What lies between two layers' streams, as autograd has it: ``read`` and ``out`` are functions of ``stream``,
    ``attended`` and ``mlp``, and ``attends``, which an SAE of attention reads, is one of ``stream``. Each is "1 pos d";
    None where a layer has no transcoder or SAE, and ``mlp`` and ``out`` behind the last layer. part: of its MLP."""

    stream: Tensor
    read: Tensor | None
    mlp: Tensor | None
    out: Tensor | None
    part: int
    attends: Tensor | None = None
    attended: Tensor | None = None


class Part(NamedTuple):
    """An MLP, or an attention, on the prompt. codes: of all positions in order. open: " pos", where the coder stands
    in; at the others the whole is an error. fires: " pos", where it has features. fixed: "pos d": what it adds without
    a feature or a skip. error: "pos d"."""

    codes: Codes
    open: Bool[Tensor, " pos"]
    fires: Bool[Tensor, " pos"]
    fixed: Float[Tensor, "pos d"]
    error: Float[Tensor, "pos d"]


class LocalModel:
    """The local replacement model of a model with these transcoders on one prompt. "layer", here and in ``parts``, is
    the number of a part (``layout.Layout``): of an MLP, or of an attention that has an SAE.

    Attributes:
        embed: "pos d", the tokens' embeddings. parts: in order. sites: what each replaces. normed: "pos d_model", what
            W_U reads. logits: " vocab", those of the last position, before a cap. chances: their probabilities, after
            it. W_U, mean, b_U.
        columns: sources of a row: features by (layer, position, feature), errors by (layer, position), tokens.
        layer, position, feature, value, pre: " features" of all active features. bias: " features", what the biases add
            to each pre-activation. silent: activations, by site, without features, errors and tokens.
    """

    def __init__(self, lm: LM, coders: TranscoderSet | WithAttention, batch: TokenBatch, first: str):
        require_here(lm, "an attribution graph")
        _check_coders(lm, coders)
        self.lm, self.coders, self.batch, self.first = lm, Layout(coders, lm.n_layers), batch, first
        self.sites = self.coders.sites
        self.length, self.n_parts = batch.ids.shape[1], len(self.sites)
        self.held, self.end = Holding(), Site("resid_post", lm.n_layers - 1)
        last = lm._sites.final_norm
        self.out = self.end if last is None else Site(last)
        self.reads = {layer: self.coders[layer].reads[0] for layer in self.coders.layers}
        self._scales: dict[int, Tensor] = {}
        self._record()
        self.parts: list[Part] = []
        for layer in range(self.n_parts):
            self.parts.append(self._part(layer))
        self._list_features()
        self.columns = len(self.layer) + (self.n_parts + 1) * self.length
        self.silent = self.run(self._of_biases, embed=torch.zeros_like(self.embed))
        self.bias = self.pre_of(self.silent) + self._read_bias
        self.pre = self.pre_of(self._seen) + self._read_bias

    # ---- the pass on the prompt

    def _record(self) -> None:
        """One pass that notes what is held and keeps each layer as a function of its stream and its MLP's output."""
        import nnsight

        lm, nn = self.lm, self.lm._nn
        sites = [Site("embed"), *(Site("resid_pre", layer) for layer in range(lm.n_layers))]
        cuts = {s: True for s in [*sites, *self.sites, self.end]}
        reads = [(s, False) for s in [*self.reads.values(), self.out] if s not in self.sites]
        steps = sorted([*cuts.items(), *reads], key=lambda step: (lm._sites.when(step[0]), not step[1]))
        plan = [(s.key, lm._sites.place(s), cut) for s, cut in steps]
        if split := [key for key, place, _ in plan if place.less]:
            raise ValueError(f"{split[0]} is a difference of two tensors in this model: a graph needs one module there")
        inputs, length, take = {"input_ids": self.batch.ids.to(lm.device), "use_cache": False}, self.length, _take
        found = cast(dict[str, Any], {})
        with lm._lock, torch.enable_grad(), self.held.recording(), nn.trace(inputs):
            found = nnsight.save({})
            take(nn, plan, length, found)
            found["logits"] = nn.output.logits[0, -1].detach().float()
        values = {key: value for key, value in found.items() if key != "logits"}
        self.embed = values["embed"].leaf.detach()[0]
        self._mlp = [values[site.key].leaf.detach()[0] for site in self.sites]
        streams = [values[Site("resid_pre", layer).key] for layer in range(lm.n_layers)] + [values[self.end.key]]
        every = [*self.reads.values(), self.out]
        raw = {s: values[s.key].value if s in self.sites else values["read", s.key] for s in every}
        with torch.enable_grad():
            read = {layer: self._entered(layer, raw[s]) for layer, s in self.reads.items()}
        self._before = Segment(values["embed"].leaf, None, None, streams[0].value, -1)
        self._segments = []
        for n, (here, above) in enumerate(pairwise(streams)):
            part = self.coders.part[Site("mlp_out", n)]
            cut = values[self.sites[part].key]
            attention = self.sites[part - 1] if part and self.sites[part - 1].layer == n else None
            both = () if attention is None else (read[part - 1], values[attention.key].leaf)
            self._segments.append(Segment(here.leaf, read.get(part), cut.leaf, above.value, part, *both))
        self._segments.append(Segment(streams[-1].leaf, raw[self.out], None, None, self.n_parts))
        self._raw = {s: value.detach()[0] for s, value in raw.items()}
        self._seen = self._raw | {s: read[layer].detach()[0] for layer, s in self.reads.items()}
        self._unembed(found["logits"])

    @torch.no_grad()
    def _unembed(self, logits: Float[Tensor, " vocab"]) -> None:
        """W_U, checked by the model's own logits."""
        _check_way_out(self.lm)
        W_U, bias = _unembedding(self.lm)
        self.W_U, self.mean = W_U.float(), W_U.float().mean(0)
        self.b_U = torch.zeros(len(self.W_U), device=W_U.device) if bias is None else bias
        self.normed, cap = self._seen[self.out], _cap(self.lm)
        self.logits = self.W_U @ self.normed[-1] + self.b_U
        capped = self.logits if cap is None else cap * (self.logits / cap).tanh()
        off, largest = float((capped - logits).abs().max()), float(logits.abs().max())
        if not off <= CLOSE * largest:
            raise ValueError(
                f"this model's logits are off by {off:.3g} from those of its final norm and W_U (largest "
                f"{largest:.3g}): no graph is made of a model whose logits are made in another way"
            )
        self.chances = logits.softmax(-1)

    def _entered(self, layer: int, x: Tensor, held: bool = True) -> Tensor:
        """What a layer's coder reads, as its encoder gets it: x, or x after the coder's own ``input_norm``. held: with
        the prompt's divisor, so that it is linear in x."""
        kind = self.coders[layer].input_norm
        if kind == "none":
            return x
        if not held:
            return portable.entered(kind, x)[0]
        centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        if layer not in self._scales:
            sizes = [t.detach().norm(dim=-1).reshape(-1, 1) for t in (portable.entered(kind, x)[0], centred)]
            self._scales[layer] = sizes[0] / sizes[1].clamp_min(1e-12)
        return centred * self._scales[layer]

    def _plain(self, layer: int) -> SparseCoder:
        """A layer's coder, which takes what ``_entered`` gives."""
        coder = copy.copy(self.coders[layer])  # of the same weights
        coder.input_norm = "none"
        return coder

    # ---- features

    def _part(self, layer: int) -> Part:
        """Of a layer whose predecessors stand in ``parts``."""
        out = self._mlp[layer]
        if layer not in self.coders:
            none = torch.zeros(0, device=out.device)
            codes = Codes(none, none.long(), none.new_zeros(self.length + 1).long(), 0)
            closed = torch.zeros(self.length, dtype=torch.bool, device=out.device)
            return Part(codes, closed, closed, torch.zeros_like(out), out)
        coder, x = self._plain(layer), self._seen[self.reads[layer]]
        ids = self.batch.ids[0].to(x.device)
        is_open = torch.ones_like(ids, dtype=torch.bool)
        if self.first == "keep":
            raw = {coder.site: self._raw[coder.site][None].cpu()}
            is_open = (coder.mask or self.lm.mask()).of(self.batch, raw)[0].to(x.device)
        fires = is_open.clone()
        if self.first == "drop":
            fires[0] = False
        found = coder.codes_of(x[fires])
        counts = torch.zeros(self.length, dtype=torch.long)
        counts[fires.cpu()] = found.offsets.diff()
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(x.device)
        codes = Codes(found.values.to(x.device), found.features.to(x.device), offsets, coder.d_sae)
        with torch.no_grad():
            fixed = coder.silent(torch.zeros_like(x).to(coder.W_dec.device), ids.to(coder.W_dec.device)).to(out)
            fixed = fixed * is_open[:, None]
            made = fixed + self._skipped(layer, x, is_open)
            made = made + self._written(layer, {n: part.codes for n, part in enumerate(self.parts)} | {layer: codes})
        return Part(codes, is_open, fires, fixed, out - made)

    def _written(self, layer: int, codes: Mapping[int, Codes]) -> Float[Tensor, "pos d"]:
        """What features write to mlp_out of a layer. codes: by their own layer."""
        total = torch.zeros_like(self._mlp[layer])
        for source in self.coders.sources(layer):
            of = codes[source]
            total.index_add_(0, of.rows, self.coders.written(source, layer, of.features, of.values))
        return total

    def _skipped(self, layer: int, x: Tensor, is_open: Tensor) -> Tensor | float:
        """What the transcoder's skip makes of what it reads."""
        skip = self.coders[layer].W_skip if layer in self.coders else None
        return 0.0 if skip is None else x @ skip.detach().to(x) * is_open[:, None]

    def _list_features(self) -> None:
        """All active features as columns: by layer, position, feature."""
        layers, parts, self._start = [], [], [0]
        for layer, part in enumerate(self.parts):
            codes = part.codes
            order = (codes.rows * max(1, codes.d_sae) + codes.features).argsort()
            parts.append((codes.rows[order], codes.features[order], codes.values[order]))
            layers.append(torch.full_like(order, layer))
            self._start.append(self._start[-1] + len(order))
            self.parts[layer] = part._replace(codes=codes._replace(values=parts[-1][2], features=parts[-1][1]))
        self.layer = torch.cat(layers)
        self.position, self.feature, self.value = (torch.cat(columns) for columns in zip(*parts, strict=True))
        bias = [
            self.coders[n].read_bias().detach().to(f.device)[f] if n in self.coders else f.float()
            for n, (_, f, _) in enumerate(parts)
        ]
        self._read_bias = torch.cat(bias)

    def directions(self, features: Int[Tensor, " some"]) -> Float[Tensor, "some d"]:
        """What features, by number of column, read: columns of W_enc. They are of one layer."""
        coder = self.coders[int(self.layer[features[0]])]
        return _rows(coder.W_enc.T, self.feature[features])

    def pre_of(self, acts: dict[Site, Tensor]) -> Float[Tensor, " features"]:
        """Of each active feature, what it reads of these activations, without its encoder's bias."""
        found = torch.zeros(len(self.layer), device=self.embed.device)
        for layer, site in self.reads.items():
            here = slice(self._start[layer], self._start[layer + 1])
            W = _rows(self.coders[layer].W_enc.T, self.feature[here])
            found[here] = (acts[site][self.position[here]] * W).sum(-1)
        return found

    # ---- rows

    @torch.no_grad()
    def rows(
        self, layers: Sequence[int], positions: Int[Tensor, " n"], directions: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n columns"]:
        """What each source adds to what these targets read, all targets in one sweep down the layers.

        layers: of the targets, the highest first; ``n_parts`` for what reads W_U's input. directions: padded to the
            widest.
        """
        found = torch.zeros(len(layers), self.columns, device=directions.device)
        flow = directions.new_zeros(0, 1, *self._segments[-1].stream.shape[1:])
        for segment in reversed(self._segments):
            stream, read, mlp, out, layer, attends, attended = segment
            old, new = len(flow), layers.count(layer)
            more = 0 if attends is None else layers.count(layer - 1)
            if not old + new + more:
                continue
            flow = _longer(flow, new)
            ends: list[tuple[Any, Tensor]] = [] if out is None else [(out, flow)]
            into = None if read is None else read.new_zeros(old + new, *read.shape)
            if mlp is not None and old:
                grown = _pulled([(out, flow[:old])], mlp)[:, 0]
                self._add_parts(found[:old], layer, grown)
                skip = self.coders[layer].W_skip if layer in self.coders else None
                if skip is not None and into is not None:
                    into[:old, 0] = grown @ skip.detach().to(grown).T * self.parts[layer].open[:, None]
            if into is not None:
                at = slice(old, old + new)
                into[torch.arange(old, old + new), 0, positions[at]] = directions[at, : into.shape[-1]]
                ends.append((read, into))
            if attends is not None:
                if old + new:
                    self._add_parts(found[: old + new], layer - 1, _pulled(ends, attended)[:, 0])
                at = slice(old + new, old + new + more)
                into = attends.new_zeros(at.stop, *attends.shape)
                into[torch.arange(at.start, at.stop), 0, positions[at]] = directions[at, : into.shape[-1]]
                ends = [*((end, _longer(grad, more)) for end, grad in ends), (attends, into)]
            flow = _pulled(ends, stream)
        grown = _pulled([(self._before.out, flow)], self._before.stream)[:, 0]
        found[:, -self.length :] = (grown * self.embed).sum(-1)
        return found

    def close(self) -> None:
        """Free what only rows need; passes on other activations still run."""
        self._segments, self._before = [], self._before._replace(stream=self.embed, out=None)

    def _add_parts(self, found: Tensor, layer: int, grown: Float[Tensor, "n pos d"]) -> None:
        """Columns of the features that write to a layer, and of its errors. grown: the targets' gradient at mlp_out."""
        for source in self.coders.sources(layer):
            codes, begin = self.parts[source].codes, self._start[source]
            offsets = codes.offsets.tolist()
            for p in range(self.length):
                here = slice(offsets[p], offsets[p + 1])
                if here.start < here.stop:
                    what = self.coders.written(source, layer, codes.features[here], codes.values[here])
                    found[:, begin + here.start : begin + here.stop] += grown[:, p] @ what.T
        at = len(self.layer) + layer * self.length
        found[:, at : at + self.length] = (grown * self.parts[layer].error).sum(-1)

    # ---- passes on other activations

    @torch.no_grad()
    def run(self, mlp: Mlp, embed: Tensor | None = None, held: bool = True) -> dict[Site, Tensor]:
        """Activations "pos d" that the coders' encoders get and at W_U's input, with other embeddings and MLPs'
        outputs. held: with attention and norms, the coders' own too, at the prompt's values."""
        writes = [] if embed is None else [Write(Site("embed"), lambda x, tokens: embed[None].to(x, copy=True))]
        seen: dict[Site, Tensor] = {}  # by SAEs of attention, which read where they write
        for layer, site in enumerate(self.sites):
            if self.reads.get(layer) == site:
                writes.append(Write(site, partial(_with_attention, mlp=mlp, layer=layer, site=site, seen=seen)))
                continue
            change = partial(_with_mlp, mlp=mlp, layer=layer, enter=partial(self._entered, layer, held=held))
            writes.append(Write(site, change, (self.reads[layer],) if layer in self.reads else ()))
        others = {layer: s for layer, s in self.reads.items() if s not in self.coders.part}
        sites = list(dict.fromkeys([*others.values(), self.out]))
        with self.lm._lock, self.held.replaying() if held else nullcontext():
            found = self.lm.run(self.batch, sites, writes, logits=False)[0]
        acts = {s: x[0] for s, x in found.items()} | seen
        return acts | {s: self._entered(layer, acts[s], held) for layer, s in others.items()}

    @cached_property
    def base(self) -> dict[Site, Tensor]:
        """Activations with everything held, nothing taken out."""
        return self.run(lambda layer, x, read: self.held_mlp(layer, read))

    def held_mlp(self, layer: int, read: Tensor | None) -> Float[Tensor, "pos d"]:
        """mlp_out of the prompt, with the skip of what the transcoder reads now."""
        out, part = self._mlp[layer], self.parts[layer]
        if read is None or self.coders[layer].W_skip is None:
            return out
        return out + self._skipped(layer, read - self._seen[self.reads[layer]], part.open)

    def responding_mlp(
        self, layer: int, read: Tensor, gone: Sequence[tuple[int, int]], now: dict[int, Codes]
    ) -> Float[Tensor, "pos d"]:
        """mlp_out with the features of what the transcoder reads now, the prompt's errors, and without the features in
        ``gone``, (position, feature). now: codes of earlier layers, to which those of this one are added."""
        part, coder = self.parts[layer], self._plain(layer)
        codes = coder.encode(read.to(coder.W_dec.device)).to(read) * part.fires[:, None]
        for position, feature in gone:
            codes[position, feature] = 0.0
        now[layer] = kernels.where(codes, codes > 0)
        return self._written(layer, now) + self._skipped(layer, read, part.open) + part.fixed + part.error

    def _of_biases(self, layer: int, x: Tensor, read: Tensor | None) -> Tensor:
        """A layer without features and errors."""
        part = self.parts[layer]
        return part.fixed if read is None else part.fixed + self._skipped(layer, read, part.open)


def _with_mlp(x: Tensor, tokens: Any, *read: Tensor, mlp: Mlp, layer: int, enter: Any) -> Tensor:
    found = mlp(layer, x[0].float(), enter(read[0][0]) if read else None)
    return found[None].to(x, copy=True)  # some models, Falcon among them, change it in place


def _with_attention(x: Tensor, tokens: Any, mlp: Mlp, layer: int, site: Site, seen: dict[Site, Tensor]) -> Tensor:
    seen[site] = x[0].float().clone()
    return mlp(layer, seen[site], seen[site])[None].to(x, copy=True)


@no_type_check
def _take(root, plan, length, found):
    """Read or cut the sites of a plan, (key, place, whether it is cut), in the order of the model. At a cut the model
    goes on with a copy of the value, with which a new graph begins."""
    for key, place, cut in plan:
        there = passes.read(root, place, length)
        value = passes.value_of(there, place, {})
        if not cut:
            found["read", key] = value.clone()  # a model may change it in place later
            continue
        leaf = value.detach().clone().requires_grad_(True)
        found[key] = Cut(leaf, value.clone())
        passes.put(root, place, there.detach(), value.detach(), leaf.clone())


class Cut(NamedTuple):
    """leaf: the copy that the model goes on with. value: the same as a function of earlier leaves."""

    leaf: Tensor
    value: Tensor


def _pulled(ends: Sequence[tuple[Any, Tensor]], back: Tensor) -> Tensor:
    """Gradients "n 1 pos d" of several tensors, a batch of n each, pulled back to an earlier one."""
    outs, grads = [out for out, _ in ends], [grad for _, grad in ends]
    return torch.autograd.grad(outs, back, grads, retain_graph=True, is_grads_batched=True)[0]


def _longer(grads: Tensor, more: int) -> Tensor:
    """The gradients of ``more`` targets besides, which are 0 so far."""
    return torch.cat([grads, grads.new_zeros(more, *grads.shape[1:])]) if more else grads


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a coder's weights, on the device of their numbers."""
    return table.detach()[rows.to(table.device)].to(rows.device)


def _check_coders(lm: LM, coders: TranscoderSet | WithAttention) -> None:
    """ValueError for coders of another model, and for weights that are not float32."""
    dtype = next(lm._module.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(f"a graph's sums hold in float32, this model has {dtype}: load it with dtype=torch.float32")
    listed = by_layer(coders)
    own, named = None, {coder.meta.get("model") for _, coder in listed if "model_fingerprint" not in coder.meta}
    if other := {name for name in named if name and name.split("/")[-1].lower() != lm.id.split("/")[-1].lower()}:
        log.warning("these transcoders are of the model %s, and this graph is of %s", ", ".join(sorted(other)), lm.id)
    for layer, coder in listed:
        if layer >= lm.n_layers:
            raise ValueError(f"this set has a transcoder of layer {layer}, {lm} has layers 0 to {lm.n_layers - 1}")
        require_fits(coder, lm)
        if made_for := coder.meta.get("model_fingerprint"):
            own = own or lm.fingerprint()
            if made_for != own:
                raise ValueError(
                    f"the transcoder of layer {layer} was trained on {coder.meta.get('model', 'unknown')} (weights "
                    f"{made_for}), {lm} has other weights ({own}): load the model it was trained on"
                )
