"""One look for every figure, which reads without colour and in print; and the function that draws any result."""

import sys
from functools import singledispatch
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_lab import cache
from sae_lab.results import visible

# Okabe and Ito's colours, which people with any colour vision tell apart; the darkest first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*Xd"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
POSITIVE, NEGATIVE, GREY = COLOURS[0], COLOURS[1], "0.55"

STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "font.family": "sans-serif",
    "font.size": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text
    "text.usetex": False,
    "svg.hashsalt": "sae_lab",  # ids are the same every time
    "pdf.fonttype": 42,
}
_DATES = {"svg": "Date", "pdf": "CreationDate"}


class Picture(Figure):
    """A figure that also saves in the library's style; two files of one figure are equal."""

    def savefig(self, fname: Any, **settings: Any) -> None:
        kind = settings.get("format") or (Path(fname).suffix[1:] if isinstance(fname, str | Path) else "")
        if kind in _DATES:
            settings["metadata"] = {_DATES[kind]: None} | (settings.get("metadata") or {})
        with matplotlib.rc_context(STYLE):
            if not isinstance(fname, str | Path):
                super().savefig(fname, **settings)
                return
            file = Path(fname)
            if not kind:  # as matplotlib does it
                file = file.with_name(f"{file.name.rstrip('.')}.{matplotlib.rcParams['savefig.format']}")
            with cache.atomic(file) as temporary:
                super().savefig(temporary, **settings)


@singledispatch
def draw(result: Any) -> Figure:
    """The picture of a result. ``@draw.register`` adds a function for the kind that its argument's annotation names."""
    names = ", ".join(kind.__name__ for kind in draw.registry if kind is not object)
    raise ValueError(f"sl.plot draws results of these kinds: {names}; got {type(result).__name__}")


def plain(text: str) -> str:
    """A text as matplotlib draws it: $ begins no formula, and a legend does not leave it out for its first "_"."""
    shown = visible(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def look(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of the line with this number."""
    looks = {"color": COLOURS, "marker": MARKERS, "linestyle": DASHES}
    return {name: cycle[number % len(cycle)] for name, cycle in looks.items()}


def subplots(columns: int, height: float, width: float = 3.6, rows: int = 1) -> tuple[Picture, list[Axes]]:
    """A figure with axes, ``width`` by ``height`` inches each. It is not pyplot's, so a notebook shows it once."""
    if "ipykernel" in sys.modules:  # a cell shows a figure only once pyplot has loaded the notebook's backend
        import matplotlib.pyplot

        matplotlib.pyplot.draw_if_interactive()
    figure = Picture(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def legend_beside(axis: Axes) -> None:
    """A legend to the right of the last axes."""
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=2.8)
