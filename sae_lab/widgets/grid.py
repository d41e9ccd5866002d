"""PatchingGrid: where in a model one prompt's answer comes from, estimated at once and patched on a click."""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import traitlets

from sae_lab.circuits.pairs import require_sae
from sae_lab.circuits.patching_effects import KINDS, Cell
from sae_lab.feature_index import FeatureIndex
from sae_lab.lm.model import LM
from sae_lab.noting import names_of
from sae_lab.results import Html, number, tag, visible
from sae_lab.saes.base import SparseCoder
from sae_lab.training.checkpoint import whole_step
from sae_lab.types import Site
from sae_lab.widgets.attention_view import attention_heads
from sae_lab.widgets.measures import Measure
from sae_lab.widgets.panel import STATIC, Job, beside, checked, quick
from sae_lab.widgets.patching_run import PatchRun
from sae_lab.widgets.session import Linked, Session
from sae_lab.widgets.static_html import block, dotted, table

TOP_FEATURES = 12


class PatchingGrid(Linked):
    """Layers by positions: what a patch from the source's run does to the metric of the prompt's.

        grid = sl.PatchingGrid(lm, prompt, source, answers=(" Paris", " Rome"))   # estimates at once
        grid.patch(layers=[8], positions=[3, 4])                                  # true values, as a click gets them

    Estimates come from one backward pass (``circuits.patching_estimate``), true values from one forward pass for every
    few cells (``circuits.patched_cells``). Both are shares of the metric's change: 0 nothing, 1 all of it.

    Args:
        lm: the model. prompt, source: texts with the same number of tokens: the run that is patched, and the one that
            patches come from.
        metric: None: the logit difference of ``answers`` (nats), or without them "KL from the source" (nats); a name:
            "logit difference", "log-probability" (nats), "KL from the source"; or a differentiable function
            (logits, tokens) -> a number for each row.
        answers: (right, wrong), each one token.
        coder: an SAE, or several: at a cell of its site, the features that carry the effect are listed.
        kinds: the kinds of site that are patched.
        session: what it shares with other widgets (``sl.Session``); None: a new one.
        index: a coder's feature index, or several: their top tokens name features without a label; None: those open.

    Traits that can be read, set and observed: ``kind``; ``cell``, the open one, [layer, position] or []; ``feature``,
    the chosen one of the open cell, an int or None. Read only: ``view``, prompts, tokens, axes and estimates;
    ``truth``, [kind, layer, position, value] of each true patch; ``features``, those of the cells that were opened;
    ``progress``, [done, all] while patches run, else []; ``error``, why the last action failed.

    Raises ValueError for texts that are empty or of unequal length, an answer that is not one token, and a coder that
    is no SAE at a site of the grid.
    """

    _esm = STATIC / "patching.js"
    _css = STATIC / "patching.css"
    _chooses = ("kind", "cell", "feature")

    view = traitlets.Dict().tag(sync=True)
    truth = traitlets.List().tag(sync=True)
    kind = traitlets.Unicode().tag(sync=True)
    cell = traitlets.List(traitlets.Int()).tag(sync=True)
    feature = traitlets.Int(None, allow_none=True, min=0).tag(sync=True)
    features = traitlets.Dict().tag(sync=True)
    progress = traitlets.List(traitlets.Int()).tag(sync=True)

    def __init__(
        self,
        lm: LM,
        prompt: str,
        source: str,
        metric: Any = None,
        *,
        answers: Sequence[str] | None = None,
        coder: SparseCoder | Sequence[SparseCoder] | None = None,
        kinds: Sequence[str] = KINDS,
        session: Session | None = None,
        index: FeatureIndex | Sequence[FeatureIndex] | None = None,
    ) -> None:
        self.lm = lm
        self._kinds = tuple(kinds)
        self._coders = _by_site(coder, self._kinds, lm)
        self._names = names_of(self._coders, index)
        self._waiting: dict[int, list[int]] = {}
        self._on = PatchRun.of(lm, prompt, source, Measure.of(metric, answers), self._kinds)
        super().__init__(session or Session(), view=self._on.view(self._coders), kind=self._kinds[0])
        self.observe(self._choose_feature, ["kind", "cell"])
        self.observe(self._rename, "features")
        self._link()

    def _called(self) -> dict[str, str]:
        """By "site number": each site has a coder of its own."""
        listed = {site: {f for key, cell in self.features.items() if key.rpartition(":")[0] == site
                         for f, _ in cell["features"]} for site in self._coders}  # fmt: skip
        return {f"{s} {f}": name for s, features in listed.items() for f, name in self._names[s].of(features).items()}

    def run(
        self, prompt: str | None = None, source: str | None = None, metric: Any = None,
        answers: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Take other prompts or another metric; what is None stays as it is."""
        on = self._on
        measure = on.measure.changed(metric, answers)
        self._begin(on.prompt if prompt is None else prompt, on.source if source is None else source, measure)

    def patch(
        self, kind: str | None = None, layers: Sequence[int] | None = None, positions: Sequence[int] | None = None
    ) -> None:
        """Patch a block of cells that were not patched yet. None: the kind that is shown, all layers, all positions."""
        kind = self.kind if kind is None else kind
        layers = self._on.estimate.layers if layers is None else layers
        positions = self._on.estimate.positions if positions is None else positions
        self._patch(self._on, [(kind, layer, p) for layer in layers for p in positions])

    def attention(self, layer: int, source: bool = False) -> Any:
        """A layer's attention patterns on the prompt, or on the source, drawn by CircuitsVis without a network."""
        return attention_heads(self.lm, self._on.source if source else self._on.prompt, layer)

    def to_pandas(self):
        """One row a cell: layer, kind, position, token, source_token, estimate, true (NaN where not patched)."""
        return self._on.to_pandas()

    def code(self) -> str:
        opened = {key.partition(":")[0] for key in self.features}
        return self._on.code({site: coder for site, coder in self._coders.items() if site in opened})

    @quick
    def align(self, prompt: str, source: str, right: str, wrong: str) -> dict[str, Any]:
        """Tokens of the prompts as they are typed."""
        return PatchRun.sides(self.lm, prompt, source, right, wrong)

    @beside
    def rerun(self, job: Job, prompt: str, source: str, measure: str, right: str, wrong: str) -> None:
        self._begin(prompt, source, self._on.measure.chosen(measure, right, wrong), job)

    @beside
    def patch_cells(self, job: Job, cells: list[list[Any]]) -> None:
        self._patch(self._on, [(str(kind), int(layer), int(position)) for kind, layer, position in cells], job)

    @quick
    def stop(self) -> None:
        """Stop the patches that run, after the pass they are in; the values found so far stay."""
        for job in list(self._jobs.values()):
            job.cancel()

    @beside
    def open_features(self, job: Job, kind: str, layer: int, position: int) -> None:
        """List the features that carry a cell's effect."""
        run, key = self._on, Site(kind, layer).key
        if key not in self._coders:
            return
        found = run.top_features(self._coders[key], position, TOP_FEATURES)
        with self._lock:
            if run is self._on:
                self.features = {**self.features, f"{key}:{position}": found}

    @beside
    def attention_page(self, job: Job, layer: int, source: bool) -> dict[str, str]:
        """The drawing as an HTML page, or why there is none: the screen shows that in its place."""
        try:
            return {"page": self.attention(layer, source)._repr_html_()}
        except ValueError as error:
            return {"why": str(error)}

    def _begin(self, prompt: str, source: str, measure: Measure, job: Job | None = None) -> None:
        run = PatchRun.of(self.lm, prompt, source, measure, self._kinds)
        with self._lock:
            if job is not None:
                job.check()
            for other in list(self._jobs.values()):  # they patch the prompts before
                if other is not job:
                    other.cancel()
            with whole_step(), self.hold_sync():  # Ctrl-C leaves view and run together
                self._on = run
                self.error, self.truth, self.features = "", [], {}
                self.view = run.view(self._coders)
                if self.cell and not run.has(self.kind, *self.cell):
                    self.cell = []

    def _patch(self, run: PatchRun, cells: Iterable[Cell], job: Job | None = None) -> None:
        cells = [cell for cell in dict.fromkeys(cells) if cell not in run.true]
        if wrong := [cell for cell in cells if not run.has(*cell)]:
            raise ValueError(f"this grid has no cell {wrong[0]}: (kind, layer, position) of grid.to_pandas()")
        if not cells:
            return
        try:
            self._count([0, len(cells)])
            for done in run.patched(cells):
                with self._lock:
                    if run is self._on:
                        self.truth = run.truth()
                        self._count([done, len(cells)])
                if job is not None:
                    job.check()
        finally:
            with whole_step(), self._lock:
                if run is self._on:
                    self.truth = run.truth()  # Ctrl-C may have come behind a pass
                self._count([])

    def _count(self, progress: list[int]) -> None:
        """progress: [done, all] of this thread's patches, [] when they end."""
        with self._lock:
            self._waiting[threading.get_ident()] = progress
            self.progress = [sum(part) for part in zip(*filter(None, self._waiting.values()), strict=True)]

    @checked("kind")
    def _valid_kind(self, kind: str) -> str:
        if kind not in self._kinds:
            raise ValueError(f"kind must be one of {', '.join(self._kinds)}, got {kind!r}")
        return kind

    @checked("cell")
    def _valid_cell(self, cell: list[int]) -> list[int]:
        grid = self._on.estimate
        if cell and not (len(cell) == 2 and cell[0] in grid.layers and cell[1] in grid.positions):
            raise ValueError(
                f"cell must be [layer, position], layers {grid.layers[0]} to {grid.layers[-1]}, positions "
                f"{grid.positions[0]} to {grid.positions[-1]}, or [], got {cell!r}"
            )
        return cell

    def _choose_feature(self, _change: object = None) -> None:
        """Choose the session's feature, if it belongs to the open cell's site."""
        selection = self.session.selection
        mine = self.cell and selection.site == Site(self.kind, self.cell[0]).key
        self.feature = selection.feature if mine else None

    def _chosen(self) -> dict[str, Any]:
        if not self.cell:
            return {}
        site = Site(self.kind, self.cell[0]).key  # another site has other features
        return {"prompt": self._on.prompt, "token": self.cell[1], "site": site, "feature": self.feature}

    def _take(self, name: str) -> None:
        """Open the cell of the token, and of the site, that another panel selected."""
        selection = self.session.selection
        if selection.prompt in ("", self._on.prompt) and selection.token is not None:
            kind, layer = self._place(selection.site) or (self.kind, self.cell[0] if self.cell else -1)
            if self._on.has(kind, layer, selection.token):
                with self.hold_sync():
                    self.kind, self.cell = kind, [layer, selection.token]
        self._choose_feature()

    def _place(self, key: str) -> tuple[str, int] | None:
        """Kind and layer of a site of the grid."""
        try:
            site = Site.of(key)
        except ValueError:
            return None
        return (site.kind, site.layer or 0) if site.kind in self._kinds and site.head is None else None

    def _html(self) -> Html:
        grid, run, i = self._on.estimate, self._on, self._kinds.index(self.kind)
        head = ["layer", *(dotted(a) if a == b else f"{dotted(a)} ← {dotted(b)}" for a, b in grid.tokens)]
        rows = []
        for j in reversed(range(len(grid.layers))):  # the last layer on top
            true = [run.true.get((self.kind, grid.layers[j], p)) for p in grid.positions]
            estimates = grid.values[i, j].tolist()
            pairs = zip(estimates, true, strict=True)
            cells = [f"~{number(e, 2)}" if t is None else tag("b", number(t, 2)) for e, t in pairs]
            rows.append([str(grid.layers[j]), *cells])
        words = tag(
            "p", f"{self.kind}: share of the change of {run.measure.name}, {grid.base:.3g} → {grid.source:.3g}, that "
            "one patch brings; ", tag("b", "bold"), ": true patches, ~: estimates by gradient.",
        )  # fmt: skip
        texts = table(["prompt", "source"], [[dotted(run.prompt), dotted(run.source)]])
        return block(texts, words, table(head, rows))

    def __repr__(self) -> str:
        grid = self._on.estimate
        size = f"{len(grid.kinds)} kinds × {len(grid.layers)} layers × {len(grid.positions)} positions"
        return f"PatchingGrid({visible(self._on.measure.name)}, {size}, {len(self._on.true)} patched)"


def _by_site(coder: SparseCoder | Sequence[SparseCoder] | None, kinds: Sequence[str], lm: LM) -> dict[str, SparseCoder]:
    """Coders by their site's key. ValueError for one whose features the grid cannot list."""
    coders = [] if coder is None else [coder] if isinstance(coder, SparseCoder) else list(coder)
    found: dict[str, SparseCoder] = {}
    for one in coders:
        require_sae(one)
        if one.site.kind not in kinds or one.site.head is not None:
            raise ValueError(f"the grid shows {', '.join(kinds)}, this coder is at {one.site}: add its kind to kinds=")
        if one.training:
            raise ValueError(f"the coder at {one.site} is in training mode: call sae.eval()")
        lm.width(one.site)  # the model has that layer
        found[one.site.key] = one
    return found
