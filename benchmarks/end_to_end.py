"""What a short finetuning through the model is worth: ΔCE after KL + MSE, beside more MSE on as many tokens.

    python benchmarks/end_to_end.py --docs                    # 200,000 and 1 million tokens, three seeds; hours
    python benchmarks/end_to_end.py --tokens 20000 --seeds 1  # a trial of minutes

The shipped coder of the bundled model's residual stream after layer 8 is trained further, on documents of the mix in an
order drawn by the seed, in these ways, each from the same weights, with the same learning rate, warm-up and decay:

    kl       sl.TrainConfig(objective="kl")
    mse      the family's own loss, as many steps
    time     the family's own loss, as many steps as fit into the time of kl
    affine   the coder fixed; x_hat·a + b, a number and a vector, fitted by the KL on as many tokens

ΔCE, FVU and L0 are measured on held-out documents of two domains, of which the second is not trained on (its documents
are left out of the mix). Ratios of ΔCE are paired by document: the mean over seeds, and a 95 % interval by the delta
method. Each training is written to benchmarks/results/end_to_end.json as soon as it is measured, so that the same call
goes on where one was killed.
"""

import argparse
import copy
import json
import random
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pages import put
from steps import processor
from torch import Tensor
from train_shipped import DOMAINS, held_out

import sae_lab as sl
from sae_lab.activations.contexts import spread_contexts
from sae_lab.activations.reconstructing import read_and_reconstruct
from sae_lab.activations.sharding import in_groups
from sae_lab.lm.text import mix_sources, padded
from sae_lab.saes.losses import fvu
from sae_lab.stats import clustered_error, ratio_error
from sae_lab.training.start import rows_for
from sae_lab.training.through import Through

CODER, SITE, CONTEXT, BATCH, LR = "smollm2-135m/resid_post-8", sl.Site("resid_post", 8), 128, 2048, 2e-4
HERE, ELSEWHERE = "encyclopedia", "reviews"  # domains: one of the training text, and another
WAYS = ("kl", "mse", "time", "affine")
NAMES = {"start": "as shipped", "kl": "KL + MSE", "mse": "MSE, as many steps", "time": "MSE, as much time",
         "affine": "scale and bias, by KL"}  # fmt: skip
PUBLISHED = (0.5, 0.8)  # of the ΔCE before, after KL + MSE (Karvonen 2025, arXiv:2503.17272)
RESULTS = Path(__file__).parent / "results" / "end_to_end.json"


class Measure:
    """ΔCE, FVU and L0 of coders on the same held-out tokens; the model's own loss is measured once."""

    def __init__(self, lm: sl.LM, domains: dict[str, list[str]], tokens: int):
        self.lm = lm
        self.contexts = {name: spread_contexts(lm, of, tokens, CONTEXT) for name, of in domains.items()}
        self.clean = {name: self._losses(name, []) for name in domains}

    def _losses(self, domain: str, edits: list[sl.Splice]) -> Tensor:
        """Of each predicted token."""
        parts = []
        for few in in_groups(self.contexts[domain], 1024):
            batch = padded(few)
            losses = self.lm.loss(batch, edits, per_token=True)
            parts.append(losses[:, 1:][batch.mask[:, 1:]])
        return torch.cat(parts)

    def __call__(self, coder: sl.SparseCoder) -> dict[str, Any]:
        """The figures on each domain; ΔCE also as its sum in each document."""
        rows = {}
        for name, contexts in self.contexts.items():
            deltas = self._losses(name, [sl.Splice(coder)]) - self.clean[name]
            documents = torch.tensor([d for c in contexts for d in c.documents[1:]])
            names, where = documents.unique(return_inverse=True)
            sums = torch.zeros(len(names)).index_add(0, where, deltas)
            read = read_and_reconstruct(coder, self.lm, contexts)
            y, y_hat = read.y[read.kept], read.y_hat[read.kept]
            rows[name] = {
                "ce_delta": round(float(deltas.mean()), 5),
                "ce_delta_se": round(clustered_error(deltas, documents), 5),
                "fvu": round(float(fvu(y_hat, y)), 5),
                "l0": round(float(read.active[read.kept].mean()), 2),
                "documents": [round(float(total), 3) for total in sums],
            }
        return rows


