"""Vectors steer as features do, their codes are those of plain formulas, and conditions hold where they say."""

import json

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.activations.sharding import MAX_NORM
from sae_lab.edits.conditions import Firing
from sae_lab.edits.vector import text_means
from sae_lab.lm.generation import continued
from sae_lab.stats import share_interval
from sae_lab.types import Site, TokenMask
from tests.edits.test_edit import LONGER, OTHER, PROMPT, ROUNDING, SITE, firing, make, near

EARLY, LATE = Site("resid_pre", 1), Site("resid_post", 2)
SHIPS = ["The ship went down the river to the sea", "A boat sailed over the lake", "Two ships met at the harbour"]
FOXES = ["A red fox crossed the white field", "The dog ran after the fox", "Two foxes slept in the snow"]


@pytest.fixture(scope="module")
def sae(make_tiny):
    return make(make_tiny("llama"))


@pytest.fixture(scope="module")
def live(make_tiny, sae):
    return firing(make_tiny("llama"), sae)


@pytest.fixture(scope="module")
def ships(make_tiny, small_text):
    return sl.Vector.difference(make_tiny("llama"), SITE, SHIPS, FOXES, "ships", text=small_text)


def read(lm, prompt, edits=(), site=SITE):
    return lm.read(prompt, site, edits=edits)[site][0]


def means(lm, texts):
    """By hand: each text's mean over its tokens but the first."""
    return torch.stack([read(lm, text)[1:].mean(0) for text in texts])


# ---- what a vector is


def test_a_features_vector_steers_as_the_feature_does(tiny_lm, sae, live):
    push, steer = sl.Push(sl.Vector.feature(sae, live[0]), 2.0), sl.Steer(sae, live[0], 2.0)
    assert near(tiny_lm.logits(PROMPT, edits=[push]), tiny_lm.logits(PROMPT, edits=[steer]), 1e-5)
    assert not near(tiny_lm.logits(PROMPT, edits=[push]), tiny_lm.logits(PROMPT), 1e-3)
    with torch.no_grad():
        sae = make(tiny_lm)
        sae.W_dec[live[0]] *= 3.0  # the length of a row is no strength
    vector = sl.Vector.feature(sae, live[0])
    assert vector.f_scale == pytest.approx(3 * float(sae.f_scale[live[0]]), rel=1e-5)
    assert vector.centre == pytest.approx(float(sae.b_dec.detach() @ vector.unit), rel=1e-4)
    with pytest.raises(ValueError, match=r"writes in the size of each token.*use sl.Steer"):
        sl.Vector.feature(make(tiny_lm, input_norm="layer"), 3)


def test_the_scale_is_measured_on_text(tiny_lm, small_text):
    vector = sl.Vector(torch.arange(48.0) - 20, SITE, "line").calibrated(tiny_lm, small_text, tokens=10**6)
    rows = []
    for document in small_text:
        for context in sl.load_text([document]).contexts(tiny_lm.tokenizer, tiny_lm.prefix_id, 128):
            rows.append(read(tiny_lm, [context.ids])[1:])
    x = torch.cat(rows)
    norms = x.norm(dim=-1)
    limit = MAX_NORM * float(norms.median())
    values = (x @ vector.unit)[norms <= limit]
    codes = (values - values.mean()).relu()
    assert vector.mask.max_norm[SITE.key] == pytest.approx(limit, rel=1e-4)
    assert vector.centre == pytest.approx(float(values.mean()), abs=1e-3)
    assert vector.f_scale == pytest.approx(float(codes[codes > 0].quantile(0.999, interpolation="lower")), rel=1e-3)
    assert vector.model == tiny_lm.id
    added = read(tiny_lm, PROMPT, [sl.Push(vector, 1.5)]) - read(tiny_lm, PROMPT)
    assert near(added[1:], (1.5 * vector.f_scale * vector.unit).expand_as(added[1:]), 1e-4) and not added[0].any()
    part = vector.calibrated(tiny_lm, small_text, tokens=50)
    assert part.f_scale != vector.f_scale and part.mask == vector.mask
    everything = TokenMask(tuple(range(tiny_lm.vocab_size)))
    with pytest.raises(ValueError, match="this text has no token that counts"):
        sl.Vector(vector.direction, SITE, mask=everything).calibrated(tiny_lm, ["a fox"])


