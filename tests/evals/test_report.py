"""sl.evals.report: one table of several coders, kept and resumed; and the coders that deserve known scores."""

import math

import pytest
import torch

import sae_lab as sl
from sae_lab.evals.reporting import SECTIONS
from sae_lab.results import Figure, number
from sae_lab.types import Site

SITE = Site("resid_post", 1)
CHEAP = ["reconstruction", "errors", "codes", "description length", "monosemanticity"]
SMALL = {"tokens": 3000, "lm_tokens": 400}


@pytest.fixture(scope="module")
def made(tiny_lm, small_text):
    """A coder trained for some steps, and what stands in for it."""
    store = sl.harvest(tiny_lm, SITE, small_text, SMALL["tokens"])
    sae = sl.BatchTopK(48, 96, k=5)
    sl.train(sae, store, sl.TrainConfig(steps=60, batch_size=256, lr=3e-3))
    sae.eval()
    return {"trained": sae, **sl.saes.baselines(sae, store.unseen(1000).x)}


@pytest.fixture(scope="module")
def table(made, tiny_lm, small_text):
    return sl.evals.report(made, tiny_lm, small_text, evals=CHEAP, **SMALL)


def test_baselines_are_what_they_say():
    world = sl.worlds.planted(n=24, d=16, l0=3, samples=2000)
    sae = sl.TopK(16, 32, k=3)
    sae.eval()
    made = sl.saes.baselines(sae, world.x)
    assert list(made) == ["mean", "identity", "PCA", "random"]
    x = world.x
    fvu = {n: float((c(x).x_hat - x).detach().pow(2).sum() / (x - x.mean(0)).pow(2).sum()) for n, c in made.items()}
    l0 = {n: len(c.sparse_codes(x).values) / len(x) for n, c in made.items()}
    centred = (x - x.mean(0)).double()
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred)
    assert fvu["mean"] == pytest.approx(1, abs=1e-6) and l0["mean"] == 0
    assert fvu["identity"] == 0 and l0["identity"] == pytest.approx(16, rel=0.1)  # rows without a feature are 0
    assert fvu["PCA"] == pytest.approx(float(eigenvalues[:-3].sum() / eigenvalues.sum()), rel=1e-4)
    assert l0["PCA"] == pytest.approx(3, abs=0.01) and l0["random"] == 3
    assert fvu["PCA"] < fvu["random"] < 1  # at its best scale it explains something
    assert all(bool((c.f_scale > 0).any()) for n, c in made.items() if n != "mean")


def test_baselines_refuse():
    sae = sl.TopK(16, 32, k=3)
    with pytest.raises(ValueError, match="unknown baseline 'zero'; known: mean, identity, PCA, random"):
        sl.saes.baselines(sae, torch.randn(50, 16), ["zero"])
    with pytest.raises(ValueError, match="a Transcoder does not"):
        sl.saes.baselines(sl.Transcoder(16, 32, d_out=16, k=3), torch.randn(50, 16))


def test_every_coder_gets_the_score_it_deserves(table):
    assert table.value("dCE", "identity").value == table.value("FVU", "identity").value == 0
    # A random model loses nothing by mean ablation: no share of that is given (where it does: test_evals, notebook 09).
    recovered = table.value("CE recovered", "identity")
    assert math.isnan(recovered.value) and math.isnan(recovered.control) and "below 0.1" in recovered.meaning
    # Its mean is that of other tokens than the evaluation's: 1.009 of the variance on the bundled model.
    assert table.value("FVU", "mean").value == pytest.approx(1, abs=0.1)
    assert table.value("FVU", "trained").value < table.value("FVU", "random").value < table.value("FVU", "mean").value
    assert table.value("FVU", "PCA").control == pytest.approx(table.value("FVU", "PCA").value, abs=0.15)
    # Bits: all zeros cost what the dense code costs; a code as dense as x costs more.
    zeros, identity = table.value("bits per token", "mean"), table.value("bits per token", "identity")
    assert zeros.value == pytest.approx(zeros.control, rel=0.02) and identity.value > identity.control


