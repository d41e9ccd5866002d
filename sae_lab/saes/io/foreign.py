"""What a reader found in another library's files, and the coder made of it, every tensor checked."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.saes.base import SparseCoder
from sae_lab.saes.families import FAMILIES
from sae_lab.saes.io.layouts import refuse_layered
from sae_lab.saes.io.ours import assign, check, check_meta
from sae_lab.saes.io.parts import shifted_biases
from sae_lab.saes.io.places import Place, hub_id, place, told
from sae_lab.types import Site

log = logging.getLogger(__name__)

SAID = {"model", "reads", "writes", "centred", "scale", "k"}  # what ``sl.load`` can be told


@dataclass
class Checkpoint:
    """One coder in our names and orientation: ``W_enc`` "d_in d_sae", ``W_dec`` "d_sae d_out", ``W_skip`` "d_in d_out".

    format, where: for messages. family, config: the class it becomes, and its keyword arguments beside the widths.
    reads, writes: places; writes None: an autoencoder. expected: figures the checkpoint states ("l0", "fvu").
    ours: what ``sae.save(format=...)`` noted beside, for the way back. used: what of the caller's facts it needed.
    """

    format: str
    where: str
    family: str
    tensors: dict[str, Tensor]
    pre_bias: bool
    config: dict[str, Any] = field(default_factory=dict)
    transcodes: bool = False
    input_norm: str = "none"
    reads: Place | None = None
    writes: Place | None = None
    model: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    ours: dict[str, Any] | None = None
    used: set[str] = field(default_factory=set)

    def say(self, facts: dict[str, Any]) -> None:
        """What the caller knows goes before what the files say: ``model``, ``reads``, ``writes``, ``centred``."""
        if self.ours is not None and (wrong := sorted(SAID & {n for n, v in facts.items() if v is not None})):
            raise ValueError(f"{self.where} was written by sae_lab, which records these: leave out {', '.join(wrong)}")
        if surplus := sorted({"scale", "k"} & set(facts.get("said", ())) - self.used):
            raise ValueError(f"{self.where}: its files say what {', '.join(surplus)} would: leave that out")
        self.model = facts.get("model") or self.model
        centred = facts.get("centred")
        if facts.get("reads") is not None:
            self.reads = told(facts["reads"], self.model, bool(centred))
        elif centred is not None and self.reads is not None:
            self.reads = told(self.reads, self.model, centred)
        if facts.get("writes") is not None:
            self.writes = told(facts["writes"], self.model, bool(centred))
            self.transcodes = self.reads is None or self.writes.site != self.reads.site
        elif centred is not None and self.writes is not None:
            self.writes = told(self.writes, self.model, centred)

    def between(self, into: str | None, out: str | None, model: str | None) -> None:
        """It reads one place of a model and writes another, or the same (None too): names of the other library."""
        self.model, self.reads = model, place(into, model)
        self.transcodes = out is not None and out != into
        self.writes = place(out, model) if self.transcodes else None

    def must_be(self, d_in: Any, d_sae: Any) -> None:
        """ValueError where the encoder has other widths than its config says."""
        if (shape := tuple(self.tensors["W_enc"].shape)) != (d_in, d_sae):
            raise ValueError(f"{self.where}: W_enc has shape {shape}, its config says {(d_in, d_sae)}")

    def unknown_scale(self) -> ValueError:
        """The error where nothing says what activations were multiplied by."""
        return ValueError(
            f"{self.where}: its activations were scaled to norm √d_in by a factor that its files do not say: pass "
            "scale=, √d_in / the mean norm of the training activations (1 where it was folded into the weights)"
        )

    def scale(self, into: float, out: float) -> None:
        """Make weights trained on ``into``·x (and ``out``·target) serve x itself. Codes stay as they were."""
        t = self.tensors
        t["W_enc"] = t["W_enc"] * into
        t["W_dec"], t["b_dec"] = t["W_dec"] / out, t["b_dec"] / out
        if "W_skip" in t:
            t["W_skip"] = t["W_skip"] * (into / out)

    def scale_codes(self, by: Tensor) -> None:
        """Codes ``by`` times as large, the same x_hat: encoder and threshold up, decoder down. Exact for any family
        whose activation compares pre-activations with what is scaled along."""
        t = self.tensors
        t["W_enc"], t["W_dec"] = t["W_enc"] * by, t["W_dec"] / by[:, None]
        for name in ("b_enc", "b_mag"):
            if name in t:
                t[name] = t[name] * by

    def checked_k(self, k: Any) -> int:
        """k as an integer. ValueError where it cannot be one."""
        d_sae = self.tensors["W_enc"].shape[1]
        if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= d_sae:
            raise ValueError(f"{self.where}: k must be from 1 to d_sae={d_sae}, got {k!r}")
        return max(1, round(k))

    def build(self) -> SparseCoder:
        """The coder, in eval mode. ValueError for what is missing, of the wrong shape, or not finite."""
        t = self.tensors
        refuse_layered(Path(self.where), t)
        if t["W_enc"].dim() != 2 or t["W_dec"].dim() != 2:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in t.items())
            raise ValueError(f"{self.where}: encoder and decoder must be matrices, got {shapes}")
        d_in, d_sae = t["W_enc"].shape
        wiring = {"d_out": t["W_dec"].shape[1], "skip": "W_skip" in t} if self.transcodes else {}
        with torch.device("meta"):  # its shapes: the memory is that of the file's tensors
            coder = FAMILIES[self.family](d_in, d_sae, **self.config, **wiring)
        for name, buffer in coder.named_buffers():
            if name != "threshold":  # which the files hold
                t.setdefault(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
        check(coder, t, self.where)
        if self.reads is not None and self.reads.norm:
            self._normalise(d_in)
        if self.reads is not None and self.reads.centred:
            self._centre()
        coder.pre_bias, coder.input_norm = self.pre_bias, self.input_norm  # type: ignore[assignment]
        assign(coder, t)
        self._tell(coder)
        check_meta(coder.meta)
        return coder.eval()

    def _normalise(self, d_in: int) -> None:
        """x is the residual stream after a norm's division: read the stream, and divide here."""
        assert self.reads is not None
        if not self.transcodes or self.input_norm != "none":
            # x_hat would have to go back before the division, where other parts of the model read it too.
            assert self.reads.site is not None
            self.reads = self.reads._replace(site=Site("mlp_in", self.reads.site.layer), norm=None, no_gain=True)
            return
        self.input_norm = "length" if self.reads.norm == "rms" else "layer"
        if self.input_norm == "layer":  # LayerNorm divides by the deviation over d, a coder by that over d - 1
            for name in self.tensors.keys() & {"W_enc", "W_skip"}:
                self.tensors[name] = self.tensors[name] * (d_in / (d_in - 1)) ** 0.5

    def _centre(self) -> None:
        """x had mean 0 over d_in. Take the mean of every encoder column off: then x's own mean no longer matters."""
        if self.input_norm == "length":
            raise ValueError(
                f"{self.where}: normalisation by length after centring is not supported; center the activations "
                "yourself and load with model_from_pretrained_kwargs {} in its cfg.json"
            )
        if self.input_norm == "layer":
            return  # centres by itself
        t = self.tensors
        mean = t["W_enc"].mean(0)
        t["W_enc"] = t["W_enc"] - mean
        if self.pre_bias:  # b_dec need not have mean 0: what its mean contributed stays
            t |= shifted_biases(t, -t["b_dec"].sum() * mean)
        if "W_skip" in t:
            t["W_skip"] = t["W_skip"] - t["W_skip"].mean(0)

    def _tell(self, coder: SparseCoder) -> None:
        if self.ours is not None:
            coder.reads, coder.writes = (tuple(Site.of(s) for s in self.ours.get(k, ())) for k in ("reads", "writes"))
            coder.meta = {**self.ours.get("meta", {}), "f_scale": "unknown", "expected": self.expected}
            return
        writes = self.writes or self.reads
        coder.reads = (self.reads.site,) if self.reads and self.reads.site else ()
        coder.writes = (writes.site,) if coder.reads and writes and writes.site else coder.reads
        coder.meta = {"model": hub_id(self.model) or "unknown", "mask": None, "f_scale": "unknown", **self.meta}
        coder.meta["source"] = {"format": self.format, "path": self.where}
        if self.expected:
            coder.meta["expected"] = self.expected
        if self.reads is None:
            return
        coder.meta["source"]["reads"] = self.reads.name
        if writes and writes.centred:
            coder.meta["centred"] = True
        if not coder.reads:
            log.warning("%s reads %s, which is no site here: set sae.reads and sae.writes", self.where, self.reads.name)
        if self.reads.no_gain:
            coder.meta["needs_gain"] = True
            log.warning(
                "%s was trained on %s, which lacks the gain and bias of the norm before %r: call "
                "sae_lab.saes.io.peers.fold_gain(sae, gain, bias) with that norm's (Gemma's gain is 1 + weight)",
                self.where, self.reads.name, self.reads.site,
            )  # fmt: skip


