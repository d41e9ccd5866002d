"""Policies in a gridworld: features that recur and features of one episode, and features of events
(notebooks/papers/policies.ipynb).

    python benchmarks/papers/policies.py              # all seeds, into notebooks/papers/data/policies/

A policy is cloned from the planner of ``sl.worlds.gridworld``; a coder is trained on its first hidden layer. The
notebook takes its functions from here.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from torch import Tensor, nn

import sae_lab as sl
from sae_lab.saes.base import SparseCoder
from sae_lab.worlds import Gridworld

DATA = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "data" / "policies"
SEEDS = (1, 2, 3)
WIDTH, FEATURES, K = 64, 256, 12
SITE = "body.1"
DEMOS, CUED = 2000, 0.02  # episodes to learn from, and the share of them that hides its goal
STEPS, BATCH, RATE = 2500, 512, 3e-3
LIMIT = 40  # steps of an episode
LABELLED = 15  # features of each class that a classifier is fitted on


class Policy(nn.Module):
    """From observations to the scores of five actions."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(seen, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, seen: Tensor) -> Tensor:
        return self.head(self.body(seen))


def demos(seed: int, cues: bool = True) -> Gridworld:
    """The episodes that a policy learns from; without cues, the same ones with all goals shown."""
    return sl.worlds.gridworld(DEMOS, cued=CUED if cues else 0.0, seed=10_000 + seed)


def fresh(seed: int, episodes: int) -> Gridworld:
    """Episodes that no policy has learnt from, all goals shown."""
    return sl.worlds.gridworld(episodes, seed=20_000 + seed)


def lived(world: Gridworld, states: np.ndarray) -> np.ndarray:
    """Which steps of (step, episode) come before the goal is reached."""
    return ~np.stack([world.done(s) for s in states[:-1]])


def clone(world: Gridworld, seed: int) -> Policy:
    """A policy that does as the planner does, by behaviour cloning on the planner's own episodes."""
    torch.manual_seed(1000 + seed)
    states, actions = world.play(steps=LIMIT)
    live = lived(world, states)
    seen = torch.tensor(np.stack([world.observe(s) for s in states[:-1]])[live])
    did = torch.tensor(actions[live])
    policy, random = Policy(seen.shape[1]), torch.Generator().manual_seed(2000 + seed)
    adam = torch.optim.Adam(policy.parameters(), RATE)
    slow = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    for _ in range(STEPS):
        some = torch.randint(len(seen), (BATCH,), generator=random)
        loss = F.cross_entropy(policy(seen[some]), did[some])
        adam.zero_grad()
        loss.backward()
        adam.step()
        slow.step()
    return policy.requires_grad_(False).eval()


def success(world: Gridworld, net: Any, edits: Sequence[Any] = ()) -> np.ndarray:
    """Which episodes reach their goal within LIMIT steps, each action the policy's best, with edits at every step."""

    def act(seen: np.ndarray, step: int) -> np.ndarray:
        return net.output(torch.tensor(seen), edits=edits, step=step).argmax(-1).numpy()

    states, _ = world.play(act, steps=LIMIT)
    return world.done(states[-1])


def rows(world: Gridworld) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """The planner's episodes, one row a step: (observations, episode of each row, step of each row, states)."""
    states, _ = world.play(steps=LIMIT)
    step, episode = np.nonzero(lived(world, states))
    order = np.lexsort((step, episode))
    step, episode = step[order], episode[order]
    seen = np.stack([world.observe(s) for s in states[:-1]])[step, episode]
    return torch.tensor(seen), episode, step, states[step, episode]


def fit_coder(policy: Policy, world: Gridworld, seed: int) -> SparseCoder:
    """A TopK coder of the first hidden layer, on the episodes that the policy learnt from."""
    seen, episode, *_ = rows(world)
    store = sl.harvest(sl.Net(policy), SITE, list(seen.split(np.bincount(episode).tolist())))
    coder = sl.TopK(WIDTH, FEATURES, k=K, seed=3000 + seed)
    return sl.train(coder, store, sl.TrainConfig(tokens=400_000, batch_size=512, seed=3000 + seed)).coder.eval()


