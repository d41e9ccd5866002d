"""A prompt read once: the codes of several coders at every token, and the way from the stream to the logits."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.reading import Coded, coded, read_codes, require_fits
from sae_lab.arguments import as_annotated
from sae_lab.circuits.pairs import require_here
from sae_lab.lm import passes
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompts, Token, is_single
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch

AT_A_TIME = 128  # positions whose logits are made together
_KNOWN: WeakKeyDictionary[LM, float] = WeakKeyDictionary()  # the factor of the logits, for each checked model


@dataclass(frozen=True)
class WayOut:
    """How the residual stream of one prompt becomes logits:  logits = cap((M·x/s + shift)·W_U + bias).

    Attributes:
        stream: "pos d": the stream after the last block. normed: "pos d_model": the final norm's output.
        scale: " pos": s, that norm's divisor. shift: " d_model": its bias.
        W_U: "vocab d_model", mean: its mean row. bias: " vocab", or None. cap: of Gemma 2's softcapping, or None.
        maps: {site: (M "d_site d_model", s1 " pos")}: x written at a site reaches W_U as x·M/s1; s1 is s, times the
            divisor of a norm after W_O, if the model has one.
        acts: {site: "pos d_site"}: activations at the sites that coders read and write.
    """

    stream: Float[Tensor, "pos d"]
    normed: Float[Tensor, "pos d_model"]
    scale: Float[Tensor, " pos"]
    shift: Float[Tensor, " d_model"]
    W_U: Float[Tensor, "vocab d_model"]
    mean: Float[Tensor, " d_model"]
    bias: Tensor | None
    cap: float | None
    maps: dict[Site, tuple[Tensor, Tensor]]
    acts: dict[Site, Tensor]

    def logits(self, normed: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """The model's logits before a cap."""
        found = normed @ self.W_U.float().T
        return found if self.bias is None else found + self.bias


@as_annotated
class PromptReading:
    """Result of ``circuits.read_prompt``. Attributes: tokens (``lm.tokens``), batch, lm, coders."""

    def __init__(self, lm: LM, prompt: Prompts, coders: Sequence[SparseCoder]):
        if not is_single(prompt):
            raise ValueError("this reads one prompt, got several: call it for each")
        self.lm, self.coders, self.batch = lm, list(coders), lm.tokenize(prompt)
        self.tokens: list[Token] = lm.tokens(prompt)
        for coder in self.coders:
            check_coder(lm, coder)
        self._codes: dict[int, Coded] = {}
        self._acts: dict[Site, Tensor] = {}
        self._way: WayOut | None = None
        self._losses: Tensor | None = None
        self._coding, self._passing = threading.RLock(), threading.RLock()  # codes need not wait for a whole pass

    def __len__(self) -> int:
        return len(self.tokens)

    def position(self, position: Any) -> int:
        """The position, checked. ValueError for one that the prompt does not have."""
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < len(self):
            raise ValueError(f"position must be an int from 0 to {len(self) - 1} in this prompt, got {position!r}")
        return position

    def codes(self, coder: SparseCoder) -> Coded:
        """Codes of the tokens that the mask keeps, as from ``sl.features``. The first call runs the model up to the
        last of the coders' sites."""
        with self._coding:
            if id(coder) not in self._codes and self.lm.remote:
                self._codes[id(coder)] = read_codes(self.lm, coder, self.batch)
            elif id(coder) not in self._codes:
                if coder.site not in self._acts:
                    self._acts |= self.lm.run(self.batch, [c.site for c in self.coders], logits=False)[0]
                self._codes[id(coder)] = coded(self.lm, coder, self.batch, self._acts[coder.site])
            return self._codes[id(coder)]

    def active(self, coder: SparseCoder, position: int) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """``reading.active(sae, 3)``: (features, their activations) at a token, the strongest first; empty for a token
        that the coder's mask leaves out."""
        (codes, keep), position = self.codes(coder), self.position(position)
        if not bool(keep[0, position]):
            return torch.zeros(0, dtype=torch.long), torch.zeros(0)
        row = int(keep[0, :position].sum())
        part = slice(int(codes.offsets[row]), int(codes.offsets[row + 1]))
        values, order = codes.values[part].sort(descending=True, stable=True)
        return codes.features[part][order], values

    def along(self, coder: SparseCoder, what: str | int = "strongest") -> Float[Tensor, " pos"]:
        """``reading.along(sae, 812)``: one number per token: a feature's activation, the "strongest" activation, or the
        number of "active" features; NaN at tokens that the coder's mask leaves out."""
        codes, keep = self.codes(coder)
        if what == "active":
            found = codes.offsets.diff().float()
        elif what == "strongest":
            found = torch.zeros(len(codes.offsets) - 1).scatter_reduce(0, codes.rows, codes.values, "amax")
        else:
            here = codes.features == coder.feature(what)
            found = torch.zeros(len(codes.offsets) - 1).index_put((codes.rows[here],), codes.values[here])
        out = torch.full((len(self),), float("nan"))
        out[keep[0]] = found
        return out

    @property
    def is_through(self) -> bool:
        """Whether the whole model has run on the prompt."""
        return self._way is not None

    def way_out(self) -> WayOut:
        """The way from the stream to the logits, for direct effects and losses; the first call runs the model.

        Raises ValueError for a model on a server, and for one whose logits do not follow the formula of ``WayOut``.
        """
        require_here(self.lm, "a direct effect, which is made of the model's weights,")
        with self._passing:
            if self._way is None:
                self._way = _read_to_the_end(self.lm, self.batch, self.coders)
                for coder in self.coders:
                    self._acts.setdefault(coder.site, self._way.acts[coder.site].unsqueeze(0))
            return self._way

    @torch.no_grad()
    def losses(self) -> Float[Tensor, " pos"]:
        """Loss of each token given the ones before it, nats; NaN at position 0."""
        with self._passing:
            if self._losses is None:
                if self.lm.remote:
                    self._losses = self.lm.loss(self.batch, per_token=True)[0]
                else:
                    self._losses = _losses(self.way_out(), self.batch.ids[0])
            return self._losses


