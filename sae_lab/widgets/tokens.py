"""TokenFeatures: a prompt token by token, which features are active there, and what they do to the next token."""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from sae_lab.circuits.prompt import PromptReading, check_coder, reaches_the_stream, read_prompt, written
from sae_lab.edits.edit import Ablate, Edit, Steer
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Chat
from sae_lab.results import Html
from sae_lab.saes.base import SparseCoder
from sae_lab.widgets.coding import expression, header, name_of
from sae_lab.widgets.panel import Job, beside, quick
from sae_lab.widgets.session import Session
from sae_lab.widgets.token_traits import TokenTraits, named
from sae_lab.widgets.token_views import along, detail_of, html_of, pages_of, text_of


class TokenFeatures(TokenTraits):
    """A prompt as a strip of tokens; a chosen token lists its active features with their direct effects, a chosen
    feature colours the strip and becomes the session's selection. Needs no index.

        session = sl.Session()
        sl.TokenFeatures(lm, sae, "The capital of France is", session=session)

    Args:
        coder: an SAE or transcoder that knows its site; or several, a list or {name: coder}, to choose from on screen.
        prompt: a text, or chat messages. "": that of the session's selection.
        token: the position to open (0 is the prefix token); None: the last that counts.
        session: shared with other widgets; None: a new one. n: so many features are listed.

    Traits, each of which can be read, set and observed: ``prompt``; ``coder``, its name; ``token``, a position;
    ``feature``, an int or None; ``strip``, what colours the tokens: "strongest" (activation), "active" (how many
    features), "feature" (the chosen one's activation) or "loss" (nats); ``sort``: "activation" or "effect"; ``target``:
    the token whose logit the effects are on, "": the prompt's next one. Read only: ``coders``, ``text``, ``losses``,
    ``fires``, ``detail``: what is shown; ``error``.

    Direct effects (``circuits.direct_effects``) need a coder that writes to the residual stream or at attn_z, and a
    model on this machine; else the features alone are listed, and why is said.

    Raises ValueError for a coder that does not fit the model, a prompt that is too long, a position that is not there.
    """

    def __init__(
        self,
        lm: LM,
        coder: SparseCoder | Sequence[SparseCoder] | Mapping[str, SparseCoder],
        prompt: str | Chat = "",
        *,
        token: int | None = None,
        session: Session | None = None,
        n: int = 20,
    ) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self._lm, self._n, self._by_name = lm, n, named(coder)
        for one in self._by_name.values():
            check_coder(lm, one)
        self.session = Session() if session is None else session
        self._reading: PromptReading | None = None
        self._read_prompt: Any = ""
        self._why_not = ""  # there are no direct effects
        self._work = threading.RLock()  # what is shown changes as a whole, on whichever thread
        names = [{"name": name, "site": c.site.key, "d_sae": c.d_sae} for name, c in self._by_name.items()]
        super().__init__(coders=names, coder=names[0]["name"])
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
        self.session.selection.observe(self._on_selection, ["prompt", "token", "feature", "site"])

    # ---- reading

    def _read(self, prompt: Any, job: Job | None = None, token: int | None = None) -> None:
        """Read a prompt and show it. For the screen the codes come first, and direct effects when the model is through;
        else one pass does both."""
        reading = read_prompt(self._lm, list(self._by_name.values()), self._checked(prompt)) if len(prompt) else None
        if reading is not None:
            if job is None:
                self._go_through(reading)
            reading.codes(self._coder)
        if job:
            job.check()
        with self._work:
            self._reading, self._read_prompt = reading, prompt
            with self.hold_sync(), self.hold_trait_notifications():
                self.prompt, self.losses, self.detail = prompt, [], {}
                self.text = {} if reading is None else text_of(reading, self._coder)
                self.token = self._opening(token)
                self._shown = (self.token, self.target, self.sort)  # is about to be: once is enough
            self._show_feature()
            self._show_token()
        if reading is not None and job:
            self._finish(reading, job)
        with self._work:
            self._show_losses()

    def _finish(self, reading: PromptReading, job: Job) -> None:
        """Read the model to its end, and show the direct effects. Meanwhile clicks are answered without them."""
        self._go_through(reading)
        job.check()
        with self._work:
            if reading is self._reading:
                self._show_token()

    def _go_through(self, reading: PromptReading) -> None:
        self._why_not = ""
        try:
            reading.way_out()
        except ValueError as err:  # no direct effects with this model
            self._why_not = str(err)

    def _opening(self, token: int | None) -> int | None:
        """The token asked for, where there is one; else the last that counts."""
        if self._reading is None or (token is not None and 0 <= token < len(self._reading)):
            return None if self._reading is None else token
        keep = self._reading.codes(self._coder).keep[0].nonzero().flatten()
        return int(keep[-1]) if len(keep) else len(self._reading) - 1

    def _show_token(self) -> None:
        reading, coder = self._reading, self._coder
        self._shown = (self.token, self.target, self.sort)
        if reading is None or self.token is None:
            self.detail = {}
            return
        why = self._why_not
        if not reaches_the_stream(written(coder)):
            why = f"No direct effects: this coder writes at {written(coder)!r}, which only later layers read."
        elif not why and not reading.is_through:
            why = "Direct effects follow when the model is through."
        self.detail = detail_of(reading, coder, self.token, self.target, self._n, self.sort, why)

    def _show_feature(self) -> None:
        shown = self._reading is not None and self.feature is not None
        self.fires = along(self._reading, self._coder, self.feature) if shown else []  # type: ignore[arg-type]

    def _show_losses(self) -> None:
        if self.strip == "loss" and self._reading is not None and not self.losses:
            self.losses = along(self._reading)

    # ---- traits that change

    def _on_prompt(self, _: Any) -> None:
        if self.prompt != self._read_prompt:
            with self._reported():
                self._read(self.prompt)
                self._select()

    def _on_coder(self, _: Any) -> None:
        self.feature = None
        with self._reported(), self._work:
            if self._reading is not None:
                self.text = text_of(self._reading, self._coder)
            self._show_token()

    def _on_token(self, _: Any) -> None:
        with self._reported(), self._work:
            if (self.token, self.target, self.sort) == self._shown:
                return
            self._show_token()
        self._select()

    def _on_feature(self, _: Any) -> None:
        with self._reported(), self._work:
            self._show_feature()
            if self.feature is not None:
                self.strip = "feature"
            elif self.strip == "feature":
                self.strip = "strongest"
        self._select()

    def _on_strip(self, _: Any) -> None:
        with self._reported(), self._work:
            self._show_losses()

    # ---- the session

    def _select(self) -> None:
        """Tell the session; no lock may be held, since other widgets answer. A chat is no text that they could take
        up."""
        picked = {"prompt": self.prompt if isinstance(self.prompt, str) else "", "token": self.token}
        if self.feature is not None:
            picked |= {"feature": self.feature, "site": self._coder.site.key}
        self.session.selection.pick(**picked)

    def _on_selection(self, change: Any) -> None:
        selected = self.session.selection
        if selected.prompt and selected.prompt != self.prompt:
            # A kernel that handles a click elsewhere does not wait for the model.
            threading.Thread(target=self._follow, args=(selected.prompt, selected.token), daemon=True).start()
            return
        if change.name == "token" and selected.token is not None and selected.token < len(self._reading or ()):
            self.token = selected.token
        if change.name not in ("feature", "site") or selected.feature is None:
            return
        names = [name for name, c in self._by_name.items() if c.site.key == selected.site]
        if names and selected.feature < self._by_name[names[0]].d_sae:
            self.coder = self.coder if self.coder in names else names[0]
            self.feature = selected.feature

    def _follow(self, prompt: str, token: int | None) -> None:
        try:
            self._read(prompt, token=token)
        except ValueError as err:
            self.error = str(err)

    # ---- calls from the screen

    @beside
    def read(self, job: Job, prompt: Any) -> None:
        """Read a prompt."""
        self._read(prompt, job)
        self.error = ""
        self._select()

    @beside
    def show(self, job: Job, **what: Any) -> None:
        """Set some of: token, target, sort, strip, coder, feature."""
        if unknown := set(what) - {"token", "target", "sort", "strip", "coder", "feature"}:
            raise ValueError(f"the screen cannot set {', '.join(sorted(unknown))}")
        for name, value in what.items():
            job.check()
            setattr(self, name, value)
        reading = self._reading
        if reading is not None and not reading.is_through and not self._why_not:
            self._finish(reading, job)  # it is under way, or was cancelled half way

    @quick
    def steer(self) -> str:
        """Add the chosen feature to the session's edits, at the strength of its strongest firings."""
        return self._add(Steer(self._coder, self._chosen(), strength=1.0))

    @quick
    def ablate(self) -> str:
        """Add to the session's edits that the chosen feature is taken out."""
        return self._add(Ablate(self._coder, self._chosen()))

    def _chosen(self) -> int:
        if self.feature is None:
            raise ValueError("no feature is chosen: choose one in the list first")
        return self.feature

    def _add(self, edit: Edit) -> str:
        if self._reading is not None:
            edit.writes(self._lm, self._reading.batch)  # ValueError where it could not act
        self.session.edits.add(edit)
        return f"{expression(edit, name_of(edit.coder, 'sae'))} is in session.edits, {len(self.session.edits)} on"

    # ---- without a kernel

    def code(self) -> str:
        name = name_of(self._coder, "sae")
        lines = [*header(self._lm, **{name: self._coder}), "", f"prompt = {self.prompt!r}"]
        if not self.prompt:
            return "\n".join(lines)
        lines += [f"sl.features(lm, {name}, prompt).top({self._n})"]
        if self.detail.get("effects"):
            on = repr(self.target) if self.target else None
            lines += [
                "effects = sl.circuits.direct_effects(",
                f"    lm, {name}, prompt, {self.token}, on={on}, n={self._n}, by={self.sort!r}",
                ")",
                "effects.to_pandas()",
            ]
        return "\n".join(lines)

    def _frozen(self) -> dict[str, Any]:
        if self._reading is None:
            return {"pages": {}, "firing": {}}
        with self._work:
            pages = pages_of(self._reading, self._coder, self.token or 0, self.target, self._n, self.detail)
            return pages | {"losses": self.losses or (along(self._reading) if self._reading.is_through else [])}

    def _html(self) -> Html:
        return html_of(self.text, self.detail, self.fires if self.strip == "feature" else None, self.feature)

    def __repr__(self) -> str:
        what = f"{len(self._reading or ())} tokens, token={self.token}, feature={self.feature}"
        return f"TokenFeatures({self._coder.site!r}, {what})"

    def close(self) -> None:
        with contextlib.suppress(AttributeError, ValueError):  # an __init__ that raised; a second call
            self.session.selection.unobserve(self._on_selection, ["prompt", "token", "feature", "site"])
        super().close()
