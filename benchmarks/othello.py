"""Train the shipped Othello-GPT: a small GPT-2 on random legal games of 6x6 Othello, one token a move.

    OMP_NUM_THREADS=1 python benchmarks/othello.py train --out runs/othello --muon --expected --lr 2e-3 --steps 3000
    OMP_NUM_THREADS=1 python benchmarks/othello.py coders --twin --only batchtopk-32

``train`` prints legal-move rates on held-out games as it goes, and writes the model in half precision, its tokenizer
and ``training.json`` (settings and rates of what was written). Games of seed 0 are held out. How the model that comes
with the library was made stands in ``sae_lab/data/othello-6x6/NOTICE``. ``coders`` trains coders on that model and
measures what they know of boards.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_lab.worlds.boards import Games, othello, square_name

SIZE, START = 6, "<start>"
CHUNK = 16_384  # games made at once
HELD_OUT_SEED = 0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a square (id = its number) and the start token, which stands at position 0."""
    vocabulary = {square_name(s, SIZE): s for s in range(SIZE**2)} | {START: SIZE**2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=START))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, clean_up_tokenization_spaces=False)


def make_model(layers: int, width: int, heads: int, seed: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=SIZE**2 + 1, n_positions=SIZE**2 - 3, n_embd=width, n_layer=layers, n_head=heads,
        activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=SIZE**2, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config)