def affine(coder: sl.SparseCoder, stream: sl.Stream, config: sl.TrainConfig) -> None:
    """Fit a and b of x_hat·a + b by the KL, and put them into the coder."""
    loss = Through(rows_for(coder, stream), coder, config)
    a, b = torch.ones((), requires_grad=True), torch.zeros(coder.d_out, requires_grad=True)
    size = float(stream.first(1024).x.norm(dim=1).mean()) / coder.d_out**0.5
    adam = torch.optim.Adam([{"params": [a]}, {"params": [b], "scale": size}])
    one = torch.ones(())
    for step in range(config.total_steps):
        batch = loss.batch(step, config.batch_size)
        with torch.no_grad():
            x_hat = coder(batch.x, batch.tokens).x_hat
        adam.zero_grad()
        loss.terms(x_hat * a + b, {"mse": one})[0]["through"].backward()
        for group in adam.param_groups:
            group["lr"] = 10 * config.lr_at(step, coder.d_sae) * group.get("scale", 1.0)
        adam.step()
    with torch.no_grad():
        new = a * coder.b_dec + b
        coder.b_enc += (new - coder.b_dec) @ coder.W_enc  # the encoder reads x - b_dec: it stays as it is
        coder.W_dec *= a
        coder.b_dec.copy_(new)


def trained_on(text: sl.Text) -> list[str]:
    """The documents of the mix without those of the other domain, and without held-out ones."""
    left_out = set(mix_sources()[DOMAINS[ELSEWHERE]])
    return [document for document in text if document not in left_out]


