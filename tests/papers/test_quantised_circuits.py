"""What holds by construction in benchmarks/papers/quantised_circuits.py, whose prompts the notebook takes."""

import random
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "papers"))
    import quantised_circuits

    return quantised_circuits


def test_a_twin_has_a_third_name_where_the_prompt_repeats_one(script):
    for prompt, twin, (right, wrong) in zip(
        *script.drawn(20, script.NAMES, script.FORMS, random.Random(0)), strict=True
    ):
        ours, theirs = prompt.split(), twin.split()
        (changed,) = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        assert ours[changed] == wrong and theirs[changed] not in (right, wrong)
        assert prompt.count(wrong) == 2 and prompt.count(right) == twin.count(right) == twin.count(wrong) == 1


def test_halves_share_neither_names_nor_forms(script):
    for learn, test in script.halves(3):
        assert len(learn) == len(test) and not {*learn} & {*test}


def test_each_copy_gets_one_head_of_the_twin(script):
    x, given = torch.zeros(6, 2, 12), torch.ones(2, 2, 12)  # two prompts, three copies of them: three heads of 4
    written = script.put(x, None, given, 2).view(3, 2, 2, 3, 4)
    assert torch.equal(written, torch.eye(3)[:, None, None, :, None].expand_as(written))
