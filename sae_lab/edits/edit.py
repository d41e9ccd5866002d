"""Edits: change a model through a coder's codes, in ``lm.logits``, ``lm.loss``, ``lm.read`` and ``lm.generate``.

An edit turns codes z into z' for some features. With ``error="keep"`` (SAELens: use_error_term) it adds W_dec of
(z' - z) to the activation, so that the reconstruction error stays, and an edit that changes no code leaves logits
bit-equal. With ``error="drop"`` the activation becomes the reconstruction from z'.

Classes here hold and check the user's settings; ``grouping`` joins the edits of a list that act together; the model
runs the functions of ``rules``, bound to a few tensors. So an edit runs in any nnsight trace, also on a server without
sae_lab:

    steer = sl.Steer(sae, 7).inside(lm, prompt)
    with model.trace(lm.tokenize(prompt).ids, remote=True):
        model.model.layers[8].output = steer(model.model.layers[8].output)
"""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab import noting
from sae_lab.activations.reading import read_some, require_fits
from sae_lab.arguments import as_annotated
from sae_lab.edits import grouping, rules
from sae_lab.edits.conditions import Condition, Firing, require_scale
from sae_lab.edits.vector import Vector
from sae_lab.results import counted
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.io import opening
from sae_lab.types import Site, TokenBatch, Write

if TYPE_CHECKING:
    from sae_lab.lm.network import Network

Positions = int | slice | Sequence[int] | str | Callable[[str], bool] | None
Numbers = int | slice | Sequence[int] | None
Prompts = str | Sequence[str] | Tensor | tuple[Any, ...] | Mapping[str, Any]  # or the inputs of a Net
When = Sequence[Any] | None  # (what, level, scope), see ``WHERE``
Rule = Callable[..., Tensor]  # (z "tokens features", rows, positions) -> z', see ``rules``
Change = Callable[..., Tensor]  # (x "tokens d_out", read "tokens d_in", ids, rows, positions, at) -> x'

SHOWN = 60  # tokens in an error
DRAWS = 1 << 14  # of resampled codes; a token's row and position choose one of them

# The arguments of every edit; ``Edit.__init_subclass__`` adds them to each class's docstring.
CODER = """\
    coder: a coder with a site. A transcoder's edit reads codes where the coder reads, and acts where it writes.
"""
WHERE = """\
    positions: where it acts: None, everywhere; an int, a slice or a list of absolute positions (0 is the prefix;
        padding and generation do not shift them); a str, the tokens with this text (" fox": see ``lm.vocabulary``); or
        a function (text of a token) -> bool. Padding, and tokens that the coder's mask leaves out, are never edited.
    rows: prompts of the batch, by number from 0: an int, a slice or a list; None, all.
    steps: passes of a generation: 0 is the pass over the prompt, n the pass over the n-th new token; None, all.
    error: the reconstruction error, x - x_hat: "keep" it, or "drop" it.
    when: None, always; or (what, level, scope): where the code of ``what`` exceeds level times its f_scale. what: a
        feature of this edit's coder (7), one of another coder ((sae, 7)), or a ``sl.Vector``, at this edit's site or an
        earlier one; its code is of the activation that reaches its site, before any edit there. scope: "token", at
        those tokens alone; "so far", from the first of them on; "prompt", everywhere if the prompt has one (CAST, Lee
        et al. 2024, arXiv:2409.05907); outside ``lm.generate`` and ``lm.stream`` the whole text is the prompt.
        ``edit.firing(lm, texts)`` measures how often it holds where it should not.
"""


