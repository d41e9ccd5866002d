"""Where sites lie in a model: the only code that knows module paths, tuples and which end of a module to read."""

from typing import Any

import torch
from torch import nn

from sae_lab.lm.passes import first_tensor
from sae_lab.types import KINDS, LAYER_KINDS, Site

_BLOCKS = (
    "model.layers", "model.language_model.layers", "language_model.model.layers", "transformer.h", "gpt_neox.layers",
)  # fmt: skip
_EMBED = ("embed_tokens", "wte", "embed_in")
_FINAL_NORM = ("norm", "ln_f", "final_layer_norm")
_ATTENTION = ("self_attn", "attn", "attention")
_W_O = ("o_proj", "c_proj", "dense", "out_proj")


Point = tuple[str, str, tuple[int, int] | None]  # module path, "input" or "output", columns (a head's), or all


class SiteMap:
    """Sites of one causal LM: finds modules by the names that model families use, and their order by running it.

    A pass over one token records every module's inputs and outputs as they happen, so that order and width of any
    site are what the model does, not what its class is called.
    """

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.modules = dict(model.named_modules())
        self.blocks = next((p for p in _BLOCKS if p in self.modules), None)
        self.n_layers = len(self.modules[self.blocks]) if self.blocks else 0  # type: ignore[arg-type]
        self._events = self._record()
        self.kinds = self._available_kinds()

    def _record(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(path, end) -> (when, width), from one pass over a single token."""
        events: dict[tuple[str, str], tuple[int, int]] = {}

        def note(path: str, end: str, value: Any) -> None:
            value = first_tensor(value)
            if value is not None and value.dim() >= 2 and (path, end) not in events:
                events[path, end] = (len(events), value.shape[-1])

        hooks = []
        for path, module in self.modules.items():
            hooks += [
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, p=path: note(p, "input", (*args, *kwargs.values())), with_kwargs=True
                ),
                module.register_forward_hook(lambda _, args, out, p=path: note(p, "output", out)),
            ]
        try:
            with torch.no_grad():
                device = next(self.model.parameters()).device
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
        finally:
            for hook in hooks:
                hook.remove()
        return events

    def _child(self, parent: str, names: tuple[str, ...]) -> str | None:
        return next((f"{parent}.{n}" for n in names if f"{parent}.{n}" in self.modules), None)

    @property
    def w_o(self) -> list[str | None]:
        """Each block's attention output projection (its input is attn_z)."""
        found = []
        for layer in range(self.n_layers):
            attention = self._child(f"{self.blocks}.{layer}", _ATTENTION)
            found.append(self._child(attention, _W_O) if attention else None)
        return found

    @property
    def final_norm(self) -> str | None:
        return self._child(self.blocks.rsplit(".", 1)[0], _FINAL_NORM) if self.blocks else None

    def after_attention(self, layer: int) -> str | None:
        """The norm between W_O and the residual stream, where a model has one (Gemma, OLMo 2)."""
        block = f"{self.blocks}.{layer}"
        return f"{block}.post_attention_layernorm" if self._post_norms(block) else None

    def path_of(self, module: nn.Module) -> str:
        """The path of one of the model's modules."""
        return next(path for path, m in self.modules.items() if m is module)

    def _post_norms(self, block: str) -> bool:
        """Whether sub-layers' outputs are normed before they are added to the stream."""
        return f"{block}.post_feedforward_layernorm" in self.modules

    def _point(self, kind: str, layer: int | None) -> tuple[str, str] | None:
        """(path, end) of a kind, or None where this architecture has no such place."""
        if not self.blocks:
            return None
        if kind == "embed":
            path = self._child(self.blocks.rsplit(".", 1)[0], _EMBED)
            return (path, "output") if path else None
        block = f"{self.blocks}.{layer}"
        attention = self._child(block, _ATTENTION)
        # Gemma 2 and 3, OLMo 2 norm a sub-layer's output before they add it: attn_out and mlp_out mean what is added.
        post = self._post_norms(block)
        parallel = bool(getattr(self.model.config, "use_parallel_residual", False))
        # What the stream meets in mid-block: the MLP's norm, or where there is none (OLMo 2) the MLP itself.
        mid = self._child(block, ("pre_feedforward_layernorm", "mlp") if post else ("post_attention_layernorm", "ln_2"))
        table: dict[str, tuple[str | None, str]] = {
            "resid_pre": (block, "input"),
            "attn_z": (self._child(attention, _W_O) if attention else None, "input"),
            "attn_out": (f"{block}.post_attention_layernorm" if post else attention, "output"),
            "resid_mid": (None if parallel else mid, "input"),  # attention and MLP in parallel: no middle
            "mlp_in": (self._child(block, ("mlp",)), "input"),
            "mlp_out": (self._child(block, ("post_feedforward_layernorm",) if post else ("mlp",)), "output"),
            "resid_post": (block, "output"),
        }
        path, end = table[kind]
        return (path, end) if path else None

    def _available_kinds(self) -> list[str]:
        points = {k: self._point(k, 0 if k in LAYER_KINDS else None) for k in KINDS}
        return [k for k, point in points.items() if point in self._events]

    def point(self, site: Site) -> Point:
        """Where a site lies. ValueError with what exists when this model has no such layer, kind, head or module."""
        if site.kind == "module":
            if (site.path, "output") not in self._events:
                near = [p for p, end in self._events if end == "output" and str(site.path).rsplit(".", 1)[-1] in p][:5]
                raise ValueError(
                    f"this model has no module {site.path!r} with a tensor output; "
                    f"{'similar: ' + ', '.join(near) if near else 'kinds: ' + ', '.join(self.kinds)}"
                )
            return str(site.path), "output", None
        if site.layer is not None and site.layer >= max(self.n_layers, 1):
            raise ValueError(f"{site} is out of range: this model has layers 0 to {self.n_layers - 1}")
        if site.kind not in self.kinds:
            have = ", ".join(self.kinds)
            raise ValueError(f"this model has no {site.kind!r} sites; it has {have}, or a module's path")
        path, end = self._point(site.kind, site.layer)  # type: ignore[misc]
        return path, end, self._columns(site, path)

    def _columns(self, site: Site, path: str) -> tuple[int, int] | None:
        if site.head is None:
            return None
        n_heads = self.model.config.get_text_config().num_attention_heads
        if site.head >= n_heads:
            raise ValueError(f"{site} is out of range: this model has heads 0 to {n_heads - 1}")
        d_head = self._events[path, "input"][1] // n_heads
        return site.head * d_head, (site.head + 1) * d_head

    def width(self, site: Site) -> int:
        path, end, columns = self.point(site)
        return self._events[path, end][1] if columns is None else columns[1] - columns[0]

    def when(self, site: Site) -> int:
        """Sites happen in the order of this number."""
        path, end, _ = self.point(site)
        return self._events[path, end][0]
