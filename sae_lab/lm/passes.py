"""One pass through a model, as functions that run inside a trace: here, or on a server that has torch alone.

They get nnsight's root envoy, plain tuples and tensors. As with the functions of ``saes.portable``, their source
travels: they may use torch and each other, and nothing else (``no_type_check`` keeps the tests' type checker from
wrapping them, which a source would not survive).
"""

from typing import no_type_check

import torch

# A point is (path of a module, "input" or "output", columns of the last axis as (start, stop), or None for all).


@no_type_check
def first_tensor(value):
    """A module's main value: itself, or the first tensor of the tuple it comes in."""
    if isinstance(value, (tuple, list)):
        return next((v for v in value if isinstance(v, torch.Tensor)), None)
    return value if isinstance(value, torch.Tensor) else None


@no_type_check
def envoy_at(root, path):
    """nnsight's envoy of the module at ``path``."""
    for name in path.split("."):
        root = root[int(name)] if name.isdigit() else getattr(root, name)
    return root


@no_type_check
def read(root, point):
    """The value at a point."""
    path, end, columns = point
    envoy = envoy_at(root, path)
    value = first_tensor(envoy.input if end == "input" else envoy.output)
    return value if columns is None else value[..., columns[0] : columns[1]]


@no_type_check
def write(root, point, new, in_place):
    """Replace the value at a point, keeping the rest of its tuple or of its heads."""
    path, end, columns = point
    envoy = envoy_at(root, path)
    whole = envoy.input if end == "input" else envoy.output
    old = first_tensor(whole)
    new = new.to(old.dtype)
    if in_place:
        old[..., slice(None) if columns is None else slice(columns[0], columns[1])] = new
        return
    if columns is not None:
        new = torch.cat([old[..., : columns[0]], new, old[..., columns[1] :]], dim=-1)
    if end == "input":
        envoy.input = new
    else:
        envoy.output = (new, *whole[1:]) if isinstance(whole, tuple) else new


@no_type_check
def through(root, steps, tokens, found):
    """Reads and writes in the order in which the model computes their sites.

    steps: (name, point, after) for a read, after(x, tokens) being what is found under that name, or None where only a
    write needs it; (name, point, fn, reads, in_place) for a write, fn(x, tokens, *activations at reads).
    """
    copies, held = any(len(step) > 3 for step in steps), {}
    for step in steps:
        x = read(root, step[1])
        if len(step) > 3:
            _, point, fn, reads, in_place = step
            write(root, point, fn(x, tokens, *[held[name] for name in reads]), in_place)
        else:
            name, _, after = step
            held[name] = x.float().clone() if copies else x.float()
            if after is not None:
                found[name] = after(held[name], tokens)


# ---- what is done with activations or logits where they are: (x "batch pos d", tokens) -> what is kept


@no_type_check
def whole(x, tokens):
    """All of it."""
    return x


@no_type_check
def real(x, tokens):
    """The rows of real tokens, "tokens d", without padding."""
    return x[tokens.mask.to(x.device)]


@no_type_check
def counting_tokens(ids, positions, special, skip_first):
    """The part of a TokenMask that needs no activations: True at tokens that are not special, nor first."""
    keep = torch.ones_like(ids, dtype=torch.bool)
    if special:
        keep &= ~torch.isin(ids, torch.tensor(special, device=ids.device))
    return keep & (positions != 0) if skip_first else keep


@no_type_check
def packed(x, tokens, special, skip_first, limit, scale):
    """The rows of real tokens that count, as a store keeps them, x/scale in half precision (in full where that has no
    room), and "keep": which of the real tokens they are."""
    rows = x[tokens.mask.to(x.device)].float()
    ids, positions = tokens.ids[tokens.mask], tokens.positions[tokens.mask]
    keep = counting_tokens(ids, positions, special, skip_first)
    norms = rows.norm(dim=-1)
    keep &= ~((norms > limit) & norms.isfinite()).cpu()  # what is not finite stays, to be found
    kept = rows[keep.to(x.device)]
    fits = bool((kept.abs() <= 6e4 * scale).all())
    return {"keep": keep, "x": ((kept / scale).half() if fits else kept).cpu()}


@no_type_check
def token_losses(logits, tokens):
    """Loss of each token given the ones before it, nats, "batch pos"; NaN at position 0 and padding."""
    losses = torch.full(tokens.ids.shape, float("nan"))
    targets = tokens.ids[:, 1:, None].to(logits.device)
    for row in range(len(losses)):  # a copy of all would cost more
        scores = logits[row, :-1].float()
        losses[row, 1:] = (scores.logsumexp(-1) - scores.gather(-1, targets[row])[:, 0]).cpu()
    return losses.masked_fill(~tokens.mask.cpu(), float("nan"))


@no_type_check
def pick(logits, temperature, generator):
    """The next token of each row, "batch 1": the likeliest at temperature 0, else a sample."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


@no_type_check
def slope(logits, tokens, there, metric):
    """The gradient of the metric, summed over rows, by an earlier activation."""
    return torch.autograd.grad(metric(logits.float(), tokens).sum(), [there])[0].float()


# ---- the way in and out: (root envoy, settings) -> tensors


@no_type_check
def embedded(root, ids, path, size):
    """Input embeddings of ids, centred on the mean over all of them."""
    embed, total = envoy_at(root, path), 0.0
    for part in torch.arange(size).split(8192):
        total = total + embed(part).double().sum(0)
    return (embed(ids).double() - total / size).float().cpu()


@no_type_check
def lens(root, x, w_o, way, head, of):
    """Logits of directions x, or what ``of`` makes of them. w_o: (path, whole width, columns of x in it), or None. way:
    the norms on it, as (path, whether it centres)."""
    if w_o is not None:
        path, width, columns = w_o
        full = torch.zeros(len(x), width)
        full[:, slice(None) if columns is None else slice(columns[0], columns[1])] = x
        x = linear(envoy_at(root, path), full)
    for path, centres in way:
        x = (x - x.mean(-1, keepdim=True) if centres else x) * gain(envoy_at(root, path), x.shape[-1], centres)
    logits = linear(envoy_at(root, head), x)
    return logits if of is None else of(logits)


@no_type_check
def linear(module, x):
    """What a linear module does to directions: without its bias."""
    return (module(x) - module(torch.zeros_like(x[:1]))).float().cpu()


@no_type_check
def gain(norm, width, centres):
    """A norm's gain, however its class keeps it (Gemma's is 1+w): from its answer to one vector and to zero."""
    probe = 1.0 - 2.0 * (torch.arange(width) % 2)
    passed = probe - probe.mean() if centres else probe
    passed = passed / passed.square().mean().sqrt()
    rows = torch.stack([probe, torch.zeros(width)]).unsqueeze(0)
    answers = norm(rows)[0].float().cpu()
    return (answers[0] - answers[1]) / passed
