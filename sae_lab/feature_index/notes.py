"""Labels and notes that a person writes on features, and what others say they are, in files beside the index."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sae_lab import cache


class Note(NamedTuple):
    """label: a few words, which a search finds. text: as long as you like."""

    label: str = ""
    text: str = ""


class Notes:
    """``notes.json`` of an index: {feature: Note}. Each change is on disk, whole, before ``write`` returns."""

    def __init__(self, file: Path):
        self._file = file
        self._notes: dict[int, Note] = {}
        if not file.exists():
            return
        try:
            self._notes = {int(k): Note(**v) for k, v in json.loads(file.read_text(encoding="utf-8")).items()}
        except (ValueError, TypeError, AttributeError) as err:
            raise ValueError(
                f"{file} holds no notes of sae_lab ({err}): mend it, or move it away and the index opens without"
            ) from err

    def __getitem__(self, feature: int) -> Note:
        return self._notes.get(int(feature), Note())

    def __len__(self) -> int:
        return len(self._notes)

    def __iter__(self):
        return iter(sorted(self._notes))

    def write(self, feature: int, label: str | None = None, text: str | None = None) -> Note:
        """Set a feature's label or text, None: as it was; both empty takes the note away."""
        old = self[feature]
        note = Note(old.label if label is None else label.strip(), old.text if text is None else text)
        if note == Note():
            self._notes.pop(int(feature), None)
        else:
            self._notes[int(feature)] = note
        content = {str(k): note._asdict() for k, note in sorted(self._notes.items())}
        with cache.atomic(self._file) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        return note

    def find(self, text: str) -> list[int]:
        """Features whose label or text contains this, case ignored."""
        needle = text.strip().lower()
        return [i for i in self if needle in f"{self._notes[i].label}\n{self._notes[i].text}".lower()]

    def to_pandas(self):
        """One row a feature: feature, label, text."""
        import pandas as pd

        return pd.DataFrame([{"feature": i, **self[i]._asdict()} for i in self], columns=["feature", "label", "text"])


class Said(NamedTuple):
    """What somebody (``source``: an explainer, or a site's labels) says of a feature, with its scores if it has any."""

    text: str
    source: str = ""
    scores: dict[str, float] = {}  # noqa: RUF012 (never written to)


class Explanations:
    """``explanations.json`` of an index: {feature: what others say of it}. Your own labels stand in ``Notes`` alone."""

    def __init__(self, file: Path):
        self._file = file
        self._said: dict[int, list[Said]] = {}
        if not file.exists():
            return
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            self._said = {int(feature): [Said(**said) for said in several] for feature, several in content.items()}
        except (ValueError, TypeError, AttributeError) as err:
            raise ValueError(
                f"{file} holds no explanations of sae_lab ({err}): mend it, or move it away and the index opens without"
            ) from err

    def __getitem__(self, feature: int) -> list[Said]:
        return list(self._said.get(int(feature), []))

    def __len__(self) -> int:
        return len(self._said)

    def __iter__(self):
        return iter(sorted(self._said))

    def label(self, feature: int) -> str:
        """The first of its texts, "" where nobody said anything."""
        return next((said.text for said in self[feature]), "")

    def write(self, said: Mapping[int, list[Said]]) -> None:
        """Put these first; what the same source said before of the same feature goes. All are on disk, whole, before
        this returns."""
        for feature, several in said.items():
            sources = {one.source for one in several}
            kept = [one for one in self[feature] if one.source not in sources]
            self._said[int(feature)] = [*several, *kept]
        content = {
            str(feature): [one._asdict() | {"scores": _plain(one.scores)} for one in several]
            for feature, several in sorted(self._said.items())
        }
        with cache.atomic(self._file) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")

    def find(self, text: str) -> list[int]:
        """Features of which somebody says this, case ignored."""
        needle = text.strip().lower()
        return [i for i in self if any(needle in one.text.lower() for one in self._said[i])]


def _plain(scores: Mapping[str, float]) -> dict[str, float]:
    """Those that are numbers: JSON has no NaN."""
    return {name: round(float(value), 4) for name, value in scores.items() if math.isfinite(value)}
