"""What training past one laptop costs. Parts: stream (against a store).

stream: on the bundled model, in one process and in turns, medians of ``--rounds``: a bare forward pass over the text; a
stream that is read without a coder; steps of a coder on batches in memory; a training on a stream. Then a training on a
store and one on a stream of as many tokens, measured on the same held-out rows; and the memory of a stream that serves
up to ten million rows of a model whose output is simulated (rows drawn beforehand), read without a coder. Prints a
table and writes benchmarks/results/scale.json and a table of docs/speed.md.

    python benchmarks/scale.py stream [--tokens 100000] [--rounds 3] [--rows 10000000]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pages import put
from steps import processor

import sae_lab as sl
from sae_lab import costs
from sae_lab.activations.sharding import FORWARD_TOKENS
from sae_lab.lm.text import padded
from sae_lab.training.loop import Training, measured

SITE, D_SAE, K, BUFFER, CONTEXT = sl.Site("resid_post", 8), 4608, 32, 32_768, 128
RESULTS = Path(__file__).parent / "results" / "scale.json"


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def counting() -> Iterator[list[int]]:
    """Tokens of each pass of the model."""
    seen: list[int] = []
    run = sl.LM.run

    def counted(lm: sl.LM, batch: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(int(batch.mask.sum()))
        return run(lm, batch, *args, **kwargs)

    with patch.object(sl.LM, "run", counted):
        yield seen


def bare(lm: sl.LM, text: sl.Text, tokens: int) -> float:
    """Tokens per second of the model alone, in the passes that a harvest makes."""
    read, batches = 0, []
    for contexts in text.passes(lm.tokenizer, lm.prefix_id, CONTEXT, False, FORWARD_TOKENS):
        batches.append(padded(contexts))
        read += sum(len(c.ids) for c in contexts)
        if read >= tokens:
            break
    return read / timed(lambda: [lm.run(batch, [SITE], logits=False) for batch in batches])


def without_coder(lm: sl.LM, text: sl.Text, tokens: int, batch_size: int) -> float:
    """Tokens that the model reads per second for a stream, from its first row on."""
    stream, step = sl.Stream(lm, SITE, text, buffer=BUFFER, context=CONTEXT), 0
    with counting() as seen:
        start = time.perf_counter()
        while sum(seen) < tokens:
            stream.batch(step, batch_size)
            step += 1
        stream.rest()
        return sum(seen) / (time.perf_counter() - start)


def steps_alone(stream: sl.Stream, config: sl.TrainConfig) -> float:
    """Seconds of a step on batches in memory."""
    batches = [stream.batch(step, config.batch_size) for step in range(4)]
    stream.rest()
    training = Training(coder(stream), stream, config, None, ())
    training.begin()
    return statistics.median(timed(lambda i=i: training.one_step(batches[i % 4])) for i in range(8))


def coder(data: sl.Store | sl.Stream) -> sl.SparseCoder:
    return sl.TopK(data.width, D_SAE, k=K)


def with_coder(lm: sl.LM, text: sl.Text, config: sl.TrainConfig, rate: float, step: float) -> float:
    """Time of a training on a stream, calibration apart, in multiples of the model's and the steps' own."""
    stream, ends = sl.Stream(lm, SITE, text, buffer=BUFFER, context=CONTEXT), []
    with counting() as seen:
        start = time.perf_counter()
        sl.train(coder(stream), stream, config, callbacks=[lambda event: ends.append((time.perf_counter(), sum(seen)))])
    taken, read = ends[-2]  # of the last step; "end" comes after it
    return (taken - start) / (read / rate + config.total_steps * step)


def quality(lm: sl.LM, text: sl.Text, config: sl.TrainConfig) -> tuple[float, float]:
    """FVU of coders trained on a store and on a stream, on rows that neither saw."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        store = sl.harvest(lm, SITE, text, 2 * config.total_steps * config.batch_size, path=folder, context=CONTEXT)
        for data in (store, sl.Stream(lm, SITE, text, buffer=BUFFER, context=CONTEXT)):
            sae = coder(data)
            sl.train(sae, data, config)
            found.append(measured(sae, store.unseen(16_384))["fvu"])
    return found[0], found[1]


