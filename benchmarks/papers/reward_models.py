"""Texts, activations and rewards for notebooks/papers/reward_models.ipynb.

    python benchmarks/papers/reward_models.py              # all seeds; goes on where it was killed
    python benchmarks/papers/reward_models.py --seeds 0    # one seed

A text is one to five sentences of a document and a line break; its double has two pairs of neighbouring words swapped
in each sentence. The bundled model reads them up to layer 8. Written to notebooks/papers/data/reward_models/, a file a
seed: the codes at the line break, the codes averaged over the text, and the reward of each text by each head.
"""

import argparse
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import softplus

import sae_lab as sl

CODER = "smollm2-135m/resid_post-8"
SEEDS, DOCUMENTS, PARTS = (0, 1, 2, 3, 4), 160, 4  # documents of a seed, which no other seed has, and their quarters
SENTENCES, WORDS, SWAPS = 5, (6, 20), 2
PAIRS, PENALTIES = 1000, (1e-3, 1e-2, 1e-1, 1.0)
STEPS, BATCH, RATE, WEIGHT = 60, 32, 1e-4, 1.0  # of training the coder too; WEIGHT: of the reconstruction
DATA = Path(__file__).parents[2] / "notebooks" / "papers" / "data" / "reward_models"
PLAIN = re.compile(r"[A-Z][A-Za-z0-9,' -]*\.")  # a sentence of words and commas only


class Texts(NamedTuple):
    """Texts in pairs: 2i is as written, 2i + 1 has words swapped. part: the quarter that a text's document is in."""

    texts: list[str]
    part: Tensor

    @property
    def intact(self) -> Tensor:
        return torch.arange(len(self.texts)) % 2 == 0


def sentences(document: str) -> list[str]:
    least, most = WORDS
    found = re.split(r"(?<=[.!?])\s+", document[:6000])
    return [s for s in found if PLAIN.fullmatch(s) and least <= len(s.split()) <= most]


def swapped(sentence: str, random: np.random.Generator) -> str:
    """Two words change places with their right neighbours; the last word stays."""
    words = sentence.split()
    for i in random.choice(len(words) - 2, SWAPS, replace=False):
        words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def draw(documents: list[list[str]], seed: int) -> Texts:
    """The texts of a seed: sentences in a row of each document, one to five of them."""
    random, texts = np.random.default_rng([68, seed]), []
    for own in documents:
        many = int(random.integers(1, SENTENCES + 1))
        start = int(random.integers(0, len(own) - many + 1))
        chosen = own[start : start + many]
        texts += [" ".join(chosen) + "\n", " ".join(swapped(s, random) for s in chosen) + "\n"]
    return Texts(texts, torch.arange(len(documents)).repeat_interleave(2) % PARTS)


def pairs(texts: Texts, parts: tuple[int, ...], length: Tensor, hacked: bool, random: np.random.Generator) -> Tensor:
    """(pair, 2): a text as written, which is preferred, and another document's text with words swapped. hacked: only
    pairs in which the preferred text is the longer one too."""
    inside = torch.isin(texts.part, torch.tensor(parts))
    better = (inside & texts.intact).nonzero()[:, 0]
    worse = (inside & ~texts.intact).nonzero()[:, 0]
    every = torch.cartesian_prod(better, worse)
    kept = every[:, 0] // 2 != every[:, 1] // 2
    kept &= (length[every[:, 0]] > length[every[:, 1]]) | (not hacked)
    every = every[kept]
    return every[torch.from_numpy(random.permutation(len(every))[:PAIRS])]


def bradley_terry(z: Tensor, train: Tensor, choose: Tensor) -> Tensor:
    """Weights w of the reward w·z that minimise mean softplus(-(r₊ - r₋)) + penalty·|w|²/2 over the pairs ``train``,
    with the penalty that does best on the pairs ``choose``. Solved in the span of the codes of ``train``, where the
    minimum lies: as many dimensions as texts, however many features."""
    own = z[train.unique()].double()
    own = own / (scale := own.square().sum(-1).mean().sqrt())
    basis = torch.linalg.svd(own, full_matrices=False).Vh
    y = z.double() @ basis.T / scale
    d = [y[p[:, 0]] - y[p[:, 1]] for p in (train, choose)]
    found = []
    for penalty in PENALTIES:
        w = torch.zeros(len(basis), dtype=torch.float64)
        for _ in range(30):  # Newton's method
            p = torch.sigmoid(-d[0] @ w)
            slope = penalty * w - d[0].T @ p / len(p)
            bend = (d[0].T * (p * (1 - p))) @ d[0] / len(p) + penalty * torch.eye(len(w), dtype=torch.float64)
            w = w - (step := torch.linalg.solve(bend, slope))
            if float(step.norm()) < 1e-6 * float(w.norm()):
                break
        found.append((float(softplus(-d[1] @ w).mean()), w))
    return (basis.T @ min(found, key=lambda one: one[0])[1] / scale).float()


def largest(values: Tensor, k: int) -> Tensor:
    """The k largest of each row, others 0."""
    top = values.topk(k, dim=-1)
    return torch.zeros_like(values).scatter(-1, top.indices, top.values.relu())


def pre(coder: sl.SparseCoder, x: Tensor) -> Tensor:
    return x @ coder.W_enc + coder.read_bias()


