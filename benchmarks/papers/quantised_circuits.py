"""Which heads of the bundled model change its answer on indirect objects: each head patched alone, at all tokens.

A prompt repeats a name ("When Mary and John went to the store, John gave a drink to"); its corrupted twin has a third
name in place of the repeated one, so that the answer is open. Each head's output in the prompt's run is replaced by the
twin's. Writes the change of the logit difference for every head and prompt to
notebooks/papers/data/quantised_circuits/patched.safetensors; the notebook takes prompts and names from here too.
"""

import argparse
import random
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

import sae_lab as sl
from sae_lab.circuits.metric import measured
from sae_lab.circuits.pairs import copied
from sae_lab.types import Site, TokenBatch, Write

PATCHED = Path(__file__).parents[2] / "notebooks/papers/data/quantised_circuits/patched.safetensors"
SEED, PAIRS, HEAD = 900, 6, 64  # of the prompts that are patched; their number; width of a head
NAMES = [
    "Mary", "John", "Alice", "Tom", "Anna", "Paul", "Sarah", "David", "James", "Emma", "Robert",
    "Laura", "Michael", "Peter", "Jack", "Lucy", "Mark", "Jane", "Daniel", "Henry", "George", "William",
    "Emily", "Rachel", "Martin", "Kate", "Thomas", "Simon", "Adam", "Susan", "Charles", "Richard",
]  # fmt: skip
PLACES = ["store", "park", "school", "office", "garden", "station", "house", "hospital"]
GIFTS = ["book", "drink", "ring", "letter", "computer", "ball", "map", "watch"]
FORMS = [
    "When {} and {} went to the {place}, {} gave a {gift} to",
    "Then, {} and {} were working at the {place}. {} decided to give a {gift} to",
    "After the lunch, {} and {} walked to the {place}. {} handed a {gift} to",
    "While {} and {} were sitting in the {place}, {} passed a {gift} to",
    "Friends {} and {} found a {gift} at the {place}. {} gave it to",
    "The {place} that {} and {} visited had a {gift}. {} gave it to",
    "Yesterday {} and {} met near the {place}, and {} brought a {gift} to",
    "Then, {} and {} had a lot of fun at the {place}. {} offered a {gift} to",
]


def drawn(
    count: int, names: list[str], forms: list[str], draw: random.Random
) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """(prompts, corrupted twins, (right, wrong) names). The name that is repeated comes first as often as second."""
    prompts, twins, answers = [], [], []
    for i in range(count):
        first, second, third = draw.sample(names, 3)
        right, wrong = (first, second) if i % 2 else (second, first)
        form, what = draw.choice(forms), {"place": draw.choice(PLACES), "gift": draw.choice(GIFTS)}
        prompts.append(form.format(first, second, wrong, **what))
        twins.append(form.format(first, second, third, **what))
        answers.append((right, wrong))
    return prompts, twins, answers


def halves(seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """Two halves of the names and two of the forms, drawn by the seed: a tree learns on one, and is tested on the
    other."""
    draw = random.Random(seed)
    names, forms = draw.sample(NAMES, len(NAMES)), draw.sample(FORMS, len(FORMS))
    return [names[0::2], names[1::2]], [forms[0::2], forms[1::2]]


def put(x: torch.Tensor, tokens: TokenBatch, given: torch.Tensor, n: int) -> torch.Tensor:
    """Head i of this layer gets the twin's output in copy i of the prompts."""
    out, width = x.clone(), x.shape[-1] // (len(x) // n)
    for i in range(len(x) // n):
        rows, here = slice(i * n, (i + 1) * n), slice(i * width, (i + 1) * width)
        out[rows, :, here] = given[:, :, here].to(x)
    return out


def patched(lm: sl.LM, seed: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(change of the logit difference "layer head prompt", the difference before and in the twin's run "2 prompt")."""
    prompts, twins, answers = drawn(pairs, NAMES, FORMS, random.Random(seed + 10_000))
    metric = sl.circuits.logit_difference(
        lm, [f" {right}" for right, _ in answers], [f" {wrong}" for _, wrong in answers]
    )
    batch, theirs = lm.tokenize(prompts), lm.tokenize(twins)
    assert torch.equal(batch.mask, theirs.mask)
    sites = [Site("attn_z", layer) for layer in range(lm.n_layers)]
    given, corrupted = lm.read(twins, sites), measured(lm, theirs, metric)
    before, changes = measured(lm, batch, metric), []
    heads = given[sites[0]].shape[-1] // HEAD
    copies = copied(batch, heads)
    for site in sites:
        write = Write(site, partial(put, given=given[site], n=pairs))
        changes.append(measured(lm, copies, metric, [write]).view(heads, pairs) - before)
    return torch.stack(changes), torch.stack([before, corrupted])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    args = parser.parse_args()
    change, ends = patched(sl.LM(), SEED, args.pairs)
    print(f"difference before and of the twins {ends.mean(1).tolist()}, largest {change.mean(-1).abs().max():.2f}")
    PATCHED.parent.mkdir(parents=True, exist_ok=True)
    save_file({"change": change.half(), "ends": ends.half()}, PATCHED)


if __name__ == "__main__":
    main()
