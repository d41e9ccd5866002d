"""Whether a coder's errors are pathological: whether they harm the model more than noise of the same size."""

import math
from collections.abc import Sequence
from dataclasses import field
from functools import partial
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.activations.contexts import context_length, spread_contexts
from sae_lab.activations.reconstructing import Measured, fixes_the_batch, read_and_reconstruct, repeated
from sae_lab.arguments import as_annotated
from sae_lab.lm.model import LM
from sae_lab.lm.text import Documents
from sae_lab.lm.tokens import pad
from sae_lab.results import Figure, Result, figure, result
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import clustered_error, ratio_error
from sae_lab.types import Site, Write

_MEANING = {
    "isotropic": "directions drawn uniformly",
    "error_covariance": "drawn with mean and covariance of the errors",
    "activation_covariance": "drawn with the covariance of the activations",
    "shuffled": "errors of other tokens",
    "same_angle": "error's part along x kept, the rest drawn uniformly",
}
NOISES = tuple(_MEANING)
_EDGES = (1, 4, 16, 32, 64, 128, 256, 512)


@result
class Errors(Result):
    """Result of ``sl.evals.pathological_errors``. KL in nats/token, of the model's next token, over kept tokens.

    Attributes:
        kl: with x replaced by x_hat; kl_noise: by x + noise of the error's norm at each token, for each of NOISES.
        ratio, ratio_se, low, high: kl over kl_noise, its standard error, and its 95 % interval.
        curve, curve_noise: KL at x + alpha·error, and at x + alpha·isotropic noise, at ``alphas``.
        by_position: ratio to isotropic noise for positions from ``edges[i]`` to the next edge.
        token_kl: KL of every token, ``1 + noises, kept tokens``.
    """

    kl: float = figure("KL of x_hat", "nats/token", control="_isotropic", control_name="isotropic noise", best="low",
                       digits=4)  # fmt: skip
    kl_se: float
    kl_noise: dict[str, float]
    ratio: dict[str, float]
    ratio_se: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    alphas: tuple[float, ...]
    curve: tuple[float, ...]
    curve_noise: tuple[float, ...]
    edges: tuple[int, ...]
    by_position: tuple[float, ...]
    by_position_se: tuple[float, ...]
    cosine_xhat: float
    relative_error: float
    tokens: int
    curve_tokens: int
    documents: int
    mask: str
    token_kl: Tensor = field(repr=False, compare=False)
    token_documents: Tensor = field(repr=False, compare=False)

    @property
    def exponents(self) -> tuple[float, float]:
        """p of KL ~ alpha^p along the coder's error and along noise; 2 wherever KL is quadratic, more on a plateau."""
        own, noise = (
            float(np.polyfit(np.log(self.alphas), np.log(curve), 1)[0]) if min(curve) > 0 < len(curve) - 1 else math.nan
            for curve in (self.curve, self.curve_noise)
        )
        return own, noise

    @property
    def _isotropic(self) -> float:
        return self.kl_noise["isotropic"]

    def figures(self) -> list[Figure]:
        p, p_noise = self.exponents
        ratios = [
            Figure(f"ratio, {name}", self.ratio[name], self.ratio_se[name], 1.0, "noise",
                   f"{_MEANING[name]}; 95 % {self.low[name]:.2f} to {self.high[name]:.2f}", "low", 2, f"ratio {name}")
            for name in NOISES
        ]  # fmt: skip
        exponent = Figure("exponent", p, control=p_noise, control_name="isotropic noise", digits=2, key="exponent",
                          meaning="p of KL ~ alpha^p from x towards x_hat")  # fmt: skip
        return [*super().figures(), *ratios, exponent]

    @property
    def _noises(self) -> list[dict[str, Any]]:
        fields = ("kl_noise", "ratio", "ratio_se", "low", "high")
        return [{"noise": n, "kl": self.kl} | {f: getattr(self, f)[n] for f in fields} for n in NOISES]

    @property
    def _curve(self) -> str:
        points = zip(self.alphas, self.curve, self.curve_noise, strict=True)
        return ", ".join(f"{alpha:g}: {own:.4f} ({noise:.4f})" for alpha, own, noise in points)

    @property
    def _places(self) -> str:
        bins = zip(self.edges, self.by_position, self.by_position_se, strict=True)
        return ", ".join(f"from {edge}: {ratio:.2f} ± {error:.2f}" for edge, ratio, error in bins)

    _records = "_noises"
    _below = (
        "KL along x to x_hat (to noise), first {curve_tokens:,} tokens: {_curve}\nratio to isotropic noise by "
        "position: {_places}\n{tokens:,} kept tokens of {documents} documents, all of them changed at once; error "
        "{relative_error:.2f} of x, cosine of x and x_hat {cosine_xhat:.3f}; ± and 95 % clustered by document; {mask}"
    )


