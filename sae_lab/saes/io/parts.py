"""A coder as the other libraries know coders: which of four activations, and which tensors."""

from typing import Any

from torch import Tensor

from sae_lab.saes.base import SparseCoder
from sae_lab.saes.families.batchtopk import BatchTopK
from sae_lab.saes.families.gated import Gated
from sae_lab.saes.families.jumprelu import JumpReLU
from sae_lab.saes.families.l1 import L1
from sae_lab.saes.families.ordered import Ordered
from sae_lab.saes.families.topk import TopK
from sae_lab.saes.io.places import lens_name

_ACTS = (
    (L1, "relu"), (JumpReLU, "jump"), (Gated, "gated"), (BatchTopK, "jump"), (Ordered, "jump"), (TopK, "topk"),
)  # fmt: skip
_STEPS = ("forward", "_codes", "_read", "_write", "_encode_at", "decode")


class Parts:
    """Attributes: kind ("relu", "jump", "gated", "topk"); tensors in our orientation, a threshold with one entry per
    feature; pre_bias, transcodes, input_norm; k, multi, prefixes, shared_threshold (of BatchTopK's kin) or None."""

    def __init__(self, coder: SparseCoder):
        self.family, self.meta = type(coder).__name__, coder.meta
        self.d_in, self.d_sae, self.d_out = coder.d_in, coder.d_sae, coder.d_out
        self.kind = self._kind(coder)
        self.pre_bias, self.transcodes, self.input_norm = coder.pre_bias, coder.transcodes, coder.input_norm
        self.sites = (coder.reads, coder.writes)
        self.site = coder.reads[0] if len(coder.reads) == 1 else None
        self.head = self.site.head if self.site else None
        self.lens_in = lens_name(self.site) if self.site else ""
        self.lens_out = lens_name(coder.writes[0]) if len(coder.writes) == 1 else ""
        self.model = None if (model := self.meta.get("model")) in (None, "unknown") else str(model)
        names = ("W_dec", "b_enc", "b_dec", "W_skip", "r_mag", "b_mag", "threshold")
        state = coder.state_dict()
        self.tensors: dict[str, Tensor] = {n: state[n].detach().cpu().float() for n in names if n in state}
        self.tensors["W_enc"] = coder.W_enc.detach().cpu().float()
        self.k, self.multi, self.prefixes, self.shared_threshold = None, 1, None, None
        if isinstance(coder, TopK):
            self.k, self.multi = coder.k, coder.multi
            self.prefixes = list(getattr(coder, "prefixes", ())) or None
        if isinstance(coder, BatchTopK):
            if bool(coder.threshold.isnan()):
                raise ValueError(f"this {self.family} has no inference threshold yet: call sae.calibrate([x]) first")
            self.shared_threshold = self.tensors["threshold"]
            self.tensors["threshold"] = self.shared_threshold.expand(self.d_sae)
        if isinstance(coder, L1) and self.kind == "relu" and bool(coder.floor > 0):
            self.kind, self.tensors["threshold"] = "jump", coder.floor.detach().cpu().float().expand(self.d_sae)

    def _kind(self, coder: SparseCoder) -> str:
        own = type(coder)
        ordinary = all(getattr(own, step) is getattr(SparseCoder, step) for step in _STEPS)
        kinds = [kind for f, kind in _ACTS if own.act is f.act and own.eval_act is f.eval_act]
        if not ordinary or not kinds or len(coder.in_shape) > 1:
            raise ValueError(
                f"only coders whose inference is ReLU, TopK, a threshold or a gate go into other libraries' formats, "
                f"not a {self.family}: save it in format 'sae_lab'"
            )
        return kinds[0]

    def want_pre_bias(self, wanted: bool) -> None:
        """The same coder with or without b_dec subtracted from x: encoder biases take the difference."""
        if wanted != self.pre_bias:
            t = self.tensors
            t |= shifted_biases(t, t["b_dec"] @ t["W_enc"] * (1 if wanted else -1))
        self.pre_bias = wanted

    def ours(self) -> dict[str, Any]:
        """What only this library knows, for the way back."""
        reads, writes = ([s.key for s in sites] for sites in self.sites)
        return {"family": self.family, "reads": reads, "writes": writes, "meta": self.meta}


def shifted_biases(t: dict[str, Tensor], by: Tensor) -> dict[str, Tensor]:
    """The encoder's biases that add ``by`` to every pre-activation."""
    gated = {"b_mag": t["b_mag"] + t["r_mag"].exp() * by} if "b_mag" in t else {}
    return {"b_enc": t["b_enc"] + by, **gated}
