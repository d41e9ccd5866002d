"""A prompt as widgets take it: a text, or a chat, which goes through the model's chat template."""

from typing import Any

from sae_lab.lm.model import LM
from sae_lab.lm.tokens import Prompt, check_chat, is_chat
from sae_lab.spelling import check_text


def checked_prompt(prompt: Any, lm: LM | None = None) -> Prompt:
    """A text, or a chat as a list of its own. ValueError for anything else, and for a chat that the model cannot take
    since it has no chat template."""
    if isinstance(prompt, str):
        check_text(prompt, "the prompt")
        return prompt
    if not is_chat(prompt):
        raise ValueError(f"prompt must be a text or a list of {{'role', 'content'}}, got {type(prompt).__name__}")
    if lm is not None:
        check_chat(lm.tokenizer, prompt)
    return [dict(message) for message in prompt]


def in_words(prompt: Prompt) -> str:
    """A prompt to be read: of a chat one line a message, “user: Hello”."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
