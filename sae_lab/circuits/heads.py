"""Which heads, and which earlier words, make a feature of an attention SAE fire."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.circuits.pairs import kept, require_here, require_linear, require_sae, require_together
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompts
from sae_lab.results import Result, by_column, result
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, check_feature

CAPTURE = "sae_lab_capture"  # transformers' name for the attention that keeps its pattern


class Attention(NamedTuple):
    """Result of ``circuits.attention``: z of head h at dest is Σ_src pattern[h, dest, src]·v[h, src].

    pattern: "batch head dest src", rows sum to 1. v: "batch head src d_head", one for each head, also where heads
    share keys and values. z: "batch pos head d_head", as the model computed it.
    """

    pattern: Float[Tensor, "batch head dest src"]
    v: Float[Tensor, "batch head src d_head"]
    z: Float[Tensor, "batch pos head d_head"]


@result
class HeadAttribution(Result):
    """Result of ``circuits.head_attribution`` at one token: what each head's output, and through it each earlier
    token, adds to a feature's pre-activation. Its table has one row per head and source.

    Attributes:
        parts: "head src": their sum is pre - bias, with bias = b_enc_i - b_dec·W_enc_i, which belongs to no head.
        heads: " head": Σ_src parts. shares: " head": heads / Σ heads, which sum to 1.
        written: " head": share of ‖W_dec_i‖² in each head's columns, from the weights alone; they sum to 1.
        pre, bias, activation: of the feature at the token. position: of the token. tokens: of the prompt.
    """

    parts: Float[Tensor, "head src"]
    written: Float[Tensor, " head"]
    pre: float
    bias: float
    activation: float
    feature: int
    position: int
    tokens: list[str]

    _records, _sorted, _shown = "_parts", "part", 8

    @property
    def heads(self) -> Float[Tensor, " head"]:
        return self.parts.sum(1)

    @property
    def shares(self) -> Float[Tensor, " head"]:
        return self.heads / self.heads.sum()

    def _header(self) -> str:
        shares = ", ".join(f"{h}: {share:.2f}" for h, share in enumerate(self.shares.tolist()))
        return (
            f"feature {self.feature} at {self.tokens[self.position]!r} (position {self.position}): activation "
            f"{self.activation:.3f}, pre {self.pre:.3f} of which bias {self.bias:.3f}\nshares of heads: {shares}"
        )

    @property
    def _parts(self) -> dict[str, list[Any]]:
        sources = range(self.position + 1)
        rows = [(h, s, self.tokens[s], float(row[s])) for h, row in enumerate(self.parts) for s in sources]
        return by_column("head source token part", rows)


@as_annotated
def head_attribution(
    lm: LM, coder: SparseCoder, feature: int, prompt: str | Sequence[Any], position: int | None = None
) -> HeadAttribution:
    """``head_attribution(lm, sae, 259, prompt)``: direct feature attribution through one layer's heads (Kissane et al.
    2024, arXiv:2406.17759):

        pre_i = Σ_h z_h·W_enc[h, i] + bias = Σ_h Σ_src pattern[h, dest, src] · (v[h, src]·W_enc[h, i]) + bias

    W_enc[h] are the rows of W_enc that read head h. The sum is exact for a given pattern; queries and keys, which make
    the pattern, get no attribution.

    Args:
        coder: an SAE at ``attn_z``, all heads. prompt: one, a text or token ids. position: the token; None: where the
            feature's pre-activation is highest, position 0 left out.

    Raises ValueError for a coder at another site or one that normalises its input, a feature or a position that does
    not exist, several prompts, and a model whose heads' outputs are no weighted sums of values (as ``attention``).
    """
    _check_coder(coder)
    feature, batch = check_feature(feature, coder.d_sae), lm.tokenize(prompt)  # type: ignore[arg-type]
    if len(batch.ids) != 1:
        raise ValueError(f"head_attribution takes one prompt, got {len(batch.ids)}: call it for each")
    length = batch.ids.shape[1]
    if length < 2 or (position is not None and not 0 <= position < length):
        raise ValueError(f"position must be from 0 to {length - 1} in a prompt of at least two tokens, got {position}")
    require_together(lm, [coder])
    seen = attention(lm, batch, coder.site.layer or 0)
    with torch.no_grad():
        pre = coder(seen.z.flatten(2)[0]).pre[:, feature]
        f = coder.encode(seen.z.flatten(2)[0])[:, feature]
        position = int(pre[1:].argmax()) + 1 if position is None else position
        reads = coder.W_enc[:, feature].view(seen.z.shape[2:])
        parts = seen.pattern[0, :, position] * (seen.v[0] * reads[:, None]).sum(-1)
        bias = coder.b_enc[feature] - (coder.b_dec @ coder.W_enc[:, feature] if coder.pre_bias else 0.0)
        written = coder.W_dec[feature].view(seen.z.shape[2:]).square().sum(-1)
    tokens = [t.label for t in lm.token_strings(batch.ids[0].tolist(), prefixed=int(batch.ids[0, 0]) == lm.prefix_id)]
    return HeadAttribution(
        parts.cpu(), (written / written.sum()).cpu(), float(pre[position]), float(bias), float(f[position]), feature,
        position, tokens,
    )  # fmt: skip


def _check_coder(coder: SparseCoder) -> None:
    if coder.site.kind != "attn_z" or coder.site.head is not None:
        raise ValueError(f"head_attribution takes a coder at attn_z of all heads, this one is at {coder.site}")
    require_sae(coder, "head_attribution")
    require_linear(coder, "head_attribution")


@as_annotated
@torch.no_grad()
def attention(lm: LM, batch: Prompts, layer: int) -> Attention:
    """``attention(lm, prompt, layer=8)``: the attention pattern of one layer's heads and the values they read.

    z comes from an unchanged pass. For another pass the model's attention is replaced by a plain one that keeps its
    pattern, and then restored, also after an error.

    Raises ValueError for a layer that does not exist, a model whose attention transformers cannot replace, and one
    whose z is not the patterns' weighted sum of values.
    """
    require_here(lm, "the pattern of attention")
    batch = batch if isinstance(batch, TokenBatch) else lm.tokenize(batch)
    site, kept = Site("attn_z", layer), {}
    lm.width(site)
    with lm._lock:
        z = lm.run(batch, [site], logits=False)[0][site]  # by the model's own attention
        with _keeping(lm._module, layer, kept):
            lm.run(batch, [site], logits=False)
    if not kept:
        raise ValueError(f"this model's attention cannot be replaced, so layer {layer}'s pattern cannot be read")
    pattern, v = kept["pattern"].float(), kept["v"].float()
    z = z.view(*z.shape[:2], pattern.shape[1], -1)
    wrong = float(((pattern @ v).transpose(1, 2) - z).abs().max() / z.abs().max().clamp_min(1e-12))
    if wrong > 1e-2:
        raise ValueError(f"z of layer {layer} is not Σ pattern·v (off by {wrong:.0%}): its heads do more than attend")
    return Attention(pattern, v, z)


@contextmanager
def _keeping(model: Any, layer: int, kept: dict[str, Tensor]) -> Iterator[None]:
    """While open, attention is computed step by step, and one layer's pattern and values go into ``kept``."""
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any):
        scaling, softcap = rest.get("scaling"), rest.get("softcap")
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        scores = scores if attention_mask is None else scores + attention_mask
        pattern = scores.float().softmax(-1).to(query.dtype)
        if module.layer_idx == layer:
            kept.update(pattern=pattern, v=value)
        return (pattern @ value).transpose(1, 2).contiguous(), pattern

    config = model.config.get_text_config()
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[CAPTURE] = attend
    AttentionMaskInterface.register(CAPTURE, eager_mask)  # this table of transformers has no way to remove a name
    config._attn_implementation = CAPTURE
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[CAPTURE]


