"""A list of edits: those of one coder at one site act on one set of codes, and none decides which tokens count for
another."""

import pytest
import torch

import sae_lab as sl
from sae_lab.explain.selfexplain import Implant
from sae_lab.lm.generation import continued
from sae_lab.lm.network import listed_edits
from sae_lab.types import Site, TokenMask
from tests.edits.test_edit import LONGER, OTHER, PROMPT, ROUNDING, SITE, firing, make, near, transcoder

EARLY = Site("resid_pre", 1)


@pytest.fixture(scope="module")
def sae(make_tiny):
    return make(make_tiny("llama"))


@pytest.fixture(scope="module")
def live(make_tiny, sae):
    return firing(make_tiny("llama"), sae)


def pushing(sae, vector):
    """x' = x + vector at the tokens that this coder's mask keeps."""
    return sl.Push(sl.Vector(vector, sae.site, f_scale=float(vector.norm()), mask=sae.mask))


def after(lm, edits, site=SITE, prompt=PROMPT):
    return lm.read(prompt, site, edits=edits)[site][0]


def written(x, sae, rule, drop=False):
    """By hand: x with codes changed by ``rule(z)`` in place, at all tokens but the prefix."""
    z = sae.encode(x).detach()
    new = z.clone()
    rule(new)
    out = (sae.decode(new) if drop else x + (new - z) @ sae.W_dec).detach()
    out[0] = x[0]
    return out


def put(features, values):
    def rule(z):
        z[:, features] = values

    return rule


# ---- one set of codes


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("family", ["L1", "TopK", "BatchTopK"])
def test_two_edits_are_one_edit_of_both_features(family, error, tiny_lm):
    sae = make(tiny_lm, name=family)
    a, b, c = firing(tiny_lm, sae)[:3]
    x = after(tiny_lm, [])
    for kind, settings, value in ((sl.Clamp, {"value": 1.5}, 1.5), (sl.Ablate, {}, 0.0)):
        one = after(tiny_lm, [kind(sae, [a, b, c], **settings, error=error)])
        parts = [kind(sae, f, **settings, error=error) for f in (a, b, c)]
        assert torch.equal(one, after(tiny_lm, parts)) and torch.equal(one, after(tiny_lm, parts[::-1]))
        features = torch.tensor([a, b, c])
        expected = written(x, sae, put(features, value * sae.f_scale[features]), drop=error == "drop")
        assert near(one, expected, 1e-5) and not near(one, x, 1e-3)
        in_turn = x
        for f in (a, b, c):  # the control: encoding anew after each edit is something else
            in_turn = written(in_turn, sae, put([f], value * sae.f_scale[f]), drop=error == "drop")
        assert kind is sl.Ablate or not near(in_turn, expected, 1e-3)


def test_edits_of_one_feature_act_in_the_order_of_the_list(tiny_lm, sae, live):
    f = live[0]
    scale, z = sae.f_scale[f], sae.encode(after(tiny_lm, []))[:, f].detach()
    steer, clamp, ablate = sl.Steer(sae, f, strength=2.0), sl.Clamp(sae, f, value=0.5), sl.Ablate(sae, f)
    double = sl.Scale(sae, f, factor=2.0)
    for edits, code in (
        ([steer, clamp], 0.5 * scale), ([clamp, steer], 2.5 * scale), ([steer, ablate], 0 * scale),
        ([ablate, steer], 2 * scale), ([steer, double], 2 * (z + 2 * scale)), ([double, steer], 2 * z + 2 * scale),
        ([steer, sl.Clamp(sae, live[1]), ablate, sl.Clamp(sae, live[1], value=0.0)], put),
    ):  # fmt: skip
        rule = put([f, live[1]], 0.0) if code is put else put(f, code)
        assert near(after(tiny_lm, edits), written(after(tiny_lm, []), sae, rule), 1e-5), edits


