"""LM: a causal language model on this machine, read and changed through nnsight traces."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.lm import bundled, tokens
from sae_lab.lm import site as sites
from sae_lab.lm.comparing import Comparison, compared
from sae_lab.lm.tokens import Prompts, Token
from sae_lab.types import Site, TokenBatch, TokenMask, Write, as_sites


class Reading(dict[Site, Tensor]):
    """Activations by site, each ``batch pos d`` float32, with the token batch they belong to.

    ``reading["blocks.8.hook_resid_post"]`` finds the site in any spelling.
    """

    def __init__(self, acts: dict[Site, Tensor], batch: TokenBatch):
        super().__init__(acts)
        self.batch = batch
        self.mask = batch.mask
        self.ids = batch.ids

    def __getitem__(self, key: Site | str) -> Tensor:
        return super().__getitem__(Site.of(key))


class LM:
    """A causal language model.

    ``LM()`` is the bundled SmolLM2-135M-Instruct; ``LM(x)`` a hub id, a folder, or a loaded transformers model (then
    pass its ``tokenizer``).

    Args:
        prefix: what stands at position 0 of every text: "auto" (the tokenizer's BOS, else EOS), None, or a token id.
        device: "auto" (cuda, mps, cpu) or a torch device.
        dtype: torch dtype of the weights; None is float32 on a CPU and the checkpoint's own elsewhere.
        **kwargs: to transformers' ``from_pretrained`` (``device_map``, ``quantization_config``, ``revision``...).

    Every public call holds one lock, since nnsight is not thread-safe; generation lets go of it between tokens.
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        *,
        tokenizer: Any = None,
        prefix: str | int | None = "auto",
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        from nnsight import TransformersModel

        if kwargs.get("trust_remote_code"):
            raise ValueError("trust_remote_code is never on in sae_lab: load the model yourself, pass LM(model, ...)")
        if model is None and prefix == "auto":
            prefix = bundled.PREFIX_ID
        module, tokenizer, self.id = _load(model, tokenizer, device, dtype, kwargs)
        self.tokenizer = tokenizer
        self.prefix_id = tokens.prefix_id(tokenizer, prefix)
        self._nn = TransformersModel(module, task="text-generation", tokenizer=tokenizer)
        self._module: Any = module.eval()
        self._lock = threading.RLock()
        self._sites = sites.SiteMap(module)

    # ---- what it is

    @property
    def device(self) -> torch.device:
        return next(self._module.parameters()).device

    @property
    def n_layers(self) -> int:
        return self._sites.n_layers

    @property
    def kinds(self) -> list[str]:
        """The kinds of site this model has."""
        return list(self._sites.kinds)

    @property
    def max_length(self) -> int:
        """The longest prompt in tokens, prefix included."""
        return getattr(self._module.config.get_text_config(), "max_position_embeddings", 2**31)

    def width(self, site: Site | str) -> int:
        """The width d of the activations at a site."""
        return self._sites.width(Site.of(site))

    def mask(self) -> TokenMask:
        """The mask that needs no data: special ids anywhere and position 0."""
        return TokenMask(tuple(sorted(self.tokenizer.all_special_ids)))

    def fingerprint(self) -> str:
        """A hash that changes when any weight does: bit sums of all parameters, and samples for their order."""
        digest = hashlib.sha256()
        for name, p in self._module.state_dict().items():
            flat = p.detach().contiguous().reshape(-1).view(torch.uint8)
            flat = flat.clone() if flat.storage_offset() % 4 else flat  # int32 needs its alignment
            whole, rest = flat[: len(flat) // 4 * 4].view(torch.int32), flat[len(flat) // 4 * 4 :]
            sample = torch.cat([flat[:: max(1, len(flat) // 4096)], rest]).cpu().numpy().tobytes()
            digest.update(f"{name} {tuple(p.shape)} {p.dtype} {whole.sum(dtype=torch.int64).item()}".encode() + sample)
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        prefix = "none" if self.prefix_id is None else repr(self.tokenizer.decode([self.prefix_id]))
        return f"LM({self.id!r}, layers={self.n_layers}, prefix={prefix}, device='{self.device}')"

    # ---- text

    def tokenize(self, prompts: Prompts) -> TokenBatch:
        """Prompts (str, list of str, token ids, or chat messages) as right-padded token ids.

        Text gets the prefix token at position 0; token ids and chats stand as they are (a chat's template begins it).
        """
        batch = tokens.tokenize(self.tokenizer, prompts, self.prefix_id)
        if (longest := batch.ids.shape[1]) > self.max_length:
            raise ValueError(
                f"a prompt has {longest} tokens and this model reads at most {self.max_length}: split or shorten it"
            )
        vocab = self._module.config.get_text_config().vocab_size
        low, high = int(batch.ids.min()), int(batch.ids.max())
        if not 0 <= low <= high < vocab:
            raise ValueError(f"token ids must lie in 0..{vocab - 1}, got {low}..{high}")
        return batch

    def tokens(self, prompt: Prompts) -> list[Token]:
        """One prompt's tokens, one a position: strings that join to the text, with ``.id``, ``.start``, ``.end``.

        A token that holds only part of a character's bytes is "" (the one that completes it holds the character), and
        so is the prefix; ``.label`` is what to show for either.
        """
        ids = self.tokenize(prompt).ids
        if not tokens.is_single(prompt):
            raise ValueError(f"lm.tokens takes one prompt, got a list of {len(ids)}: call it for each")
        ids = ids[0].tolist()
        return self.token_strings(ids, prefixed=isinstance(prompt, str) and self.prefix_id is not None)

    def token_strings(self, ids: Sequence[int], prefixed: bool = False) -> list[Token]:
        """Token ids as ``Token`` strings; ``prefixed`` says that the first one is no part of the text."""
        return tokens.spans(self.tokenizer, ids, prefixed)

    # ---- running

    def run(
        self,
        batch: TokenBatch,
        reads: Iterable[Site] = (),
        writes: Iterable[Write] = (),
        logits: bool = True,
        past: Any = None,
    ) -> tuple[dict[Site, Tensor], Tensor | None]:
        """One trace over a token batch: activations at ``reads`` (after the writes there) and, if asked, logits.

        Without ``logits`` the model stops at its deepest site. Right padding needs no attention mask: a causal model's
        real tokens never see what stands behind them. With ``past`` (a transformers cache) the batch holds only the
        new tokens and only the last position's logits come back.
        """
        import nnsight

        reads, writes = list(reads), list(writes)
        needed = list(dict.fromkeys(s for w in writes for s in w.reads))
        stops = {s: self._sites.point(s) for s in [*reads, *needed, *(w.site for w in writes)]}
        self._require_before(writes)
        # Two sites can share one place (all heads, one head): first its writes, in the order given, then its reads.
        steps: list[tuple[Site, Write | None]] = [(w.site, w) for w in writes]
        steps += [(s, None) for s in {*reads, *needed}]
        steps.sort(key=lambda step: (self._sites.when(step[0]), step[1] is None))
        inputs: dict[str, Any] = {"input_ids": batch.ids.to(self.device)}
        if past is None:
            inputs["use_cache"] = False
        else:
            inputs |= {"past_key_values": past, "use_cache": True, "logits_to_keep": 1}
        out = None
        with self._lock, torch.no_grad(), self._nn.trace(inputs) as tracer:
            acts = nnsight.save({})
            held = {}
            for s, write in steps:
                x = sites.read(self._nn, stops[s])
                if write is None:
                    held[s] = x.float().clone() if writes else x.float()
                    if s in reads:
                        acts[s] = held[s]
                else:
                    # The stream in mid-block has been kept for the skip connection before the norm sees it.
                    new = write.fn(x, batch, *(held[r] for r in write.reads))
                    sites.write(self._nn, stops[s], new, in_place=s.kind == "resid_mid")
            if logits:
                out = nnsight.save(self._nn.output.logits)
            else:
                tracer.stop()
        return dict(acts), out

    def gradient(
        self, batch: TokenBatch, site: Site, metric: Callable[[Tensor], Tensor], x: Float[Tensor, "batch pos d"]
    ) -> Float[Tensor, "batch pos d"]:
        """The gradient of ``metric(logits)``, summed, by the activations at a site, where x stands there."""
        import nnsight

        point = self._sites.point(site)
        inputs = {"input_ids": batch.ids.to(self.device), "use_cache": False}
        with self._lock, torch.enable_grad(), self._nn.trace(inputs):
            here = sites.read(self._nn, point)
            there = x.detach().to(here.device, here.dtype).requires_grad_(True)
            # A copy, for the stream in mid-block is written in place, and a leaf that wants its gradient may not be.
            sites.write(self._nn, point, there.clone(), in_place=site.kind == "resid_mid")
            value = metric(self._nn.output.logits.float()).sum()
            found = nnsight.save(torch.autograd.grad(value, [there])[0])
        return found.float()

    def _require_before(self, writes: list[Write]) -> None:
        """What a write reads must have happened."""
        for w in writes:
            for s in w.reads:
                if self._sites.when(s) >= self._sites.when(w.site):
                    raise ValueError(
                        f"an edit that reads {s} cannot change {w.site}, which the model computes before: set the "
                        "coder's reads and writes to the sites it was trained on"
                    )

    def read(self, prompts: Prompts, at: Site | str | Iterable[Site | str], edits: Iterable[Any] = ()) -> Reading:
        """Activations ``{site: (batch, pos, d) float32}``, right-padded, with ``.mask``; zeros at padding."""
        batch = self.tokenize(prompts)
        acts, _ = self.run(batch, as_sites(at), self._writes(edits, batch), logits=False)
        pad = ~batch.mask.unsqueeze(-1)
        return Reading({s: x.masked_fill(pad.to(x.device), 0.0) for s, x in acts.items()}, batch)

    def logits(self, prompts: Prompts, edits: Iterable[Any] = ()) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits, float32, right-padded (rows end where ``lm.tokenize(prompts).mask`` does)."""
        batch = self.tokenize(prompts)
        _, out = self.run(batch, writes=self._writes(edits, batch))
        assert out is not None
        return out.float()

    def loss(self, prompts: Prompts, edits: Iterable[Any] = (), per_token: bool = False) -> Tensor:
        """Cross-entropy of the next token in nats/token: the mean, or with ``per_token`` a tensor ``batch pos``.

        ``per_token[b, p]`` is the loss of token p given the ones before it: NaN at position 0 and at padding.
        """
        batch = self.tokenize(prompts)
        _, out = self.run(batch, writes=self._writes(edits, batch))
        assert out is not None
        losses = token_losses(out, batch)
        if not per_token and bool(losses.isnan().all()):
            raise ValueError("a loss needs at least two tokens (one given, one predicted); this text has one")
        return losses if per_token else losses.nanmean()

    def generate(
        self,
        prompts: Prompts,
        edits: Iterable[Any] = (),
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str | list[str]:
        """The prompts continued: a str for one prompt, else a list. temperature 0 is greedy; ``seed`` fixes sampling.

        Edits act at every position of the prompt and of what is generated. Rows of unequal length run one after the
        other, so that each gets what it gets alone.
        """
        batch, writes, generator = self._ready_to_generate(prompts, edits, max_new_tokens, temperature, seed)
        texts = [""] * len(batch.ids)
        lengths = batch.mask.sum(1)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            ids = batch.ids[rows, :length].tolist()
            for new in self._continue(batch.ids[rows, :length], rows, writes, max_new_tokens, temperature, generator):
                for row, token in zip(ids, new, strict=True):
                    row += [] if token is None else [token]
            for row, row_ids in zip(rows.tolist(), ids, strict=True):
                texts[row] = self.tokenizer.decode(row_ids, skip_special_tokens=True)
        return texts[0] if tokens.is_single(prompts) else texts

    def stream(
        self,
        prompt: Prompts,
        edits: Iterable[Any] = (),
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """What ``generate`` adds to one prompt, piece by piece as tokens come; together the pieces are its text.

        Stop whenever you like: ``break``, or ``.close()``. A piece is "" while a character's bytes are incomplete.
        """
        if not tokens.is_single(prompt):
            raise ValueError("lm.stream takes one prompt, got several: call it for each, or lm.generate for all")
        batch, writes, generator = self._ready_to_generate(prompt, edits, max_new_tokens, temperature, seed)
        return self._pieces(batch, writes, max_new_tokens, temperature, generator)

    def _pieces(self, batch: TokenBatch, writes: list[Write], new: int, temperature: float, generator: Any):
        ids = batch.ids[0].tolist()
        said = self.tokenizer.decode(ids, skip_special_tokens=True)
        for [token] in self._continue(batch.ids, torch.zeros(1, dtype=torch.long), writes, new, temperature, generator):
            if token is not None:
                ids.append(token)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            whole = text if token is None else text.rstrip("\ufffd")  # which stands for bytes that wait for the rest
            yield whole[len(said) :]
            said = said if len(whole) < len(said) else whole
        if rest := self.tokenizer.decode(ids, skip_special_tokens=True)[len(said) :]:
            yield rest

    def _ready_to_generate(
        self, prompts: Prompts, edits: Iterable[Any], new: int, temperature: float, seed: int | None
    ) -> tuple[TokenBatch, list[Write], torch.Generator | None]:
        if new < 1 or not temperature >= 0:
            raise ValueError(f"generate needs max_new_tokens >= 1 and temperature >= 0, got {new} and {temperature}")
        batch = self.tokenize(prompts)
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        return batch, self._writes(edits, batch, new), generator

    def _continue(
        self, ids: Tensor, rows: Tensor, writes: list[Write], new: int, temperature: float,
        generator: torch.Generator | None,
    ) -> Iterator[list[int | None]]:  # fmt: skip
        """The next token of each row, again and again, with a key-value cache; None for a row that has met the model's
        end token. rows: the numbers of these rows among the user's prompts."""
        from transformers import DynamicCache

        past = DynamicCache(config=self._module.config)
        ends = _end_ids(self._module, self.tokenizer)
        done = torch.zeros(len(ids), dtype=torch.bool)
        step = ids
        for number in range(min(new, self.max_length - ids.shape[1])):
            start = past.get_seq_length()
            positions = torch.arange(start, start + step.shape[1]).expand_as(step)
            real = torch.ones_like(step, dtype=torch.bool)
            part = TokenBatch(step, real, positions, rows=rows, step=number)
            _, out = self.run(part, writes=writes, past=past)
            assert out is not None
            step = _pick(out[:, -1].float().cpu(), temperature, generator)
            done |= torch.tensor([token in ends for token in step.flatten().tolist()])
            if bool(done.all()):
                return
            yield [None if end else token for token, end in zip(step.flatten().tolist(), done.tolist(), strict=True)]

    def compare(self, prompt: Prompts, edits: Iterable[Any]) -> Comparison:
        """One prompt without and with the edits, token by token: KL of the next token, log-probabilities, the edited
        features' own activations, perplexity."""
        if not tokens.is_single(prompt):
            raise ValueError("lm.compare takes one prompt, got several: call it for each")
        edits = list(edits)
        batch = self.tokenize(prompt)
        reads = list(dict.fromkeys(edit.read_site for edit in edits))
        before, clean = self.run(batch, reads)
        after, edited = self.run(batch, reads, self._writes(edits, batch))
        assert clean is not None and edited is not None
        measured: dict[str, tuple[Tensor, Tensor]] = {}
        for edit in edits:
            was, now = edit.measured(before[edit.read_site]), edit.measured(after[edit.read_site])
            measured |= {name: (codes[0], now[name][0]) for name, codes in was.items()}
        return compared(self.tokens(prompt), batch.ids[0], clean[0], edited[0], measured, self.tokenizer)

    def _writes(self, edits: Iterable[Any], batch: TokenBatch, new: int = 0) -> list[Write]:
        return [w for edit in edits for w in edit.writes(self, batch, new)]

    # ---- the way in and out

    @torch.no_grad()
    def embedding(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Input embeddings of token ids, float32 on the CPU, centred on the mean over the vocabulary."""
        table = self._module.get_input_embeddings().weight.float()
        return (table[ids.to(table.device)] - table.mean(0)).cpu()

    def lens(self, directions: Float[Tensor, "n d"], at: Site | str) -> Float[Tensor, "n vocab"] | None:
        """Logit lens of directions written at a site: W_dec·diag(gain)·W_U, arbitrary units; None where a site's
        directions are not written to the residual stream (``mlp_in``, unknown modules).

        At ``attn_z`` the directions first go through W_O (and the norm that some models have behind it). The gain is
        the final norm's (1+w for Gemma); directions are centred where that norm centres.
        """
        site = Site.of(at)
        x = directions.to(self.device, torch.float32)
        if site.kind == "attn_z":
            output: Any = self._sites.modules[str(self._sites.w_o[site.layer or 0])]
            w_o = output.weight.T if isinstance(output, nn.Linear) else output.weight  # GPT-2 stores d_in first
            x = x @ w_o[self._sites.point(site).columns].float()
            x = _through_norm(self._sites.after_attention(site.layer or 0), x)
        elif site.kind in ("mlp_in", "module"):
            return None
        x = _through_norm(self._sites.modules.get(str(self._sites.final_norm)), x)
        return (x @ self._module.get_output_embeddings().weight.float().T).detach().cpu()


def _through_norm(norm: Any, x: Tensor) -> Tensor:
    """Directions as a norm passes them on, up to its division: centred where it centres, times its gain."""
    if norm is None:
        return x
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
        return x if norm.weight is None else x * norm.weight.float()
    # An RMS norm's answer to ones is its gain, however the class keeps it (Gemma's is 1+w).
    weight = next(norm.parameters(), x)
    return x * norm(torch.ones(1, 1, x.shape[-1], dtype=weight.dtype, device=weight.device)).flatten().float()


def token_losses(logits: Tensor, batch: TokenBatch) -> Float[Tensor, "batch pos"]:
    """Loss of each token given the ones before it, nats; NaN at position 0 and padding."""
    losses = torch.full(batch.ids.shape, float("nan"))
    targets = batch.ids[:, 1:, None].to(logits.device)
    for row, (scores, target) in enumerate(zip(logits[:, :-1], targets, strict=True)):  # a copy of all would cost more
        scores = scores.float()
        losses[row, 1:] = (scores.logsumexp(-1) - scores.gather(-1, target)[:, 0]).cpu()
    return losses.masked_fill(~batch.mask.cpu(), float("nan"))


def _pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row, ``batch 1``: the likeliest at temperature 0, else a sample."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


def _end_ids(module: nn.Module, tokenizer: Any) -> set[int]:
    ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return {e for e in (ends if isinstance(ends, list) else [ends]) if e is not None}


@contextmanager
def _quiet_if(quiet: bool) -> Iterator[None]:
    """Without transformers' progress bar, which says nothing about a model that loads in a second."""
    from transformers.utils import logging

    if not quiet or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _load(model: str | nn.Module | None, tokenizer: Any, device: Any, dtype: Any, kwargs: dict[str, Any]):
    """(module, tokenizer, id) of whatever the user named."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(model, nn.Module):
        if kwargs or dtype is not None:
            raise ValueError(
                "a loaded model comes as it is: dtype and from_pretrained's arguments need an id or folder"
            )
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        if tokenizer is None:
            raise ValueError(
                "LM(module) needs its tokenizer: sl.LM(module, tokenizer=AutoTokenizer.from_pretrained(id))"
            )
        return (model if device == "auto" else model.to(device)), tokenizer, name
    source = bundled.folder() if model is None else str(model)
    if Path(source).expanduser().exists():
        source = str(Path(source).expanduser())
        if not (Path(source) / "config.json").is_file():
            raise ValueError(f"no model at {source!r}: pass a hub id, a folder with config.json, or a loaded model")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype is None:
        dtype = torch.float32 if str(device) == "cpu" else "auto"
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
        with _quiet_if(model is None):
            module = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs)
    except OSError as err:
        if model is not None:
            raise ValueError(
                f"no model at {source!r}: pass a hub id, a folder with config.json, or a loaded model ({err})"
            ) from err
        raise ValueError(
            f"the bundled model is not installed and {source} is out of reach: {bundled.PIP_LINE}"
        ) from err
    if "device_map" not in kwargs and "quantization_config" not in kwargs:
        module = module.to(device)
    return module, tokenizer, bundled.HUB_ID if model is None else source
