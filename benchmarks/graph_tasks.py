"""Attribution graphs of four tasks of the bundled model with its transcoders, each beside its control.

    python benchmarks/graph_tasks.py --docs                # all steps, and the tables of docs/howto/graphs.md
    python benchmarks/graph_tasks.py --only capitals       # one step; again: it goes on where it was interrupted
    python benchmarks/graph_tasks.py --trial               # every step in tiny sizes, into runs/

gates: how often the model does each task at all. capitals: the features at a country's name in the pruned graph of one
wording are its group; in another wording a country's group is swapped for another's, beside as many other features.
agreement, greater: `sl.circuits.trace_many`, half of the prompts held out (graphs.py has the indirect object).
deciding: the token that decides is taken out, with attention held, as a graph has it, and with nothing held. Each step
writes benchmarks/results/graph_tasks.json after each part; it begins anew where the transcoders or the sizes have
changed, or with --anew.
"""

import argparse
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from graphs import transcoders
from ioi import drawn
from pages import put
from steps import processor
from stepwise import measure
from transcoders import PACKAGE

import sae_lab as sl
from sae_lab.costs import timed
from sae_lab.types import Site, TokenBatch, Write

ROOT = Path(__file__).resolve().parent.parent
RESULTS, TRIED = ROOT / "benchmarks" / "results" / "graph_tasks.json", ROOT / "runs" / "graph-tasks-trial.json"
PAGE, MOST, ROWS = "docs/howto/graphs.md", 8, 32  # edges in a table; prompts in a pass
CAPITALS = {
    "France": " Paris", "Italy": " Rome", "Japan": " Tokyo", "Egypt": " Cairo", "Germany": " Berlin",
    "Spain": " Madrid", "Russia": " Moscow", "China": " Beijing", "England": " London", "Greece": " Athens",
    "Austria": " Vienna", "Poland": " Warsaw", "Portugal": " Lisbon", "Ireland": " Dublin", "Sweden": " Stockholm",
    "Norway": " Oslo", "Finland": " Helsinki", "Cuba": " Havana", "Hungary": " Budapest", "Peru": " Lima",
}  # fmt: skip
WORDING, OTHER_WORDING = "The capital of {} is", "The capital city of {} is called"
TWO_HOPS = [
    ("The capital of the state where Dallas is located is the city of", " Austin"),
    ("The capital of the state where Chicago is located is the city of", " Springfield"),
    ("The capital of the state where Miami is located is the city of", " Tallahassee"),
    ("The capital of the state where Seattle is located is the city of", " Olympia"),
    ("The capital of the country where Munich is located is the city of", " Berlin"),
    ("The capital of the country where Milan is located is the city of", " Rome"),
    ("The capital of the country where Barcelona is located is the city of", " Madrid"),
    ("The capital of the country where Osaka is located is the city of", " Tokyo"),
    ("The capital of the country where Lyon is located is the city of", " Paris"),
    ("The capital of the country where Mumbai is located is the city of", " Delhi"),
]
NOUNS = [("key", "keys"), ("author", "authors"), ("picture", "pictures"), ("teacher", "teachers"),
         ("report", "reports"), ("friend", "friends")]  # fmt: skip
JOINED = [("near", "table", "tables"), ("behind", "house", "houses"), ("beside", "tree", "trees"),
          ("with", "book", "books"), ("for", "student", "students")]  # fmt: skip
LASTED = ["war", "siege", "reign", "famine", "trial"]
HUNDREDS, TENS = (15, 16, 17, 18), (2, 4, 6, 8)


class Sizes(NamedTuple):
    """features: that are visited in each graph. draws: of matched groups. pairs: of countries, in the swap."""

    countries: int = 20
    features: int = 128
    draws: int = 3
    pairs: int = 120
    agreement: int = 60
    greater: int = 16
    object: int = 16
    deciding: int = 6


TINY = Sizes(4, 16, 1, 6, 6, 4, 4, 1)