def test_differences_and_components_by_hand(tiny_lm, small_text, ships):
    positive, negative = means(tiny_lm, SHIPS), means(tiny_lm, FOXES)
    assert near(ships.direction, positive.mean(0) - negative.mean(0), 1e-4)
    both = means(tiny_lm, SHIPS + FOXES)
    centred = both - both.mean(0)
    for component in (0, 1):
        found = sl.Vector.pca(tiny_lm, SITE, SHIPS + FOXES, component, text=small_text)
        values, axes = torch.linalg.eigh(centred.T @ centred)
        axis = axes[:, values.argsort(descending=True)[component]]
        assert float((found.unit @ axis).abs()) == pytest.approx(1, abs=1e-3) and float(centred[0] @ found.unit) > 0
    with pytest.raises(ValueError, match="component must be below 5, got 5"):
        sl.Vector.pca(tiny_lm, SITE, SHIPS + FOXES, 5)
    with pytest.raises(ValueError, match="at least one text of each kind"):
        sl.Vector.difference(tiny_lm, SITE, SHIPS, [])
    loud = TokenMask((), True, {SITE.key: 1e-6})
    with pytest.raises(ValueError, match="the mask leaves out every token of 'A boat"):
        text_means(tiny_lm, [SITE], SHIPS, loud)


def test_sums_are_new_vectors_without_a_scale(tiny_lm, ships, small_text):
    other = sl.Vector(torch.randn(48, generator=torch.Generator().manual_seed(0)), SITE, "noise", f_scale=2.0)
    for made, direction in (
        (ships + other, ships.direction + other.direction), (ships - 2 * other, ships.direction - 2 * other.direction),
        (-ships, -ships.direction),
    ):  # fmt: skip
        assert torch.allclose(made.direction, direction) and made.f_scale == 0
        with pytest.raises(ValueError, match=r"has no f_scale.*vector.calibrated\(lm\)"):
            tiny_lm.logits(PROMPT, edits=[sl.Push(made)])
        assert tiny_lm.logits(PROMPT, edits=[sl.Push(made.calibrated(tiny_lm, small_text))]).isfinite().all()
    assert (2 * ships).f_scale == ships.f_scale and (2 * ships).norm == pytest.approx(2 * ships.norm)
    left = ships.project_out(other)
    assert abs(float(left.unit @ other.unit)) < 1e-6
    assert repr(ships + other).startswith("Vector('ships + noise' at resid_post-1, norm ")


def test_vectors_that_do_not_go_together(tiny_lm, make_tiny, ships):
    one = torch.ones(48)
    for other, words in (
        (sl.Vector(one, LATE), "of one site, width"), (sl.Vector(torch.ones(40), SITE), "of one site, width"),
        (sl.Vector(one, SITE, model="another"), "width and model are combined"), (one, "Vector, got a Tensor"),
    ):  # fmt: skip
        for call in (lambda o=other: ships + o, lambda o=other: ships - o, lambda o=other: ships.project_out(o)):
            with pytest.raises(ValueError, match=words):
                call()
    for call in (lambda: ships - ships, lambda: 0 * ships, lambda: ships.project_out(3 * ships)):
        with pytest.raises(ValueError, match="has no length"):
            call()
    with pytest.raises(ValueError, match="factor must be a number, got 'two'"):
        ships * "two"
    with pytest.raises(ValueError, match="length above 0, got zeros"):
        sl.Vector(torch.zeros(48), SITE)
    with pytest.raises(ValueError, match="f_scale must be at least 0, got -1"):
        sl.Vector(one, SITE, f_scale=-1.0)
    with pytest.raises(ValueError, match=r"has width 40 and .* has width 48 there"):
        tiny_lm.logits(PROMPT, edits=[sl.Push(sl.Vector(torch.ones(40), SITE, f_scale=1.0))])
    gpt2 = make_tiny("gpt2")  # the same width
    with pytest.raises(ValueError, match=r"was made on LlamaForCausalLM, this model is GPT2LMHeadModel.*calibrated"):
        gpt2.logits(PROMPT, edits=[sl.Push(ships)])
    with pytest.raises(ValueError, match="made on LlamaForCausalLM, this model is GPT2"):
        gpt2.logits(PROMPT, edits=[sl.Push(sl.Vector(one, SITE, f_scale=1.0), when=(ships, 1.0, "token"))])