@as_annotated
@torch.no_grad()
def pathological_errors(
    coder: SparseCoder,
    lm: LM,
    text: Documents,
    tokens: int = 8_192,
    context: int | None = None,
    alphas: Sequence[float] = (0.25, 0.5, 0.75),
    site: Site | str | None = None,
    seed: int = 0,
) -> Errors:
    """``sl.evals.pathological_errors(sae, lm, text.held_out)``: KL of spliced x_hat against noise of its error's norm.

    ratio = mean KL(p(x) ‖ p(x + e)) / mean KL(p(x) ‖ p(x + |e|·u)), e = x_hat − x, u a unit vector, all kept tokens of
    a context changed at once. u is drawn in five ways (NOISES): uniformly; with mean and covariance of the errors; with
    the covariance of the activations; the error of another token; and with e's part along x, so that x + |e|·u has the
    norm of x_hat and its angle to x. 95 % interval: delta method on log ratio, clustered by document, Student's t.
    The curve goes from x to x_hat, and equally far along uniform noise, on the first quarter of the contexts.

    Args:
        tokens: how many to read. context: tokens the model sees at once; None is what the coder was trained with, else
            128. alphas: shares of the error at which the curve is measured, besides 1.

    Published with norm-preserving noise: 2 to 4 (Gurnee 2024, "SAE reconstruction errors are (empirically)
    pathological"); noise with the covariance of activations: a smaller ratio (Giglemiani et al. 2024, Heimersheim &
    Mendel 2024: interpolation and sensitive directions).
    """
    from scipy.stats import t

    alphas = tuple(float(a) for a in alphas)
    if any(not 0 < a < 1 for a in alphas) or list(alphas) != sorted(set(alphas)):
        raise ValueError(f"alphas must be increasing shares between 0 and 1, got {alphas}: 1 itself is always measured")
    context = context_length(coder, lm, tokens, context)
    contexts = spread_contexts(lm, text, tokens, context)
    read = read_and_reconstruct(coder, lm, contexts, site)
    if int(read.kept.sum()) < 2:
        raise ValueError("the mask leaves one token, and errors are compared with those of others: read more tokens")
    error = read.y_hat - read.y
    noises = equal_norm_noises(read.y, error, read.kept, seed)
    kls, curves = _divergences(lm, read, error, noises, alphas, max(1, len(contexts) // 4))
    kept, documents, position = read.kept, read.documents[read.kept], read.positions[read.kept]
    kl = kls[:, kept].double()
    groups = len(documents.unique())
    quantile = float(t.ppf(0.975, groups - 1)) if groups > 1 else math.nan
    kl_noise = {name: float(noise.mean()) for name, noise in zip(NOISES, kl[1:], strict=True)}
    ratios = {name: float(kl[0].mean()) / of if of else math.nan for name, of in kl_noise.items()}
    errors = {name: ratio_error(kl[0], noise, documents) for name, noise in zip(NOISES, kl[1:], strict=True)}
    widths = {n: math.exp(quantile * errors[n] / ratio) if ratio > 0 else math.nan for n, ratio in ratios.items()}
    edges = tuple(e for e in _EDGES if bool((position >= e).any()))
    bins = [(position >= a) & (position < b) for a, b in zip(edges, (*edges[1:], math.inf), strict=True)]
    mean_curve = curves[:, kept[: curves.shape[1]]].double().mean(1).reshape(len(alphas), 2)
    ends = kls[:2, : curves.shape[1]][:, kept[: curves.shape[1]]].double().mean(1)  # alpha = 1, same tokens
    y, y_hat = read.y[kept], read.y_hat[kept]
    return Errors(
        kl=float(kl[0].mean()),
        kl_se=clustered_error(kl[0], documents),
        kl_noise=kl_noise,
        ratio=ratios,
        ratio_se=errors,
        low={name: ratios[name] / width for name, width in widths.items()},
        high={name: ratios[name] * width for name, width in widths.items()},
        alphas=(*alphas, 1.0),
        curve=(*mean_curve[:, 0].tolist(), float(ends[0])),
        curve_noise=(*mean_curve[:, 1].tolist(), float(ends[1])),
        edges=edges,
        by_position=tuple(float(kl[0, b].mean() / kl[1, b].mean()) for b in bins),
        by_position_se=tuple(ratio_error(kl[0, b], kl[1, b], documents[b]) for b in bins),
        cosine_xhat=float(torch.cosine_similarity(y, y_hat, dim=-1).mean()),
        relative_error=float((error[kept].norm(dim=-1) / y.norm(dim=-1)).mean()),
        tokens=int(kept.sum()),
        curve_tokens=curves.shape[1],
        documents=groups,
        mask=read.mask,
        token_kl=kl.float(),
        token_documents=documents,
    )


def equal_norm_noises(
    x: Float[Tensor, "tokens d"], error: Float[Tensor, "tokens d"], kept: Tensor, seed: int = 0
) -> dict[str, Float[Tensor, "tokens d"]]:
    """For each of NOISES one vector per token, of its error's norm. Means and covariances are those of kept tokens."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(3, *error.shape, generator=generator)
    rows, errors = x[kept].double(), error[kept].double()
    length = error.norm(dim=-1, keepdim=True)
    unit = torch.nn.functional.normalize(x, dim=-1)
    along = (error * unit).sum(-1, keepdim=True) * unit
    across = plain[0] - (plain[0] * unit).sum(-1, keepdim=True) * unit
    others = kept.nonzero().flatten()
    # rolled by a random step: the error of another token
    step = int(torch.randint(1, len(others), (1,), generator=generator))
    shuffled = error.clone()
    shuffled[others] = error[others.roll(step)]
    directions = {
        "isotropic": plain[0],
        "error_covariance": plain[1] @ _root(errors) + errors.mean(0).float(),
        "activation_covariance": plain[2] @ _root(rows),
        "shuffled": shuffled,
    }
    noises = {name: _scaled(v, length) for name, v in directions.items()}
    return noises | {"same_angle": along + _scaled(across, (error - along).norm(dim=-1, keepdim=True))}


def _scaled(v: Tensor, length: Tensor) -> Tensor:
    return torch.nn.functional.normalize(v, dim=-1) * length


def _root(rows: Tensor) -> Tensor:
    """A symmetric root of the covariance of rows."""
    values, vectors = torch.linalg.eigh(torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1]))
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()


def _divergences(
    lm: LM, read: Measured, error: Tensor, noises: dict[str, Tensor], alphas: tuple[float, ...], quarter: int
) -> tuple[Tensor, Tensor]:
    """KL from the clean run at every token: ``1 + noises, tokens``; of the curve ``2 alphas, tokens of the quarter``.

    One context at a time, all variants in one pass, so that layers before the site run once (see reconstruction).
    """
    from tqdm.auto import tqdm

    changes = torch.stack([error, *(noises[name] for name in NOISES)])
    along = torch.tensor(alphas)[:, None, None, None] * changes[:2]  # towards x_hat, and along isotropic noise
    kls, curves, start = [], [], 0
    for i, context in enumerate(tqdm(read.contexts, "errors", unit="context", dynamic_ncols=True)):
        here = slice(start, start := start + len(context.ids))
        parts = [changes[:, here]] + ([along[:, :, here].flatten(0, 1)] if i < quarter else [])
        new = read.y[here] + torch.cat(parts)
        batch = pad([context.ids])
        batch = repeated(batch, len(new) + 1) if fixes_the_batch(read.site) else batch
        write = Write(read.site, partial(beside, new=new, keep=read.kept[here]))
        form = Float[Tensor, f"{len(new)} {batch.ids.shape[1]}"]
        found = lm.run(batch, writes=[write], logits=kl_from_first, form=form)[1]
        kls.append(found[: len(changes)])
        curves += [found[len(changes) :]] if i < quarter else []
    return torch.cat(kls, 1), torch.cat(curves, 1)


@no_type_check
def beside(x, tokens, new, keep):
    """A batch: one text's x, then x with each of the replacements ``new`` at the kept tokens. A function of torch
    alone, see ``saes.portable``."""
    x = x[:1]
    return torch.cat([x, torch.where(keep.to(x.device).unsqueeze(-1), new.to(x.device, x.dtype), x)])


@no_type_check
def kl_from_first(logits, tokens):
    """KL(first ‖ row) of the next token at every position, for each row after the first: "rows pos", nats."""
    clean = logits[0].float().log_softmax(-1)
    p = clean.exp()
    divergences = [(p * (clean - row.float().log_softmax(-1))).sum(-1) for row in logits[1:]]
    return torch.stack(divergences).clamp(min=0).cpu()
