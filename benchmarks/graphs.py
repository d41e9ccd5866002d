"""Attribution graphs of the bundled model with its transcoders: how exact edges are, what a graph takes, how much of
the logits its features keep, and what the graphs of a task have in common.

    python benchmarks/graphs.py --docs                 # all steps, and the tables of docs/howto/graphs.md
    python benchmarks/graphs.py --only edges           # one step; again: it goes on where it was interrupted
    python benchmarks/graphs.py --trial                # every step in tiny sizes with one transcoder, into runs/

edges: random edges of pruned graphs beside what happens when their source is taken out. time: tracing and pruning.
memory: the peak of a long prompt, in a process of its own. faithfulness: curves beside matched random features and two
other rankings. task: `sl.circuits.trace_many` on the indirect object, half of the prompts held out. Prompts are the
first tokens of held-out documents. Each step writes benchmarks/results/graphs.json after each prompt; it begins anew
where the transcoders or the sizes have changed, or with --anew.
"""

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ioi import drawn
from pages import put
from steps import processor
from stepwise import measure
from transcoders import PACKAGE

import sae_lab as sl
from sae_lab.costs import peak, timed

ROOT = Path(__file__).resolve().parent.parent
RESULTS, TRIED = ROOT / "benchmarks" / "results" / "graphs.json", ROOT / "runs" / "graphs-trial.json"
PAGE, TIMES, MOST = "docs/howto/graphs.md", 3, 10
MEASURES = ("predicted", "frozen", "total", "responding", "free", "largest")
RANKINGS = {"circuit": "most influence", "no_errors": "the same, without errors", "random": "others, matched",
            "activation": "largest writes", "gradient": "largest f·gradient"}  # fmt: skip
# What a check holds, the prediction it is compared with, and the change: fields of sl.circuits.EdgeCheck.
CHECKS = [
    ("attention, norms, all other MLPs", "predicted", "frozen"),
    ("attention, norms, errors", "total", "responding"),
    ("nothing", "predicted", "free"),
    ("nothing", "total", "free"),
]


class Sizes(NamedTuple):
    """features: that are visited. edges: over all prompts. long: tokens of the prompt whose memory is measured."""

    prompts: int = 20
    length: int = 20
    features: int = 4096
    edges: int = 200
    curve: tuple[int, ...] = (4, 16, 64, 256, 1024, 4096)
    draws: int = 3
    long: int = 200
    long_features: int = 4096
    pairs: int = 16
    pair_features: int = 1024


TINY = Sizes(2, 8, 48, 6, (4, 16), 1, 16, 48, 4, 24)


def prompts(lm: sl.LM, count: int, length: int) -> list[list[int]]:
    """The first tokens of documents from all over the held-out ones."""
    long = [document for document in sl.load_text("mix").held_out if len(document) > 10 * length]
    found = [lm.tokenize(document[: 20 * length]).ids[0, :length].tolist() for document in long[:: len(long) // count]]
    assert len(found) >= count and {*map(len, found)} == {length}, "no token has more than ten letters on average"
    return found[:count]


# ---- the steps: each yields a row for each prompt, but for those that are done


def edges(lm: sl.LM, coders: sl.TranscoderSet, sizes: Sizes, rows: list[Any]) -> Iterator[dict[str, Any]]:
    share = sizes.edges // sizes.prompts
    for i, ids in list(enumerate(prompts(lm, sizes.prompts, sizes.length)))[len(rows) :]:
        graph = sl.circuits.trace(lm, coders, ids, features=sizes.features)
        small = graph.prune()
        places = small.effects.nonzero()
        chosen = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(i))[:share]]
        found = []
        for t, s in chosen.tolist():
            check = graph.check(small.nodes[s], small.targets[t])
            found.append({"kind": small.kinds[s], **{name: float(getattr(check, name).item()) for name in MEASURES}})
        worst = max(abs(e["predicted"] - e["frozen"]) / e["largest"] for e in found)
        print(f"prompt {i}: {len(found)} of {len(places):,} edges, off by at most {worst:.1e}", flush=True)
        yield {"edges": found, "of": len(places), "visited": graph.visited}


