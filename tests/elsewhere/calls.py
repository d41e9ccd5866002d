"""The main calls on a pretend accelerator. ``test_elsewhere.py`` runs this file in a process of its own, since torch
knows a device as long as a process lives.

Results are compared with those of the CPU. "both": model and coder lie there; "coder", "model": one of them does, and
the other on the CPU, which works, or is refused in a sentence that says where each lies.
"""

import copy
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import test_invariance as figures
import tiny_models
import torch
from saes.conftest import batch_for, make, tokens_for

import sae_lab as sl
from elsewhere import pretend
from elsewhere.pretend import DEVICE
from sae_lab.activations.store import Rows
from sae_lab.training.loop import Training

SITE, LATER, HEADS = sl.Site("resid_post", 1), sl.Site("resid_post", 2), sl.Site("attn_z", 1)
CONFIG = sl.TrainConfig(steps=4, batch_size=64)
PROMPTS, SOURCES = ["the quick fox is", " pack my box now"], ["the brown dog is", "  jump over dogs"]
ROUNDING = 1e-4  # the sums are the CPU's, by the kernels that are asked for elsewhere
PLACEMENTS = ("both", "coder", "model")


# ---- the device itself


@pytest.mark.parametrize(
    "call",
    [
        lambda there, here: there + here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: there @ here.T,
        lambda there, here: torch.where(there > 0, there, here),
        lambda there, here: here[torch.zeros(1, dtype=torch.long, device=DEVICE)],
        lambda there, here: torch.isin(there, here),
        lambda there, here: torch.stack([there.sum(), here.sum()]),
        lambda there, here: torch.randn(3, device=DEVICE, generator=torch.Generator()),
    ],
)
def test_tensors_of_two_devices_do_not_mix(call):
    with pytest.raises(RuntimeError, match=r"same device|device type for generator"):
        call(torch.ones(3, 4, device=DEVICE), torch.ones(3, 4))


def test_what_a_real_accelerator_allows():
    there = torch.arange(6, device=DEVICE).view(2, 3)
    assert (there * torch.tensor(2)).tolist() == [[0, 2, 4], [6, 8, 10]]  # a number on the CPU
    assert there[torch.tensor([1])].tolist() == [[3, 4, 5]]  # places on the CPU
    assert there.cpu().numpy().sum() == 15 and there.device == torch.zeros(2).to(there).device == DEVICE
    for read in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="can't convert elsewhere:0 device type tensor to numpy"):
            read()


def test_another_thread_has_the_same_device():
    found = []
    thread = threading.Thread(target=lambda: found.append((torch.ones(2, device=DEVICE) + 1).tolist()))
    thread.start()
    thread.join()
    assert found == [[2.0, 2.0]]


# ---- training


@pytest.mark.parametrize("family", sl.saes.FAMILIES)
def test_a_family_is_trained_there_as_on_the_cpu(family):
    runs = []
    for device in ("cpu", DEVICE):
        coder, x = make(family).to(device), tokens_for(family, 300, seed=8)
        batch = batch_for(x, coder)
        runs.append(sl.train(coder, batch, sl.TrainConfig(steps=4, batch_size=32, dead_after=40)))
    here, there = (run.coder.state_dict() for run in runs)
    assert {t.device for t in there.values()} == {DEVICE}
    assert not figures.differences(here, {n: t.cpu() for n, t in there.items()}, ROUNDING)
    assert runs[0].history[-1]["fvu"] == pytest.approx(runs[1].history[-1]["fvu"], rel=ROUNDING)


def waits(family, **arguments):
    """The operations that wait for the device, in the second step of a training; its batch is there already."""
    coder = getattr(sl, family)(16, 64, **arguments).to(DEVICE)
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    training = Training(coder, Rows(x), sl.TrainConfig(steps=10_000, batch_size=64), None, ())
    training.begin()
    x = x[:64].to(DEVICE)
    batch = sl.Batch(x, x)
    training.one_step(batch)
    pretend.WAITED.clear()
    training.one_step(batch)
    return list(pretend.WAITED)


def test_a_step_waits_once_for_the_device():
    """For the numbers that decide whether the step is sound, read together with those that it logs."""
    assert waits("TopK", k=4) == ["tolist"]


def test_a_choice_over_the_whole_batch_waits_once_more():
    assert sorted(waits("BatchTopK", k=4)) == ["aten.nonzero", "tolist"]