def alien(path, direction, site=SITE, model=""):
    """A vector that was loaded from a file, as one gets it from somebody else."""
    return sl.Vector.load(sl.Vector(direction, site, "alien", f_scale=1.0, model=model).save(path))


@pytest.mark.parametrize(
    ("width", "site", "model", "words"),
    [(40, SITE, "", r"has width 40 and .* has width 48 there: use the model it was made on \(unknown\)"),
     (40, SITE, "another", r"use the model it was made on \(another\)"),
     (48, SITE, "another", r"was made on another, this model is LlamaForCausalLM, .*vector.calibrated\(lm\)"),
     (48, Site("resid_post", 9), "", "layer")],
)  # fmt: skip
def test_a_loaded_vector_of_another_model_is_refused_wherever_it_goes(width, site, model, words, tiny_lm, sae, ships,
                                                                      live, tmp_path):  # fmt: skip
    vector = alien(tmp_path / "alien", torch.ones(width), site, model)
    good = sl.Push(ships, 1.0)
    for edit in (sl.Push(vector), sl.Push(ships, when=(vector, 1.0, "token")),
                 sl.Steer(sae, live[0], when=(vector, 1.0, "prompt"))):  # fmt: skip
        for again in (edit, sl.Edit.from_json(edit.to_json()) if isinstance(edit, sl.Push) else edit):
            calls = [
                lambda e=again: tiny_lm.logits(PROMPT, edits=[e]),
                lambda e=again: tiny_lm.generate(PROMPT, edits=[good, e], max_new_tokens=2),
                lambda e=again: tiny_lm.compare(PROMPT, [e]),
            ]
            for call in [*calls, *([lambda e=again: e.firing(tiny_lm, [PROMPT])] if edit.when else [])]:
                with pytest.raises(ValueError, match=words):
                    call()


def test_saved_and_loaded(tiny_lm, ships, tmp_path):
    path = ships.save(tmp_path / "ships.safetensors")
    logits = tiny_lm.logits(PROMPT, edits=[sl.Push(ships)])
    written = json.loads(json.dumps(ships.to_dict()))
    for again in (sl.Vector.load(path), sl.Vector.from_dict(written)):
        assert torch.equal(again.direction, ships.direction) and repr(again) == repr(ships)
        assert (again.mask, again.model, again.site) == (ships.mask, ships.model, ships.site)
        assert torch.equal(tiny_lm.logits(PROMPT, edits=[sl.Push(again)]), logits)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    (tmp_path / "text").write_text("no vector")
    for name in ("damaged", "text", "gone"):
        with pytest.raises(ValueError, match="holds no vector"):
            sl.Vector.load(tmp_path / name)
    nan = sl.Vector(torch.ones(48), SITE).to_dict() | {"direction": written["direction"][:-4] + "AADA"}
    for wrong in ({}, nan | {"direction": 3}, nan | {"direction": "?"}, nan | {"site": 7}, nan | {"mask": "all"},
                  nan | {"direction": "AADAfw=="}, nan | {"f_scale": "much"}):  # fmt: skip
        with pytest.raises(ValueError, match="this is no vector of sae_lab"):
            sl.Vector.from_dict(wrong)


# ---- in the rooms of the house


def test_a_push_as_json_needs_no_file(tiny_lm, sae, ships, live, tmp_path):
    sae.save(tmp_path / "coder")
    other = make(tiny_lm, EARLY, seed=1)
    f = firing(tiny_lm, other)[0]
    edits = [
        sl.Push(ships, 2.0, positions=slice(2, None)), sl.Push(ships, when=((sae, live[0]), 0.25, "token")),
        sl.Steer(sae, live[0], when=(ships, 0.1, "so far")), sl.Ablate(sae, live[1], when=(live[0], 0.5, "prompt")),
    ]  # fmt: skip
    for edit in edits:
        again = sl.Edit.from_json(edit.to_json())
        assert repr(again) == repr(edit)
        assert torch.equal(tiny_lm.logits(PROMPT, edits=[again]), tiny_lm.logits(PROMPT, edits=[edit]))
    with pytest.raises(ValueError, match=r"was never saved.*sae.save\(path\)"):
        sl.Push(ships, when=((other, f), 0.1, "token")).to_json()
    with pytest.raises(ValueError, match="this is no edit"):
        sl.Edit.from_json('{"edit": "Push", "vector": {}}')
    told = repr(sl.Push(ships, 2.0, when=((other, f), 0.25, "token")))
    assert told == f"Push({ships!r}, when=(({EARLY!r}, {f}), 0.25, 'token'), strength=2.0)"


