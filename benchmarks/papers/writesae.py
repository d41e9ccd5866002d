"""What notebooks/papers/writesae.ipynb loads: small language models whose layers write matrices, and their coders.

    python benchmarks/papers/writesae.py               # all seeds, some minutes on one core
    python benchmarks/papers/writesae.py --seeds 100 --folder build/trial

Layers are gated delta rules (Yang et al. 2024, arXiv:2412.06464), one state S a head, d_k by d_v:

    S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ        o_t = S_tᵀ q_t

Coders are TopK on states, or on writes β k vᵀ, whose encoder and decoder rows are outer products (Young 2026,
arXiv:2605.12770), beside one with full rows.
"""

import argparse
import json
import string
import time
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import sae_lab as sl

FOLDER = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "data" / "writesae"
SEEDS = (1, 2, 3)
ALPHABET = "\n" + string.printable[:95]  # other characters become "?"
LENGTH, WIDTH, LAYERS, HEADS, STATE = 64, 48, 3, 2, 16  # STATE: d_k = d_v
STEPS, BATCH, LR = 900, 24, 6e-3
D_SAE, K, CODER_STEPS, CONTEXTS = 256, 8, 800, 640  # CONTEXTS: whose states a coder is trained on


# ---- contexts


def characters(text: "sl.Text") -> Int[Tensor, " n"]:
    """All documents one after the other, as numbers in ALPHABET."""
    table = torch.full((256,), ALPHABET.index("?"))
    table[torch.tensor([ord(c) for c in ALPHABET])] = torch.arange(len(ALPHABET))
    raw = "\n".join(text[i] for i in range(len(text))).encode("latin-1", "replace")
    return table[torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()]


def cut(stream: Int[Tensor, " n"], count: int, generator: torch.Generator) -> Int[Tensor, "count length"]:
    """Contexts of text that begin anywhere."""
    starts = torch.randint(0, len(stream) - LENGTH, (count, 1), generator=generator)
    return stream[starts + torch.arange(LENGTH)]


# ---- the model


class Layer(nn.Module):
    """One gated delta rule and an MLP."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(WIDTH, HEADS * 3 * STATE, bias=False)
        self.conv = nn.Conv1d(HEADS * 3 * STATE, HEADS * 3 * STATE, 4, groups=HEADS * 3 * STATE, padding=3)
        self.gates = nn.Linear(WIDTH, 2 * HEADS)
        self.out = nn.Linear(HEADS * STATE, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        nn.init.constant_(self.gates.bias[:HEADS], 3.0)  # α = 0.95 at first

    def factors(self, x: Float[Tensor, "b t d"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v "b head t state", and log α, β "b head t"."""
        x = F.rms_norm(x, (WIDTH,))
        mixed = F.silu(self.conv(self.into(x).transpose(1, 2))[..., : x.shape[1]])
        q, k, v = mixed.unflatten(1, (3, HEADS, STATE)).transpose(-1, -2).unbind(1)
        log_alpha, beta = F.logsigmoid(self.gates(x)).transpose(1, 2).split(HEADS, 1)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, log_alpha, beta.exp()

    def rest(self, x: Tensor) -> Tensor:
        """What follows the mixing of tokens."""
        return x + self.down(F.gelu(self.up(F.rms_norm(x, (WIDTH,)))))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, log_alpha, beta = self.factors(x)
        decay, u = unrolled(k, v, log_alpha, beta)
        return self.rest(x + self.merge((decay * (q @ k.mT)) @ u))

    def merge(self, o: Float[Tensor, "b head t state"]) -> Float[Tensor, "b t d"]:
        return self.out(o.transpose(1, 2).flatten(2))


