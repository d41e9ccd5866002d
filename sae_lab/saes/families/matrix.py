import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.saes.families.topk import TopK


class MatrixSAE(TopK):
    """``sl.MatrixSAE(d_in=576, d_sae=4608, rows=24, k=32)``: atoms of rank one, for activations that are matrices
    "rows cols" laid out flat, d_in = rows·cols (the coder of WriteSAE, 2025).

        f = relu(the k largest of pre), others 0
        x_hat = Σ_i f_i · v_i⊗w_i + b_dec

    Loss: mse + AuxK. ``V`` "d_sae rows" and ``W`` "d_sae cols" have unit rows; W_dec is their outer product, made when
    asked for: the decoder has d_sae·(rows + cols) parameters in place of d_sae·rows·cols.

    Args: rows: of the matrix; must divide d_in. The others as of ``sl.TopK``.
    """

    def __init__(self, d_in: int, d_sae: int, rows: int, k: int = 32, k_aux: int | None = None, seed: int = 0):
        if not isinstance(rows, int) or rows < 1 or d_in % rows:
            raise ValueError(f"rows must divide d_in={d_in}, got {rows!r}: x is a matrix of rows x (d_in/rows), flat")
        self._matrix_rows = rows
        super().__init__(d_in, d_sae, k, k_aux, seed)
        self.config["rows"] = rows

    def _make_weights(self, generator: torch.Generator) -> None:
        def directions(width: int) -> Tensor:
            return nn.functional.normalize(torch.randn(self.d_sae, width, generator=generator), dim=1)

        self.V = nn.Parameter(directions(self._matrix_rows))
        self.W = nn.Parameter(directions(self.d_in // self._matrix_rows))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:  # type: ignore[override]
        return (self.V[:, :, None] * self.W[:, None, :]).flatten(1)

    @torch.no_grad()
    def set_features(self, features: Tensor, directions: Tensor, reads: Tensor) -> None:
        """Replace features, each by the rank-one atom nearest to its direction."""
        left, _, right = torch.linalg.svd(directions.reshape(len(features), self._matrix_rows, -1), full_matrices=False)
        self.V[features], self.W[features] = left[:, :, 0].to(self.V), right[:, 0].to(self.W)
        self.W_enc[:, features] = reads.to(self.W_enc).T

    @torch.no_grad()
    def project(self) -> None:
        for factor in (self.V, self.W):
            factor /= factor.norm(dim=1, keepdim=True).clamp_min(1e-8)