@as_annotated
@dataclass(frozen=True, repr=False)
class Edit:
    """Base of all edits: ``lm.generate(prompt, edits=[sl.Steer(sae, 7), sl.Ablate(sae, 9)])``, and so in ``lm.logits``,
    ``lm.loss``, ``lm.read``, ``lm.stream`` and ``lm.compare``.

    How the edits of a list act:

    - Edits of one coder at one site are a group. They act on the codes of the activation at the site, one after the
      other in the order of the list, and the change of the codes is written once. So ``[Clamp(a), Clamp(b)]`` is
      ``Clamp([a, b])``, and the second edit of a feature starts from the first one's z'. A group keeps the
      reconstruction error, or drops it: all its edits must agree.
    - An edit of another coder at that site ends the group, and so does an edit of the activation itself (``Project``):
      the edits that follow are a new group, which encodes the changed activation. (A transcoder reads at another site,
      so its new group starts from the codes that its earlier edits have set.)
    - The order of edits at different sites does not matter: an edit reads what edits at earlier sites have written.
    - The coder's mask, applied to the model without edits, decides which tokens an edit may change. A mask's largest
      norm is compared with the activation before the first edit at the site. If an edit at an earlier site changes that
      activation too, one extra pass without edits gives the activation, and a new token counts unless it is special.
    """

    coder: SparseCoder
    positions: Positions = field(default=None, kw_only=True)
    rows: Numbers = field(default=None, kw_only=True)
    steps: Numbers = field(default=None, kw_only=True)
    error: str = field(default="keep", kw_only=True)
    when: When = field(default=None, kw_only=True)

    ERRORS = ("keep", "drop")
    ON_CODES = True  # whether it changes codes (``rule``), or the activation itself (``change``)
    IN_F_SCALE = False  # whether its setting is in units of f_scale: its features must have one

    def __init_subclass__(cls) -> None:
        """Add the arguments that every edit has to the section "Args:" of the class's docstring."""
        if cls.__doc__ and WHERE not in cls.__doc__:
            text, _, own = inspect.cleandoc(cls.__doc__).partition("\n\nArgs:\n")
            coder = "" if "vector" in cls.__annotations__ else CODER
            cls.__doc__ = f"{text}\n\nArgs:\n{coder}{own + chr(10) if own else ''}{WHERE}"

    def __post_init__(self):
        if self.error not in self.ERRORS:
            raise ValueError(f"error must be {' or '.join(map(repr, self.ERRORS))}, got {self.error!r}")
        if not isinstance(self.positions, str) and not callable(self.positions):
            _check_numbers("positions", self.positions, "count from the prefix token (0)")
        _check_numbers("rows", self.rows, "count the prompts from 0")
        _check_numbers("steps", self.steps, "count passes of generation, 0 is the prompt's")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
        if not self.features:
            raise ValueError("an edit needs at least one feature")
        _ = self.condition  # raises for one that cannot be right

    @property
    def condition(self) -> Condition | None:
        """``when``, understood. ValueError for anything that is no condition."""
        return None if self.when is None else Condition.of(self.when, None if hasattr(self, "vector") else self.coder)

    @property
    def subjects(self) -> list[SparseCoder | Vector]:
        """The coder or vector that the edit is made with; then that of its condition, unless it is the same."""
        first, what = getattr(self, "vector", self.coder), self.condition and self.condition.what
        other = what[0] if isinstance(what, list | tuple) else what
        return [first] if other is first or not isinstance(other, SparseCoder | Vector) else [first, other]

    def firing(self, lm: "Network", texts: Sequence[str]) -> Firing:
        """``edit.firing(lm, held_out)``: how often ``when`` holds on texts where it should not, each read as a prompt,
        per token and per text. ValueError for an edit without ``when``."""
        if self.condition is None:
            raise ValueError("this edit has no when=, so it acts on every text: give it a condition")
        self.condition.check(lm, self.write_site)
        return self.condition.firing(lm, texts)

    @property
    def features(self) -> list[int]:
        """The numbers of the features that the edit changes, checked and without repeats."""
        feature = getattr(self, "feature", None)
        if feature is None:
            return list(range(self.coder.d_sae))
        many = feature if isinstance(feature, Sequence) else [feature]
        return list(dict.fromkeys(self.coder.feature(i) for i in many))

    @property
    def names(self) -> noting.Names:
        """What the coder's features are called."""
        return noting.Names(self.coder)

    def rule(self, lm: "Network", batch: TokenBatch) -> Rule:
        """A function of ``rules`` that makes z' from z, with its settings bound."""
        raise NotImplementedError

    @property
    def read_site(self) -> Site:
        """Where codes are read. ValueError for a coder that reads several sites."""
        coder = self.coder
        if len(coder.reads) > 1 or len(coder.writes) > 1:
            raise ValueError(
                f"an edit reads one site and writes one; this coder reads {coder.reads} and writes {coder.writes}: "
                "take an SAE or a transcoder of one of them"
            )
        return coder.site

    @property
    def write_site(self) -> Site:
        """The site whose activations change."""
        return self.coder.writes[0] if self.coder.writes else self.read_site

    def writes(self, lm: "Network", batch: TokenBatch, new: int = 0) -> list[Write]:
        """The writes of this edit alone, for these prompts and at most ``new`` new tokens.

        ValueError if a site has another width, a feature no f_scale, or the prompts lack a row or position of the edit.
        """
        return self.together([self], lm, batch, new)

    @staticmethod
    def together(edits: Sequence[Any], lm: "Network", batch: TokenBatch, new: int = 0) -> list[Write]:
        """The writes of a list of edits. ValueError as from ``writes`` of each edit, and for edits that exclude each
        other."""
        return grouping.together(edits, lm, batch, new)

    def inside(self, lm: "Network", prompts: Prompts, *more: "Edit") -> Callable[..., Tensor]:
        """The edit as a function for your own nnsight trace of these prompts' token ids (``lm.tokenize(prompts).ids``),
        here or on a server: (x "batch pos d" where it writes; for a transcoder also x where it reads; with ``when``
        also x where the condition reads) -> x'.

        more: edits of the same coder, which form one group with this one. If the coder's mask has a largest norm,
        one pass over the prompts finds the tokens that the mask keeps.
        """
        from sae_lab.lm import remote

        batch = lm._batch(prompts, self.write_site)
        writes = grouping.together([self, *more], lm, batch, alone=False)
        if len(writes) > 1:
            raise ValueError(
                "inside makes one function, of edits of one coder at one site; these are several groups: call it for "
                "each, and call the functions in that order"
            )
        remote.register_travelling()
        return partial(rules.inside, tokens=batch.plain(), edit=writes[0].fn)

    def check(self, lm: "Network", batch: TokenBatch, new: int = 0) -> None:
        """ValueError if the edit cannot act on these prompts and ``new`` new tokens."""
        _ = self.read_site  # raises unless the coder has exactly one site
        require_fits(self.coder, lm)
        if self.coder.training:
            raise ValueError("an edit needs the coder in eval mode, where a token's codes are its own: call sae.eval()")
        self._check_places(lm, batch, new)
        if self.IN_F_SCALE:
            require_scale(self.coder, self.features)
        if self.condition is not None:
            self.condition.check(lm, self.write_site)

    def amount(self) -> Float[Tensor, " features"] | None:
        """What the edit adds to every token's codes, if the codes do not matter (they are then not made); else None."""
        return None

    def error_of_another_run(self, lm: "Network") -> dict[str, Tensor] | None:
        """The reconstruction error that replaces the coder's, see ``rules.coded``; None: the coder's error stays."""
        return None

    def change(self) -> Change:
        """A function of ``rules`` that makes x' from x, with its settings bound, for an edit without codes."""
        raise NotImplementedError

    @property
    def _scale(self) -> Float[Tensor, " features"]:
        return self.coder.f_scale[self.features]

    def _check_places(self, lm: "Network", batch: TokenBatch, new: int) -> None:
        """ValueError if the prompts lack a row or position that the edit names."""
        rows = batch.row_numbers.tolist()
        if missing := [r for r in _listed(self.rows) if r not in rows]:
            raise ValueError(f"rows={self.rows} names prompt {missing[0]}, and there are {len(rows)}, from 0 on")
        for row, length in zip(rows, (batch.mask.sum(1) + new).tolist(), strict=True):
            beyond = [p for p in _listed(self.positions) if p >= length]
            if beyond and bool(rules.among(torch.tensor(row), self.rows)):
                raise ValueError(
                    f"position {beyond[0]} is beyond prompt {row}, whose last is {length - 1}"
                    + (f" ({counted(new, 'new token')} counted)" if new else "")
                    + ": count from the prefix token (0), or name the prompts that are long enough with rows="
                )
        lengths = (batch.mask.sum(1)[rules.among(batch.row_numbers, self.rows)] + new).tolist()
        part = self.positions if isinstance(self.positions, slice) else None
        if part and part.stop is not None and lengths and not range(max(lengths))[part]:  # open: "from there on"
            raise ValueError(
                f"positions={self.positions} holds no position of these prompts, the longest of which ends at "
                f"{max(lengths) - 1}: count from the prefix token (0)"
            )
        if (wanted := self._wanted(lm)) is not None:
            self._check_text(lm, batch, wanted, new)

    def _check_text(self, lm: "Network", batch: TokenBatch, wanted: Tensor, new: int) -> None:
        """ValueError if ``positions`` names no token of these prompts or, with new tokens, of the vocabulary."""
        ours = rules.among(batch.row_numbers, self.rows)
        ids = batch.ids[ours][batch.mask[ours]]
        if not len(ids) or bool(wanted[ids].any()) or (new and bool(wanted.any())):
            return
        shown = [lm.vocabulary[i] for i in ids.tolist()]
        listing = ", ".join(map(repr, shown[:SHOWN])) + (f" and {len(shown) - SHOWN} more" if shown[SHOWN:] else "")
        raise ValueError(
            f"no token of {'this model' if new else 'these prompts'} reads as positions={self.positions!r} says; those "
            f"of the prompts read {listing}: give such a text, space and all, or positions by number"
        )

    def place(self, lm: "Network") -> dict[str, Any]:
        """The tokens that the edit names, see ``rules.named``, and its condition."""
        wanted = self._wanted(lm)
        positions = self.positions if wanted is None else None
        when = self.condition and self.condition.plain(lm)
        return {"rows": self.rows, "steps": self.steps, "positions": positions, "wanted": wanted, "when": when}

    def _wanted(self, lm: "Network") -> Tensor | None:
        """For each token id whether ``positions`` means it; None where positions are given by number."""
        where = self.positions
        if not isinstance(where, str) and not callable(where):
            return None
        if callable(where):
            return torch.tensor([bool(where(text)) for text in lm.vocabulary])
        wanted = torch.zeros(len(lm.vocabulary), dtype=torch.bool)
        wanted[lm._reading.get(where, [])] = True
        return wanted

    def measured(self, x: Float[Tensor, "batch pos d_in"]) -> dict[str, Float[Tensor, "batch pos"]]:
        """The codes of the edit's features, by name, for activations x at the site that the edit reads."""
        codes = self.coder.encode(x.to(self.coder.W_dec.device))
        return {f"{self.read_site.key} #{feature}": codes[..., feature].cpu() for feature in self.features}

    def _settings(self) -> dict[str, Any]:
        """The settings that differ from the defaults, by name."""
        named = [f for f in fields(self) if f.name not in ("coder", "vector")]
        return {f.name: v for f in named if (v := getattr(self, f.name)) != f.default}

    def __repr__(self) -> str:
        at = repr(self.coder.site) if self.coder.reads else type(self.coder).__name__
        at = repr(self.vector) if isinstance(self, Push) else at
        told = self._settings() | ({} if self.condition is None else {"when": self.condition})
        shown = {name: repr(value) for name, value in told.items()}
        if "feature" in shown:
            named = ", ".join([self.names.numbered(feature) for feature in self.features])
            shown["feature"] = f"[{named}]" if isinstance(getattr(self, "feature", 0), Sequence) else named
        return f"{type(self).__name__}({', '.join([at, *(f'{k}={v}' for k, v in shown.items())])})"

    def to_json(self) -> str:
        """The edit as text; ``sl.Edit.from_json`` makes it again. The text names a coder by the path it was saved to or
        loaded from, and a hash of its weights; vectors stand in it whole.

        ValueError for a coder that was never saved, and for positions given by a function.
        """
        subject = self.subjects[0]
        kept = {"vector" if isinstance(subject, Vector) else "coder": _kept(subject)}
        if callable(self.positions):
            raise ValueError(
                "a function of tokens cannot be written down: give positions by number or as a token's text"
            )
        settings = {k: _plain(v) for k, v in self._settings().items()}
        if self.condition is not None:
            settings["when"] = [_kept(self.condition.what), self.condition.level, self.condition.scope]
        return json.dumps({"edit": type(self).__name__, **kept, **settings})

    @staticmethod
    def from_json(text: str, coder: SparseCoder | None = None) -> "Edit":
        """An edit from the text of ``to_json``. coder: the edit's coder, if it has one; None loads it from the path in
        the text.

        ValueError for any other text, and for a coder with other weights.
        """
        try:
            found = json.loads(text)
            kind = EDITS[found.pop("edit")]
            kept = dict(found.pop("vector" if kind is Push else "coder"))
            what, level, scope = found.pop("when", None) or (None, None, None)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise ValueError(f"this is no edit of sae_lab ({err!r}): pass what edit.to_json() returned") from err
        subject = _loaded(kept, coder)
        if what is not None:
            same = isinstance(what, dict) and "path" in what and what.get("fingerprint") == kept.get("fingerprint")
            found["when"] = [_loaded(what, subject if same else None), level, scope]
        unknown = set(found) - {f.name for f in fields(kind)}
        if unknown:
            raise ValueError(f"{kind.__name__} knows no {', '.join(sorted(unknown))}")
        settings: dict[str, Any] = {k: slice(*v["slice"]) if isinstance(v, dict) else v for k, v in found.items()}
        return kind(subject, **settings)