@as_annotated
def read_prompt(lm: LM, coders: Sequence[SparseCoder] | SparseCoder, prompt: Prompts) -> PromptReading:
    """Read one prompt (a text, token ids, or chat messages) once, for any number of questions about its tokens:

        reading = sl.circuits.read_prompt(lm, sae, "I went to the")
        reading.active(sae, 3)                                      # features and activations at a token
        sl.circuits.direct_effects(lm, sae, reading, 3)             # their effects on the next token
        reading.losses()

    Raises ValueError for several prompts, one that is too long, and a coder whose site has another width in this model.
    """
    return PromptReading(lm, prompt, [coders] if isinstance(coders, SparseCoder) else coders)


def check_coder(lm: LM, coder: SparseCoder) -> None:
    """ValueError for a coder that does not fit the model, or that reads or writes several sites."""
    if len(coder.in_shape) > 1 or len(coder.reads) > 1 or len(coder.writes) > 1:
        raise ValueError(f"this takes coders of one site, this one reads {coder.reads} and writes {coder.writes}")
    require_fits(coder, lm)


def written(coder: SparseCoder) -> Site:
    """The site that a coder writes."""
    return coder.writes[0] if coder.writes else coder.site


def reaches_the_stream(site: Site) -> bool:
    """Whether writes at a site are part of the residual stream, or reach it through W_O alone."""
    return site.kind not in ("mlp_in", "module")


@torch.no_grad()
def _read_to_the_end(lm: LM, batch: TokenBatch, coders: Sequence[SparseCoder]) -> WayOut:
    last = Site("resid_post", lm.n_layers - 1)
    writes = [s for s in dict.fromkeys(written(c) for c in coders) if reaches_the_stream(s)]
    for s in writes:
        _require_handed_on(lm, s)
    blocks = {s: lm._sites.layers[s.layer or 0] for s in writes if s.kind == "attn_z"}
    projected = {s: Site(str(block.w_o)) for s, block in blocks.items() if block.after_attention is not None}
    sites = dict.fromkeys([last, *(c.site for c in coders), *writes, *projected.values()])
    acts = {s: x[0] for s, x in lm.run(batch, list(sites), logits=False)[0].items()}
    with lm._lock:  # modules are called: a trace on another thread would record it
        _check_way_out(lm)
        normed, shift = _normed(lm, acts[last])
        maps = {s: lm._before_head(torch.eye(lm.width(s), device=lm.device), s) for s in dict.fromkeys([last, *writes])}
        scale = _divisor(acts[last] @ maps[last], normed - shift)
        norms = {s: lm._sites.modules[str(blocks[s].after_attention)] for s in projected}
        extra = {s: norm_divisor(norms[s], acts[p]) for s, p in projected.items()}
    W_U, bias = _unembedding(lm)
    return WayOut(
        acts[last], normed, scale, shift, W_U, W_U.float().mean(0), bias, _cap(lm),
        {s: (m, scale * extra.get(s, 1.0)) for s, m in maps.items()}, acts,
    )  # fmt: skip


