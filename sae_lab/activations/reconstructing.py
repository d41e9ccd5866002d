"""How well a coder's reconstruction keeps the activations and the model's loss."""

import math
from dataclasses import field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.activations.contexts import context_length, spread_contexts
from sae_lab.activations.reading import read_real, require_fits
from sae_lab.arguments import as_annotated
from sae_lab.lm.model import LM, token_losses
from sae_lab.lm.text import Context, Documents, padded
from sae_lab.lm.tokens import pad
from sae_lab.results import Result, figure, result
from sae_lab.saes import kernels
from sae_lab.saes.base import SparseCoder
from sae_lab.stats import clustered_error
from sae_lab.types import Site, TokenBatch, Write

AT_STAKE = 0.1  # CE recovered is undefined if ablation costs less than this, in nats/token,
SURE = 3  # or less than this number of its standard errors


@result
class Reconstruction(Result):
    """Result of ``sl.evals.reconstruction``.

    Losses are nats/token; ``ce_recovered`` is 1 for the identity and 0 for mean ablation; NaN if the ablation costs too
    little to take a share of it (see ``recovered``).
    """

    l0: float = figure("L0", "active features per token, eval mode", digits=2)
    fvu: float = figure("FVU", "variance unexplained, kept tokens", control="pca_fvu", control_name="PCA {pca_rank}",
                        best="low")  # fmt: skip
    fvu_all_tokens: float = figure("FVU, all tokens", "with the tokens that the mask leaves out", best="low")
    dead: float = figure("dead", "fire on none of {dead_tokens:,} training tokens", best="low", digits=".2%")
    dead_tokens: int
    ce_clean: float
    ce_delta: float = figure("dCE", "spliced - clean ({ce_clean:.3f}), nats/token", control="pca_ce_delta",
                             control_name="PCA {pca_rank}", best="low")  # fmt: skip
    ce_delta_se: float
    ce_recovered: float = figure("CE recovered", "{_mean_ablation}", control="pca_ce_recovered",
                                 control_name="PCA {pca_rank}", best="high")  # fmt: skip
    ce_recovered_zero: float = figure("CE recovered, zero", "{_zero_ablation}", best="high")
    ce_delta_mean_ablation: float
    ce_delta_mean_ablation_se: float
    ce_delta_zero_ablation: float
    ce_delta_zero_ablation_se: float
    pca_rank: int
    pca_fvu: float
    pca_ce_delta: float
    pca_ce_recovered: float
    tokens: int
    documents: int
    excluded: float
    mask: str
    token_deltas: Tensor = field(repr=False, compare=False)  # ΔCE of each predicted token
    token_documents: Tensor = field(repr=False, compare=False)  # each predicted token's document

    def minus(self, other: "Reconstruction") -> tuple[float, float]:
        """(this coder's ΔCE minus the other's, standard error): paired by token, clustered by document.

        ValueError if the two were not measured on the same tokens.
        """
        if not torch.equal(self.token_documents, other.token_documents):
            raise ValueError("these two were not measured on the same tokens: give both evals the same text and tokens")
        difference = self.token_deltas - other.token_deltas
        return float(difference.mean()), clustered_error(difference, self.token_documents)

    @property
    def explained_variance(self) -> float:
        return 1 - self.fvu

    @property
    def _mean_ablation(self) -> str:
        return said_of("mean ablation", self.ce_delta_mean_ablation, self.ce_delta_mean_ablation_se)

    @property
    def _zero_ablation(self) -> str:
        return said_of("zero ablation", self.ce_delta_zero_ablation, self.ce_delta_zero_ablation_se)

    _below = (
        "{tokens:,} tokens of {documents} documents; ± clustered by document; {excluded:.1%} of tokens {mask}; "
        "PCA fitted on these very tokens"
    )


