"""The traits of TokenFeatures, and what each takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import traitlets

from sae_lab.circuits.direct import ORDERS, one_token
from sae_lab.circuits.prompt import PromptReading
from sae_lab.lm.model import LM
from sae_lab.saes.base import SparseCoder

from .coding import name_of
from .panel import STATIC, Panel

STRIPS = ("strongest", "active", "feature", "loss")


class Refused(traitlets.TraitError, ValueError):
    """A value that does not fit. A TraitError, so that traitlets rolls back; a ValueError, as everywhere here."""


class TokenTraits(Panel):
    """What the screen and Python share. A value that does not fit is refused and changes nothing."""

    _lm: LM
    _by_name: dict[str, SparseCoder]
    _reading: PromptReading | None

    _esm = STATIC / "tokens.js"
    _css = STATIC / "tokens.css"

    prompt = traitlets.Any("", help="a text, or a list of {role, content}").tag(sync=True)
    coder = traitlets.Unicode(help="the name of the coder on show").tag(sync=True)
    token = traitlets.Int(None, allow_none=True, help="the chosen position").tag(sync=True)
    feature = traitlets.Int(None, allow_none=True, help="the chosen feature").tag(sync=True)
    strip = traitlets.Enum(STRIPS, "strongest", help="what colours the tokens").tag(sync=True)
    sort = traitlets.Enum(ORDERS, "activation", help="order of the features").tag(sync=True)
    target = traitlets.Unicode("", help='the token that effects are on; "": the next one').tag(sync=True)
    coders = traitlets.List(traitlets.Dict(), help="the coders to choose from").tag(sync=True)
    text = traitlets.Dict(help="the tokens and their values").tag(sync=True)
    losses = traitlets.List(help="loss of each token, once asked for").tag(sync=True)
    fires = traitlets.List(help="the chosen feature's activation at each token").tag(sync=True)
    detail = traitlets.Dict(help="the chosen token's features").tag(sync=True)

    @property
    def _coder(self) -> SparseCoder:
        return self._by_name[self.coder]

    @traitlets.validate("prompt")
    def _fitting_prompt(self, proposal: Any) -> Any:
        return self._checked(proposal["value"])

    def _checked(self, prompt: Any) -> Any:
        """A prompt that can be read."""
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)):
            raise Refused(f"prompt must be a text or a list of {{'role', 'content'}}, got {type(prompt).__name__}")
        _require_whole(prompt if isinstance(prompt, str) else "".join(str(m.get("content")) for m in prompt))
        try:
            if len(prompt):
                self._lm.tokenize(prompt)
        except ValueError as err:
            raise Refused(str(err)) from err
        return prompt

    @traitlets.validate("coder")
    def _fitting_coder(self, proposal: Any) -> str:
        if proposal["value"] not in self._by_name:
            raise Refused(f"coder must be one of {', '.join(map(repr, self._by_name))}, got {proposal['value']!r}")
        return proposal["value"]

    @traitlets.validate("token")
    def _fitting_token(self, proposal: Any) -> int | None:
        value, last = proposal["value"], len(self._reading or ()) - 1
        if value is not None and not 0 <= value <= last:
            raise Refused(f"token must be a position from 0 to {last} in this prompt, got {value}")
        return value

    @traitlets.validate("feature")
    def _fitting_feature(self, proposal: Any) -> int | None:
        try:
            return None if proposal["value"] is None else self._coder.feature(proposal["value"])
        except ValueError as err:
            raise Refused(str(err)) from err

    @traitlets.validate("target")
    def _fitting_target(self, proposal: Any) -> str:
        _require_whole(proposal["value"])
        try:
            if proposal["value"]:
                one_token(self._lm, proposal["value"])
        except ValueError as err:
            raise Refused(str(err)) from err
        return proposal["value"]


def _require_whole(text: str) -> None:
    """A screen may send half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise Refused(f"the text holds half of a character at {err.start}: {text[err.start]!r}; type it again") from err


def named(coder: SparseCoder | Sequence[SparseCoder] | Mapping[str, SparseCoder]) -> dict[str, SparseCoder]:
    """{name: coder}. Of a list: the notebook's variable, else the site, numbered where several would be the same."""
    if isinstance(coder, Mapping):
        found = dict(coder)
    else:
        found = {}
        for one in [coder] if isinstance(coder, SparseCoder) else coder:
            name = name_of(one, _sites(one)) if isinstance(one, SparseCoder) else "?"
            found[name if name not in found else f"{name} ({len(found)})"] = one
    if not found or not all(isinstance(one, SparseCoder) for one in found.values()):
        raise ValueError("coder must be one sl.SparseCoder, or a list or a {name: coder} of some; sl.load gives one")
    return found


def _sites(coder: SparseCoder) -> str:
    return " ".join(site.key for site in coder.reads) or type(coder).__name__
