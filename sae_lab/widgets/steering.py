"""SteeringSliders: steer features by sliders, and read what it does beside what the model says by itself."""

import itertools
import math
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import traitlets

from sae_lab.edits.edit import Steer
from sae_lab.feature_index.dosing import dose_response, neutral_texts, promoted
from sae_lab.lm.model import LM
from sae_lab.results import Html
from sae_lab.saes.base import SparseCoder

from . import presets
from .coding import literal, lm_line, name_of
from .generating import side_by_side
from .panel import STATIC, Job, Panel, beside, quick
from .session import Session
from .steering_views import compared_view, dose_view, is_slider, slider_row, steering_html

PROMPT = "I went to the"
STRENGTHS = (0.0, 1.0, 2.0, 3.0, 4.0)  # of the dose response: a few, since a person waits for them
SEEDS = 2  # random directions beside it
BASELINES = 16  # texts kept
LONGEST = 1024  # tokens that are compared: logits of all of them are held at once

Strengths = int | Iterable[int] | Mapping[int, float] | None


class SettingError(traitlets.TraitError, ValueError):
    """A refused setting. A TraitError, so that traitlets rolls back; a ValueError, as everywhere in this library."""


class SteeringSliders(Panel):
    """Sliders that steer features, and the model's text with and without them, side by side.

        sliders = sl.SteeringSliders(lm, sae, {12: 2.0})
        lm.generate(sliders.prompt, edits=sliders.session.edits)   # what it shows

    A slider is an ``sl.Steer`` of this coder in ``session.edits``, in units of f_scale; other edits of the session act
    too. The steered text is compared token by token, without and with the edits (``lm.compare``).

    Args:
        features: a feature, several, or {feature: strength}; None: the session's selected one, if there is one.
        prompt: None: the session's, else "I went to the".
        session: what it shares with other widgets; None: a new one.

    Traits to set: ``prompt``, ``temperature`` (0 is greedy), ``seed``, ``max_new_tokens``, ``target`` (tokens whose
    log-odds the dose response measures; empty: those that the feature promotes most), ``autorun``. Results:
    ``baseline`` and ``steered``, whole texts as ``lm.generate`` gives them; ``comparison``; ``dose``. The texts are
    those of the settings as they stand where ``shown == version``: a screen sees to that, ``run()`` does it in Python.

    ValueError for a feature that the coder does not have or that never fired, and for settings out of range.
    """

    _esm = STATIC / "steering.js"
    _css = STATIC / "steering.css"

    prompt = traitlets.Unicode(PROMPT).tag(sync=True)
    temperature = traitlets.Float(0.0).tag(sync=True)
    seed = traitlets.Int(0).tag(sync=True)
    max_new_tokens = traitlets.Int(30).tag(sync=True)
    target = traitlets.List(traitlets.Unicode()).tag(sync=True)
    autorun = traitlets.Bool(True, help="generate whenever something changes").tag(sync=True)
    sliders = traitlets.List(traitlets.Dict(), help="the sliders, as the screen shows them").tag(sync=True)
    others = traitlets.List(traitlets.Dict(), help="the session's other edits").tag(sync=True)
    selected = traitlets.Int(None, allow_none=True, help="the session's feature, if it is of this coder").tag(sync=True)
    baseline = traitlets.Unicode("", help="the model's own text").tag(sync=True)
    steered = traitlets.Unicode("", help="its text with the edits").tag(sync=True)
    comparison = traitlets.Dict(help="the steered text without and with the edits").tag(sync=True)
    dose = traitlets.Dict(help="the last dose response").tag(sync=True)
    version = traitlets.Int(0, help="rises with every change of what is to be generated").tag(sync=True)
    shown = traitlets.Int(-1, help="the version that the texts belong to").tag(sync=True)
    running = traitlets.Bool(False).tag(sync=True)
    measuring = traitlets.Bool(False).tag(sync=True)
    d_sae = traitlets.Int(0).tag(sync=True)

    def __init__(
        self, lm: LM, coder: SparseCoder, features: Strengths = None, prompt: str | None = None, *,
        session: Session | None = None, max_new_tokens: int = 30,
    ) -> None:  # fmt: skip
        self._lm, self._coder = lm, coder
        self.session = Session() if session is None else session
        self._numbers = itertools.count(1)
        self._baselines: dict[tuple[Any, ...], str] = {}
        self._saved: set[str] = set()  # presets that this widget has written
        self._job: Job | None = None
        self._idle = threading.Event()
        self._idle.set()
        selection = self.session.selection
        prompt = (selection.prompt or PROMPT) if prompt is None else prompt
        super().__init__(prompt=prompt, max_new_tokens=max_new_tokens, d_sae=coder.d_sae)
        selection.prompt = self.prompt
        for feature, strength in _strengths(features).items():
            self.add(feature, strength)
        self._follow_selection()
        if features is None and self.selected is not None and not any(self._entries()):
            self.add(self.selected)
        self._signature: Any = None
        self._follow_edits()
        self._listen(True)

    def _listen(self, yes: bool) -> None:
        """Follow the session, or no longer."""
        selection, verb = self.session.selection, "observe" if yes else "unobserve"
        getattr(selection, verb)(self._follow_selection, ["prompt", "feature", "site"])
        getattr(self.session.edits, verb)(self._follow_edits, "rows")
        getattr(self, verb)(self._on_setting, ["prompt", "temperature", "seed", "max_new_tokens"])

    def close(self) -> None:
        if hasattr(self, "_signature"):  # an __init__ that raised follows nothing
            self._listen(False)
        super().close()

    # ---- settings

    @traitlets.validate("temperature", "seed", "max_new_tokens")
    def _in_range(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        most = {"temperature": math.inf, "seed": 2**63, "max_new_tokens": self._lm.max_length}[name]
        least = 1 if name == "max_new_tokens" else 0
        if not least <= value < most:
            rules = {
                "temperature": "0 (greedy) or a positive number", "seed": "an int from 0 to 2**63 - 1",
                "max_new_tokens": f"an int from 1 to {most - 1}, below what this model reads at once",
            }  # fmt: skip
            raise SettingError(f"{name} must be {rules[name]}, got {value!r}")
        return value

    def _on_setting(self, change: Any) -> None:
        if change["name"] == "prompt":
            self.session.selection.prompt = self.prompt
        self._changed()

    def _follow_selection(self, _: object = None) -> None:
        selection = self.session.selection
        ours = selection.site in ("", self._coder.site.key if self._coder.reads else "")
        feature = selection.feature
        self.selected = feature if ours and feature is not None and feature < self._coder.d_sae else None
        if selection.prompt:
            self.prompt = selection.prompt

    def _follow_edits(self, _: object = None) -> None:
        mine = self._entries()
        rows = self.session.edits.rows
        keys = {key for key, _, _ in mine}
        self.sliders = [slider_row(*entry) for entry in mine]
        self.others = [row for row in rows if row["key"] not in keys]
        self._changed()

    def _changed(self) -> None:
        """Another version, where what is to be generated has changed."""
        on = tuple((row["key"], row["code"]) for row in self.session.edits.rows if row["on"])
        seed = self.seed if self.temperature else None  # greedy text has none
        signature = (self.prompt, self.temperature, seed, self.max_new_tokens, on)
        if signature != self._signature:
            self._signature = signature
            self.version = next(self._numbers)

    # ---- sliders

    def _entries(self) -> list[tuple[int, Any, bool]]:
        return [entry for entry in self.session.edits.entries() if is_slider(entry[1], self._coder)]

    def _find(self, feature: int) -> int | None:
        """The key of the plain slider of a feature."""
        rows = (slider_row(*entry) for entry in self._entries())
        return next((row["key"] for row in rows if row["features"] == [feature] and not row["more"]), None)

    def _steer(self, feature: int, strength: float) -> Steer:
        """A slider's edit, refused here where the model would refuse it."""
        edit = Steer(self._coder, self._coder.feature(feature), strength=float(strength))
        edit.writes(self._lm, self._lm.tokenize([[0]]))
        return edit

    def add(self, feature: int, strength: float = 1.0) -> int:
        """A slider for a feature; the one that is there takes the strength. Returns its key in ``session.edits``."""
        edit = self._steer(feature, strength)
        if (key := self._find(edit.features[0])) is None:
            return self.session.edits.add(edit)
        self.session.edits.replace(key, edit)
        return key

    @quick
    def add_feature(self, feature: int) -> None:
        """From the screen: a new slider, at strength 1."""
        if self._find(self._coder.feature(feature)) is None:
            self.add(feature)

    @quick
    def set_strength(self, key: int, strength: float) -> None:
        """Another strength for a slider."""
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
        """Make a feature, or a token of the prompt, the session's."""
        if token is not None:
            self.session.selection.pick(token=token)
        if feature is not None:
            self.session.selection.pick(feature=self._coder.feature(feature), site=self._coder.site.key)

    # ---- generating

    def run(self) -> None:
        """Generate both texts and compare, now: what a screen does by itself."""
        with torch.no_grad():
            self._generate(lambda: None, lambda side, piece: None)

    @beside
    def stream(self, job: Job) -> None:
        """The same for the screen, piece by piece: {side, text}. A newer call ends an older one."""
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
            raise ValueError("the prompt is empty: write some text for the model to go on from")
        settings = self._settings()
        key = (prompt, *settings.values())
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
        start = self._lm.tokenizer.decode(self._lm.tokenize(prompt).ids[0], skip_special_tokens=True)
        check()
        comparison = self._compare(prompt, said["baseline"], said["steered"], edits)
        check()
        with self._lock, self.hold_sync():
            self.baseline, self.steered = start + said["baseline"], start + said["steered"]
            self.comparison, self.shown = comparison, version

    def _settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed}

    def _compare(self, prompt: str, baseline: str, steered: str, edits: list[Any]) -> dict[str, Any]:
        """Of the prompt as it was given: a special token in it is no part of the texts, but the model read it."""
        before, after = self._lm.tokens(prompt + baseline), self._lm.tokens(prompt + steered)
        if len(after) > LONGEST:
            return {"note": f"a text of more than {LONGEST:,} tokens is not compared"}
        ours = [f"{self._coder.site.key} #{f}" for row in self.sliders for f in row["features"]]
        try:
            comparison = self._lm.compare(prompt + steered, edits)
        except ValueError as err:  # an edit may name a token that was to come, and has not
            return {"note": f"not compared: {err}"}
        return compared_view(comparison, before, prompt, ours)

    # ---- dose and response

    @beside
    def measure_dose(self, job: Job) -> None:
        """The dose response of the selected slider, else the first; partial: {done, total}."""

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
        """The same in Python, now: fills ``dose``."""
        with torch.no_grad():
            self._measure_dose(None)

    def _measure_dose(self, progress: Callable[[int, int], None] | None) -> None:
        features = [f for row in self.sliders for f in row["features"]]
        if not features:
            raise ValueError("a dose response needs a slider: add a feature first")
        if not self.prompt:
            raise ValueError("the prompt is empty: write some text for the model to go on from")
        selected = self.selected
        feature = selected if selected is not None and selected in features else features[0]
        target, prompt = list(self.target) or promoted(self._lm, self._coder, feature), self.prompt
        if not target:
            raise ValueError("this coder does not write to the residual stream, so no lens names a target: type one")
        result = dose_response(
            self._lm, self._coder, feature, [prompt], target, neutral_texts(),
            strengths=STRENGTHS, seeds=SEEDS, progress=progress,
        )  # fmt: skip
        self.dose = dose_view(result, prompt)

    # ---- presets

    def preset(self) -> dict[str, Any]:
        """Prompt, sliders and settings as plain data. The session's other edits are no part of it: ``session.save``."""
        settings = {**self._settings(), "prompt": self.prompt, "target": list(self.target)}
        return presets.content(self._coder, settings, self.sliders)

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """The preset as a JSON file. Returns the path."""
        return presets.write(pathlib.Path(path), self.preset())

    def load(self, path: str | pathlib.Path) -> None:
        """Take a preset: its sliders in the place of those that are there. ValueError for what is no preset, and for
        one of another coder; nothing has changed then."""
        settings, sliders = presets.read(pathlib.Path(path), self._coder)
        edits = [(self._steer(feature, strength), on) for feature, strength, on in sliders]
        with self.hold_trait_notifications():  # all or, where one is refused, none
            for name, value in settings.items():
                self.set_trait(name, value)
        for key, _, _ in self._entries():
            self.session.edits.remove(key)
        for edit, on in edits:
            self.session.edits.add(edit, on)

    @quick
    def save_preset(self, name: str) -> str:
        """From the screen: into the working folder. A file that this widget has not written stays as it is."""
        path = presets.in_folder(name)
        if path.exists() and path.name not in self._saved:
            raise ValueError(f"{path.name} exists already and is not from this widget: choose another name")
        self.save(path)
        self._saved.add(path.name)
        return f"saved as {path.name}"

    @quick
    def load_preset(self, name: str) -> str:
        path = presets.in_folder(name)
        if not path.exists():
            raise ValueError(f"no file {path.name} in the kernel's folder, {pathlib.Path.cwd()}")
        self.load(path)
        return f"loaded {path.name}"

    # ---- how it shows itself

    def code(self) -> str:
        source = self.session.edits.code().split("\n")  # import, coders, edits
        lm = name_of(self._lm, "lm")
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        start = self._lm.tokenizer.decode(self._lm.tokenize(self.prompt).ids[0], skip_special_tokens=True)
        text = "steered" if start == self.prompt else f"prompt + steered[{len(start)}:]"
        return "\n".join(
            [
                *source[:2], lm_line(self._lm, lm), *source[2:], f"prompt = {literal(self.prompt)}",
                f"baseline = {lm}.generate(prompt, {settings})",
                f"steered = {lm}.generate(prompt, edits=edits, {settings})",
                f"comparison = {lm}.compare({text}, edits)", "print(baseline, steered, comparison, sep='\\n\\n')",
            ]
        )  # fmt: skip

    def _html(self) -> Html:
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}, seed {self.seed}"
        note = f"{how}, at most {self.max_new_tokens} new tokens"
        if self.shown != self.version:
            note = "not generated yet for these settings" if self.shown < 0 else f"{note}; settings changed since"
        return steering_html(self.sliders, self.others, (self.baseline, self.steered), self.comparison, self.dose, note)

    def __repr__(self) -> str:
        rows = ", ".join(f"{'+'.join(map(str, row['features']))}: {row['strength']:g}" for row in self.sliders)
        return f"SteeringSliders({{{rows}}}, prompt={self.prompt!r})"


def _strengths(features: Strengths) -> dict[Any, float]:
    if features is None:
        return {}
    if isinstance(features, Mapping):
        return {feature: float(strength) for feature, strength in features.items()}
    return dict.fromkeys(features if isinstance(features, Iterable) else [features], 1.0)
