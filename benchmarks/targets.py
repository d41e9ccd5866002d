"""What L0 is reached for targets of 16, 32 and 64 by JumpReLU, L1 and Gated, over three seeds, on real activations.

    python benchmarks/targets.py --docs

The bundled model's residual stream after layer 8; coders of 1,152 features; the seed is of the coder and of the order
of tokens. L0 is in eval mode, on tokens that no training step saw. Beside it what the same coder has without a target.
Also measured: the CPU time of training with the held-out figures over that without. Writes
benchmarks/results/targets.json after each training, so that the same call goes on where one was killed, and, with
--docs, the table in docs/howto/train.md.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

from pages import put
from steps import processor

import sae_lab as sl
from sae_lab.activations.store import Store
from sae_lab.training.loop import Training

TARGETS, SEEDS, FAMILIES, WIDTH = (16.0, 32.0, 64.0), (0, 1, 2), ("JumpReLU", "L1", "Gated"), 1152
RESULTS = Path(__file__).parent / "results" / "targets.json"


def trainings() -> Iterator[tuple[int, str, float | None]]:
    """(seed, family, target) of each; without a target once a family."""
    for seed, family in product(SEEDS, FAMILIES):
        for target in (*TARGETS, *(None,) * (seed == 0)):
            yield seed, family, target


def trained(store: Store, facts: dict, seed: int, family: str, target: float | None) -> dict:
    start = time.process_time()
    config = sl.TrainConfig(steps=facts["steps"], batch_size=facts["batch_size"], seed=seed, target_l0=target)
    run = sl.train(getattr(sl, family)(store.width, WIDTH, seed=seed), store, config)
    last = run.history[-1]
    row = {"family": family, "seed": seed, "target": target, "l0": run.reached and run.reached.l0}
    row |= {"within": run.reached and run.reached.within, "held_out": run.reached and run.reached.tokens}
    row |= {name: last[name] for name in ("l0_held_out", "fvu", "fvu_held_out", "dead")}
    return row | {"coefficient": last.get("coefficient"), "cpu_s": time.process_time() - start}


def overhead(store: Store, steps: int, batch_size: int) -> dict[str, float]:
    """CPU time of a training with the held-out figures over that without: the median of three pairs."""
    ratios = []
    for _ in range(3):
        spent = {}
        for held in (True, False):
            coder = sl.BatchTopK(store.width, 4 * WIDTH, k=32)
            training = Training(coder, store, sl.TrainConfig(steps=steps, batch_size=batch_size), None, ())
            training.begin()
            with patch.object(Training, "_held_out", Training._held_out if held else lambda *_: {}):
                start = time.process_time()
                while training.going():
                    training.one_step()
                spent[held] = time.process_time() - start
        ratios.append(spent[True] / spent[False])
    return {"ratio": median(ratios), "least": min(ratios), "most": max(ratios)}


def table(rows: list[dict]) -> str:
    lines = ["| Family | " + " | ".join(f"target {t:g}" for t in TARGETS) + " | no target |", "|---" * 5 + "|"]
    for family in FAMILIES:
        mine = [row for row in rows if row["family"] == family]
        cells = []
        for target in TARGETS:
            here = [row for row in mine if row["target"] == target]
            l0s = ", ".join(f"{row['l0']:.1f}" for row in here)
            missed = sum(not row["within"] for row in here)
            cells.append(l0s + (f" ({missed} of {len(here)} not within)" if missed else ""))
        free = mean(row["l0_held_out"] for row in mine if row["target"] is None)
        lines.append(f"| {family} | {' | '.join(cells)} | {free:.1f} |")
    return "\n".join(lines)


def page(facts: dict) -> str:
    """The table, and what it was measured on."""
    rows = facts["rows"]
    held = next(row["held_out"] for row in rows if row["held_out"])
    text = (
        f"{table(rows)}\n\nOne L0 per seed, on {held:,} held-out tokens; {facts['d_sae']:,} features, "
        f"{facts['steps']} steps of {facts['batch_size']} tokens, {facts['tokens']:,} tokens harvested."
    )
    planned = len(list(trainings()))
    if len(rows) < planned:
        text += f" Of {planned} trainings {len(rows)} were measured."
    if "overhead" in facts:
        ratio = facts["overhead"]["ratio"]
        text += f" Training with the held-out figures took {ratio:.2f} times the CPU time of training without."
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300_000, help="to harvest")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--docs", action="store_true")
    args = parser.parse_args()
    store = sl.harvest(sl.LM(), sl.Site("resid_post", 8), sl.load_text(), tokens=args.tokens)
    facts = {"machine": processor(), "tokens": len(store), "steps": args.steps, "batch_size": args.batch_size}
    facts |= {"d_sae": WIDTH}
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    facts = before if facts.items() <= before.items() and "overhead" not in before else facts | {"rows": []}
    known = {(row["seed"], row["family"], row["target"]) for row in facts["rows"]}
    for which in trainings():
        if which not in known:
            facts["rows"].append(trained(store, facts, *which))
            print(facts["rows"][-1], flush=True)
            RESULTS.write_text(json.dumps(facts, indent=1))
    if "overhead" not in facts:
        RESULTS.write_text(json.dumps(facts | {"overhead": overhead(store, 20, 4096)}, indent=1))
    if args.docs:
        put("docs/howto/train.md", "targets", page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