def stream_of(lm: sl.LM, documents: list[str], tokens: int, seed: int) -> sl.Stream:
    """The documents in an order of their own. A wide buffer also has many rows on which thresholds are fitted."""
    order = documents[:]
    random.Random(seed).shuffle(order)
    buffer = max(16_384, min(131_072, tokens // 2))
    stream = sl.Stream(lm, SITE, order, buffer=buffer, context=CONTEXT)
    stream.first(1)  # what stays in memory is read once for all ways, before any is timed
    return stream


def finetuned(
    way: str, start: sl.SparseCoder, stream: sl.Stream, tokens: int, share_of_time: float
) -> tuple[sl.SparseCoder, dict[str, Any]]:
    """(the coder, seconds and tokens of its training)."""
    coder = copy.deepcopy(start)
    many = int(tokens * share_of_time) if way == "time" else tokens
    objective = "kl" if way in ("kl", "affine") else "reconstruction"
    share = 1.0 if way == "affine" else 0.5
    config = sl.TrainConfig(tokens=many, batch_size=BATCH, lr=LR, objective=objective, share=share, log_every=5)
    began = time.process_time()  # a busy machine stretches the clock, and would favour one way
    if way == "affine":
        affine(coder, stream, config)
    else:
        sl.train(coder, stream, config)
    return coder.eval(), {"seconds": round(time.process_time() - began, 1), "tokens": config.total_steps * BATCH}


def ratio(runs: list[dict[str, Any]], others: list[dict[str, Any]], domain: str) -> tuple[float, float, float]:
    """(ΔCE of the runs, a mean over seeds, as a multiple of the others'; its 95 % interval, paired by document)."""

    def sums(of: list[dict[str, Any]]) -> Tensor:
        return torch.tensor([run["figures"][domain]["documents"] for run in of]).double().mean(0)

    top, bottom = sums(runs), sums(others)
    found, error = float(top.sum() / bottom.sum()), ratio_error(top, bottom, torch.arange(len(top)))
    return found, found - 1.96 * error, found + 1.96 * error


def verdict(low: float, high: float) -> str:
    """What the interval of kl's ratio to the start says of the published one."""
    least, most = PUBLISHED
    if low >= least and high <= most:
        return "holds: the interval lies within"
    if high < least:
        return "more than published: the interval lies below"
    if low > most:
        return "does not hold: the interval lies above"
    return "open: the interval crosses a bound"


def table(facts: dict[str, Any]) -> str:
    lines = [
        "| tokens | way | text | ΔCE (one per seed) | of that before | of MSE's, as many steps | FVU | L0 | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    start, said = [facts["start"]], []
    for tokens in sorted({run["asked"] for run in facts["runs"]}):
        for way in ("start", *WAYS):
            of = {w: [r for r in facts["runs"] if (r["asked"], r["way"]) == (tokens, w)] for w in WAYS} | {
                "start": start
            }
            runs = of[way]
            for domain in (HERE, ELSEWHERE) if runs else ():
                rows = [run["figures"][domain] for run in runs]
                cells = [f"{tokens:,}", NAMES[way], domain, ", ".join(f"{row['ce_delta']:.4f}" for row in rows)]
                for other in ("start", "mse"):
                    seeds = {run.get("seed") for run in runs}
                    beside = [run for run in of[other] if other == "start" or run["seed"] in seeds]
                    same = way in ("start", other) or (other == "mse" and len(beside) != len(runs))
                    cells.append("" if same else "{:.3f} ({:.3f} to {:.3f})".format(*ratio(runs, beside, domain)))
                cells += [
                    f"{mean([row[name] for row in rows]):{form}}" for name, form in (("fvu", ".4f"), ("l0", ".1f"))
                ]
                cells += [f"{mean([run['seconds'] for run in runs]):.0f}" if way != "start" else ""]
                lines.append(f"| {' | '.join(cells)} |")
                if way == "kl":
                    _, low, high = ratio(runs, start, domain)
                    said.append(f"{tokens:,} tokens, {domain}: {verdict(low, high)} {PUBLISHED[0]} to {PUBLISHED[1]}.")
    seeds = len({run["seed"] for run in facts["runs"]})
    about = (
        f"`{CODER}`, {seeds} seed{'s' * (seeds > 1)}, steps of {BATCH:,} tokens, peak learning rate {LR:g}; ΔCE in "
        f"nats/token on {facts['evaluated']:,} held-out tokens of each text; in brackets: 95 % over documents; "
        f"s: processor seconds of training ({facts['machine']}). Against the published ratio of the ΔCE before "
        "(arXiv:2503.17272): " + " ".join(said)
    )
    return "\n".join([*lines, "", about])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, action="append", help="of finetuning; several times for several")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluated", type=int, help="tokens of each domain; by default 16,384, of a trial 2,048")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="put the table into docs/howto/train.md")
    args = parser.parse_args()
    sizes = args.tokens or [200_000, 1_000_000]
    evaluated = args.evaluated or (16_384 if max(sizes) > 100_000 else 2_048)
    lm, start, text = sl.LM(), sl.load(CODER).eval(), sl.load_text("mix")
    domains = held_out(text)
    measure = Measure(lm, {name: domains[name] for name in (HERE, ELSEWHERE)}, evaluated)
    facts = {"machine": processor(), "coder": start.fingerprint(), "evaluated": evaluated, "batch": BATCH, "lr": LR}
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    if facts.items() <= before.items():
        facts = before
    else:
        facts |= {"start": {"figures": measure(start)}, "runs": []}
    known = {(run["asked"], run["seed"], run["way"]): run for run in facts["runs"]}
    documents = trained_on(text)
    for tokens in sizes:
        for seed in range(args.seeds):
            wanted = [way for way in WAYS if (tokens, seed, way) not in known]
            if not wanted:
                continue
            stream = stream_of(lm, documents, tokens, seed)
            for way in wanted:
                both = [known.get((tokens, seed, w), {}).get("seconds", 1.0) for w in ("kl", "mse")]
                coder, run = finetuned(way, start, stream, tokens, both[0] / both[1])
                run |= {"asked": tokens, "seed": seed, "way": way, "figures": measure(coder)}
                known[tokens, seed, way] = run
                facts["runs"].append(run)
                args.out.write_text(json.dumps(facts, indent=1))
                shown = {name: row["ce_delta"] for name, row in run["figures"].items()}
                print(tokens, seed, way, run["seconds"], "s", shown, flush=True)
    print(table(facts))
    if args.docs:
        put("docs/howto/train.md", "end to end", table(facts))


if __name__ == "__main__":
    main()
