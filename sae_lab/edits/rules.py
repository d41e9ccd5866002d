"""What edits do, as functions of torch alone, which run in any trace: here, or on a server without sae_lab.

A ``Write`` calls ``edited``, for one edit or for a group (``grouping``). It finds the tokens that the edits touch, and
gives their activations to a *change*; the change of most edits is ``coded``, which gives the tokens' codes to each
edit's *rule*. Changes and rules also get each token's row among the user's prompts and its absolute position. All
settings are keywords, bound with functools.partial. See ``saes.portable`` on ``no_type_check``.
"""

from typing import no_type_check

import torch

from sae_lab.lm.passes import counting_tokens
from sae_lab.saes.portable import at_home, decode, encode, some, write_of


@no_type_check
def among(numbers, chosen):
    """Bool for each number: whether it is in ``chosen``, an int, a slice, a list, or None for all."""
    if chosen is None:
        return torch.ones_like(numbers, dtype=torch.bool)
    if isinstance(chosen, slice):
        stop = chosen.stop if chosen.stop is not None else float("inf")
        start, step = chosen.start or 0, chosen.step or 1
        return (numbers >= start) & (numbers < stop) & ((numbers - start) % step == 0)
    many = [chosen] if isinstance(chosen, int) else list(chosen)
    return torch.isin(numbers, torch.tensor(many, dtype=numbers.dtype, device=numbers.device))


@no_type_check
def named(tokens, place):
    """Whether an edit names a token, "batch pos". place: its "rows", "positions" and "steps"; "wanted": a bool for each
    token id, where positions are named by text, else None."""
    rows = among(tokens.row_numbers, place["rows"])[:, None] & among(torch.as_tensor(tokens.step), place["steps"])
    if place["wanted"] is None:
        return rows & among(tokens.positions, place["positions"])
    return rows & place["wanted"][tokens.ids]


@no_type_check
def along(x, tokens, direction):
    """Of each real token, x·direction and the norm of x, "tokens 2"."""
    rows = x[tokens.mask.to(x.device)].float()
    return torch.stack([rows @ direction.to(rows), rows.norm(dim=-1)], dim=1).cpu()


@no_type_check
def holds(x, tokens, when):
    """Whether an edit's condition holds, "batch pos", told from the activations at the condition's site.

    when: the "plan" of one feature's code, the "level" that it must exceed, the "mask" of tokens that are looked at,
    and the "scope". "memory": rows in which it has held, for passes that read the newest token alone; a pass from
    position 0 begins anew.
    """
    at_home(when["plan"], x.device)
    look = counting(x, tokens, when["mask"])
    on = torch.zeros_like(look)
    parts = x[look.to(x.device)].float().split(1024)  # dense codes of all tokens would be large
    codes = [some(when["plan"], encode(when["plan"], part))[:, 0] for part in parts if len(part)]
    if codes:
        on[look] = (torch.cat(codes) > when["level"]).cpu()
    if when["scope"] == "token":
        return on
    if when["scope"] == "prompt":
        on = on & (torch.as_tensor(tokens.step) == 0)
    rows, memory = tokens.row_numbers.tolist(), when["memory"]
    if int(tokens.positions[0, 0]) == 0:
        memory.update({row: False for row in rows})
    since = on.cummax(1).values | torch.tensor([memory[row] for row in rows])[:, None]
    memory.update(dict(zip(rows, since[:, -1].tolist(), strict=True)))
    return since if when["scope"] == "so far" else since[:, -1:].expand_as(since)


@no_type_check
def counting(x, tokens, mask):
    """Whether a token counts, "batch pos". mask: the coder's "special", "skip_first" and "limit" of the norm; "loud":
    which tokens of the prompts exceed the limit without edits, "prompts pos", or None: the norm of x is compared."""
    keep = tokens.mask & counting_tokens(tokens.ids, tokens.positions, mask["special"], mask["skip_first"])
    if mask["limit"] is None:
        return keep
    if mask["loud"] is None:
        return keep & (x.float().norm(dim=-1) <= mask["limit"]).to(keep.device)
    row, position, known = in_source(mask["loud"], tokens.row_numbers[:, None], tokens.positions)
    return keep & ~(known & mask["loud"][row, position])


@no_type_check
def norms(x, tokens):
    """The norm of each token, "batch pos"."""
    return x.float().norm(dim=-1).cpu()


