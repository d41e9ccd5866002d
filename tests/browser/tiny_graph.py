"""An attribution graph in some seconds: a tiny random model with random transcoders.

A test notebook holds this file's text as its first cell; it needs nothing of the tests.
"""

import torch
import transformers

import sae_lab as sl
from sae_lab.lm import bundled

LAYERS, D, ACTIVE = 6, 48, 5
torch.manual_seed(0)
tokenizer = transformers.AutoTokenizer.from_pretrained(bundled.folder())
module = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=D, intermediate_size=2 * D, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=None,
    )
)  # fmt: skip
with torch.no_grad():
    for p in module.parameters():
        p.normal_(0, 1.0 if p.shape[0] == len(tokenizer) else D**-0.5) if p.dim() > 1 else None
lm = sl.LM(module, tokenizer=tokenizer)
prompt = "The old bridge over the river"
made, x = [], lm.read(prompt, [sl.Site("mlp_in", layer) for layer in range(LAYERS)])
for layer in range(LAYERS):
    coder = sl.Transcoder(D, 96, k=ACTIVE, seed=layer).eval()
    with torch.no_grad():
        pre = x[sl.Site("mlp_in", layer)][0, 1:] @ coder.W_enc
        coder.threshold.copy_(pre.quantile(1 - ACTIVE / 96).clamp_min(0.1))
        coder.f_scale.fill_(1.0)  # random coders have fired on nothing
    coder.reads, coder.writes = (sl.Site("mlp_in", layer),), (sl.Site("mlp_out", layer),)
    made.append(coder)
coders = sl.TranscoderSet(made)
graph = sl.circuits.trace(lm, coders, prompt)
