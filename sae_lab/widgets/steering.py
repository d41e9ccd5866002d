"""SteeringSliders: steer features by sliders, and read what it does beside what the model says by itself."""

import itertools
import math
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import traitlets

from sae_lab.edits.edit import Push, Steer
from sae_lab.edits.vector import Vector
from sae_lab.feature_index import FeatureIndex
from sae_lab.feature_index.dosing import DoseResponse, dose_response, neutral_texts, own_tokens
from sae_lab.lm.comparing import Comparison
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompt
from sae_lab.noting import names_of
from sae_lab.results import Html, counted
from sae_lab.saes.base import SparseCoder

from .coding import lm_line, name_of
from .panel import STATIC, Job, beside, checked, quick
from .prompting import checked_prompt
from .session import VERSION, Linked, Session, read_kept, write_kept
from .steering_views import compared_view, dose_view, limited, slider_row, steering_html

PROMPT = "I went to the"
NO_PROMPT = "the prompt is empty: write some text for the model to go on from"
STRENGTHS = (0.0, 1.0, 2.0, 3.0, 4.0)  # of the dose response, in units of f_scale: a person waits for each
SEEDS = 2  # random directions beside it
BASELINES = 16  # texts kept
LONGEST = 1024  # tokens that are compared: the logits of all are in memory at once

Strengths = int | Vector | Iterable[int | Vector] | Mapping[Any, float] | None


