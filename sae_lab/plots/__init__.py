"""sl.plot(result): one picture for any result, drawn by matplotlib, in one style that reads without colour."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sae_lab.arguments import as_annotated
from sae_lab.circuits import Attribution, FeatureCircuit, PatchGrid
from sae_lab.evals.choosing import L0Choice
from sae_lab.evals.positions import ByPosition, Hill
from sae_lab.feature_index import FeatureIndex, FeatureView
from sae_lab.feature_index.dosing import DoseResponse
from sae_lab.geometry import Circular, Clusters, Patterns
from sae_lab.results import Result as Measured
from sae_lab.training.loop import Run
from sae_lab.training.sweeping import Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Result = (
    Run | FeatureIndex | FeatureView | Sweep | L0Choice | DoseResponse | PatchGrid | Attribution | FeatureCircuit
    | Clusters | Circular | Patterns | Measured
)  # fmt: skip


@as_annotated
def plot(result: Result) -> "Figure":
    """Draw a result: a ``Run`` (its training curves), a ``FeatureIndex`` (how often features fire), a ``FeatureView``
    (its activations), a ``Sweep`` (its Pareto fronts), a ``DoseResponse`` (what steering buys and costs), a
    ``PatchGrid``, an ``Attribution`` (estimates against true effects), a ``FeatureCircuit`` (its graph), what
    ``evals.choose_l0`` gave, ``geometry``'s ``Clusters``, ``Circular`` and ``Patterns``; ``ByPosition`` and ``Hill`` as
    curves; any other result of ``evals`` or ``explain``: each figure beside its control.

    ``sl.plot(result).savefig("figure.svg")`` keeps text as text and is the same file every time; ``.png`` has 200 dots
    an inch. The figure is matplotlib's: change it as you like before.

    Raises ValueError for a result of another kind.
    """
    import matplotlib

    from sae_lab.plots import circuits, evals, geometry, index, training
    from sae_lab.plots.style import STYLE

    drawers: dict[type, Callable[[Any], Figure]] = {
        Run: training.run, FeatureIndex: index.density, FeatureView: index.feature, Sweep: training.sweep,
        L0Choice: training.l0_choice, DoseResponse: index.doses, PatchGrid: circuits.patches,
        Attribution: circuits.attribution, FeatureCircuit: circuits.graph, Clusters: geometry.clusters,
        Circular: geometry.circular, Patterns: geometry.patterns, ByPosition: evals.by_position, Hill: evals.hill,
        Measured: evals.measures,
    }  # fmt: skip
    for kind, draw in drawers.items():
        if isinstance(result, kind):
            with matplotlib.rc_context(STYLE):
                return draw(result)
    names = ", ".join(kind.__name__ for kind in drawers)
    raise ValueError(f"sl.plot draws results of these kinds: {names}; got {type(result).__name__}")
