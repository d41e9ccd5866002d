"""Where sites lie in a model: the only code that knows module paths and which end of a module to read.

Nothing here relies on the names of modules. ``observing.watch`` runs the model once over a short text and finds what
each block adds to the residual stream; a kind of site is offered at a layer if its identity holds there:

    resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post      (one after the other)
    resid_pre + attn_out + mlp_out = resid_post                             (side by side: no resid_mid)
    resid_post of a layer = resid_pre of the next
    W_O(attn_z), after the block's norm and multiplier = what attention adds to the stream
"""

import re
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from sae_lab.lm.block import read_block
from sae_lab.lm.observing import ROWS, TOKENS, times, watch
from sae_lab.lm.passes import Place, first_tensor
from sae_lab.types import KINDS, Site

_IN_A_LIST = re.compile(r"(^|\.)\d+(\.|$)")


class SiteMap:
    """Sites of one causal LM, found by one pass over a short text."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.modules = dict(model.named_modules())
        lists = {  # of modules, in no other list: path -> length
            path: len(module)
            for path, module in self.modules.items()
            if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and not _IN_A_LIST.search(path)
        }
        self._flow, out = watch(model, {f"{path}.{i}" for path, n in lists.items() for i in range(n)})
        self._seen = self._flow.seen
        _require_causal(out)
        # The longest list of modules through which the stream passes, each called once and in order.
        chains = [path for path, n in lists.items() if self._hands_on(path, n)]
        self.blocks = max(chains, key=lambda path: (lists[path], -path.count(".")), default=None)
        self.n_layers = lists[self.blocks] if self.blocks else 0
        if self.blocks and self._seen[f"{self.blocks}.0", "input"].shape[:2] == (TOKENS, ROWS):
            raise ValueError(
                f"sae_lab reads models whose activations have the axes (batch pos d), and those of a "
                f"{type(model).__name__} have (pos batch d): load another model"
            )
        self.layers = [read_block(model, self._flow, f"{self.blocks}.{{}}", i) for i in range(self.n_layers)]
        path = self.path_of(module) if (module := self.model.get_input_embeddings()) is not None else None
        seen = self._seen.get((path, "output")) if path else None
        self._embed = Place(str(path), "output") if seen and seen.shape[:-1] == (ROWS, TOKENS) else None
        found = {kind for block in self.layers for kind in block.places} | ({"embed"} if self._embed else set())
        self.kinds = [k for k in KINDS if k in found]
        self.head_factor = 1.0  # the head reads this times the last norm's output
        self.way_out = self._way_out()
        head = model.get_output_embeddings()  # type: ignore[operator]
        made = self._seen.get((self.path_of(head), "output")) if head is not None else None
        # The factor of the model's logits (Cohere, Granite); None: the model changes them in another way too.
        self.logit_factor = times(made.form, self._flow.logits) if made is not None else None

    def _hands_on(self, path: str, n: int) -> bool:
        ends = [(self._seen.get((f"{path}.{i}", "input")), self._seen.get((f"{path}.{i}", "output"))) for i in range(n)]
        if any(a is None or b is None or a.calls > 1 or a.shape != b.shape for a, b in ends):
            return False
        streams: Any = ends
        return len(streams[0][0].shape) >= 3 and all(
            b.when < c.when and b.shape == c.shape for (_, b), (c, _) in pairwise(streams)
        )

    @property
    def final_norm(self) -> str | None:
        """The module whose output the head reads; None if that is the last block."""
        return self.way_out[-1] if self.way_out else None

    def path_of(self, module: nn.Module) -> str:
        """The path of one of the model's modules."""
        return next(path for path, m in self.modules.items() if m is module)

    def _way_out(self) -> list[str] | None:
        """Paths of the modules between the last block and the head, in order; None if one of them reads more than one
        tensor."""
        head = self.model.get_output_embeddings()
        read = self._seen.get((self.path_of(head), "input")) if head is not None else None
        last = self._seen.get((f"{self.blocks}.{self.n_layers - 1}", "output")) if self.blocks else None
        if read is None or last is None:
            return None
        way, form = [], read.form
        while (factor := times(last.form, form)) is None:
            makers = [
                (s.when, p) for (p, end), s in self._flow.last.items()
                if end == "output" and s.when > last.when and times(s.form, form) is not None
                and (p, "input") in self._flow.last
            ]  # fmt: skip
            if len(way) > 8 or not makers:
                return None
            path = min(makers)[1]  # the innermost ends first
            if not way:
                self.head_factor = times(self._flow.last[path, "output"].form, form) or 1.0
            way.insert(0, path)
            form = self._flow.last[path, "input"].form
        if not way:
            self.head_factor = factor
        return way

    def place(self, site: Site) -> Place:
        """How a site is read and written. ValueError, which lists the model's sites, for a layer, kind, head or module
        that the model does not have."""
        if site.kind == "module":
            return Place(self._module(str(site.path)), "output")
        if site.kind == "embed":
            if self._embed is None:
                raise ValueError(f"this model has no 'embed' site; it has {self._have()}")
            return self._embed
        self._require_own_path(site)
        if not self.layers:
            raise ValueError(
                f"this model has no {site}: no list of modules that hand one tensor on, its residual stream, was found "
                f"in it; name a module's path, e.g. Site({next(iter(self._paths()), 'a.module')!r})"
            )
        layer = site.layer or 0
        if layer >= self.n_layers:
            raise ValueError(f"{site} is out of range: this model has layers 0 to {self.n_layers - 1}")
        block = self.layers[layer]
        if site.kind not in block.places:
            why = block.missing.get(site.kind, "")
            here = [k for k in KINDS if k in block.places]
            if site.kind not in self.kinds:
                raise ValueError(
                    f"this model has no {site.kind!r} sites; it has {self._have()}, or a module's path"
                    + (f" ({why})" if why else "")
                )
            raise ValueError(
                f"layer {layer} of this model has no {site.kind!r} site: {why}; it has {', '.join(here)}, or a "
                "module's path"
            )
        place = block.places[site.kind]
        return place if site.head is None else place._replace(columns=self._columns(site, place.path))

    def point(self, site: Site) -> tuple[str, str, tuple[int, int] | None]:
        """Where a site lies: module path, "input" or "output", columns (a head's) or None for all."""
        return self.place(site)[:3]

    def _have(self) -> str:
        return ", ".join(self.kinds) or "none that is known by kind"

    def _paths(self) -> list[str]:
        return [p for p, end in self._seen if end == "output" and p]

    def _module(self, path: str) -> str:
        seen = self._seen.get((path, "output"))
        if seen is None:
            near = [p for p in self._paths() if path.rsplit(".", 1)[-1] in p][:5]
            raise ValueError(
                f"this model has no module {path!r} with a tensor output; "
                f"{'similar: ' + ', '.join(near) if near else 'kinds: ' + ', '.join(self.kinds)}"
            )
        if seen.calls > 1:
            raise ValueError(
                f"module {path!r} runs {seen.calls} times in one pass, so its output is not a single site: take a "
                "module that runs once"
            )
        if tuple(seen.shape[:-1]) not in ((ROWS, TOKENS), (ROWS * TOKENS,)):
            raise ValueError(
                f"a site has one vector for each token (batch pos d), and the output of module {path!r} has the shape "
                f"{seen.shape} for {ROWS} texts of {TOKENS} tokens: take another module"
            )
        return path

    def _require_own_path(self, site: Site) -> None:
        """ValueError for a path read as a layer's usual name that is a module outside this model's layers."""
        path = site.spelling
        if path and path in self.modules and self.blocks and not path.startswith(f"{self.blocks}."):
            raise ValueError(
                f"{path!r} is a module of this model but no part of its layers, which are {self.blocks}.0 to "
                f"{self.n_layers - 1}: name a layer's site, or a module inside {path!r}"
            )

    def _columns(self, site: Site, path: str) -> tuple[int, int]:
        n_heads = self.layers[site.layer or 0].heads
        width = self._seen[path, "input"].shape[-1]
        if not n_heads or width % n_heads:
            raise ValueError(f"{site} cannot be told from its neighbours: the model does not say how many heads "
                "this layer has; take all of them, without head=")
        if (site.head or 0) >= n_heads:
            raise ValueError(f"{site} is out of range: this model has heads 0 to {n_heads - 1}")
        d_head, head = width // n_heads, site.head or 0
        return head * d_head, (head + 1) * d_head

    def width(self, site: Site) -> int:
        path, end, columns, *_ = self.place(site)
        return self._seen[path, end].shape[-1] if columns is None else columns[1] - columns[0]

    def when(self, site: Site) -> int:
        """When the model computes a site: sites come in the order of this number."""
        place = self.place(site)
        return self._seen[place.path, place.end].when


def require_decoder(model: Any) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"sae_lab reads causal language models (decoders), and a {type(model).__name__} is an encoder-decoder: "
            "load a decoder-only model"
        )


def _require_causal(out: Any) -> None:
    """ValueError if the last token of the watched text, in which its rows differ, changes earlier logits."""
    logits = out.logits if hasattr(out, "logits") else first_tensor(out)
    if logits is None or logits.is_meta or logits.dim() != 3 or logits.shape[1] != TOKENS:
        return
    a, b = logits[0, :-1].float(), logits[1, :-1].float()
    off = float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
    if off > (1e-4 if logits.dtype == torch.float32 else 0.05):
        raise ValueError(
            f"sae_lab reads causal language models, and in this one a later token changes the logits of earlier ones "
            f"(by {off:.2%}), as in an encoder: load a decoder (for BERT and its kin, is_decoder=True)"
        )
