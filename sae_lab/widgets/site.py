"""All features of an index as a folder that a browser opens from disk: ``index.to_site(path)``.

The inspector is drawn by ``site.js``, which loads ``features.js`` (the list) and, when a feature is opened, the file of
its thousand. Each is a script that calls a function with JSON: from disk a page may load scripts, and nothing else.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sae_lab import __version__, cache
from sae_lab.feature_index import FeatureIndex
from sae_lab.feature_index.index import Context, FeatureView
from sae_lab.results import Name, counted, html_table, in_script, joined, tag

STATIC = Path(__file__).parent / "static"
SIZE = 1_000  # features in a file
COFIRING = 10  # as many as the inspector draws
WITHOUT_SCRIPTS = 100  # features in the table for a reader without scripts
_DATA = re.compile(r"features-\d+\.js")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'self'; style-src 'self'; \
img-src data:; base-uri 'none'; form-action 'none'">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="sae_lab {version}">
<title>{title}</title>
<link rel="stylesheet" href="site.css">
</head>
<body class="saelab-site">
<header>{header}</header>
<main id="panel"></main>
<noscript>{fallback}</noscript>
<script src="site.js"></script>
<script src="features.js"></script>
</body>
</html>
"""


def write(index: FeatureIndex, path: str | Path) -> Path:
    """Write the folder; see ``FeatureIndex.to_site``. Returns its ``index.html``."""
    folder = Path(path)
    if folder.is_file() or ((folder / "index.html").exists() and not (folder / "features-0.js").exists()):
        raise ValueError(f"{folder} is no folder that to_site wrote, and holds something else: name a new one")
    with cache.together(folder, valid="index.html") as temporary:
        for first in tqdm(range(0, index.d_sae, SIZE), "site", unit="k", dynamic_ncols=True):
            features = range(first, min(first + SIZE, index.d_sae))
            _script(temporary / f"features-{first}.js", "features", _chunk(index, features))
        _script(temporary / "features.js", "list", _listing(index))
        for name in ("site.js", "site.css"):
            (temporary / name).write_bytes((STATIC / name).read_bytes())
        (temporary / "index.html").write_text(_page(index), encoding="utf-8")
        written = {file.name for file in temporary.iterdir()}
    for file in folder.iterdir():
        if _DATA.fullmatch(file.name) and file.name not in written:  # of a larger coder that was here before
            file.unlink()
    return folder / "index.html"


def _script(file: Path, function: str, data: dict[str, Any]) -> None:
    file.write_text(f"saelab.{function}({in_script(data)})\n", encoding="utf-8")


class _Texts(dict[str, int]):
    """Texts by number, each once."""

    def numbers(self, texts: Iterable[str]) -> list[int]:
        return [self.setdefault(text, len(self)) for text in texts]


def _chunk(index: FeatureIndex, features: range) -> dict[str, Any]:
    texts = _Texts()
    packed = [_feature(index[i], texts) | {"note": index.notes[i]._asdict()} for i in features]
    return {"first": features.start, "texts": list(texts), "features": packed}


def _feature(view: FeatureView, texts: _Texts) -> dict[str, Any]:
    """What widgets/src/site/data.ts unpacks."""
    groups = [[group["label"], [_context(one, texts) for one in group["contexts"]]] for group in view.groups]
    same = ("feature", "density", "count", "mean", "max", "f_scale", "promoted", "suppressed", "lens_note",
            "explanations", "unit")  # fmt: skip
    return {name: _short(getattr(view, name)) for name in same} | {
        "histogram": view.histogram["counts"], "groups": groups, "neighbours": _short(view.neighbours),
        "cofiring": _short(view.cofiring[:COFIRING]),
    }  # fmt: skip


def _context(context: Context, texts: _Texts) -> list[Any]:
    fires = [part for place, value in enumerate(context.values) if value for part in (place, _short(value))]
    left_out = [place for place, value in enumerate(context.values) if value is None]
    packed = [context.document, context.position, context.peak, texts.numbers(context.tokens), fires, left_out]
    return [*packed, context.picture, context.area] if context.picture else packed


def _short(value: Any) -> Any:
    """The same with four digits of each number that is broken: a reader sees three."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [_short(one) for one in value] if isinstance(value, list | tuple) else value


def _listing(index: FeatureIndex) -> dict[str, Any]:
    """All features in few words."""
    texts, labels, said, explained = _Texts(), {}, {}, []
    for i in sorted({*index.notes, *index.explanations}):
        note, others = index.notes[i], [one.text for one in index.explanations[i]]
        heading, *rest = [text for text in (note.label, *others) if text] or [""]
        labels |= {i: heading} if heading else {}
        explained += [i] if heading and not note.label else []
        said |= {i: text} if (text := "\n".join(filter(None, [*rest, note.text]))) else {}
    try:
        norm = _short(np.asarray(index.norm).tolist())
    except ValueError:  # no coder at hand, or a store of codes
        norm = None
    return {
        "d_sae": index.d_sae, "tokens_seen": index.tokens_seen, "size": SIZE, "overview": index.density_histogram,
        "best": index.order("best").tolist(), "count": index.counts.tolist(), "norm": norm,
        **{name: _short(getattr(index, name).tolist()) for name in ("density", "mean", "max")},
        "tokens": [texts.numbers(index.top_tokens(i, 8)) for i in range(index.d_sae)],
        "texts": list(texts), "labels": labels, "explained": explained, "said": said,
    }  # fmt: skip


def _page(index: FeatureIndex) -> str:
    coder = "" if index.coder is None else f" of a {type(index.coder).__name__}"
    title = f"Features{coder} at {index.site.key} of {index.lm.id}"
    live = int((index.counts > 0).sum())
    text = index.store.identity.get("text", "")
    many, tokens = counted(index.d_sae, "feature"), counted(index.tokens_seen, index.unit)
    facts = f"{many}, of which {live:,} fire{'s' * (live == 1)} on the {tokens} of {text!r}."
    first = index.order("best")[:WITHOUT_SCRIPTS].tolist()
    rows = [(str(i), Name(index.notes.heading(i)), " ".join(map(repr, index.top_tokens(i)))) for i in first]
    table = [("feature", "label", "fires on most"), *rows]
    words = "This page needs scripts to show a feature; without them it lists the most readable ones:"
    return _PAGE.format(
        version=__version__, title=joined([title]), header=joined([tag("h1", title), tag("p", facts)]),
        fallback=html_table(table, header=words, wraps=True),
    )  # fmt: skip