@as_annotated
@dataclass(frozen=True, repr=False)
class FeatureEdit(Edit):
    """Base of the edits of one feature or several."""

    feature: int | Sequence[int]


@as_annotated
@dataclass(frozen=True, repr=False)
class Steer(FeatureEdit):
    """``sl.Steer(sae, 7, strength=2.0)``: push along a feature's direction, z' = z + strength·f_scale.

    Args:
        feature: one or several.
        strength: 1 adds f_scale, the activation that the strongest 0.1 % of the feature's firings reach. 1 to 2 steers
            and keeps text fluent; above 4 most text breaks.
    """

    strength: float = 1.0
    IN_F_SCALE = True

    def amount(self) -> Tensor:
        return self.strength * self._scale

    def rule(self, lm: "Network", batch: TokenBatch) -> Rule:
        return partial(rules.added, amount=self.amount())


@as_annotated
@dataclass(frozen=True, repr=False)
class Clamp(FeatureEdit):
    """``sl.Clamp(sae, 7, value=1.0)``: hold a feature at a level on every token, z' = value·f_scale.

    Args:
        feature: one or several.
        value: in units of f_scale, as the strength of ``Steer``.
    """

    value: float = 1.0
    IN_F_SCALE = True

    def rule(self, lm: "Network", batch: TokenBatch) -> Rule:
        return partial(rules.held, value=self.value * self._scale)