def _unembedding(lm: LM) -> tuple[Tensor, Tensor | None]:
    """(W_U "vocab d", bias), multiplied by the factor of the model's logits."""
    head: Any = lm._module.get_output_embeddings()
    weight, factor = getattr(head, "weight", None), _KNOWN[lm]
    if not isinstance(weight, Tensor) or not weight.is_floating_point():  # 8-bit weights: ask the module
        width = lm._sites.width(Site("resid_post", lm.n_layers - 1))
        weight = passes.linear(head, torch.eye(width)).T.to(lm.device)
    bias = factor * passes.called(head, torch.zeros(1, weight.shape[1]))[0].to(weight.device)
    factor *= lm._sites.head_factor
    weight = weight.detach() if factor == 1.0 else factor * weight.detach().float()
    return weight, bias if bool(bias.any()) else None


def _normed(lm: LM, x: Float[Tensor, "pos d"]) -> tuple[Tensor, Tensor]:
    """(x after the final norm, the bias of that norm)."""
    out = torch.cat([x, torch.zeros_like(x[:1])])
    for path in lm._sites.way_out or ():
        out = passes.called(lm._sites.modules[path], out)
    out = out.to(x.device)
    return out[:-1], out[-1]


def _divisor(passed: Float[Tensor, "pos d"], out: Float[Tensor, "pos d"]) -> Float[Tensor, " pos"]:
    """The divisor s in out = passed/s."""
    return passed.square().sum(-1) / (passed * out).sum(-1)


def norm_divisor(norm: Any, x: Float[Tensor, "pos d"]) -> Float[Tensor, " pos"]:
    """The scale of a norm of any class: its divisor for these activations."""
    shift = passes.called(norm, torch.zeros_like(x[:1]))
    return _divisor(passes.past(norm, x), passes.called(norm, x) - shift).to(x.device)


def _require_handed_on(lm: LM, site: Site) -> None:
    """ValueError if a layer after the site scales or norms the stream instead of only adding to it."""
    first = 0 if site.layer is None else site.layer
    for number, block in enumerate(lm._sites.layers[first:], first):
        own = number == site.layer
        late = own and site.kind in ("resid_post", *(("resid_mid", "mlp_out") if "mlp_out" in block.places else ()))
        if not (block.hands_on and (block.adds or late)):
            raise ValueError(
                f"layer {number} of this model norms or scales the residual stream itself, so that the logits are not "
                f"linear in what is written at {site}: direct effects are not known before layer {number + 1}"
            )


def _cap(lm: LM) -> float | None:
    config = lm._module.config.get_text_config()
    names = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")  # Gemma 2, xLSTM, RecurrentGemma
    return next((cap for name in names if (cap := getattr(config, name, None))), None)


def _check_way_out(lm: LM) -> None:
    """ValueError unless logits are factor·head(norm(stream)), up to a cap; checked once for a model."""
    if lm in _KNOWN:
        return
    if not lm._has_a_way_out:
        raise ValueError(
            "this model has more than norms and linear maps between its last layer and the logits: direct effects in "
            "logits are not known for it"
        )
    last = Site("resid_post", lm.n_layers - 1)
    acts, logits = lm.run(lm.tokenize([[1, 2, 3, 0]]), [last])
    logits = logits[0].float().cpu()
    normed = lm._sites.head_factor * _normed(lm, acts[last][0])[0]
    found = passes.called(lm._module.get_output_embeddings(), normed)
    cap, factor = _cap(lm), lm._sites.logit_factor
    if factor is None and cap is not None:
        found, factor = cap * (found / cap).tanh(), 1.0
    if factor is None:
        raise ValueError(
            "this model changes its logits after the head (by a cap, say) in a way that its config does not name: "
            "direct effects in logits are not known for it"
        )
    off = float((factor * found - logits).abs().max() / logits.abs().max().clamp_min(1e-12))
    if off > 0.02:
        raise ValueError(
            f"this model makes its logits in another way than by its final norm and W_U (off by {off:.0%}): direct "
            "effects in logits are not known for it"
        )
    _KNOWN[lm] = factor


def _losses(way: WayOut, ids: Int[Tensor, " pos"]) -> Float[Tensor, " pos"]:
    losses = torch.full((len(ids),), float("nan"))
    targets = ids[1:].to(way.normed.device)
    for part in torch.arange(len(ids) - 1).split(AT_A_TIME):
        scores = way.logits(way.normed[part])
        scores = scores if way.cap is None else way.cap * (scores / way.cap).tanh()
        losses[part + 1] = (scores.logsumexp(-1) - scores.gather(-1, targets[part][:, None])[:, 0]).cpu()
    return losses
