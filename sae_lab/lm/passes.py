"""One pass through a model, as functions that run inside a trace: here, or on a server that has torch alone.

They get nnsight's root envoy, plain tuples and tensors. As with the functions of ``saes.portable``, their source
travels: they may use torch and each other, and nothing else (``no_type_check`` keeps the tests' type checker from
wrapping them, which a source would not survive).
"""

from typing import no_type_check

import torch

# A place is (path of a module, "input" or "output", columns of the last axis as (start, stop), or None for all,
# factor, less, in place): the value of its site is the factor times what stands there, less the value of the site
# named ``less``.


@no_type_check
def first_tensor(value):
    """A module's main value: itself, or the first tensor of the tuple, list or mapping it comes in."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((v for v in value if isinstance(v, torch.Tensor)), None)
    return value if isinstance(value, torch.Tensor) else None


@no_type_check
def with_first(value, new):
    """The same tuple, list or mapping with another first tensor."""
    if isinstance(value, torch.Tensor):
        return new
    if isinstance(value, dict):
        name = next(name for name, v in value.items() if isinstance(v, torch.Tensor))
        return type(value)(**{**value, name: new})
    at = next(i for i, v in enumerate(value) if isinstance(v, torch.Tensor))
    parts = [*value[:at], new, *value[at + 1 :]]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


@no_type_check
def envoy_at(root, path):
    """nnsight's envoy of the module at ``path``, or the module itself in a model that is no envoy."""
    for name in path.split("."):
        # nnsight serves "output", "input" and the like on every envoy, and moves a module of that name (BERT's).
        moved = vars(root).get("E_" + name)
        root = moved if moved is not None else root[int(name)] if name.isdigit() else getattr(root, name)
    return root


@no_type_check
def read(root, place, length):
    """What stands at a place, "batch pos d"; length: tokens of a row. (Some models, OPT among them, make one axis of
    rows and tokens.)"""
    path, end, columns = place[:3]
    envoy = envoy_at(root, path)
    value = first_tensor(envoy.input if end == "input" else envoy.output)
    value = value.unflatten(0, (-1, length)) if value.dim() == 2 else value
    return value if columns is None else value[..., columns[0] : columns[1]]


@no_type_check
def write(root, place, new):
    """Put something else there, keeping the rest of its tuple or of its heads."""
    path, end, columns, _, _, in_place = place
    envoy = envoy_at(root, path)
    whole = envoy.input if end == "input" else envoy.output
    old = first_tensor(whole)
    new = new.to(old.dtype)
    new = new.flatten(0, 1) if old.dim() == 2 else new
    if in_place:
        old[..., slice(None) if columns is None else slice(columns[0], columns[1])] = new
        return
    if columns is not None:
        new = torch.cat([old[..., : columns[0]], new, old[..., columns[1] :]], dim=-1)
    if end == "input":
        envoy.input = new
    else:
        envoy.output = with_first(whole, new)


@no_type_check
def value_of(x, place, held):
    """The value of a site from what stands at its place."""
    x = x if place[3] == 1.0 else place[3] * x
    return x if place[4] is None else x - held[place[4]].to(x)


@no_type_check
def put(root, place, there, value, new):
    """Give a site a new value, where its place holds ``there``. A value that is no tensor of the model changes what
    stands there by its own change, so that no change leaves it as it is, to the bit."""
    if place[3] == 1.0 and place[4] is None:
        write(root, place, new)
    else:
        write(root, place, there + ((new.to(value) - value) / place[3]).to(there))


@no_type_check
def through(root, steps, tokens, found):
    """Reads and writes in the order in which the model computes their sites.

    steps: (name, place, after) for a read, after(x, tokens) being what is found under that name, or None where only
    another step needs it; (name, place, fn, reads) for a write, fn(x, tokens, *activations at reads).
    """
    held = {}
    for step in steps:
        place = step[1]
        there = read(root, place, tokens.ids.shape[1])
        x = value_of(there, place, held)
        if len(step) > 3:
            _, _, fn, reads = step
            put(root, place, there, x, fn(x, tokens, *[held[name] for name in reads]))
        else:
            name, _, after = step
            # A copy: models change tensors in place, Falcon what its MLP gave.
            held[name] = x.to(torch.float32, copy=True)
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
def last(x, tokens):
    """The last position, "batch d" float32 on the CPU."""
    return x[:, -1].float().cpu()


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
    paths of the modules on it, norms or linear maps."""
    logits = linear(envoy_at(root, head), before_head(root, x, w_o, way))
    return logits if of is None else of(logits)


@no_type_check
def before_head(root, x, w_o, way):
    """Directions as they stand in front of W_U, but for the norms' divisions."""
    if w_o is not None:
        path, width, columns = w_o
        full = torch.zeros(len(x), width)
        full[:, slice(None) if columns is None else slice(columns[0], columns[1])] = x.cpu()
        x = linear(envoy_at(root, path), full)
    for path in way:
        x = past(envoy_at(root, path), x)
    return x


@no_type_check
def called(module, x):
    """A module's answers to rows, in float32 on the CPU. (It takes them on its own device, in its own precision.)"""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        x = x.to(weight if weight.is_floating_point() else weight.device)
    return first_tensor(module(x.unsqueeze(0)))[0].float().cpu()


@no_type_check
def linear(module, x):
    """What a linear module does to directions: without its bias."""
    bias = called(module, torch.zeros_like(x[:1]))
    return called(module, x) - bias if bool(bias.any()) else called(module, x)


@no_type_check
def past(module, x):
    """Directions as a module passes them on: a linear map as it is; of a norm its gain, and its centring where it
    centres, but not its division. Both are known by what they answer, whatever their class (Gemma's gain is 1+w)."""
    width = x.shape[-1]
    i = torch.arange(width)
    probe = (1.0 - 2.0 * (i % 2)) * (1.0 + (0.618 * i) % 1.0)  # of both signs, and no entry is small
    answers = called(module, torch.stack([probe, 2 * probe, probe + 3.0, torch.zeros(width)]))
    once, twice, moved = answers[:3] - answers[3]
    if bool((twice - 2 * once).norm() < 0.02 * once.norm()):
        return linear(module, x)
    if answers.shape[-1] != width or bool((twice - once).norm() > 0.02 * once.norm()):
        raise ValueError("a module between the last layer and the head is neither a norm nor linear")
    centres = bool((moved - once).norm() < 0.02 * once.norm())
    flat = probe - probe.mean() if centres else probe
    gain = once / (flat / flat.square().mean().sqrt())
    x = x.float().cpu()
    return (x - x.mean(-1, keepdim=True) if centres else x) * gain
