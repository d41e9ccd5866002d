"""The parts of a model that a graph replaces, in the order of the model: MLPs, and attention where it has an SAE."""

from collections.abc import Iterator, Sequence

from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.circuits.pairs import require_linear, require_sae
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.clt import CrossLayerTranscoder
from sae_lab.saes.sets import TranscoderSet
from sae_lab.types import Site

ATTENTION = ("attn_out", "attn_z")


class WithAttention:
    """Transcoders of MLPs, and SAEs of attention's outputs, one a layer."""

    def __init__(self, mlp: TranscoderSet, attention: Sequence[SparseCoder]):
        self.mlp, self.attention = mlp, {}
        for coder in attention:
            require_sae(coder, "a graph, at an attention's output,")
            require_linear(coder, "a graph, at an attention's output,")
            layer = int(coder.site.layer or 0)
            if coder.site.head is not None:
                raise ValueError(f"a graph takes SAEs of all heads, this one is of {coder.site.key}: leave it out")
            if layer in self.attention:
                raise ValueError(f"a graph takes one SAE of attention a layer, got two of layer {layer}: leave one out")
            self.attention[layer] = coder.eval()


def as_set(coders: TranscoderSet | SparseCoder | Sequence[SparseCoder]) -> TranscoderSet | WithAttention:
    """Transcoders of layers, or one cross-layer transcoder, as a set; SAEs of attention beside them."""
    if isinstance(coders, TranscoderSet):
        return coders
    listed = [coders] if isinstance(coders, SparseCoder) else list(coders)
    attention = [coder for coder in listed if not coder.transcodes and coder.reads and coder.reads[0].kind in ATTENTION]
    rest = [coder for coder in listed if coder not in attention]
    clt = rest[0] if len(rest) == 1 else None
    mlp = clt.as_set() if isinstance(clt, CrossLayerTranscoder) else TranscoderSet(rest)
    return WithAttention(mlp, attention) if attention else mlp


def by_layer(coders: TranscoderSet | WithAttention) -> list[tuple[int, SparseCoder]]:
    """(layer, coder) of all coders."""
    mlp, attention = (coders.mlp, coders.attention) if isinstance(coders, WithAttention) else (coders, {})
    return [*zip(mlp.layers, mlp, strict=True), *attention.items()]


class Layout:
    """Coders by the number of their part. Without an SAE of attention a part is a layer.

    Attributes: sites: of each part, what is replaced. part: the number of a site's part. layers: the parts that have a
    coder. linear: see ``TranscoderSet``.
    """

    def __init__(self, coders: TranscoderSet | WithAttention, n_layers: int):
        self._mlp, attention = (coders.mlp, coders.attention) if isinstance(coders, WithAttention) else (coders, {})
        self.sites: list[Site] = []
        self._coders: dict[int, SparseCoder] = {}
        for layer in range(n_layers):
            if layer in attention:
                self._coders[len(self.sites)] = attention[layer]
                self.sites.append(attention[layer].site)
            if layer in self._mlp:
                self._coders[len(self.sites)] = self._mlp[layer]
            self.sites.append(Site("mlp_out", layer))
        self.part = {site: n for n, site in enumerate(self.sites)}
        self.layers, self.linear, self.attends = list(self._coders), self._mlp.linear, bool(attention)

    def __iter__(self) -> Iterator[SparseCoder]:
        return iter(self._coders.values())

    def __contains__(self, part: object) -> bool:
        return part in self._coders

    def __getitem__(self, part: int) -> SparseCoder:
        return self._coders[part]

    def sources(self, part: int) -> list[int]:
        """The parts whose features write to this one."""
        site = self.sites[part]
        if site.kind in ATTENTION:
            return [part]
        return [self.part[Site("mlp_out", layer)] for layer in self._mlp.sources(int(site.layer or 0))]

    def _layer(self, part: int) -> int:
        return int(self.sites[part].layer or 0)

    def written(
        self, source: int, part: int, features: Int[Tensor, " some"], values: Float[Tensor, " some"]
    ) -> Float[Tensor, "some d"]:
        """What features of a part write to a part at these values."""
        if self.sites[source].kind not in ATTENTION:
            return self._mlp.written(self._layer(source), self._layer(part), features, values)
        rows = self[source].W_dec.detach()
        return values[:, None] * rows[features.to(rows.device)].to(values)
