"""An index as the files that Neuronpedia imports: ``index.to_neuronpedia(path)``.

Its importer (apps/webapp/app/api/admin/import/route.ts and lib/db/import.ts) takes, from a folder <model>/<source>, one
object each of ``model.jsonl``, ``sourceset.jsonl`` and ``source.jsonl``, and the rows of three tables: ``features``
(table Neuron), ``activations`` and ``explanations``, a thousand features a file. A file's first line has its columns.
"""

import gzip
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sae_lab import cache
from sae_lab.feature_index import neuronpedia
from sae_lab.feature_index.summaries import QUARTERS
from sae_lab.lm.model import LM
from sae_lab.results import counted

SIZE = 1_000  # features in a file
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_SOURCE = re.compile(r"(\d{1,4}|e)-([a-z0-9][a-z0-9._-]{0,120})")


def write(
    index: Any, said: dict[int, dict[str, Any]], path: str | Path, model: str | None, layer: str | None, author: str
) -> Path:
    """See ``FeatureIndex.to_neuronpedia``. said: what the log of notes holds of each feature."""
    site = index.site
    if not isinstance(index.lm, LM):
        raise ValueError("Neuronpedia shows features of language models: hand on this index with index.to_site(path)")
    model = model if model is not None else re.sub(r"[^a-z0-9._-]+", "-", index.lm.id.split("/")[-1].lower())
    number = "e" if site.layer is None else site.layer
    layer = layer if layer is not None else f"{number}-{site.kind.replace('_', '-')}-{index.d_sae}"
    source = _SOURCE.fullmatch(layer)
    if not _NAME.fullmatch(model):
        raise ValueError(f"model must be lower-case letters, digits, dots and dashes, got {model!r}: say model='mine'")
    if source is None or (source[1] != str(number) and site.layer is not None):
        raise ValueError(
            f"layer must be the number of the layer, {number}, and a name in lower case, got {layer!r}: say "
            f"layer='{number}-res-mine'"
        )
    folder = Path(path) / model / layer
    if folder.exists():
        raise ValueError(f"{folder} is there already: delete it, or name another path")
    own = {"modelId": model, "layer": layer}
    with cache.together(folder) as temporary:
        for kind in ("features", "activations", "explanations"):
            (temporary / kind).mkdir()
        for name, record in _about(index, model, layer, source[2], author).items():
            _write(temporary / f"{name}.jsonl", [neuronpedia.as_line(record)])
        for batch, first in enumerate(tqdm(range(0, index.d_sae, SIZE), "neuronpedia", unit="k", dynamic_ncols=True)):
            features, activations, explanations = [], [], []
            for i in range(first, min(first + SIZE, index.d_sae)):
                view = index[i]
                record = {**own, "index": str(i), "sourceSetName": source[2], **_feature(view)}
                features.append(neuronpedia.as_line(record))
                activations += [neuronpedia.as_line(one) for one in _activations(index, view, own)]
                explanations += neuronpedia.lines(i, said.get(i, {}), model, layer)
            _write(temporary / "features" / f"batch-{batch}.jsonl.gz", features)
            for kind, rows in (("activations", activations), ("explanations", explanations)):
                if rows:  # the importer cannot read a file without a first line
                    _write(temporary / kind / f"batch-{batch}.jsonl.gz", rows)
    return folder


def _write(file: Path, lines: Iterable[bytes]) -> None:
    data = b"".join(lines)
    file.write_bytes(gzip.compress(data, 5, mtime=0) if file.suffix == ".gz" else data)


def _about(index: Any, model: str, layer: str, name: str, author: str) -> dict[str, dict[str, Any]]:
    """The model, the set of sources, and the source: what must be there before their features can be."""
    creator, facts = {"creatorId": neuronpedia.CREATOR, "visibility": "PUBLIC"}, index.store.identity
    coder = "A sparse coder" if index.coder is None else f"{type(index.coder).__name__},"
    return {
        "model": {
            "id": model, "displayName": model, "displayNameShort": model, "owner": index.lm.id.partition("/")[0],
            "layers": index.lm.n_layers, "neuronsPerLayer": 0,
            "instruct": re.search(r"-(it|instruct|chat)\b", model) is not None, **creator,
        },
        "sourceset": {
            "modelId": model, "name": name, "creatorName": author,
            "description": f"{coder} {counted(index.d_sae, 'feature')} at {index.site.key}", **creator,
        },
        "source": {
            "id": layer, "modelId": model, "setName": name, "hasDashboards": True, "dataset": facts.get("text"),
            "num_prompts": int(index.store.contexts(np.array([index.tokens_seen - 1]))[0]) + 1,
            "num_tokens_in_prompt": facts.get("context"), "notes": f"{counted(index.tokens_seen, 'token')}, by sae_lab",
            **creator,
        },
    }  # fmt: skip


def _feature(view: Any) -> dict[str, Any]:
    """A row of the table Neuron. What no index has (histograms of logits, correlations) is left to its defaults."""
    edges = np.asarray(view.histogram["edges"])
    return {
        "creatorId": neuronpedia.CREATOR, "maxActApprox": _short(view.max), "frac_nonzero": view.density,
        **{f"pos_{n}": part for n, part in zip(("str", "values"), _columns(view.promoted), strict=True)},
        **{f"neg_{n}": part for n, part in zip(("str", "values"), _columns(view.suppressed), strict=True)},
        "freq_hist_data_bar_heights": view.histogram["counts"],
        "freq_hist_data_bar_values": [_short(v) for v in (edges[1:] + edges[:-1]) / 2],
        "topkCosSimIndices": _columns(view.neighbours)[0], "topkCosSimValues": _columns(view.neighbours)[1],
    }  # fmt: skip


def _columns(pairs: list[tuple[Any, float]]) -> tuple[list[Any], list[float]]:
    return [first for first, _ in pairs], [_short(value) for _, value in pairs]


def _activations(index: Any, view: Any, own: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of the table Activation: the strongest contexts (binMin -1), then some of each quarter of the activations.
    A token that the mask leaves out has 0."""
    values, found = np.sort(index.activations(view.feature)[1])[::-1], []
    for group in view.groups:
        low, high, share = -1.0, float(view.max), -1.0
        if group["label"] != "top":
            quarter = (100 - int(re.findall(r"\d+", group["label"])[1])) * QUARTERS // 100
            part = values[len(values) * quarter // QUARTERS : len(values) * (quarter + 1) // QUARTERS]
            low, high, share = float(part[-1]), float(part[0]), len(part) / view.tokens_seen
        for context in group["contexts"]:
            along = [value or 0.0 for value in context.values]
            row = {**own, "index": str(view.feature), "tokens": context.tokens, "values": along}
            best = int(np.argmax(along))
            found.append({
                "id": neuronpedia.identity("activation", *own.values(), view.feature, context.document,
                                           context.position, context.tokens),
                **row, "maxValue": along[best], "maxValueTokenIndex": best, "minValue": min(along),
                "creatorId": neuronpedia.CREATOR, "binMin": _short(low), "binMax": _short(high),
                "binContains": share, "qualifyingTokenIndex": context.peak,
            })  # fmt: skip
    return found


def _short(value: float) -> float:
    return round(float(value), 5)
