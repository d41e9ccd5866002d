"""What a patching grid has computed for one pair of prompts and one metric."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from sae_lab import circuits
from sae_lab.circuits.patching_effects import KINDS, Cell
from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompt, is_chat
from sae_lab.results import visible
from sae_lab.saes.base import SparseCoder

from .coding import coder_line, header, name_of
from .measures import ANSWERS, WRITTEN, Measure
from .prompting import checked_prompt

MAX_TOKENS = 128  # columns that still make a picture
Block = tuple[str, tuple[int, ...], tuple[int, ...]]  # kind, layers, positions


@dataclass
class PatchRun:
    """Estimates of all cells, and the true patches so far. Other prompts make another run; a thread that still works on
    the run before changes that one only."""

    lm: LM
    prompt: Prompt
    source: Prompt
    measure: Measure
    metric: circuits.Metric
    estimate: circuits.PatchGrid
    true: dict[Cell, float] = field(default_factory=dict)
    joint: dict[Block, float] = field(default_factory=dict)
    effects: dict[str, circuits.Attribution] = field(default_factory=dict)

    @staticmethod
    def of(lm: LM, prompt: Prompt, source: Prompt, measure: Measure, kinds: Sequence[str]) -> "PatchRun":
        """Estimate all cells. ValueError for texts of unequal length, and for a metric that cannot be built."""
        prompt, source = _checked(lm, prompt, source)
        _check_pair(lm, prompt, source)
        metric = measure.built(lm, source)
        # At position 0 stands the prefix token, or of a chat mostly a token of the template: the same in both.
        ours, theirs = (lm.tokenize(one).ids[0].tolist() for one in (prompt, source))
        alike = ours[0] == theirs[0] and (lm.prefix_id is not None or is_chat(prompt))
        positions = list(range(int(alike), len(ours)))
        estimate = circuits.patching_estimate(lm, [prompt], [source], metric, kinds=kinds, positions=positions)
        return PatchRun(lm, prompt, source, measure, metric, estimate)

    @staticmethod
    def sides(lm: LM, prompt: Prompt, source: Prompt, right: str, wrong: str) -> dict[str, Any]:
        """The tokens of both texts side by side, and those of the answers."""
        prompt, source = _checked(lm, prompt, source)
        pairs, lengths = _aligned(lm, prompt, source)
        ids = [lm.tokenizer(side, add_special_tokens=False)["input_ids"] if side else [] for side in (right, wrong)]
        answers = [[token.label for token in lm.token_strings(row)] if row else [] for row in ids]
        return {"pairs": [list(pair) for pair in pairs], "lengths": lengths, "right": answers[0], "wrong": answers[1]}

    def view(self, coders: Mapping[str, SparseCoder]) -> dict[str, Any]:
        """What the screen shows before any patch."""
        grid, measure = self.estimate, self.measure
        [roles] = self.lm.tokenize(self.prompt).roles or [[]]
        return {
            "roles": [roles[p] for p in grid.positions] if roles else [],
            "prompt": self.prompt, "source": self.source,
            "measure": measure.kind, "right": measure.right, "wrong": measure.wrong, "metric": measure.name,
            "measures": [
                [kind, measure.name if kind == measure.kind == WRITTEN else kind, *ANSWERS[kind]]
                for kind in measure.offered
            ],
            "base": grid.base, "goal": grid.source, "kinds": list(grid.kinds), "layers": grid.layers,
            "positions": grid.positions, "tokens": [list(pair) for pair in grid.tokens],
            "estimate": grid.values.tolist(), "coders": sorted(coders),
            "sides": self.sides(self.lm, self.prompt, self.source, measure.right, measure.wrong),
        }  # fmt: skip

    def has(self, kind: str, layer: int, position: int) -> bool:
        grid = self.estimate
        return kind in grid.kinds and layer in grid.layers and position in grid.positions

    def patched(self, cells: Sequence[Cell]) -> Iterator[int]:
        """Patch cells; gives how many are done after each pass."""
        done = 0
        for found in circuits.patched_cells(self.lm, [self.prompt], [self.source], self.metric, cells):
            self.true = self.true | found  # a new dict: another thread may be reading the old one
            done += len(found)
            yield done

    def patch_together(self, block: Block) -> None:
        """Patch the cells of a block in one run."""
        kind, layers, positions = block
        cells = [(kind, layer, p) for layer in layers for p in positions]
        found = circuits.patched_together(self.lm, [self.prompt], [self.source], self.metric, cells)
        self.joint = self.joint | {block: found}

    def together(self) -> list[list[Any]]:
        """The blocks that were patched together, for the screen."""
        return [[kind, [*layers], [*positions], value] for (kind, layers, positions), value in self.joint.items()]

    def truth(self) -> list[list[Any]]:
        """The true patches for the screen."""
        return [[*cell, value] for cell, value in self.true.items()]

    def top_features(self, coder: SparseCoder, position: int, count: int) -> dict[str, Any]:
        """The features whose change at a cell has the largest effects by gradient, and the effect of the coder's error,
        as shares of the metric's change. All features and the error add up to the cell's estimate."""
        key = coder.site.key
        if key not in self.effects:
            self.effects[key] = circuits.attribution(self.lm, coder, [self.prompt], [self.source], self.metric)
        found, change = self.effects[key], self.estimate.source - self.estimate.base
        shares = found.effects[position] / change
        order = [int(f) for f in shares.abs().argsort(descending=True)[:count] if shares[f] != 0]
        return {
            "features": [[f, float(shares[f])] for f in order],
            "others": float(shares.sum() - shares[order].sum()), "active": int((shares != 0).sum()),
            "error": float(found.error[position]) / change,
        }  # fmt: skip

    def to_pandas(self):
        """One row a cell."""
        import pandas as pd

        table = self.estimate.to_pandas().rename(columns={"effect": "estimate"})
        tokens = dict(zip(self.estimate.positions, self.estimate.tokens, strict=True))
        table["token"] = [tokens[p][0] for p in table["position"]]
        table["source_token"] = [tokens[p][1] for p in table["position"]]
        cells = zip(table["kind"], table["layer"], table["position"], strict=True)
        table["true"] = pd.Series([self.true.get(cell, float("nan")) for cell in cells], dtype=float)
        return table[["layer", "kind", "position", "token", "source_token", "estimate", "true"]]

    def code(self, coders: Mapping[str, SparseCoder]) -> str:
        """The Python that gives these numbers, and the effects of these coders' features."""
        kinds = "" if self.estimate.kinds == KINDS else f", kinds={list(self.estimate.kinds)!r}"
        where = "" if self.estimate.positions[0] else ", positions=range(len(lm.tokens(prompt)))"
        lines = [
            *header(self.lm), f"prompt = {self.prompt!r}", f"source = {self.source!r}", *self.measure.code(),
            f"estimate = sl.circuits.patching_estimate(lm, [prompt], [source], metric{kinds}{where})",
        ]  # fmt: skip
        if self.true:
            by_layer = groupby(sorted(self.true), key=lambda cell: cell[:2])
            rows = [f"    *(({k!r}, {layer}, p) for p in {[p for *_, p in cells]})," for (k, layer), cells in by_layer]
            lines += ["cells = [", *rows, "]", "true = {}"]
            lines += ["for found in sl.circuits.patched_cells(lm, [prompt], [source], metric, cells):"]
            lines += ["    true |= found"]
        for number, (kind, layers, positions) in enumerate(self.joint):
            cells = f"[({kind!r}, layer, p) for layer in {list(layers)} for p in {list(positions)}]"
            lines += [f"cells = {cells}"]
            lines += [f"together_{number} = sl.circuits.patched_together(lm, [prompt], [source], metric, cells)"]
        for number, coder in enumerate(coders.values()):
            name = name_of(coder, f"sae_{number}" if number else "sae")
            lines += [coder_line(coder, name)]
            lines += [f"effects_{number} = sl.circuits.attribution(lm, {name}, [prompt], [source], metric)"]
        return "\n".join(lines)