@torch.no_grad()
def fold_gain(
    coder: SparseCoder, gain: Float[Tensor, " d_in"], bias: Float[Tensor, " d_in"] | None = None
) -> SparseCoder:
    """Make a coder of z serve x = gain·z + bias, the output of a norm of which z is the part before gain and bias.

        W_enc' = W_enc / gain, b_enc' = b_enc − (bias/gain)·W_enc; an autoencoder's output is mapped back to x.

    Raises ValueError for other widths or a gain with zeros. Changes and returns the coder.
    """
    for name, value in (("gain", gain), ("bias", bias)):
        if value is not None and tuple(value.shape) != (coder.d_in,):
            raise ValueError(f"{name} must have shape ({coder.d_in},), got {tuple(value.shape)}")
    if bool((gain == 0).any()):
        raise ValueError("gain must have no zeros: what it multiplies by 0 cannot be read back")
    gain, bias = gain.float(), torch.zeros(coder.d_in) if bias is None else bias.float()
    coder.W_enc.div_(gain[:, None])
    if not coder.pre_bias:
        for name, value in shifted_biases(coder.state_dict(), -(bias @ coder.W_enc)).items():
            coder.get_parameter_or_buffer(name).copy_(value)
    if coder.W_skip is not None:
        coder.W_skip.div_(gain[:, None])
        coder.b_dec.sub_(bias @ coder.W_skip)
    if not coder.transcodes:
        coder.W_dec.mul_(gain)
        coder.b_dec.mul_(gain).add_(bias)
    coder.meta.pop("needs_gain", None)
    return coder
