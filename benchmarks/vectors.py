"""Vectors of two contrasts on the bundled model: how well a difference in means and a probe tell held-out texts apart,
how they steer beside random vectors of equal norm, and how often a condition on them holds where it should not.

The texts are those of the installed sae-probes. Writes benchmarks/results/vectors.json; with ``--docs`` the tables of
docs/howto/edits.md too.
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
SITE, TEXTS, SEEDS, STRENGTHS = "resid_post-8", 300, 5, (1.0, 2.0)
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
    odds, losses = [], []
    for prompt in prompts:
        logp = lm.logits(prompt, edits=push)[0, -1].log_softmax(-1)
        odds.append(float(logp[up].logsumexp(-1) - logp[down].logsumexp(-1)))
    for text in texts:
        losses.append(float(lm.loss(text, edits=push)))
    return np.array(odds), np.array(losses)


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
    clean = effect(lm, prompts, up, down, wiki, [])
    rows = []
    for method, vector in vectors.items():
        known = float(auroc((x @ vector.unit).numpy()[:, None], labels)[0])
        for strength in STRENGTHS:
            noise = [torch.randn(len(vector.unit), generator=torch.Generator().manual_seed(s)) for s in range(SEEDS)]
            random = [sl.Vector(n, SITE, f_scale=vector.f_scale, mask=vector.mask) for n in noise]
            runs = [effect(lm, prompts, up, down, wiki, [sl.Push(v, strength)]) for v in [vector, *random]]
            gains = [(odds - clean[0], loss - clean[1]) for odds, loss in runs]
            chance = [np.mean([g[i] for g in gains[1:]], axis=0) for i in (0, 1)]
            rows.append(
                {"contrast": name, "vector": method, "auroc": known, "strength": strength,
                 "norm": strength * vector.f_scale, "gain": mean_and_error(gains[0][0]),
                 "cost": mean_and_error(gains[0][1]), "random_gain": mean_and_error(chance[0]),
                 "random_cost": mean_and_error(chance[1])}
            )  # fmt: skip
            print(rows[-1])
    vector = vectors["difference in means"]
    peaks = []
    for text in part(train, True):
        reading = lm.read(text, SITE)
        kept = vector.mask.keep(reading.ids, reading.batch.positions, {vector.site: reading[SITE]})[0]
        peaks.append(float((reading[SITE][0][kept] @ vector.unit).max() - vector.centre) / vector.f_scale)
    level = float(np.quantile(peaks, REACHED))
    edit = sl.Push(vector, 1.0, when=(vector, max(level, 0.0), "prompt"))
    firing = {}
    for where, some in {"its class": part(held, True), "the other class": part(held, False), "Wikipedia": wiki}.items():
        found = edit.firing(lm, some)
        firing[where] = {f: getattr(found, f) for f in ("token_rate", "token_interval", "text_rate", "text_interval",
                                                        "tokens", "texts")}  # fmt: skip
        print(where, found)
    return {
        "rows": rows, "level": level, "firing": firing,
        "probe": {f.key: [f.value, f.error, f.control] for f in probe.figures()}, "held_out": probe.held_out,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true")
    args = parser.parse_args()
    if args.docs:
        return write(json.loads(RESULTS.read_text()))
    lm = sl.LM()
    wiki = [document[:300] for document in sl.load_text().held_out][:40]
    RESULTS.write_text(json.dumps({name: measure(lm, name, wiki) for name in CONTRASTS}, indent=1))
    write(json.loads(RESULTS.read_text()))


def write(found: dict) -> None:
    """The tables of the page."""
    lines = [
        "| contrast | vector | AUROC, held-out texts | strength | norm added | log-odds gained | of random vectors | "
        "cost, nats/token | of random vectors |", "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    pm = lambda pair: f"{pair[0]:.2f} ± {pair[1]:.2f}"  # noqa: E731
    for one in found.values():
        lines += [
            f"| {r['contrast']} | {r['vector']} | {r['auroc']:.3f} | {r['strength']:g} | {r['norm']:.1f} | "
            f"{pm(r['gain'])} | {pm(r['random_gain'])} | {pm(r['cost'])} | {pm(r['random_cost'])} |"
            for r in one["rows"]
        ]
    put("docs/howto/edits.md", "vectors", "\n".join(lines))
    lines = ["| contrast | level | texts | it holds in | of their tokens |", "|---|---|---|---|---|"]
    for name, one in found.items():
        for where, f in one["firing"].items():
            low, high = f["text_interval"]
            lines.append(
                f"| {name} | {one['level']:.2f} | {f['texts']} of {where} | {f['text_rate']:.1%} ({low:.1%} to "
                f"{high:.1%}) | {f['token_rate']:.1%} |"
            )
    put("docs/howto/edits.md", "conditions", "\n".join(lines))


if __name__ == "__main__":
    main()
