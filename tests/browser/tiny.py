"""A whole lab in some seconds: a tiny random model, a coder trained on it, its store and index.

A test notebook holds this file's text as its first cell; it needs nothing of the tests.
"""

import pathlib
import tempfile

import torch
import transformers

import sae_lab as sl
from sae_lab.lm import bundled

torch.manual_seed(0)
tokenizer = transformers.AutoTokenizer.from_pretrained(bundled.folder())
module = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )
)  # fmt: skip
with torch.no_grad():
    for p in module.parameters():
        p.normal_(0, 1.0 if p.shape[0] == len(tokenizer) else 48**-0.5) if p.dim() > 1 else None
lm = sl.LM(module, tokenizer=tokenizer)
folder = pathlib.Path(tempfile.mkdtemp())
text = sl.load_text([document[:1200] for document in sl.load_text()[:18]])
store = sl.harvest(lm, "resid_post-1", text, 3000, context=64, path=folder / "store")
sae = sl.BatchTopK(48, 96, k=5)
sl.train(sae, store, sl.TrainConfig(steps=60, batch_size=256, lr=3e-3))
sae.save(folder / "sae")
index = sl.index_features(sae, lm, store, path=folder / "index")