class SteeringSliders(Linked):
    """Sliders that steer features, and the model's text with and without them, side by side.

        sliders = sl.SteeringSliders(lm, sae, {12: 2.0})
        lm.generate(sliders.prompt, edits=sliders.session.edits)   # what it shows

    A slider is an ``sl.Steer`` of this coder or an ``sl.Push`` in ``session.edits``; other edits of the session act
    too. The steered text is compared token by token, without and with the edits (``lm.compare``).

    Args:
        lm: the model. coder: the coder whose features are steered.
        features: a feature or ``sl.Vector``, several, or {feature: strength in units of f_scale}; a slider that is
            there keeps its strength unless one is given. None: the session's selected one, if it has no edits yet.
        prompt: a text, or chat messages ({"role", "content"} each), which go through the model's chat template with
            its opening of an answer; None: the session's, else "I went to the". On screen a chat stays a chat, with a
            box for each message, and a text stays a text; set ``prompt`` to change from one to the other.
        session: what it shares with other widgets (``sl.Session``); None: a new one.
        max_new_tokens: at most how many tokens are generated.
        index: the coder's feature index, whose top tokens name features without a label; None: one that is open.

    Traits that can be read, set and observed: ``prompt``; ``temperature`` (0 is greedy); ``seed``; ``max_new_tokens``;
    ``target``, tokens whose log-odds (nats) the dose response measures, empty: those that the feature fires on most;
    ``autorun``, whether every change generates anew; ``selected``, the session's feature if it is of this coder.
    Results: ``baseline`` and ``steered``, whole texts as ``lm.generate`` gives them; ``comparison``, values token by
    token; ``dose``, the last dose response. ``version`` counts the settings and ``shown`` is the version that the
    results belong to: a screen generates until they are equal, in Python ``run()`` does. Read only too: ``sliders`` and
    ``others``, the session's edits; ``running``, ``measuring``; ``d_sae``; ``error``, why the last action failed.

    Raises ValueError for a feature that the coder does not have or that never fired, and for a setting out of range.
    """

    _esm = STATIC / "steering.js"
    _css = STATIC / "steering.css"
    _chooses = ("prompt", "selected")

    prompt = traitlets.Any(PROMPT).tag(sync=True)
    temperature = traitlets.Float(0.0).tag(sync=True)
    seed = traitlets.Int(0).tag(sync=True)
    max_new_tokens = traitlets.Int(30).tag(sync=True)
    target = traitlets.List(traitlets.Unicode()).tag(sync=True)
    autorun = traitlets.Bool(True).tag(sync=True)
    sliders = traitlets.List(traitlets.Dict()).tag(sync=True)
    others = traitlets.List(traitlets.Dict()).tag(sync=True)
    selected = traitlets.Any(None).tag(sync=True)
    baseline = traitlets.Unicode("").tag(sync=True)
    steered = traitlets.Unicode("").tag(sync=True)
    comparison = traitlets.Dict().tag(sync=True)
    dose = traitlets.Dict().tag(sync=True)
    version = traitlets.Int(0).tag(sync=True)
    shown = traitlets.Int(-1).tag(sync=True)
    running = traitlets.Bool(False).tag(sync=True)
    measuring = traitlets.Bool(False).tag(sync=True)
    d_sae = traitlets.Int(0).tag(sync=True)

    def __init__(
        self, lm: LM, coder: SparseCoder, features: Strengths = None, prompt: Prompt | None = None, *,
        session: Session | None = None, max_new_tokens: int = 30, index: FeatureIndex | None = None,
    ) -> None:  # fmt: skip
        self._lm, self._coder, self._names = lm, coder, names_of({0: coder}, index)[0]
        self._site = coder.site.key if coder.reads else ""
        self._numbers = itertools.count(1)
        self._baselines: dict[tuple[Any, ...], str] = {}
        self._saved: set[str] = set()  # presets that this widget has written
        self._signature: Any = None  # of what is to be generated
        self._job: Job | None = None
        self._compared: Comparison | None = None
        self._measured: DoseResponse | None = None
        self._idle = threading.Event()
        self._idle.set()
        session = session or Session()
        prompt = (session.selection.prompt or PROMPT) if prompt is None else prompt
        super().__init__(session, prompt=prompt, max_new_tokens=max_new_tokens, d_sae=coder.d_sae)
        given = [] if features is None else features if isinstance(features, Iterable) else [features]
        for feature in given:
            if isinstance(features, Mapping):
                self.add(feature, features[feature])
            elif self._find(self._steer(feature, 1.0)) is None:
                self.add(feature)
        self.selected = self._feature_of(session.selection.site and self._site, self.d_sae)
        if features is None and self.selected is not None and not session.edits.rows:
            self.add(self.selected)
        self._follow_edits()
        self.observe(self._changed, ["prompt", "temperature", "seed", "max_new_tokens"])
        session.edits.observe(self._follow_edits, "rows")
        self._link(lambda: session.edits.unobserve(self._follow_edits, "rows"))

    @checked("prompt")
    def _valid_prompt(self, prompt: Any) -> Prompt:
        return checked_prompt(prompt, self._lm)

    @checked("temperature")
    def _valid_temperature(self, value: float) -> float:
        return _within("temperature", value, 0, math.inf, "0 (greedy) or a positive number")

    @checked("seed")
    def _valid_seed(self, value: int) -> int:
        return _within("seed", value, 0, 2**63, "an int from 0 to 2**63 - 1")

    @checked("max_new_tokens")
    def _valid_length(self, value: int) -> int:
        most = self._lm.max_length
        return _within("max_new_tokens", value, 1, most, f"an int from 1 to {most - 1}, below what this model reads")

    @checked("selected")
    def _valid_selected(self, feature: Any) -> int | None:
        return None if feature is None else self._coder.feature(feature)

    def _chosen(self) -> dict[str, Any]:
        mine = {"prompt": self.prompt}
        return mine if self.selected is None else mine | {"feature": self.selected, "site": self._site}

    def _take(self, name: str) -> None:
        selected = self.session.selection
        self.selected = self._feature_of(selected.site and self._site, self.d_sae)  # a feature without a site counts
        try:
            self.prompt = self._shared_prompt or self.prompt
        except ValueError as err:  # another model's chat
            self.error = str(err)

    def _follow_edits(self, _: object = None) -> None:
        mine = self._entries()
        keys = {key for key, _, _ in mine}
        self.sliders = [slider_row(*entry) for entry in mine]
        self.others = [row for row in self.session.edits.rows if row["key"] not in keys]
        self._rename()
        self._changed()

    def _called(self) -> dict[int, str]:
        measured = [self.dose["feature"]] if self.dose else []
        return self._names.of([*(f for row in self.sliders for f in row["features"]), *measured])

    def _changed(self, _: object = None) -> None:
        """Counts another version if the settings would generate something else."""
        on = tuple((row["key"], row["code"]) for row in self.session.edits.rows if row["on"])
        seed = self.seed if self.temperature else None  # greedy text has none
        signature = (self.prompt, self.temperature, seed, self.max_new_tokens, on)
        if signature != self._signature:
            self._signature = signature
            self.version = next(self._numbers)

    def _entries(self) -> list[tuple[int, Any, bool]]:
        """The sliders: every ``sl.Steer`` of this coder, and every ``sl.Push``."""
        edits = self.session.edits.entries()
        return [e for e in edits if type(e[1]) is Push or (type(e[1]) is Steer and e[1].coder is self._coder)]

    def _find(self, edit: Steer | Push) -> int | None:
        """The key of the plain slider of the same feature or vector."""
        same = [e for e in self._entries() if e[1].coder is edit.coder and e[1].features == edit.features]
        return next((key for key, e, on in same if not slider_row(key, e, on)["more"]), None)

    def _steer(self, feature: int | Vector, strength: float) -> Steer | Push:
        """A slider's edit. ValueError where the model would refuse it."""
        if isinstance(feature, Vector):
            edit: Any = Push(feature, strength=float(strength))
        else:
            edit = Steer(self._coder, self._coder.feature(feature), strength=float(strength))
        edit.writes(self._lm, self._lm.tokenize([[0]]))
        return edit

    def add(self, feature: int | Vector, strength: float = 1.0) -> int:
        """Add a slider for a feature or a vector, or give the one it has this strength (in units of f_scale). Returns
        its key in ``session.edits``."""
        edit = self._steer(feature, strength)
        if (key := self._find(edit)) is None:
            return self.session.edits.add(edit)
        self.session.edits.replace(key, edit)
        return key

    @quick
    def add_feature(self, feature: int) -> None:
        """Add a slider at strength 1, unless the feature has one."""
        if self._find(Steer(self._coder, self._coder.feature(feature))) is None:
            self.add(feature)

    @quick
    def set_strength(self, key: int, strength: float) -> None:
        """Set a slider's strength, in units of f_scale."""
        found = {number: edit for number, edit, _ in self._entries()}
        if key in found:  # else it was removed meanwhile
            self.session.edits.replace(key, replace(found[key], strength=float(strength)))

    @quick
    def switch(self, key: int, on: bool) -> None:
        self.session.edits.switch(key, on)

    @quick
    def remove(self, key: int) -> None:
        self.session.edits.remove(key)

    @quick
    def select(self, feature: int | None = None, token: int | None = None) -> None:
        """Select a feature, or a token of the prompt, for the whole session."""
        if token is not None:
            self.session.selection.pick(prompt=self.prompt, token=token)
        if feature is not None:
            self.selected = feature

    def run(self) -> None:
        """Generate both texts and compare them, as a screen does by itself."""
        with torch.no_grad():
            self._generate(lambda: None, lambda side, piece: None)

    @beside
    def stream(self, job: Job) -> None:
        """``run`` for the screen, which gets the pieces as {side, text}. A newer request ends an older one."""
        with self._lock:
            job.check()  # a thread may begin after a newer call's
            before, self._job, self.running = self._job, job, True
            self._idle.clear()
        if before is not None:
            before.cancel()
        try:
            self._generate(job.check, lambda side, text: job.partial({"side": side, "text": text}))
        finally:
            with self._lock:
                if self._job is job:
                    self.running = False
                    self._idle.set()

    @quick
    def stop(self) -> None:
        """End the generation that the screen asked for."""
        if self._job is not None:
            self._job.cancel()

    def _generate(self, check: Callable[[], None], hear: Callable[[str, str], None]) -> None:
        version, prompt, edits = self.version, self.prompt, list(self.session.edits)
        if not prompt:
            raise ValueError(NO_PROMPT)
        settings = self._settings()
        key = (repr(prompt), *settings.values())
        streams = {"steered": self._lm.stream(prompt, edits, **settings)} if edits else {}
        if key in self._baselines:
            hear("baseline", self._baselines[key])
        else:
            streams["baseline"] = self._lm.stream(prompt, **settings)
        said = {"baseline": self._baselines.get(key, "")} | side_by_side(streams, check, hear)
        self._baselines[key] = said["baseline"]
        for old in list(self._baselines)[:-BASELINES]:
            del self._baselines[old]
        said.setdefault("steered", said["baseline"])
        start = self._start(prompt)
        check()
        compared, comparison = self._compare(prompt, said["baseline"], said["steered"], edits)
        check()
        with self._lock, self.hold_sync():
            self._compared = compared
            self.baseline, self.steered = start + said["baseline"], start + said["steered"]
            self.comparison, self.shown = comparison, version

    def _settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed}

    def _start(self, prompt: Prompt) -> str:
        """What the texts begin with: the prompt without its special tokens."""
        return self._lm.tokenizer.decode(self._lm.tokenize(prompt).ids[0], skip_special_tokens=True)

    def _compare(
        self, prompt: Prompt, baseline: str, steered: str, edits: list[Any]
    ) -> tuple[Comparison | None, dict[str, Any]]:
        """(the comparison, what is shown of it). The prompt has its special tokens here: the model reads them."""
        lm = self._lm
        before, after = lm.tokens(prompt, baseline), lm.tokens(prompt, steered)
        if len(after) > LONGEST:
            return None, {"note": f"a text of more than {LONGEST:,} tokens is not compared"}
        called = {f"{self._coder.site.key} #{f}": self._names[f] for row in self.sliders for f in row["features"]}
        try:
            comparison = limited(lm.compare(prompt, edits, steered), list(called))
        except ValueError as err:  # an edit may name a token that was not generated
            return None, {"note": f"not compared: {err}"}
        [roles] = lm.tokenize(prompt).roles or [[]]
        return comparison, compared_view(comparison, before, lm.tokens(prompt)[-1].end, roles, called)

    @beside
    def measure_dose(self, job: Job) -> None:
        """Measure the dose response of the selected slider, else of the first; partial: {done, total}."""

        def progress(done: int, total: int) -> None:
            while not self._idle.wait(0.05):  # a moved slider comes first
                job.check()
            job.partial({"done": done, "total": total})

        self.measuring = True
        try:
            self._measure_dose(progress)
        finally:
            self.measuring = False

    def measure(self) -> None:
        """Measure the dose response; ``dose`` has the result."""
        with torch.no_grad():
            self._measure_dose(None)

    def _measure_dose(self, progress: Callable[[int, int], None] | None) -> None:
        features = [f for row in self.sliders for f in row["features"]]
        if not features:
            raise ValueError("a dose response needs a slider of a feature: add a feature first")
        if not self.prompt:
            raise ValueError(NO_PROMPT)
        feature = int(self.selected) if self.selected in features else features[0]  # type: ignore[arg-type]
        target, prompt = list(self.target) or own_tokens(self._lm, self._names.index, feature), self.prompt
        if not target:
            raise ValueError(
                "a dose needs target tokens, and no index of this coder tells which ones the feature fires on: type "
                "some, or open sl.index_features(coder, lm, store)"
            )
        self._measured = dose_response(
            self._lm, self._coder, feature, [prompt], target, neutral_texts(),
            strengths=STRENGTHS, seeds=SEEDS, progress=progress,
        )  # fmt: skip
        self.dose = dose_view(self._measured, prompt)
        self._rename()

    def preset(self) -> dict[str, Any]:
        """Prompt, sliders and settings as plain data; ``session.save`` keeps the session's other edits. ValueError for
        a slider of several features, or with further settings."""
        for row in self.sliders:
            if row["more"] or len(row["features"]) != 1:
                what = row["more"] or (f"the vector {row['vector']!r}" if row["vector"] else row["features"])
                raise ValueError(
                    f"a preset keeps sliders of one feature at every token, not {what}: use session.save(path)"
                )
        kept = [{"feature": r["features"][0], "strength": r["strength"], "on": r["on"]} for r in self.sliders]
        settings = {**self._settings(), "prompt": self.prompt, "target": list(self.target)}
        return {"sae_lab steering": VERSION, "coder": self._coder.fingerprint(), **settings, "sliders": kept}

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Write the preset as a JSON file. Returns the path."""
        return write_kept(pathlib.Path(path), "steering", self.preset())

    def load(self, path: str | pathlib.Path) -> None:
        """Take a preset; its sliders replace those of this coder. ValueError for a file of another kind or of another
        coder; then nothing changes."""

        def take(found: Any) -> tuple[str, dict[str, Any], list[tuple[int, float, bool]]]:
            sliders = [(row["feature"], float(row["strength"]), bool(row["on"])) for row in found["sliders"]]
            return found["coder"], {name: found[name] for name in (*self._settings(), "prompt", "target")}, sliders

        fingerprint, settings, sliders = read_kept(pathlib.Path(path), "steering", take)
        if fingerprint != (ours := self._coder.fingerprint()):
            raise ValueError(
                f"{path} was made with another coder (weights {fingerprint}, these are {ours}), where its features "
                "mean something else: open SteeringSliders with that coder"
            )
        edits = [(self._steer(feature, strength), on) for feature, strength, on in sliders]
        with self.hold_trait_notifications():  # all of them, or none where one is refused
            for name, value in settings.items():
                self.set_trait(name, value)
        for key, _, _ in self._entries():
            self.session.edits.remove(key)
        for edit, on in edits:
            self.session.edits.add(edit, on)

    @quick
    def save_preset(self, name: str) -> str:
        """Save into the working folder; a file that this widget did not write is not overwritten."""
        path = _in_folder(name)
        if path.exists() and path.name not in self._saved:
            raise ValueError(f"{path.name} exists already and is not from this widget: choose another name")
        self._saved.add(self.save(path).name)
        return f"saved as {path.name}"

    @quick
    def load_preset(self, name: str) -> str:
        """Load from the working folder."""
        path = _in_folder(name)
        if not path.exists():
            raise ValueError(f"no file {path.name} in the kernel's folder, {pathlib.Path.cwd()}")
        self.load(path)
        return f"loaded {path.name}"

    def code(self) -> str:
        source = self.session.edits.code().split("\n")  # import, coders, edits
        lm = name_of(self._lm, "lm")
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        start = self._start(self.prompt)
        text = "steered, edits" if start == self.prompt else f"prompt, edits, answer=steered[{len(start)}:]"
        return "\n".join(
            [
                *source[:2], lm_line(self._lm, lm), *source[2:], f"prompt = {self.prompt!r}",
                f"baseline = {lm}.generate(prompt, {settings})",
                f"steered = {lm}.generate(prompt, edits=edits, {settings})",
                f"comparison = {lm}.compare({text})", "print(baseline, steered, comparison, sep='\\n\\n')",
            ]
        )  # fmt: skip

    def _html(self) -> Html:
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}, seed {self.seed}"
        note = f"{how}, at most {counted(self.max_new_tokens, 'new token')}"
        if self.shown != self.version:
            note = "not generated yet for these settings" if self.shown < 0 else f"{note}; settings changed since"
        texts, results = (self.baseline, self.steered), (self._compared, self._measured)
        return steering_html(self.sliders, self.names, self.others, texts, self.comparison, results, note)

    def __repr__(self) -> str:
        named = [row["vector"] or "+".join(map(str, row["features"])) for row in self.sliders]
        rows = ", ".join(f"{name}: {row['strength']:g}" for name, row in zip(named, self.sliders, strict=True))
        return f"SteeringSliders({{{rows}}}, prompt={self.prompt!r})"


def _within(name: str, value: Any, least: float, below: float, rule: str) -> Any:
    if not least <= value < below:
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return value


def side_by_side(
    streams: Mapping[str, Iterator[str]], check: Callable[[], None], hear: Callable[[str, str], None]
) -> dict[str, str]:
    """Texts by name, generated a piece of each in turn. ``check`` is called before each piece, and may raise."""
    said, going = dict.fromkeys(streams, ""), dict(streams)
    try:
        while going:
            for name in list(going):
                check()
                piece = next(going[name], None)
                if piece is None:
                    del going[name]
                    continue
                said[name] += piece
                hear(name, piece)
    finally:
        for stream in streams.values():
            stream.close()  # type: ignore[attr-defined]
    return said


def _in_folder(name: str) -> pathlib.Path:
    """A file of the working folder by its bare name."""
    name = name.strip()
    if not name or pathlib.PurePath(name).name != name or "\\" in name or name.startswith("."):
        raise ValueError(f"a preset's name is a plain file name such as war.json, got {name!r}")
    return pathlib.Path(name if name.endswith(".json") else f"{name}.json")
