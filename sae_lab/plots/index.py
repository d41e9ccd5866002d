"""Pictures of features: how often they fire, how strongly one does, what steering with it buys."""

import numpy as np
from matplotlib.figure import Figure

from sae_lab.feature_index import FeatureIndex, FeatureView
from sae_lab.feature_index.dosing import PROMPT, DoseResponse
from sae_lab.plots.style import COLOURS, GREY, draw, legend_beside, look, plain, subplots
from sae_lab.results import counted

BINS = 48


@draw.register
def density(index: FeatureIndex) -> Figure:
    """How often features fire: log10 of the share of tokens, over those that fire at all; dead ones are counted in the
    title. Dashed: their median."""
    live = index.density[index.counts > 0]
    dead = index.d_sae - len(live)
    figure, (axis,) = subplots(1, height=2.7, width=4.6)
    floor = np.log10(1 / index.tokens_seen)  # a feature that fires once
    edges = np.linspace(floor, max(0.0, floor + 1e-6), BINS + 1)
    axis.hist(np.log10(live), bins=edges, color=COLOURS[0], edgecolor="white", linewidth=0.4)  # type: ignore[arg-type]
    axis.set_ylim(0, 1.15 * axis.get_ylim()[1])  # room for the median's name
    if len(live):
        middle = float(np.median(live))
        axis.axvline(np.log10(middle), color="black", linewidth=1, linestyle="--")
        axis.annotate(
            f"median {middle:.2g}", (np.log10(middle), 1), xycoords=("data", "axes fraction"), xytext=(4, -4),
            textcoords="offset points", fontsize=8, va="top",
        )  # fmt: skip
    powers = range(int(np.ceil(floor)), 1)
    axis.set_xticks(list(powers), [f"$10^{{{p}}}$" if p else "1" for p in powers])
    title = f"{plain(index.site.key)}: {dead:,} of {counted(index.d_sae, 'feature')} dead ({dead / index.d_sae:.1%})"
    axis.set(xlabel=f"density (share of {counted(index.tokens_seen, 'token')})", ylabel="features", title=title)
    return figure


@draw.register
def feature(view: FeatureView) -> Figure:
    """A feature's activations, where it fires."""
    figure, (axis,) = subplots(1, height=2.4)
    edges, counts = view.histogram["edges"], view.histogram["counts"]
    axis.bar(edges[:-1], counts, width=edges[1] - edges[0], align="edge", color=COLOURS[0])
    title = f"feature {view.feature}: {view.density:.3%} of tokens"
    axis.set(yscale="log", xlabel="activation", ylabel="tokens", title=title)
    return figure


@draw.register
def doses(result: DoseResponse) -> Figure:
    """Log-odds against strength, and against what it costs: at equal cost, higher is better."""
    table = result.to_pandas()
    figure, axes = subplots(2, height=3.0)
    for number, (method, part) in enumerate(table.groupby("method", sort=False)):
        looks = look(number)
        for axis, x in zip(axes, ("strength", "cost"), strict=True):
            if method == PROMPT and x == "strength":
                axis.axhline(float(part["log_odds"].iloc[0]), color=looks["color"], linewidth=1, linestyle=":")
                continue
            marker = "*" if method == PROMPT else looks["marker"]
            axis.errorbar(part[x], part["log_odds"], part["se"].fillna(0), label=method, **{**looks, "marker": marker})
    axes[0].axhline(0, color=GREY, linewidth=0.6, zorder=0)
    axes[0].set(xlabel="strength (f_scale)", title="log-odds of the target (nats)")
    axes[1].set(xlabel="rise of loss on other text (nats)", title="log-odds at a cost")
    legend_beside(axes[1])
    return figure
