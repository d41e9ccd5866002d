"""make models: a tiny random model of every text architecture that the installed transformers maps to a causal LM, each
checked against plain PyTorch hooks (tests/checking_models.py says how). One thread, about seven minutes.

    python benchmarks/models.py --only llama gpt2     # some of them, with all that was found; writes nothing

Writes benchmarks/results/models.json and docs/models.md. Ends with 1 where a model is wrong, unclear or refused without
need.
"""

import argparse
import json
import logging
import os
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(ROOT / "tests"))
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from checking_models import Result, check  # noqa: E402
from tiny_models import NAMES  # noqa: E402

JSON, TABLE = ROOT / "benchmarks" / "results" / "models.json", ROOT / "docs" / "models.md"
BAD = ("WRONG", "UNCLEAR", "UNFAIR")
KINDS = ("embed", "resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")


def where(result: Result, kind: str) -> str:
    """At which layers a kind is offered: "all", their numbers, or "–"."""
    layers = result.kinds.get(kind, [])
    if len(layers) == (1 if kind == "embed" else result.layers):
        return "all"
    return ",".join(map(str, layers)) or "–"


def sentence(text: str) -> str:
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return text if len(text) < 220 else text[:217] + "..."


def notes(result: Result) -> str:
    """Why it is refused, or what of it is: refusals by kind are seen in the kinds' columns."""
    if result.whole:
        return sentence(result.whole)
    refused = [f.what for f in result.findings if f.kind == "refused" and not f.what.startswith("read ")]
    return f"refused: {', '.join(refused)}" if refused else ""


def lines(result: Result, all_: bool) -> list[str]:
    """What was found, one line for the same thing at several layers."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for f in result.findings:
        layer = re.search(r"(?<=-)\d+|(?<= at )\d+", f.what)
        text = re.sub(r"layer \d+", "layer …", re.sub(r"layer=\d+", "layer=…", f.text))
        key = f.kind, re.sub(r"-\d+|at \d+", "", f.what), re.sub(r"off by \S+", "off", text)
        found.setdefault(key, []).append(layer[0] if layer else "")
    shown = [(*key, ",".join(filter(None, layers))) for key, layers in found.items() if key[0] in BAD or all_]
    return [f"    {kind:8} {what} [{layers}]: {text}" for kind, what, text, layers in shown]


def as_json(result: Result) -> dict:
    return {
        "name": result.name, "verdict": result.verdict, "attention": result.attention, "layers": result.layers,
        "kinds": result.kinds, "whole": result.whole, "found": [line.strip() for line in lines(result, all_=True)],
    }  # fmt: skip


def table(results: list[Result], seconds: float) -> str:
    count = Counter(result.verdict for result in results if ":" not in result.name)
    variants = Counter(result.verdict for result in results if ":" in result.name)
    right = [r for r in results if ":" not in r.name and r.verdict == "right"]
    streams = [r for r in right if r.layers and all(where(r, kind) == "all" for kind in ("resid_pre", "resid_post"))]
    whole = [r for r in right if all(where(r, kind) == "all" for kind in KINDS)]
    seen = [r for r in results if ":" not in r.name and r.attention and r.verdict != "refused"]
    rows = [
        "# Models",
        "",
        f"Made by `make models`: a tiny random model of each of the {sum(count.values())} architectures that "
        f"transformers {transformers.__version__} maps to a causal LM, and of {sum(variants.values())} variants, "
        "checked against plain PyTorch hooks: what is read at every kind of site and layer, the identities between "
        "kinds, an edit at every kind, generation with and without an edit against the argmax without a cache, a "
        "batch of unequal rows, the lens, direct effects, reconstruction, a harvest. Weights are random, with gains, "
        "biases and multipliers away from 0 and 1; float32 on a CPU.",
        "",
        f"Right in everything that is offered: {count['right']} architectures ({variants['right']} variants); "
        f"{len(streams)} of them have the residual stream at every layer, {len(whole)} every kind. Refused by a rule: "
        f"{count['refused']} ({variants['refused']}). Not built here: {count['unbuilt']}. Wrong: "
        f"{count['WRONG'] + variants['WRONG']}. Unclear: {count['UNCLEAR'] + variants['UNCLEAR']}. Refused though "
        f"plain hooks find it: {count['UNFAIR'] + variants['UNFAIR']}. Decoders with softmax attention among those "
        f"right: {sum(r.verdict == 'right' for r in seen)} of {len(seen)} that are not refused by rule. "
        f"{seconds / 60:.0f} minutes on one thread.",
        "",
        "A kind's column says at which of the model's layers it is offered (mostly four): `all`, their numbers, or `–` "
        "where plain hooks find no tensor of its meaning either.",
        "",
        "| Model type | Verdict | " + " | ".join(f"`{kind}`" for kind in KINDS) + " | Notes |",
        "|---" * (len(KINDS) + 3) + "|",
    ]
    for r in results:
        verdict = {"unbuilt": "not built"}.get(r.verdict, r.verdict)
        kinds = ["" if r.whole else where(r, kind) for kind in KINDS]
        rows.append(f"| {r.name} | {verdict} | {' | '.join(kinds)} | {notes(r)} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models; nothing is written")
    args = parser.parse_args()
    if unknown := set(args.only or ()) - set(NAMES):
        parser.error(f"no such models: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results, begin = [], time.perf_counter()
    for name in args.only or NAMES:
        start = time.perf_counter()
        result = check(name)
        results.append(result)
        print(f"{name:34} {result.verdict:9} {time.perf_counter() - start:5.1f} s  {notes(result)}", flush=True)
        for line in lines(result, all_=bool(args.only)):
            print(line, flush=True)
    seconds = time.perf_counter() - begin
    print(dict(Counter(result.verdict for result in results)), f"{seconds:.0f} s")
    if not args.only:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__, "seconds": round(seconds)}
        JSON.write_text(json.dumps(versions | {"models": [as_json(r) for r in results]}, indent=1))
        TABLE.write_text(table(results, seconds), encoding="utf-8")
    return int(any(result.verdict in BAD for result in results))


if __name__ == "__main__":
    sys.exit(main())