@no_type_check
def edited(x, tokens, *read, mask, places, done, elsewhere, change):
    """x after a group of edits. read: with ``elsewhere``, the activations to encode, from another site; with
    mask["before"], next, the activations that decide which tokens count; then those of the edits' conditions. places:
    of each edit, see ``named``, and its "when", see ``holds``, with the number of its activations in read; done: the
    number of the group's first edits that were written before."""
    whens = [place["when"] for place in places]
    at = [named(tokens, place) for place in places]
    at = [h if w is None else h & holds(read[w["read"]], tokens, w) for h, w in zip(at, whens, strict=True)]
    if not any(bool(here.any()) for here in at[done:]):
        return x
    source = read[0] if elsewhere else x
    counts = counting(read[int(elsewhere)] if mask["before"] else source, tokens, mask)
    at = [here & counts for here in at]
    keep = torch.stack(at[done:]).any(0)
    if not bool(keep.any()):
        return x
    rows = tokens.row_numbers[keep.nonzero()[:, 0]]
    ids, positions = tokens.ids[keep], tokens.positions[keep]
    there = keep.to(x.device)
    out = x.clone()
    out[there] = change(x[there], source[there], ids, rows, positions, [here[keep] for here in at]).to(x)
    return out


@no_type_check
def inside(x, *read, tokens, edit):
    """``edited`` for a user's own trace, with the tokens as a setting."""
    return edit(x, tokens, *read)


@no_type_check
def coded(x, read, ids, rows, positions, at, *, plan, drop, done, parts):
    """x + W_dec·(z' - z), or with ``drop`` the reconstruction from z'.

    parts: for each edit its "columns" of z, its "rule", and its "error": None, or {"wrong", "there"}: another run's
    reconstruction error, "rows pos d_out", and which tokens have one. The first ``done`` parts are edits of earlier
    groups: if the coder reads at another site, its codes do not show what these edits have written.
    """
    with torch.no_grad():
        at_home(plan, x.device)
        read = read.float()
        codes = encode(plan, read)
        z = some(plan, codes)
        was = ruled(z, at[:done], rows, positions, parts[:done])
        new = ruled(was, at[done:], rows, positions, parts[done:])
        if drop:
            return decode(plan, codes, read, ids) + write_of(plan, new - z, read)
        out = x.float() + write_of(plan, new - was, read)
        if all(part["error"] is None for part in parts[done:]):
            return out
        ours = x.float() - decode(plan, codes, read, ids) - write_of(plan, was - z, read)
        return out + errors(ours, at[done:], rows, positions, parts[done:]) - ours


@no_type_check
def shifted(x, read, ids, rows, positions, at, *, plan, done, amounts):
    """x + W_dec·(sum of the edits' amounts): ``coded`` without codes, for edits that add the same to every token's
    codes. amounts: for each edit (columns, what it adds to them)."""
    at_home(plan, x.device)
    change = x.new_zeros(len(x), len(plan["W_some"]), dtype=torch.float32)
    for here, (columns, amount) in zip(at[done:], amounts, strict=True):
        change[:, columns] += here[:, None].to(x.device) * amount.to(change)
    with torch.no_grad():
        return x.float() + write_of(plan, change, read.float())


@no_type_check
def ruled(z, at, rows, positions, parts):
    """Codes after the rules, one after the other."""
    new = z.clone()
    for here, part in zip(at, parts, strict=True):
        on = here.to(z.device)
        some_rows = new[on]
        some_rows[:, part["columns"]] = part["rule"](some_rows[:, part["columns"]], rows[here], positions[here])
        new[on] = some_rows
    return new


@no_type_check
def errors(ours, at, rows, positions, parts):
    """The coder's reconstruction error ``ours``, replaced by another run's at the tokens for which the run has one."""
    new = ours.clone()
    for here, part in zip(at, parts, strict=True):
        if part["error"] is not None:
            wrong, there = part["error"]["wrong"], part["error"]["there"]
            row, position, known = in_source(there, rows[here], positions[here])
            known &= there[row, position]
            on = here.to(new.device)
            new[on] = torch.where(known[:, None].to(new.device), wrong[row, position].to(new), new[on])
    return new


@no_type_check
def projected(x, read, ids, rows, positions, at, *, basis):
    """x minus its projection onto the span of the orthonormal columns of basis, "d_out directions"."""
    q, x = basis.to(x.device), x.float()
    return x - (x @ q) @ q.T


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
def drawn(z, rows, positions, *, seen, draws):
    """Codes of reference tokens, "n features": a token's row and position fix its draw."""
    return seen[draws[(positions + 7919 * rows) % len(draws)]].to(z)


@no_type_check
def of_another_run(z, rows, positions, *, codes, keep):
    """The other run's codes, "rows pos features", at the tokens that keep marks, else z."""
    row, position, known = in_source(keep, rows, positions)
    there = known & keep[row, position]
    return torch.where(there[:, None].to(z.device), codes[row, position].to(z), z)


@no_type_check
def in_source(table, rows, positions):
    """For each token, its row and position in a table "rows pos" of another run (a single row serves all rows), and
    whether the table has that position."""
    row = torch.zeros_like(rows) if len(table) == 1 else rows
    return row, positions.clamp_max(table.shape[1] - 1), positions < table.shape[1]