def test_bfloat16_products_there():
    runs = {}
    for precision in ("float32", "bf16"):
        config = sl.TrainConfig(steps=20, batch_size=64, precision=precision)
        x = sl.worlds.planted(n=40, d=16, l0=3, samples=1000).x
        runs[precision] = sl.train(sl.TopK(16, 64, k=4).to(DEVICE), x, config)
    fvu = {name: run.history[-1]["fvu"] for name, run in runs.items()}
    assert fvu["bf16"] != fvu["float32"] and fvu["bf16"] == pytest.approx(fvu["float32"], rel=0.05)


# ---- with a model


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    module, tokenizer = tiny_models.build("llama"), tiny_models.tokenizer()
    here = sl.LM(module, tokenizer=tokenizer, device="cpu")
    there = sl.LM(copy.deepcopy(module), tokenizer=tokenizer, device=DEVICE)
    text = sl.load_text(["The quick brown fox jumps over the lazy dog. " * 3, "Pack my box. " * 5] * 8)
    store = sl.harvest(here, [SITE, LATER], text, tokens=600, path=folder / "store", context=64)
    coder, later = sl.TopK(48, 64, k=4), sl.BatchTopK(48, 64, k=4)
    sl.train(coder, store.at(SITE), CONFIG)
    sl.train(later, store.at(LATER), CONFIG)
    heads = sl.TopK(48, 64, k=4)
    heads.reads = heads.writes = (HEADS,)
    heads.calibrate([here.read(PROMPTS, HEADS)[HEADS].flatten(0, 1)])
    transcoder = sl.Transcoder(48, 64, k=4, d_out=48)
    transcoder.reads, transcoder.writes = (sl.Site("mlp_in", 1),), (sl.Site("mlp_out", 1),)
    transcoder.calibrate([here.read(PROMPTS, "mlp_in-1")["mlp_in-1"].flatten(0, 1)])
    clt = sl.CrossLayerTranscoder(48, 64, layers=2, k=8, activation="topk")
    clt.reads, clt.writes = (tuple(sl.Site(kind, i) for i in (0, 1)) for kind in ("mlp_in", "mlp_out"))
    x = store.rows(np.arange(300), SITE.key).float()
    coders = {"coder": coder, "later": later, "heads": heads, "transcoder": transcoder.eval(), "clt": clt.eval()}
    return SimpleNamespace(here=here, there=there, text=text, store=store, x=x, folder=folder, coders=coders)


def placed(lab, kind, folder):
    """What a call gets. kind: a placement, or "cpu"."""
    lm = lab.there if kind in ("both", "model") else lab.here
    where = DEVICE if kind in ("both", "coder") else "cpu"
    coders = {name: copy.deepcopy(coder).to(where) for name, coder in lab.coders.items()}
    feature = int(lab.coders["coder"].f_scale.argmax())
    return SimpleNamespace(lm=lm, f=feature, text=lab.text, store=lab.store, x=lab.x, folder=folder, **coders)


CALLS = {}
TOGETHER = {}  # by call: whether model and coder must lie together


def call(name, together=False):
    def register(function):
        CALLS[name], TOGETHER[name] = function, together
        return function

    return register


def metric(s):
    return sl.circuits.logit_difference(s.lm, "a", "b")


@call("generation")
def _(s):
    edits = [sl.Steer(s.coder, s.f, 2.0)]
    return [
        s.lm.generate("the", edits=edits, max_new_tokens=3),
        s.lm.generate("the", max_new_tokens=3, temperature=1.0, seed=1),
    ]


@call("edits")
def _(s):
    c, f = s.coder, s.f
    edits = [
        sl.Steer(c, f, 2.0), sl.Clamp(c, [f], 1.0), sl.Scale(c, [f], 2.0), sl.Ablate(c, [f]), sl.Splice(c),
        sl.Ablate(c, [f], to="mean", reference=PROMPTS), sl.Ablate(c, [f], to="resample", reference=PROMPTS),
        sl.Project(c, [f]), sl.Patch(c, SOURCES), sl.Patch(c, SOURCES, feature=f, error="patch"),
    ]  # fmt: skip
    return [s.lm.logits(PROMPTS, edits=[edit]).cpu() for edit in edits]


