"""make bench: training steps of this library and of its peers, in multiples of one encoder product, with peak memory.

All steps run in one process, in turn, on the same rotating batches of real activations: medians of interleaved steps.
M is the time of x·W_enc at the same size into a buffer that is there already. Memory is the peak of a process of its
own, above what it held before the coder was made. Prints a table, and writes benchmarks/results/steps.json and, with
--docs, the table in docs/speed.md.

--quick: three rounds of the first case, no memory, nothing written.   --rounds N: 9 if not given.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # sparsify's path on a CPU

import torch
from pages import put
from torch import Tensor

import sae_lab as sl
from sae_lab.activations.store import Rows
from sae_lab.training.loop import Training

BATCH, D, BATCHES, LR = 4096, 576, 4, 1e-3
RESULTS = Path(__file__).parent / "results" / "steps.json"


class Contender(NamedTuple):
    step: Callable[[Tensor], object]  # a training step on a batch
    x_hat: Callable[[Tensor], Tensor]  # reconstructions


class Case(NamedTuple):
    d_sae: int
    k: int
    half_dead: bool = False  # half of the features count as dead, so that AuxK is on

    def __str__(self) -> str:
        return f"d_sae {self.d_sae}, k {self.k}" + (", half dead" if self.half_dead else "")

    @property
    def asleep(self) -> Tensor:
        return torch.arange(self.d_sae) % 2 == 0


Make = Callable[[Case, Tensor, int], Contender]  # (case, activations, seed)

# ---------------------------------------------------------------------------------------------- contenders


def ours(family: str) -> Make:
    """The library's own step with all it does: checks, metrics, decoder norms, dead features."""

    def make(case: Case, x: Tensor, seed: int = 0) -> Contender:
        coder = getattr(sl, family)(D, case.d_sae, k=case.k, seed=seed)
        config = sl.TrainConfig(steps=10**6, batch_size=BATCH, lr=LR, warmup=0, decay=0)
        training = Training(coder, Rows(x), config, None, ())
        training.begin()

        def step(batch: Tensor) -> None:
            training.idle[case.asleep if case.half_dead else []] = 10**9
            training.one_step(sl.Batch(batch, batch))

        return Contender(step, lambda x: coder(x * training.scale).x_hat / training.scale)

    return make


def saelens(family: str, **config: bool) -> Make:
    def make(case: Case, x: Tensor, seed: int = 0) -> Contender:
        from sae_lens import saes
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(seed)
        settings = {"d_in": D, "d_sae": case.d_sae, "k": case.k, **config}
        if family.startswith("Matryoshka"):
            settings["matryoshka_widths"] = list(sl.Matryoshka(D, case.d_sae, k=case.k).prefixes)
        sae = getattr(saes, f"{family}TrainingSAE")(getattr(saes, f"{family}TrainingSAEConfig")(**settings))
        trainer = SAETrainer(
            SAETrainerConfig(total_training_samples=10**12, train_batch_size_samples=BATCH, lr=LR, lr_end=LR),
            sae, data_provider=iter(()),
        )  # fmt: skip

        def step(batch: Tensor) -> None:
            trainer.n_forward_passes_since_fired[case.asleep if case.half_dead else []] = 10**9
            trainer.step(batch)
            trainer.n_training_steps += 1

        return Contender(step, sae)

    return make


