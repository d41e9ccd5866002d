"""Features of in-context tasks: ten of them in place of a task vector (notebooks/papers/task_features.ipynb).

    python benchmarks/papers/task_features.py              # all seeds, into notebooks/papers/data/task_features/

The tasks, the task vectors and the cleaning. The notebook takes its functions from here.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, no_type_check

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import sae_lab as sl
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, Write

DATA = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "data" / "task_features"

# One line a task; a pair is word:answer. Only pairs whose answer is one token of the model are used.
TASKS = {
    "capital": """France:Paris Germany:Berlin Italy:Rome Spain:Madrid Japan:Tokyo China:Beijing Russia:Moscow
        Egypt:Cairo Greece:Athens Austria:Vienna Portugal:Lisbon Ireland:Dublin Poland:Warsaw Hungary:Budapest
        Turkey:Ankara Iran:Tehran Iraq:Baghdad Cuba:Havana Kenya:Nairobi Peru:Lima Chile:Santiago England:London
        Scotland:Edinburgh Belgium:Brussels Denmark:Copenhagen Sweden:Stockholm Norway:Oslo Finland:Helsinki
        Ukraine:Kiev Syria:Damascus Lebanon:Beirut Israel:Jerusalem Thailand:Bangkok Vietnam:Hanoi
        Indonesia:Jakarta Canada:Ottawa Cambodia:Phnom Taiwan:Taipei Pakistan:Islamabad India:Delhi
        Australia:Canberra Afghanistan:Kabul Switzerland:Bern Venezuela:Caracas Libya:Tripoli Qatar:Doha
        Philippines:Manila Nigeria:Abuja Bulgaria:Sofia Serbia:Belgrade""",
    "plural": """cat:cats dog:dogs car:cars house:houses tree:trees book:books table:tables child:children man:men
        woman:women foot:feet tooth:teeth mouse:mice city:cities baby:babies country:countries box:boxes bus:buses
        glass:glasses watch:watches leaf:leaves wolf:wolves knife:knives life:lives river:rivers bird:birds
        flower:flowers school:schools king:kings door:doors hand:hands eye:eyes ship:ships road:roads wall:walls
        game:games song:songs letter:letters number:numbers answer:answers family:families body:bodies story:stories
        party:parties church:churches class:classes dish:dishes""",
    "past": """go:went see:saw take:took come:came give:gave find:found think:thought tell:told become:became
        leave:left feel:felt bring:brought begin:began keep:kept hold:held write:wrote stand:stood hear:heard
        mean:meant meet:met run:ran pay:paid sit:sat speak:spoke lead:led grow:grew lose:lost fall:fell send:sent
        build:built understand:understood draw:drew break:broke spend:spent rise:rose drive:drove buy:bought
        wear:wore choose:chose walk:walked play:played work:worked call:called ask:asked look:looked use:used
        want:wanted try:tried start:started open:opened""",
    "upper": """apple:Apple river:River table:Table green:Green house:House music:Music paper:Paper light:Light
        night:Night world:World school:School water:Water garden:Garden window:Window summer:Summer winter:Winter
        people:People number:Number letter:Letter family:Family doctor:Doctor friend:Friend mother:Mother
        father:Father sister:Sister brother:Brother street:Street market:Market church:Church castle:Castle
        forest:Forest island:Island valley:Valley bridge:Bridge silver:Silver golden:Golden purple:Purple
        yellow:Yellow orange:Orange spring:Spring autumn:Autumn morning:Morning evening:Evening animal:Animal
        flower:Flower planet:Planet system:System""",
    "antonym": """hot:cold big:small up:down good:bad black:white day:night old:young rich:poor fast:slow high:low
        open:closed happy:sad hard:soft strong:weak light:dark long:short full:empty early:late first:last left:right
        wet:dry thick:thin wide:narrow deep:shallow clean:dirty true:false win:lose love:hate buy:sell give:take
        push:pull inside:outside above:below before:after begin:end war:peace life:death male:female north:south
        east:west summer:winter always:never more:less same:different easy:difficult heavy:light loud:quiet
        top:bottom positive:negative internal:external maximum:minimum""",
    "successor": """one:two two:three three:four four:five five:six six:seven seven:eight eight:nine nine:ten
        ten:eleven eleven:twelve twelve:thirteen Monday:Tuesday Tuesday:Wednesday Wednesday:Thursday Thursday:Friday
        Friday:Saturday Saturday:Sunday Sunday:Monday January:February February:March March:April April:May May:June
        June:July July:August August:September September:October October:November November:December
        December:January""",
    "continent": """France:Europe Germany:Europe Italy:Europe Spain:Europe Poland:Europe Sweden:Europe Norway:Europe
        Greece:Europe Portugal:Europe Austria:Europe China:Asia Japan:Asia India:Asia Vietnam:Asia Thailand:Asia
        Iran:Asia Iraq:Asia Korea:Asia Nepal:Asia Pakistan:Asia Egypt:Africa Kenya:Africa Nigeria:Africa Ghana:Africa
        Morocco:Africa Sudan:Africa Uganda:Africa Ethiopia:Africa Algeria:Africa Zambia:Africa""",
    "comparative": """big:bigger small:smaller old:older young:younger fast:faster slow:slower high:higher low:lower
        strong:stronger weak:weaker long:longer short:shorter deep:deeper wide:wider hard:harder soft:softer
        warm:warmer cold:colder hot:hotter cool:cooler rich:richer poor:poorer dark:darker light:lighter
        bright:brighter clean:cleaner safe:safer near:nearer large:larger great:greater new:newer cheap:cheaper
        thick:thicker thin:thinner tall:taller smart:smarter early:earlier late:later easy:easier happy:happier
        heavy:heavier simple:simpler close:closer good:better bad:worse far:further""",
    "gerund": """go:going see:seeing take:taking come:coming give:giving find:finding think:thinking tell:telling
        leave:leaving feel:feeling bring:bringing begin:beginning keep:keeping hold:holding write:writing
        stand:standing hear:hearing meet:meeting run:running pay:paying sit:sitting speak:speaking lead:leading
        grow:growing lose:losing fall:falling send:sending build:building draw:drawing break:breaking
        spend:spending rise:rising drive:driving buy:buying wear:wearing choose:choosing walk:walking play:playing
        work:working call:calling ask:asking look:looking use:using want:wanting try:trying start:starting
        open:opening read:reading swim:swimming eat:eating""",
    "language": """France:French Germany:German Italy:Italian Spain:Spanish Japan:Japanese China:Chinese
        Russia:Russian Greece:Greek Portugal:Portuguese Poland:Polish Turkey:Turkish Sweden:Swedish Norway:Norwegian
        Denmark:Danish Finland:Finnish Hungary:Hungarian Ireland:Irish England:English Scotland:Scottish
        Egypt:Egyptian India:Indian Canada:Canadian Australia:Australian Mexico:Mexican Cuba:Cuban Brazil:Brazilian
        Korea:Korean Vietnam:Vietnamese Iran:Iranian Iraq:Iraqi Israel:Israeli Syria:Syrian Ukraine:Ukrainian
        Austria:Austrian Belgium:Belgian Switzerland:Swiss America:American Britain:British Africa:African
        Europe:European Asia:Asian Rome:Roman Pakistan:Pakistani Nigeria:Nigerian Indonesia:Indonesian
        Thailand:Thai Argentina:Argentine Chile:Chilean Peru:Peruvian Afghanistan:Afghan""",
    "third person": """go:goes see:sees take:takes come:comes give:gives find:finds think:thinks tell:tells
        leave:leaves feel:feels bring:brings begin:begins keep:keeps hold:holds write:writes stand:stands hear:hears
        meet:meets run:runs pay:pays sit:sits speak:speaks lead:leads grow:grows lose:loses fall:falls send:sends
        build:builds draw:draws break:breaks spend:spends rise:rises drive:drives buy:buys wear:wears choose:chooses
        walk:walks play:plays work:works call:calls ask:asks look:looks use:uses want:wants try:tries start:starts
        open:opens read:reads eat:eats live:lives""",
}  # fmt: skip
TASKS["copy"] = " ".join(f"{word}:{word}" for word in [pair.split(":")[0] for pair in TASKS["upper"].split()])
TASKS["singular"] = " ".join(":".join(pair.split(":")[::-1]) for pair in TASKS["plural"].split())

SEEDS, LAYERS = (1, 2, 3), (8, 16)
SHOWN_LAYERS = (8, 12, 16, 20, 24)  # where the gate is looked at; coders stand at LAYERS
SHOTS, PROMPTS, HELD_OUT = 5, 12, 24  # examples before a query; queries of the gate and the cleaning; held-out ones
GAIN, KEPT = 0.2, 0.5  # the gate: few-shot accuracy beyond zero-shot; the vector's share of few-shot accuracy
MOST, CANDIDATES = 10, 64
STEPS, RATE, PENALTY = (45, 30), 0.15, 0.02  # of the cleaning, with the penalty and after it; in units of the vector
ARMS = ("features", "random features", "PCA", "random dictionary")


def pairs_of(lm: sl.LM, task: str) -> list[tuple[str, str]]:
    """The pairs of a task whose answer is one token."""
    pairs = [tuple(pair.split(":")) for pair in TASKS[task].split()]
    return [(a, b) for a, b in pairs if len(lm.tokenizer(f" {b}", add_special_tokens=False).input_ids) == 1]


def answers_of(lm: sl.LM, pairs: Sequence[tuple[str, str]]) -> Tensor:
    return torch.tensor([lm.tokenizer(f" {b}", add_special_tokens=False).input_ids[0] for _, b in pairs])


def zero_shot(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{a} ->" for a, _ in pairs]


def few_shot(pairs: Sequence[tuple[str, str]], shown: Sequence[tuple[str, str]], draw: random.Random) -> list[str]:
    """A prompt for each pair, behind ``SHOTS`` others of ``shown``."""
    lines = [draw.sample([p for p in shown if p[0] != a], SHOTS) for a, _ in pairs]
    return ["".join(f"{x} -> {y}\n" for x, y in some) + f"{a} ->" for some, (a, _) in zip(lines, pairs, strict=True)]


@dataclass(frozen=True)
class AtLast:
    """``lm.logits(prompts, [AtLast(site, vector)])``: the activation at the last token of each prompt replaced."""

    site: Site
    vector: Tensor

    def writes(self, lm: sl.LM, batch: TokenBatch, new: int = 0) -> list[Write]:
        return [Write(self.site, partial(at_last, vector=self.vector))]


@no_type_check
def at_last(x, tokens, vector):
    last = (tokens.mask.cumsum(1) == tokens.mask.sum(1, keepdim=True)) & tokens.mask
    return torch.where(last.unsqueeze(-1), vector.to(x), x)


def last_of(x: Tensor, mask: Tensor) -> Tensor:
    return x[torch.arange(len(x)), mask.sum(1) - 1]


def judged(logits: Tensor, answers: Tensor) -> tuple[float, float]:
    """(share of right answers, mean log-probability of the right answer), of logits at the last tokens."""
    logp = logits.log_softmax(-1)[torch.arange(len(answers)), answers]
    return float((logits.argmax(-1) == answers).float().mean()), float(logp.mean())


class Tail:
    """``Tail(lm, prompts, layer)(h)``: logits at the last tokens, where ``h``, "batch d" or "arms batch d", stands in
    for the stream behind ``layer`` there. Keys and values of the tokens before are computed once, so that a step of the
    cleaning costs one token a prompt. Of Llama's blocks.

    own: the model's own stream there; streams: behind every block but the last.
    """

    def __init__(self, lm: sl.LM, prompts: list[str], layer: int):
        module, tokens = lm._module, lm.tokenize(prompts)
        with torch.no_grad():
            out = module.model(tokens.ids, use_cache=True, output_hidden_states=True)
        self.model, self.head, self.after = module.model, module.lm_head, range(layer + 1, lm.n_layers)
        self.size, self.at = module.config.head_dim, tokens.mask.sum(1) - 1
        self.streams = [last_of(x, tokens.mask) for x in out.hidden_states[1:-1]]
        self.own = self.streams[layer]
        before = torch.arange(tokens.ids.shape[1]) < self.at[:, None]
        self.bias = torch.cat([before, torch.ones(len(before), 1, dtype=torch.bool)], 1)[:, None, None]
        layers = out.past_key_values.layers
        self.past = {i: (layers[i].keys, layers[i].values) for i in self.after}
        self.turn = self.model.rotary_emb(self.own[:, None], self.at[:, None])

    def __call__(self, h: Tensor) -> Tensor:
        many = h.shape[0] if h.dim() == 3 else 1
        x = h.expand(*h.shape[:-2], *self.own.shape).reshape(-1, 1, h.shape[-1]).to(self.own.dtype)
        turn = tuple(t.repeat(many, 1, 1) for t in self.turn)
        bias = self.bias.repeat(many, 1, 1, 1)
        for i in self.after:
            layer, (keys, values) = self.model.layers[i], (p.repeat(many, 1, 1, 1) for p in self.past[i])
            y, attention = layer.input_layernorm(x), layer.self_attn
            q, k, v = (
                f(y).unflatten(-1, (-1, self.size)).transpose(1, 2)
                for f in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, *turn)
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias, enable_gqa=True)
            x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits = self.head(self.model.norm(x[:, 0])).float()
        return logits.unflatten(0, (many, -1)) if h.dim() == 3 else logits


@dataclass
class Split:
    """A task's pairs in two halves, and its prompts: few-shot prompts show pairs of the held-in half only."""

    lm: sl.LM
    task: str
    seed: int

    def __post_init__(self):
        pairs, draw = pairs_of(self.lm, self.task), random.Random(f"{self.task} {self.seed}")
        draw.shuffle(pairs)
        half = len(pairs) // 2
        self.shown, self.held_in, self.held_out = pairs[:half], pairs[:half][:PROMPTS], pairs[half:][:HELD_OUT]
        self.few_in, self.few_out = (few_shot(of, self.shown, draw) for of in (self.held_in, self.held_out))
        self.zero_in, self.zero_out = zero_shot(self.held_in), zero_shot(self.held_out)
        self.right_in, self.right_out = answers_of(self.lm, self.held_in), answers_of(self.lm, self.held_out)