@as_annotated
@dataclass(frozen=True, repr=False)
class Scale(FeatureEdit):
    """``sl.Scale(sae, 7, factor=0.5)``: multiply a feature's codes, z' = factor·z.

    Args:
        feature: one or several.
        factor: 1 changes nothing, 0 ablates.
    """

    factor: float = 1.0

    def rule(self, lm: "Network", batch: TokenBatch) -> Rule:
        return partial(rules.multiplied, factor=self.factor)


@as_annotated
@dataclass(frozen=True, repr=False)
class Ablate(FeatureEdit):
    """``sl.Ablate(sae, 7)``: take a feature out: z' = 0, or a code that is independent of the token.

    Args:
        feature: one or several.
        to: "zero"; "mean", the mean code over the reference; or "resample", the codes at tokens drawn from the
            reference (several features together, from the same token).
        reference: prompts, for "mean" and "resample".
        seed: of the draws; with it, a token's row and position fix its draw.
    """

    to: str = "zero"
    reference: Prompts | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.to not in ("zero", "mean", "resample"):
            raise ValueError(f"to must be 'zero', 'mean' or 'resample', got {self.to!r}")
        if (self.to == "zero") != (self.reference is None):
            raise ValueError(
                f"Ablate(to={self.to!r}) takes "
                + ("no reference" if self.to == "zero" else "reference=, prompts whose codes replace the feature's")
            )

    def rule(self, lm: "Network", batch: TokenBatch) -> Rule:
        if self.reference is None:
            return partial(rules.held, value=torch.zeros(len(self.features)))
        codes, keep, _ = _codes_of(self, lm, self.reference)
        seen = codes[keep]
        if not len(seen):
            raise ValueError("every token of the reference is left out by the coder's mask: give longer prompts")
        if self.to == "mean":
            return partial(rules.held, value=seen.mean(0))
        draws = torch.randint(len(seen), (DRAWS,), generator=torch.Generator().manual_seed(self.seed))
        return partial(rules.drawn, seen=seen, draws=draws)