@call("index")
def _(s):
    index = sl.index_features(s.coder, s.lm, s.store.at(SITE), s.folder / "index")
    return [index.density, index.max, index.score(s.f, PROMPTS[0]).peak]


@call("features of prompts")
def _(s):
    return [sl.features(s.lm, s.coder, PROMPTS).value]


@call("harvest of activations and codes")
def _(s):
    settings = {"tokens": 100, "context": 32}
    store = sl.harvest(s.lm, SITE, s.text, path=s.folder / "x", **settings)
    codes = sl.harvest(s.lm, SITE, s.text, path=s.folder / "codes", coder=s.coder, **settings)
    return [store.rows(np.arange(100), SITE.key).float(), codes.codes(0, 100, 64).dense()]


@call("trainings")
def _(s):
    device, stream = s.coder.b_dec.device, sl.Stream(s.lm, SITE, s.text, context=64, buffer=256)
    made = {"stream": sl.TopK(48, 64, k=4).to(device), "watched": sl.TopK(48, 64, k=4).to(device)}
    sl.train(made["stream"], stream, CONFIG)
    sl.train(made["watched"], s.store.at(SITE), CONFIG, watch=(s.lm, s.text.held_out))
    made["aimed"] = sl.JumpReLU(48, 64).to(device)
    sl.train(made["aimed"], s.store.at(SITE), sl.TrainConfig(steps=4, batch_size=64, target_l0=8))
    swept = sl.sweep([sl.TopK(48, 64, k=k).to(device) for k in (4, 8)], s.store.at(SITE), CONFIG)
    sl.estimate(sl.train, made["stream"], s.store.at(SITE), CONFIG)
    return [{n: c.W_dec.detach().cpu() for n, c in made.items()}, [row["fvu"] for row in swept.rows]]


@call("a training that is interrupted")
def _(s):
    def stop(event):
        if event.kind == "step" and event.step == 2:
            raise KeyboardInterrupt

    device, path = s.coder.b_dec.device, s.folder / "run"
    with pytest.raises(KeyboardInterrupt):
        sl.train(sl.TopK(48, 64, k=4).to(device), s.store.at(SITE), CONFIG, path=path, callbacks=[stop])
    run = sl.train(sl.TopK(48, 64, k=4).to(device), s.store.at(SITE), CONFIG, path=path)
    return [run.coder.W_dec.detach().cpu(), sl.load(path).W_dec.detach()]


@call("searches")
def _(s):
    texts, against = [t[:60] for t in s.text[:4]], [t[:60] for t in s.text[4:8]]
    found = sl.find_features(s.lm, s.coder, texts, against, permutations=9)
    dose = sl.dose_response(
        s.lm, s.coder, s.f, PROMPTS, ["a"], PROMPTS, strengths=(0, 1, 2), examples=(PROMPTS, SOURCES), seeds=1
    )
    return [len(found.to_pandas()), len(dose.rows), sl.match(s.coder, s.later).b_to_a]


@call("adapted coders")
def _(s):
    c, x = s.coder, s.x
    resampled = copy.deepcopy(c)
    sl.saes.resample(resampled, x, torch.arange(64) < 3)
    made = [sl.saes.unsuppress(c, x), sl.saes.realign(c, x), *sl.saes.baselines(c, x).values(), resampled]
    return [m.W_dec.detach().cpu() for m in made] + [sl.saes.optimise_codes(c, x[:30], k=3).dense().cpu()]


@call("evals of a model")
def _(s):
    few = {"tokens": 120, "context": 32}
    positional = sl.evals.positional(s.coder, s.lm, s.store.at(SITE), tokens=300, bins=2, min_firings=2)
    return [
        figures.numbers(sl.evals.reconstruction(s.coder, s.lm, s.text, tokens=120)),
        figures.numbers(sl.evals.by_position(s.coder, s.lm, s.text, **few)),
        figures.numbers(sl.evals.pathological_errors(s.coder, s.lm, s.text, **few)),
        figures.numbers(positional, "best"),
    ]


@call("evals of activations")
def _(s):
    c, x = s.coder, s.x
    concepts = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    return [
        figures.numbers(sl.evals.choose_l0([c, s.later], x)),
        figures.numbers(sl.evals.cones(c, concepts, x, sizes=(1, 2)), "features"),
        figures.numbers(sl.evals.consistency(c, s.later, x=x).pairs[0], "match"),
        figures.numbers(sl.evals.description_length([c, s.later], x), "coders"),
        figures.numbers(sl.evals.monosemanticity(c, x), "best", "worst"),
        figures.numbers(sl.evals.stitching(c, s.later, x)),
    ]


