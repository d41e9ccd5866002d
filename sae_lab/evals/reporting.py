"""sl.evals.report: every eval that applies, for several coders side by side, each figure with its control."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from sae_lab import cache
from sae_lab.arguments import Count, as_annotated
from sae_lab.evals.sections import SECTIONS, VERSION, Inputs
from sae_lab.lm.model import LM
from sae_lab.lm.text import Documents, load_text
from sae_lab.results import Figure, Result, result
from sae_lab.saes.base import SparseCoder

log = logging.getLogger(__name__)


@result
class Report(Result):
    """Result of ``sl.evals.report``.

    Attributes:
        found: {eval: a list of ``Figure`` for each coder}, empty where the eval does not apply.
        left_out: {(eval, coder's name): why it was not measured}.
        seconds: {eval: how long it took for all coders; 0 if the cache had all of it}.
    """

    names: tuple[str, ...]
    found: dict[str, tuple[list[Figure], ...]] = field(compare=False)
    left_out: dict[tuple[str, str], str] = field(compare=False)
    seconds: dict[str, float] = field(compare=False)
    settings: dict[str, Any] = field(compare=False)

    def figures(self) -> list[Figure]:
        """All figures of the first coder."""
        return [figure for lists in self.found.values() for figure in lists[0]]

    def __getitem__(self, eval: str) -> tuple[list[Figure], ...]:
        return self.found[eval]

    def value(self, measure: str, name: str | None = None) -> Figure:
        """A coder's figure (None: the first coder's) of a measure. KeyError, listing the measures, for another name."""
        coder = 0 if name is None else self.names.index(name)
        known = {figure.measure: figure for lists in self.found.values() for figure in lists[coder]}
        if measure not in known:
            raise KeyError(f"no measure {measure!r} here; there are: {', '.join(known)}")
        return known[measure]

    @property
    def _each(self) -> list[dict[str, Any]]:
        return [
            {"coder": name, "eval": title, **figure._asdict()}
            for title, lists in self.found.items()
            for name, figures in zip(self.names, lists, strict=True)
            for figure in figures
        ]

    _records = "_each"

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("", "", *self.names, "[control]", "")]
        for title, lists in self.found.items():
            by_key = [{figure.key or figure.measure: figure for figure in figures} for figures in lists]
            for number, key in enumerate(dict.fromkeys(key for known in by_key for key in known)):
                those = [known.get(key) for known in by_key]
                there = [figure for figure in those if figure]
                control = next((f.control_name for f in there if not math.isnan(f.control)), "")
                name = (title * (number == 0), there[0].measure)
                cells = [
                    "–" if f is None else f.text + (f" [{f.control_text.split()[0]}]" if f.control_text else "")
                    for f in those
                ]
                rows.append((*name, *cells, control, there[0].meaning))
        return rows

    _below = "{_settings}{_reasons}{_times}"

    @property
    def _settings(self) -> str:
        return ", ".join(f"{key} {v:,}" if isinstance(v, int) else f"{key} {v}" for key, v in self.settings.items())

    @property
    def _reasons(self) -> str:
        return "".join(f"\n{title} of {name}: not measured, {why}" for (title, name), why in self.left_out.items())

    @property
    def _times(self) -> str:
        took = sum(self.seconds.values())  # 0 for cached results
        each = ", ".join(f"{title} {s:.0f}" for title, s in self.seconds.items() if s >= 1)
        return f"\n{took:.0f} s: {each}" if took >= 1 else ""


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
    """``sl.evals.report({"a": sae, "b": other}, lm, text)``: every eval that applies, in one table with controls.

    Statistics of codes are taken on ``tokens`` tokens of ``text``, evals of the spliced model on ``lm_tokens`` tokens
    of ``text.held_out``; probing and absorption use texts and words of their own. Each coder reads its site; coders of
    one site share its harvest. Results are kept in the cache (kind "evals") by coder, model, text and settings: an
    interrupted report continues, and a report with one more coder measures only that one.

    Args:
        coders: in eval mode, trained at a site of ``lm``; a mapping gives them names.
        lm: the model; None is the bundled one. text: None is the bundled text.
        evals: some of ``sl.evals.SECTIONS``; None is all. An eval that does not apply to a coder (a transcoder has no
            equal-norm error to x) is named under the table, with the reason.
        seed: of every draw: noise, splits, shuffled labels.

    Raises ValueError for an unknown eval, no coder, one in training mode, and one of another model.
    """
    from tqdm.auto import tqdm

    named = _names(coders)
    chosen = list(SECTIONS if evals is None else evals)
    if unknown := [title for title in chosen if title not in SECTIONS]:
        raise ValueError(f"unknown eval {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    lm = lm if lm is not None else LM()
    text = load_text([text] if isinstance(text, str) else text)
    for name, coder in named.items():
        if coder.training:
            raise ValueError(f"coder {name!r} is in training mode: call sae.eval()")
        _ = coder.reads or coder.site  # raises for a coder without a site
        made_for = coder.meta.get("model_fingerprint")
        if made_for is not None and made_for != lm.fingerprint():
            raise ValueError(
                f"coder {name!r} was trained on {coder.meta.get('model')} (weights {made_for}), and {lm} has other "
                "weights: pass lm= the model it was trained on"
            )
    settings = {"tokens": tokens, "lm_tokens": lm_tokens, "seed": seed}
    sites = tuple(dict.fromkeys(site for coder in named.values() for site in coder.reads))
    shared: dict[Any, Any] = {}  # harvests and pooled texts, by site
    inputs_of = {name: Inputs(coder, lm, text, **settings, sites=sites, shared=shared) for name, coder in named.items()}
    found, left_out, seconds = {}, {}, {}
    for title in (bar := tqdm(chosen, "report", unit="eval", dynamic_ncols=True)):
        bar.set_postfix_str(title)
        lists, took = [], 0.0
        for name, inputs in inputs_of.items():
            file = _file(title, inputs, settings)
            figures = _kept(file)
            if figures is None:
                begin = time.perf_counter()
                try:
                    figures = SECTIONS[title](inputs)
                except ValueError as err:  # the eval does not apply to this coder, and says why
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
    if not coders:
        raise ValueError("report needs at least one coder: sl.evals.report([sae])")
    if isinstance(coders, Mapping):
        return dict(coders)
    named: dict[str, SparseCoder] = {}
    for coder in coders:
        name = coder.meta.get("baseline") or (Path(coder.path).name if coder.path else type(coder).__name__)
        named[name if name not in named else f"{name} ({len(named) + 1})"] = coder
    return named


def _file(title: str, inputs: Inputs, settings: dict[str, Any]) -> Path:
    coder = inputs.coder
    coder_is = [coder.fingerprint(), repr(coder.reads), repr(coder.writes), str(coder.mask)]
    identity = [VERSION, title, *coder_is, inputs.lm.fingerprint(), inputs.text.fingerprint, settings]
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache.root() / "evals" / f"{title.replace(' ', '-')}-{name}.json"


def _kept(file: Path) -> list[Figure] | None:
    """The figures of an earlier report; None without a readable file."""
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
