"""TokenFeatures: a prompt token by token, which features are active there, and what they do to the next token."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import traitlets

from sae_lab.circuits.direct import ORDERS
from sae_lab.circuits.metric import one_token
from sae_lab.circuits.prompt import PromptReading, check_coder, reaches_the_stream, read_prompt, written
from sae_lab.edits.edit import Ablate, Edit, Steer
from sae_lab.feature_index import FeatureIndex
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompt
from sae_lab.noting import names_of
from sae_lab.results import Html, counted
from sae_lab.saes.base import SparseCoder
from sae_lab.spelling import check_text
from sae_lab.widgets.coding import expression, header, name_of
from sae_lab.widgets.panel import STATIC, Job, beside, checked, quick
from sae_lab.widgets.prompting import checked_prompt
from sae_lab.widgets.session import Linked, Session
from sae_lab.widgets.token_views import along, detail_of, html_of, pages_of, text_of

STRIPS = ("strongest", "active", "feature", "loss")


class TokenFeatures(Linked):
    """A prompt as a strip of tokens: a chosen token lists its active features with their direct effects, a chosen
    feature colours the strip and becomes the session's. Needs no index.

        session = sl.Session()
        sl.TokenFeatures(lm, sae, "The capital of France is", session=session)

    Args:
        lm: the model. coder: an SAE or transcoder that knows its site; or several, a list or {name: coder}, to choose
            from on screen.
        prompt: a text, or chat messages; "": the session's.
        token: the position to open, an int (0 is the prefix token); None: the last one that the coder's mask keeps.
        session: what it shares with other widgets (``sl.Session``); None: a new one.
        n: how many features are listed.
        index: the feature index of a coder, or several: their top tokens name features without a label; None: those
            that are open.

    Traits that can be read, set and observed: ``prompt``; ``coder``, a name; ``token``, a position; ``feature``, an int
    or None; ``strip``, what colours the tokens: "strongest" (activation), "active" (number of features), "feature"
    (activation of the chosen one) or "loss" (nats); ``sort``: "activation" or "effect"; ``target``, the token whose
    logit the effects are on, "": the prompt's next token. Read only: ``coders``, a dict of name, site and d_sae each;
    ``text``, the tokens with their activations; ``losses`` (nats) and ``fires`` (the chosen feature's activation), one
    number a token; ``detail``, the chosen token's features, effects in nats; ``error``, why the last action failed.

    Direct effects (``circuits.direct_effects``) need a coder that writes to the residual stream or at attn_z, and a
    model on this machine. Without them the features alone are listed, and the panel says why.

    Raises ValueError for a coder that does not fit the model, a prompt that is too long, and a position beyond it.
    """

    _esm = STATIC / "tokens.js"
    _css = STATIC / "tokens.css"
    _chooses = ("prompt", "token", "feature")

    prompt = traitlets.Any("").tag(sync=True)
    coder = traitlets.Unicode().tag(sync=True)
    token = traitlets.Int(None, allow_none=True).tag(sync=True)
    feature = traitlets.Any(None).tag(sync=True)
    strip = traitlets.Enum(STRIPS, "strongest").tag(sync=True)
    sort = traitlets.Enum(ORDERS, "activation").tag(sync=True)
    target = traitlets.Unicode("").tag(sync=True)
    coders = traitlets.List(traitlets.Dict()).tag(sync=True)
    text = traitlets.Dict().tag(sync=True)
    losses = traitlets.List().tag(sync=True)
    fires = traitlets.List().tag(sync=True)
    detail = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        lm: LM,
        coder: SparseCoder | Sequence[SparseCoder] | Mapping[str, SparseCoder],
        prompt: Prompt = "",
        *,
        token: int | None = None,
        session: Session | None = None,
        n: int = 20,
        index: FeatureIndex | Sequence[FeatureIndex] | None = None,
    ) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self._lm, self._n, self._by_name = lm, n, _named(coder)
        for one in self._by_name.values():
            check_coder(lm, one)
        self._names = names_of(self._by_name, index)
        self._reading: PromptReading | None = None
        self._read_prompt: Any = ""
        self._why_not = ""  # there are no direct effects
        names = [{"name": name, "site": c.site.key, "d_sae": c.d_sae} for name, c in self._by_name.items()]
        super().__init__(session or Session(), coders=names, coder=names[0]["name"])
        selected = self.session.selection
        self._read(prompt or selected.prompt, token=None if prompt else selected.token)
        if token is not None:
            self.token = token
            self._show_token()
        self.observe(self._on_prompt, "prompt")
        self.observe(self._on_coder, "coder")
        self.observe(self._on_token, ["token", "target", "sort"])
        self.observe(self._on_feature, "feature")
        self.observe(self._on_strip, "strip")
        self.observe(self._rename, ["detail", "feature"])
        self._link()

    def _called(self) -> dict[int, str]:
        shown = [row["feature"] for row in self.detail.get("rows", [])]
        return self._names[self.coder].of(shown if self.feature is None else [*shown, self.feature])

    @property
    def _coder(self) -> SparseCoder:
        return self._by_name[self.coder]

    def _readable(self, prompt: Any) -> Any:
        prompt = checked_prompt(prompt, self._lm)
        if prompt:
            self._lm.tokenize(prompt)
        return prompt

    _valid_prompt = checked("prompt")(_readable)

    @checked("coder")
    def _valid_coder(self, name: str) -> str:
        if name not in self._by_name:
            raise ValueError(f"coder must be one of {', '.join(map(repr, self._by_name))}, got {name!r}")
        return name

    @checked("token")
    def _valid_token(self, token: int | None) -> int | None:
        last = len(self._reading or ()) - 1
        if token is not None and not 0 <= token <= last:
            raise ValueError(f"token must be a position from 0 to {last} in this prompt, got {token}")
        return token

    @checked("feature")
    def _valid_feature(self, feature: Any) -> int | None:
        return None if feature is None else self._coder.feature(feature)

    @checked("target")
    def _valid_target(self, target: str) -> str:
        check_text(target, "the target")
        if target:
            one_token(self._lm, target)
        return target

    def _read(self, prompt: Any, job: Job | None = None, token: int | None = None) -> None:
        """Read a prompt and show it. For a job the codes are shown first, and direct effects when the model has been
        read to its end; else one pass gives both."""
        prompt = self._readable(prompt)
        reading = read_prompt(self._lm, list(self._by_name.values()), prompt) if len(prompt) else None
        if reading is not None:
            if job is None:
                self._go_through(reading)
            reading.codes(self._coder)
        if job:
            job.check()
        with self._alone():
            self._reading, self._read_prompt = reading, prompt
            with self.hold_sync(), self.hold_trait_notifications():
                self.prompt, self.losses, self.detail = prompt, [], {}
                self.text = {} if reading is None else text_of(reading, self._coder)
                self.token = self._opening(token)
                self._shown = (self.token, self.target, self.sort)  # shown below: no observer needs to
            self._show_feature()
            self._show_token()
        if reading is not None and job:
            self._go_through(reading)
            with self._lock:
                if reading is self._reading:
                    self._show_token()
            job.check()
        self._show_losses()

    def _go_through(self, reading: PromptReading) -> None:
        self._why_not = ""
        try:
            reading.way_out()
        except ValueError as err:  # no direct effects with this model
            self._why_not = str(err)

    def _opening(self, token: int | None) -> int | None:
        """The token asked for if the prompt has it; else the last one that the mask keeps."""
        if self._reading is None or (token is not None and 0 <= token < len(self._reading)):
            return None if self._reading is None else token
        keep = self._reading.codes(self._coder).keep[0].nonzero().flatten()
        return int(keep[-1]) if len(keep) else len(self._reading) - 1

    @property
    def _is_through(self) -> bool:
        """Whether the model has been read to its end, or will not be."""
        return self._reading is None or self._reading.is_through or bool(self._why_not)

    def _show_token(self) -> None:
        reading, coder = self._reading, self._coder
        self._shown = (self.token, self.target, self.sort)
        if reading is None or self.token is None:
            self.detail = {}
            return
        why = self._why_not
        if not reaches_the_stream(written(coder)):
            why = f"No direct effects: this coder writes at {written(coder)!r}, which only later layers read."
        elif not self._is_through:
            why = "Direct effects follow when the model is through."
        self.detail = detail_of(reading, coder, self.token, self.target, self._n, self.sort, why)

    def _show_feature(self) -> None:
        shown = self._reading is not None and self.feature is not None
        self.fires = along(self._reading, self._coder, self.feature) if shown else []  # type: ignore[arg-type]

    def _show_losses(self) -> None:
        reading = self._reading
        if self.strip != "loss" or reading is None or self.losses or not self._is_through:
            return
        losses = along(reading)
        with self._lock:
            if reading is self._reading:
                self.losses = losses

    def _on_prompt(self, _: Any) -> None:
        if self.prompt != self._read_prompt:
            with self._reported():  # without the lock: other panels need not wait for the model
                self._read(self.prompt)

    def _on_coder(self, _: Any) -> None:
        with self._lock, self._reported():
            self.feature = None
            if self._reading is not None:
                self.text = text_of(self._reading, self._coder)
            self._show_token()

    def _on_token(self, _: Any) -> None:
        with self._lock, self._reported():
            if (self.token, self.target, self.sort) != self._shown:
                self._show_token()

    def _on_feature(self, _: Any) -> None:
        with self._lock, self._reported():
            self._show_feature()
            if self.feature is not None:
                self.strip = "feature"
            elif self.strip == "feature":
                self.strip = "strongest"

    def _on_strip(self, _: Any) -> None:
        with self._reported():
            self._show_losses()

    def _chosen(self) -> dict[str, Any]:
        chosen = {"prompt": self.prompt, "token": self.token}
        return chosen if self.feature is None else chosen | {"feature": self.feature, "site": self._coder.site.key}

    def _take(self, name: str) -> None:
        selected = self.session.selection
        if name == "prompt" and self._shared_prompt not in ("", self.prompt):
            # On a thread: the click that selected it does not wait for the model.
            threading.Thread(target=self._follow, args=(selected.prompt, selected.token), daemon=True).start()
        elif name == "token" and selected.prompt in ("", self.prompt):
            if selected.token in range(len(self._reading or ())):
                self.token = selected.token
        elif name in ("feature", "site"):
            names = [n for n, c in self._by_name.items() if self._feature_of(c.site.key, c.d_sae) is not None]
            if names:
                self.coder = self.coder if self.coder in names else names[0]
                self.feature = selected.feature

    def _follow(self, prompt: Prompt, token: int | None) -> None:
        try:
            self._read(prompt, token=token)
        except ValueError as err:
            self.error = str(err)

    @beside
    def read(self, job: Job, prompt: Any) -> None:
        """Read a prompt."""
        self._read(prompt, job)
        self.error = ""
        self._tell()

    @quick
    def steer(self) -> str:
        """Add ``sl.Steer`` of the chosen feature to the session's edits, at strength 1 (in units of f_scale)."""
        return self._add(Steer, strength=1.0)

    @quick
    def ablate(self) -> str:
        """Add ``sl.Ablate`` of the chosen feature to the session's edits."""
        return self._add(Ablate)

    def _add(self, kind: Callable[..., Edit], **settings: float) -> str:
        if self.feature is None:
            raise ValueError("no feature is chosen: choose one in the list first")
        edit = kind(self._coder, self.feature, **settings)
        if self._reading is not None:
            edit.writes(self._lm, self._reading.batch)  # ValueError where it could not act
        self.session.edits.add(edit)
        return f"{expression(edit)} is in session.edits, {len(self.session.edits)} on"

    def code(self) -> str:
        name = name_of(self._coder, "sae")
        lines = [*header(self._lm, **{name: self._coder}), "", f"prompt = {self.prompt!r}"]
        if self.prompt:
            lines.append(f"sl.features(lm, {name}, prompt).top({self._n})")
        if self.prompt and self.detail.get("effects"):
            given = f"on={self.target or None!r}, n={self._n}, by={self.sort!r}"
            lines.append(f"effects = sl.circuits.direct_effects(lm, {name}, prompt, {self.token}, {given})")
            lines.append("effects.to_pandas()")
        return "\n".join(lines)

    def _frozen(self) -> dict[str, Any]:
        if self._reading is None:
            return {"pages": {}, "firing": {}}
        with self._lock:
            pages = pages_of(self._reading, self._coder, self.token or 0, self.target, self._n, self.detail)
            chosen = [] if self.feature is None else [self.feature]
            names = self._names[self.coder].of([*pages["firing"], *chosen])
            losses = self.losses or (along(self._reading) if self._reading.is_through else [])
            return pages | {"names": {str(f): name for f, name in names.items()}, "losses": losses}

    def _html(self) -> Html:
        fires = self.fires if self.strip == "feature" else None
        return html_of(self.text, self.detail, fires, self.feature, self.names)

    def __repr__(self) -> str:
        what = f"{counted(len(self._reading or ()), 'token')}, token={self.token}, feature={self.feature}"
        return f"TokenFeatures({self._coder.site!r}, {what})"


def _named(coder: SparseCoder | Sequence[SparseCoder] | Mapping[str, SparseCoder]) -> dict[str, SparseCoder]:
    """{name: coder}. Of a list: the notebook's variable, else the site, numbered where several would be the same."""
    if isinstance(coder, Mapping):
        found = dict(coder)
    else:
        found = {}
        for one in [coder] if isinstance(coder, SparseCoder) else coder:
            sites = " ".join(site.key for site in getattr(one, "reads", ()))
            name = name_of(one, sites or type(one).__name__)
            found[name if name not in found else f"{name} ({len(found)})"] = one
    if not found or not all(isinstance(one, SparseCoder) for one in found.values()):
        raise ValueError("coder must be one sl.SparseCoder, or a list or a {name: coder} of some; sl.load gives one")
    return found