def test_in_a_comparison_a_session_and_a_raw_trace(tiny_lm, ships, tmp_path):
    push = sl.Push(ships, 2.0)
    compared = tiny_lm.compare(PROMPT, [push])
    [(name, (without, with_))] = compared.features.items()
    assert name == "resid_post-1 ships"
    codes = (read(tiny_lm, PROMPT) @ ships.unit - ships.centre).relu()
    assert torch.allclose(without, codes, atol=1e-4)
    on = codes[1:] > 0
    assert on.any() and torch.allclose(with_[1:][on], codes[1:][on] + 2 * ships.f_scale, atol=1e-3)
    session = sl.Session()
    session.edits.add(push)
    session.save(tmp_path / "session.json")
    [again] = sl.Session.load(tmp_path / "session.json").edits
    logits = tiny_lm.logits(PROMPT, edits=[push])
    assert torch.equal(tiny_lm.logits(PROMPT, edits=[again]), logits)
    same = sl.Push(ships, 2.0, when=(ships, 0.0, "prompt"))
    inside, nn = same.inside(tiny_lm, PROMPT), tiny_lm._nn
    with torch.no_grad(), nn.trace(tiny_lm.tokenize(PROMPT).ids):
        x = nn.model.layers[1].output
        nn.model.layers[1].output = inside(x, x)
        found = nn.output.logits.save()
    assert torch.equal(found, tiny_lm.logits(PROMPT, edits=[same])) and torch.equal(found, logits)


# ---- conditions


def expected(on, scope):
    """By hand: where an edit acts, of where its condition's code exceeds the level."""
    if scope == "token":
        return on
    return on.cummax(0).values if scope == "so far" else on.any().expand(len(on))


@pytest.mark.parametrize("scope", ["token", "so far", "prompt"])
def test_it_acts_where_the_condition_holds(scope, tiny_lm, sae, ships, live):
    """Conditions on a vector, on the edit's own feature, on a feature at an earlier site; each row by itself."""
    early = make(tiny_lm, EARLY, seed=1)
    f = firing(tiny_lm, early)[0]
    prompts = [PROMPT, LONGER, OTHER]
    batch = tiny_lm.tokenize(prompts)
    at = {site: tiny_lm.read(prompts, site)[site] for site in (SITE, EARLY)}
    codes = {
        (ships, SITE): (at[SITE] @ ships.unit - ships.centre).relu() / ships.f_scale,
        (live[0], SITE): sae.encode(at[SITE])[..., live[0]] / sae.f_scale[live[0]],
        ((early, f), EARLY): early.encode(at[EARLY])[..., f] / early.f_scale[f],
    }
    for (what, _), code in codes.items():
        real = (batch.positions > 0) & batch.mask
        level = float(code[real].max()) * 0.6
        on = (code > level) & real
        assert 0 < int(on.sum()) < int(real.sum())
        edit = sl.Steer(sae, live[0], 3.0, when=(what, level, scope))
        before, after = (tiny_lm.read(prompts, SITE, edits=e)[SITE] for e in ([], [edit]))
        for row in range(3):
            wanted = expected(on[row], scope) & real[row]
            assert torch.equal((before[row] != after[row]).any(-1), wanted), (what, row)
    nowhere = sl.Steer(sae, live[0], 3.0, when=(ships, 1e6, scope))
    assert torch.equal(tiny_lm.logits(prompts, edits=[nowhere]), tiny_lm.logits(prompts))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("scope", ["token", "so far", "prompt"])
