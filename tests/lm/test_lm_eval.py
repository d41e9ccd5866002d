"""lm-eval runs the module of ``lm.edited``: it scores a task of this file as ``lm.logits`` with the same edits does."""

import json

import pytest
import torch

import sae_lab as sl

QUESTIONS = [
    ("The river rose in", [" March", " May"]),
    ("A fox ran away from the", [" old castle", " dog"]),
    ("We talked about", [" war", " the market"]),
]
TASK = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """What lm-eval finds for a module: the log-probability of each choice."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    tasks = pytest.importorskip("lm_eval.tasks")
    lines = [json.dumps({"text": text, "choices": choices, "answer": 0}) for text, choices in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "choices.yaml").write_text(TASK % (tmp_path / "questions.jsonl"))
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)

    def score(module, tokenizer):
        model = huggingface.HFLM(pretrained=module, tokenizer=tokenizer, batch_size=4)
        found = lm_eval.simple_evaluate(model=model, tasks=["choices"], task_manager=manager, log_samples=True)
        samples = sorted(found["samples"]["choices"], key=lambda sample: sample["doc_id"])
        return torch.tensor([[answer[0][0] for answer in sample["resps"]] for sample in samples])

    return score


def by_hand(lm, edits):
    """The same from lm.logits, each prompt with each choice alone."""
    found = []
    for text, choices in QUESTIONS:
        before = len(lm.tokenizer(text)["input_ids"])
        for choice in choices:
            ids = lm.tokenizer(text + choice)["input_ids"]
            logs = lm.logits(ids, edits)[0].log_softmax(-1)
            found.append(sum(float(logs[at - 1, ids[at]]) for at in range(before, len(ids))))
    return torch.tensor(found).view(len(QUESTIONS), 2)


def test_lm_eval_scores_the_edited_model(tiny_lm, scored):
    lm = tiny_lm
    sae = sl.TopK(lm.width("resid_post-1"), 48, k=6, seed=1).eval()
    sae.reads = sae.writes = (sl.Site("resid_post", 1),)
    sae.f_scale.fill_(1.0)
    edits = [sl.Steer(sae, 3, strength=6.0)]
    with lm.edited(edits) as module:
        found = scored(module, lm.tokenizer)
    assert torch.allclose(found, by_hand(lm, edits), atol=1e-3)
    clean = scored(lm._module, lm.tokenizer)
    assert torch.allclose(clean, by_hand(lm, []), atol=1e-3)
    assert float((found - clean).abs().min()) > 0.01, "the edit changes the score of every choice"
