"""Crosscoder: features shared by several layers or models (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer
Features and Model Diffing")."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes.batchtopk import BatchTopK
from sae_lab.types import Site


class Crosscoder(BatchTopK):
    """f = BatchTopK of Σ_l (x_l − b_l)·W_enc[l] + b_enc; x_hat_l = f·W_dec[:, l] + b_l.

    Loss: Σ_l ‖x_l − x_hat_l‖² + AuxK.

    x is "batch layer d_in": the layers of one model, from a store of several sites, or the same site of several models
    (``torch.stack([a, b], 1)``). Each layer is scaled to norm √d_in in training. W_enc is "layer·d_in d_sae" and W_dec
    "d_sae layer·d_in", their layers side by side; ``decoder_norms`` tells which layers a feature writes to.

    With ``causal=True`` a feature reads one layer and writes that and later ones: the dictionary stands in as many
    equal groups as there are layers. Else ("acausal") every feature reads and writes all.

    Args: d_in: width of one layer. layers: how many, at least 2.
    """

    def __init__(
        self, d_in: int, d_sae: int, layers: int, k: int = 32, causal: bool = False, k_aux: int | None = None,
        seed: int = 0,
    ):  # fmt: skip
        if not isinstance(layers, int) or layers < 2:
            raise ValueError(f"a crosscoder needs at least 2 layers, got {layers!r}: for one layer use BatchTopK")
        if not isinstance(d_in, int) or d_in < 1:
            raise ValueError(f"d_in must be a positive integer, got {d_in!r}")
        if causal and isinstance(d_sae, int) and d_sae % layers:
            raise ValueError(f"causal groups need d_sae to be a multiple of layers={layers}, got d_sae={d_sae}")
        super().__init__(d_in * layers, d_sae, k, k_aux, seed)
        self.config |= {"d_in": d_in, "layers": layers, "causal": causal}
        self.layers, self.causal = layers, causal
        self.in_shape = self.out_shape = (layers, d_in)
        if causal:
            self.project()

    @property
    def decoder_norms(self) -> Float[Tensor, "d_sae layer"]:
        """‖W_dec[i, l]‖: how strongly feature i writes to layer l."""
        return self.W_dec.detach().reshape(self.d_sae, self.layers, -1).norm(dim=-1)

    @torch.no_grad()
    def project(self) -> None:
        if self.causal:
            layer = torch.arange(self.layers, device=self.W_dec.device)
            source = torch.arange(self.d_sae, device=self.W_dec.device) // (self.d_sae // self.layers)
            self.W_enc.view(self.layers, -1, self.d_sae).mul_((layer[:, None] == source)[:, None])
            self.W_dec.view(self.d_sae, self.layers, -1).mul_((layer >= source[:, None])[..., None])
        super().project()

    def choose_sites(self, sites: Sequence[Site]) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        chosen = self.reads or tuple(sites)
        if len(chosen) != self.layers:
            raise ValueError(
                f"this crosscoder has layers={self.layers}, the store has {len(chosen)} sites "
                f"({', '.join(map(repr, chosen))}): harvest as many, or set sae.reads"
            )
        return chosen, chosen