def test_the_table_says_controls_reasons_and_settings(table):
    printed = str(table)
    head = printed.splitlines()[0].split()
    assert head == ["trained", "mean", "identity", "PCA", "random", "[control]"]
    fvu = table.value("FVU")
    assert f"{fvu.value:.3f} [{fvu.control:.3f}]" in printed and "PCA" in printed
    assert "codes of mean: not measured, no feature fires" in printed
    assert "tokens 3,000, lm_tokens 400, seed 0" in printed
    assert "<table>" in table._repr_html_() and "not measured" in table._repr_html_()
    rows = table.to_pandas()
    assert set(rows["eval"]) == set(CHEAP) and set(rows["coder"]) == set(table.names)
    assert set(Figure._fields) <= set(rows.columns)
    with pytest.raises(KeyError, match="no measure 'beauty' here; there are: L0"):
        table.value("beauty")


def test_what_was_found_is_kept(table, made, tiny_lm, small_text):
    again = sl.evals.report(made, tiny_lm, small_text, evals=CHEAP, **SMALL)
    measured_again = {title for title, seconds in again.seconds.items() if seconds > 0}
    assert measured_again == {"codes", "monosemanticity"}  # of "mean", which has no answer to keep
    assert again.to_pandas().equals(table.to_pandas())
    smaller = SMALL | {"tokens": 2000}
    other = sl.evals.report(made["trained"], tiny_lm, small_text, evals=["description length"], **smaller)
    assert other.seconds["description length"] > 0


def test_an_interrupted_report_goes_on(made, tiny_lm, small_text, monkeypatch):
    calls = []

    def interrupted(given):
        calls.append(given.seed)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return [Figure("calls", len(calls))]

    monkeypatch.setitem(SECTIONS, "fragile", interrupted)
    settings = {"evals": ["description length", "fragile"], "seed": 3, **SMALL}
    with pytest.raises(KeyboardInterrupt):
        sl.evals.report([made["trained"]], tiny_lm, small_text, **settings)
    done = sl.evals.report([made["trained"]], tiny_lm, small_text, **settings)
    assert done.seconds["description length"] == 0 and done.value("calls").value == 2
    kept = next((sl.cache.root() / "evals").glob("fragile-*.json"))
    kept.write_text("{half a fi")
    assert sl.evals.report([made["trained"]], tiny_lm, small_text, **settings).value("calls").value == 3


def test_names_of_coders(made, tiny_lm, small_text, tmp_path):
    saved = sl.load(made["trained"].save(tmp_path / "mine"))
    found = sl.evals.report([saved, made["PCA"], saved], tiny_lm, small_text, evals="description length", **SMALL)
    assert found.names == ("mine", "PCA", "mine (3)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evals": ["beauty"]}, "unknown eval 'beauty'; known: reconstruction, "),
        ({"coders": []}, r"at least one coder: sl.evals.report\(\[sae\]\)"),
        ({"coders": {"x": "training"}}, r"coder 'x' is in training mode: call sae.eval\(\)"),
        ({"coders": {"x": "another model"}}, "coder 'x' was trained on .* has other weights: pass lm= the model"),
        ({"coders": {"x": "no site"}}, "does not know its site"),
    ],
)
def test_refused(made, tiny_lm, small_text, change, message):
    kinds = {"training": made["trained"], "another model": sl.load("smollm2-135m/resid_post-8"), "no site": sl.L1(4, 8)}
    coders = change.pop("coders", [made["trained"]])
    if isinstance(coders, dict):
        coders = {name: kinds[kind].train(kind == "training") for name, kind in coders.items()}
    try:
        with pytest.raises(ValueError, match=message):
            sl.evals.report(coders, tiny_lm, small_text, **{**SMALL, **change})
    finally:
        made["trained"].eval()


def test_numbers_for_tables():
    assert number(math.nan) == "undefined" and number(12345.6) == "12,346" and number(0.12345) == "0.123"
    assert Figure("a", 0.5, 0.01).text == "0.500 ± 0.010" and Figure("a", 0.5).control_text == ""
    assert Figure("a", 2, control=1, control_name="noise", digits=0).control_text == "1 noise"
