"""Graphs of circuit-tracer 0.5.0 on tiny random models, kept for a test: weights, effects, and what its pruning keeps.

circuit-tracer needs other versions of nnsight and transformers than this library, so this script runs in an environment
of its own, and imports nothing of ours:

    python -m venv tracer && tracer/bin/pip install torch circuit-tracer==0.5.0 nnsight==0.6.1
    tracer/bin/python benchmarks/tracer_fixture.py           # writes tests/circuits/circuit_tracer.safetensors

Two models: a Llama with biases, whose transcoders read what the MLP reads and have a skip; and a Gemma 2 (norms behind
the MLP too, a cap on the logits), whose transcoders have thresholds and read the norm's output before its gain. Gains
and biases are all drawn away from 1 and 0. Weights are rounded to float16, so that the file is small and exact.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import circuit_tracer
import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.graph import compute_graph_scores, compute_node_influence, prune_graph
from circuit_tracer.replacement_model.replacement_model_nnsight import NNSightReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast

FILE = Path(__file__).resolve().parent.parent / "tests" / "circuits" / "circuit_tracer.safetensors"
D, D_HEAD, VOCAB, LAYERS, WIDTH, ACTIVE = 16, 8, 264, 3, 32, 6
IDS = [1, 80, 33, 120, 41, 9, 200]  # 1: the token at the beginning
NODES, EDGES = 0.8, 0.98
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": LAYERS, "head_dim": D_HEAD,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "attention_bias": True, "mlp_bias": True},
    "gemma2": {**COMMON, "query_pre_attn_scalar": 12, "sliding_window": 4, "attention_bias": True,
               "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0},
}  # fmt: skip
# What a set's config.yaml tells: the model, by which our loader knows its norms, and where transcoders read and write.
TOLD = {
    "llama": ("meta-llama/Llama-3.2-1B", "mlp.hook_in", "mlp.hook_out"),
    "gemma2": ("google/gemma-2-2b", "ln2.hook_normalized", "hook_mlp_out"),
}


def drawn(generator: torch.Generator, *shape: int, size: float = 1.0, around: float = 0.0) -> Tensor:
    return (around + size * torch.randn(shape, generator=generator)).half().float()


def model_of(name: str, generator: torch.Generator) -> Any:
    """A model whose weights, gains and biases all matter."""
    config = (LlamaConfig if name == "llama" else Gemma2Config)(**CONFIGS[name])
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, x in module.named_parameters():
            if "norm" in key:
                x.copy_(drawn(generator, *x.shape, size=0.3, around=0.0 if name == "gemma2" else 1.0))
            elif x.dim() == 1:
                x.copy_(drawn(generator, *x.shape, size=0.3))
            else:
                x.copy_(drawn(generator, *x.shape, size=0.7 if "embed" in key else 1.2 / x.shape[1] ** 0.5))
    return module


def read_by_transcoders(module: Any, name: str) -> list[Tensor]:
    """By layer, "pos d": the norm's output, before its gain in Gemma 2."""
    found: list[Tensor] = []

    def note(norm: Any, args: Any, out: Tensor) -> None:
        found.append((norm._norm(args[0].float()) if name == "gemma2" else out)[0].detach())

    at = "pre_feedforward_layernorm" if name == "gemma2" else "post_attention_layernorm"
    handles = [getattr(block, at).register_forward_hook(note) for block in module.model.layers]
    module(torch.tensor([IDS]))
    for handle in handles:
        handle.remove()
    return found


def transcoder_of(x: Tensor, name: str, generator: torch.Generator) -> dict[str, Tensor]:
    """A file's tensors; about ``ACTIVE`` features a token."""
    t = {
        "W_enc": drawn(generator, WIDTH, D, size=D**-0.5), "W_dec": drawn(generator, WIDTH, D, size=0.4),
        "b_enc": drawn(generator, WIDTH, size=0.3), "b_dec": drawn(generator, D, size=0.3),
    }  # fmt: skip
    level = (x[1:] @ t["W_enc"].T + t["b_enc"]).flatten().quantile(1 - ACTIVE / WIDTH)
    if name == "llama":
        t["b_enc"] = (t["b_enc"] - level).half().float()
        t["W_skip"] = drawn(generator, D, D, size=0.3 * D**-0.5)
    else:
        levels = level * (0.7 + 0.6 * torch.rand(WIDTH, generator=generator))
        t["activation_function.threshold"] = levels.half().float()
    return t


def measured(name: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, plain facts) of one model."""
    generator = torch.Generator().manual_seed(0)
    module = model_of(name, generator)
    entries = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, VOCAB))]
    inner = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    module.save_pretrained(folder / "model")
    coders = [transcoder_of(x, name, generator) for x in read_by_transcoders(module, name)]
    paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(LAYERS)}
    for layer, t in enumerate(coders):
        save_file(t, paths[layer])
    called, reads, writes = TOLD[name]
    told = {"model_name": called, "model_kind": "transcoder_set", "feature_input_hook": reads,
            "feature_output_hook": writes}  # fmt: skip
    transcoders = load_transcoder_set(
        paths, "tiny", reads, writes, device=torch.device("cpu"), dtype=torch.float32, lazy_encoder=False,
        lazy_decoder=False,
    )  # fmt: skip
    model = NNSightReplacementModel.from_pretrained_and_transcoders(
        str(folder / "model"), transcoders, device=torch.device("cpu"), dtype=torch.float32
    )
    graph = attribute(torch.tensor(IDS), model, batch_size=64)
    assert graph.input_tokens.tolist() == IDS
    features, logits = len(graph.selected_features), len(graph.logit_targets)
    node_mask, edge_mask, share = prune_graph(graph, NODES, EDGES)
    weights = torch.zeros(len(graph.adjacency_matrix))
    weights[-logits:] = graph.logit_probabilities
    rows = [*range(features), *range(len(node_mask) - logits, len(node_mask))]
    tensors = {f"model/{key}": x.half() for key, x in module.state_dict().items()}
    tensors |= {f"layer_{n}/{key}": x.half() for n, t in enumerate(coders) for key, x in t.items()}
    tensors |= {
        "features": graph.active_features.short(), "values": graph.activation_values,
        "effects": graph.adjacency_matrix[rows][:, :-logits],
        "edges": edge_mask[rows][:, :-logits].nonzero().short(), "nodes": node_mask.to(torch.uint8),
        "share": share, "influence": compute_node_influence(graph.adjacency_matrix, weights),
        "logits": torch.tensor([target.vocab_idx for target in graph.logit_targets]).short(),
        "weights": graph.logit_probabilities,
    }  # fmt: skip
    scores = dict(zip(("replacement", "completeness"), compute_graph_scores(graph), strict=True))
    print(name, features, "features", int(node_mask.sum()), "nodes and", int(edge_mask.sum()), "edges kept", scores)
    facts = {"ids": IDS, "config": CONFIGS[name], "transcoders": told, "scores": scores, "nodes": NODES, "edges": EDGES}
    return {f"{name}/{key}": x.detach().contiguous() for key, x in tensors.items()}, facts


def main() -> None:
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    notes = {"circuit-tracer": circuit_tracer.__version__}
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            some, facts = measured(name, Path(folder))
        tensors |= some
        notes[name] = json.dumps(facts)
    save_file(tensors, FILE, notes)
    print(f"{FILE.name}: {FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