def sparsify(case: Case, x: Tensor, seed: int = 0) -> Contender:
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(seed)
    sae = SparseCoder(D, SparseCoderConfig(num_latents=case.d_sae, k=case.k), dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    since = torch.zeros(case.d_sae, dtype=torch.long)

    def step(batch: Tensor) -> None:  # as sparsify's trainer does
        sae.set_decoder_norm_to_unit_norm()
        out = sae(batch, batch, dead_mask=case.asleep if case.half_dead else None)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since.add_(BATCH)
        since[out.latent_indices.flatten().unique()] = 0

    return Contender(step, lambda x: sae(x).sae_out)


def dictionary_learning(family: str) -> Make:
    def make(case: Case, x: Tensor, seed: int = 0) -> Contender:
        from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

        cls = {
            "TopK": top_k.TopKTrainer, "BatchTopK": batch_top_k.BatchTopKTrainer,
            "Matryoshka": matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        }[family]  # fmt: skip
        config = {}
        if family == "Matryoshka":
            prefixes = [0, *sl.Matryoshka(D, case.d_sae, k=case.k).prefixes]
            config["group_fractions"] = [(b - a) / case.d_sae for a, b in pairwise(prefixes)]
        trainer = cls(
            steps=10**6, activation_dim=D, dict_size=case.d_sae, k=case.k, layer=0, lm_name="", lr=LR, warmup_steps=0,
            device="cpu", seed=seed, **config,
        )  # fmt: skip
        trainer.update(0, x[:BATCH])  # its geometric median

        def step(batch: Tensor) -> None:
            trainer.num_tokens_since_fired[case.asleep if case.half_dead else []] = 10**9
            trainer.update(1, batch)

        return Contender(step, trainer.ae)

    return make


TOPK = {
    "sae_lab TopK": ours("TopK"),
    "SAELens TopK": saelens("TopK"),
    "SAELens TopK, rescale off": saelens("TopK", rescale_acts_by_decoder_norm=False),
    "sparsify TopK": sparsify,
    "dictionary_learning TopK": dictionary_learning("TopK"),
}
BATCHTOPK = {
    "sae_lab BatchTopK": ours("BatchTopK"),
    "SAELens BatchTopK": saelens("BatchTopK"),
    "dictionary_learning BatchTopK": dictionary_learning("BatchTopK"),
    "sae_lab Matryoshka": ours("Matryoshka"),
    "SAELens Matryoshka": saelens("MatryoshkaBatchTopK"),
    "dictionary_learning Matryoshka": dictionary_learning("Matryoshka"),
}
CONTENDERS = TOPK | BATCHTOPK
SUITES = [
    (Case(9216, 32), TOPK | BATCHTOPK),
    (Case(9216, 32, half_dead=True), TOPK),
    (Case(36864, 64), {n: c for n, c in TOPK.items() if "rescale" not in n}),
]


# ---------------------------------------------------------------------------------------------- measuring


def activations(batches: int) -> tuple[Tensor, Tensor]:
    """(real ones in random order, others that stand in none of these batches), of norm √d on average."""
    store = sl.harvest(sl.LM(), sl.Site("resid_post", 8), sl.load_text(), tokens=100_000)
    x = torch.cat([store.batch(i, BATCH).x for i in range(batches)])
    scale = D**0.5 / x.norm(dim=1).mean()
    return x * scale, store.unseen(8192).x * scale


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def product(case: Case) -> Callable[[Tensor], Tensor]:
    W, out = torch.randn(case.d_sae, D).T, torch.empty(BATCH, case.d_sae)
    return lambda batch: torch.mm(batch, W, out=out)


def times(case: Case, contenders: dict[str, Make], x: Tensor, rounds: int):
    """{name: (median seconds of a step, seconds of each)}, "M" among them."""
    steps = {"M": product(case)} | {name: make(case, x, 0).step for name, make in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        batch = x.view(BATCHES, BATCH, D)[round_ % BATCHES].contiguous()
        for name, step in steps.items():
            start = time.perf_counter()
            step(batch)
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(all_), all_) for name, all_ in seconds.items()}


def peak_memory(name: str, case: Case, file: str) -> float:
    """MB above what was held before the coder was made, over three steps (in this process, which does nothing else)."""

    def resident(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))

    x = torch.load(file)
    CONTENDERS[name](Case(64, 4), x, 0)  # what is imported when first used is not the coder's
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step = CONTENDERS[name](case, x, 0).step
    for _ in range(3):
        step(x[:BATCH])
    return resident("VmHWM") - before


def memory_elsewhere(name: str, case: Case, file: str) -> float:
    command = [sys.executable, __file__, "--memory", name, *map(str, case), file]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def markdown(rows: list[dict[str, Any]], machine: str) -> str:
    """The table of docs/speed.md: each step, its time, and that time over ours of the same family."""
    lines = ["| | Step | in M | to ours | Peak memory |", "|---|---|---|---|---|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        here = {row["step"]: row for row in rows if row["case"] == case}
        first = f"{case} (M = {here.pop('M')['ms']:.0f} ms)"
        for name, row in here.items():
            family = name.split(",")[0].rsplit(" ", 1)[1]
            ratio = row["ms"] / here[f"sae_lab {family}"]["ms"]
            shown = f"**{name}**" if ratio == 1 else name
            lines.append(f"| {first} | {shown} | {row['in_M']:.2f} | {ratio:.1f} | {row['peak_MB']:,.0f} MB |")
            first = ""
    return "\n".join([*lines, "", f"{machine}; batch {BATCH}, d_in {D}, float32."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", nargs=5)
    args = parser.parse_args()
    if args.memory:
        name, d_sae, k, dead, file = args.memory
        print(peak_memory(name, Case(int(d_sae), int(k), dead == "True"), file))
        return
    x, _ = activations(BATCHES)
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results = []
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(x, file.name)
        for case, contenders in SUITES[: 1 if args.quick else None]:
            measured = times(case, contenders, x, 3 if args.quick else args.rounds)
            unit = measured["M"][0]
            print(f"\n{case}: M = {1e3 * unit:.0f} ms ({machine})")
            for name, (median, all_) in measured.items():
                row = {"case": str(case), "step": name, "ms": 1e3 * median, "in_M": median / unit, "all_s": all_}
                if name != "M" and not args.quick:
                    row["peak_MB"] = memory_elsewhere(name, case, file.name)
                results.append(row)
                memory = f"{row['peak_MB']:8.0f} MB" if "peak_MB" in row else ""
                print(f"  {name:32} {1e3 * median:7.0f} ms {median / unit:6.2f} M {memory}", flush=True)
    if not args.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": machine, "rows": results}, indent=1))
        if args.docs:
            put("docs/speed.md", "steps", markdown(results, machine))


if __name__ == "__main__":
    main()
