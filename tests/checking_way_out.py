"""The lens and direct effects of one model, held against plain hooks: a part of checking_models."""

from collections.abc import Callable
from typing import Any

import torch
from plain_blocks import Layer
from plain_hooks import Edits, adds, run, same
from plain_model import Plain
from torch import Tensor

import sae_lab as sl
from sae_lab.types import Site

SUMS = 1e-3  # of the largest logit: a sum of many parts


class WayOut:
    """Checks of what leads from the stream to the logits; Checker has the rest."""

    plain: Plain
    lm: Any
    layers: dict[int, Layer]
    some: list[int]
    acts: dict[tuple[str, int | None], Tensor]
    ask: Callable
    must: Callable
    found: Callable
    equal: Callable

    def lens(self) -> None:
        if not self.layers:
            return
        d = self.plain.layers[0].pre.shape[-1]
        x = torch.randn(5, d, generator=torch.Generator().manual_seed(7))
        want = self.plain.lens(x)
        last = max(self.layers)
        for kind, n in (("resid_post", last), ("resid_post", 0), ("attn_out", 0), ("mlp_out", 0), ("embed", None)):
            if (kind, n) in self.acts and self.acts[kind, n].shape[-1] == d:  # OPT-350m's embeddings are narrower
                self.one_lens(Site(kind, n), x, want)
        for n in self.some:
            if ("attn_z", n) in self.acts and (way := self.through_w_o(self.layers[n])) is not None:
                z = torch.randn(5, self.acts["attn_z", n].shape[-1], generator=torch.Generator().manual_seed(8))
                self.one_lens(Site("attn_z", n), z, self.plain.lens(way(z)))

    def one_lens(self, site: Site, x: Tensor, want: Tensor | None) -> None:
        got = self.ask(f"lens {site.key}", lambda: self.lm.lens(x, site))
        if isinstance(got, str) or got is None:
            if want is not None:
                self.found("UNFAIR", f"lens {site.key}", got or "None")
            return
        if want is None:
            self.found("WRONG", f"lens {site.key}", "given, but the head reads no norm of the stream")
            return
        cos = torch.cosine_similarity(got.float(), want, dim=-1)
        if not bool((cos > 0.9999).all()):
            self.found("WRONG", f"lens {site.key}", f"cosine {float(cos.min()):.4f} with head(norm(d)) - head(norm(0))")

    def through_w_o(self, layer: Layer) -> Callable[[Tensor], Tensor] | None:
        """What W_O, and the norm behind it where there is one, make of directions at attn_z."""
        if not layer.w_o or not layer.attention:
            return None
        w_o, part = layer.w_o[0].point, layer.attention[0]
        out = next(e.tensor for e in layer.events if e.point[:2] == (w_o.path, "output"))
        norm = None
        if abs(float(torch.cosine_similarity(out.flatten(), part.added.flatten(), dim=0))) < 1 - 1e-6:
            norm = self.plain.modules[part.point.path]
            if not self.plain.parts.leaf(part.point.path):
                return None

        @torch.no_grad()
        def way(z: Tensor) -> Tensor:
            linear = self.plain.modules[w_o.path]
            x = linear(z) - linear(torch.zeros_like(z))
            x = norm(x) - norm(torch.zeros_like(x)) if norm is not None else x
            return x if part.factor > 0 else -x

        return way

    def direct(self) -> None:
        """direct_effects: its own sum rule, and the effects of features at a middle layer by plain hooks."""
        if not self.layers:
            return
        last, head = max(self.layers), self.plain.head()
        fair = "" if head else "the head reads no norm of the stream"
        fair = fair or ("" if self.multiplier() else "the logits are no multiple of what the head gives")
        logits = self.plain.logits[0, -1] - self.plain.logits[0, -1].mean()
        for kind, n in (("resid_post", last), ("resid_post", 0), ("mlp_out", 0), ("attn_z", self.some[0])):
            if (kind, n) not in self.acts:
                continue
            site = Site(kind, n)
            coder = self.coder_at(site)
            carry = self.carry(n) if n != last else 1.0
            why = fair or ("" if carry == 1.0 else "later blocks change what the stream carries")
            why = why or ("not of the stream" if kind == "attn_z" or not self.layers[n].shape else "")
            what = f"direct effects {site.key}"
            got = self.must(what, lambda c=coder: sl.circuits.direct_effects(self.lm, c, self.prompt, n=3), why)
            if got is None:
                continue
            total = got.effects.sum(0) + got.others + got.error + got.bias + got.rest
            if float((total - got.logits).abs().max()) > SUMS * float(logits.abs().max()):
                self.found("WRONG", what, f"their sum is {total.tolist()}, logits {got.logits.tolist()}")
            if not got.note:
                self.equal(f"{what}: logits", got.logits, logits[got.targets], SUMS)
            if kind != "attn_z" and head:
                self.effects(got, coder, site, carry)

    def carry(self, n: int) -> float | None:
        """What is left, behind the last block, of a vector added behind block n while every module of the later blocks
        gives what it gave before: a factor, or None where it is no longer along the vector."""
        later = [layer for number, layer in self.layers.items() if number > n]
        known = {e.point: e.tensor for layer in later for e in layer.events if e.point.end == "output"
                 and self.plain.parts.leaf(e.point.path)
                 and type(self.plain.modules[e.point.path]) not in (torch.nn.Dropout, torch.nn.Identity)}  # fmt: skip
        by = torch.randn(self.plain.layers[0].pre.shape[-1], generator=torch.Generator().manual_seed(5))
        edits: Edits = [(point, lambda _, x=x: x.clone()) for point, x in known.items()]  # some add in place
        edits.append((self.layers[n].end, adds(by)))
        _, events, _ = run(self.module, self.plain.ids, edits, record=True)
        end = self.plain.layers[-1].end
        now = next(e.tensor for e in events if e.point == end)
        moved = (now - self.plain.layers[-1].post)[0, -1]
        c = float(moved @ by / by.square().sum())
        if float((moved - c * by).norm()) > 1e-3 * float(by.norm()):
            return None
        return 1.0 if abs(c - 1) < 1e-4 else c

    @torch.no_grad()
    def effects(self, got: Any, coder: Any, site: Site, carry: float | None) -> None:
        """Effects of the listed features: the lens of what each writes, in the norm's own scale at this token."""
        if carry is None:
            self.found("WRONG", f"direct effects {site.key}", "given, but later blocks change the stream's directions")
            return
        norm, stream = self.plain.head()[1], self.plain.layers[-1].post[0, -1]
        vectors = carry * got.values[:, None] * coder.W_dec.detach()[got.features]
        want = self.plain.lens(vectors)
        if norm and self.plain.divides(norm):
            part = self.plain.modules[norm]
            centres = same(part(stream[None] + 3.0), part(stream[None]), 1e-3)
            rms = lambda x: (x - x.mean(-1, keepdim=True) * centres).square().mean(-1).sqrt()  # noqa: E731
            want = want * (rms(vectors) / rms(stream))[:, None]
        want = want - want.mean(-1, keepdim=True)
        factor = self.multiplier() or 1.0  # before a cap
        off = (got.effects - factor * want[:, got.targets]).abs().max()
        if float(off) > 1e-2 * float(got.effects.abs().max()):
            self.found("WRONG", f"direct effects {site.key}", f"{got.effects.flatten().tolist()}, by plain hooks "
                       f"{(factor * want[:, got.targets]).flatten().tolist()}")  # fmt: skip

    @torch.no_grad()
    def multiplier(self) -> float | None:
        """What the logits are, times what the head makes of the stream; None where they are no multiple: a cap."""
        head, norm = self.plain.head()
        stream = self.plain.layers[-1].post
        own = self.plain.modules[head](self.plain.modules[norm](stream) if norm else stream)[0, -1].float()
        own, logits = own - own.mean(), self.plain.logits[0, -1] - self.plain.logits[0, -1].mean()
        c = float(own @ logits / own.square().sum())
        return c if float((c * own - logits).norm()) < 1e-4 * float(logits.norm()) else None
