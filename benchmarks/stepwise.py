"""Benchmarks in steps of many rows: each row is written as soon as it is measured, and the next call goes on there."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Step = Callable[[list[Any]], Iterable[Any]]  # of the rows that are done: the others, one after the other


def known(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def measure(
    path: Path, head: Mapping[str, Any], steps: Mapping[str, Step], settings: Mapping[str, Any], anew: bool = False
) -> dict[str, Any]:
    """The file's content, after these steps: ``head``, and for each step its settings, its rows and whether they are
    whole. A step begins anew where its settings have changed, or with ``anew``."""
    found = {**known(path), **head}
    settings = json.loads(json.dumps(settings))
    path.parent.mkdir(exist_ok=True)

    def write() -> None:
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")

    for name, step in steps.items():
        before = found.get(name, {})
        fresh = anew or {key: before.get(key) for key in settings} != settings
        found[name] = part = {**settings, "rows": []} if fresh else before
        for row in step(list(part["rows"])):
            part["rows"].append(row)
            print(name, str(row)[:400], flush=True)
            write()
        part["whole"] = True
        write()
    return found