@torch.no_grad()
def gate(lm: sl.LM, split: Split, layers: Sequence[int] = SHOWN_LAYERS) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """(accuracies on the held-in queries, the task vectors): few-shot, zero-shot, and zero-shot with the vector."""
    found: dict[str, Any] = {"layers": {}}
    vectors, few = {}, Tail(lm, split.few_in, layers[-1])
    for layer in layers:
        zero = Tail(lm, split.zero_in, layer)
        vectors[layer] = few.streams[layer].mean(0)
        found["layers"][layer] = judged(zero(vectors[layer]), split.right_in)[0]
    found |= {"few": judged(few(few.own), split.right_in)[0], "zero": judged(zero(zero.own), split.right_in)[0]}
    able = found["few"] - found["zero"] >= GAIN
    found["passes"] = [i for i in LAYERS if able and found["layers"][i] >= KEPT * found["few"]]
    return found, vectors


def dictionaries(sae: SparseCoder, axes: Tensor, vector: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(directions "arm candidate d", coefficients they start from, their numbers) of the four arms.

    Features, and those of the dictionary turned by a random rotation: the largest pre-activations of the vector. PCA:
    the largest projections. Random features: ``MOST`` drawn, which all start from the same length.
    """
    draw = torch.Generator().manual_seed(1000 + seed)
    less = vector - sae.b_dec
    turn = torch.linalg.qr(torch.randn(sae.d_in, sae.d_in, generator=draw)).Q
    directions, starts, numbers = [], [], []
    for arm in ARMS:
        basis = axes if arm == "PCA" else sae.W_dec @ turn.T if arm == "random dictionary" else sae.W_dec
        if arm == "PCA":
            start = axes @ less
        elif arm == "random features":
            start = torch.zeros(sae.d_sae)
            start[torch.randperm(sae.d_sae, generator=draw)[:MOST]] = less.norm().item() / 10
        else:
            x = less @ turn if arm == "random dictionary" else less
            start = (x @ sae.W_enc + sae.b_enc).relu()
        best = start.abs().topk(CANDIDATES).indices
        directions, starts, numbers = [*directions, basis[best]], [*starts, start[best]], [*numbers, best]
    return torch.stack(directions).detach(), torch.stack(starts).detach(), torch.stack(numbers)


def cleaned(tail: Tail, answers: Tensor, base: Tensor, directions: Tensor, starts: Tensor) -> Tensor:
    """Coefficients "arm candidate", at most ``MOST`` of an arm other than 0, that make the answers likely.

    Adam on -log p(answer) + penalty·Σ|w| with the stream at base + Σ w·direction; then the largest ``MOST`` of each
    arm alone, without the penalty. Only PCA's may be negative.
    """
    unit = (starts[0] @ directions[0]).norm() / 10
    w = (starts / unit).requires_grad_(True)
    positive = torch.tensor([arm != "PCA" for arm in ARMS])[:, None]
    keep = starts != 0
    for steps, penalty in zip(STEPS, (PENALTY, 0.0), strict=True):
        adam = torch.optim.Adam([w], RATE)
        for step in range(steps):
            for group in adam.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            logits = tail((base + unit * torch.einsum("ac,acd->ad", w, directions))[:, None])
            likely = logits.log_softmax(-1)[:, torch.arange(len(answers)), answers]
            loss = (-likely.mean(1) + penalty * w.abs().sum(1)).sum()
            (w.grad,) = torch.autograd.grad(loss, w)
            adam.step()
            with torch.no_grad():
                w.mul_(keep)
                w.copy_(torch.where(positive, w.clamp(min=0), w))
        with torch.no_grad():
            keep = torch.zeros_like(keep).scatter_(1, w.abs().topk(MOST, dim=1).indices, True) & keep
            w.mul_(keep)
    return w.detach() * unit


@torch.no_grad()
def measured(lm: sl.LM, split: Split, layer: int, inserted: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """(accuracy, mean log-probability) on the held-out queries: few-shot, zero-shot, and with each vector inserted."""
    tail, few = Tail(lm, split.zero_out, layer), Tail(lm, split.few_out, layer)
    found = {"few-shot": few(few.own), "zero-shot": tail(tail.own)}
    found |= {name: tail(vector) for name, vector in inserted.items()}
    return {name: judged(logits, split.right_out) for name, logits in found.items()}


def text_axes(lm: sl.LM, sae: SparseCoder) -> Tensor:
    """Principal axes of the activations that the coder reads, on text."""
    read = lm.read([document[:500] for document in sl.load_text()[:12]], sae.site)
    assert sae.mask is not None
    x = read[sae.site][sae.mask.keep(read.ids, read.batch.positions, read) & read.mask]
    return sl.circuits.principal_axes(x)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--out", type=Path, default=DATA)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lm, quick = sl.LM(), sl.LM(dtype=torch.bfloat16)  # cleaned in half precision, measured in full
    for one in (lm, quick):
        one._module.requires_grad_(False)
    saes = {layer: sl.load(f"smollm2-135m/resid_post-{layer}") for layer in LAYERS}
    axes, gates, results, vectors = {}, [], [], {}
    for seed in args.seeds:
        for task in args.tasks:
            split = Split(lm, task, seed)
            found, task_vectors = gate(lm, split)
            gates.append({"seed": seed, "task": task, **found})
            print(gates[-1], flush=True)
            for layer in found["passes"]:
                sae, vector = saes[layer], task_vectors[layer]
                axes[layer] = axes[layer] if layer in axes else text_axes(lm, sae)
                directions, starts, numbers = dictionaries(sae, axes[layer], vector, seed)
                tail = Tail(quick, split.zero_in, layer)
                w = cleaned(tail, split.right_in, sae.b_dec.detach(), directions, starts)
                made = sae.b_dec.detach() + torch.einsum("ac,acd->ad", w, directions)
                inserted = {"task vector": vector, "reconstruction": sae(vector[None]).x_hat[0].detach()}
                inserted |= {"no feature": sae.b_dec.detach()} | dict(zip(ARMS, made, strict=True))
                scores = measured(lm, split, layer, inserted)
                on = w[0].nonzero().flatten()
                results.append({"seed": seed, "task": task, "layer": layer, "queries": len(split.held_out),
                                "l0": int((sae.encode(vector[None]) > 0).sum()),
                                "features": numbers[0, on].tolist(), "coefficients": w[0, on].tolist(),
                                "scores": scores})  # fmt: skip
                print({name: [round(v, 2) for v in values] for name, values in scores.items()}, flush=True)
                vectors |= {f"{layer}/{seed}/{task}/{name}": v.half() for name, v in inserted.items()}
        save(args.out, gates, results, vectors)  # after each seed


def save(folder: Path, gates: list[Any], results: list[Any], vectors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: v.contiguous() for name, v in vectors.items()}, folder / "vectors.safetensors")
    text = json.dumps({"gates": gates, "results": results}, indent=1)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