@call("explanations")
def _(s):
    lens = sl.explain.lens_shape(s.coder, s.lm, [s.f], {s.f: "t"})
    lists = sl.explain.token_list(s.coder, s.lm, [s.f], tokens=range(30, 60))
    said = sl.explain.self_explain(s.coder, s.lm, [s.f], tokens=2, scales=(1.0,))
    return [figures.numbers(lens), figures.numbers(lists, "codes"), said.texts]


@call("readings of a prompt")
def _(s):
    reading = sl.circuits.read_prompt(s.lm, s.coder, PROMPTS[0])
    effects = sl.circuits.direct_effects(s.lm, s.coder, PROMPTS[0], on=["a", "b"], n=None)
    return [reading.active(s.coder, 4)[1], reading.along(s.coder, s.f), reading.losses(), effects.effects]


@call("attribution", together=True)
def _(s):
    found = sl.circuits.attribution(s.lm, s.coder, PROMPTS, SOURCES, metric(s), steps=2, check=2)
    return [found.effects.cpu(), found.error.cpu()]


@call("patched directions", together=True)
def _(s):
    found = sl.circuits.patched_directions(s.lm, s.coder, PROMPTS * 2, SOURCES * 2, numbers=(1, 4), steps=2)
    return [found.kl]


@call("effects of a feature", together=True)
def _(s):
    found = sl.circuits.effects_of(s.lm, s.coder, s.f, list(s.text[:2]), [s.later], controls=3)
    return [found.changes[LATER].cpu(), found.beyond]


@call("feature circuit", together=True)
def _(s):
    found = sl.circuits.feature_circuit(
        s.lm, [s.coder, s.later], PROMPTS, SOURCES, metric(s), steps=2, sizes=(3,), draws=1, edges=2, check=2
    )
    return [list(found.nodes.values()), figures.numbers(found.faithfulness)]


@call("heads", together=True)
def _(s):
    feature = int(s.heads.f_scale.cpu().argmax())
    found = sl.circuits.head_attribution(s.lm, s.heads, feature, PROMPTS[0])
    return [found.parts, sl.circuits.head_shares(s.lm, s.heads, PROMPTS)]


@call("edges between coders", together=True)
def _(s):
    check = sl.circuits.check_edges(s.lm, s.coder, s.later, s.f, list(s.text[:2]))
    return [sl.circuits.invariant_edges(s.lm, s.coder, s.later), check.frozen]


@call("pull back", together=True)
def _(s):
    return [sl.circuits.pull_back(s.lm, s.later, int(s.later.f_scale.cpu().argmax()), PROMPTS).directions.cpu()]


@call("trace")
def _(s):
    coders = sl.TranscoderSet([s.transcoder])
    graph = sl.circuits.trace(s.lm, coders, PROMPTS[0], ["a"])
    task = sl.circuits.trace_many(s.lm, coders, PROMPTS + SOURCES, ["a", "b"] * 2, edges=1.0)
    return [graph.effects.cpu(), len(graph.prune().nodes), len(task.edges)]


@call("a cross-layer transcoder")
def _(s):
    read = s.lm.read(PROMPTS, [*s.clt.reads, *s.clt.writes])
    return [s.clt.check(read), sl.circuits.trace(s.lm, s.clt.as_set(), PROMPTS[0], ["a"]).effects.cpu()]


@pytest.fixture(scope="module")
def on_cpu(lab):
    """The results on the CPU, by call; made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = CALLS[name](placed(lab, "cpu", lab.folder / f"cpu {name}"))
        return made[name]

    return of


@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_what_it_gives_on_the_cpu(name, kind, lab, on_cpu, tmp_path):
    given = placed(lab, kind, tmp_path)
    if TOGETHER[name] and kind != "both":
        with pytest.raises(ValueError, match=r"lies on \S+, the model's activations on \S+: move the coder there"):
            CALLS[name](given)
        return
    found = CALLS[name](given)
    assert not (off := figures.differences(on_cpu(name), found, ROUNDING)), off[:5]
