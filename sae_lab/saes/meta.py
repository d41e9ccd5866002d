"""What a coder's ``meta`` may hold, by type: it comes from files that anybody may have written."""

from typing import Any

from sae_lab.types import TokenMask

_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "model": (str, type(None)), "model_fingerprint": (str,), "text": (str,), "f_scale": (str,), "scale": (str,),
    "prefix_id": (int, type(None)), "context": (int,), "dead_tokens": _NUMBER, "train_tokens": _NUMBER,
    "dead": _NUMBER, "excluded": _NUMBER, "centred": (bool,), "needs_gain": (bool,), "train": (dict,),
    "changes": (list,), "card": (dict,), "check": (dict,), "source": (dict,), "expected": (dict,), "id": (str,),
    "mask": (dict, type(None)), "trained_from": (str,),
}  # fmt: skip


def check_meta(meta: dict[str, Any]) -> None:
    """ValueError where an entry that this library reads has another type. Entries it does not know may be anything."""
    for name, kinds in _TYPES.items():
        if name not in meta:
            continue
        value = meta[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            words = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"its meta's {name!r} must be {words}, got {type(value).__name__} {str(value)[:40]!r}")
    if (context := meta.get("context", 1)) < 1:
        raise ValueError(f"its meta's 'context' must be at least 1, got {context}")
    for name, value in meta.get("expected", {}).items():
        if isinstance(value, bool) or not isinstance(value, _NUMBER):
            raise ValueError(f"its meta's expected {name!r} must be a number, got {type(value).__name__}")
    if meta.get("mask"):
        TokenMask.from_dict(meta["mask"])
