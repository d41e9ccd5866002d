"""What holds by construction in notebooks/papers/vision_profiles.ipynb; the functions are the notebook's own."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "papers" / "vision_profiles.ipynb"
PURE = ("profiles", "cosines", "words", "share", "turned", "ridge", "fve")


@pytest.fixture(scope="module")
def own():
    """Its plan and its pure functions."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict = {"np": np, "torch": torch, "nnls": nnls}
    for cell in cells:
        source = "".join(cell["source"])
        if "plan" in cell["metadata"].get("tags", []):
            exec(source, names)
        elif "def " in source:  # cells of functions have nothing of IPython
            body = ast.parse(source).body
            kept: list[ast.stmt] = [n for n in body if isinstance(n, ast.FunctionDef) and n.name in PURE]
            exec(compile(ast.Module(kept, []), str(NOTEBOOK), "exec"), names)
    assert set(PURE) <= set(names)
    return names


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_profile_is_the_mean_code_of_a_digit(own):
    z, labels = normal(40, 6), torch.arange(40) % 7
    found = own["profiles"](z, labels)
    torch.testing.assert_close(found[3], z[labels == 3].mean(0))
    assert not found[7:].any()  # digits that were never seen


def test_a_score_is_the_cosine_with_the_digit_that_is_said(own):
    profile, said = normal(10, 6), torch.tensor([4, 0, 9])
    np.testing.assert_allclose(own["cosines"](2.5 * profile[said], profile, said), 1)
    np.testing.assert_allclose(own["cosines"](-profile[said], profile, said), -1)


def test_ink_and_slant_of_drawn_strokes(own):
    upright, diagonal = torch.zeros(8, 8), torch.eye(8)
    upright[:, 3] = 2.0
    ink, slant = own["words"](torch.stack([upright, diagonal, diagonal.flip(1), 3 * diagonal]))
    np.testing.assert_allclose(ink, [16, 8, 8, 24])
    np.testing.assert_allclose(slant, [0, 1, -1, 1], atol=1e-6)  # neither ink nor the place of a stroke counts


def test_a_row_is_in_its_cone_and_its_opposite_is_not(own):
    rows = np.eye(8)[:5]
    assert own["share"](rows, 3.0 * rows[2]) == pytest.approx(1)
    assert own["share"](rows, -rows[2]) == pytest.approx(0)
    assert own["share"](rows, np.eye(8)[7]) == pytest.approx(0)


def test_the_cone_has_as_many_rows_as_the_plan_says(own):
    rows, many = np.eye(8), own["ROWS"]
    assert own["share"](rows, rows[:many].sum(0)) == pytest.approx(1)
    assert own["share"](rows, rows[: many + 1].sum(0)) == pytest.approx(many / (many + 1))


def test_a_dictionary_of_low_rank_is_turned_without_loss(own):
    """Its rows keep their lengths and angles, and come to lie in the leading directions of the activations."""
    rank, d = own["RANK"], 2 * own["RANK"]
    D, x = normal(50, rank, seed=1) @ normal(rank, d, seed=2), normal(400, rank, seed=3) @ normal(rank, d, seed=4)
    found = own["turned"](D, x)
    torch.testing.assert_close(found @ found.T, D @ D.T)
    assert torch.linalg.matrix_rank(torch.cat([found, x])) == rank


def test_turned_to_its_own_directions_it_stays_but_for_what_is_outside(own):
    rank, d = own["RANK"], 2 * own["RANK"]
    D = normal(50, d, seed=1)
    U = torch.linalg.svd(D.T, full_matrices=False)[0][:, :rank]
    x = normal(4000, rank, seed=2) @ U.T
    torch.testing.assert_close(own["turned"](D, x), D @ U @ U.T)  # the part outside U is dropped


def test_ridge_finds_the_dictionary_that_wrote_the_target(own):
    z, D = normal(200, 6, seed=1), normal(6, 4, seed=2)
    torch.testing.assert_close(own["ridge"](z, z @ D, D), D)  # where there is nothing to learn it stays
    start = D + 1
    between = own["ridge"](z, z @ D, start)
    assert 0 < (between - D).norm() < (start - D).norm()


def test_fve(own):
    x = normal(30, 4)
    assert own["fve"](x, x) == 1
    assert own["fve"](x, x.mean(0).expand_as(x)) == pytest.approx(0)