class Task(NamedTuple):
    """Prompts; of each the right token and a wrong one, and its text up to the token that decides."""

    prompts: list[str]
    targets: list[tuple[str, str]]
    until: list[str]


def capitals(count: int, wording: str = WORDING) -> Task:
    """The wrong token is the next country's capital."""
    listed = list(CAPITALS.items())[:count]
    others = [capital for _, capital in [*listed[1:], listed[0]]]
    targets = [(capital, other) for (_, capital), other in zip(listed, others, strict=True)]
    until = [wording.partition("{}")[0] + country for country, _ in listed]
    return Task([wording.format(country) for country, _ in listed], targets, until)


def agreement(count: int) -> Task:
    """A subject, and between it and the verb a noun of the other number."""
    found = []
    for i, (one, many) in enumerate(NOUNS):
        for j, (word, single, several) in enumerate(JOINED):
            found.append((f"The {one} {word} the {several}", (" is", " are"), f"The {one}", i + j))
            found.append((f"The {many} {word} the {single}", (" are", " is"), f"The {many}", i + j))
    found.sort(key=lambda task: task[3] % len(JOINED))  # a part of them has all nouns
    return Task(*(list(column) for column in list(zip(*found[:count], strict=True))[:3]))


def greater(count: int) -> Task:
    """The tens digit of a later year: a larger one is right, a smaller one wrong."""
    found = []
    for i, what in enumerate(LASTED):
        for j, hundreds in enumerate(HUNDREDS):
            tens = TENS[(i + j) % len(TENS)]
            until = f"The {what} lasted from the year {hundreds}{tens}"
            found.append((f"{until}2 to the year {hundreds}", (str(tens + 1), str(tens - 1)), until))
    return Task(*(list(column) for column in zip(*found[:count], strict=True)))


def indirect_object(count: int) -> Task:
    names, texts, _ = drawn(count)
    return Task(texts, [(f" {b}", f" {a}") for a, b in names], [text.partition(" gave")[0] for text in texts])


MADE: dict[str, Callable[[int], Task]] = {
    "capitals": capitals, "agreement": agreement, "greater": greater, "object": indirect_object,
}  # fmt: skip


def id_of(lm: sl.LM, text: str) -> int:
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"][0]


def place(lm: sl.LM, until: str) -> int:
    """The position of a text's last token."""
    return lm.tokenize(until).ids.shape[1] - 1


def last_logits(lm: sl.LM, prompts: Sequence[str], edit: "Add | None" = None) -> torch.Tensor:
    """Logits after each prompt, "prompts vocab"."""
    found = []
    for begin in range(0, len(prompts), ROWS):
        part = list(prompts[begin : begin + ROWS])
        edits = [] if edit is None else [edit.rows(slice(begin, begin + len(part)))]
        last = lm.tokenize(part).mask.sum(1) - 1
        found.append(lm.logits(part, edits=edits)[torch.arange(len(part)), last])
    return torch.cat(found)


# ---- a group of features in the place of another


class Add(NamedTuple):
    """An edit that adds a vector to each row's mlp_out at one position. vectors: "rows d", by layer."""

    vectors: dict[int, torch.Tensor]
    position: int

    def rows(self, which: slice) -> "Add":
        return Add({layer: vector[which] for layer, vector in self.vectors.items()}, self.position)

    def writes(self, lm: sl.LM, batch: TokenBatch, new: int = 0) -> list[Write]:
        return [Write(Site("mlp_out", layer), self._adding(vector)) for layer, vector in self.vectors.items()]

    def _adding(self, vector: torch.Tensor) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        def add(x: torch.Tensor, tokens: Any) -> torch.Tensor:
            x = x.clone()
            x[:, self.position] += vector.to(x)
            return x

        return add


class Read(NamedTuple):
    """Of each prompt at one position, by layer: codes "prompts features" and the MLP's output "prompts d"."""

    codes: dict[int, torch.Tensor]
    out: dict[int, torch.Tensor]
    position: int


