"""Changes of a coder besides training: start it from data, revive features, undo shrinkage, solve for codes, move a
dictionary to another distribution."""

import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from sae_lab.arguments import Count, as_annotated
from sae_lab.saes import kernels, losses
from sae_lab.saes.base import SparseCoder, check_k
from sae_lab.types import Batch, Codes

REVIVED = 0.2  # of the mean length of live encoder rows: a revived feature starts quiet (Bricken et al. 2023)
PIECE = 1 << 22  # numbers in one piece of a gathered dictionary: 16 MiB


def _batch(data: Tensor | Batch) -> Batch:
    return data if isinstance(data, Batch) else Batch(data, data)


def _pair(data: Tensor | Batch, coder: SparseCoder) -> tuple[Tensor, Tensor]:
    """(x, target) as rows."""
    batch = _batch(data)
    if coder.transcodes and batch.target is batch.x:
        raise ValueError("a transcoder needs a target: pass sl.Batch(x, target)")
    target = batch.target.reshape(len(batch.target), -1).float()
    return coder._rows(batch.x)[0].to(coder.b_dec.device), target.to(coder.b_dec.device)


def _normalised(coder: SparseCoder, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(x, target) as the coder's weights see them, behind its ``input_norm``."""
    rows, mean, size = coder._enter(x)
    return (rows, target) if size is None or coder.transcodes else (rows, (target - mean) / size)


def _unexplained(coder: SparseCoder, data: Tensor | Batch) -> tuple[Tensor, Tensor, Codes]:
    """(x, the target less ``coder.silent``, the codes as ``strengths``): strengths·directions is the features' part of
    x_hat, whatever the norms of decoder rows and the ``input_norm``."""
    rows, target = _pair(data, coder)
    x = rows.reshape(-1, *coder.in_shape)
    silent = coder.silent(x, _batch(data).tokens).reshape(target.shape)
    return x, target - silent, coder.strengths(coder.sparse_codes(x), x)


@as_annotated
@torch.no_grad()
def inform(coder: SparseCoder, data: Tensor | Batch, share: float = 0.8, seed: int = 0) -> None:
    """``sl.saes.inform(sae, x)``: informed initialisation, in place: features start as data points.

    Row i of W_dec, and of the encoder: the direction of share·(x_j − median) + (1 − share)·random, j a random token.

    Args: data: (tokens, d_in) activations, at least d_sae of them is best. share: of data, in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    x, target = _pair(data, coder)
    generator = torch.Generator().manual_seed(seed)
    x, target = _normalised(coder, x, target)
    order = torch.randperm(len(x), generator=generator)
    rows = order[torch.arange(coder.d_sae) % len(x)]

    def blend(t: Tensor) -> Tensor:
        points = F.normalize(t[rows] - losses.geometric_median(t[:8192]), dim=1)
        noise = F.normalize(torch.randn(*points.shape, generator=generator).to(t), dim=1)
        return F.normalize(share * points + (1 - share) * noise, dim=1)

    everyone = torch.arange(coder.d_sae)
    read = blend(x)
    coder.set_features(everyone, blend(target) if coder.transcodes else read, read)


@as_annotated
@torch.no_grad()
def resample(coder: SparseCoder, data: Tensor | Batch, dead: Bool[Tensor, " d_sae"], seed: int = 0) -> int:
    """``sl.saes.resample(sae, x, dead)``: revive dead features, in place: each takes the direction of a badly
    reconstructed token (Bricken et al. 2023, "Towards Monosemanticity"). Returns their number.

    Tokens are drawn with probability ∝ ‖target − x_hat‖⁴. The encoder's row is the same direction with a fifth of the
    length of live ones; biases and thresholds are the live features' mean.

    Args: data: activations in the units that the coder serves: raw, or scaled in a callback of training. dead: which.
    """
    if dead.shape != (coder.d_sae,):
        raise ValueError(f"dead must be a bool for each of d_sae={coder.d_sae} features, got {tuple(dead.shape)}")
    features = dead.nonzero().flatten().to(coder.b_dec.device)
    if not len(features):
        return 0
    x, target = _pair(data, coder)
    x_hat = coder(_batch(data).x.to(x.device), _batch(data).tokens).x_hat
    error = (target - x_hat.reshape(target.shape)).pow(2).sum(1)
    generator = torch.Generator().manual_seed(seed)
    weight = (error / error.max().clamp_min(1e-12)).pow(2).cpu() + 1e-12
    again = len(features) > len(x)
    rows = torch.multinomial(weight, len(features), replacement=again, generator=generator).to(x.device)
    x, target = _normalised(coder, x, target)
    alive = ~dead.to(x.device)
    norms = coder.W_dec.detach().norm(dim=1)[alive]  # codes times these have the unit of new features' codes
    length = (coder.W_enc[:, alive].norm(dim=0) * norms).mean() if bool(alive.any()) else x.new_ones(())
    centre = coder.b_dec if coder.pre_bias else x.mean(0)
    coder.set_features(
        features, target[rows] - coder.b_dec, REVIVED * length * F.normalize(x[rows] - centre, dim=1)
    )
    for name in coder.code_units:
        value = coder.get_parameter_or_buffer(name)
        if value.shape[:1] == (coder.d_sae,) and bool(alive.any()):
            value[features] = (value[alive] * norms.view(-1, *[1] * (value.dim() - 1))).mean(0)
    return len(features)


def _require_free_decoder(coder: SparseCoder) -> None:
    if not isinstance(coder.W_dec, torch.nn.Parameter) or coder.tied:
        raise ValueError(f"{type(coder).__name__} ties its decoder to other weights: it cannot be changed alone")


@as_annotated
@torch.no_grad()
def unsuppress(coder: SparseCoder, data: Tensor | Batch, steps: Count = 60) -> SparseCoder:
    """``sl.saes.unsuppress(sae, x)``: a copy without the shrinkage of an L1 penalty (Wright & Sharkey 2024, "Addressing
    Feature Suppression in SAEs"; there by fine-tuning).

    Decoder rows become W_dec[i]·s_i, s the least-squares solution for the codes as they are, found by ``steps`` of
    conjugate gradients. The features that fire, and L0, stay the same; rows of W_dec lose their unit norm.

    Raises ValueError for coders whose decoder is tied to other weights.
    """
    _require_free_decoder(coder)
    _, wanted, codes = _unexplained(coder, data)
    directions = coder.directions()

    def apply(s: Tensor) -> Tensor:
        return kernels.decode(codes._replace(values=codes.values * s[codes.features]), directions)

    def transposed(r: Tensor) -> Tensor:
        inner = kernels.inner_products(r, directions, codes.features, codes.offsets) * codes.values
        return torch.zeros_like(coder.f_scale).index_add_(0, codes.features, inner)

    diagonal = torch.zeros_like(coder.f_scale).index_add_(0, codes.features, codes.values.pow(2))
    live = diagonal > 0
    ridge = 1e-3 * diagonal[live].mean() if bool(live.any()) else 1.0  # rare features stay near 1
    scale = torch.ones_like(diagonal)
    residual = transposed(wanted - apply(scale))
    step = direction = residual / (diagonal + ridge)
    size = residual @ step
    for _ in range(steps):
        image = transposed(apply(direction)) + ridge * direction
        share = size / (direction @ image).clamp_min(1e-30)
        scale = scale + share * direction
        residual = residual - share * image
        step = residual / (diagonal + ridge)
        size, before = residual @ step, size
        if float(size) <= 1e-12:
            break
        direction = step + size / before * direction
    result = copy.deepcopy(coder)
    result.W_dec *= scale.clamp_min(0)[:, None]
    return result


@as_annotated
@torch.no_grad()
def optimise_codes(coder: SparseCoder, data: Tensor | Batch, k: int | None = None) -> Codes:
    """``sl.saes.optimise_codes(sae, x)``: inference-time optimisation, the best codes for a fixed dictionary (Nanda et
    al. 2024, "GDM Mech Interp Update").

    With k=None the encoder's features are kept and their codes solved for: min ‖target − f·W_dec − b_dec‖², f >= 0.
    With a k features are chosen too, one after another, each the one that fits the residual best (orthogonal matching
    pursuit with f >= 0); this costs k encoder products.
    """
    if k is not None:
        check_k(k, coder.d_sae)
    x, wanted, codes = _unexplained(coder, data)
    W_dec = coder.directions()
    if k is not None:
        return _in_code_units(coder, _pursue(wanted, W_dec, k), x)
    counts = codes.offsets.diff()
    values = torch.zeros_like(codes.values)
    width = max(1, int(counts.max()))
    for rows in torch.arange(len(x), device=x.device).split(max(1, PIECE // (width * wanted.shape[1]))):
        slot = torch.arange(width, device=x.device)
        real = slot < counts[rows, None]
        place = torch.where(real, codes.offsets[rows, None] + slot, 0)
        atoms = W_dec[codes.features[place]] * real[..., None]
        values[place[real]] = _nonnegative(wanted[rows], atoms, torch.where(real, codes.values[place], 0.0))[real]
    return _in_code_units(coder, codes._replace(values=values), x)


def _in_code_units(coder: SparseCoder, strengths: Codes, x: Tensor) -> Codes:
    """Codes of ``strengths``; 0 where a feature has no direction."""
    ones = strengths._replace(values=torch.ones_like(strengths.values))
    one = coder.strengths(ones, x).values
    return strengths._replace(values=torch.where(one > 0, strengths.values / one, 0.0))


def _nonnegative(
    y: Float[Tensor, "rows d"], atoms: Float[Tensor, "rows k d"], start: Float[Tensor, "rows k"], sweeps: int = 30
) -> Float[Tensor, "rows k"]:
    """argmin over f >= 0 of ‖y − f·atoms‖² by coordinate descent from ``start``."""
    gram = atoms @ atoms.mT
    norms = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    pull = (atoms @ y[..., None])[..., 0]
    f = start.clone()
    for _ in range(sweeps):
        for j in range(f.shape[1]):
            rest = pull[:, j] - (gram[:, j] * f).sum(1) + gram[:, j, j] * f[:, j]
            f[:, j] = (rest / norms[:, j]).clamp_min(0)
    return f


def _pursue(y: Tensor, W_dec: Tensor, k: int) -> Codes:
    directions = F.normalize(W_dec, dim=1)
    features = torch.empty(len(y), k, dtype=torch.long, device=y.device)
    values = y.new_zeros(len(y), k)
    for rows in torch.arange(len(y), device=y.device).split(max(1, PIECE // (k * y.shape[1] + len(W_dec)))):
        chosen, f, residual = features[rows], y.new_zeros(len(rows), 0), y[rows]
        for n in range(k):
            fit = residual @ directions.T
            fit.scatter_(1, chosen[:, :n], -torch.inf)
            chosen[:, n] = fit.argmax(1)
            atoms = W_dec[chosen[:, : n + 1]]
            f = _nonnegative(y[rows], atoms, F.pad(f, (0, 1)), sweeps=8)
            residual = y[rows] - (f[:, None] @ atoms)[:, 0]
        features[rows], values[rows] = chosen, f
    return kernels.equal_rows(values, features, len(W_dec))


@as_annotated
@torch.no_grad()
def realign(coder: SparseCoder, data: Tensor | Batch, rank: int | None = None, ridge: float = 0.03) -> SparseCoder:
    """``sl.saes.realign(sae, x)``: a copy whose decoder suits another distribution; the encoder stays as it is (GAE,
    "Geometry-aware realignment").

    1. Rotate: U the leading directions of the dictionary, V those of the new activations' covariance, R the orthogonal
       matrix nearest to VᵀU (Procrustes); D' = D·U·Rᵀ·Vᵀ.
    2. Refit: min ‖target − b − f·D‖² + λ‖D − D'‖², with the codes that the encoder gives, b the mean that this leaves.

    Both take rows of D at unit norm and f as ``SparseCoder.strengths``, so that the answer does not depend on the unit
    of codes; each row gets its norm back.

    Args: data: activations of the new distribution. rank: directions that are rotated; None: those with 99 % of the new
    variance. ridge: λ in units of the mean Σf² of a live feature.
    """
    _require_free_decoder(coder)
    if getattr(coder, "causal", False):
        raise ValueError(f"realign would let features of a causal {type(coder).__name__} write before their own layer")
    x, wanted, codes = _unexplained(coder, data)
    size = coder.sizes(x).reshape(-1, 1)
    wanted = wanted + size * coder.b_dec  # which is fitted anew, as a coefficient of the rows' sizes (1, mostly)

    def without_bias(t: Tensor) -> tuple[Tensor, Tensor]:
        bias = (size * t).sum(0) / size.square().sum()
        return t - size * bias, bias

    centred, mean_y = without_bias(wanted)
    variance, V = torch.linalg.eigh((centred.T @ centred).double())
    if rank is None:
        share = variance.flip(0).cumsum(0) / variance.sum()
        rank = int((share < 0.99).sum()) + 1
    if not 1 <= rank <= coder.d_out:
        raise ValueError(f"rank must be an integer from 1 to d_out={coder.d_out}, got {rank!r}")
    V = V[:, -rank:].float()
    D, norms = coder.directions(), coder.W_dec.detach().norm(dim=1)
    U = torch.linalg.svd(D, full_matrices=False).Vh[:rank].T
    left, _, right = torch.linalg.svd(V.T @ U)
    rotated = D @ U @ (left @ right).T @ V.T

    f, mean_f = without_bias(codes.dense())
    gram = f.T @ f
    power = gram.diagonal()
    weight = ridge * power[power > 0].mean() if bool((power > 0).any()) else torch.ones(())
    gram.diagonal().add_(weight)
    pull = f.T @ centred + weight * rotated
    fitted = torch.linalg.solve(gram.double(), pull.double()).float()
    result = copy.deepcopy(coder)
    result.W_dec.copy_(fitted * norms[:, None])
    bias = mean_y - mean_f @ fitted
    if result.pre_bias:  # the encoder goes on subtracting the old one
        result.b_enc.add_((bias - coder.b_dec) @ result.W_enc)
    result.b_dec.copy_(bias)
    return result