def as_ids(games: Games) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids with the start token in front, targets with -100 where there is none)."""
    moves = torch.from_numpy(games.moves).long()
    ids = torch.cat([torch.full((len(moves), 1), SIZE**2), moves.clamp(min=0)], 1)
    return ids[:, :-1], torch.where(moves < 0, -100, moves)


@torch.no_grad()
def measure(model: GPT2LMHeadModel, games: Games) -> dict[str, float]:
    """Held-out loss, and how legal predictions are: of the largest logit, and of the probability, over the positions
    after at least one move at which another follows."""
    model.eval()
    ids, targets = as_ids(games)
    probabilities = torch.cat([model(part).logits.softmax(-1) for part in ids.split(250)])
    legal = torch.from_numpy(games.legal_moves())[:, :-1]
    going = torch.from_numpy(games.going_on)[:, :-1]
    after = probabilities[:, 1:, : SIZE**2]
    top = legal.gather(2, after.argmax(-1, keepdim=True)).squeeze(-1)
    real = targets >= 0
    picked = probabilities.gather(2, targets.clamp(min=0)[..., None]).squeeze(-1)[real]
    uniform = legal.float() / legal.sum(-1, keepdim=True).clamp(min=1)
    floor = -(uniform * uniform.clamp(min=1e-9).log()).sum(-1)[going]
    return {
        "legal_argmax": float(top[going].float().mean()),
        "legal_mass": float((after * legal).sum(-1)[going].mean()),
        "loss": float(-picked.log().mean()),
        "least_loss": float(floor.sum() / real.sum() + math.log(4) * len(games) / real.sum()),
        "positions": int(going.sum()),
    }


def save(model: GPT2LMHeadModel, folder: Path, facts: dict) -> None:
    """Config, tokenizer and half-precision weights, without pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is made orthogonal before it is added (Jordan et al. 2024); torch's own computes in
    bfloat16, which is slow on most CPUs. A matrix's step has entries of root mean square 0.2·lr, about as Adam's."""

    def __init__(self, params, lr: float, decay: float = 0.01, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.setdefault(p, {"mean": torch.zeros_like(p)})
                mean = state["mean"].mul_(group["momentum"]).add_(p.grad)
                update = orthogonal(p.grad + group["momentum"] * mean)
                p.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=0.2 * max(p.shape) ** 0.5 * group["lr"])


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """U·Vᵀ of g = U·S·Vᵀ, roughly, by five Newton-Schulz steps."""
    x = g / (g.norm() + 1e-7)
    x = x.T if (tall := g.shape[0] > g.shape[1]) else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if tall else x


def make_optimizers(model: GPT2LMHeadModel, a: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for all; or Muon for the blocks' matrices, and AdamW for the rest."""
    named = list(model.named_parameters())
    inner = [p for name, p in named if p.dim() > 1 and ".h." in name and a.muon]
    rest = [p for name, p in named if not (p.dim() > 1 and ".h." in name and a.muon)]
    groups = [{"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.01}]
    groups += [{"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.98))
    return [adam, Muon(inner, lr=a.lr)] if a.muon else [adam]


def next_moves(games: Games, expected: bool) -> torch.Tensor:
    """What is predicted at each position, as probabilities ``games length vocab``: the move that was drawn, or the law
    it was drawn from, which is the same in expectation and less noisy: uniform over the legal moves."""
    moves = torch.from_numpy(games.moves).long()
    drawn = torch.nn.functional.one_hot(moves.clamp(min=0), SIZE**2 + 1).float() * (moves >= 0)[..., None]
    if not expected:
        return drawn
    legal = torch.from_numpy(games.legal_moves()).float()[:, :-1]
    law = torch.nn.functional.pad(legal / legal.sum(-1, keepdim=True).clamp(min=1), (0, 1))
    return torch.cat([drawn[:, :1], law], 1)  # all four first moves are alike: the draw is as good


def train(a: argparse.Namespace) -> None:
    model = make_model(a.layers, a.width, a.heads, a.seed)
    settings = {
        k: v for k, v in vars(a).items() if k not in ("command", "out", "start_from", "steps", "stop", "seconds")
    }
    stages = []
    if a.start_from:
        model = GPT2LMHeadModel.from_pretrained(a.start_from, dtype=torch.float32)
        stages = json.loads((a.start_from / "training.json").read_text())["stages"]
    held_out = othello(SIZE, games=1000, seed=HELD_OUT_SEED)
    optimizers, steps, start = make_optimizers(model, a), a.steps, time.time()
    per_chunk, step, games = CHUNK // a.batch, 0, held_out
    while step < min(steps, a.stop or steps):
        if a.seconds and steps == a.steps and time.time() - start > (1 - a.decay) * a.seconds:
            steps = min(a.steps, math.ceil(step / (1 - a.decay)))  # the learning rate's way down begins here
        if step % per_chunk == 0:
            games = othello(SIZE, games=CHUNK, seed=a.first_seed + step // per_chunk)
        part = games[step % per_chunk * a.batch : (step % per_chunk + 1) * a.batch]
        model.train()
        logits = model(as_ids(part)[0], use_cache=False).logits
        targets = next_moves(part, a.expected)
        loss = -(targets * logits.log_softmax(-1)).sum() / targets.sum()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = a.lr * min((step + 1) / a.warm, 1.0, (1 - step / steps) / a.decay)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        step += 1
        if step % a.every == 0 or step in (steps, a.stop):
            found = measure(model, held_out)
            seconds = round(time.time() - start)
            print(step, seconds, {k: round(v, 4) for k, v in found.items()}, flush=True)
            facts = {"parameters": model.num_parameters(), "held_out": found}
            save(model, a.out, facts | {"stages": [*stages, settings | {"steps": step, "seconds": seconds}]})


# ---------------------------------------------------------------------------------------------- coders on it

CODERS = {
    "batchtopk-16": ("BatchTopK", {"k": 16}),
    "batchtopk-32": ("BatchTopK", {"k": 32}),
    "l1-0.8": ("L1", {"sparsity": 0.8}),
    "l1-1.3": ("L1", {"sparsity": 1.3}),
    "l1-2.0": ("L1", {"sparsity": 2.0}),
    "panneal-0.6": ("PAnneal", {"sparsity": 0.6}),
    "panneal-1.0": ("PAnneal", {"sparsity": 1.0}),
    "panneal-1.6": ("PAnneal", {"sparsity": 1.6}),
}


def coders(a: argparse.Namespace) -> None:
    """Train coders on the shipped model (and the same on an untrained twin), and measure what they know of boards."""
    import sae_lab as sl
    from sae_lab.evals.games import board_games, othello_gpt, untrained_twin

    lm, site = othello_gpt(), sl.Site("resid_post", layer=a.layer)
    seen, test = othello(SIZE, games=a.games, seed=2), othello(SIZE, games=600, seed=1)
    config = sl.TrainConfig(tokens=a.tokens, batch_size=1024, seed=a.seed)
    fresh = sl.load_text([seen.text(i) for i in range(len(seen))])
    models = {"trained": lm} | ({"twin": untrained_twin(lm)} if a.twin else {})
    stores = {n: sl.harvest(m, site, fresh, tokens=30 * len(seen), context=33) for n, m in models.items()}
    for name in a.only or CODERS:
        family, settings = CODERS[name]
        pair = {}
        for which in models:
            make: Any = getattr(sl, family)
            coder = make(lm.width(site), a.d_sae, seed=a.seed, **settings)
            run = sl.train(coder, stores[which], config)
            pair[which] = (coder, models[which])
            print(name, which, run, flush=True)
        coder, model = pair["trained"]
        found = board_games(coder, model, test, untrained=pair.get("twin"))
        print(f"{name} seed {a.seed}\n{found!r}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the model and save it")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--steps", type=int, default=20_000)
    training.add_argument("--stop", type=int, default=0, help="end after this step, wherever the learning rate is")
    training.add_argument("--seconds", type=float, default=0, help="begin to end in time; 0: take all steps")
    training.add_argument(
        "--start-from", type=Path, help="go on from a model saved here, on games of another first seed"
    )
    training.add_argument("--first-seed", type=int, default=10_000, help="chunk c of the games has this seed + c")
    training.add_argument("--warm", type=int, default=300, help="steps in which the learning rate rises")
    training.add_argument("--decay", type=float, default=0.25, help="share of the steps in which it falls to 0")
    training.add_argument("--muon", action="store_true")
    training.add_argument(
        "--expected", action="store_true", help="predict the law of the next move, not one draw of it"
    )
    training.add_argument("--batch", type=int, default=64)
    training.add_argument("--lr", type=float, default=1.5e-3)
    training.add_argument("--layers", type=int, default=3)
    training.add_argument("--width", type=int, default=128)
    training.add_argument("--heads", type=int, default=4)
    training.add_argument("--every", type=int, default=500)
    training.add_argument("--seed", type=int, default=0)
    measuring = commands.add_parser("coders", help="train coders on the shipped model and measure them")
    measuring.add_argument("--only", nargs="*", choices=CODERS)
    measuring.add_argument("--twin", action="store_true", help="the same on a model with random weights")
    for name, value in (("layer", 1), ("games", 3000), ("tokens", 300_000), ("d-sae", 512), ("seed", 0)):
        measuring.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    train(arguments) if arguments.command == "train" else coders(arguments)
