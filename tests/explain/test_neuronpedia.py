"""Labels from elsewhere: read, checked, kept beside the user's own, never taken for HTML."""

import gzip
import http.server
import json
import threading
from functools import partial
from pathlib import Path

import pytest

from sae_lab.feature_index import FeatureIndex, exporting

# Names of models that are the same, without a file for each pair.
from sae_lab.feature_index.neuronpedia import _same_model, read_labels
from sae_lab.noting import Said
from sae_lab.widgets import FeatureInspector

ATTACK = "<img src=x onerror=alert(1)>"


def line(index, text, **others):
    record = {
        "modelId": "tiny", "layer": "1-res", "index": str(index), "description": text, "typeName": "oai_token-act-pair",
        "explanationModelName": "gpt-4o-mini", "embedding": [0.1, 0.2],
    }  # fmt: skip
    return json.dumps(record | others)


def write(file, *lines):
    data = ("\n".join(lines) + "\n").encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


@pytest.fixture
def batch(tmp_path):
    return write(
        tmp_path / "batch-0.jsonl.gz", line(0, " articles "), line(3, ATTACK), line(0, "the", typeName="other")
    )


def labels(source, d_sae=13, model_id="owner/Tiny", site_layer=1, model=None, layer=None):
    return read_labels(source, d_sae, model_id, site_layer, model, layer)


def test_a_file(batch):
    found = labels(batch)
    assert [(s.text, s.source) for s in found[0]] == [
        ("articles", "neuronpedia, gpt-4o-mini, oai_token-act-pair"), ("the", "neuronpedia, gpt-4o-mini, other"),
    ]  # fmt: skip
    assert found[3][0].text == ATTACK and list(found) == [0, 3]
    assert labels(write(batch.parent / "plain.jsonl", line(2, "x"), "", line(2, "x")))[2][0].text == "x"


def test_a_folder_and_an_address(tmp_path, batch):
    write(tmp_path / "batch-1.jsonl.gz", line(5, "months"))
    (tmp_path / "read.me").write_text("no labels")
    assert set(labels(tmp_path)) == {0, 3, 5}
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert set(labels(address)) == {0, 3, 5} and set(labels(f"{address}/batch-1.jsonl.gz")) == {5}
        with pytest.raises(ValueError, match=r"there is no http://127\.0\.0\.1/none/batch-0\.jsonl\.gz"):
            labels(f"{address}/none")
        server.shutdown()
    with pytest.raises(ValueError, match=r"cannot be read .* check the address and the network"):
        labels("http://user:secret@127.0.0.1:9/x.jsonl")