@as_annotated
def reconstruction(
    coder: SparseCoder,
    lm: LM,
    text: Documents,
    tokens: int = 8_192,
    context: int | None = None,
    site: Site | str | None = None,
) -> Reconstruction:
    """``sl.evals.reconstruction(sae, lm, text.held_out)``: the loss added when the coder is spliced into the model.

    FVU = Σ‖y−ŷ‖²/Σ‖y−ȳ‖² over kept tokens, y the activation that the coder reconstructs. ΔCE = CE(spliced) − CE(clean)
    over every predicted token; tokens that the mask leaves out pass unchanged. CE recovered = 1 − ΔCE/ΔCE(ablated); NaN
    where ablation costs less than .1 nats or less than three of its standard errors.
    Controls: mean and zero ablation, and PCA of y, of rank k, fitted on these same activations (which favours PCA).

    Args:
        text: held-out documents, e.g. ``text.held_out``. tokens: how many to read.
        context: tokens the model sees at once; None is the length of the coder's training, else 128.
        site: of a crosscoder, which layer's reconstruction is spliced in and measured; None is the last.
    """
    _splice_site(coder, lm, site)
    context = context_length(coder, lm, tokens, context)
    read = read_and_reconstruct(coder, lm, spread_contexts(lm, text, tokens, context), site)
    measured = _measure(coder, read.y, read.y_hat, read.active, read.kept)
    losses, documents = _losses(lm, read.site, read.contexts, read.kept, read.y_hat, measured)
    clean, spliced, mean, zero, pca = losses.double()
    d_coder, d_mean, d_zero, d_pca = (float((v - clean).mean()) for v in (spliced, mean, zero, pca))
    mean_se, zero_se = (clustered_error(v - clean, documents) for v in (mean, zero))
    return Reconstruction(
        l0=measured["l0"],
        fvu=measured["fvu"],
        fvu_all_tokens=measured["fvu_all"],
        dead=float(math.nan if (dead := coder.meta.get("dead")) is None else dead),
        dead_tokens=coder.meta.get("dead_tokens") or 0,
        ce_clean=float(clean.mean()),
        ce_delta=d_coder,
        ce_delta_se=clustered_error(spliced - clean, documents),
        ce_recovered=recovered(d_coder, d_mean, mean_se),
        ce_recovered_zero=recovered(d_coder, d_zero, zero_se),
        ce_delta_mean_ablation=d_mean,
        ce_delta_mean_ablation_se=mean_se,
        ce_delta_zero_ablation=d_zero,
        ce_delta_zero_ablation_se=zero_se,
        pca_rank=measured["rank"],
        pca_fvu=measured["pca_fvu"],
        pca_ce_delta=d_pca,
        pca_ce_recovered=recovered(d_pca, d_mean, mean_se),
        tokens=len(read.kept),
        documents=len(documents.unique()),
        excluded=float((~read.kept).float().mean()),
        mask=read.mask,
        token_deltas=spliced - clean,
        token_documents=documents,
    )


class Measured(NamedTuple):
    """Texts and a coder's reconstructions; rows are the tokens of all contexts, one after another."""

    site: Site  # where the reconstruction is spliced in
    contexts: list[Context]
    y: Tensor  # the activations to reconstruct, "tokens d_out"
    y_hat: Tensor
    active: Tensor  # features on, of each token
    kept: Tensor
    mask: str

    @property
    def positions(self) -> Tensor:
        return torch.cat([torch.arange(len(c.ids)) for c in self.contexts])

    @property
    def documents(self) -> Tensor:
        return torch.tensor([d for c in self.contexts for d in c.documents])