@as_annotated
@dataclass(frozen=True, repr=False)
class Patch(Edit):
    """``sl.Patch(sae, "another prompt")``: activation patching; z' = the codes of another run at the same row and
    position.

    Args:
        source: prompts of the other run: one for all rows, or one for each row; of the same token lengths as the
            prompts, unless ``positions`` is given.
        feature: one or several; None, all.
        error: also "patch", which takes the source's reconstruction error too; with all features the activation then
            becomes the source's.
    """

    source: Prompts
    feature: int | Sequence[int] | None = None

    ERRORS = ("keep", "drop", "patch")

    def error_of_another_run(self, lm: "Network") -> dict[str, Tensor] | None:
        if self.error != "patch":
            return None
        batch = lm._batch(self.source, self.read_site)
        acts, _ = lm.run(batch, list(dict.fromkeys([self.read_site, self.write_site])), logits=False)
        read, target, device = acts[self.read_site], acts[self.write_site], self.coder.b_dec.device
        with torch.no_grad():
            x_hat = self.coder(read.to(device), batch.ids.to(device)).x_hat
        return {"wrong": target.cpu() - x_hat.cpu(), "there": _codes_of(self, lm, self.source)[1]}

    def rule(self, lm: "Network", batch: TokenBatch) -> Rule:
        codes, keep, other = _codes_of(self, lm, self.source)
        lengths = other.mask.sum(1).tolist()
        rows = batch.row_numbers.tolist()
        if len(lengths) not in (1, int(batch.row_numbers.max()) + 1):
            raise ValueError(
                f"Patch has {counted(len(lengths), 'source')} for {counted(len(rows), 'prompt')}: "
                "give one for all, or one for each"
            )
        for row, length in zip(rows, batch.mask.sum(1).tolist(), strict=True):
            theirs = lengths[row if len(lengths) > 1 else 0]
            if not bool(rules.among(torch.tensor(row), self.rows)):
                continue
            if self.positions is None and length != theirs:
                raise ValueError(
                    f"prompt {row} has {counted(length, 'token')} and its source {theirs}: a patch takes the codes "
                    "at the same position, so give prompts of equal token lengths (lm.tokens(prompt) shows them), or "
                    "positions="
                )
            if beyond := [p for p in _listed(self.positions) if p >= theirs]:
                has = counted(theirs, "token")
                raise ValueError(f"position {beyond[0]} is beyond the source of prompt {row}: it has {has}")
        return partial(rules.of_another_run, codes=codes, keep=keep)