def test_the_hub(tmp_path, batch, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, repo_type, allow_patterns):
        asked.append((repo, repo_type, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert set(labels("some/labels/res")) == {0, 3}
    assert asked == [("some/labels", "dataset", ["res/*.jsonl", "res/*.jsonl.gz"])]

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="no file or folder some/labels, and the hub gives no data set of that name"):
        labels("some/labels")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([line(0, "a"), line(13, "b")], "line 2: a label of feature 13, and this coder has 0 to 12"),
        ([line(-1, "a")], "a label of feature -1"),
        (
            [line(0, "a", modelId="gpt2-small")],
            "line 1: labels of the model 'gpt2-small', and the index is of 'owner/T",
        ),
        ([line(0, "a", layer="6-res")], "labels of layer '6-res', and the index is of layer 1"),
        ([line(0, "a"), line(1, "b", modelId="other")], r"of several models \(other, tiny\): choose, model='other'"),
        ([line(0, "a"), line(1, "b", layer="1-mlp")], r"of several layers \(1-mlp, 1-res\)"),
        ([line(0, "a"), "{"], "line 2 is no explanation of Neuronpedia"),
        ([line("x", "a")], "line 1 is no explanation"),
        ([line(0, None)], "description is NoneType"),
        (['["list"]'], "line 1 is no explanation"),
        ([""], "holds no explanations"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, lines, words):
    with pytest.raises(ValueError, match=words):
        labels(write(tmp_path / "x.jsonl", *lines))


def test_a_broken_archive_and_no_file(tmp_path, batch):
    batch.write_bytes(batch.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"batch-0\.jsonl\.gz is no complete gzip file"):
        labels(batch)
    for missing in (tmp_path / "none", "none.jsonl", "folder/none.jsonl", "/no/such/folder/at/all"):
        with pytest.raises(ValueError, match=r"no labels at .* give a .jsonl"):
            labels(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no .jsonl or .jsonl.gz files"):
        labels(tmp_path / "empty")


def test_another_name_of_the_model_and_one_of_several_layers(tmp_path):
    file = write(tmp_path / "x.jsonl", line(0, "a", modelId="mine"), line(1, "b", modelId="mine", layer="9-x"))
    assert set(labels(file, model="mine", layer="9-x")) == {1}
    with pytest.raises(ValueError, match="no labels of layer '2-x' there: the source has '1-res', '9-x'"):
        labels(file, model="mine", layer="2-x")


def test_names_of_models():
    assert _same_model("gpt2-small", "openai-community/gpt2") and _same_model("gemma-2-2b", "google/gemma-2-2b")
    assert not _same_model("gemma-2-2b", "google/gemma-2-9b") and not _same_model("gpt2-small", "gpt2-medium")


def test_beside_the_index(token_index, tmp_path):
    """Kept, found and shown; what the user wrote is as it was; HTML is text; loading again adds nothing."""
    token_index.annotate(3, "mine", "a note")
    file = write(tmp_path / "x.jsonl", line(0, "articles"), line(3, ATTACK))
    for _ in range(2):
        assert token_index.load_labels(file, model="tiny", layer="1-res") == 2
    again = FeatureIndex(token_index.path, token_index.store, token_index.lm, token_index.coder)
    assert again.notes[3] == ("mine", "a note")
    assert len(again.explanations) == 2 and [s.text for s in again.explanations[3]] == [ATTACK]
    assert again.search("label:articles").features == [0] and again.search("label:mine").features == [3]
    panel = FeatureInspector(again, feature=3)
    assert {r["feature"]: r["label"] for r in panel.results}[0] == "articles"
    html = panel.snapshot()._repr_html_()
    assert "<img" not in html and "&lt;img src=x onerror=alert(1)&gt;" in html
    page = panel.to_html(tmp_path / "page.html").read_text()
    assert ATTACK not in page


def test_nothing_is_kept_of_what_does_not_fit(token_index, tmp_path):
    with pytest.raises(ValueError, match="a label of feature 99"):
        token_index.load_labels(write(tmp_path / "x.jsonl", line(0, "a"), line(99, "b")), model="tiny")
    assert len(token_index.explanations) == 0 and not token_index.notes.file.exists()


# ---------------------------------------------------------------------------------------------- what it imports

SCHEMA = json.loads((Path(__file__).parent / "neuronpedia_schema.json").read_text())["tables"]
KINDS = {"String": str, "Int": int, "Float": (int, float), "Boolean": bool, "Visibility": str}
TABLES = {"model.jsonl": "Model", "sourceset.jsonl": "SourceSet", "source.jsonl": "Source", "features": "Neuron",
          "activations": "Activation", "explanations": "Explanation"}  # fmt: skip


def imported(file):
    """The rows of a file, read as Neuronpedia's importer reads them; AssertionError for what its tables do not take."""
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode().replace("\\u0000", " ")
    rows = [json.loads(line) for line in text.strip().split("\n")]
    columns = SCHEMA[TABLES[file.name if file.parent.name not in TABLES else file.parent.name]]
    for row in rows:
        assert row.keys() == rows[0].keys(), "the columns are those of the first line"
        assert row.keys() <= columns.keys()
        assert {c for c, kind in columns.items() if kind[-1] not in "?=]"} <= row.keys(), "what must be there"
        for name, value in row.items():
            kind = columns[name].rstrip("=")
            if value is None:
                assert kind.endswith("?"), name
                continue
            values = value if kind.endswith("[]") else [value]
            of = KINDS[kind.rstrip("?").removesuffix("[]")]
            assert all(isinstance(v, of) and (of is bool or not isinstance(v, bool)) for v in values), (name, value)
    return rows


def test_what_the_importer_reads(token_index, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SIZE", 5)  # three files
    token_index.annotate(0, "months \x00 \u2028 \\u0000", "a\nnote " + "x" * 10_000)
    token_index.explanations.write({
        3: [Said(ATTACK, "neuronpedia, gpt-4o, auto"),
            Said("\u05e9\u05dc\u05d5\u05dd 👩‍🚀", "mine, of today", {"f1": 0.5})],
    })  # fmt: skip
    folder = token_index.to_neuronpedia(tmp_path, "tiny", "e-res-mine", author="we")
    assert folder == tmp_path / "tiny" / "e-res-mine"
    rows = {}
    for file in sorted(folder.rglob("*.jsonl*")):
        name = file.name if file.parent == folder else file.parent.name
        rows[name] = [*rows.get(name, []), *imported(file)]
    assert rows.keys() == TABLES.keys()
    features, activations, said = (rows[name] for name in ("features", "activations", "explanations"))
    assert [int(row["index"]) for row in features] == list(range(13))
    assert [row["frac_nonzero"] for row in features] == token_index.density.tolist()
    assert {row["sourceSetName"] for row in features} == {"res-mine"} == {r["name"] for r in rows["sourceset.jsonl"]}
    [source] = rows["source.jsonl"]
    assert (source["id"], source["setName"], source["modelId"]) == ("e-res-mine", "res-mine", "tiny")
    # A context of ours is a row, and its bounds are those of its quarter of the activations.
    view = token_index[2]
    here = [row for row in activations if row["index"] == "2"]
    assert [row["tokens"] for row in here] == [c.tokens for group in view.groups for c in group["contexts"]]
    assert len({row["id"] for row in activations}) == len(activations)
    assert all(row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"]) for row in activations)
    assert {row["binMin"] for row in here[:12]} == {-1} and here[0]["binMax"] == pytest.approx(view.max, rel=1e-4)
    quarters = {(row["binMin"], row["binMax"]): row["binContains"] for row in here[12:]}
    assert all(low <= high for low, high in quarters)
    if len(quarters) == 4:
        assert sum(quarters.values()) == pytest.approx(view.density)
    # What is said, and by whom: its own explainers by their names, which it knows; others in the notes.
    assert {(r["index"], r["description"], r["typeName"], r["explanationModelName"], r["notes"]) for r in said} == {
        ("0", "months   \u2028 \\u0000", None, None, "sae_lab: label"),
        ("0", "a\nnote " + "x" * 10_000, None, None, "sae_lab: text"),
        ("3", ATTACK, "auto", "gpt-4o", None),
        ("3", "\u05e9\u05dc\u05d5\u05dd 👩‍🚀", None, None, "sae_lab: mine, of today"),
    }
    assert labels(folder / "explanations", model_id="tiny").keys() == {0, 3}
    with pytest.raises(ValueError, match="is there already: delete it, or name another path"):
        token_index.to_neuronpedia(tmp_path, "tiny", "e-res-mine")
    again = token_index.to_neuronpedia(tmp_path / "again", "tiny", "e-res-mine", author="we")
    for file in folder.rglob("*.jsonl*"):  # what is imported twice is there once
        assert (again / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_names_that_its_addresses_can_hold(token_index, built, tmp_path):
    for names, words in (
        (("Tiny Model", None), "model must be lower-case letters, digits, dots and dashes, got 'Tiny Model'"),
        ((None, "res"), "layer must be the number of the layer, e, and a name in lower case, got 'res'"),
        ((None, "../../x"), "layer must be"),
    ):
        with pytest.raises(ValueError, match=words):
            token_index.to_neuronpedia(tmp_path, *names)
    assert list(tmp_path.iterdir()) == []
    folder = token_index.to_neuronpedia(tmp_path)
    assert folder.name == "e-embed-13" and imported(folder / "model.jsonl")[0]["id"] == folder.parent.name