def test_each_edit_of_a_group_has_its_places(tiny_lm, sae, live):
    """Positions, rows and tokens of one are not those of another."""
    f, g = live[:2]
    edits = [sl.Clamp(sae, f, value=2.0, positions=[2, 5]), sl.Steer(sae, f, positions=slice(5, None), rows=1),
             sl.Ablate(sae, g, positions=" the"), sl.Scale(sae, [g, f], 3.0, positions=slice(7, 9))]  # fmt: skip
    prompts = [PROMPT, OTHER]
    x, edited = (tiny_lm.read(prompts, SITE, edits=e)[SITE] for e in ([], edits))
    for row, prompt in enumerate(prompts):
        the = [i for i, t in enumerate(tiny_lm.tokens(prompt)) if t == " the"]

        def rule(z, row=row, the=the):
            z[[2, 5], f] = 2 * sae.f_scale[f]
            if row == 1:
                z[5:, f] += sae.f_scale[f]
            z[the, g] = 0
            z[7:9, f] *= 3
            z[7:9, g] *= 3

        assert the and near(edited[row], written(x[row], sae, rule), 1e-5)


def test_another_coder_or_a_vector_ends_a_group(tiny_lm, sae, live):
    """What stands behind it encodes what it has made."""
    other = make(tiny_lm, seed=1)
    f, g, h = live[0], live[1], firing(tiny_lm, other)[0]
    x = after(tiny_lm, [])
    first = written(x, sae, put([f], 2 * sae.f_scale[f]))
    a, b = sl.Clamp(sae, f, value=2.0), sl.Ablate(sae, g)
    v = torch.nn.functional.normalize(sae.W_dec[live[2]].detach(), dim=0)
    between = {
        "coder": (sl.Ablate(other, h), written(first, other, put([h], 0.0))),
        "project": (sl.Project(sae, live[2]), torch.cat([first[:1], first[1:] - (first[1:] @ v)[:, None] * v])),
        "push": (pushing(sae, 3 * v), torch.cat([first[:1], first[1:] + 3 * v])),
        "implant": (Implant(SITE, 3, v[None]), first.index_put((torch.tensor(3),), v)),
    }
    for name, (edit, then) in between.items():
        expected = written(then, sae, put([g], 0.0))
        assert near(after(tiny_lm, [a, edit, b]), expected, 1e-5), name
        assert not near(expected, after(tiny_lm, [a, b, edit]), 1e-4), name


def test_a_coder_loaded_twice_is_one(tiny_lm, sae, live, tmp_path):
    sae.save(tmp_path / "coder")
    again = sl.load(tmp_path / "coder")
    a, b = live[:2]
    both = after(tiny_lm, [sl.Clamp(sae, [a, b])])
    assert torch.equal(after(tiny_lm, [sl.Clamp(sae, a), sl.Clamp(again, b)]), both)
    with torch.no_grad():
        again.b_enc += 0.05
    assert not near(after(tiny_lm, [sl.Clamp(sae, a), sl.Clamp(again, b)]), both, 1e-4)


def test_edits_at_another_site_do_not_end_a_group(tiny_lm, sae, live):
    early = make(tiny_lm, EARLY, seed=1)
    a, b = (sl.Clamp(sae, f, value=2.0) for f in live[:2])
    between = sl.Steer(early, firing(tiny_lm, early)[0])
    assert torch.equal(after(tiny_lm, [a, between, b]), after(tiny_lm, [between, sl.Clamp(sae, live[:2], value=2.0)]))


def test_all_heads_and_one_head_share_a_place(tiny_lm):
    """An edit of all heads ends the group of an edit of one."""
    whole, one = Site("attn_z", 1), Site("attn_z", 1, head=2)
    wide, narrow = make(tiny_lm, whole), make(tiny_lm, one, seed=1)
    columns = slice(2 * tiny_lm.width(one), 3 * tiny_lm.width(one))
    f, (a, b) = firing(tiny_lm, wide)[0], firing(tiny_lm, narrow)[:2]
    x = after(tiny_lm, [], whole)
    x[:, columns] = written(x[:, columns], narrow, put([a], 0.0))
    x = written(x, wide, put([f], 0.0))
    x[:, columns] = written(x[:, columns], narrow, put([b], 0.0))
    assert near(after(tiny_lm, [sl.Ablate(narrow, a), sl.Ablate(wide, f), sl.Ablate(narrow, b)], whole), x, 1e-5)


