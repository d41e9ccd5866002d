"""Cross-layer transcoders: features that read the MLP input of a layer and write to its MLP output and later ones."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.arguments import as_annotated
from sae_lab.saes import kernels, portable
from sae_lab.saes.base import EVERY, SparseCoder, check_weight
from sae_lab.saes.families.batchtopk import BatchTopK
from sae_lab.saes.families.jumprelu import JumpReLU
from sae_lab.saes.families.topk import TopK
from sae_lab.saes.io import cross_layer, ours
from sae_lab.saes.io.places import hub_id
from sae_lab.saes.sets import TranscoderSet
from sae_lab.types import Batch, Codes, Site

log = logging.getLogger(__name__)

ACTIVATIONS = ("batchtopk", "topk", "jumprelu")
# (layer of the features, layer that they write to, their numbers in the layer) -> rows "some d_out"
Rows = Callable[[int, int, Tensor], Tensor]


class CrossLayerTranscoder(BatchTopK):
    """``sl.CrossLayerTranscoder(d_in=576, d_sae=30 * 1024, layers=30, k=30 * 32)``: a CLT (Ameisen et al. 2025,
    "Circuit tracing", transformer-circuits.pub). Each layer l has d_sae/layers features f_l, which write to the MLP
    outputs of this and all later layers:

        f_l = act(x_l·W_enc[l] + b_enc[l])
        y_hat_t = Σ_{l ≤ t} f_l·W_dec[l, t] + b_dec[t]  (+ x_t·W_skip[t])

    clt(x).x_hat is y_hat "*batch layer d_out" of x "*batch layer d_in", what the MLPs of all layers read. Features are
    numbered layer by layer: feature i of layer l is l·d_sae/layers + i. ``clt.layer(l)`` are those of one layer, as a
    transcoder of that layer's input; ``clt.rows(l, t, [i, j])`` are rows of W_dec[l, t].

    Loss: Σ_t ‖y_t − y_hat_t‖² + AuxK. ``sl.train(clt, store)`` takes a store with mlp_in and mlp_out of all layers. In
    training each site is scaled to norm √d. Rows of W_dec have unit norm over all layers together.

    Args:
        d_in: width of a layer's input. d_sae: features of all layers, a multiple of layers. layers: at least 2.
        k: active features per token over all layers, on average. k_aux, seed: as of ``sl.TopK``.
        activation: "batchtopk"; "topk", the k/layers largest of each layer; "jumprelu", each feature's own threshold,
            with the penalty of ``sl.JumpReLU`` in place of k. sparsity, bandwidth, start: as there.
        d_out: width of an output; None: d_in. skip: add x_t·W_skip[t] to y_hat_t.

    W_enc is "d_in d_sae", W_dec "d_sae layers·d_out", with zeros at layers before a feature's own.
    """

    code_units = ("b_enc", "threshold")
    causal = True

    def __init__(
        self, d_in: int, d_sae: int, layers: int, k: int = 32, activation: str = "batchtopk", k_aux: int | None = None,
        seed: int = 0, d_out: int | None = None, skip: bool = False, sparsity: float = 1.0, bandwidth: float = 0.5,
        start: float = 0.1,
    ):  # fmt: skip
        if layers < 2:
            raise ValueError(f"a cross-layer transcoder needs at least 2 layers, got {layers}: else use sl.Transcoder")
        if d_sae % layers:
            raise ValueError(f"each layer has equally many features: d_sae must be a multiple of {layers}, got {d_sae}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if activation == "topk" and k % layers:
            raise ValueError(f"activation='topk' has k/layers active features a layer: k={k} must be a multiple")
        self.layers, self.width, self.activation = layers, d_sae // layers, activation
        out, k = d_in if d_out is None else d_out, min(k, d_sae) if activation == "jumprelu" else k
        super().__init__(d_in * layers, d_sae, k, k_aux, seed, d_out=out * layers)
        self.config |= {"d_in": d_in, "layers": layers, "activation": activation, "d_out": out}
        self.in_shape, self.out_shape = (layers, d_in), (layers, out)
        self.files: Rows | None = None  # rows of W_dec that lie in files: W_dec then has none
        self.offsets: Callable[[int, int, Tensor], Tensor] | None = None
        if activation == "jumprelu":
            check_weight("sparsity", sparsity)
            check_weight("start", start)
            check_weight("bandwidth", bandwidth)
            self.config |= {"sparsity": sparsity, "bandwidth": bandwidth, "start": start}
            self.elementwise, self.sparsity_name, self.sparsity, self.bandwidth = True, "sparsity", sparsity, bandwidth
            del self.threshold
            self.threshold = nn.Parameter(torch.full((d_sae,), float(start)))
        if skip:
            self.config["skip"] = True
            self.W_skip = nn.Parameter(torch.zeros(layers, d_in, out))

    def _make_weights(self, generator: torch.Generator) -> None:
        super()._make_weights(generator)
        into = torch.randn(self.d_sae, self.d_in // self.layers, generator=generator)
        self.W_enc = nn.Parameter(nn.functional.normalize(into, dim=1).T)
        self.project()

    # ---- one layer

    def _of(self, layer: int) -> slice:
        """The features of a layer."""
        return slice(layer * self.width, (layer + 1) * self.width)

    @as_annotated
    def rows(self, layer: int, target: int, features: Int[Tensor, " some"]) -> Float[Tensor, "some d_out"]:
        """``clt.rows(3, 5, [0, 7])``: W_dec[3, 5] of two features of layer 3: what they write to layer 5 if they are 1.
        Where W_dec lies in files, only these rows are read. ValueError for a target before the layer."""
        if not 0 <= layer <= target < self.layers:
            raise ValueError(f"features write to their layer and later of {self.layers}, got {layer} and {target}")
        if len(features) and not 0 <= int(features.min()) <= int(features.max()) < self.width:
            raise ValueError(f"features of a layer go from 0 to {self.width - 1}, got {features.tolist()[:5]}")
        if self.files is not None:
            return self.files(layer, target, features)
        return self.W_dec.view(self.layers, self.width, *self.out_shape)[layer, features, target]

    @as_annotated
    def layer(self, layer: int) -> SparseCoder:
        """``clt.layer(3)``: the features of layer 3 as a transcoder from that layer's input to its own output. It
        shares memory. Where W_dec lies in files, its W_dec is NaN: take ``clt.rows``."""
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer must be from 0 to {self.layers - 1}, got {layer}")
        (_, into), (_, out), here = self.in_shape, self.out_shape, self._of(layer)
        family, k = (TopK, self.k // self.layers) if self.activation == "topk" else (BatchTopK, self.k)
        with torch.device("meta"):
            coder = family(into, self.width, min(k, self.width), d_out=out, skip=self.W_skip is not None)
        nothing = self.b_dec.new_full((1, 1), torch.nan)
        own = nothing if self.files else self.W_dec.view(self.d_sae, *self.out_shape)[here, layer]
        tensors = {
            "W_enc": self.W_enc[:, here], "b_enc": self.b_enc[here], "W_dec": own.expand(self.width, out),
            "b_dec": self.b_dec.view(-1, out)[layer],
        }  # fmt: skip
        tensors |= {} if self.W_skip is None else {"W_skip": self.W_skip[layer]}
        for name, tensor in tensors.items():
            setattr(coder, name, nn.Parameter(tensor.detach()))
        coder.f_scale = self.f_scale[here]
        if self.activation != "topk":
            coder.threshold = (self.threshold[here] if self.activation == "jumprelu" else self.threshold).detach()
        coder.input_norm, coder.in_raw_units = self.input_norm, self.in_raw_units
        coder.reads, coder.writes = self.reads[layer : layer + 1], self.writes[layer : layer + 1]
        coder.meta = {key: value for key, value in self.meta.items() if key != "id"}
        return coder.eval()

    @as_annotated
    @torch.no_grad()
    def check(self, activations: Mapping[Site, Tensor]) -> dict[int, dict[str, float]]:
        """``clt.check(lm.read(text, [*clt.reads, *clt.writes]))``: FVU and L0 by layer on these activations, "batch pos
        d" by site, without each row's first position and padding. A warning names layers where FVU is above 1."""
        rows = {site: acts[:, 1:].flatten(0, 1).to(self.b_dec) for site, acts in activations.items()}
        x, y = (torch.stack([rows[site] for site in sites], 1) for sites in (self.reads, self.writes))
        real = x.flatten(1).any(1)
        with self.evaluating():
            out = self(x[real])
        error, spread = (t.square().sum((0, 2)) for t in (y[real] - out.x_hat, y[real] - y[real].mean(0)))
        l0 = (out.f > 0).view(-1, self.layers, self.width).sum(-1).float().mean(0)
        layers, fvu = [int(site.layer or 0) for site in self.reads], (error / spread).tolist()
        figures = zip(layers, fvu, l0.tolist(), strict=True)
        found = {layer: {"fvu": f, "l0": n, "tokens": int(real.sum())} for layer, f, n in figures}
        if bad := [layer for layer, f in zip(layers, fvu, strict=True) if not f <= 1]:
            log.warning("this coder does not fit the activations: FVU is above 1 in layers %s", bad)
        return found

    def as_set(self) -> "CrossLayerSet":
        """Its layers as a ``TranscoderSet`` whose features write to later layers too, as ``sl.circuits.trace`` does."""
        return CrossLayerSet(self)

    # ---- codes

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | None]:
        if self.input_norm == "none":
            return x, 0.0, None
        rows, mean, size = portable.entered(self.input_norm, x.view(len(x), *self.in_shape))
        return rows.flatten(1), mean, size

    def _read(self, x: Tensor) -> Tensor:
        parts = enumerate(x.view(len(x), *self.in_shape).unbind(1))
        here = ((part, self._of(n)) for n, part in parts)
        made = (kernels.affine(part, self.W_enc[:, at], self.b_enc[at], self.precision) for part, at in here)
        return torch.cat([*made], 1)

    def act(self, pre: Float[Tensor, "..."], features: Tensor | slice = EVERY) -> Any:
        if self.activation == "jumprelu":
            return JumpReLU.act(self, pre, features)  # type: ignore[arg-type]
        return self._choose(pre, self.k) if self.activation == "topk" else super().act(pre)

    def reach(self, pre: Float[Tensor, "batch d_sae"]) -> Tensor:
        return JumpReLU.reach(self, pre)  # type: ignore[arg-type]

    def training_threshold(self, codes: Any) -> Tensor | None:
        return self.threshold.detach().mean() if self.activation == "jumprelu" else super().training_threshold(codes)

    def eval_act(self):
        return (portable.by_itself, {"coder": self}) if self.activation == "topk" else super().eval_act()

    def _choose(self, pre: Tensor, k: float) -> Codes:
        if self.activation != "topk":
            return super()._choose(pre, k)
        top = self.select.per_row(pre.reshape(-1, self.width), round(k) // self.layers)  # one row a layer
        features = top.features + self.width * (top.rows % self.layers)
        return Codes(top.values, features, top.offsets[:: self.layers], self.d_sae)

    def fit_threshold(self, blocks: Any) -> None:
        if self.activation == "batchtopk":
            super().fit_threshold(blocks)

    def _encode_at(self, codes: Any, x: Tensor) -> Any:
        """Each code reads its layer's part of a row: rows are cut into one a layer, and W_enc has no zeros."""
        if not torch.is_grad_enabled():
            return codes
        if isinstance(codes, Tensor):
            parts = ((self._of(n), part) for n, part in enumerate(x.view(len(x), *self.in_shape).unbind(1)))
            made = (
                kernels.encode_at(codes[:, at], p, self.W_enc[:, at], self.b_enc[at], None, None, self.precision)
                for at, p in parts
            )
            return torch.cat([*made], 1)
        layer = codes.rows * self.layers + codes.features // self.width
        order = layer.argsort(stable=True)
        parts = Codes(codes.values[order], codes.features[order], _offsets(layer, len(x) * self.layers), self.d_sae)
        x = x.reshape(-1, self.in_shape[1])
        found = kernels.encode_at(parts, x, self.W_enc, self.b_enc, None, self.scratch)
        return Codes(found.values, found.features, codes.offsets, self.d_sae)

    def _decode(self, codes: Codes | Tensor) -> Float[Tensor, "batch layer_d_out"]:
        if self.files is None and self.offsets is None:
            return super()._decode(codes)
        return self._decode_by_layer(codes if isinstance(codes, Codes) else kernels.where(codes, codes != 0))

    def _decode_by_layer(self, codes: Codes) -> Tensor:
        """The same, of rows that are read from files."""
        layers, out = codes.features // self.width, self.b_dec.new_zeros(len(codes.offsets) - 1, *self.out_shape)
        for n in layers.unique().tolist():
            here = layers == n
            at, values, features = codes.rows[here], codes.values[here], codes.features[here] - n * self.width
            for t in range(n, self.layers):
                out[:, t] = out[:, t].index_add(0, at, self.written(n, t, features, values))
        return out.flatten(1)

    def written(
        self, layer: int, target: int, features: Int[Tensor, " some"], values: Float[Tensor, " some"]
    ) -> Float[Tensor, "some d_out"]:
        """What features of a layer write to a layer at these values: rows of W_dec[layer, target] times the values."""
        rows = self.rows(layer, target, features.cpu() if self.files else features).to(values.device)
        if self.offsets is not None:
            values = torch.where(values > 0, values + self.offsets(layer, target, features.cpu()).to(values), 0.0)
        return values[:, None] * rows

    def _write(self, codes: Codes | Tensor, x: Tensor | None, tokens: Tensor | None) -> Tensor:
        out = self._decode(codes) + self.b_dec
        if x is None or self.W_skip is None:
            return out
        return out + torch.einsum("bld,ldo->blo", x.view(len(x), *self.in_shape), self.W_skip).flatten(1)

    # ---- training

    @torch.no_grad()
    def project(self) -> None:
        at = torch.arange(self.layers, device=self.W_dec.device)
        blocks = self.W_dec.view(self.layers, self.width, self.layers, -1)
        blocks.mul_((at >= at[:, None])[:, None, :, None])
        super().project()
        if self.elementwise:  # it has thresholds of its own by now
            self.threshold.clamp_min_(0)

    def _require_rows(self) -> None:
        """ValueError where W_dec lies in files."""
        if self.files is not None:
            where = self.meta["source"]["path"]
            raise ValueError(f"W_dec of this coder lies in files ({where}): clt.rows reads some rows")

    def directions(self) -> Tensor:
        self._require_rows()
        return super().directions()

    def strengths(self, codes: Any, x: Float[Tensor, "..."]) -> Any:
        self._require_rows()
        return super().strengths(codes, x)

    def set_features(self, features: Tensor, directions: Tensor, reads: Tensor) -> None:
        """reads: of all layers side by side; a feature takes its layer's part."""
        self._require_rows()
        own = reads.view(-1, *self.in_shape)[torch.arange(len(features)), (features // self.width).cpu()]
        super().set_features(features, directions, own * self.layers**0.5)

    @torch.no_grad()
    def fold(self, scale: float | Tensor, target_scale: float | Tensor | None = None) -> None:
        self._require_rows()
        into = self._per_column(scale, self.in_shape).view(self.in_shape)[:, 0]
        out = self._per_column(scale if target_scale is None else target_scale, self.out_shape)
        out = out.view(self.out_shape)[:, 0]
        common = out.log().mean().exp()
        for name in self.code_units:
            self.get_parameter_or_buffer(name).div_(common)
        self.b_dec.view(self.out_shape).div_(out[:, None])
        self.W_enc.mul_((into / common).repeat_interleave(self.width))
        self.W_dec.view(self.d_sae, *self.out_shape).mul_((common / out)[:, None])
        if self.W_skip is not None:
            self.W_skip.mul_((into / out)[:, None, None])

    def terms(self, batch: Batch, out: Any, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        self._require_rows()
        terms = super().terms(batch, out, progress=progress, dead=dead)
        if self.activation != "jumprelu":
            return terms
        return terms | {"sparsity": JumpReLU.penalty(self, out, progress)}  # type: ignore[arg-type]

    def choose_sites(self, sites: Sequence[Site]) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        if self.reads and self.writes:
            return self.reads, self.writes
        ordered = sorted(sites, key=lambda s: -1 if s.layer is None else s.layer)
        writes = tuple(s for s in ordered if s.kind == "mlp_out")
        reads = tuple(s for s in ordered if s.kind != "mlp_out")
        if len(reads) != self.layers or [s.layer for s in reads] != [s.layer for s in writes]:
            raise ValueError(
                f"this cross-layer transcoder has layers={self.layers}: it needs a store with what as many MLPs read "
                f"and write, got {len(sites)} sites: harvest mlp_in and mlp_out of these layers, or set clt.reads and "
                "clt.writes"
            )
        return reads, writes

    @staticmethod
    def load(path: str | Path, id: str | None = None, model: str | None = None) -> "CrossLayerTranscoder":
        """``sl.CrossLayerTranscoder.load("mntss/clt-gemma-2-2b-426k")``: a published one, from a hub repository or a
        folder: circuit-tracer's, Gemma Scope 2's, EleutherAI's (sparsify); ``sl.load`` reads what ``save`` wrote.

        Encoders are read whole; rows of W_dec stay in their files until they are asked for. Args: id: a folder inside.
        model: the hub's name of the model, where the files do not tell it. ValueError for files of other kinds.
        """
        found = cross_layer.read(path, id, model)
        t, layers = found.tensors, len(found.reads)
        (d_sae, d_in), d_out = t["W_enc"].shape, len(t["b_dec"]) // layers
        k, activation = (d_sae, "jumprelu") if found.k is None else (found.k * layers, "topk")
        with torch.device("meta"):
            clt = CrossLayerTranscoder(d_in, d_sae, layers, k, activation, 1, 0, d_out, "W_skip" in t)
        norms = {spot.norm for spot in found.reads if spot}
        ends = [tuple(spot.site for spot in spots if spot and spot.site) for spots in (found.reads, found.writes)]
        open_ = any(spot and spot.no_gain for spot in found.reads)
        if len(norms) != 1 or any(len(end) != layers for end in ends) or open_:
            raise ValueError(f"{found.where} reads {found.reads[0]}, whose site depends on the model: pass model=")
        if norm := norms.pop():
            clt.input_norm = "length" if norm == "rms" else "layer"
            for name in t.keys() & {"W_enc", "W_skip"}:  # a coder divides by the deviation over d - 1
                t[name] *= 1.0 if norm == "rms" else (d_in / (d_in - 1)) ** 0.5
        if "threshold" not in t:
            t["threshold"] = torch.tensor(torch.nan)
        for name, tensor in t.items():
            tensor = tensor.T if name == "W_enc" else tensor
            setattr(clt, name, tensor if activation == "topk" and name == "threshold" else nn.Parameter(tensor))
        clt.W_dec, clt.f_scale = nn.Parameter(torch.zeros(0, layers * d_out)), torch.zeros(d_sae)
        clt.files, clt.offsets, (clt.reads, clt.writes) = found.rows, found.offsets, ends
        clt.in_raw_units = True
        clt.meta = {"model": hub_id(found.model) or "unknown", "mask": None, "f_scale": "unknown",
                    "source": {"format": found.format, "path": found.where}}  # fmt: skip
        return clt.eval()

    def save(
        self, path: str | Path, format: str = "sae_lab", dtype: torch.dtype = torch.float32, bits: int | None = None
    ) -> Path:
        self._require_rows()
        return super().save(path, format, dtype, bits)


class CrossLayerSet(TranscoderSet):
    """The layers of a cross-layer transcoder as a set, whose features write to later layers too."""

    def __init__(self, clt: CrossLayerTranscoder):
        at = [site.layer for site in clt.reads]
        if len(at) != clt.layers or len(clt.writes) != clt.layers or at != sorted(at, key=lambda n: n or 0):
            raise ValueError(
                f"this cross-layer transcoder does not know its {clt.layers} layers' sites: train it on a store, or "
                "set clt.reads and clt.writes, in the order of layers"
            )
        super().__init__([clt.layer(n) for n in range(clt.layers)])
        self.clt = clt
        self.linear = clt.offsets is None

    def check(self, activations: Mapping[Site, Tensor]) -> dict[int, dict[str, Any]]:
        return self.clt.check(activations)

    def to(self, device: str | torch.device) -> "CrossLayerSet":
        return CrossLayerSet(self.clt.to(device))

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32, bits: int | None = None) -> Path:
        return self.clt.save(path, dtype=dtype, bits=bits)

    def sources(self, target: int) -> list[int]:
        return [layer for layer in self.layers if layer <= target] if target in self else []

    def written(self, layer: int, target: int, features: Tensor, values: Tensor) -> Tensor:
        at = self.layers.index
        device = self.clt.W_dec.device
        return self.clt.written(at(layer), at(target), features.to(device), values.to(device)).detach().to(values)


ours.OTHERS["CrossLayerTranscoder"] = CrossLayerTranscoder


def _offsets(rows: Int[Tensor, " codes"], count: int) -> Int[Tensor, " rows_plus_one"]:
    """Where each row's codes begin."""
    found = torch.zeros(count + 1, dtype=torch.long, device=rows.device)
    found[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return found