def test_generation_remembers(scope, cached, make_tiny, tiny_lm, ships):
    """Greedy tokens, with the state carried and without, are those of one pass with the edit at named positions."""
    lm = tiny_lm if cached else make_tiny("llama")
    if not cached:
        lm.__dict__["_empty_state"] = None  # as of a model whose state cannot be carried
    early = make(tiny_lm, EARLY, seed=1)
    f, prompts, new, later = firing(tiny_lm, early)[0], [PROMPT, OTHER], 8, 0
    batch = lm.tokenize(prompts)
    length = batch.ids.shape[1]
    assert batch.mask.all()
    for what, coder, number in ((ships, ships.coder, 0), ((early, f), early, f)):
        for level in (0.05, 0.3, 3.0):
            writes, ids = lm._writes([sl.Push(ships, 4.0, when=(what, level, scope))], batch, new), batch.ids.tolist()
            for rows, tokens in continued(lm, batch, writes, new, 0.0, None):
                for row, token in zip(rows, tokens, strict=True):
                    ids[row].append(token)
            x = tiny_lm.read([row[:-1] for row in ids], coder.site)[coder.site]  # the edit acts behind both sites
            on = coder.encode(x)[..., number] > level * coder.f_scale[number]
            on[:, 0] = False
            for row, told in zip(ids, on, strict=True):
                acts = expected(told, scope) if scope != "prompt" else told[:length].any().expand(len(told))
                later += int((acts[length:] != told[length:]).sum())
                push = sl.Push(ships, 4.0, positions=acts.nonzero().flatten().tolist())
                logits = tiny_lm.logits([row[:-1]], edits=[push])[0, length - 1 :]
                top = logits.topk(2).values
                close = top[:, 0] - top[:, 1] < ROUNDING * top[:, 0].abs()
                assert ((logits.argmax(-1) == torch.tensor(row[length:])) | close).all(), (what, level)
    assert later or scope == "token"  # a later token is edited for an earlier one's sake


def test_a_condition_reads_what_reaches_its_site(tiny_lm, sae, ships, live):
    """What an edit at an earlier site has written is seen; what an edit at the same site writes is not."""
    early = make(tiny_lm, EARLY, seed=1)
    first = sl.Steer(early, firing(tiny_lm, early)[0], 30.0)
    reached = (read(tiny_lm, PROMPT, [first]) @ ships.unit - ships.centre).relu() / ships.f_scale
    alone = (read(tiny_lm, PROMPT) @ ships.unit - ships.centre).relu() / ships.f_scale
    level = 0.5 * float(reached[1:].max())
    assert not torch.equal(reached > level, alone > level)
    edit = sl.Steer(sae, live[0], 3.0, when=(ships, level, "token"))
    for edits in ([first, edit], [edit, first]):
        changed = (read(tiny_lm, PROMPT, [first]) != read(tiny_lm, PROMPT, edits)).any(-1)
        ships_mask = ships.mask.keep(tiny_lm.tokenize(PROMPT).ids[0], torch.arange(len(changed)),
                                     {SITE: read(tiny_lm, PROMPT, [first])})  # fmt: skip
        assert torch.equal(changed, (reached > level) & ships_mask)
    high = 0.9 * float(alone[1:].max())
    pushed = sl.Push(ships, 100.0)
    edit = sl.Steer(sae, live[0], 3.0, when=(ships, high, "token"))
    changed = (read(tiny_lm, PROMPT, [pushed]) != read(tiny_lm, PROMPT, [pushed, edit])).any(-1)
    assert changed[1:].tolist() == (alone > high)[1:].tolist()
    late = make(tiny_lm, LATE)
    with pytest.raises(ValueError, match=r"read at the edit's site or before it, got one at .*layer=2.* at .*layer=1"):
        tiny_lm.logits(PROMPT, edits=[sl.Push(ships, when=((late, firing(tiny_lm, late)[0]), 0.1, "token"))])


def test_several_conditions_in_one_group(tiny_lm, sae, ships, live):
    f, g = live[:2]
    x = read(tiny_lm, PROMPT)
    z = sae.encode(x).detach()
    ours = (x @ ships.unit - ships.centre).relu() / ships.f_scale
    level = 0.5 * float(ours[1:].max())
    edits = [sl.Clamp(sae, f, 2.0, when=(ships, level, "token")), sl.Ablate(sae, g, when=(f, 0.2, "token")),
             sl.Steer(sae, g, 1.0, positions=[3])]  # fmt: skip
    new = z.clone()
    on, other = ours > level, z[:, f] > 0.2 * sae.f_scale[f]
    new[on, f] = 2 * sae.f_scale[f]
    new[other, g] = 0
    new[3, g] += sae.f_scale[g]
    new[0] = z[0]
    assert near(read(tiny_lm, PROMPT, edits), x + (new - z) @ sae.W_dec.detach(), 1e-5)