def test_keep_and_drop_exclude_each_other(tiny_lm, sae, live):
    keep, drop = sl.Steer(sae, live[0]), sl.Splice(sae)
    for edits in ([keep, drop], [drop, keep], [sl.Patch(sae, OTHER, error="patch"), sl.Clamp(sae, 3, error="drop")]):
        with pytest.raises(ValueError, match=r"codes together, and all keep .* or all drop it, got .*give all"):
            tiny_lm.logits(PROMPT, edits=edits)
    other = make(tiny_lm, seed=1)
    assert tiny_lm.logits(PROMPT, edits=[keep, sl.Splice(other)]).isfinite().all()
    x = after(tiny_lm, [])
    both = after(tiny_lm, [sl.Splice(sae), sl.Ablate(sae, live[0], error="drop")])
    assert near(both, written(x, sae, put([live[0]], 0.0), drop=True), 1e-5)


def test_another_runs_error_beside_edits_of_codes(tiny_lm, sae, live):
    """Codes follow the list; the error is the source's."""
    source = after(tiny_lm, [], prompt=OTHER)
    patch, ablate = sl.Patch(sae, OTHER, error="patch"), sl.Clamp(sae, live[0], value=3.0)
    expected = written(source, sae, put([live[0]], 3 * sae.f_scale[live[0]]))
    assert near(after(tiny_lm, [patch, ablate])[1:], expected[1:], 1e-5)
    assert near(after(tiny_lm, [ablate, patch])[1:], source[1:], 1e-5)
    here = sl.Patch(sae, OTHER, error="patch", positions=4)
    some = after(tiny_lm, [here, sl.Clamp(sae, live[0], value=3.0, positions=[4, 6])])
    alone = after(tiny_lm, [sl.Clamp(sae, live[0], value=3.0)])
    assert near(some[4], expected[4], 1e-5) and near(some[6], alone[6], 1e-5)
    assert torch.equal(some[5], after(tiny_lm, [])[5])


def test_a_transcoders_codes_go_on_from_where_they_are(tiny_lm):
    """Its site of reading shows nothing of what it has written, whatever stands between its edits."""
    reads, writes = Site("mlp_in", 1), Site("mlp_out", 1)
    coder = transcoder(tiny_lm, reads, writes, skip=True)
    other = make(tiny_lm, writes, seed=1)
    h = firing(tiny_lm, other)[0]
    f = int(coder.encode(after(tiny_lm, [], reads))[1:].sum(0).argmax())
    z, x = coder.encode(after(tiny_lm, [], reads)).detach(), after(tiny_lm, [], writes)
    direction, scale = coder.W_dec[f].detach(), coder.f_scale[f]
    once = x - z[:, [f]] * direction
    assert near(after(tiny_lm, [sl.Ablate(coder, f), sl.Ablate(coder, f)], writes)[1:], once[1:], 1e-5)
    once[0] = x[0]
    between = written(once, other, put([h], 0.0))
    again = after(tiny_lm, [sl.Ablate(coder, f), sl.Ablate(other, h), sl.Ablate(coder, f)], writes)
    assert near(again, between, 1e-5)
    clamped = after(tiny_lm, [sl.Ablate(coder, f), sl.Ablate(other, h), sl.Clamp(coder, f, value=2.0)], writes)
    assert near(clamped[1:], (between + 2 * scale * direction)[1:], 1e-5)
    dropped = after(tiny_lm, [sl.Ablate(coder, f), sl.Ablate(other, h), sl.Splice(coder)], writes)
    x_hat = coder(after(tiny_lm, [], reads)).x_hat.detach() - z[:, [f]] * direction
    assert near(dropped[1:], x_hat[1:], 1e-5)


# ---- which tokens count


def limited(lm, site=SITE, seed=0, share=1.2):
    """A coder whose mask leaves out no token of the prompts but those that an edit makes loud."""
    x = lm.read([PROMPT, LONGER, OTHER], site)
    norms = x[site][x.mask & (x.batch.positions > 0)].norm(dim=-1)
    return make(lm, site, seed, mask=TokenMask((), True, {site.key: share * float(norms.max())}))


