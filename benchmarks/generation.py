"""What an edit costs while text is generated: seconds of lm.generate, plain and edited, beside transformers' generate.

All generate the same number of tokens greedily from the same prompt on the bundled model, in turn; medians. Prints
ratios and writes benchmarks/results/generation.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from pages import put
from steps import processor

import sae_lab as sl

RESULTS = Path(__file__).parent / "results" / "generation.json"
PROMPT, NEW = "When I woke up this morning, I", 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--docs", action="store_true")
    args = parser.parse_args()
    lm, sae = sl.LM(), sl.load("smollm2-135m/resid_post-8")
    ids = lm.tokenize(PROMPT).ids
    feature = int(sae.f_scale.argmax())
    limits = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    ways = {
        "transformers": lambda: lm._module.generate(ids, attention_mask=torch.ones_like(ids), **limits),
        "lm.generate": lambda: lm.generate(PROMPT, max_new_tokens=NEW),
        "lm.stream": lambda: list(lm.stream(PROMPT, max_new_tokens=NEW)),
        "one edit": lambda: lm.generate(PROMPT, [sl.Steer(sae, feature, 0.5)], max_new_tokens=NEW),
        "one edit, error dropped": lambda: lm.generate(
            PROMPT, [sl.Steer(sae, feature, 0.5, error="drop")], max_new_tokens=NEW
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(args.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(all_) for name, all_ in seconds.items()}
    ratios = {
        "lm.generate / transformers": median["lm.generate"] / median["transformers"],
        "lm.stream / lm.generate": median["lm.stream"] / median["lm.generate"],
        "one edit / none": median["one edit"] / median["lm.generate"],
        "one edit, error dropped / none": median["one edit, error dropped"] / median["lm.generate"],
    }
    for name, value in (median | ratios).items():
        print(f"{name:32} {value:8.3f}")
    RESULTS.write_text(json.dumps({"machine": processor(), "seconds": seconds} | ratios, indent=1))
    if args.docs:
        put(
            "docs/speed.md", "generation",
            f"Generating {NEW} tokens on the bundled model, `lm.generate` took "
            f"{ratios['lm.generate / transformers']:.2f} of transformers' own time, streaming "
            f"{ratios['lm.stream / lm.generate']:.2f} of `lm.generate`; an edit at one site "
            f"{ratios['one edit / none']:.2f}, with the error dropped {ratios['one edit, error dropped / none']:.2f}.",
        )  # fmt: skip


if __name__ == "__main__":
    main()
