"""PatchingGrid: where in a model one prompt's answer comes from, estimated at once and patched on a click."""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import traitlets

from sae_lab.circuits.attributing import require_sae
from sae_lab.circuits.patching_effects import KINDS, Cell
from sae_lab.lm.model import LM
from sae_lab.results import Html, tag, visible
from sae_lab.saes.base import SparseCoder
from sae_lab.training.checkpoint import whole_step
from sae_lab.types import Site
from sae_lab.widgets.attention_view import attention_heads
from sae_lab.widgets.measures import Measure
from sae_lab.widgets.panel import STATIC, Job, Panel, beside, quick
from sae_lab.widgets.patching_run import PatchRun
from sae_lab.widgets.session import Session
from sae_lab.widgets.static_html import block, dotted, table

TOP_FEATURES = 12


class PatchingGrid(Panel):
    """Layers by positions: what a patch from the source's run does to the metric of the prompt's.

    Estimates (``circuits.patching_estimate``, one backward pass) are there at once; a click, or a block of cells, gets
    the true values (``circuits.patched_cells``). Values are shares of the metric's change: 0 nothing, 1 all of it.

    Args:
        prompt, source: two texts of as many tokens: the run that is patched, and the one that patches come from.
        metric: None: the logit difference of ``answers``, or without them "KL from the source"; or one by name ("logit
            difference", "log-probability", "KL from the source"); or a function (logits, tokens) -> a number for each
            row, differentiable.
        answers: (right, wrong), each one token.
        coder: an SAE, or several: at a cell of its site, the features that carry the effect are listed.
        kinds: of site. session: what linked widgets share; None: a session of its own.

    Traits to read, set and observe: ``kind``; ``cell``, [layer, position], or [] for none. Read only: ``view``, what
    the screen shows; ``truth``; ``features``; ``progress``; ``error``.

    Raises ValueError for texts that are empty or of unequal token lengths, an answer that is not one token, a coder
    that is no SAE at a site of the grid.
    """

    _esm = STATIC / "patching.js"
    _css = STATIC / "patching.css"

    view = traitlets.Dict(help="prompts, tokens, axes and estimates").tag(sync=True)
    truth = traitlets.List(help="[kind, layer, position, value] of each true patch").tag(sync=True)
    kind = traitlets.Unicode(help="the kind of site on show").tag(sync=True)
    cell = traitlets.List(traitlets.Int(), help="the open cell: [layer, position]").tag(sync=True)
    features = traitlets.Dict(help="top features of cells that were opened").tag(sync=True)
    progress = traitlets.List(traitlets.Int(), help="[done, of] while patches run").tag(sync=True)

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
    ) -> None:
        self.lm = lm
        self._kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        self._coders = _by_site(coder, self._kinds, lm)
        self._waiting: dict[int, list[int]] = {}
        self._following = False
        self._on = PatchRun.of(lm, prompt, source, Measure.of(metric, answers), self._kinds)
        self.session = Session() if session is None else session
        super().__init__(view=self._on.view(self._coders), kind=self._kinds[0])
        self.observe(self._on_cell, ["kind", "cell"])
        self.session.selection.observe(self._on_selection, ["token", "site"])

    # ---- in Python

    def run(
        self, prompt: str | None = None, source: str | None = None, metric: Any = None,
        answers: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Other prompts, another metric, or both; what is left out stays."""
        on = self._on
        measure = on.measure.changed(metric, answers)
        self._begin(on.prompt if prompt is None else prompt, on.source if source is None else source, measure)

    def patch(
        self, kind: str | None = None, layers: Sequence[int] | None = None, positions: Sequence[int] | None = None
    ) -> None:
        """True patches of a block. None: the kind on show, all layers, all positions. What is known is not redone."""
        kind = self.kind if kind is None else kind
        layers = self._on.estimate.layers if layers is None else layers
        positions = self._on.estimate.positions if positions is None else positions
        self._patch(self._on, [(kind, layer, p) for layer in layers for p in positions])

    def attention(self, layer: int, source: bool = False) -> Any:
        """A layer's attention patterns on the prompt, or on the source, drawn by CircuitsVis without the network."""
        return attention_heads(self.lm, self._on.source if source else self._on.prompt, layer)

    def to_pandas(self):
        """One row a cell: layer, kind, position, token, source_token, estimate, true (NaN where not patched)."""
        return self._on.to_pandas()

    def code(self) -> str:
        opened = {key.partition(":")[0] for key in self.features}
        return self._on.code({site: coder for site, coder in self._coders.items() if site in opened})

    # ---- from the screen

    @quick
    def align(self, prompt: str, source: str, right: str, wrong: str) -> dict[str, Any]:
        """Tokens of what is being typed."""
        return PatchRun.sides(self.lm, prompt, source, right, wrong)

    @beside
    def rerun(self, job: Job, prompt: str, source: str, measure: str, right: str, wrong: str) -> None:
        self._begin(prompt, source, self._on.measure.chosen(measure, right, wrong), job)

    @beside
    def patch_cells(self, job: Job, cells: list[list[Any]]) -> None:
        self._patch(self._on, [(str(kind), int(layer), int(position)) for kind, layer, position in cells], job)

    @quick
    def stop(self) -> None:
        """Patches that run stop after the pass they are in; what they have found stays."""
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

    @quick
    def select_feature(self, feature: int) -> None:
        """Select a feature of the open cell, for linked widgets."""
        if self.cell:
            layer, position = self.cell
            self.session.selection.pick(
                prompt=self._on.prompt, token=position, site=Site(self.kind, layer).key, feature=feature
            )

    @beside
    def attention_page(self, job: Job, layer: int, source: bool) -> dict[str, str]:
        """The drawing as a page, or why there is none: said where it would stand."""
        try:
            return {"page": self.attention(layer, source)._repr_html_()}
        except ValueError as error:
            return {"why": str(error)}

    # ---- what happens

    def _begin(self, prompt: str, source: str, measure: Measure, job: Job | None = None) -> None:
        run = PatchRun.of(self.lm, prompt, source, measure, self._kinds)
        with self._lock:
            if job is not None:
                job.check()
            for other in list(self._jobs.values()):  # patches of prompts that are gone
                if other is not job:
                    other.cancel()
            with whole_step(), self.hold_sync():  # what is shown is what there is, also after Ctrl-C
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
        mine = threading.get_ident()
        try:
            self._count(mine, 0, len(cells))
            for done in run.patched(cells):
                with self._lock:
                    if run is self._on:
                        self.truth = run.truth()
                        self._count(mine, done, len(cells))
                if job is not None:
                    job.check()
        finally:
            with whole_step(), self._lock:
                if run is self._on:
                    self.truth = run.truth()  # also of a pass that Ctrl-C has ended just behind
                self._waiting.pop(mine, None)
                self._show_progress()

    def _count(self, thread: int, done: int, of: int) -> None:
        with self._lock:
            self._waiting[thread] = [done, of]
            self._show_progress()

    def _show_progress(self) -> None:
        self.progress = [sum(part) for part in zip(*self._waiting.values(), strict=True)]

    # ---- the session

    @traitlets.validate("kind")
    def _valid_kind(self, proposal: Any) -> str:
        if proposal["value"] not in self._kinds:
            raise traitlets.TraitError(f"kind must be one of {', '.join(self._kinds)}, got {proposal['value']!r}")
        return proposal["value"]

    @traitlets.validate("cell")
    def _valid_cell(self, proposal: Any) -> list[int]:
        cell, grid = proposal["value"], self._on.estimate
        if cell and not (len(cell) == 2 and cell[0] in grid.layers and cell[1] in grid.positions):
            raise traitlets.TraitError(
                f"cell must be [layer, position], layers {grid.layers[0]} to {grid.layers[-1]}, positions "
                f"{grid.positions[0]} to {grid.positions[-1]}, or [], got {cell!r}"
            )
        return cell

    def _on_cell(self, _change: object) -> None:
        if not self.cell or self._following:
            return
        selection, (layer, position) = self.session.selection, self.cell
        site = Site(self.kind, layer).key
        feature = selection.feature if selection.site == site else None  # another site has other features
        selection.pick(prompt=self._on.prompt, token=position, site=site, feature=feature)

    def _on_selection(self, _change: object) -> None:
        """Go to the token, and the site, that another widget has selected."""
        selection = self.session.selection
        if selection.prompt not in ("", self._on.prompt) or selection.token is None:
            return
        kind, layer = self._place(selection.site) or (self.kind, self.cell[0] if self.cell else -1)
        if self._following or not self._on.has(kind, layer, selection.token):
            return
        self._following = True
        try:
            with self.hold_sync():
                self.kind, self.cell = kind, [layer, selection.token]
        finally:
            self._following = False

    def _place(self, key: str) -> tuple[str, int] | None:
        """Kind and layer of a site, if the grid has it."""
        try:
            site = Site.of(key)
        except ValueError:
            return None
        return (site.kind, site.layer or 0) if site.kind in self._kinds and site.head is None else None

    def close(self) -> None:
        if hasattr(self, "session"):
            self.session.selection.unobserve(self._on_selection, ["token", "site"])
            self.session = Session()  # unobserve raises the second time, and close is called twice
        super().close()

    # ---- how it shows itself

    def _html(self) -> Html:
        grid, run, i = self._on.estimate, self._on, self._kinds.index(self.kind)
        head = ["layer", *(dotted(a) if a == b else f"{dotted(a)} ← {dotted(b)}" for a, b in grid.tokens)]
        rows = []
        for j in reversed(range(len(grid.layers))):  # the last layer on top
            true = [run.true.get((self.kind, grid.layers[j], p)) for p in grid.positions]
            estimates = grid.values[i, j].tolist()
            cells = [f"~{e:.2f}" if t is None else tag("b", f"{t:.2f}") for e, t in zip(estimates, true, strict=True)]
            rows.append([str(grid.layers[j]), *cells])
        words = tag(
            "p", f"{self.kind}: share of the change of {run.measure.name}, {grid.base:.3g} → {grid.source:.3g}, that "
            "one patch brings; ", tag("b", "bold"), ": patched in truth, ~: estimated by gradient.",
        )  # fmt: skip
        texts = table(["prompt", "source"], [[dotted(run.prompt), dotted(run.source)]])
        return block(texts, words, table(head, rows))

    def __repr__(self) -> str:
        grid = self._on.estimate
        size = f"{len(grid.kinds)} kinds × {len(grid.layers)} layers × {len(grid.positions)} positions"
        return f"PatchingGrid({visible(self._on.measure.name)}, {size}, {len(self._on.true)} patched)"


def _by_site(coder: SparseCoder | Sequence[SparseCoder] | None, kinds: Sequence[str], lm: LM) -> dict[str, SparseCoder]:
    """Coders by their site's key. ValueError for one whose features this grid could not list."""
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