@torch.no_grad()
def read(lm: sl.LM, coders: sl.TranscoderSet, prompts: Sequence[str], position: int) -> Read:
    found = lm.read(list(prompts), [site for coder in coders for site in (coder.site, coder.writes[0])])
    layers = {coder.writes[0].layer: coder for coder in coders}
    codes = {n: coder.encode(found[coder.site][:, position]) for n, coder in layers.items()}
    return Read(codes, {n: found[coder.writes[0]][:, position] for n, coder in layers.items()}, position)


Places = Sequence[Sequence[int]]  # (layer, feature)


@torch.no_grad()
def swap(coders: sl.TranscoderSet, seen: Read, pairs: Sequence[tuple[int, int]], groups: Sequence[Places]) -> Add:
    """In the first prompt of each pair, the features of both groups get the values that they have in the second."""
    vectors = {}
    for coder in coders:
        layer = coder.writes[0].layer
        chosen = torch.zeros(len(pairs), coder.d_sae)
        for row, pair in enumerate(pairs):
            chosen[row, [f for which in pair for at, f in groups[which] if at == layer]] = 1.0
        codes = seen.codes[layer]
        change = codes[[b for _, b in pairs]] - codes[[a for a, _ in pairs]]
        vectors[layer] = (change * chosen) @ coder.W_dec
    return Add(vectors, seen.position)


def swap_all(coders: sl.TranscoderSet, seen: Read, pairs: Sequence[tuple[int, int]], errors: bool) -> Add:
    """All features of the place, or the MLPs' whole outputs."""
    everything = [[(layer, f) for layer, codes in seen.codes.items() for f in range(codes.shape[1])]]
    if not errors:
        return swap(coders, seen, pairs, everything * (1 + max(max(pair) for pair in pairs)))
    change = {n: out[[b for _, b in pairs]] - out[[a for a, _ in pairs]] for n, out in seen.out.items()}
    return Add(change, seen.position)


def outcome(logits: torch.Tensor, right: Sequence[tuple[int, int]], edit: Add | None) -> dict[str, float]:
    """right: of each pair the two answers. flipped: the second is likelier than the first. top: it is the likeliest of
    all. moved: its mean logit less the first's. size: mean norm of what was added, over layers together."""
    rows = torch.arange(len(logits))
    first, second = torch.tensor(right).T
    moved = logits[rows, second] - logits[rows, first]
    sizes = torch.zeros(1) if edit is None else torch.stack([*edit.vectors.values()]).square().sum((0, 2)).sqrt()
    return {
        "flipped": float((moved > 0).float().mean()), "top": float((logits.argmax(1) == second).float().mean()),
        "moved": float(moved.mean()), "size": float(sizes.mean()),
    }  # fmt: skip


def country_groups(
    lm: sl.LM, coders: sl.TranscoderSet, task: Task, features: int, draws: int, done: int
) -> Iterator[dict[str, Any]]:
    """Of each prompt: the features at the deciding token in its pruned graph, and as many others for each draw."""
    for prompt, (right, _), until in list(zip(task.prompts, task.targets, task.until, strict=True))[done:]:
        graph = sl.circuits.trace(lm, coders, prompt, right, features=features)
        small = graph.prune()
        nodes = [n for n in small.nodes[: small.counts[0]] if n.position == place(lm, until)]
        others = [small.matched(nodes, seed) for seed in range(draws)]
        yield {
            "country": until.rpartition(" ")[2], "group": [(n.site.layer, n.feature) for n in nodes],
            "matched": [[(n.site.layer, n.feature) for n in other] for other in others],
            "replacement": graph.replacement, "completeness": graph.completeness,
        }  # fmt: skip