def unrolled(k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """(decay "t s", u "s state") with S_t = Σ_{s≤t} decay_ts k_s u_sᵀ, without a loop over positions.

    u_t = β_t (v_t − α_t S_{t−1}ᵀ k_t) is linear in the u before it: a triangular system.
    """
    total = log_alpha.cumsum(-1)
    later = torch.full([k.shape[-2]] * 2, -torch.inf).triu(1)
    decay = (total[..., :, None] - total[..., None, :] + later).exp()
    earlier = beta[..., None] * decay * (k @ k.mT)  # its diagonal is not read
    return decay, torch.linalg.solve_triangular(earlier, beta[..., None] * v, upper=False, unitriangular=True)


class Model(nn.Module):
    """A language model of characters: ``Model()(ids)`` are logits."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.unembed = nn.Linear(WIDTH, len(ALPHABET), bias=False)

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t vocab"]:
        return self.after(self.embed(ids), 0)

    def after(self, x: Float[Tensor, "b t d"], first: int) -> Float[Tensor, "b t vocab"]:
        """Logits, from the input of layer ``first`` on."""
        for layer in self.layers[first:]:
            x = layer(x)
        return self.unembed(F.rms_norm(x, (WIDTH,)))


def train_model(stream: Tensor, seed: int, steps: int = STEPS) -> Model:
    torch.manual_seed(seed)
    model, generator = Model(), torch.Generator().manual_seed(1000 + seed)
    adam = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, LR, steps, pct_start=0.1)
    for step in range(steps):
        ids = cut(stream, BATCH, generator)
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        rate.step()
        if step % 100 == 99:
            print(f"model {seed}, step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.requires_grad_(False).eval()


# ---- one head: its states, and what a change of one of them does


class Head:
    """``Head(model, layer, head, ids)``: states, writes and reads of one head on contexts, and ``install``."""

    @torch.no_grad()
    def __init__(self, model: Model, layer: int, head: int, ids: Int[Tensor, "b t"]):
        self.model, self.layer, self.ids = model, layer, ids
        x = model.embed(ids)
        for before in model.layers[:layer]:
            x = before(x)
        block: Layer = model.layers[layer]  # type: ignore[assignment]
        factors = block.factors(x)
        decay, u = unrolled(*factors[1:])
        self.mixed = x + block.merge((decay * (factors[0] @ factors[1].mT)) @ u)
        self.q, self.k, self.v, self.log_alpha, self.beta = (part[:, head] for part in factors)
        self.decay, self.u = decay[:, head], u[:, head]
        self.W_o = block.out.weight[:, head * STATE : (head + 1) * STATE]  # d, state
        self.logits, self.rms = self._read(self.mixed)

    def states(self) -> Float[Tensor, "b t k v"]:
        return torch.einsum("bts,bsk,bsv->btkv", self.decay, self.k, self.u)

    def writes(self) -> Float[Tensor, "b t k v"]:
        """β k vᵀ: what the model adds at each position."""
        return torch.einsum("bt,btk,btv->btkv", self.beta, self.k, self.v)

    def state(self, at: Int[Tensor, " b"]) -> Float[Tensor, "b k v"]:
        """``states`` after one position of each context."""
        return torch.einsum("bs,bsk,bsv->bkv", self.decay[torch.arange(len(at)), at], self.k, self.u)

    def write(self, at: Int[Tensor, " b"]) -> Float[Tensor, "b k v"]:
        """``writes`` at one position of each context."""
        rows = torch.arange(len(at))
        return self.beta[rows, at][:, None, None] * self.k[rows, at][:, :, None] * self.v[rows, at][:, None]

    def propagate(self, change: Float[Tensor, "b k v"], at: Int[Tensor, " b"]) -> Float[Tensor, "b t v"]:
        """The change of o at every position, if the state after position ``at`` is changed: exact, for the layer's own
        q, k, α and β do not depend on its state. δS_s = α_s (I − β_s k_s k_sᵀ) δS_{s−1}."""
        state, found = torch.zeros_like(change), []
        for s in range(self.ids.shape[1]):
            k, alpha, beta = self.k[:, s, :, None], self.log_alpha[:, s].exp(), self.beta[:, s]
            state = alpha[:, None, None] * (state - beta[:, None, None] * k * (k * state).sum(1, keepdim=True))
            state = torch.where((at == s)[:, None, None], change, state)
            found.append((self.q[:, s, :, None] * state).sum(1))
        return torch.stack(found, 1)

    def formula(
        self, v: Float[Tensor, "b k"], w: Float[Tensor, "b v"], at: Int[Tensor, " b"]
    ) -> Float[Tensor, "b t v"]:
        """The published short form of ``propagate(v wᵀ, at)``: Πα ⟨v, q⟩ w, without the factors I − β k kᵀ."""
        total = self.log_alpha.cumsum(1)
        gate = (total - total.gather(1, at[:, None])).exp() * (torch.arange(total.shape[1]) >= at[:, None])
        return (gate * (self.q @ v[:, :, None])[..., 0])[..., None] * w[:, None]

    @torch.no_grad()
    def install(self, change: Float[Tensor, "b k v"], at: Int[Tensor, " b"]) -> Float[Tensor, "b t vocab"]:
        """Logits, if the state after position ``at`` is changed."""
        return self._read(self.mixed + self.propagate(change, at) @ self.W_o.T)[0]

    @torch.no_grad()
    def without(self) -> Float[Tensor, "b t vocab"]:
        """Logits, if the state were empty at all positions."""
        return self._read(self.mixed - ((self.decay * (self.q @ self.k.mT)) @ self.u) @ self.W_o.T)[0]

    def kl(self, change: Float[Tensor, "b k v"], at: Int[Tensor, " b"], window: int) -> Float[Tensor, " b"]:
        """KL of the logits with the state changed from the clean ones, summed over ``window`` positions from ``at``."""
        clean, other = self.logits.log_softmax(-1), self.install(change, at).log_softmax(-1)
        each = (clean.exp() * (clean - other)).sum(-1)
        return each[torch.arange(len(at))[:, None], at[:, None] + torch.arange(window)].sum(1)

    def effects(
        self, v: Float[Tensor, "b k"], w: Float[Tensor, "b v"], at: Int[Tensor, " b"], window: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What v wᵀ, added to the state after ``at``, does 1 to ``window`` positions later.

        To o, "b window v": "exact", by the formula ("short"), by the formula with v and w exchanged ("swapped"). To
        the logit of the clean prediction, "b window": "measured", and each of the three through W_o and W_U alone.
        """
        change = v[:, :, None] * w[:, None]
        reads = {"exact": self.propagate(change, at), "short": self.formula(v, w, at)}
        reads["swapped"] = self.formula(w, v, at)
        token = self.logits.argmax(-1, keepdim=True)
        logits = {what: self.direct(o).gather(2, token)[..., 0] for what, o in reads.items()}
        logits["measured"] = (self.install(change, at) - self.logits).gather(2, token)[..., 0]
        rows, spots = torch.arange(len(at))[:, None], at[:, None] + torch.arange(1, window + 1)
        return {what: o[rows, spots] for what, o in reads.items()}, {what: x[rows, spots] for what, x in logits.items()}

    def direct(self, o: Float[Tensor, "b t v"]) -> Float[Tensor, "b t vocab"]:
        """What a change of o does to the logits straight through W_o and W_U, the last norm held fixed."""
        return (o @ self.W_o.T / self.rms) @ self.model.unembed.weight.T

    def _read(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model.layers[self.layer].rest(mixed)  # type: ignore[operator]
        for block in self.model.layers[self.layer + 1 :]:
            x = block(x)
        rms = x.pow(2).mean(-1, keepdim=True).sqrt()
        return self.model.unembed(x / rms), rms


# ---- coders


class OuterTopK(sl.TopK):
    """``OuterTopK(d_k=16, d_v=16, d_sae=256, k=8)``: TopK on d_k by d_v matrices, with atoms v_i w_iᵀ.

        pre_i = x_vᵀ (X − M) x_w + b_i, with factors x_v, x_w of its own for each atom
        X_hat = M + Σ_i f_i v_i w_iᵀ

    rank: outer products an atom is the sum of. Factors of the decoder have unit norm.
    """

    tied = True  # W_enc and W_dec are made of the factors

    def __init__(self, d_k: int, d_v: int, d_sae: int, k: int = 8, rank: int = 1, seed: int = 0):
        self.factors = (d_sae, rank, d_k), (d_sae, rank, d_v)
        super().__init__(d_k * d_v, d_sae, k, seed=seed)
        self.config |= {"d_k": d_k, "d_v": d_v, "rank": rank}

    def _make_weights(self, generator: torch.Generator) -> None:
        v, w = (F.normalize(torch.randn(shape, generator=generator), dim=-1) for shape in self.factors)
        self.v, self.w, self.v_enc, self.w_enc = (nn.Parameter(t.clone()) for t in (v, w, v, w))

    @property
    def W_enc(self) -> Tensor:
        return torch.einsum("irk,irv->kvi", self.v_enc, self.w_enc).flatten(0, 1)

    @property
    def W_dec(self) -> Tensor:
        return torch.einsum("irk,irv->ikv", self.v, self.w).flatten(1)

    @torch.no_grad()
    def project(self) -> None:
        for factor in (self.v, self.w):
            factor.div_(factor.norm(dim=-1, keepdim=True).clamp_min(1e-8))


def train_coder(coder: sl.TopK, matrices: Float[Tensor, "n k v"], seed: int, steps: int = CODER_STEPS) -> sl.TopK:
    config = sl.TrainConfig(steps=steps, batch_size=256, lr=3e-3, seed=seed, dead_after=20_000, log_every=steps)
    print(sl.train(coder, matrices.flatten(1), config), flush=True)
    return coder


def important_head(model: Model, layer: int, ids: Tensor) -> int:
    """The head whose output, set to zero at all positions, raises the loss on ``ids`` most."""
    logits = [Head(model, layer, head, ids).without()[:, :-1].flatten(0, 1) for head in range(HEADS)]
    return int(torch.stack([F.cross_entropy(found, ids[:, 1:].flatten()) for found in logits]).argmax())


# ---- files


def make(seed: int, stream: Tensor, folder: Path, model_steps: int = STEPS, coder_steps: int = CODER_STEPS) -> None:
    """Train the model of a seed and its coders, and write them."""
    started = time.perf_counter()
    model = train_model(stream, seed, model_steps)
    generator = torch.Generator().manual_seed(2000 + seed)
    ids = cut(stream, CONTEXTS, generator)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    heads = [important_head(model, layer, ids[:128]) for layer in range(LAYERS)]
    for name, (layer, of, rank) in CODERS.items():
        read = Head(model, layer, heads[layer], ids)
        matrices = (read.states() if of == "state" else read.writes())[:, 4:].flatten(0, 1)
        coder = train_coder(new_coder(rank, seed), matrices, 3000 + seed, coder_steps)
        tensors |= {f"{name}.{key}": t for key, t in coder.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: t.detach().half().contiguous() for name, t in tensors.items()}
    save_file(half, folder / f"{seed}.safetensors", {"heads": json.dumps(heads)})
    size = (folder / f"{seed}.safetensors").stat().st_size
    print(f"seed {seed}: {time.perf_counter() - started:.0f} s, {size:,} bytes", flush=True)


# name: (layer, what it codes, rank of its atoms; None: full matrices)
MIDDLE, LAST = 1, 2
CODERS: dict[str, tuple[int, str, int | None]] = {
    "rank 1": (MIDDLE, "state", 1), "rank 2": (MIDDLE, "state", 2), "flat": (MIDDLE, "state", None),
    "of writes": (MIDDLE, "write", 1), "last layer": (LAST, "state", 1),
}  # fmt: skip


def new_coder(rank: int | None, seed: int) -> sl.TopK:
    if rank is None:
        return sl.TopK(STATE * STATE, D_SAE, K, seed=4000 + seed)
    return OuterTopK(STATE, STATE, D_SAE, K, rank=rank, seed=4000 + seed)


def load(seed: int, folder: Path = FOLDER) -> tuple[Model, dict[str, sl.TopK], list[int]]:
    """(the model of a seed, its coders by name, the head that is looked at in each layer)."""
    path = folder / f"{seed}.safetensors"
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, t in load_file(path).items():
        owner, key = name.split(".", 1)
        tensors.setdefault(owner, {})[key] = t.float()
    model, coders = Model(), {name: new_coder(rank, 0) for name, (_, _, rank) in CODERS.items()}
    model.load_state_dict(tensors["model"])
    for name, coder in coders.items():
        coder.load_state_dict(tensors[name])
        coder.requires_grad_(False).eval()
    with safe_open(path, "pt") as file:
        heads = json.loads(file.metadata()["heads"])
    return model.requires_grad_(False).eval(), coders, heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stream = characters(sl.load_text("mix"))
    for seed in args.seeds:
        make(seed, stream, args.folder)


if __name__ == "__main__":
    main()
