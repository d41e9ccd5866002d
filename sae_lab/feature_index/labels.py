"""What to show for token ids: the whole vocabulary, decoded once when the index is built."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sae_lab import files
from sae_lab.activations.store import Store
from sae_lab.lm.model import LM
from sae_lab.lm.network import Network
from sae_lab.lm.tokens import labels_alone


class Labels:
    """Labels as ``lm.token_strings`` gives them. Kept in ``labels.json``: ``alone``, of a token by itself or at the
    start of a text, and ``within``, behind another token (some tokenizers drop a space at the start)."""

    def __init__(self, lm: Network, alone: list[str], within: list[str]):
        self._lm, self.alone, self.within = lm, alone, within
        self.lower = [label.lower() for label in alone]  # what a search looks through

    @classmethod
    def decode(cls, lm: Network, store: Store | None = None) -> "Labels":
        """Decode the vocabulary; of a network that is no language model, name the places of an item."""
        if not isinstance(lm, LM):
            assert store is not None
            names = place_names(store.identity["grid"], store.identity["context"])
            return cls(lm, names, names)
        size = len(lm.tokenizer)
        return cls(lm, labels_alone(lm.tokenizer, size), lm.vocabulary[:size])

    @classmethod
    def read(cls, lm: Network, file: Path, blocks: str, remedy: str) -> "Labels":
        """blocks: the file's checksums. ValueError with the remedy."""
        try:
            data = files.read_bytes(file, "MOST_RUN")
            files.check_blocks(io.BytesIO(data), blocks)
            found = files.parse_json(data)
            lists = [found[key] for key in ("alone", "within")]
            if not all(isinstance(labels, list) and all(isinstance(t, str) for t in labels) for labels in lists):
                raise ValueError("its labels are no text")
            return cls(lm, *lists)
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ValueError(f"{file} is damaged ({err}): {remedy}") from err

    def write(self, file: Path) -> None:
        file.write_text(json.dumps({"alone": self.alone, "within": self.within}))

    def __getitem__(self, token_id: int) -> str:
        """A token's label by itself. A model may have more ids than its tokenizer knows."""
        return self.alone[token_id] if token_id < len(self.alone) else self._alien([token_id])[0]

    def of(self, ids: Sequence[int], prefixed: bool = False) -> list[str]:
        """The labels of tokens that stand together; ``prefixed`` says that the first one is no part of the text."""
        first = 1 + prefixed
        if max(ids) < len(self.within):
            return [self.alone[i] for i in ids[:first]] + [self.within[i] for i in ids[first:]]
        return self._alien(ids, prefixed)

    def _alien(self, ids: Sequence[int], prefixed: bool = False) -> list[str]:
        """Labels of ids beyond those that were decoded: of a model with more ids than its tokenizer, or of an item with
        more places than the first."""
        if not isinstance(self._lm, LM):
            return [str(i) for i in ids]
        return [t.label for t in self._lm.token_strings(ids, prefixed)]


def place_names(grid: Sequence[int], places: int) -> list[str]:
    """What places are called: their number, or (row, column) and the like where they have several axes."""
    if len(grid) < 2:
        return [str(i) for i in range(places)]
    return [f"({', '.join(map(str, np.unravel_index(i, grid)))})" for i in range(places)]
