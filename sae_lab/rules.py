"""What edits do, as functions of torch alone, so that they run in any trace: here, or on a server without this library.

``edited`` is what a ``Write`` calls. It finds the tokens an edit touches (``place``), and gives their activations to a
*change*; the change of most edits is ``coded``, which gives their codes to a *rule*. Changes and rules are told each
token's row among the user's prompts and its absolute position. All settings are keywords, bound with functools.partial.
See ``saes.portable`` on ``no_type_check``.
"""

from typing import no_type_check

import torch

from sae_lab.lm.passes import counting_tokens
from sae_lab.saes.portable import at_home, decode, encode, some, write_of

# ---- where


@no_type_check
def among(numbers, chosen):
    """Bool for each number: whether an int, a slice, a list or None (all) holds it."""
    if chosen is None:
        return torch.ones_like(numbers, dtype=torch.bool)
    if isinstance(chosen, slice):
        stop = chosen.stop if chosen.stop is not None else float("inf")
        start, step = chosen.start or 0, chosen.step or 1
        return (numbers >= start) & (numbers < stop) & ((numbers - start) % step == 0)
    many = [chosen] if isinstance(chosen, int) else list(chosen)
    return torch.isin(numbers, torch.tensor(many, dtype=numbers.dtype, device=numbers.device))


@no_type_check
def touched(x, tokens, place):
    """The tokens an edit acts on, "batch pos". place: the coder's token mask ("special", "skip_first", "limit"), the
    user's "rows", "positions", "steps", and "wanted", a bool for each token id, or None."""
    keep = tokens.mask & among(tokens.row_numbers, place["rows"])[:, None]
    if not bool(among(torch.tensor(tokens.step), place["steps"])):
        return torch.zeros_like(keep)
    keep = keep & counting_tokens(tokens.ids, tokens.positions, place["special"], place["skip_first"])
    if place["limit"] is not None:
        keep = keep & (x.float().norm(dim=-1) <= place["limit"]).to(keep.device)
    if place["wanted"] is None:
        return keep & among(tokens.positions, place["positions"])
    return keep & place["wanted"][tokens.ids]


@no_type_check
def edited(x, tokens, *read, place, change):
    """x with the touched tokens changed. read: the activations at the site that codes are of, where it is another."""
    source = read[0] if read else x
    keep = touched(source, tokens, place)
    if not bool(keep.any()):
        return x
    rows = tokens.row_numbers[keep.nonzero()[:, 0]]
    ids, positions = tokens.ids[keep], tokens.positions[keep]
    there = keep.to(x.device)
    out = x.clone()
    out[there] = change(x[there], source[there], ids, rows, positions).to(x)
    return out


@no_type_check
def inside(x, *read, tokens, place, change):
    """``edited`` for a trace of one's own: the tokens are bound, activations come as they stand there."""
    return edited(x, tokens, *read, place=place, change=change)


# ---- changes: (x "tokens d_out", read "tokens d_in", ids, rows, positions) -> x'


@no_type_check
def coded(x, read, ids, rows, positions, *, plan, drop, rule):
    """x + W_dec·(z' - z), or with ``drop`` the reconstruction from z'; z' of the plan's features by the rule."""
    with torch.no_grad():
        at_home(plan, x.device)
        read = read.float()
        codes = encode(plan, read)
        base, z = decode(plan, codes, read, ids) if drop else x.float(), some(plan, codes)
        return base + write_of(plan, rule(z, rows, positions) - z, read)


@no_type_check
def with_their_error(x, read, ids, rows, positions, *, plan, wrong, keep, codes_only):
    """What ``codes_only`` makes, and the error of the source's run in the place of x's."""
    with torch.no_grad():
        at_home(plan, x.device)
        row, position, there = in_source(keep, rows, positions)
        read = read.float()
        ours = x - decode(plan, encode(plan, read), read, ids).to(x)
        theirs = wrong[row, position].to(x)
        return codes_only(x, read, ids, rows, positions) + (theirs - ours) * there[:, None].to(x)


@no_type_check
def projected(x, read, ids, rows, positions, *, basis):
    """x less its part in the span of orthonormal columns, "d_out directions"."""
    q, x = basis.to(x.device), x.float()
    return x - (x @ q) @ q.T


@no_type_check
def pushed(x, read, ids, rows, positions, *, vector):
    """x + vector."""
    return x + vector.to(x)


# ---- rules: (z "tokens features", rows, positions) -> z'


@no_type_check
def added(z, rows, positions, *, amount):
    return z + amount.to(z)


@no_type_check
def held(z, rows, positions, *, value):
    return value.to(z).expand_as(z)


@no_type_check
def multiplied(z, rows, positions, *, factor):
    return factor * z


@no_type_check
def as_it_is(z, rows, positions):
    return z


@no_type_check
def drawn(z, rows, positions, *, seen, draws):
    """Codes of other tokens, "n features": a token's draw depends on its row and position alone."""
    return seen[draws[(positions + 7919 * rows) % len(draws)]].to(z)


@no_type_check
def of_another_run(z, rows, positions, *, codes, keep):
    """codes "rows pos features" where keep says that a token which counts stands there, else z."""
    row, position, there = in_source(keep, rows, positions)
    return torch.where(there[:, None].to(z.device), codes[row, position].to(z), z)


@no_type_check
def in_source(keep, rows, positions):
    """Of each token: its row and position in another run, and whether a token that counts stands there."""
    row = torch.zeros_like(rows) if len(keep) == 1 else rows
    position = positions.clamp_max(keep.shape[1] - 1)
    return row, position, (positions < keep.shape[1]) & keep[row, position]
