"""An agent by rules for SAGE's prompts (``sage_explain``), which needs no network."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile, islice, takewhile

import numpy as np


@dataclass(frozen=True)
class ScriptedAgent:
    """``sage_explain(sae, lm, index, 812, ScriptedAgent())``: an agent by rules, without a network, for features that
    fire on one word, or on one word behind another.

    Its hypotheses are the word on which most examples peak, alone and behind each word that precedes it more often in
    examples than in other texts. It reads the prompts only, as a language model would. It confirms a hypothesis with
    which at least three quarters of the trials of either kind agree, and never refines one.
    """

    seed: int = 0

    FILLERS = (
        "yesterday we saw the", "there was once a", "he said something about the", "near the house stood a",
        "nobody had ever seen the", "in the end it was the", "they wrote about a", "it began with the",
    )  # fmt: skip

    def __call__(self, prompt: str) -> str:
        task = re.findall(r"^TASK: (\w+)", prompt, re.MULTILINE)[-1]
        return getattr(self, f"_{task}")(prompt)

    def _suppose(self, prompt: str) -> str:
        examples = [line.split("|", 1)[1] for line in _block(prompt, "EXAMPLES")]
        others = [set(words_of(line.split("|", 1)[1])) for line in _block(prompt, "OTHER TEXTS")]
        peaks = Counter(w for e in examples for w in words_of(_peak(e))[:1])
        found = []
        for peak, _ in peaks.most_common(2):
            before = [set(words_of(e.split("[[")[0])) - {peak} for e in examples if words_of(_peak(e))[:1] == [peak]]
            counts = Counter(w for words in before for w in words)
            excess = {w: c / len(before) - sum(w in o for o in others) / max(1, len(others)) for w, c in counts.items()}
            best = sorted((w for w, e in excess.items() if e >= 0.5), key=lambda w: (-excess[w], w))
            found += [f'the word "{peak}"', *(f'the word "{peak}" behind the word "{w}"' for w in best[:4])]
        return "\n".join(f"HYPOTHESIS: {statement}" for statement in found[:5])

    def _design(self, prompt: str) -> str:
        words = self._words(prompt, "HYPOTHESIS")
        fires = [f"FIRES: {text}" for text in self._texts(words, 4)]
        if len(words) == 1:
            silent = self._texts(["thing"], 4)
        else:
            silent = [*self._texts(words[:1], 2), *self._texts(words[1:], 1), *self._texts(words[::-1], 1)]
        return "\n".join([*fires, *(f"SILENT: {text}" for text in silent)])

    def _judge(self, prompt: str) -> str:
        results = re.findall(r"^expected (\w+), measured \d+ \((\w+)\)", prompt, re.MULTILINE)
        right = {kind: [a == b for a, b in results if a == kind] for kind in ("FIRES", "SILENT")}
        confirmed = all(np.mean(v) >= 0.75 for v in right.values() if v)
        return f"VERDICT: {'confirmed' if confirmed else 'refuted'}"

    def _conclude(self, prompt: str) -> str:
        listed = re.findall(r"^(\w+) (\d+)/(\d+) \| (.+)$", prompt.rsplit("HYPOTHESES (", 1)[1], re.MULTILINE)
        best = max(listed, key=lambda h: (h[0] == "confirmed", int(h[1]) / max(1, int(h[2]))))
        return f"EXPLANATION: {best[3]}"

    def _write(self, prompt: str) -> str:
        return "\n".join(f"TEXT: {text}" for text in self._texts(self._words(prompt, "EXPLANATION"), 10))

    def _predict(self, prompt: str) -> str:
        first, *before = [w.lower() for w in self._words(prompt, "EXPLANATION")]
        answers = []
        for number, text in re.findall(r"^(\d+)\. (.+)$", prompt.rsplit("TEXTS:", 1)[1], re.MULTILINE):
            words = words_of(text)
            last = len(words) - 1 - words[::-1].index(first) if first in words else -1
            answers.append(f"{number}: {100 * (last >= 0 and all(w in words[:last] for w in before))}")
        return "\n".join(answers)

    def _texts(self, words: Sequence[str], n: int) -> list[str]:
        """n texts with the words in reverse order, each after a filler."""
        rng = np.random.default_rng([self.seed, n, len(words)])
        drawn = [[self.FILLERS[i] for i in rng.permutation(len(self.FILLERS))] for _ in range(n)]
        return [" ".join(f"{f} {word}" for f, word in zip(own, reversed(words), strict=False)) for own in drawn]

    @staticmethod
    def _words(prompt: str, label: str) -> list[str]:
        """The words in quotation marks in the last line with this label."""
        line = [part for part in re.findall(rf"^{label}: (.+)$", prompt, re.MULTILINE) if part != "..."][-1]
        return re.findall(r'"([^"]+)"', line)


def words_of(text: str) -> list[str]:
    """Words in lower case."""
    return re.findall(r"\w+", text.lower())


def _peak(example: str) -> str:
    return example.partition("[[")[2].partition("]]")[0]


def _block(prompt: str, heading: str) -> list[str]:
    """The lines under a heading, up to the next empty one."""
    from_heading = dropwhile(lambda line: not line.startswith(heading), prompt.splitlines())
    return list(takewhile(str.strip, islice(from_heading, 1, None)))