def timing(lm: sl.LM, coders: sl.TranscoderSet, sizes: Sizes, rows: list[Any]) -> Iterator[dict[str, Any]]:
    ids = prompts(lm, 1, sizes.length)[0]
    for _ in range(len(rows), TIMES):
        said = sl.estimate(sl.circuits.trace, lm, coders, ids, features=sizes.features)
        graph, trace = timed(sl.circuits.trace, lm, coders, ids, features=sizes.features)
        small, prune = timed(graph.prune)
        row = {"trace": trace, "prune": prune, "estimated": 60 * said.minutes, "active": graph.active,
               "visited": graph.visited, "nodes": sum(small.counts),
               "edges": int(small.effects.count_nonzero())}  # fmt: skip
        yield row


def memory(lm: sl.LM, coders: sl.TranscoderSet, sizes: Sizes, rows: list[Any]) -> Iterator[dict[str, Any]]:
    """In a process of its own, which is asked with this one's arguments."""
    if not rows:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory"]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        yield row


def memory_here(lm: sl.LM, coders: sl.TranscoderSet, sizes: Sizes) -> dict[str, Any]:
    ids = prompts(lm, 1, sizes.long)[0]
    said = sl.estimate(sl.circuits.trace, lm, coders, ids, features=sizes.long_features)
    with peak() as most:
        graph, seconds = timed(sl.circuits.trace, lm, coders, ids, features=sizes.long_features)
        _, prune = timed(graph.prune)
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return {
        "above": most.ram / 1e6, "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "trace": seconds, "prune": prune, "active": graph.active, "visited": graph.visited,
        "estimated": said.ram / 1e6,
    }  # fmt: skip


def faithfulness(lm: sl.LM, coders: sl.TranscoderSet, sizes: Sizes, rows: list[Any]) -> Iterator[dict[str, Any]]:
    for i, ids in list(enumerate(prompts(lm, sizes.prompts, sizes.length)))[len(rows) :]:
        graph = sl.circuits.trace(lm, coders, ids, features=sizes.features)
        many = [n for n in sizes.curve if n <= graph.counts[0]]
        found = graph.faithfulness(many, draws=sizes.draws, seed=i)
        row = {name: list(getattr(found, name)) for name in RANKINGS}
        row |= {"sizes": many, "all_features": found.all_features, "all_errors": found.all_errors,
                "replacement": graph.replacement, "completeness": graph.completeness,
                "completeness_inner": graph.completeness_inner, "visited": graph.visited,
                "left_out": graph.left_out}  # fmt: skip
        yield row


def task(lm: sl.LM, coders: sl.TranscoderSet, sizes: Sizes, rows: list[Any]) -> Iterator[dict[str, Any]]:
    """The difference of the two names' logits."""
    if not rows:
        names, texts, _ = drawn(sizes.pairs)
        targets = [(f" {b}", f" {a}") for a, b in names]
        call = lambda: sl.circuits.trace_many(lm, coders, texts, targets, features=sizes.pair_features)  # noqa: E731
        found, seconds = timed(call)
        figures = {f.key: [f.value, f.control] for f in found.figures()}
        largest = found.to_pandas().head(MOST).to_dict("records")
        row = {"edges": len(found.edges), "sure": found.sure, "prompts": found.prompts, "held_out": found.held_out,
               "seconds": seconds, **figures, "largest": largest}  # fmt: skip
        print(found, flush=True)
        yield row


STEPS: dict[str, Callable[[sl.LM, sl.TranscoderSet, Sizes, list[Any]], Iterator[dict[str, Any]]]] = {
    "edges": edges, "time": timing, "memory": memory, "faithfulness": faithfulness, "task": task,
}  # fmt: skip


# ---- the tables