@as_annotated
@torch.no_grad()
def head_shares(
    lm: LM, coder: SparseCoder, prompts: str | Sequence[str] | Sequence[Sequence[int]]
) -> Float[Tensor, "d_sae head"]:
    """``head_shares(lm, sae, prompts)``: the share of each head in each feature's pre-activation on these prompts
    (Kissane et al. 2024, arXiv:2406.17759): Σ z_h·W_enc[h, i] over the tokens where it fires, divided by the sum over
    heads, so that a row sums to 1; NaN for a feature that never fires. Position 0 and the tokens that the coder's mask
    leaves out do not count.

    Raises ValueError as ``head_attribution`` for the coder.
    """
    _check_coder(coder)
    batch, site = lm.tokenize(prompts), coder.site  # type: ignore[arg-type]
    x = lm.run(batch, [site], logits=False)[0][site]
    keep = kept(lm, [coder], (batch, {site: x}))
    keep[:, 0] = False
    rows = x[keep.to(x.device)]
    fires = (coder.encode(rows) > 0).float()
    heads = lm._module.config.get_text_config().num_attention_heads
    took = (fires.T @ rows).view(coder.d_sae, heads, -1)  # each feature's sum of z where it fires
    parts = (took * coder.W_enc.T.reshape(took.shape)).sum(-1)
    return (parts / parts.sum(-1, keepdim=True)).masked_fill(fires.sum(0)[:, None] == 0, float("nan")).cpu()
