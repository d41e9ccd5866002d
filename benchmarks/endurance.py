"""make endurance: kills, full disks, damaged and hostile files, bad arguments, a hostile server; one table.

    python benchmarks/endurance.py                 # about a fifth of the tries
    python benchmarks/endurance.py --full          # all of them: an hour or more, best in the background
    python benchmarks/endurance.py --only kills    # one battery: its line of the table is made anew

The batteries are tests/batteries/*.py; the tests run them with few tries. Each has a process of its own: children that
are killed are forked from one that has started no threads. Writes benchmarks/results/endurance.json and
docs/endurance.md, and says every fault. Ends with 1 where a count that must be 0 is not.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JSON, TABLE = ROOT / "benchmarks" / "results" / "endurance.json", ROOT / "docs" / "endurance.md"
BATTERIES = ("kills", "full_disk", "damage", "hostile", "scripts", "bad_arguments", "ndif", "notes")
QUIET = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# Of bad arguments, this share may be refused by an error that is not a sentence of ours; every other count must be 0.
UNCLEAR = {"bad_arguments": 0.02}
ABOUT = ("title", "tries", "seconds", "bad", "full", "seed")  # what is no count of faults


def one(name: str, full: bool, seed: int, out: Path) -> None:
    """Run a battery in this process and write what it counted."""
    sys.path.insert(0, str(ROOT / "tests"))
    battery = importlib.import_module(f"batteries.{name}")
    began = time.perf_counter()
    found = battery.run(full, seed)
    out.write_text(json.dumps({"title": battery.TITLE, **found, "seconds": time.perf_counter() - began}))


def apart(name: str, full: bool, seed: int) -> dict[str, Any]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--only", name, "--seed", str(seed), "--out", str(out)]
        ended = subprocess.run(command + ["--full"] * full, env=os.environ | QUIET, stderr=subprocess.PIPE, text=True)
        if not out.exists():
            raise SystemExit(f"the battery {name} did not end (exit {ended.returncode}):\n{ended.stderr[-3000:]}")
        return json.loads(out.read_text())


def faults(name: str, found: dict[str, Any]) -> list[str]:
    """The counts that should be 0 and are not."""
    counts = {k: v for k, v in found.items() if k not in ABOUT}
    few = UNCLEAR.get(name, 0) * found["tries"]
    return [f"{k} {v}" for k, v in counts.items() if v > (few if k == "unclear" else 0)]


def line(found: dict[str, Any]) -> str:
    counts = ", ".join(f"{k} {v}" for k, v in found.items() if k not in ABOUT)
    return f"| {found['title']} | {found['tries']} | {counts} | {found['seconds']:.0f} |"


def page(results: dict[str, dict[str, Any]]) -> str:
    lines = "\n".join(line(results[name]) for name in BATTERIES if name in results)
    few = [name for name in BATTERIES if name in results and not results[name]["full"]]
    return f"""# Endurance

Made by `make endurance FULL=--full`{f"; with a part of the tries: {', '.join(few)}" if few else ""}.
What is done to the library, how often, and how often it then lost something, said nothing or said something unclear:
each battery counts what must be 0, and of bad arguments at most 2 % may be refused in words that are not ours
(`unclear`). Tiny random models; {platform.system()}, Python {platform.python_version()}; seconds of wall time beside
other work.

| What | Tries | Faults | Seconds |
|---|--:|---|--:|
{lines}
"""


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--full", action="store_true", help="all tries")
    ask.add_argument("--only", choices=BATTERIES, help="one battery")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.only and args.out:
        return one(args.only, args.full, args.seed, args.out)
    results = json.loads(JSON.read_text()) if args.only and JSON.exists() else {}
    wrong = False
    for name in [args.only] if args.only else BATTERIES:
        results[name] = apart(name, args.full, args.seed) | {"full": args.full, "seed": args.seed}
        print(line(results[name]), *results[name].get("bad", []), sep="\n    ", flush=True)
        wrong = wrong or bool(faults(name, results[name]))
        JSON.write_text(json.dumps(results, indent=1) + "\n")
        TABLE.write_text(page(results))
    sys.exit(wrong)


if __name__ == "__main__":
    main()
