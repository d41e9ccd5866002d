"""PatchingGrid: where in a model one prompt's answer comes from, estimated at once and patched on a click."""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import traitlets

from sae_lab.circuits.pairs import require_sae
from sae_lab.circuits.patching_effects import KINDS, Cell
from sae_lab.feature_index import FeatureIndex
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompt
from sae_lab.noting import names_of
from sae_lab.results import Html, counted, number, tag, visible
from sae_lab.saes.base import SparseCoder
from sae_lab.training.checkpoint import whole_step
from sae_lab.types import Site
from sae_lab.widgets.attention_view import attention_heads
from sae_lab.widgets.measures import Measure
from sae_lab.widgets.panel import STATIC, Job, beside, checked, quick
from sae_lab.widgets.patching_run import Block, PatchRun
from sae_lab.widgets.prompting import in_words
from sae_lab.widgets.session import Linked, Session
from sae_lab.widgets.static_html import block, dotted, numbered, table

TOP_FEATURES = 12


class PatchingGrid(Linked):
    """Layers by positions: what a patch from the source's run does to the metric of the prompt's.

        grid = sl.PatchingGrid(lm, prompt, source, answers=(" Paris", " Rome"))   # estimates at once
        grid.patch(layers=[8], positions=[3, 4])                                  # true values, as a click gets them
        grid.patch_together("mlp_out", positions=[4])                             # a column in one run: one number

    Estimates come from one backward pass (``circuits.patching_estimate``), true values from one forward pass for every
    few cells (``circuits.patched_cells``). Both are shares of the metric's change: 0 nothing, 1 all of it. In the grid
    each cell is patched alone. A click on the header of a row (a layer) or a column (a position) patches all its cells
    together in one run, whose one number stands in the header (``patch_together``), and then each of them alone. The
    former is not the sum of the latter: cells on one path carry the same effect.

    Args:
        lm: the model. prompt, source: two texts, or two chats (messages, {"role", "content"} each, which go through the
            model's chat template with its opening of an answer), with the same number of tokens: the run that is
            patched, and the one that patches come from. On screen a chat stays a chat, with a box for each message;
            ``run`` changes from one to the other.
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
    ``truth``, [kind, layer, position, value] of each true patch; ``joint``, [kind, layers, positions, value] of each
    block that was patched together; ``features``, those of the cells that were opened; ``progress``, [done, all] while
    patches run, else []; ``error``, why the last action failed.

    Raises ValueError for prompts that are empty or of unequal length, a text beside a chat, a chat that the model has
    no template for, an answer that is not one token, and a coder that is no SAE at a site of the grid.
    """

    _esm = STATIC / "patching.js"
    _css = STATIC / "patching.css"
    _chooses = ("kind", "cell", "feature")

    view = traitlets.Dict().tag(sync=True)
    truth = traitlets.List().tag(sync=True)
    joint = traitlets.List().tag(sync=True)
    kind = traitlets.Unicode().tag(sync=True)
    cell = traitlets.List(traitlets.Int()).tag(sync=True)
    feature = traitlets.Int(None, allow_none=True, min=0).tag(sync=True)
    features = traitlets.Dict().tag(sync=True)
    progress = traitlets.List(traitlets.Int()).tag(sync=True)

    def __init__(
        self,
        lm: LM,
        prompt: Prompt,
        source: Prompt,
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
        self, prompt: Prompt | None = None, source: Prompt | None = None, metric: Any = None,
        answers: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Take other prompts or another metric; what is None stays as it is."""
        on = self._on
        measure = on.measure.changed(metric, answers)
        self._begin(on.prompt if prompt is None else prompt, on.source if source is None else source, measure)

    def patch(
        self, kind: str | None = None, layers: Sequence[int] | None = None, positions: Sequence[int] | None = None
    ) -> None:
        """Patch a block of cells that were not patched yet, each alone. None: the kind that is shown, all layers, all
        positions."""
        self._patch(self._on, _cells(self._block(kind, layers, positions)))

    def patch_together(
        self, kind: str | None = None, layers: Sequence[int] | None = None, positions: Sequence[int] | None = None
    ) -> float:
        """``grid.patch_together("mlp_out", positions=[4])``: patch a block of cells together, in one run. Returns the
        share of the metric's change that they cause jointly, which is not the sum of what each causes alone
        (``patch``). None: as for ``patch``, so ``layers=[8]`` is a row and ``positions=[4]`` a column."""
        return self._patch_together(self._on, self._block(kind, layers, positions))

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
    def align(self, prompt: Prompt, source: Prompt, right: str, wrong: str) -> dict[str, Any]:
        """Tokens of the prompts as they are typed."""
        return PatchRun.sides(self.lm, prompt, source, right, wrong)

    @beside
    def rerun(self, job: Job, prompt: Prompt, source: Prompt, measure: str, right: str, wrong: str) -> None:
        self._begin(prompt, source, self._on.measure.chosen(measure, right, wrong), job)

    @beside
    def patch_cells(self, job: Job, cells: list[list[Any]]) -> None:
        self._patch(self._on, [(str(kind), int(layer), int(position)) for kind, layer, position in cells], job)

    @beside
    def patch_line(self, job: Job, kind: str, layers: list[int], positions: list[int]) -> None:
        """Patch a row or a column: its cells together, then each alone."""
        run, block = self._on, self._block(kind, layers, positions)
        self._patch_together(run, block)
        job.check()
        self._patch(run, _cells(block), job)

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

    def _begin(self, prompt: Prompt, source: Prompt, measure: Measure, job: Job | None = None) -> None:
        run = PatchRun.of(self.lm, prompt, source, measure, self._kinds)
        with self._lock:
            if job is not None:
                job.check()
            for other in list(self._jobs.values()):  # they patch the prompts before
                if other is not job:
                    other.cancel()
            with whole_step(), self.hold_sync():  # Ctrl-C leaves view and run together
                self._on = run
                self.error, self.truth, self.joint, self.features = "", [], [], {}
                self.view = run.view(self._coders)
                if self.cell and not run.has(self.kind, *self.cell):
                    self.cell = []

    def _block(self, kind: str | None, layers: Sequence[int] | None, positions: Sequence[int] | None) -> Block:
        grid = self._on.estimate
        axes = (grid.layers if layers is None else layers), (grid.positions if positions is None else positions)
        layers, positions = (tuple(sorted(set(axis))) for axis in axes)
        return (self.kind if kind is None else kind), layers, positions

    def _patch_together(self, run: PatchRun, block: Block) -> float:
        _require(run, _cells(block))
        if block not in run.joint:
            try:
                self._count([0, 1])
                run.patch_together(block)
            finally:
                with whole_step(), self._lock:
                    if run is self._on:
                        self.joint = run.together()
                    self._count([])
        return run.joint[block]

    def _patch(self, run: PatchRun, cells: Iterable[Cell], job: Job | None = None) -> None:
        cells = [cell for cell in dict.fromkeys(cells) if cell not in run.true]
        _require(run, cells)
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
        layers, positions, rows = tuple(grid.layers), tuple(grid.positions), []
        beside = [run.joint.get((self.kind, (layer,), positions)) for layer in layers]
        below = [run.joint.get((self.kind, layers, (p,))) for p in positions]
        for j in reversed(range(len(grid.layers))):  # the last layer on top
            true = [run.true.get((self.kind, grid.layers[j], p)) for p in grid.positions]
            estimates = grid.values[i, j].tolist()
            pairs = zip(estimates, true, strict=True)
            cells = [f"~{number(round(e, 2) + 0.0, 2)}" if t is None else _bold(t) for e, t in pairs]
            rows.append([str(grid.layers[j]), *cells, *([_bold(beside[j])] if set(beside) != {None} else [])])
        if set(beside) != {None}:
            head.append("together")
        if set(below) != {None}:
            rows.append(["together", *map(_bold, below), *([""] if set(beside) != {None} else [])])
        words = tag(
            "p", f"{self.kind}: share of the change of {run.measure.name}, {grid.base:.3g} → {grid.source:.3g}, that "
            "one patch brings; ", tag("b", "bold"), ": true patches, ~: estimates by one gradient, which for a whole "
            "residual stream can say 0.3 where the true patch gives 1; together: all cells of a row or column in one "
            "run.",
        )  # fmt: skip
        texts = table(["prompt", "source"], [[dotted(in_words(run.prompt)), dotted(in_words(run.source))]])
        return block(texts, words, table(head, rows), self._opened())

    def _opened(self) -> Html | None:
        """The features of the open cell, where they were listed."""
        site = Site(self.kind, self.cell[0]).key if self.cell else ""
        listed = self.features.get(f"{site}:{self.cell[1]}" if self.cell else "", {"features": []})["features"]
        names = {str(f): self.names.get(f"{site} {f}", "") for f, _ in listed}
        rows = [[numbered(f, names), number(share)] for f, share in listed]
        return table([f"feature of {site}, token {self.cell[1]}" if rows else "", "share of the change"], rows)

    def __repr__(self) -> str:
        grid = self._on.estimate
        axes = {"kind": grid.kinds, "layer": grid.layers, "position": grid.positions}
        size = " × ".join(counted(len(axis), name) for name, axis in axes.items())
        return f"PatchingGrid({visible(self._on.measure.name)}, {size}, {len(self._on.true)} patched)"


def _bold(value: float | None) -> Html | str:
    return "" if value is None else tag("b", number(round(value, 2) + 0.0, 2))  # + 0.0: no minus before a zero


def _cells(block: Block) -> list[Cell]:
    kind, layers, positions = block
    return [(kind, layer, position) for layer in layers for position in positions]


def _require(run: PatchRun, cells: list[Cell]) -> None:
    """ValueError for a cell that the grid does not have."""
    if wrong := [cell for cell in cells if not run.has(*cell)]:
        raise ValueError(f"this grid has no cell {wrong[0]}: (kind, layer, position) of grid.to_pandas()")


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