def read_and_reconstruct(
    coder: SparseCoder, lm: LM, contexts: list[Context], site: Site | str | None = None
) -> Measured:
    """One pass to the coder's site, and its reconstruction there, in eval mode. ValueError where no token is kept."""
    at, layer = _splice_site(coder, lm, site)
    mask = coder.mask or lm.mask()
    # One context at a time, as in the spliced passes: another shape rounds differently, and the identity must cost 0.
    # On a server eight at a time, for fewer requests.
    at_once = 8 if lm.remote else 1
    batches = [padded(contexts[start : start + at_once]) for start in range(0, len(contexts), at_once)]
    with coder.evaluating():
        acts = read_real(lm, list(dict.fromkeys([*coder.reads, at])), batches)
        ids = torch.cat([batch.ids[batch.mask] for batch in batches])
        kept = mask.keep(ids, torch.cat([batch.positions[batch.mask] for batch in batches]), acts)
        kept &= torch.cat([mask.of(batch)[batch.mask] for batch in batches])  # by role
        if not kept.any():
            raise ValueError(f"the coder's mask leaves out every token ({mask}): evaluate with another mask or text")
        if coder.meta.get("centred"):  # trained without the mean coordinate, which norms ignore
            acts[at] = acts[at] - acts[at].mean(-1, keepdim=True)
        x = [acts[s] for s in coder.reads]
        x_hat, active = _reconstruct(coder, x[0] if len(x) == 1 else torch.stack(x, 1), ids)
    return Measured(at, contexts, acts[at], x_hat if layer is None else x_hat[:, layer], active, kept, str(mask))


def too_little(ablated: float, error: float) -> str:
    """Why an ablation's cost (nats/token ± its standard error) is too small to take a share of it; "" if it is not. An
    error of NaN, as with a single document, is ignored."""
    if not ablated >= AT_STAKE:
        return f"below {AT_STAKE}"
    return f"below {SURE} of its standard errors ({error:.2f})" if ablated < SURE * error else ""


def recovered(cost: float, ablated: float, error: float) -> float:
    """1 − cost/ablated, the share of an ablation's cost that a coder recovers; NaN if the ablation costs less than .1
    nats or less than three of its standard errors (``error``)."""
    return math.nan if too_little(ablated, error) else 1 - cost / ablated


def said_of(ablation: str, cost: float, error: float) -> str:
    """The cost of an ablation in words, and whether it is too small to take a share of it."""
    why = too_little(cost, error)
    return f"{ablation} costs {cost:.2f}" + (f", {why}: a share of that says nothing" if why else "")


def _splice_site(coder: SparseCoder, lm: LM, site: Site | str | None) -> tuple[Site, int | None]:
    """(the site where the reconstruction is spliced in, its number among a crosscoder's layers)."""
    require_fits(coder, lm)
    writes = coder.writes or coder.reads
    at = Site.of(site) if site is not None else writes[-1]
    if at not in writes:
        raise ValueError(f"this coder writes {', '.join(map(repr, writes))}, got site={at}")
    return at, writes.index(at) if len(coder.out_shape) > 1 else None