def swapped(lm: sl.LM, coders: sl.TranscoderSet, task: Task, rows: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """Groups swapped in another wording. Pairs are of countries whose capitals the model knows there."""
    answers = [id_of(lm, right) for right, _ in task.targets]
    top = last_logits(lm, task.prompts).argmax(1).tolist()
    knows = [i for i, answer in enumerate(answers) if top[i] == answer]
    pairs = [(a, b) for a in knows for b in knows if a != b]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [pairs[i] for i in order[:most]]
    (at,) = {place(lm, until) for until in task.until}
    seen = read(lm, coders, task.prompts, at)
    matched = [[row["matched"][draw] for row in rows] for draw in range(len(rows[0]["matched"]))]
    edits: dict[str, Add | None] = {
        "nothing": None, "the groups": swap(coders, seen, pairs, [row["group"] for row in rows]),
        **{f"matched {n}": swap(coders, seen, pairs, groups) for n, groups in enumerate(matched)},
        "all features": swap_all(coders, seen, pairs, False), "MLPs, whole": swap_all(coders, seen, pairs, True),
    }  # fmt: skip
    right = [(answers[a], answers[b]) for a, b in pairs]
    prompts = [task.prompts[a] for a, _ in pairs]
    found = {name: outcome(last_logits(lm, prompts, edit), right, edit) for name, edit in edits.items()}
    return {"known": len(knows), "of": len(answers), "pairs": len(pairs), "swaps": found}


# ---- the steps: each yields rows, but for those that are done


def gates_step(lm: sl.LM, coders: sl.TranscoderSet, sizes: Sizes, rows: list[dict[str, Any]]) -> Iterator[Any]:
    counts = (sizes.countries, sizes.agreement, sizes.greater, sizes.object)
    tasks = [(name, MADE[name](count)) for name, count in zip(MADE, counts, strict=True)]
    tasks.insert(1, ("capitals, other wording", capitals(sizes.countries, OTHER_WORDING)))
    for name, task in tasks[len(rows) :]:
        yield {"task": name, **gate(lm, task), **(masses(lm, task) if name == "greater" else {})}
    if len(rows) <= len(tasks):
        answers = torch.tensor([id_of(lm, answer) for _, answer in TWO_HOPS])
        top = last_logits(lm, [prompt for prompt, _ in TWO_HOPS]).argmax(1)
        yield {"task": "two hops", "prompts": len(TWO_HOPS), "top": float((top == answers).float().mean())}


def gate(lm: sl.LM, task: Task) -> dict[str, Any]:
    """prefers: the share of prompts in which the right token is likelier than the wrong one; top: than all. shuffled:
    prefers, with each prompt given the targets of the next."""
    logits = last_logits(lm, task.prompts)
    rows = torch.arange(len(logits))
    right, wrong = (torch.tensor([id_of(lm, pair[i]) for pair in task.targets]) for i in (0, 1))
    ahead = lambda r, w: float((logits[rows, r] > logits[rows, w]).float().mean())  # noqa: E731
    return {
        "prompts": len(rows), "top": float((logits.argmax(1) == right).float().mean()),
        "prefers": ahead(right, wrong), "shuffled": ahead(right.roll(1), wrong.roll(1)),
    }  # fmt: skip


def masses(lm: sl.LM, task: Task) -> dict[str, float]:
    """Probability of all larger digits and of all smaller ones; and so beside the next prompt's digit."""
    own = torch.tensor([int(until[-1]) for until in task.until])[:, None]
    digits = last_logits(lm, task.prompts).softmax(1)[:, [id_of(lm, str(n)) for n in range(10)]]
    share = lambda which: float((digits * which).sum(1).mean())  # noqa: E731
    digit = torch.arange(10)[None]
    return {
        "larger": share(digit > own), "same": share(digit == own), "smaller": share(digit < own),
        "larger_shuffled": share(digit > own.roll(1, 0)), "smaller_shuffled": share(digit < own.roll(1, 0)),
    }  # fmt: skip


def capitals_step(lm: sl.LM, coders: sl.TranscoderSet, sizes: Sizes, rows: list[dict[str, Any]]) -> Iterator[Any]:
    found = rows[: sizes.countries]
    task = capitals(sizes.countries)
    for row in country_groups(lm, coders, task, sizes.features, sizes.draws, len(found)):
        found = [*found, row]
        yield row
    if len(rows) <= sizes.countries:
        yield swapped(lm, coders, capitals(sizes.countries, OTHER_WORDING), found, sizes.pairs)


def many(name: str) -> Callable[..., Iterator[Any]]:
    """A step that traces the prompts of a task together."""

    def step(lm: sl.LM, coders: sl.TranscoderSet, sizes: Sizes, rows: list[dict[str, Any]]) -> Iterator[Any]:
        if not rows:
            task = MADE[name](getattr(sizes, name))
            call = lambda: sl.circuits.trace_many(lm, coders, task.prompts, task.targets, features=sizes.features)  # noqa: E731
            found, seconds = timed(call)
            features = [e for e in found.edges if e.upstream[0] == "feature" and e.downstream[0] == "logit"]
            yield {
                "edges": len(found.edges), "sure": found.sure, "prompts": found.prompts, "held_out": found.held_out,
                "seconds": seconds, **{f.key: [f.value, f.control] for f in found.figures()},
                "largest": found.to_pandas().head(MOST).to_dict("records"),
                "to_the_answer": len(features), "sure_to_the_answer": sum(e.low * e.high > 0 for e in features),
            }  # fmt: skip

    return step


def deciding_step(lm: sl.LM, coders: sl.TranscoderSet, sizes: Sizes, rows: list[dict[str, Any]]) -> Iterator[Any]:
    for name in list(MADE)[len(rows) :]:
        yield {"task": name, **deciding(lm, coders, MADE[name](sizes.deciding))}


def deciding(lm: sl.LM, coders: sl.TranscoderSet, task: Task) -> dict[str, Any]:
    """Of each prompt: the difference of the two logits, and its changes when the deciding token's embedding is taken
    out, with attention and norms held, and with nothing held."""
    found: dict[str, Any] = {"before": [], "held": [], "free": []}
    for prompt, pair, until in zip(task.prompts, task.targets, task.until, strict=True):
        graph = sl.circuits.trace(lm, coders, prompt, pair, features=1)
        node = next(n for n in graph.nodes if n.site.kind == "embed" and n.position == place(lm, until))
        check = graph.check(node, graph.targets[-1])
        found["before"].append(float(graph.pre[-1]))
        found["held"].append(float(check.responding.item()))
        found["free"].append(float(check.free.item()))
    return found


STEPS: dict[str, Callable[..., Iterator[Any]]] = {
    "gates": gates_step, "capitals": capitals_step, "deciding": deciding_step, "agreement": many("agreement"),
    "greater": many("greater"),
}  # fmt: skip
MANY = ("agreement", "greater")
CALLED = {"capitals": "capitals", "agreement": "subject and verb across another noun", "greater": "a later year's tens",
          "object": "indirect object", "capitals, other wording": "capitals, other wording"}  # fmt: skip


# ---- the tables


def gates_table(found: dict[str, Any]) -> list[str]:
    *rows, hops = found["rows"]
    lines = [
        "**Does the model do it?** In how many prompts the right token is the likeliest of all, and likelier than the "
        "wrong one; the control asks each prompt for the next one's answer.", "",
        "| task | prompts | likeliest | over the wrong one | next one's answer |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        shares = " | ".join(f"{row[key]:.0%}" for key in ("top", "prefers", "shuffled"))
        lines.append(f"| {CALLED[row['task']]} | {row['prompts']} | {shares} |")
    digits = next(row for row in rows if row["task"] == "greater")
    return [
        *lines, "",
        f"Of the year's tens, all larger digits together have probability {digits['larger']:.2f}, the same one "
        f"{digits['same']:.2f}, all smaller ones {digits['smaller']:.2f}; larger and smaller than the next prompt's "
        f"digit {digits['larger_shuffled']:.2f} and {digits['smaller_shuffled']:.2f}.", "",
        f"Two-hop facts: {hops['top'] * hops['prompts']:.0f} of {hops['prompts']} known.",
    ]  # fmt: skip


def capitals_table(found: dict[str, Any]) -> list[str]:
    *rows, swap = found["rows"]
    sizes = np.median([len(row["group"]) for row in rows])
    replaced = np.median([row["replacement"] for row in rows])
    lines = [
        f"**Capitals.** A country's group: the features at its name in the pruned graph of `{WORDING}` (median "
        f"{sizes:.0f} features; replacement score {replaced:.2f}). In `{OTHER_WORDING}`, of which the model knows "
        f"{swap['known']} of {swap['of']}, both groups get the values of another country: {swap['pairs']} pairs. "
        "Matched: as many other features of the same layers and near norms. The last two rows are what features, and "
        "what MLPs, can do at this one token at all.", "",
        "| swapped | other capital over own | likeliest of all | its logit less own | norm of the change |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    swaps = swap["swaps"]
    random = [value for name, value in swaps.items() if name.startswith("matched")]
    swaps = {"nothing": swaps["nothing"], "the groups": swaps["the groups"],
             f"matched features ({len(random)} draws)": {k: float(np.mean([r[k] for r in random])) for k in random[0]},
             "all features": swaps["all features"], "MLPs, whole": swaps["MLPs, whole"]}  # fmt: skip
    for name, one in swaps.items():
        lines.append(f"| {name} | {one['flipped']:.0%} | {one['top']:.0%} | {one['moved']:.2f} | {one['size']:.1f} |")
    return lines


def deciding_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "**The token that decides** (country, subject, tens digit, the giver's second mention) taken out: mean change "
        "of the right logit less the wrong one. With attention held, as in a graph, features respond and attention "
        "does not.", "",
        "| task | prompts | before | attention held | nothing held | held / free |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in found["rows"]:
        before, held, free = (float(np.mean(row[key])) for key in ("before", "held", "free"))
        numbers = f"{before:.2f} | {held:+.2f} | {free:+.2f} | {held / free:.2f}"
        lines.append(f"| {CALLED[row['task']]} | {len(row['held'])} | {numbers} |")
    return lines


def many_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "**Edges that carry over.** `trace_many` of each task, half of the prompts held out. Sure: an interval without "
        "0 on the first half. Beside it, edges that one prompt alone has.", "",
        "| task | prompts, held out | edges | sure | same sign held out | edges of one prompt | in held-out prompts | "
        "edges of one prompt |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in MANY:
        if found.get(name, {}).get("whole"):
            (row,) = found[name]["rows"]
            shares = " | ".join(f"{value:.0%}" for value in (*row["carried"], *row["common"]))
            prompts = f"{row['prompts']}, {row['held_out']}"
            lines.append(f"| {CALLED[name]} | {prompts} | {row['edges']:,} | {row['sure']:,} | {shares} |")
    return lines


def tables(found: dict[str, Any]) -> str:
    lines = [f"Measured by `benchmarks/graph_tasks.py` with {found['set']}, on {found['machine']}.", ""]
    for name, table in (("gates", gates_table), ("capitals", capitals_table), ("deciding", deciding_table)):
        if found.get(name, {}).get("whole"):
            lines += [*table(found[name]), ""]
    if any(found.get(name, {}).get("whole") for name in MANY):
        lines += [*many_table(found), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STEPS, action="append", help="these steps alone")
    parser.add_argument("--set", type=Path, default=PACKAGE, help="a folder of transcoders")
    parser.add_argument("--trial", action="store_true", help="tiny sizes, no page")
    parser.add_argument("--anew", action="store_true", help="measure again what is known")
    parser.add_argument("--docs", action="store_true", help="put the tables on the page")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    sizes, lm, coders = TINY if args.trial else Sizes(), sl.LM(), transcoders(args.set)
    path = TRIED if args.trial else RESULTS
    made = hashlib.sha256("".join(coder.fingerprint() for coder in coders).encode()).hexdigest()[:16]
    steps = {name: partial(STEPS[name], lm, coders, sizes) for name in args.only or STEPS}
    head = {"machine": processor(), "set": repr(coders)}
    found = measure(path, head, steps, {"made": made, "sizes": sizes}, args.anew)
    print(tables(found))
    if args.docs and not args.trial:
        put(PAGE, "graph-tasks", tables(found))


if __name__ == "__main__":
    main()
