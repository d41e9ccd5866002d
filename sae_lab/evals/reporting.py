"""sl.evals.report: every eval that applies, for several coders side by side, each figure with its control."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lab import cache
from sae_lab.arguments import Count, as_annotated
from sae_lab.evals.sections import SECTIONS, VERSIONS, Inputs
from sae_lab.lm.model import LM
from sae_lab.lm.text import Documents, load_text
from sae_lab.results import Figure, Result
from sae_lab.saes.base import SparseCoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Report(Result):
    """Result of ``sl.evals.report``.

    Attributes:
        names: of the coders, in the order given.
        found: {eval: one list of ``Figure`` per coder}; empty where the eval does not apply.
        left_out: {(eval, coder's name): why it was not measured}.
        seconds: {eval: what it took, over all coders; 0 where all of it was kept from before}.
        settings: tokens, seed and text of this report.
    """

    names: tuple[str, ...]
    found: dict[str, tuple[list[Figure], ...]] = field(compare=False)
    left_out: dict[tuple[str, str], str] = field(compare=False)
    seconds: dict[str, float] = field(compare=False)
    settings: dict[str, Any] = field(compare=False)

    def figures(self) -> list[Figure]:
        """Of the first coder."""
        return [figure for lists in self.found.values() for figure in lists[0]]

    def __getitem__(self, eval: str) -> tuple[list[Figure], ...]:
        return self.found[eval]

    def value(self, measure: str, name: str | None = None) -> Figure:
        """The figure of that measure of a coder (None: the first). KeyError with the known ones."""
        at = 0 if name is None else self.names.index(name)
        known = {figure.measure: figure for lists in self.found.values() for figure in lists[at]}
        if measure not in known:
            raise KeyError(f"no measure {measure!r} here; there are: {', '.join(known)}")
        return known[measure]

    def to_pandas(self):
        """Long form: one row a figure of a coder."""
        import pandas as pd

        return pd.DataFrame([
            {"coder": name, "eval": title, **figure._asdict()}
            for title, lists in self.found.items()
            for name, figures in zip(self.names, lists, strict=True)
            for figure in figures
        ])  # fmt: skip

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("", "", *self.names, "[control]", "")]
        for title, lists in self.found.items():
            by_measure = [{figure.measure: figure for figure in figures} for figures in lists]
            measures = list(dict.fromkeys(measure for figures in by_measure for measure in figures))
            for number, measure in enumerate(measures):
                those = [figures.get(measure) for figures in by_measure]
                known = next(figure for figure in those if figure)
                control = next((f.control_name for f in those if f and not math.isnan(f.control)), "")
                rows.append((title if number == 0 else "", measure, *map(_cell, those), control, known.meaning))
        return rows

    def _footer(self) -> str:
        lines = [
            ", ".join(
                f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
                for key, value in self.settings.items()
            )
        ]
        lines += [f"{title} of {name}: not measured, {why}" for (title, name), why in self.left_out.items()]
        if (took := sum(self.seconds.values())) >= 1:  # what was kept is at hand at once
            lines.append(
                f"{took:.0f} s: " + ", ".join(f"{title} {s:.0f}" for title, s in self.seconds.items() if s >= 1)
            )
        return "\n".join(lines)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    control = "" if math.isnan(figure.control) else f" [{figure.control_text.split(' ')[0]}]"
    return figure.text + control


@as_annotated
def report(
    coders: SparseCoder | Sequence[SparseCoder] | Mapping[str, SparseCoder],
    lm: LM | None = None,
    text: Documents | None = None,
    *,
    evals: Iterable[str] | None = None,
    tokens: Count = 200_000,
    lm_tokens: Count = 8_192,
    seed: int = 0,
) -> Report:
    """Measure coders with every eval that applies to them, and print one table with the controls beside the values.

    Statistics of codes are taken on ``tokens`` tokens of ``text``, what needs the spliced model on ``lm_tokens`` tokens
    of ``text.held_out``; labelled texts and words come from where their evals have them. Each coder reads its own site;
    coders of one site share its harvest. What a section found is kept in the cache (kind "evals") by coder, model, text
    and settings: an interrupted report goes on where it was, and one with another coder measures only that one.

    Args:
        coders: in eval mode, trained at a site of ``lm``; a mapping gives them names.
        lm: the model; None is the bundled one. text: None is the bundled text.
        evals: some of ``sl.evals.SECTIONS``; None is all. An eval that cannot be had for a coder (a transcoder has no
            equal-norm error to x) is named under the table, with the reason.
        seed: of every draw: noise, splits, shuffled labels.

    Raises ValueError for an unknown eval, no coder, one in training mode, and one of another model.
    """
    named = _names(coders)
    chosen = _chosen(evals)
    lm = lm if lm is not None else LM()
    text = load_text([text] if isinstance(text, str) else text)
    for name, coder in named.items():
        _check(name, coder, lm)
    settings = {"tokens": tokens, "lm_tokens": lm_tokens, "seed": seed}
    sites = tuple(dict.fromkeys(site for coder in named.values() for site in coder.reads))
    shared: dict[Any, Any] = {}  # harvests and pooled texts, by site
    all_inputs = {
        name: Inputs(coder, lm, text, tokens, lm_tokens, seed, sites, shared) for name, coder in named.items()
    }
    found: dict[str, tuple[list[Figure], ...]] = {}
    left_out: dict[tuple[str, str], str] = {}
    seconds: dict[str, float] = {}
    for title in _progress(chosen):
        lists, took = [], 0.0
        for name, inputs in all_inputs.items():
            file = _file(title, inputs, settings)
            figures = _kept(file)
            if figures is None:
                begin = time.perf_counter()
                try:
                    figures = SECTIONS[title](inputs)
                except ValueError as err:  # this eval has a rule that this coder breaks, and says which
                    left_out[title, name], figures = str(err), []
                else:
                    _keep(file, figures)
                took += time.perf_counter() - begin
            lists.append(figures)
        if any(lists):
            found[title] = tuple(lists)
        seconds[title] = took
    shown = settings | {"text": text.name, "model": lm.id}
    return Report(tuple(named), found, left_out, seconds, shown)


def _names(coders: Any) -> dict[str, SparseCoder]:
    if isinstance(coders, SparseCoder):
        coders = [coders]
    if not isinstance(coders, Mapping):
        named: dict[str, SparseCoder] = {}
        for coder in coders:
            name = coder.meta.get("baseline") or (Path(coder.path).name if coder.path else type(coder).__name__)
            named[name if name not in named else f"{name} ({len(named) + 1})"] = coder
        coders = named
    if not coders:
        raise ValueError("report needs at least one coder: sl.evals.report([sae])")
    return dict(coders)


def _chosen(evals: Iterable[str] | None) -> list[str]:
    if isinstance(evals, str):
        evals = [evals]
    chosen = list(SECTIONS if evals is None else evals)
    if unknown := [title for title in chosen if title not in SECTIONS]:
        raise ValueError(f"unknown eval {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    return chosen


def _check(name: str, coder: SparseCoder, lm: LM) -> None:
    if coder.training:
        raise ValueError(f"coder {name!r} is in training mode: call sae.eval()")
    _ = coder.reads or coder.site  # one that knows no site is told so
    made_for = coder.meta.get("model_fingerprint")
    if made_for is not None and made_for != lm.fingerprint():
        raise ValueError(
            f"coder {name!r} was trained on {coder.meta.get('model')} (weights {made_for}), and {lm} has other "
            "weights: pass lm= the model it was trained on"
        )


def _progress(titles: list[str]):
    from tqdm.auto import tqdm

    bar = tqdm(titles, "report", unit="eval", dynamic_ncols=True)
    for title in bar:
        bar.set_postfix_str(title)
        yield title


def _file(title: str, inputs: Inputs, settings: dict[str, Any]) -> Path:
    coder = inputs.coder
    coder_is = [coder.fingerprint(), repr(coder.reads), repr(coder.writes), str(coder.mask)]
    identity = [VERSIONS.get(title, 1), title, *coder_is, inputs.lm.fingerprint(), inputs.text.fingerprint, settings]
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache.root() / "evals" / f"{title.replace(' ', '-')}-{name}.json"


def _kept(file: Path) -> list[Figure] | None:
    """What an earlier report found, None where there is nothing that can be read."""
    try:
        return [Figure(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        log.warning("%s is damaged: measured again", file)
        return None


def _keep(file: Path, figures: list[Figure]) -> None:
    cache.make_folder(file.parent)
    with cache.atomic(file) as temporary:
        temporary.write_text(json.dumps([figure._asdict() for figure in figures]), encoding="utf-8")