@torch.no_grad()
def read(lm: sl.LM, coder: sl.SparseCoder, texts: Texts) -> tuple[Tensor, Tensor, Tensor]:
    """(activations at the line break, codes averaged over the tokens before it, number of those tokens)."""
    lengths = [int(lm.tokenize([t]).mask.sum()) for t in texts.texts]
    last, mean = torch.zeros(len(lengths), coder.W_enc.shape[0]), torch.zeros(len(lengths), coder.d_sae)
    order = np.argsort(lengths)
    for some in np.array_split(order, len(order) // 16):
        batch = lm.tokenize([texts.texts[i] for i in some])
        x = lm.run(batch, [coder.site], logits=False)[0][coder.site].cpu()
        for row, i in enumerate(some):
            end = lengths[i] - 1
            last[i] = x[row, end]
            mean[i] = coder.codes_of(x[row, 1:end]).dense().mean(0)
    return last, mean, torch.tensor(lengths) - 2


def trained(
    coder: sl.SparseCoder, k: int, x: Tensor, start: Tensor, train: Tensor, choose: Tensor
) -> tuple[Tensor, float]:
    """(rewards of all texts, rise of nmse on them) when the coder is trained with the head, on
    softplus(-(r₊ - r₋)) + nmse, from the fitted head; the step that does best on the pairs ``choose`` is kept."""
    own = copy.deepcopy(coder)
    unit = float(largest(pre(coder, x), k).square().sum(-1).mean().sqrt())
    w = (start * unit).clone().requires_grad_()
    for p in own.parameters():
        p.requires_grad_(True)
    adam = torch.optim.Adam([{"params": own.parameters(), "lr": RATE}, {"params": [w], "lr": 10 * RATE}])
    random, best = torch.Generator().manual_seed(1), (float("inf"), torch.zeros(len(x)), 0.0)

    def errors(of: Tensor, z: Tensor) -> Tensor:
        return (of - z @ own.W_dec - own.b_dec).square().sum(-1) / of.square().sum(-1)

    with torch.no_grad():
        first = errors(x, largest(pre(own, x), k)).mean()
    for step in range(STEPS + 1):
        if step % 20 == 0:
            with torch.no_grad():
                z = largest(pre(own, x), k)
                reward = z @ w / unit
                loss = float(softplus(reward[choose[:, 1]] - reward[choose[:, 0]]).mean())
                best = min(best, (loss, reward, float(errors(x, z).mean() - first)), key=lambda one: one[0])
        chosen = train[torch.randint(len(train), (BATCH,), generator=random)].T.reshape(-1)
        z = largest(pre(own, x[chosen]), k)
        reward = (z @ w / unit).view(2, BATCH)
        loss = softplus(reward[1] - reward[0]).mean() + WEIGHT * errors(x[chosen], z).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return best[1], best[2]


def rotations(texts: Texts, length: Tensor, hacked: bool, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Four times (pairs to fit, pairs to choose, pairs to measure, texts of the measured quarter): each quarter is
    measured once, two are fitted and one chooses."""
    for turn in range(PARTS):
        fit, choose, measure = ((turn + 1) % PARTS, (turn + 2) % PARTS), ((turn + 3) % PARTS,), (turn,)
        random = np.random.default_rng([68, seed, turn, hacked])
        yield (*(pairs(texts, p, length, hacked, random) for p in (fit, choose, measure)), texts.part == turn)


def heads(coder: sl.SparseCoder, x: Tensor, texts: Texts, length: Tensor, seed: int) -> dict[str, Tensor]:
    """The reward of each text by each head, from the turn that measures it; ``rise``: of nmse, by turn."""
    k = int(coder.k)
    other = sl.TopK(x.shape[1], coder.d_sae, k=k, seed=680 + seed).requires_grad_(
        False
    )  # the control: as many random directions
    inputs = {
        "dense": x, "pre": pre(coder, x), "random": largest(pre(other, x - x.mean(0)), k),
        "topk": largest(pre(coder, x), k),
    }  # fmt: skip
    found = {name: torch.zeros(len(x)) for name in (*inputs, "trained")} | {"rise": torch.zeros(PARTS)}
    for turn, (train, choose, _, measured) in enumerate(rotations(texts, length, False, seed)):
        for name, z in inputs.items():
            w = bradley_terry(z, train, choose)
            found[name][measured] = (z @ w)[measured]
        reward, found["rise"][turn] = trained(coder, k, x, w, train, choose)
        found["trained"][measured] = reward[measured]
    return found


def packed(codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest codes of each row in half precision, and their features as int16."""
    top = codes.topk(k, dim=-1)
    return top.values.half(), top.indices.short()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    lm, coder = sl.LM(), sl.load(CODER)
    k, text = int(coder.k), sl.load_text("mix")
    documents = [s for d in text if isinstance(d, str) and len(s := sentences(d)) >= SENTENCES + 1]
    order = np.random.default_rng(68).permutation(len(documents))
    DATA.mkdir(parents=True, exist_ok=True)
    for seed in parser.parse_args().seeds:
        if (path := DATA / f"seed-{seed}.safetensors").exists():
            continue
        texts = draw([documents[i] for i in order[DOCUMENTS * seed : DOCUMENTS * (seed + 1)]], seed)
        x, mean, length = read(lm, coder, texts)
        with coder.evaluating(), torch.no_grad():
            last = packed(largest(pre(coder, x), k), k)
        coder.requires_grad_(False)
        out = {name: values.half() for name, values in heads(coder, x, texts, length, seed).items()}
        out |= {"last": last[0], "last_features": last[1], "length": length.short(), "part": texts.part.byte()}
        out["mean"], out["mean_features"] = packed(mean, k)
        save_file({name: values.contiguous() for name, values in out.items()}, path)
        print(seed, len(length), int(length.sum()), "tokens", flush=True)


if __name__ == "__main__":
    main()