def passes(lm, call):
    """How often the model's first block runs."""
    seen = []
    handle = lm._module.get_submodule(lm._sites.blocks)[0].register_forward_hook(lambda *_: seen.append(1))
    try:
        call()
    finally:
        handle.remove()
    return len(seen)


def test_a_loud_edit_before_leaves_the_later_one_its_tokens(tiny_lm):
    sae, other = limited(tiny_lm), limited(tiny_lm, seed=1)
    f, g = firing(tiny_lm, sae)[:2]
    h = firing(tiny_lm, other)[0]
    loud = sl.Steer(sae, f, strength=40.0)
    x = after(tiny_lm, [loud])
    assert (x[1:].norm(dim=-1) > sae.mask.max_norm[SITE.key]).all()
    vector = pushing(sae, 100 * sae.W_dec[f].detach())
    for first, edit, by in ((loud, sl.Steer(sae, g), sae.W_dec[g] * sae.f_scale[g]),
                            (loud, sl.Steer(other, h), other.W_dec[h] * other.f_scale[h]),
                            (vector, sl.Steer(other, h), other.W_dec[h] * other.f_scale[h]),
                            (Implant(SITE, 3, 100 * x[:1]), pushing(sae, x[1]), x[1]),
                            (loud, pushing(other, x[1]), x[1])):  # fmt: skip
        one, two = (after(tiny_lm, edits) for edits in ([first], [first, edit]))
        assert near((two - one)[1:], by.detach().expand_as(one[1:]), 1e-3), edit  # of a difference of large numbers
        assert torch.equal(one[0], two[0])
        assert passes(tiny_lm, lambda first=first, edit=edit: tiny_lm.logits(PROMPT, edits=[first, edit])) == 1


def test_a_token_loud_by_itself_stays_left_out(tiny_lm):
    """Also where an edit has made it quiet."""
    x = after(tiny_lm, [])
    norms = x.norm(dim=-1)[1:]
    limit = float(norms.sort().values[-3:-1].mean())  # two are louder
    sae = make(tiny_lm, mask=TokenMask((), True, {SITE.key: limit}))
    other = make(tiny_lm, seed=1, mask=sae.mask)
    quiet = Implant(SITE, int(norms.argmax()) + 1, 0.1 * x[:1])
    for edit in (sl.Steer(sae, firing(tiny_lm, sae)[0]), sl.Steer(other, firing(tiny_lm, other)[0])):
        one, two = (after(tiny_lm, edits) for edits in ([quiet], [quiet, edit]))
        assert torch.equal((one != two).any(-1)[1:], norms <= limit)


@pytest.mark.parametrize("upstream", ["resid_pre", "attn_z", "mlp_in"])
def test_an_edit_upstream_leaves_the_later_one_its_tokens(upstream, tiny_lm):
    first = Site(upstream, 1)
    early, sae = limited(tiny_lm, first), limited(tiny_lm)
    f, g = firing(tiny_lm, early)[0], firing(tiny_lm, sae)[0]
    loud = sl.Steer(early, f, strength=300.0)
    prompts = [PROMPT, LONGER]
    one, two = (tiny_lm.read(prompts, SITE, edits=e)[SITE] for e in ([loud], [sl.Steer(sae, g), loud]))
    mask = tiny_lm.tokenize(prompts).mask
    if upstream != "mlp_in":
        assert (one[:, 1:][mask[:, 1:]].norm(dim=-1) > sae.mask.max_norm[SITE.key]).any()
    assert torch.equal((one != two).any(-1)[:, 1:], mask[:, 1:])
    assert passes(tiny_lm, lambda: tiny_lm.logits(prompts, edits=[loud, sl.Steer(sae, g)])) == 2
    # No pass where none of the sites that are edited later has a largest norm.
    free = make(tiny_lm)
    steer = sl.Steer(free, firing(tiny_lm, free)[0])
    assert passes(tiny_lm, lambda: tiny_lm.logits(prompts, edits=[loud, steer])) == 1
    last = limited(tiny_lm, Site("resid_post", 2))
    three = [loud, sl.Steer(sae, g), sl.Steer(last, firing(tiny_lm, last)[0])]
    assert passes(tiny_lm, lambda: tiny_lm.logits(prompts, edits=three)) == 2