@as_annotated
@dataclass(frozen=True, repr=False)
class Splice(Edit):
    """``sl.Splice(sae)``: z' = z, so that the reconstruction replaces the activation (with error="keep" nothing
    changes)."""

    error: str = field(default="drop", kw_only=True)

    def rule(self, lm: "Network", batch: TokenBatch) -> Rule:
        return partial(rules.multiplied, factor=1.0)

    def measured(self, x: Tensor) -> dict[str, Tensor]:
        return {}


@as_annotated
@dataclass(frozen=True, repr=False)
class Project(FeatureEdit):
    """``sl.Project(sae, [4, 5])``: x' = x without its part in the span of the features' directions, whichever features
    wrote it.

    Args:
        feature: one or several.
        error: only "keep", since no codes are made.
    """

    ERRORS = ("keep",)
    ON_CODES = False

    def change(self) -> Change:
        basis = torch.linalg.qr(self.coder.W_dec[self.features].detach().T.double())[0].float()  # d_out x directions
        return partial(rules.projected, basis=basis)


@as_annotated
@dataclass(frozen=True, repr=False)
class Push(Edit):
    """``sl.Push(vector, strength=2.0)``: push along a vector, x' = x + strength·f_scale·u, as ``sl.Steer`` along a
    feature. It keeps the reconstruction error, since a vector reconstructs nothing.

    Args:
        vector: an ``sl.Vector`` with a scale, see ``vector.calibrated``.
        strength: 1 adds f_scale, the code that the strongest 0.1 % of the tokens above the mean reach.
    """

    coder: SparseCoder = field(init=False, repr=False)
    vector: Vector
    strength: float = 1.0
    ERRORS = ("keep",)

    def __post_init__(self):
        object.__setattr__(self, "coder", self.vector.coder)
        super().__post_init__()

    def check(self, lm: "Network", batch: TokenBatch, new: int = 0) -> None:
        self.vector.require_fits(lm, measured=True)
        super().check(lm, batch, new)

    def amount(self) -> Tensor:
        return self.strength * self._scale

    def rule(self, lm: "Network", batch: TokenBatch) -> Rule:
        return partial(rules.added, amount=self.amount())

    def measured(self, x: Tensor) -> dict[str, Tensor]:
        return {f"{self.read_site.key} {self.vector.name}": codes for codes in super().measured(x).values()}