def _checked(lm: LM, prompt: Prompt, source: Prompt) -> tuple[Prompt, Prompt]:
    """Both, as texts or as chats. ValueError for one of each, an empty one, and one that is too long."""
    if is_chat(prompt) != is_chat(source):
        raise ValueError(
            "prompt and source are both texts or both chats, since a patch goes to the same token, got "
            f"{'a chat and a text' if is_chat(prompt) else 'a text and a chat'}: give both as messages"
        )
    prompt, source = checked_prompt(prompt, lm), checked_prompt(source, lm)
    for name, text in (("prompt", prompt), ("source", source)):
        if not text:
            raise ValueError(f"the {name} is empty: type some text, e.g. 'When Mary and John went to the store, John'")
        if (length := len(lm.tokenize(text).ids[0])) > MAX_TOKENS:
            raise ValueError(
                f"a patching grid shows up to {MAX_TOKENS} tokens, the {name} has {length:,}: shorten it, or use "
                "circuits.patching(..., positions=)"
            )
    return prompt, source


def _check_pair(lm: LM, prompt: Prompt, source: Prompt) -> None:
    """ValueError with both token lists side by side if their lengths differ."""
    pairs, lengths = _aligned(lm, prompt, source)
    if lengths[0] == lengths[1]:
        return
    wide = [max(len(_shown(a)), len(_shown(b))) for a, b in pairs]
    first = next(i for i, (a, b) in enumerate(pairs) if a is None or b is None)
    sides = [
        f"{name}  " + "|".join(_shown(pair[i]).ljust(w) for pair, w in zip(pairs, wide, strict=True))
        for i, name in ((0, "prompt"), (1, "source"))
    ]
    raise ValueError(
        "prompt and source need the same number of tokens, since a patch goes to the same position: the prompt has "
        f"{lengths[0]}, the source {lengths[1]}; one has a token more at token {first}. Change a word there:\n"
        + "\n".join(sides)
    )


def _aligned(lm: LM, prompt: Prompt, source: Prompt) -> tuple[list[Any], list[int]]:
    """(pairs of tokens, None where the other text has one more; how many tokens each text has)."""
    pairs = list(circuits.aligned_tokens(lm, prompt, source))
    return pairs, [sum(pair[i] is not None for pair in pairs) for i in (0, 1)]


def _shown(token: str | None) -> str:
    return "" if token is None else visible(token).replace(" ", "·")
