"""Evaluation text: contexts spread over many documents, as a standard error clustered by document requires."""

from itertools import islice

import numpy as np

from sae_lab.lm.model import LM
from sae_lab.lm.text import Context, Documents, as_text
from sae_lab.saes.base import SparseCoder

MOST_DOCUMENTS = 64


def context_length(coder: SparseCoder, lm: LM, tokens: int, context: int | None = None) -> int:
    """Tokens of an evaluation context: ``context``; None: the coder's training context, else 128. ValueError for a
    length that the model cannot read, and for ``tokens`` < 1."""
    context = trained_context(coder) if context is None else context
    if tokens < 1:
        raise ValueError(f"tokens must be positive, got {tokens}")
    if not 2 <= context <= lm.max_length:
        raise ValueError(f"context must lie between 2 and the {lm.max_length} tokens this model reads, got {context}")
    return context


def trained_context(coder: SparseCoder) -> int:
    """Tokens of a context in training; 128 if the coder has no record of it."""
    return int(coder.meta.get("context") or 128)


def spread_contexts(lm: LM, text: Documents, tokens: int, length: int) -> list[Context]:
    """Contexts of about ``tokens`` tokens in all, evenly spread over the first 64 documents and within each.

    ValueError when the text has no context of two tokens.
    """
    text = as_text(text)
    by_document: dict[int, list[Context]] = {}
    for context in text.contexts(lm.tokenizer, lm.prefix_id, length):
        number = context.documents[0]
        if number >= MOST_DOCUMENTS:
            break
        if len(context.ids) > 1:
            by_document.setdefault(number, []).append(context)
    if not by_document:
        raise ValueError("the evaluation text is empty: it needs a document of at least two tokens")
    each = -(-tokens // (length * len(by_document)))
    while True:  # the rest of a short document's share goes to the others
        chosen = [
            contexts[i]
            for contexts in by_document.values()
            for i in np.linspace(0, len(contexts) - 1, min(each, len(contexts))).round().astype(int)
        ]
        if sum(len(c.ids) for c in chosen) >= tokens or each >= max(map(len, by_document.values())):
            break
        each += 1
    order = np.random.default_rng(0).permutation(len(chosen))
    total = np.cumsum([len(chosen[i].ids) for i in order])
    enough = int(np.searchsorted(total, tokens)) + 1
    return [chosen[i] for i in islice(order, enough)]