def codes(net: Any, coder: Any, seen: Tensor) -> np.ndarray:
    """(row, feature) of observations."""
    return coder.codes_of(net.read(seen, SITE).flatten(0, -2)).dense().numpy()


def recurrence(z: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """(feature, 4) of codes (row, feature), rows in the order of steps: the share of episodes in which a feature fires;
    where it does, how many times it sets in, its largest code (as a share of the largest of all), and the mean length
    of a run as a share of the episode's (Swann et al. 2026)."""
    on = z > 0
    begins = np.r_[True, episode[1:] != episode[:-1]]
    onset = on & ~np.r_[np.zeros((1, on.shape[1]), bool), on[:-1]] | on & begins[:, None]
    firsts = np.flatnonzero(begins)
    runs, lit = (np.add.reduceat(x.astype(float), firsts) for x in (onset, on))
    long = np.diff(np.r_[firsts, len(z)])[:, None]
    fires = lit > 0
    count = fires.sum(0).clip(1)
    top = np.maximum.reduceat(z, firsts) / z.max(0).clip(1e-9)
    run = lit / runs.clip(1) / long
    return np.stack([fires.mean(0), runs.sum(0) / count, (top * fires).sum(0) / count, (run * fires).sum(0) / count], 1)


def lost(z: np.ndarray, recued: np.ndarray) -> np.ndarray:
    """The share of each feature's activation that goes when all cues are replaced by new ones."""
    return 1 - np.minimum(z, recued).sum(0) / z.sum(0).clip(1e-9)


def recued(world: Gridworld, seed: int) -> Gridworld:
    """The same episodes with cues that nobody has seen."""
    cue = sl.worlds.gridworld(len(world), cued=1.0, seed=seed).cue
    return replace(world, cue=np.where(world.cued[:, None], cue, 0).astype(cue.dtype))


def fit_classes(told: np.ndarray, truth: np.ndarray, random: np.random.Generator) -> tuple[Any, np.ndarray]:
    """(a logistic regression fitted on LABELLED features of each class, the numbers of the features left)."""
    own = [random.choice(np.flatnonzero(truth == v), LABELLED, replace=False) for v in (False, True)]
    labelled = np.concatenate(own)
    model = LogisticRegression(max_iter=1000).fit(told[labelled], truth[labelled])
    return model, np.setdiff1d(np.arange(len(truth)), labelled)


def class_f1(told: np.ndarray, truth: np.ndarray, random: np.random.Generator, draws: int = 20) -> float:
    """F1 of "memorised" on the features that were not labelled, averaged over draws of the labelled ones."""
    found = []
    for _ in range(draws):
        model, rest = fit_classes(told, truth, random)
        found.append(f1_score(truth[rest], model.predict(told[rest])))
    return float(np.mean(found))


def templates(window: int, at: int) -> np.ndarray:
    """(3, 2 window + 1): a pulse at an event and a step up and down there, of mean 0 and norm 1 (0 where constant)."""
    from_event = np.arange(2 * window + 1) - at
    step = np.where(from_event < 0, -1.0, 1.0)
    q = np.stack([np.clip(1 - abs(from_event) / (window + 1), 0, None), step, -step])
    q -= q.mean(1, keepdims=True)
    return q / np.linalg.norm(q, axis=1, keepdims=True).clip(1e-9)


def event_score(z: np.ndarray, event: int, window: int) -> np.ndarray:
    """(feature): the largest of the sums of (z - mean) q over a window around an event, for the three templates q, and
    0 if all are negative. z: codes of one episode's steps. The window is shifted to stay inside the episode."""
    begin = int(np.clip(event - window, 0, len(z) - 2 * window - 1))
    near = z[begin : begin + 2 * window + 1]
    return np.maximum(templates(window, event - begin) @ (near - near.mean(0)), 0).max(0)


def keyframes(states: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """The rows after which the agent stays where it is: it uses something."""
    still = (states[1:, :2] == states[:-1, :2]).all(1) & (episode[1:] == episode[:-1])
    return np.flatnonzero(still)


def clusters(states: np.ndarray, episode: np.ndarray, step: np.ndarray, at: np.ndarray, count: int = 2) -> np.ndarray:
    """The cluster of each keyframe, by KMeans on when and where it is and what is held and open."""
    last = np.bincount(episode, weights=np.ones(len(episode)))[episode[at]]
    told = np.column_stack([step[at] / last, states[at]]).astype(float)
    scaled = (told - told.mean(0)) / told.std(0).clip(1e-9)
    return KMeans(count, n_init=cast(Any, 4), random_state=0).fit_predict(scaled)


def event_ranking(z: np.ndarray, episode: np.ndarray, at: np.ndarray, kind: np.ndarray, window: int) -> np.ndarray:
    """(feature): the score at keyframes, averaged over those of a cluster, then over clusters."""
    begins = np.searchsorted(episode, episode[at])
    ends = np.searchsorted(episode, episode[at], side="right")
    long = ends - begins > 2 * window
    scores = [event_score(z[b:e], t - b, window) for b, e, t in zip(begins[long], ends[long], at[long], strict=True)]
    return np.stack([np.stack(scores)[kind[long] == k].mean(0) for k in np.unique(kind)]).mean(0)


def density(z: np.ndarray, some: np.ndarray) -> float:
    """The mean share of rows on which features fire."""
    return float((z[:, some] > 0).mean())


def norm(z: np.ndarray, norms: np.ndarray, some: np.ndarray) -> float:
    """The mean norm that ablating features takes away where they fire."""
    return float(((z * norms)[:, some].sum(0) / (z[:, some] > 0).sum(0).clip(1)).mean())


def matched(chosen: np.ndarray, z: np.ndarray, norms: np.ndarray, near: int, random: np.random.Generator) -> np.ndarray:
    """For each chosen feature another one, drawn among the ``near`` that are nearest in how often they fire and in the
    norm that ablating them takes away (both as logarithms over their deviations), without repeats."""
    often, taken = (z > 0).mean(0), (z * norms).sum(0) / (z > 0).sum(0).clip(1)
    alive = often > 0
    told = np.log(np.stack([often, taken], 1).clip(1e-9))
    told = (told - told[alive].mean(0)) / told[alive].std(0)
    left, found = set(np.flatnonzero(alive)) - set(chosen.tolist()), []
    for one in chosen:
        by_distance = sorted(left, key=lambda i: float(((told[i] - told[one]) ** 2).sum()))
        found.append(int(random.choice(by_distance[:near])))
        left.remove(found[-1])
    return np.array(found)


def small(x: Tensor) -> dict[str, Tensor]:
    """A matrix in 8 bits, with the scale of each row."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
    return {"": (x / scale).round().to(torch.int8), ".scale": scale.half()}


def save(path: Path, policy: Policy, coder: SparseCoder) -> None:
    tensors = {f"policy.{name}": t.half() for name, t in policy.state_dict().items()}
    for name, t in coder.state_dict().items():
        own = small(t) if t.dim() == 2 else {"": t.half()}
        tensors |= {f"coder.{name}{end}": part for end, part in own.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def load(seed: int, kind: str = "cued") -> tuple[sl.Net, SparseCoder]:
    """The network of a policy and its coder; kind: "cued" or "plain"."""
    own: dict[str, dict[str, Tensor]] = {"policy": {}, "coder": {}}
    kept = load_file(DATA / f"{kind}-{seed}.safetensors")
    for name, t in kept.items():
        of, _, rest = name.partition(".")
        if not rest.endswith(".scale"):
            own[of][rest] = t.float() * kept.get(f"{name}.scale", torch.ones(())).float()
    policy = Policy(own["policy"]["body.0.weight"].shape[1])
    policy.load_state_dict(own["policy"])
    coder = sl.TopK(WIDTH, FEATURES, k=K)
    coder.load_state_dict(own["coder"])
    net = sl.Net(policy.requires_grad_(False), name=f"{kind}-{seed}")
    coder.reads = coder.writes = (net.site(SITE),)
    return net, coder.requires_grad_(False).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    DATA.mkdir(parents=True, exist_ok=True)
    for seed in parser.parse_args().seeds:
        for kind in ("cued", "plain"):
            world = demos(seed, cues=kind == "cued")
            policy = clone(world, seed)
            save(DATA / f"{kind}-{seed}.safetensors", policy, fit_coder(policy, world, seed))


if __name__ == "__main__":
    main()
