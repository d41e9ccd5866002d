"""``TrainConfig(objective="kl")``: the loss through the model, with the coder's reconstruction spliced in at its site.

    loss = (1 - share)·mse + share·α·KL + the family's other terms,  α = mse/KL of this batch, held constant

So both stand at the size of the mse whatever their units, and a penalty keeps the weight it has without the model. The
balance of each batch, with share=.5, is that of Karvonen 2025 (arXiv:2503.17272), who finetunes trained coders with it;
share=1 leaves the mse out, as in the end-to-end coders of Braun et al. 2024 (arXiv:2405.12241), whose second kind also
reconstructs later sites (``downstream``). They set their weights by hand.

The model is run twice on each context: as it is, and with the reconstruction; only the second has a gradient, which
ends at the reconstruction. A few contexts run at a time, so that only the clean logits of a batch are kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sae_lab.activations.mixing import Place
from sae_lab.activations.sharding import FORWARD_TOKENS, in_groups
from sae_lab.activations.store import Harvested, Rows
from sae_lab.activations.streaming import Stream
from sae_lab.lm import passes
from sae_lab.lm.passes import through
from sae_lab.lm.text import Context, padded
from sae_lab.saes.base import SparseCoder
from sae_lab.training.config import TrainConfig
from sae_lab.types import Batch, Site, TokenBatch, Write

LEAST = 1e-8  # nats/token: below it a KL is rounding, and is not made as large as the mse


class Pass(NamedTuple):
    """Contexts that run at once: their tokens, which of them are spliced, and what the model gave without the coder."""

    tokens: TokenBatch
    keep: Tensor  # bool "batch pos"
    logits: Tensor
    later: dict[Site, Tensor]  # activations at the downstream sites


class Through:
    """Batches of whole contexts, and the loss through the model on the last one. A batch has exactly the rows asked
    for: the last context is cut where it is full."""

    def __init__(self, rows: Harvested | Rows, coder: SparseCoder, config: TrainConfig):
        said = f"objective={config.objective!r}"
        if not isinstance(rows, Stream):
            kind = "a store" if isinstance(rows, Harvested) else "a tensor"
            raise ValueError(f"{said} runs the model, and {kind} has none: train on sl.Stream(lm, site, text)")
        if rows.lm.remote:
            raise ValueError(f"{said} needs the model on this machine, and it is on a server: load it without remote")
        if rows.kept:
            raise ValueError(f"{said} reads whole contexts, which keep='disk' does not write: leave keep out")
        if len(coder.out_shape) > 1:
            raise ValueError(
                f"{said} splices one site, and a {type(coder).__name__} writes {len(rows.writes)}: train a coder of one"
            )
        self.rows, self.lm, self.batch_size = rows, rows.lm, config.batch_size
        self.objective, self.share = config.objective, config.share
        self.site = rows.writes[0]
        self.later = [Site.of(site) for site in config.downstream]
        when = self.lm._sites.when
        if when(rows.reads[0]) > when(self.site):
            raise ValueError(
                f"a coder that reads {rows.reads[0]} cannot be spliced in at {self.site}, which is earlier"
            )
        if early := [site for site in self.later if when(site) <= when(self.site)]:
            raise ValueError(f"downstream sites come after {self.site}, got {early[0]}: name later ones")
        self.passes: list[Pass] = []
        self._starts = {0: Place(0, 0, 0)}  # of the next steps: the place of the first context
        self._at: Place | None = None  # of the context that comes next
        self._contexts: Iterator[tuple[Place, Context]] = iter(())

    # ---- batches

    def batch(self, step: int, batch_size: int, seed: int = 0) -> Batch:
        """The kept tokens of the contexts that are due, in the order of the text. seed: not used."""
        start = self._starts[step]
        if self._at is None or self._at != start:
            self._contexts = self.rows.source.contexts(start)
        self.passes, found, have = [], [], 0
        while have < batch_size:
            for group in in_groups(self._some(batch_size - have, start), FORWARD_TOKENS):
                read, acts = self._read(padded(group))
                self.passes.append(read)
                found.append(acts)
                have += int(read.keep.sum())
        self._cut(have - batch_size)
        self._starts = {step: start, step + 1: cast(Place, self._at)}
        kept = [part.keep for part in self.passes]

        def rows_at(site: Site) -> Tensor:
            return torch.cat([acts[site][k.to(acts[site].device)] for acts, k in zip(found, kept, strict=True)])

        x = rows_at(self.rows.reads[0])
        target = x if self.rows.reads == self.rows.writes else rows_at(self.site)
        ids, positions = (
            torch.cat([getattr(part.tokens, name)[part.keep] for part in self.passes]) for name in ("ids", "positions")
        )
        return Batch(x, target, ids, positions)

    def _some(self, rows: int, start: Place) -> list[Context]:
        """The next contexts: as few as have so many tokens that count, where no norm is too large. start: of the batch,
        which sees no context twice."""
        found: list[Context] = []
        while rows > 0:
            place, context = next(self._contexts)
            if place >= start._replace(epoch=start.epoch + 1):
                raise ValueError(
                    f"the text ends before a batch is full: batch_size={self.batch_size:,} is {rows:,} tokens more "
                    "than it has for training: pass more text, or a smaller batch_size"
                )
            rows -= int(self.rows.mask.of(padded([context])).sum())
            found.append(context)
            self._at = place._replace(row=place.row + 1)
        return found

    def _read(self, tokens: TokenBatch) -> tuple[Pass, dict[Site, Tensor]]:
        """A pass without the coder, and its activations."""
        sites = list(dict.fromkeys([*self.rows.sites, *self.later]))
        acts, logits = self.lm.run(tokens, sites)
        keep = self.rows.mask.of(tokens, {site: acts[site] for site in self.rows.sites})
        return Pass(tokens, keep, logits, {site: acts[site] for site in self.later}), acts

    def _cut(self, excess: int) -> None:
        """Cut the last context, so that its last ``excess`` kept tokens, and all after them, do not count."""
        if excess:
            last = self.passes[-1]
            end = int(last.keep[-1].nonzero()[-excess])
            last.keep[-1, end:] = False
            last.tokens.mask[-1, end:] = False

    def state(self, rows: int) -> dict[str, int]:
        """Where in the text the next context stands after so many rows, for a checkpoint."""
        step = rows // self.batch_size
        return {"step": step} | self._starts[step]._asdict()

    def resume(self, state: Any) -> None:
        """Go on from what ``state`` gave."""
        try:
            numbers = [state[name] for name in ("step", *Place._fields)]
            if not all(type(n) is int and 0 <= n < 1 << 40 for n in numbers):
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise ValueError(
                f"a place in the text is four whole numbers, got {state!r:.80}: delete the checkpoint to start over"
            ) from None
        self._starts = {numbers[0]: Place(*numbers[1:])}

    # ---- the loss

    def terms(self, x_hat: Tensor, terms: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the loss terms, figures: kl, ce, downstream, of the batch). x_hat: the reconstruction of the last batch, in
        raw units. terms: the family's."""
        rows, gradients, sums, start = x_hat.detach(), [], [], 0
        for part in self.passes:
            end = start + int(part.keep.sum())
            gradient, found = self._slope(part, rows[start:end].to(self.lm.device))
            gradients.append(gradient)
            sums.append(found)
            start = end
        gradient = torch.cat(gradients).to(x_hat)
        kl, ce, apart, tokens, predicted = torch.stack(sums).sum(0).to(x_hat.device)
        counted = predicted if self.objective == "ce" else tokens
        kl = kl / tokens
        mse = terms["mse"].detach()
        figures = {"kl": kl, "ce": ce / predicted} | ({"downstream": apart / len(self.passes)} if self.later else {})
        lost = figures[self.objective] + (kl if self.later else 0.0)  # later sites stand at the size of the KL
        # Of the cross-entropy, too, what the coder adds is about the KL.
        alpha = mse / (kl * (2 if self.later else 1)).clamp_min(LEAST)
        slope = (x_hat * (gradient / counted)).sum()  # its gradient is that of the loss; its value is taken off again
        scaled = self.share * alpha * (lost + slope - slope.detach())
        return terms | {"mse": (1 - self.share) * terms["mse"], "through": scaled}, figures

    def _slope(self, part: Pass, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(the gradient with respect to the spliced rows, the sums of KL and CE, the distance at downstream sites, and
        the numbers of tokens and of predicted tokens)."""
        import nnsight

        lm, leaf = self.lm, rows.requires_grad_(True)

        def spliced(x: Tensor, _tokens: Any) -> Tensor:
            new = x.clone()
            new[part.keep.to(x.device)] = leaf.to(x)
            return new

        steps = lm._steps(self.later, [Write(self.site, spliced)], passes.whole)
        nn, tokens, found = lm._nn, part.tokens.plain(), cast(dict[str, Any], {})
        inputs = {"input_ids": tokens.ids.to(lm.device), "use_cache": False}
        with lm._lock, frozen(lm._module), torch.enable_grad(), nn.trace(inputs):
            found = nnsight.save({})
            through(nn, steps, tokens, found)
            found[""] = nn.output.logits
        logits = found[""]
        slope, sums = self._differences(logits.detach(), part)
        outputs, weights = [logits], [slope]
        apart = sums.new_zeros(())
        if self.later:
            with torch.enable_grad():
                apart = torch.stack([self._apart(part, site, found[site.key]) for site in self.later]).mean()
            outputs.append(apart)
            weights.append((sums[0] / apart.detach().clamp_min(LEAST)).to(apart))
        (gradient,) = torch.autograd.grad(outputs, [leaf], weights)
        kl, ce, tokens_, predicted = sums
        return gradient, torch.stack([kl, ce, apart.detach().to(kl), tokens_, predicted])

    def _differences(self, logits: Tensor, part: Pass) -> tuple[Tensor, Tensor]:
        """(the gradient of the summed loss with respect to the logits; the sums of KL and CE, and the numbers of tokens
        and predicted tokens). A context at a time: float copies of all would be large."""
        slope, sums = torch.zeros_like(logits), torch.zeros(4, device=logits.device)
        lengths = part.tokens.mask.sum(1).tolist()
        for row, n in enumerate(lengths):
            spliced, clean = (t[row, :n].float().log_softmax(-1) for t in (logits, part.logits.to(logits.device)))
            answers = part.tokens.ids[row, 1:n, None].to(logits.device)
            sums[0] += (clean.exp() * (clean - spliced)).sum()
            sums[1] -= spliced[:-1].gather(-1, answers).sum()
            sums[2:] += torch.tensor([n, n - 1], device=logits.device)
            if self.objective == "kl":
                slope[row, :n] = (spliced.exp() - clean.exp()).to(slope)
            else:
                minus = torch.full(answers.shape, -1.0, device=answers.device)
                slope[row, : n - 1] = spliced[:-1].exp().scatter_add(-1, answers, minus).to(slope)
        return slope, sums

    @staticmethod
    def _apart(part: Pass, site: Site, acts: Tensor) -> Tensor:
        """The share of the variance at a later site by which the spliced pass differs from the clean one."""
        keep = part.keep.to(acts.device)
        clean = part.later[site].to(acts.device)[keep]
        return (acts[keep] - clean).square().sum() / (clean - clean.mean(0)).square().sum().clamp_min(LEAST)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, the module's parameters take no gradient, and nothing is kept for one."""
    changed = [p for p in module.parameters() if p.requires_grad]
    for p in changed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)
