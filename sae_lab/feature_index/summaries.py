"""What a feature's codes say: mean, max and histogram, the tokens it fires on most, and which activations to show."""

from itertools import pairwise

import numpy as np
import torch

from sae_lab.activations.store import Store
from sae_lab.feature_index import chunks
from sae_lab.feature_index.labels import Labels
from sae_lab.lm.model import LM

TOP_TOKENS = 8
STRONGEST = 64  # activations whose tokens name a feature
BINS = 40
TOP_CONTEXTS, QUANTILE_CONTEXTS = 12, 4
QUARTERS = 4
SHOWN = TOP_CONTEXTS + QUARTERS * QUANTILE_CONTEXTS
EXAMPLES = 30  # items of a network's store that a feature to look at first fires on
LEAD = 6  # two activations are repeated text if they and the tokens before them are equal, LEAD tokens in all


def summarise(store: Store, offsets: np.ndarray, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """Per feature: ``mean`` and ``max`` where it fires, ``histogram`` of BINS equal bins from 0 to max, ``top_tokens``
    by their summed activations among the STRONGEST, and ``shown``: rows of the store, see ``_choose``. -1: none."""
    d_sae = len(offsets) - 1
    tables = {
        "mean": np.zeros(d_sae, np.float32),
        "max": np.zeros(d_sae, np.float32),
        "histogram": np.zeros((d_sae, BINS), np.int32),
        "top_tokens": np.full((d_sae, TOP_TOKENS), -1, np.int32),
        "shown": np.full((d_sae, SHOWN), -1, np.int32),
    }
    every_token = store.rows(np.arange(len(store)), "token").numpy().astype(np.int32)
    contexts, leads = _contexts(store)
    for start, stop in chunks.by_codes(offsets):
        part = slice(offsets[start], offsets[stop])
        counts = np.diff(offsets[start : stop + 1])
        features, order = strongest_first(counts, values[part])
        v, r = values[part][order], rows[part][order]
        first = counts.cumsum() - counts
        live = np.flatnonzero(counts)
        largest = np.zeros(len(counts))
        largest[live] = v[first[live]]
        tables["max"][start:stop] = largest
        tables["mean"][start:stop] = np.bincount(features, v, len(counts)) / np.maximum(counts, 1)
        bins = np.minimum((v * (BINS / largest[features])).astype(np.int64), BINS - 1)
        histogram = np.bincount(features * BINS + bins, minlength=len(counts) * BINS)
        tables["histogram"][start:stop] = histogram.reshape(-1, BINS)
        top = np.arange(len(v)) - first[features] < STRONGEST
        tables["top_tokens"][start:stop] = _top_tokens(len(counts), features[top], every_token[r[top]], v[top])
        for i in live:
            tables["shown"][start + i] = _choose(r[first[i] : first[i] + counts[i]], contexts, leads)
    return tables


def strongest_first(counts: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(feature of each code, order of the codes): by feature, the largest first, equal ones as they stand."""
    features = np.repeat(np.arange(len(counts)), counts)
    return features, np.lexsort((-values, features))


def _top_tokens(d_sae: int, features: np.ndarray, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The TOP_TOKENS of each feature by summed values, equal ones by id."""
    base = int(tokens.max(initial=0)) + 1
    pairs, where = np.unique(features * base + tokens, return_inverse=True)
    features, tokens = np.divmod(pairs, base)
    order = np.lexsort((-np.bincount(where, values, len(pairs)), features))
    rank = np.arange(len(pairs)) - np.searchsorted(features, features)  # features ascend, in any order of the pairs
    kept = rank < TOP_TOKENS
    top = np.full((d_sae, TOP_TOKENS), -1, np.int32)
    top[features[kept], rank[kept]] = tokens[order][kept]
    return top


def _contexts(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Of every row the number of its context, and a hash of the tokens that lead up to it (fewer at the start)."""
    contexts = store.contexts(np.arange(len(store)))
    if "grid" in store.identity:  # places have the same numbers in every item: nothing is repeated text
        return contexts, np.arange(len(store), dtype=np.uint64)
    leads = np.empty(len(store), np.uint64)
    factors = np.random.default_rng(0).integers(0, 2**64, LEAD, np.uint64) | np.uint64(1)
    for number in range(contexts[0], contexts[-1] + 1):
        ids = store.context_ids(number)
        before = np.zeros(len(ids) + LEAD - 1, np.uint64)
        before[LEAD - 1 :] = ids.astype(np.uint64) + np.uint64(1)
        here, positions = store.context_rows(number)
        seen = here < len(store)  # the store may end within a context
        windows = np.lib.stride_tricks.sliding_window_view(before, LEAD)[positions[seen]]
        leads[here[seen]] = (windows * factors).sum(1, dtype=np.uint64)
    return contexts, leads


def _choose(rows: np.ndarray, contexts: np.ndarray, leads: np.ndarray) -> np.ndarray:
    """The activations to show, of rows that come strongest first: the top ones, then some from each quarter, evenly
    spaced; no context twice, and no repeated text. Unused places are -1."""
    n = len(rows)
    groups = [(TOP_CONTEXTS, rows[: 8 * TOP_CONTEXTS])]
    for quarter in range(QUARTERS):
        part = rows[n * quarter // QUARTERS : n * (quarter + 1) // QUARTERS]
        if len(part):
            part = part[np.linspace(0, len(part) - 1, min(len(part), 3 * QUANTILE_CONTEXTS)).astype(int)]
        groups.append((QUANTILE_CONTEXTS, part))
    shown = np.full(SHOWN, -1, np.int32)
    seen_contexts: set[int] = set()
    seen_leads: set[int] = set()
    at = 0
    for limit, candidates in groups:
        found: list[int] = []
        here = zip(candidates.tolist(), contexts[candidates].tolist(), leads[candidates].tolist(), strict=True)
        for row, context, lead in here:
            if len(found) == limit:
                break
            if context not in seen_contexts and lead not in seen_leads:
                seen_contexts.add(context)
                seen_leads.add(lead)
                found.append(row)
        shown[at : at + len(found)] = found
        at += limit
    return shown


def selectivity(store: Store, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The share of items on which a feature does not fire, in place of ``readability`` where there are no words; less
    for a feature of fewer than EXAMPLES items, which show too little of what they share."""
    contexts = store.contexts(np.arange(len(store)))
    items = len(np.unique(contexts))
    fires = np.array([len(np.unique(contexts[rows[a:b]])) for a, b in pairwise(offsets.tolist())])
    return ((1 - fires / items) * np.minimum(1, fires / EXAMPLES)).astype(np.float32)


def readability(lm: LM, labels: Labels, top_tokens: np.ndarray) -> np.ndarray:
    """How alike a feature's top tokens are, times the share of them that are words: mean pairwise cosine of their
    (centred) embeddings. 0 to 1: a rule of thumb for which feature to look at first, no measure of its quality."""
    one = lm.embedding(torch.tensor([0]))
    size = chunks.rows_at_a_time(2 * top_tokens.shape[1] * one[0].nbytes)
    parts = [_readability(lm, labels, top_tokens[i : i + size]) for i in range(0, len(top_tokens), size)]
    return np.concatenate(parts)


def _readability(lm: LM, labels: Labels, top_tokens: np.ndarray) -> np.ndarray:
    ids, where = np.unique(np.maximum(top_tokens, 0), return_inverse=True)
    unit = torch.nn.functional.normalize(lm.embedding(torch.from_numpy(ids)), dim=1)
    words = (labels[i] for i in ids.tolist())
    is_word = torch.tensor([t.startswith(" ") and len(t) > 3 and t.strip().isalpha() for t in words])
    where = torch.from_numpy(where.reshape(top_tokens.shape))
    valid = torch.from_numpy(top_tokens >= 0)
    n = valid.sum(1)
    total = (unit[where] * valid.unsqueeze(-1)).sum(1)
    alike = (total.pow(2).sum(1) - n) / (n * (n - 1)).clamp_min(1)
    share = (is_word[where] & valid).sum(1) / n.clamp_min(1)
    return (alike.clamp(0, 1) * share * (n == top_tokens.shape[1])).numpy()
