"""Vectors of two contrasts on the bundled model: how well a difference in means and a probe tell held-out texts apart,
how they steer beside random vectors of equal norm, and how often a condition on them holds where it should not.

The texts are those of the installed sae-probes. Writes benchmarks/results/vectors.json and the tables of
docs/howto/edits.md.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from pages import put

import sae_lab as sl
from sae_lab.edits.vector import text_means
from sae_lab.stats import auroc, mean_and_error

RESULTS = Path(__file__).parent / "results" / "vectors.json"
SITE, TEXTS, SEEDS, STRENGTHS = "resid_post-8", 200, 3, (0.5, 1.0)
REACHED = 0.2  # of the training texts of the class lie below the level
# A probe set; prompts that fit any of its classes; tokens that fit the positive class, and the negative one.
CONTRASTS = {
    "sentiment": (
        "92_glue_sst2", ["The movie was", "I think this film is", "The acting was", "In the end, the story felt",
                         "My friend said that the book was", "The whole evening was"],
        [" good", " great", " wonderful", " beautiful", " amazing"],
        [" bad", " terrible", " awful", " boring", " poor"],
    ),
    "politics": (
        "139_news_class_Politics", ["Yesterday we talked about the", "The article is about the", "He wrote about the",
                                    "The news of today is that the", "She asked me about the", "They read about the"],
        [" government", " president", " election", " Senate", " vote"],
        [" movie", " game", " music", " phone", " team"],
    ),
}  # fmt: skip


def effect(lm: sl.LM, prompts: list[str], up: list[int], down: list[int], texts: list[str], push: list[sl.Edit]):
    """(log-odds of the positive tokens against the negative ones after each prompt, the loss of each other text)."""
    last = lm.tokenize(prompts).mask.sum(1) - 1
    logits = lm.logits(prompts, edits=push)[torch.arange(len(last)), last]
    odds = logits[:, up].logsumexp(-1) - logits[:, down].logsumexp(-1)
    return odds.numpy(), lm.loss(texts, edits=push, per_token=True).nanmean(1).numpy()


def measure(lm: sl.LM, name: str, wiki: list[str]) -> dict:
    one, prompts, *words = CONTRASTS[name]
    data = sl.evals.probe_set(one).balanced(2 * TEXTS)
    up, down = ([lm.tokenizer(w, add_special_tokens=False)["input_ids"] for w in side] for side in words)
    up, down = ([ids[0] for ids in side if len(ids) == 1] for side in (up, down))
    texts = [" ".join(text.split()[:64]) for text in data.texts]
    order = np.random.default_rng(0).permutation(len(texts))
    train, held = np.split(order, [len(order) // 2])
    part = lambda which, label: [texts[i] for i in which if bool(data.labels[i]) == label]  # noqa: E731
    probe = sl.fit_probe(lm, SITE, [texts[i] for i in train], data.labels[train])
    vectors = {
        "difference in means": sl.Vector.difference(lm, SITE, part(train, True), part(train, False), name),
        "probe": probe.vector,
    }
    unseen = part(held, True) + part(held, False)
    labels = np.arange(len(unseen)) < len(part(held, True))
    x = text_means(lm, [sl.Site.of(SITE)], unseen)[0]
    mask, width = probe.vector.mask, len(probe.vector.unit)
    noise = [torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in range(SEEDS)]
    tried = {method: [vector] for method, vector in vectors.items()} | {
        "random": [sl.Vector(direction, SITE, f_scale=1.0, mask=mask) for direction in noise]
    }
    clean, rows = effect(lm, prompts, up, down, wiki, []), []
    for strength in STRENGTHS:
        norm = strength * vectors["difference in means"].f_scale
        for method, some in tried.items():
            runs = [effect(lm, prompts, up, down, wiki, [sl.Push(v, norm / v.f_scale)]) for v in some]
            gain, cost = (np.mean([run[i] - clean[i] for run in runs], axis=0) for i in (0, 1))
            known = [float(auroc((x @ v.unit).numpy()[:, None], labels)[0]) for v in some]
            rows.append(
                {"contrast": name, "vector": method, "auroc": float(np.mean(known)), "norm": norm,
                 "strength": norm / some[0].f_scale, "gain": mean_and_error(gain), "cost": mean_and_error(cost)}
            )  # fmt: skip
            print(rows[-1])
    firing = []
    for method, vector in vectors.items():
        level = level_of(lm, vector, part(train, True))
        edit = sl.Push(vector, 1.0, when=(vector, level, "prompt"))
        for where, some in {"its class": part(held, True), "the other": part(held, False), "Wikipedia": wiki}.items():
            found = edit.firing(lm, some)
            kept = {f: getattr(found, f) for f in ("token_rate", "token_interval", "text_rate", "text_interval",
                                                   "tokens", "texts")}  # fmt: skip
            firing.append({"contrast": name, "vector": method, "level": level, "where": where} | kept)
            print(firing[-1])
    scores = {f.key: [f.value, f.error, f.control] for f in probe.figures()}
    return {"rows": rows, "firing": firing, "probe": scores, "held_out": probe.held_out}


def level_of(lm: sl.LM, vector: sl.Vector, texts: list[str]) -> float:
    """The level that all but a share ``REACHED`` of the texts exceed at some token."""
    peaks = []
    for text in texts:
        reading = lm.read(text, SITE)
        kept = vector.mask.keep(reading.ids, reading.batch.positions, {vector.site: reading[SITE]})[0]
        peaks.append(float((reading[SITE][0][kept] @ vector.unit).max() - vector.centre) / vector.f_scale)
    return max(0.0, float(np.quantile(peaks, REACHED)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CONTRASTS, help="measure one contrast, and keep what is known of the others")
    parser.add_argument("--docs", action="store_true", help="measure nothing, write the tables")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() and (args.only or args.docs) else {}
    if not args.docs:
        lm, documents = sl.LM(), sl.load_text().held_out
        pieces = (document[at : at + 300] for document in documents for at in (0, 1000, 2000))
        wiki = [piece for piece in pieces if len(piece) == 300][:24]
        found |= {name: measure(lm, name, wiki) for name in ([args.only] if args.only else CONTRASTS)}
        RESULTS.write_text(json.dumps(found, indent=1))
    write(found)


def write(found: dict) -> None:
    """The tables of the page."""
    lines = ["| contrast | vector | AUROC, held-out texts | norm | strength | log-odds gained | cost, nats/token |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    pm = lambda pair: f"{pair[0]:.2f} ± {pair[1]:.2f}"  # noqa: E731
    for r in (row for one in found.values() for row in one["rows"]):
        strength = "" if r["vector"] == "random" else f"{r['strength']:.1f}"
        lines.append(
            f"| {r['contrast']} | {r['vector']} | {r['auroc']:.2f} | {r['norm']:.0f} | {strength} | {pm(r['gain'])} | "
            f"{pm(r['cost'])} |"
        )
    put("docs/howto/edits.md", "vectors", "\n".join(lines))
    lines = ["| contrast | condition on | level | texts | it holds in (95 %) |", "|---|---|---|---|---|"]
    for f in (row for one in found.values() for row in one["firing"]):
        low, high = f["text_interval"]
        lines.append(
            f"| {f['contrast']} | {f['vector']} | {f['level']:.2f} | {f['texts']} of {f['where']} | "
            f"{f['text_rate']:.0%} ({low:.0%} to {high:.0%}) |"
        )
    put("docs/howto/edits.md", "conditions", "\n".join(lines))


if __name__ == "__main__":
    main()
