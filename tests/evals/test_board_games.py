"""Coverage, AUROC and boards from features: against loops, on features that deserve 1, 0 or chance, on real coders."""

import json
import math
from importlib import import_module

import numpy as np
import pytest
import torch

import sae_lab as sl
from sae_lab.types import Codes
from sae_lab.worlds.boards import board_properties, othello

SITE = sl.Site("resid_post", layer=1)
bg = import_module("sae_lab.evals.games")  # the name in the room is the function's


def sparse(dense):
    x = torch.as_tensor(dense, dtype=torch.float32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), (x > 0).sum(1).cumsum(0)])
    return Codes(x[x > 0], (x > 0).nonzero()[:, 1], offsets, x.shape[1])


@pytest.fixture(scope="module")
def small():
    """Random codes of 400 positions, some features equal in value, and labels that depend on some of them."""
    rng = np.random.default_rng(0)
    codes = np.where(rng.random((400, 12)) < 0.3, rng.integers(1, 40, (400, 12)) / 8, 0)
    labels = np.stack(
        [codes[:, 0] > 2, codes[:, 1] > 0, rng.random(400) < 0.3, codes[:, 2] + codes[:, 3] > 1, codes[:, 4] > 0], 1
    )
    kinds = np.array(["mine", "theirs", "theirs", "empty", "legal"])
    return codes, bg._Data(labels, np.arange(400) < 200, np.arange(400) // 5, kinds)


@pytest.fixture(scope="module")
def boards():
    """True boards of 60 games and which half and kind they are, without any model."""
    games = othello(6, games=60, seed=1)
    labels, names = board_properties(games)
    game, move = games.going_on.nonzero()
    labels, train = labels[games.going_on], game < 30
    kept = bg._measurable(labels, train)
    kinds = np.array([n.split()[0] for n in names])[kept]
    return bg._Data(labels[:, kept], train, game, kinds), move


@pytest.fixture(scope="module")
def gpt():
    return bg.othello_gpt()


@pytest.fixture(scope="module")
def held_out():
    return othello(6, games=80, seed=1)


# ---------------------------------------------------------------------------------------------- the formulas


def test_scores_are_those_of_plain_loops(small):
    codes, data = small
    found = bg._score(sparse(codes), data)
    train, test = data.train, ~data.train
    most = codes[train].max(0)

    def f1(on, true):
        return 2 * (on & true).sum() / max(on.sum() + true.sum(), 1)

    best, precise = [], np.zeros((200, 5), bool)
    for g in range(5):
        y = data.labels[:, g]
        options = [(f1(codes[train, i] > t / 10 * most[i], y[train]), -i, -t) for i in range(12) for t in range(10)]
        _, i, t = max(options)
        best.append((-i, -t / 10, f1(codes[test, -i] > -t / 10 * most[-i], y[test])))
        for i in range(12):
            for t in range(10):
                on = codes[:, i] > t / 10 * most[i]
                if on[train].sum() >= 10 and (on & y)[train].sum() >= 0.95 * on[train].sum():
                    precise[:, g] |= on[test]
    assert found.best.tolist() == [b[0] for b in best]
    assert np.allclose(found.threshold, [b[1] for b in best])
    assert np.allclose(found.f1, [b[2] for b in best])
    assert found.coverage == pytest.approx(np.mean([b[2] for b in best[:4]])) and found.legal == pytest.approx(
        best[4][2]
    )
    rows = [f1(p[:3], y[:3]) for p, y in zip(precise, data.labels[test], strict=True)]  # mine and theirs
    assert found.reconstruction == pytest.approx(np.mean(rows))
    assert found.features == 12
    assert 0 < found.coverage_se < 0.1 and 0 < found.reconstruction_se < 0.1


def test_auroc_is_sklearns(small):
    from sklearn.metrics import roc_auc_score

    codes, data = small
    table = bg.auroc_table(sparse(codes), data.labels, ~data.train)
    for i in range(12):
        for g in range(5):
            want = roc_auc_score(data.labels[~data.train, g], codes[~data.train, i])
            assert table[i, g] == pytest.approx(want, abs=1e-9)


def test_auroc_by_hand():
    """Values 0 0 1 2, labels 0 1 0 1: of four pairs one is won, one tied, one lost to 1, one won: 2.5 of 4."""
    table = bg.auroc_table(sparse([[0.0], [0], [1], [2]]), np.array([[0], [1], [0], [1]], bool), np.ones(4, bool))
    assert table.tolist() == [[0.625]]


def test_jackknife_is_leaving_groups_out():
    rng = np.random.default_rng(0)
    on, true, game = rng.random((300, 3)) < 0.4, rng.random((300, 3)) < 0.5, np.arange(300) // 5
    means = []
    for fold in range(20):
        rest = game % 20 != fold
        means.append(
            np.mean([2 * (on & true)[rest, g].sum() / (on[rest, g].sum() + true[rest, g].sum()) for g in (0, 1, 2)])
        )
    want = math.sqrt(19 / 20 * sum((m - np.mean(means)) ** 2 for m in means))
    assert bg._jackknife(on, true, game) == pytest.approx(want)


# ---------------------------------------------------------------------------------------------- features that deserve


def test_features_that_are_the_board_score_one(boards):
    data, _ = boards
    found = bg._score(sparse(data.labels), data)
    assert found.coverage == found.reconstruction == found.legal == 1.0
    assert found.above == np.isin(data.kinds, bg.STATE).sum() and found.precise == np.isin(data.kinds, bg.DISCS).sum()


def test_silent_features_score_nothing(boards):
    data, _ = boards
    found = bg._score(sparse(np.zeros((len(data.labels), 8))), data)
    assert (found.features, found.coverage, found.above, found.reconstruction, found.precise) == (0, 0.0, 0, 0.0, 0)
    assert (found.auroc == 0.5).all()


def test_a_feature_that_is_always_on_has_the_f1_of_saying_yes(boards):
    data, _ = boards
    found = bg._score(sparse(np.ones((len(data.labels), 1))), data)
    p = data.labels[~data.train].mean(0)
    assert np.allclose(found.f1, 2 * p / (1 + p))
    assert found.above == 0 and found.reconstruction == 0.0


def test_random_features_are_at_chance(boards):
    """Features that fire in a fifth of positions cover less than one that is always on."""
    data, _ = boards
    rng = np.random.default_rng(0)
    noise = np.where(rng.random((len(data.labels), 200)) < 0.2, rng.random((len(data.labels), 200)), 0)
    found = bg._score(sparse(noise), data)
    assert abs(found.auroc.mean() - 0.5) < 0.03 and found.above == 0
    assert found.coverage < 0.3 and found.reconstruction < 0.05


def test_shuffled_boards_keep_half_and_move_only(boards):
    """Perfect features then know what the move tells: how full the board is, not which squares."""
    data, move = boards
    other = bg._shuffled(data, move, seed=0)
    for half in (data.train, ~data.train):
        for t in (0, 10, 25):
            rows = half & (move == t)
            assert (other.labels[rows].sum(0) == data.labels[rows].sum(0)).all()
    assert (other.labels != data.labels).mean() > 0.1
    found = bg._score(sparse(data.labels), other)
    plain = bg._score(sparse(data.labels), data)
    assert found.coverage < plain.coverage - 0.3 and found.above < plain.above / 4 and found.reconstruction < 0.2
    assert (bg._shuffled(data, move, seed=1).labels != other.labels).any()


# ---------------------------------------------------------------------------------------------- the shipped model


def test_the_shipped_model_plays_by_the_rules(gpt, held_out):
    """Measured when it was trained, on 1000 games: see its training.json. Control: an untrained twin."""
    facts = json.loads((bg.OTHELLO_GPT / "training.json").read_text())
    legal = torch.from_numpy(held_out.legal_moves())[:, :-1]
    going = torch.from_numpy(held_out.going_on)[:, :-1]
    rates = []
    for lm in (gpt, bg.untrained_twin(gpt)):
        _, logits = lm.run(bg.game_batch(lm, held_out))
        top = logits[:, 1:, :36].argmax(-1, keepdim=True)
        rates.append(float(legal.gather(2, top)[going].float().mean()))
    assert abs(rates[0] - facts["held_out"]["legal_argmax"]) < 0.02 and rates[1] < 0.5


def test_the_shipped_model_is_small_and_reads_squares(gpt):
    files = {f.name: f.stat().st_size for f in bg.OTHELLO_GPT.iterdir()}
    assert files["model.safetensors"] < 1_300_000 and not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert gpt.tokenize("a1 b1 f6").ids.tolist() == [[36, 0, 1, 35]] and gpt.max_length == 33
    games = othello(6, games=3)
    batch = bg.game_batch(gpt, games)
    assert batch.ids[0].tolist() == gpt.tokenize(games.text(0)).ids[0, :32].tolist()


def test_an_untrained_twin_has_other_weights_and_the_same_shape(gpt):
    twin, again, other = bg.untrained_twin(gpt), bg.untrained_twin(gpt), bg.untrained_twin(gpt, seed=1)
    assert twin.fingerprint() == again.fingerprint() != other.fingerprint() != gpt.fingerprint()
    assert twin.width(SITE) == gpt.width(SITE) == 128 and twin.prefix_id == gpt.prefix_id


def coder_at(site, make=lambda: sl.TopK(128, 256, k=8)):
    coder = make().eval()
    coder.reads = coder.writes = (site,)
    return coder


def test_board_games_on_the_shipped_model(gpt, held_out):
    """A probe finds the board in the trained model, a coder of random directions little of it."""
    twin = bg.untrained_twin(gpt)
    found = bg.board_games(coder_at(SITE), gpt, held_out, untrained=(coder_at(SITE), twin))
    assert list(found.controls) == ["untrained", "neurons", "basis", "probe", "shuffled"]
    assert found.positions == held_out.going_on.sum() and found.excluded == 0.0
    assert found.of_state <= 36 * 3 and found.of_state + 30 < len(found.properties)
    assert found.controls["probe"].coverage > found.coverage + 0.1
    assert found.controls["probe"].coverage > found.always
    assert len(found.to_pandas()) == 6 and len(found.by_property()) == len(found.properties)
    assert "always on" in repr(found) and "chosen on one half" in repr(found)
    assert [f.measure for f in found.figures()][:2] == ["coverage", "coverage, legal"]
    assert found.figures()[0].control == found.controls["untrained"].coverage
    again = bg.board_games(coder_at(SITE), gpt, held_out)
    assert again.coder == found.coder and again.controls["shuffled"] == found.controls["shuffled"]
    assert again.figures()[0].control == again.controls["shuffled"].coverage


def test_a_dead_coder_scores_nothing(gpt, held_out):
    dead = coder_at(SITE, lambda: sl.L1(128, 16))
    torch.nn.init.constant_(dead.b_enc, -1e9)
    found = bg.board_games(dead, gpt, held_out[:40])
    assert found.coverage == found.reconstruction == 0.0 and found.above == 0


def test_a_model_without_such_neurons_has_no_such_control(gpt, held_out):
    """At attn_z of the same model, the MLP of the block still stands behind it; a module's output has no block."""
    found = bg.board_games(coder_at(sl.Site("transformer.ln_f")), gpt, held_out[:40])
    assert "neurons" not in found.controls and "basis" in found.controls


def test_what_is_refused(gpt, tiny_lm, held_out):
    with pytest.raises(ValueError, match="needs 40 games or more, half of them to choose features on, got 39"):
        bg.board_games(coder_at(SITE), gpt, held_out[:39])
    with pytest.raises(
        ValueError, match="token for each square of a 8x8 board, and has none for g1, h1, g2: take games"
    ):
        bg.board_games(coder_at(SITE), gpt, othello(8, games=40))
    bare = sl.LM(gpt._module, tokenizer=gpt.tokenizer, prefix=None)
    with pytest.raises(ValueError, match="must read a start token"):
        bg.board_games(coder_at(SITE), bare, held_out)
    with pytest.raises(ValueError, match="does not know its site"):
        bg.board_games(sl.TopK(128, 256, k=8), gpt, held_out)