def test_a_transcoder_counts_by_what_it_would_read_without_edits(tiny_lm):
    reads, writes = Site("mlp_in", 1), Site("mlp_out", 1)
    coder = transcoder(tiny_lm, reads, writes)
    norms = tiny_lm.read([PROMPT, LONGER], reads)[reads].norm(dim=-1)
    coder.meta = {"mask": TokenMask((), True, {reads.key: 1.2 * float(norms.max())}).to_dict()}
    there = limited(tiny_lm, reads, seed=1)
    f = int(coder.encode(after(tiny_lm, [], reads))[1:].sum(0).argmax())
    loud, edit = sl.Steer(there, firing(tiny_lm, there)[0], strength=60.0), sl.Steer(coder, f, strength=2.0)
    assert (after(tiny_lm, [loud], reads)[1:].norm(dim=-1) > coder.mask.max_norm[reads.key]).all()
    for edits in ([loud, edit], [edit, loud]):
        one, two = (after(tiny_lm, e, writes) for e in ([loud], edits))
        assert near((two - one)[1:], (2 * coder.f_scale[f] * coder.W_dec[f]).detach().expand_as(one[1:]), 1e-3)
        assert passes(tiny_lm, lambda edits=edits: tiny_lm.logits(PROMPT, edits=edits)) == 1


def test_special_tokens_are_left_out_behind_a_loud_edit(tiny_lm):
    ids = tiny_lm.tokenize(PROMPT).ids[0]
    early, sae = limited(tiny_lm, EARLY), limited(tiny_lm)
    sae.meta = {"mask": TokenMask((int(ids[4]),), True, sae.mask.max_norm).to_dict()}
    loud = sl.Steer(early, firing(tiny_lm, early)[0], strength=300.0)
    one, two = (after(tiny_lm, e) for e in ([loud], [loud, sl.Steer(sae, firing(tiny_lm, sae)[0])]))
    assert (one != two).any(-1).tolist() == [i not in (0, 4) for i in range(len(ids))]


def test_generation_does_the_same_with_its_cache(tiny_lm):
    """Greedy tokens are the argmax of one pass over the whole text under the same list, one site or two."""
    early, sae, other = limited(tiny_lm, EARLY), limited(tiny_lm, share=1.5), limited(tiny_lm, seed=1, share=1.5)
    f, (g, h), i = firing(tiny_lm, early)[0], firing(tiny_lm, sae)[:2], firing(tiny_lm, other)[0]
    prompts, new = [PROMPT, OTHER], 7
    batch = tiny_lm.tokenize(prompts)
    length = batch.ids.shape[1]
    lists = {
        "one site": [sl.Steer(sae, g, 6.0), sl.Clamp(sae, h, value=3.0), sl.Steer(other, i, 4.0),
                     sl.Scale(sae, h, 2.0)],
        "two sites": [sl.Steer(sae, g, 3.0), sl.Clamp(sae, h, value=2.0, rows=1), sl.Steer(early, f, 30.0),
                      sl.Clamp(sae, g, value=1.0, positions=slice(length + 2, None))],
    }  # fmt: skip
    for name, edits in lists.items():
        writes = tiny_lm._writes(edits, batch, new)
        ids = batch.ids.tolist()
        for _, tokens in continued(tiny_lm, batch, writes, new, 0.0, None):
            for row, token in zip(ids, tokens, strict=True):
                row.append(token)
        assert [len(row) for row in ids] == [length + new] * 2
        logits = tiny_lm.logits([row[:-1] for row in ids], edits=edits)
        top = logits.topk(2).values
        for row, at in ((r, p) for r in range(2) for p in range(length - 1, length + new - 1)):
            close = top[row, at, 0] - top[row, at, 1] < ROUNDING * top[row, at, 0].abs()
            assert logits[row, at].argmax() == ids[row][at + 1] or close, name
        for edit in edits:  # each does something there
            fewer = tiny_lm.logits([row[:-1] for row in ids], edits=[e for e in edits if e is not edit])
            assert not near(fewer, logits, 1e-3), (name, edit)
        assert passes(tiny_lm, lambda edits=edits: tiny_lm.generate(prompts, edits, max_new_tokens=3)) == (
            3 if name == "one site" else 4
        )