def correlations(rows: list[dict[str, Any]], said: str, seen: str) -> tuple[float, float, float, float]:
    """(Pearson's, of ranks, slope through 0, Pearson's with the predictions shuffled), each change in shares of the
    largest effect on its target."""
    a, b = (np.array([e[name] / e["largest"] for row in rows for e in row["edges"]]) for name in (said, seen))
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    other = np.random.default_rng(0).permutation(a)
    r = lambda x, y: float(np.corrcoef(x, y)[0, 1])  # noqa: E731
    return r(a, b), r(*ranks), float(a @ b / (a @ a)), r(other, b)


def edges_table(found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    off = [abs(e["predicted"] - e["frozen"]) / e["largest"] for row in rows for e in row["edges"]]
    lines = [
        f"**Edges.** {len(off)} edges drawn from the pruned graphs of {len(rows)} held-out prompts. Changes when an "
        "edge's source is taken out, predicted (by the edge, or along all paths) and seen, in shares of the largest "
        f"effect on the target. With all else held they differ by at most {max(off):.1e}.", "",
        "| held | predicted by | correlation | of ranks | slope | predictions shuffled |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for held, said, seen in CHECKS:
        by = {"predicted": "the edge", "total": "all paths"}[said]
        values = " | ".join(f"{value:.3f}" for value in correlations(rows, said, seen))
        lines.append(f"| {held} | {by} | {values} |")
    return lines


def time_table(found: dict[str, Any]) -> list[str]:
    median = {name: statistics.median(row[name] for row in found["rows"]) for name in found["rows"][0]}
    sizes = Sizes(*found["sizes"])
    return [
        f"**Time.** A prompt of {sizes.length} tokens has {median['active']:,.0f} active features. To trace it with "
        f"{median['visited']:.0%} of them visited took {median['trace']:.0f} s (`sl.estimate` said "
        f"{median['estimated']:.0f} s), to prune the graph to {median['nodes']:,.0f} nodes and {median['edges']:,.0f} "
        f"edges {median['prune']:.1f} s; medians of {len(found['rows'])}."
    ]


def memory_table(found: dict[str, Any]) -> list[str]:
    (row,), sizes = found["rows"], Sizes(*found["sizes"])
    return [
        f"**Memory.** A prompt of {sizes.long} tokens has {row['active']:,} active features; {row['visited']:.1%} of "
        f"them were visited. The process took {row['process'] / 1e3:.1f} GB at its peak, {row['above'] / 1e3:.1f} GB "
        f"of it for the graph (`sl.estimate` said {row['estimated'] / 1e3:.1f} GB), and "
        f"{row['trace'] + row['prune']:,.0f} s."
    ]


def faithfulness_table(found: dict[str, Any]) -> list[str]:
    rows, sizes = found["rows"], Sizes(*found["sizes"])
    inner = statistics.median(row["completeness_inner"] for row in rows)
    beside = [(a, b) for row in rows for a, b in zip(row["circuit"], row["random"], strict=True) if not np.isnan(b)]
    more = sum(a > b for a, b in beside)
    lines = [
        f"**Faithfulness.** How much of the logits n features keep, of graphs of {len(rows)} held-out prompts of "
        f"{sizes.length} tokens; errors stay, but for the column without them. Medians with quartiles, and in how "
        "many prompts the features of most influence keep more. 1 is the model, 0 nothing of what transcoders stand "
        f"for. All errors without a feature keep {middle([row['all_errors'] for row in rows])}, all features without "
        f"an error {middle([row['all_features'] for row in rows])}. Replacement score "
        f"{middle([row['replacement'] for row in rows])}, completeness of features and logits {inner:.2f}. In "
        f"{more} of {len(beside)} comparisons the features of most influence keep more than matched ones.", "",
        f"| n | {' | '.join(RANKINGS.values())} |", f"|---|{'---|' * len(RANKINGS)}",
    ]  # fmt: skip
    for n in sizes.curve:
        here = [(row, row["sizes"].index(n)) for row in rows if n in row["sizes"]]
        cells = [cell(here, name) for name in RANKINGS]
        lines += [f"| {n:,} | {' | '.join(cells)} |"] if here else []
    return lines


def cell(here: list[tuple[dict[str, Any], int]], name: str) -> str:
    pairs = [(row["circuit"][at], row[name][at]) for row, at in here if row[name]]
    pairs = [(ours, theirs) for ours, theirs in pairs if not np.isnan(theirs)]
    if not pairs:
        return "–"
    won = "" if name in ("circuit", "no_errors") else f"; {sum(a > b for a, b in pairs)} of {len(pairs)}"
    return middle([theirs for _, theirs in pairs]) + won


def middle(values: list[float]) -> str:
    low, median, high = np.nanquantile(values, [0.25, 0.5, 0.75])
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def task_table(found: dict[str, Any]) -> list[str]:
    (row,), sizes = found["rows"], Sizes(*found["sizes"])
    carried, common = row["carried"], row["common"]
    lines = [
        f"**A task.** `trace_many` on the indirect object (the other name's logit less the giver's), {row['prompts']} "
        f"prompts and {row['held_out']} held out, {sizes.pair_features:,} features each, {row['seconds']:,.0f} s: "
        f"{row['edges']:,} edges, of which {row['sure']:,} are sure (an interval without 0). Of these {carried[0]:.0%} "
        f"have the same sign held out, and are in {common[0]:.0%} of the held-out prompts; of edges that one prompt "
        f"alone has, {carried[1]:.0%} and {common[1]:.0%}. The largest:", "",
        "| from | to | effect | 95 % | share | held out | share |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for edge in row["largest"]:
        ends = [str(edge[end]).replace("|", "\\|") for end in ("upstream", "downstream")]
        lines.append(
            f"| {ends[0]} | {ends[1]} | {edge['effect']:.2f} | {edge['low']:.2f} to {edge['high']:.2f} | "
            f"{edge['share']:.0%} | {edge['held_out']:.2f} | {edge['held_out_share']:.0%} |"
        )
    return lines


TABLES = {"edges": edges_table, "time": time_table, "memory": memory_table, "faithfulness": faithfulness_table,
          "task": task_table}  # fmt: skip


def tables(found: dict[str, Any]) -> str:
    lines = [f"Measured by `benchmarks/graphs.py` with {found['set']}, on {found['machine']}.", ""]
    for name, table in TABLES.items():
        if found.get(name, {}).get("rows"):
            lines += [*table(found[name]), ""]
    return "\n".join(lines)


# ---- what is kept


def transcoders(folder: Path) -> sl.TranscoderSet:
    if not folder.is_dir():
        raise SystemExit(
            f"{folder} has no transcoders: make them with python benchmarks/transcoders.py, or try --trial"
        )
    return sl.TranscoderSet.load(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STEPS, action="append", help="these steps alone")
    parser.add_argument("--set", type=Path, default=PACKAGE, help="a folder of transcoders")
    parser.add_argument("--features", type=int, help="visited in the long prompt, in place of 4,096")
    parser.add_argument("--trial", action="store_true", help="tiny sizes, one transcoder, no page")
    parser.add_argument("--anew", action="store_true", help="measure again what is known")
    parser.add_argument("--docs", action="store_true", help="put the tables on the page")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    sizes = TINY if args.trial else Sizes()
    sizes = sizes if args.features is None else sizes._replace(long_features=args.features)
    lm = sl.LM()
    coders = sl.TranscoderSet([sl.load("smollm2-135m/transcoder-8")]) if args.trial else transcoders(args.set)
    if args.memory:
        print(json.dumps(memory_here(lm, coders, sizes)))
        return
    path = TRIED if args.trial else RESULTS
    made = hashlib.sha256("".join(coder.fingerprint() for coder in coders).encode()).hexdigest()[:16]
    steps = {name: partial(STEPS[name], lm, coders, sizes) for name in args.only or STEPS}
    head = {"machine": processor(), "set": repr(coders)}
    found = measure(path, head, steps, {"made": made, "sizes": sizes}, args.anew)
    print(tables(found))
    if args.docs and not args.trial:
        put(PAGE, "graphs", tables(found))


if __name__ == "__main__":
    main()