@pytest.mark.parametrize(
    "when",
    [7, (7, 1.0), (7, -1.0, "token"), (7, float("nan"), "token"), (7, True, "token"), (7, 1.0, "always"),
     ("army", 1.0, "token"), (True, 1.0, "token"), ((7, 7), 1.0, "token")],
)  # fmt: skip
def test_what_is_no_condition(when, sae, live):
    with pytest.raises(ValueError, match=r"when is \(feature, \(sae, feature\) or vector|when must be"):
        sl.Steer(sae, live[0], when=when)


def test_conditions_that_are_refused(tiny_lm, sae, ships, live):
    with pytest.raises(ValueError, match=r"when is \(feature"):
        sl.Push(ships, when=(7, 1.0, "token"))  # a vector has no features
    with pytest.raises(ValueError, match="feature must be an int from 0 to 63, got 64"):
        sl.Steer(sae, live[0], when=(64, 1.0, "token"))
    silent = int((sae.f_scale == 0).nonzero()[0])
    with pytest.raises(ValueError, match=f"feature {silent} never fired"):
        tiny_lm.logits(PROMPT, edits=[sl.Push(ships, when=((sae, silent), 1.0, "token"))])
    with pytest.raises(ValueError, match="has no f_scale"):
        tiny_lm.logits(PROMPT, edits=[sl.Push(ships, when=(-ships, 1.0, "token"))])
    with pytest.raises(ValueError, match="a condition needs its coder in eval mode"):
        tiny_lm.logits(PROMPT, edits=[sl.Push(ships, when=((make(tiny_lm).train(), live[0]), 1.0, "token"))])
    with pytest.raises(ValueError, match=r"error must be 'keep', got 'drop'"):
        sl.Push(ships, error="drop")
    with pytest.raises(ValueError, match="strength must be a finite number"):
        sl.Push(ships, float("inf"))


@pytest.mark.parametrize("scope", ["token", "so far", "prompt"])
def test_how_often_it_holds(scope, tiny_lm, sae, ships, live):
    texts = [PROMPT, LONGER, OTHER, "A fox"]
    codes = [(read(tiny_lm, text)[1:] @ ships.unit - ships.centre).relu() / ships.f_scale for text in texts]
    level = 0.6 * max(float(code.max()) for code in codes)
    acts = [expected(code > level, scope) for code in codes]
    edit = sl.Steer(sae, live[0], when=(ships, level, scope))
    found = edit.firing(tiny_lm, texts)
    assert isinstance(found, Firing) and found.tokens == sum(map(len, acts)) and found.texts == 4
    assert found.token_rate == pytest.approx(float(torch.cat(acts).float().mean()))
    assert found.text_rate == np.mean([bool(a.any()) for a in acts]) and 0 < found.text_rate < 1
    assert found.text_interval == pytest.approx(share_interval(found.text_rate, 4))
    assert 0 <= found.token_interval[0] < found.token_rate < found.token_interval[1] <= 1
    assert f"{scope!r}" in repr(found) and "95 % intervals" in repr(found)
    never = sl.Steer(sae, live[0], when=(ships, 1e6, scope)).firing(tiny_lm, texts)
    assert (never.token_rate, never.text_rate, never.token_interval[0]) == (0, 0, 0)
    assert never.token_interval == never.text_interval and never.token_interval[1] > 0.3  # of four texts
    with pytest.raises(ValueError, match="this edit has no when="):
        sl.Steer(sae, live[0]).firing(tiny_lm, texts)
    with pytest.raises(ValueError, match="at least one text"):
        edit.firing(tiny_lm, [])


def test_intervals_of_shares():
    """Against Wilson's interval of scipy."""
    from scipy.stats import binomtest

    for hits, n in ((0, 10), (3, 10), (10, 10), (1, 500)):
        ours, theirs = share_interval(hits / n, n), binomtest(hits, n).proportion_ci(method="wilson")
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-4)
