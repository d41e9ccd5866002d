"""SparseCoder: read (x -> pre), act (pre -> codes), write (codes -> x_hat). One class for training and inference."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.saes import losses, sparse
from sae_lab.types import Batch, Codes, Output, Site, TokenMask, check_feature

AUX_WEIGHT = 1 / 32  # Gao et al. 2024
QUANTILE = 0.999  # f_scale: this quantile of a feature's activations where it fires


class SparseCoder(nn.Module):
    """Base of all families:

        pre = (x - b_dec)·W_enc + b_enc
        f = act(pre)
        x_hat = f·W_dec + b_dec

    A family names its activation (``act``) and its loss terms (``terms``). Sparse families return ``Codes`` from
    ``act``; then training never makes a dense ``batch d_sae`` gradient. A row of ``W_dec`` is a feature's direction.

    Attributes: ``W_enc`` "d_in d_sae", ``W_dec`` "d_sae d_out" (unit rows), ``b_enc``, ``b_dec``; ``f_scale`` " d_sae"
    (the 99.9th percentile of each feature's activations where it fires, on training text; 0: never fired);
    ``reads``, ``writes``: its sites; ``meta``: what training knew (model, token mask, dead features, text).
    """

    def __init__(self, d_in: int, d_sae: int, *, seed: int = 0, **config: Any):
        super().__init__()
        for name, value in (("d_in", d_in), ("d_sae", d_sae)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.config = {"d_in": d_in, "d_sae": d_sae, "seed": seed, **config}
        self.d_in, self.d_sae = d_in, d_sae
        generator = torch.Generator().manual_seed(seed)
        directions = nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.W_dec = nn.Parameter(directions)
        # The encoder starts as the decoder's transpose. Its memory lies feature by feature, as its gradients do.
        self.W_enc = nn.Parameter(directions.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("f_scale", torch.zeros(d_sae))
        self.f_scale: Tensor
        self.reads: tuple[Site, ...] = ()
        self.writes: tuple[Site, ...] = ()
        self.meta: dict[str, Any] = {}

    # ---- what a family names

    def act(self, pre: Float[Tensor, "batch d_sae"]) -> Codes | Tensor:
        """Codes from pre-activations."""
        raise NotImplementedError

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        """Named loss terms whose sum is the objective. ``progress`` runs from 0 to 1 over training."""
        return {"mse": losses.mse(out.x_hat, batch.target)}

    def fit_threshold(self, blocks: Iterable[Tensor]) -> None:
        """Fit what eval mode needs beyond the weights, on training activations. Most families need nothing."""

    def fold(self, scale: float) -> None:
        """Make weights trained on ``scale * x`` serve x itself: codes and x_hat scale along, so only biases change."""
        with torch.no_grad():
            self.b_enc /= scale
            self.b_dec /= scale

    # ---- running

    def forward(self, x: Float[Tensor, "*batch d_in"], tokens: Tensor | None = None) -> Output:
        """x -> Output(x_hat, codes, pre), in float32, for any leading axes."""
        self._check(x, self.d_in, "x", "d_in")
        rows = x.reshape(-1, self.d_in).float()
        pre, codes = self._codes(rows)
        x_hat = self._write(codes).reshape(*x.shape[:-1], -1)
        return Output(x_hat, codes, pre)

    def encode(self, x: Float[Tensor, "*batch d_in"], tokens: Tensor | None = None) -> Float[Tensor, "*batch d_sae"]:
        """The dense codes f of x, ``batch d_sae``."""
        codes = self.codes(x)
        dense = codes.dense() if isinstance(codes, Codes) else codes
        return dense.reshape(*x.shape[:-1], self.d_sae)

    def codes(self, x: Float[Tensor, "*batch d_in"]) -> Codes | Tensor:
        """The codes of x's rows as the family makes them: sparse ``Codes``, or dense."""
        self._check(x, self.d_in, "x", "d_in")
        return self._codes(x.reshape(-1, self.d_in).float())[1]

    def sparse_codes(self, x: Float[Tensor, "*batch d_in"]) -> Codes:
        """The codes of x's rows as sparse ``Codes``, whatever the family; only positive ones, no gradients."""
        with torch.no_grad():
            codes = self.codes(x)
            if isinstance(codes, Codes) and bool((codes.values > 0).all()):
                return codes
            return sparse.above(codes.dense() if isinstance(codes, Codes) else codes, 0.0)

    def decode(self, f: Float[Tensor, "*batch d_sae"], tokens: Tensor | None = None) -> Float[Tensor, "*batch d_out"]:
        """x_hat = f·W_dec + b_dec for dense codes."""
        self._check(f, self.d_sae, "f", "d_sae")
        return f.float() @ self.W_dec + self.b_dec

    def _codes(self, x: Tensor) -> tuple[Tensor, Codes | Tensor]:
        """(pre, codes) of float rows. Sparse codes get their gradient at the chosen places only."""
        with torch.no_grad():
            bias = self.b_enc - self.b_dec @ self.W_enc
            pre = torch.addmm(bias, x, self.W_enc)
            chosen = self.act(pre)
        if isinstance(chosen, Codes):
            if torch.is_grad_enabled():
                chosen = sparse.encode_at(chosen, x, self.W_enc, self.b_enc, self.b_dec)
            return pre, chosen._replace(values=chosen.values.relu())
        if torch.is_grad_enabled():
            pre = torch.addmm(self.b_enc, x - self.b_dec, self.W_enc)
            chosen = self.act(pre)
        return pre, chosen

    def _write(self, codes: Codes | Tensor) -> Tensor:
        if isinstance(codes, Codes):
            return sparse.decode(codes, self.W_dec) + self.b_dec
        return codes @ self.W_dec + self.b_dec

    def _check(self, x: Tensor, width: int, name: str, what: str) -> None:
        if x.dim() < 1 or x.shape[-1] != width:
            where = f" (trained at {', '.join(map(repr, self.reads))})" if self.reads else ""
            raise ValueError(f"{name}'s last axis must be {what}={width}{where}, got shape {tuple(x.shape)}")

    # ---- training

    def loss(self, batch: Batch, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        """Named scalars whose sum is the objective. ``dead``: bool per feature, the ones AuxK revives."""
        return self.terms(batch, self(batch.x, batch.tokens), progress=progress, dead=dead)

    def auxk(self, batch: Batch, out: Output, dead: Tensor, k: int) -> dict[str, Tensor]:
        """AuxK: the k strongest dead features fit the residual, so that they get a gradient (Gao et al. 2024,
        arXiv:2406.04093). Empty while no feature is dead."""
        asleep = dead.nonzero().flatten()
        if not len(asleep):
            return {}
        k = min(k, len(asleep))
        chosen = sparse.top_per_row(out.pre[:, asleep], k)
        codes = Codes(chosen.values, asleep[chosen.features], chosen.offsets, self.d_sae)
        codes = sparse.encode_at(codes, batch.x, self.W_enc, self.b_enc, self.b_dec)
        fitted = sparse.decode(codes._replace(values=codes.values.relu()), self.W_dec)
        residual = (batch.target - out.x_hat).detach()
        return {"auxk": AUX_WEIGHT * losses.mse(fitted, residual)}

    @torch.no_grad()
    def project(self) -> None:
        """After each step: decoder rows to unit norm."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)

    @torch.no_grad()
    def calibrate(self, blocks: Iterable[Tensor], unseen: Tensor | None = None) -> dict[str, int | float]:
        """Fit ``f_scale`` on training activations and count dead features, final weights; fit the threshold on
        activations that training never saw (None: on the training ones, which flatter the coder).

        Returns {"dead": the share that fires on none of them, "tokens": how many there were, "l0": eval-mode L0}.
        """
        blocks = list(blocks)
        self.fit_threshold(blocks if unseen is None else unseen.split(4096))
        self.eval()
        values, features, tokens = [], [], 0
        for x in blocks:
            codes = self.sparse_codes(x)
            values.append(codes.values.cpu())
            features.append(codes.features.cpu())
            tokens += len(x)
        all_values, all_features = torch.cat(values), torch.cat(features)
        ascending = all_values.argsort()
        order = ascending[all_features[ascending].sort(stable=True).indices]
        counts = torch.bincount(all_features, minlength=self.d_sae)
        place = counts.cumsum(0) - counts + (QUANTILE * (counts - 1)).long().clamp_min(0)
        live = counts > 0
        scale = torch.zeros(self.d_sae)
        scale[live] = all_values[order][place[live]]
        self.f_scale.copy_(scale)
        return {"dead": float((~live).float().mean()), "tokens": tokens, "l0": len(all_values) / tokens}

    # ---- what it knows, saving

    @property
    def mask(self) -> TokenMask | None:
        """The token mask it was trained under, or None where it was trained on plain tensors."""
        return TokenMask.from_dict(self.meta["mask"]) if self.meta.get("mask") else None

    @property
    def site(self) -> Site:
        """Its one site. ValueError for a coder that was never at one, with the remedy."""
        if len(self.reads) != 1:
            raise ValueError(
                "this coder does not know its site: train it on a store, or set "
                "sae.reads = sae.writes = (sl.Site(...),)"
            )
        return self.reads[0]

    def feature(self, feature: Any) -> int:
        """The feature's number, checked."""
        return check_feature(feature, self.d_sae)

    def fingerprint(self) -> str:
        """A hash of family, config and all weights."""
        digest = hashlib.sha256(repr((type(self).__name__, sorted(self.config.items()))).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> Path:
        """Write ``config.json`` and ``sae.safetensors`` into the folder ``path``, atomically. Read with ``sl.load``."""
        from sae_lab.saes import formats

        return formats.save(self, path)

    def extra_repr(self) -> str:
        at = f", at {', '.join(map(repr, self.reads))}" if self.reads else ""
        return ", ".join(f"{k}={v}" for k, v in self.config.items() if k != "seed") + at