def memory(lm: sl.LM, text: sl.Text, rows: int, batch_size: int) -> dict[str, float]:
    """MB in use after each tenth of the rows, above those before the stream. The model's output is simulated."""
    pool = torch.randn(FORWARD_TOKENS, lm.width(SITE))

    def simulated(lm: sl.LM, batch: Any, *args: Any, **kwargs: Any) -> Any:
        return {SITE: pool[: batch.ids.numel()].reshape(*batch.ids.shape, -1)}, None

    before, found = costs.in_use()[0], {}
    stream, steps = sl.Stream(lm, SITE, text, buffer=BUFFER, context=CONTEXT), rows // batch_size
    with patch.object(sl.LM, "run", simulated):
        for step in range(steps):
            stream.batch(step, batch_size)
            if (step + 1) % (steps // 10) == 0:
                found[f"MB after {(step + 1) * batch_size:,} rows"] = (costs.in_use()[0] - before) / 1e6
        stream.rest()
    return found


def stream_part(args: argparse.Namespace) -> dict[str, float]:
    lm, text = sl.LM(), sl.load_text()
    config = sl.TrainConfig(tokens=args.tokens)
    bare(lm, text, 10_000)  # the first passes are slow
    step = steps_alone(sl.Stream(lm, SITE, text, buffer=BUFFER, context=CONTEXT), config)
    rounds: list[tuple[float, float, float]] = []
    for _ in range(args.rounds):
        rate = bare(lm, text, args.tokens)
        read = without_coder(lm, text, args.tokens, config.batch_size)
        rounds.append((rate, read / rate, with_coder(lm, text, config, rate, step)))
    rate, alone, both = (statistics.median(column) for column in zip(*rounds, strict=True))
    of_store, of_stream = quality(lm, text, config)
    return {
        "bare forward, tokens/s": rate,
        "stream without a coder / bare forward": alone,
        "seconds of a step alone": step,
        "training on a stream / (model + steps)": both,
        "FVU, store": of_store,
        "FVU, stream": of_stream,
        "FVU, stream - store": of_stream - of_store,
    } | memory(lm, text, args.rows, config.batch_size)


PARTS = {"stream": stream_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tokens", type=int, default=100_000, help="of a training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=10_000_000, help="that the simulated model serves")
    args = parser.parse_args()
    found = PARTS[args.part](args)
    for name, value in found.items():
        print(f"{name:48} {value:12.4g}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    facts = {"machine": processor(), "coder": f"TopK, d_sae {D_SAE}, k {K}", "buffer": BUFFER, "tokens": args.tokens}
    results |= {args.part: facts | found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    put("docs/speed.md", "a stream against a store", page(results["stream"]))


def page(found: dict[str, Any]) -> str:
    """The table of docs/speed.md."""
    memory = {name: value for name, value in found.items() if name.startswith("MB after")}
    served = list(memory)[-1].split()[2]
    rows = {
        "reading, without a coder, in parts of the bare model's speed": "{stream without a coder / bare forward:.2f}",
        "a training's time, in parts of the model's and the steps'": "{training on a stream / (model + steps):.2f}",
        "held-out FVU, on a store and on a stream of as many tokens": "{FVU, store:.3f}, {FVU, stream:.3f}",
        f"memory above the start, while {served} rows are served": "{low:.0f} to {high:.0f} MB",
    }
    values = found | {"low": min(memory.values()), "high": max(memory.values())}
    head = f"{found['coder']}, {found['tokens']:,} tokens, a buffer of {found['buffer']:,} rows, {found['machine']}:"
    lines = [f"| {what} | {form.format(**values)} |" for what, form in rows.items()]
    return "\n".join([head, "", "| | |", "|---|---|", *lines])


if __name__ == "__main__":
    main()
