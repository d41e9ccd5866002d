from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import check_least
from sae_lab.saes.base import check_weight
from sae_lab.saes.families.batchtopk import BatchTopK
from sae_lab.types import Batch, Codes, Output, Site

SELECTIONS = ("codes", "decoder_norms")


class Crosscoder(BatchTopK):
    """``sl.Crosscoder(d_in=576, d_sae=4608, layers=3, k=32)``: features shared by several layers or models (Lindsey
    et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing").

        f = BatchTopK of Σ_l (x_l − b_l)·W_enc[l] + b_enc
        x_hat_l = f·W_dec[:, l] + b_l

    Loss: Σ_l ‖x_l − x_hat_l‖² + AuxK. x is "batch layer d_in": the layers of one model, from a store of several sites,
    or one site of several models (``torch.stack([a, b], 1)``). In training each layer is scaled to norm √d_in. W_enc is
    "layer·d_in d_sae" and W_dec "d_sae layer·d_in"; ``decoder_norms`` tells which layers a feature writes to.

    Rows of W_dec have unit norm over all layers together, so that f_i is the root of Σ_l ‖f_i·W_dec[i, l]‖². Lindsey et
    al. use Σ_l ‖f_i·W_dec[i, l]‖ as a feature's strength, by which a feature of one layer costs less than one that
    writes as much to several. ``selection`` and ``norm_penalty`` each use that strength; norm_penalty with k=d_sae is
    their crosscoder, f = relu with the penalty alone.

    Args:
        d_in: width of one layer. layers: at least 2. k: active features per token on average.
        causal: a feature reads one layer and writes that and later ones; the dictionary has one equal group of features
            for each layer. Else every feature reads and writes all layers.
        selection: what BatchTopK ranks in training and compares with θ: "codes", f_i; or "decoder_norms",
            f_i·Σ_l ‖W_dec[i, l]‖.
        norm_penalty: weight λ of λ·Σ_i f_i·Σ_l ‖W_dec[i, l]‖ in the loss; 0: none.
        k_aux, seed: as of ``sl.TopK``.
    """

    def __init__(
        self, d_in: int, d_sae: int, layers: int, k: int = 32, causal: bool = False, k_aux: int | None = None,
        seed: int = 0, selection: str = "codes", norm_penalty: float = 0.0,
    ):  # fmt: skip
        if layers < 2:
            raise ValueError(f"a crosscoder needs at least 2 layers, got {layers!r}: for one layer use BatchTopK")
        check_least(1, d_in=d_in)
        if causal and d_sae % layers:
            raise ValueError(f"causal groups need d_sae to be a multiple of layers={layers}, got d_sae={d_sae}")
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
        check_weight("norm_penalty", norm_penalty)
        super().__init__(d_in * layers, d_sae, k, k_aux, seed)
        self.config |= {"d_in": d_in, "layers": layers, "causal": causal}
        self.config |= {"selection": selection} if selection != "codes" else {}
        self.config |= {"norm_penalty": norm_penalty} if norm_penalty else {}
        self.layers, self.causal, self.selection, self.norm_penalty = layers, causal, selection, norm_penalty
        self.in_shape = self.out_shape = (layers, d_in)
        if selection == "decoder_norms":  # one θ for f·norms is one θ per feature for f
            self.register_buffer("threshold", torch.full((d_sae,), float("nan")))
            self.register_buffer("layer_scale", torch.ones(layers))
            self.layer_scale: Tensor  # W_dec times it, layer by layer, is the W_dec of training: fold sets it
        if causal:
            self.project()

    @property
    def decoder_norms(self) -> Float[Tensor, "d_sae layer"]:
        """‖W_dec[i, l]‖: how strongly feature i writes to layer l."""
        return self.W_dec.detach().reshape(self.d_sae, self.layers, -1).norm(dim=-1)

    def _norms(self) -> Float[Tensor, " d_sae"]:
        """Σ_l ‖W_dec[i, l]‖, in the units of training."""
        return (self.decoder_norms * self.layer_scale).sum(-1).clamp_min(1e-8)

    def _ranked(self, pre: Tensor) -> Tensor:
        return pre * self._norms() if self.selection == "decoder_norms" else pre

    def act(self, pre: Float[Tensor, "batch d_sae"]) -> Codes:
        if not self.training or self.selection == "codes":
            return super().act(pre)
        chosen = super().act(self._ranked(pre))
        return chosen._replace(values=pre[chosen.rows, chosen.features])

    def fit_threshold(self, blocks: Iterable[Tensor]) -> None:
        super().fit_threshold(blocks)
        if self.selection == "decoder_norms":
            self.threshold.div_(self._norms())

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        terms = super().terms(batch, out, progress=progress, dead=dead)
        if self.norm_penalty:
            norms = self.W_dec.reshape(self.d_sae, self.layers, -1).norm(dim=-1).sum(-1)
            assert isinstance(out.codes, Codes)
            cost = (out.codes.values * norms[out.codes.features]).sum() / len(batch.x)
            terms["sparsity"] = self.norm_penalty * cost
        return terms

    @torch.no_grad()
    def fold(self, scale: float | Tensor, target_scale: float | Tensor | None = None) -> None:
        super().fold(scale, target_scale)
        if self.selection == "decoder_norms":
            out = self._per_column(scale if target_scale is None else target_scale, self.out_shape)
            out = out.view(self.layers, -1)[:, 0]
            self.layer_scale.mul_(out / out.log().mean().exp())

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
