"""sl.plot(result): one picture for any result, drawn by matplotlib, in one style that reads without colour."""

from typing import TYPE_CHECKING, Any

from sae_lab.arguments import as_annotated

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@as_annotated
def plot(result: Any) -> "Figure":
    """Draw a result:

        sl.plot(run).savefig("run.svg")

    Kinds: ``Run`` (its curves), ``Sweep`` (its Pareto fronts), ``FeatureIndex`` (how often features fire),
    ``FeatureView`` (its activations), ``DoseResponse``, ``PatchGrid``, ``Attribution`` (estimates and true effects),
    ``FeatureCircuit`` (its graph), ``L0Choice``, ``ByPosition``, ``Hill``, ``Clusters``, ``Circular``, ``Patterns``;
    all other results of ``evals`` and ``explain``: each figure beside its control.

    An .svg keeps text as text and is the same file every time; a .png has 200 dots an inch. The figure is matplotlib's:
    change it as you like before. Raises ValueError for an object of another kind.
    """
    import matplotlib

    from sae_lab.plots import circuits, evals, geometry, index, training  # noqa: F401 (each registers what it draws)
    from sae_lab.plots.style import STYLE, draw

    with matplotlib.rc_context(STYLE):
        return draw(result)
