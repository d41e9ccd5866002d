"""Attention patterns drawn by CircuitsVis from the bundle in its package, without the network."""

from typing import Any

from sae_lab import circuits
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompt
from sae_lab.results import Html, counted, in_script, tag, visible

DIGITS = 4  # of a pattern's numbers


def attention_heads(lm: LM, prompt: Prompt, layer: int) -> Any:
    """What each token of a prompt attends to, in all heads of a layer (CircuitsVis' ``attention_heads``).

    CircuitsVis itself asks the internet and loads from a CDN; this does not. ValueError as for ``circuits.attention``,
    also for a model whose attention keeps no pattern.
    """
    from circuitsvis.utils.render import RenderedHTML, render_local

    class Local(RenderedHTML):
        def _repr_html_(self) -> Html:
            # It draws dark lines without a background: on white they can be read in a dark theme too.
            style = "background:#fff;color:#111;color-scheme:light;padding:8px"
            return tag("div", Html(self.local_src), style=style)

        def __repr__(self) -> str:
            return f"attention of layer {layer}, {counted(len(names), 'head')}, {counted(len(labels), 'token')}"

    pattern = circuits.attention(lm, prompt, layer).pattern[0]
    labels = [visible(token.label) for token in lm.tokens(prompt)]
    names = [f"L{layer}H{head}" for head in range(len(pattern))]
    rounded = [[[round(x, DIGITS) for x in row] for row in head] for head in pattern.cpu().tolist()]
    before, _, after = render_local("AttentionHeads").rpartition("{}")  # where its arguments stand
    local = before + in_script({"attention": rounded, "tokens": labels, "attentionHeadNames": names}) + after
    return Local(local, local)
