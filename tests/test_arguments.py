"""Arguments are what their annotations say, or refused in one sentence, in every public function."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import sae_lab as sl
from sae_lab.arguments import as_annotated, check_least
from sae_lab.spelling import check_text

NAN = math.nan


def takes(kind):
    """A function of one argument of this kind, which gives it back as it gets it."""

    def given(value):
        return value

    given.__annotations__ = {"value": kind}
    given.__signature__ = inspect.Signature(
        [inspect.Parameter("value", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)]
    )
    return as_annotated(given)


@pytest.mark.parametrize(
    ("kind", "value", "meant"),
    [
        (int, np.int64(3), 3), (int, 1e6, 1_000_000), (int, torch.tensor(4), 4), (int | None, None, None),
        (float, 2, 2), (float, np.float32(0.5), 0.5), (float, math.inf, math.inf), (bool, True, True),
        (Sequence[str], "one prompt", ["one prompt"]), (Sequence[str], np.array(["a", "b"]), ["a", "b"]),
        (Sequence[int], 5, [5]), (Sequence[int], np.array([5, 6]), [5, 6]), (Sequence[int], range(3), range(3)),
        (Sequence[float], torch.tensor([0.5, 1.0]), [0.5, 1.0]), (Sequence[int], (5, np.int64(6)), [5, 6]),
        (str | Sequence[str], "a", "a"), (Iterable[sl.Site | str], sl.Site("embed"), [sl.Site("embed")]),
        (Sequence[str] | Sequence[int], "a", ["a"]), (Any, NAN, NAN), (Mapping[str, int], {"a": 1}, {"a": 1}),
        (Literal["max", "mean"], "min", "min"),  # which words there are, the function says
    ],
)  # fmt: skip
def test_what_an_argument_can_be_read_as(kind, value, meant):
    got = takes(kind)(value)
    assert got is value or (got == meant and type(got) is type(meant))


def test_arrays_become_tensors():
    for kind in (Tensor, Float[Tensor, " n"], Tensor | None):
        got = takes(kind)(np.ones(3, np.float32))
        assert isinstance(got, Tensor) and got.tolist() == [1, 1, 1]


def test_what_is_read_once_is_not_read():
    documents = (d for d in ("a", "b"))
    assert takes(Iterable[str])(documents) is documents and list(documents) == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (int, True, "value must be a whole number, got True"),
        (int, 2.5, "value must be a whole number, got 2.5"),
        (int, "5", "value must be a whole number, got '5'"),
        (float, NAN, "value must be a number, got nan"),
        (float, np.float64("nan"), r"value must be a number, got np.float64\(nan\)"),
        (float | None, False, "value must be a number or None, got False"),
        (float, np.bool_(True), "value must be a number, got a bool"),
        (bool, 1, "value must be True or False, got 1"),
        (Sequence[float], [0.5, NAN], "value must be a list of numbers, got a list with nan"),
        (Sequence[int], [1, True], "value must be a list of whole numbers, got a list with True"),
        (Sequence[str], [b"a"], "value must be a list of str, got a list with b'a'"),
        (Sequence[str] | Sequence[int], 5, "value must be a list of str or a list of whole numbers, got 5"),
        (Callable[[int], int], "f", "value must be a function, got 'f'"),
        (Mapping[str, int], ["a"], "value must be a Mapping, got a list with 'a'"),
        (str, None, "value must be a str, got None"),
        (Sequence[Sequence[int]], [[0, 1], 1], "value must be a list of list of whole numbers, got a list with 1"),
        (Float[Tensor, " n"], ["a"], r"value must be a Tensor of floats \(n\), got a list with 'a'"),
        (Float[Tensor, " n"], torch.ones(2, 2), r".* \(n\), got a Tensor \(float32, shape \(2, 2\)\)$"),
        (Float[Tensor, " n"], torch.tensor([1.0, NAN]), r".* got a Tensor \(float32, shape \(2,\), with NaN or Inf\)$"),
        (Float[Tensor, " n"], torch.tensor([1, 2]), r".* got a Tensor \(int64, shape \(2,\)\): these look like token"),
        (Float[Tensor, " n"], torch.ones(2) * 1j, r".* got a Tensor \(complex64"),
        (Float[Tensor, "n d"], [[1.0], [1.0, 2.0]], r".* got a list with a list with 1.0"),
        ("Site | str", 5, "value must be a Site or a str, got 5"),
        (int, "12", "value must be a whole number, got '12': write 12, without quotes"),
        (sl.TrainConfig, {"steps": 1}, r"value must be a TrainConfig, got a dict: write sl.TrainConfig\(\*\*it\)"),
    ],
)
def test_what_is_refused(kind, value, words):
    with pytest.raises(ValueError, match=rf"given\(value\): {words}".replace("given", "takes.<locals>.given")):
        takes(kind)(value)


def test_the_least_of_numbers():
    check_least(1, steps=1, draws=3)
    with pytest.raises(ValueError, match=r"^draws must be at least 1, got 0"):
        check_least(1, steps=1, draws=0)


def test_python_says_what_is_missing():
    with pytest.raises(TypeError, match="missing a required argument: 'value'"):
        takes(int)()
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        takes(int)(5, other=3)


def test_a_message_names_the_class_of_the_object():
    """And not the class from which it has the method."""
    notes = sl.notes(sl.TopK(8, 16, k=2))
    with pytest.raises(ValueError, match=r"^Notes.__getitem__\(feature\): feature must be a whole number, got '3'"):
        notes["3"]
    with pytest.raises(ValueError, match=r"^Explanations.__getitem__\(feature\): feature must be"):
        notes.explanations["3"]
    with pytest.raises(TypeError, match=r"^Notes.write\(feature, label, text, ...\): missing a required argument"):
        notes.write()


@pytest.fixture
def coder(tiny_lm, small_text, tmp_path):
    store = sl.harvest(tiny_lm, "resid_post-1", small_text, tokens=400, path=tmp_path / "s", context=32)
    return sl.train(sl.TopK(48, 64, k=4), store, sl.TrainConfig(steps=20, batch_size=64)).coder


SWAPPED = {
    "reconstruction": lambda lm, coder: sl.evals.reconstruction(lm, coder, ["a b"]),
    "probing": lambda lm, coder: sl.evals.probing(lm, coder),
    "features": lambda lm, coder: sl.features(coder, lm, "a"),
    "find_features": lambda lm, coder: sl.find_features(coder, lm, ["a"], ["b"]),
    "dose_response": lambda lm, coder: sl.dose_response(coder, lm, 3, ["a"], " b", ["c"]),
    "attribution": lambda lm, coder: sl.circuits.attribution(coder, lm, ["a"], ["b"], lambda x, tokens: x),
    "circular": lambda lm, coder: sl.geometry.circular(lm, coder),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_a_model_and_a_coder_in_each_others_place(tiny_lm, coder, name):
    with pytest.raises(ValueError, match=rf"^{name}\(.*(lm|coder|sae) must be an? .*: \w+ and \w+ are swapped$"):
        SWAPPED[name](tiny_lm, coder)


def test_the_main_calls(tiny_lm, coder, tmp_path):
    feature = int(coder.f_scale.argmax())
    steer = sl.Steer(coder, feature)
    for call in (tiny_lm.logits, tiny_lm.loss):
        assert torch.equal(call("a b c", edits=steer), call("a b c", edits=[steer])), "one edit is a list of one"
    assert tiny_lm.generate("a b", steer, max_new_tokens=np.int64(2)) == tiny_lm.generate("a b", [steer], 2)
    refused = [
        (lambda: tiny_lm.logits("a", edits=coder), r"LM.logits\(prompts, edits\): edits must be a list of edits"),
        (lambda: tiny_lm.generate("a", max_new_tokens=True), "max_new_tokens must be a whole number, got True"),
        (lambda: tiny_lm.generate("a", temperature=NAN), "temperature must be a number, got nan"),
        (lambda: sl.LM(5), r"LM\(model, ...\): model must be a str, a Module or None, got 5"),
        (lambda: sl.harvest(coder, "resid_post-0", ["a"]), "lm must be an LM or a Net, got a TopK"),
        (lambda: sl.harvest(tiny_lm, "resid_post-0", ["a"], tokens=True), "tokens must be a whole number, got True"),
        (lambda: sl.train(coder, "a store", sl.TrainConfig(steps=1)), "data must be a Store, a Stream, a Tensor or"),
        (lambda: sl.index_features(coder, tiny_lm, str(tmp_path)), "store must be a Store, got '"),
        (lambda: sl.load(None), "path must be a str or a Path, got None"),
        (lambda: sl.TrainConfig(steps=True), r"TrainConfig\(.*: steps must be a whole number or None, got True"),
        (lambda: sl.TrainConfig(steps=1, lr=NAN), r"TrainConfig\(.*: lr must be a number or None, got nan"),
        (lambda: sl.Steer(coder, True), "feature must be a whole number or a list of whole numbers, got True"),
        (lambda: sl.Steer(coder, feature, NAN), r"Steer\(.*: strength must be a number, got nan"),
        (lambda: sl.Clamp(coder, feature, True), r"Clamp\(.*: value must be a number, got True"),
        (lambda: sl.evals.reconstruction(coder, tiny_lm, "a b", tokens=NAN), "tokens must be a whole number, got nan"),
    ]
    for call, words in refused:
        with pytest.raises(ValueError, match=words):
            call()


def test_a_coder_takes_numbers_and_says_what_it_refuses(tiny_lm, coder):
    site, x = coder.site, torch.randn(3, 48)
    f = coder.encode(x).detach()
    assert torch.equal(coder.encode(x.numpy()), f) and torch.equal(coder.encode(x.tolist()), f)
    assert torch.equal(coder.decode(f.numpy()), coder.decode(f)) and torch.equal(coder(x.numpy()).x_hat, coder(x).x_hat)
    reading = tiny_lm.read("a b", site)
    refused = [
        (reading, r"x must be a Tensor of floats \(...\), got a Reading: take a site's activations, reading\[site\]"),
        (x.long(), r"got a Tensor \(int64, shape \(3, 48\)\): these look like token ids; x.float\(\) makes "),
        (x * NAN, "with NaN or Inf"), (x / 0, "with NaN or Inf"), (x * 1j, "got a Tensor .complex64"),
        (tiny_lm, "got an LM"), ("x", "got 'x'"), ([], "got a list"), ([[1.0], [1.0, 2.0]], "got a list with a list"),
        (x[:, 1:], "x's last axis must be d_in=48 .*, got shape .3, 47."),
    ]  # fmt: skip
    for value, words in refused:
        for call in (coder, coder.encode, coder.sparse_codes):
            with pytest.raises(ValueError, match=words):
                call(value)
    for scale in (0, -1.0, NAN, "2", torch.tensor([1.0, NAN])):
        with pytest.raises(ValueError, match="scale must be"):
            coder.fold(scale)


def test_a_fresh_coder_refuses_too():
    fresh = sl.JumpReLU(4, 8)
    with pytest.raises(ValueError, match="with NaN or Inf"):
        fresh.encode(torch.full((2, 4), NAN))
    for arguments, words in (
        ({"d_sae": "8"}, r"JumpReLU\(d_in, d_sae, .*: d_sae must be a whole number, got '8': write 8, without quotes"),
        ({"seed": True}, "seed must be a whole number of at least 0, got True"),
        ({"skip": 1}, "skip must be True or False, got 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            sl.JumpReLU(**{"d_in": 4, "d_sae": 8, **arguments})


def test_names_that_are_none():
    for room, name, meant in (
        (sl, "harvst", "harvest"), (sl.evals, "reconstuction", "reconstruction"),
        (sl.circuits, "attributon", "attribution"),
        (sl.explain, "explan", "explain"), (sl.saes, "TopKK", "TopK"), (sl.worlds, "plantd", "planted"),
        (sl.geometry, "cluster", "clusters"),
    ):  # fmt: skip
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'; did you mean .*{meant}"):
            getattr(room, name)
    assert not hasattr(sl, "__wrapped__") and not hasattr(sl.evals, "nothing_like_it_at_all")
    for call in (
        lambda: sl.TrainConfig(step=5), lambda: sl.TopK(4, 8, d_outt=4), lambda: sl.train(coder=1, data=2, confg=3),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"unexpected keyword argument '.*'; did you mean (steps|d_out|config)"):
            call()


def test_training_without_a_config_is_one_pass():
    rows = torch.randn(9000, 16)
    run = sl.train(sl.TopK(16, 32, k=4), rows)
    assert run.config.tokens < len(rows) <= run.history[-1]["tokens"] + 4096, "some rows are reserved for thresholds"
    assert run.history[-1]["tokens"] - run.config.tokens < run.config.batch_size
    few = sl.train(sl.TopK(16, 32, k=4), rows[:300])
    assert few.history[-1]["passes"] == 1 and few.config.batch_size == 300
    assert sl.estimate(sl.train, sl.TopK(16, 32, k=4), rows).minutes > 0
    with pytest.raises(ValueError, match="data must hold activations that are not all 0, got zeros only"):
        sl.train(sl.TopK(16, 32, k=4), torch.zeros(300, 16))


def test_training_data_of_numpy():
    rows = np.random.default_rng(0).normal(size=(200, 16)).astype("float32")
    config = sl.TrainConfig(steps=5, batch_size=16)
    ours = sl.train(sl.TopK(16, 32, k=4), rows, config).coder
    assert torch.equal(ours.W_dec, sl.train(sl.TopK(16, 32, k=4), torch.tensor(rows), config).coder.W_dec)


NO_ARGUMENTS = {"plot", "available_sets", "othello_gpt", "square_name"}  # plot's is any result: it says what it knows


def test_every_public_function_checks():
    """A new one wears ``@as_annotated``."""
    missing = set()
    for room in (sl, sl.circuits, sl.evals, sl.explain, sl.geometry, sl.saes, sl.worlds):
        names = room.__all__ if hasattr(room, "__all__") else dir(room)
        for name in names:
            one = getattr(room, name)
            ours = name[0] != "_" and inspect.isfunction(one) and one.__module__.startswith("sae_lab.")
            if ours and name not in NO_ARGUMENTS and not hasattr(one, "as_annotated"):
                missing.add(name)
    assert not missing


def test_half_a_surrogate_pair():
    check_text("whole 🙂", "a text")
    with pytest.raises(ValueError, match=r"^a label holds half a surrogate pair at character 2 \('.ud83d'\), which is"):
        check_text("a \ud83d", "a label")