def test_a_new_token_counts_where_no_pass_has_seen_it(tiny_lm):
    """Behind an edit of an earlier site: unless it is special, whatever its norm."""
    early = make(tiny_lm, EARLY)
    f = firing(tiny_lm, early)[0]
    tiny = TokenMask((), True, {SITE.key: 1e-3})
    sae = make(tiny_lm, mask=tiny)
    g = firing(tiny_lm, sae)[0]
    first, second = sl.Steer(early, f), sl.Steer(sae, g, 8.0)
    prompt = tiny_lm.tokenize(PROMPT).ids.shape[1]
    by_position = sl.Steer(make(tiny_lm), g, 8.0, positions=slice(prompt, None))
    said = tiny_lm.generate(PROMPT, [first, second], max_new_tokens=6)
    assert said == tiny_lm.generate(PROMPT, [first, by_position], max_new_tokens=6)
    assert said != tiny_lm.generate(PROMPT, [first], max_new_tokens=6)
    sae.meta = {"mask": TokenMask(tuple(range(tiny_lm.vocab_size)), True, tiny.max_norm).to_dict()}
    assert tiny_lm.generate(PROMPT, [first, second], max_new_tokens=6) == tiny_lm.generate(
        PROMPT, [first], max_new_tokens=6
    )


# ---- elsewhere


def test_in_a_raw_trace(tiny_lm):
    sae, other = limited(tiny_lm), limited(tiny_lm, seed=1)
    f, g = firing(tiny_lm, sae)[:2]
    prompts, model = [PROMPT, "A fox"], tiny_lm._nn
    ids = tiny_lm.tokenize(prompts).ids
    a, b, c = sl.Clamp(sae, f, value=40.0), sl.Clamp(sae, g, value=2.0), sl.Steer(other, firing(tiny_lm, other)[0])
    group, last = a.inside(tiny_lm, prompts, b), c.inside(tiny_lm, prompts)
    with torch.no_grad(), model.trace(ids):
        model.model.layers[1].output = last(group(model.model.layers[1].output))
        logits = model.output.logits.save()
    expected = tiny_lm.logits(prompts, edits=[a, b, c])
    assert torch.equal(logits, expected) and not near(expected, tiny_lm.logits(prompts, edits=[a, b]), 1e-4)
    with pytest.raises(ValueError, match="inside makes one function, of edits of one coder at one site"):
        a.inside(tiny_lm, prompts, c)


def test_a_session_and_a_comparison_do_the_same(tiny_lm, sae, live):
    edits = [sl.Steer(sae, live[0], 2.0), sl.Clamp(sae, live[1], value=2.0), sl.Scale(sae, live[0], 0.5)]
    session = sl.Session()
    for edit in edits:
        session.edits.add(edit)
    logits = tiny_lm.logits(PROMPT, edits=edits)
    assert torch.equal(tiny_lm.logits(PROMPT, edits=session.edits), logits)
    p, q = tiny_lm.logits(PROMPT)[0].log_softmax(-1), logits[0].log_softmax(-1)
    assert torch.allclose(tiny_lm.compare(PROMPT, session.edits).kl, (p.exp() * (p - q)).sum(-1), atol=1e-5)
    losses = tiny_lm.loss(PROMPT, edits=edits, per_token=True)[0, 1:]
    assert torch.allclose(losses, -q[:-1].gather(1, tiny_lm.tokenize(PROMPT).ids[0, 1:, None])[:, 0], atol=1e-5)


def test_what_is_no_list_of_edits(sae, live):
    edit = sl.Steer(sae, live[0])
    assert listed_edits(edit) == listed_edits((edit,)) == [edit] and listed_edits(()) == []
    for wrong in ([edit, 7], "Steer", 7, [sl.Steer]):
        with pytest.raises(ValueError, match=r"edits is a list of edits, such as edits=.*, got .* in it"):
            listed_edits(wrong)
