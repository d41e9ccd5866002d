"""Labels and notes that a person writes on features, in a file beside the index."""

import json
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