@torch.no_grad()
def _reconstruct(coder: SparseCoder, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(x_hat, how many features are active) of every token."""
    device = coder.W_dec.device
    x_hats, active = [], []
    for rows, tokens in zip(x.split(4096), ids.split(4096), strict=True):
        out = coder(rows.to(device), tokens.to(device))
        on = kernels.positive(out.codes).offsets.diff()
        x_hats.append(out.x_hat.cpu())
        active.append(on.float().cpu())
    return torch.cat(x_hats), torch.cat(active)


def _measure(coder: SparseCoder, y: Tensor, y_hat: Tensor, active: Tensor, kept: Tensor) -> dict[str, Any]:
    """The measures that need only activations: L0, FVU, and PCA of rank k."""
    error = (y - y_hat).pow(2).sum(-1).double()
    yk = y[kept].double()
    mean = yk.mean(0)
    variance = (yk - mean).pow(2).sum()
    l0 = float(active[kept].mean())
    rank = min(coder.config.get("k") or max(1, round(l0)), y.shape[1])
    eigenvalues, vectors = torch.linalg.eigh((yk - mean).T @ (yk - mean))
    return {
        "l0": l0,
        "fvu": float(error[kept].sum() / variance),
        "fvu_all": float(error.sum() / (y.double() - y.double().mean(0)).pow(2).sum()),
        "rank": rank,
        "pca_fvu": float(eigenvalues[:-rank].sum() / eigenvalues.sum()) if rank < y.shape[1] else 0.0,
        "mean": mean.float(),
        "basis": vectors[:, -rank:].float(),
    }


def _losses(
    lm: LM, site: Site, contexts: list[Context], kept: Tensor, x_hat: Tensor, measured: dict[str, Any]
) -> tuple[Float[Tensor, "variants predicted"], Tensor]:
    """Loss per predicted token when the site is clean, spliced, mean-ablated, zeroed, cut to PCA; and the document.

    One context at a time, all variants in one pass: layers below the site run once, for a batch of one, and the write
    makes it a batch of five. Where a write cannot do so (mid-block the stream is changed in place; other heads keep
    their batch; masks fit the embeddings' batch; BLOOM and others refuse), the batch is five from the start.
    """
    from tqdm.auto import tqdm

    from_the_start = fixes_the_batch(site) or not _may_grow(lm, site, contexts[0])
    collected, documents = [], []
    lengths = [len(c.ids) for c in contexts]
    parts = zip(contexts, kept.split(lengths), x_hat.split(lengths), strict=True)
    for context, keep, own in tqdm(parts, "evaluate", len(contexts), unit="context", dynamic_ncols=True):
        batch = pad([context.ids])
        five = repeated(batch, 5)
        write = partial(variants, x_hat=own, keep=keep, mean=measured["mean"], basis=measured["basis"])
        losses = partial(losses_of_each, ids=five.ids, mask=five.mask)
        given = five if from_the_start else batch
        form = Float[Tensor, f"5 {len(context.ids)}"]
        collected.append(lm.run(given, writes=[Write(site, write)], logits=losses, form=form)[1][:, 1:])
        documents += context.documents[1:]
    return torch.cat(collected, dim=1), torch.tensor(documents)


def fixes_the_batch(site: Site) -> bool:
    """Whether a write at this site must keep the batch size."""
    return site.kind in ("resid_mid", "embed", "module") or site.head is not None


def repeated(batch: TokenBatch, times: int) -> TokenBatch:
    """One text several times."""
    ids, mask, positions = (part.expand(times, -1) for part in (batch.ids, batch.mask, batch.positions))
    return TokenBatch(ids, mask, positions)


def _may_grow(lm: LM, site: Site, context: Context) -> bool:
    """Whether a write may turn one row into five: tried on a few tokens, where all five must have the same loss."""
    batch = pad([context.ids[:4]])
    five = repeated(batch, 5)
    try:
        losses = lm.run(
            batch, writes=[Write(site, five_of_one)], logits=partial(losses_of_each, ids=five.ids, mask=five.mask)
        )[1][:, 1:]
    except Exception:  # each model raises another type
        return False
    return losses.shape[0] == 5 and bool(torch.allclose(losses, losses[:1].expand_as(losses), rtol=1e-2))


@no_type_check
def five_of_one(x, tokens):
    """The first row five times."""
    return x[:1].expand(5, -1, -1).clone()


@no_type_check
def variants(x, tokens, x_hat, keep, mean, basis):
    """Five variants of a text's x in one batch: x, its reconstruction, the mean, zero, its PCA; tokens that the mask
    leaves out keep x. A function of torch alone, see ``saes.portable``."""
    mean, basis, keep, x_hat = mean.to(x.device), basis.to(x.device), keep.to(x.device), x_hat[None].to(x.device)
    x = x[:1]
    rows = x.float()
    new = torch.cat([
        rows,
        x_hat,
        mean.expand_as(rows),
        torch.zeros_like(rows),
        (rows - mean) @ basis @ basis.T + mean,
    ]).to(x.dtype)  # fmt: skip
    return torch.where(keep.unsqueeze(-1), new, x)


@no_type_check
def losses_of_each(logits, tokens, ids, mask):
    """Losses of one row of tokens under each variant of the batch."""
    return token_losses(logits, SimpleNamespace(ids=ids, mask=mask))