EDITS = {cls.__name__: cls for cls in (Steer, Clamp, Scale, Ablate, Patch, Splice, Project, Push)}


def _kept(what: Any) -> Any:
    """A coder, one with a feature, a feature of the edit's own, or a vector, as JSON holds it."""
    if isinstance(what, Vector | int):
        return what.to_dict() if isinstance(what, Vector) else what
    coder, feature = (what, {}) if isinstance(what, SparseCoder) else (what[0], {"feature": int(what[1])})
    if coder.path is None:
        raise ValueError("this coder was never saved, and the text names it by its path: call sae.save(path) first")
    return {"path": coder.path, "fingerprint": coder.fingerprint(), **feature}


def _loaded(kept: Any, coder: SparseCoder | None) -> Any:
    """What ``_kept`` was given. coder: None loads it from its path."""
    if not isinstance(kept, dict) or "direction" in kept:
        return Vector.from_dict(kept) if isinstance(kept, dict) else kept
    if not isinstance(path := kept.get("path"), str):
        raise ValueError(f"this is no edit of sae_lab (its coder is {kept!r:.60}): pass what edit.to_json() returned")
    coder = opening.load(path) if coder is None else coder
    if coder.fingerprint() != kept.get("fingerprint"):
        raise ValueError(
            f"this edit was made with a coder of weights {kept.get('fingerprint')}, this one ({path}) has "
            f"{coder.fingerprint()}: a feature's number means nothing in another coder; pass coder= the right one"
        )
    return (coder, kept["feature"]) if "feature" in kept else coder


def _codes_of(edit: Edit, lm: "Network", prompts: Prompts) -> tuple[Tensor, Tensor, TokenBatch]:
    """(codes "rows pos features" of the edit's features, which tokens the mask keeps, the tokens) of other prompts."""
    batch = lm._batch(prompts, edit.read_site)
    return *read_some(lm, edit.coder, edit.features, batch), batch


def _listed(chosen: Any) -> list[int]:
    """The row or position numbers that a setting names one by one."""
    if chosen is None or isinstance(chosen, slice | str) or callable(chosen):
        return []
    return [chosen] if isinstance(chosen, int) else list(chosen)


def _check_numbers(name: str, chosen: Any, rule: str) -> None:
    if isinstance(chosen, slice) and chosen.step is not None and chosen.step < 1:
        raise ValueError(f"a slice of {name} runs forward, with a step of at least 1, got {chosen}")
    numbers: Iterable[Any] = [chosen.start, chosen.stop] if isinstance(chosen, slice) else _listed(chosen)
    if any(n is not None and n < 0 for n in numbers):
        raise ValueError(f"{name} {rule} and are never negative, got {chosen}")


def _plain(value: Any) -> Any:
    """A setting as JSON holds it."""
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    return list(value) if isinstance(value, range | tuple) else str(value) if isinstance(value, Path) else value
