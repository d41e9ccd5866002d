"""LM: a causal language model, here or on an NDIF server, read and changed through nnsight traces."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.arguments import Count, as_annotated
from sae_lab.lm import bundled, generation, inside, loading, passes, text, tokens
from sae_lab.lm import site as sites
from sae_lab.lm.block import SUMMED, broken_sums
from sae_lab.lm.comparing import Comparison, compared
from sae_lab.lm.continuing import State, empty_state
from sae_lab.lm.network import Network, listed_edits
from sae_lab.lm.passes import through, token_losses
from sae_lab.lm.tokens import Prompts, Token
from sae_lab.types import Edits, Site, TokenBatch, TokenMask, Write, as_sites

CONTEXT = 128  # tokens of a context in which vectors are measured
LOGITS_BYTES = 1 << 30  # of logits made at a time by lm.logits and lm.loss


class Reading(dict[Site, Tensor]):
    """Activations by site, each ``batch pos d`` float32, with the token batch: ``ids``, ``mask``.

    ``reading["blocks.8.hook_resid_post"]``: a site in any spelling.
    """

    INSTEAD = "take a site's activations, reading[site]"

    def __init__(self, acts: dict[Site, Tensor], batch: TokenBatch):
        super().__init__(acts)
        self.batch = batch
        self.mask = batch.mask
        self.ids = batch.ids

    def __getitem__(self, key: Site | str) -> Tensor:
        return super().__getitem__(Site.of(key))


class LM(Network):
    """A causal language model.

    ``LM()`` is the bundled SmolLM2-135M-Instruct; ``LM(x)`` a hub id, a folder, or a loaded transformers model (then
    pass its ``tokenizer``).

    Args:
        prefix: the token at position 0 of every text: "auto" (the tokenizer's BOS, else EOS), None, or a token id.
        device: "auto" (cuda, mps, cpu) or a torch device.
        dtype: torch dtype of the weights; None is float32 on a CPU and the checkpoint's own elsewhere.
        remote: run on an NDIF server: True (the hosted NDIF, or the server here that ``NDIF_HOST`` names), or its
            address. The model is then named by its hub id, and no weights are loaded here.
        api_key: of the server; None: ``NDIF_API_KEY``. It is never printed, logged or saved.
        deadline: seconds after which a request to a server fails.
        **kwargs: for transformers' ``from_pretrained`` (``device_map``, ``quantization_config``, ``revision``...);
            with ``remote`` only ``revision``.

    Calls from several threads run one after the other, since nnsight is not thread-safe. Generation releases the lock
    between tokens; a call to a server releases it while it waits.

    With ``remote``, activations at padding are 0, dtype and hardware are the server's, and ``NDIFError`` reports what
    went wrong there.
    """

    IN_WORDS = "an LM"

    @as_annotated
    def __init__(
        self,
        model: str | nn.Module | None = None,
        *,
        tokenizer: Any = None,
        prefix: str | int | None = "auto",
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        remote: bool | str = False,
        api_key: str | None = None,
        deadline: float = 600.0,
        **kwargs: Any,
    ):
        from nnsight import TransformersModel

        if kwargs.get("trust_remote_code"):  # before the bundled model is converted or the hub asked
            raise ValueError("sae_lab never sets trust_remote_code: load the model yourself, pass LM(model, ...)")
        if model is None and prefix == "auto":
            prefix = bundled.PREFIX_ID
        self._server: Any = None
        if remote:
            from sae_lab.lm.remote import Server

            self._server = Server(remote, api_key, deadline)
            self._nn, self.tokenizer, self.id = loading.outline(model, tokenizer, device, dtype, kwargs)
        else:
            module, self.tokenizer, self.id = loading.load(model, tokenizer, device, dtype, kwargs)
            sites.require_decoder(module)
            # Not told where, it would move the model to the first GPU; a model over several devices is left there.
            where = {} if getattr(module, "hf_device_map", None) else {"device": module.device}
            self._nn = TransformersModel(
                module, task="text-generation", tokenizer=self.tokenizer, trust_remote_code=False, **where
            )
        self.prefix_id = tokens.prefix_id(self.tokenizer, prefix)
        module = self._nn._module
        self._module: Any = module.eval()
        self._lock = threading.RLock()
        self._sites = sites.SiteMap(module)
        self._checked: set[str] = set()  # kinds of site whose sums were seen to hold on the server

    @property
    def server(self) -> Any:
        """The server it runs on: address, deadline, and bytes ``sent`` and ``received``. None: it runs here."""
        return self._server

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
        longest = getattr(self._module.config.get_text_config(), "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest > 0 else 2**31  # XLNet's -1 means no limit

    @property
    def vocab_size(self) -> int:
        """The number of token ids that the model has embeddings of."""
        return self._module.config.get_text_config().vocab_size

    def mask(self) -> TokenMask:
        """The mask that needs no data: special ids anywhere and position 0."""
        return TokenMask(tuple(sorted(self.tokenizer.all_special_ids)))

    def __repr__(self) -> str:
        prefix = "none" if self.prefix_id is None else repr(self.tokenizer.decode([self.prefix_id]))
        where = f"remote={self._server.host!r}" if self._server else f"device='{self.device}'"
        return f"LM({self.id!r}, layers={self.n_layers}, prefix={prefix}, {where})"

    @as_annotated
    def tokenize(self, prompts: Prompts) -> TokenBatch:
        """Prompts (str, list of str, token ids, or chat messages) as right-padded token ids.

        A text gets the prefix token at position 0, unless it begins with that token's text; token ids and chats do not.
        """
        batch = tokens.tokenize(self.tokenizer, prompts, self.prefix_id)
        if (longest := batch.ids.shape[1]) > self.max_length:
            raise ValueError(
                f"a prompt has {longest} tokens and this model reads at most {self.max_length}: split or shorten it"
            )
        self._require_known(batch.ids)
        return batch

    def _batch(self, prompts: Prompts, at: Site | None = None) -> TokenBatch:
        return self.tokenize(prompts)

    def _passes(self, source: Any, site: Site) -> Iterator[TokenBatch]:
        source = text.as_text(text.load_text() if source is None else source)
        for contexts in source.passes(self.tokenizer, self.prefix_id, min(CONTEXT, self.max_length)):
            yield self.tokenize([c.ids for c in contexts])

    def _require_known(self, ids: Int[Tensor, "*tokens"]) -> None:
        """ValueError for ids without an embedding: on a GPU they would end the kernel."""
        vocab, low, high = self.vocab_size, int(ids.min()), int(ids.max())
        if not 0 <= low <= high < vocab:
            raise ValueError(
                f"token ids must lie in 0..{vocab - 1}, got {low}..{high} ({tokens.label(self.tokenizer, high)!r}): "
                "the tokenizer is another model's or has more tokens; take this model's own, or give the model room "
                "with model.resize_token_embeddings(len(tokenizer))"
            )

    @as_annotated
    def tokens(self, prompt: Prompts, answer: str = "") -> list[Token]:
        """One prompt's tokens, one per position: strings that join to the text, with ``.id``, ``.start``, ``.end``.
        answer: what the model said to a text or a chat; its tokens follow the prompt's.

        The prefix is "", and so is a token that ends within a character's bytes (the token that completes the character
        holds it); ``.label`` is what to show for either. The text is the tokenizer's: some tokenizers lowercase it, or
        replace unknown characters by <unk>.
        """
        ids = self.tokenize(tokens.answered(self.tokenizer, prompt, answer)).ids
        if not tokens.is_single(prompt):
            raise ValueError(f"lm.tokens takes one prompt, got a list of {len(ids)}: call it for each")
        return self.token_strings(ids[0].tolist(), tokens.prefixed(self.tokenizer, prompt, self.prefix_id))

    @cached_property
    def vocabulary(self) -> list[str]:
        """The text of every token id as it reads within a text. An id that only the model has reads ⟨id N⟩; part of
        a character reads as its bytes, ⟨E2 80⟩."""
        return tokens.vocabulary(self.tokenizer, max(self.vocab_size, len(self.tokenizer)))

    @cached_property
    def _reading(self) -> dict[str, list[int]]:
        """The token ids of each text of the vocabulary."""
        found: dict[str, list[int]] = {}
        for id, read in enumerate(self.vocabulary):
            found.setdefault(read, []).append(id)
        return found

    @as_annotated
    def token_strings(self, ids: Sequence[Count], prefixed: bool = False) -> list[Token]:
        """Token ids as ``Token`` strings. prefixed: whether the first is a prefix, no part of the text."""
        return tokens.spans(self.tokenizer, ids, prefixed)

    @as_annotated
    def run(
        self,
        batch: TokenBatch,
        reads: Iterable[Site] = (),
        writes: Iterable[Write] = (),
        logits: bool | Callable[..., Tensor] = True,
        past: Any = None,
        after: Callable[..., Any] | Mapping[Site, Callable[..., Any]] | None = None,
        form: Any = None,
        expected: int = 0,
    ) -> tuple[dict[Site, Any], Any]:
        """One pass over a token batch: (activations at ``reads``, after the writes there; logits or None).

        Right padding needs no attention mask: in a causal model real tokens never attend to later positions.

        Args:
            logits: True; False: the model stops at the deepest site; or a function (logits "batch pos vocab",
                tokens) -> what to return in their place.
            past: a ``continuing.State``: the batch then holds only the new tokens, and most models return the logits of
                the last position alone.
            after: a function (x "batch pos d", tokens) -> what to return in place of an activation, or one per site.
                Both functions run where the model runs, so that a server sends less.
            form: the form of what ``logits`` as a function, else ``after``, returns (one, or one per site): a server's
                answer is checked against it (``forms.has``).
            expected: bytes of that return value, if more than those of the activations and logits.
        """
        import nnsight

        reads, writes = list(reads), list(writes)
        self._require_known(batch.ids)
        if self._server:
            self._check_there([*reads, *(w.site for w in writes)])
        scattered = self._server is not None and after is None
        keep = passes.real if self._server else passes.whole
        steps = self._steps(reads, writes, after or keep)
        finish: Any = logits if callable(logits) else keep if logits else None
        inputs: dict[str, Any] = {"input_ids": batch.ids.to(self.device)}
        inputs |= {"use_cache": False} if past is None else past.inputs(batch.positions.to(self.device))
        nn, tokens, found = self._nn, batch.plain(), cast(dict[str, Any], {})
        backend = self._request(batch, reads, logits, after, form, expected) if self._server else None
        with self._lock, torch.no_grad(), nn.trace(inputs, backend=backend) as tracer:
            found = nnsight.save({})
            through(nn, steps, tokens, found)
            if finish is None:
                tracer.stop()
            else:
                found[""] = finish(nn.output.logits, tokens)
                if past is not None:
                    past.keep(nn.output)
        if backend is not None:
            found = backend.saved("found")
        acts, out = {s: found[s.key] for s in reads}, found.get("")
        if scattered:
            acts = {s: _padded(x, batch) for s, x in acts.items()}
        return acts, _padded(out, batch) if self._server and logits is True else out

    def _request(self, batch: TokenBatch, reads: list[Site], logits: Any, after: Any, form: Any, expected: int) -> Any:
        """The request of a pass, with the form and the size of its result."""
        many, made = int(batch.mask.sum()), None if callable(logits) else form
        forms: dict[str, Any] = {}
        for s in reads:
            forms[s.key] = made[s] if isinstance(made, Mapping) and s in made else made
            if after is None:
                forms[s.key] = Float[Tensor, f"{many} {self.width(s)}"]
        if logits:
            forms[""] = form if callable(logits) else Float[Tensor, f"{many} {self.vocab_size}"]
        whole = sum(self.width(s) for s in reads) + (self.vocab_size if logits else 0)
        return self._server.request(self._nn, forms, max(4 * batch.ids.numel() * whole, expected))

    def _steps(self, reads: Iterable[Site], writes: Iterable[Write], after: Any) -> list[Any]:
        """The steps of a pass, plain, in order."""
        if self._server:
            _require_travelling(writes)
        return [passes.plain(step) for _, step in self._in_order(reads, writes, after)]

    def _check_there(self, at: Iterable[Site]) -> None:
        """Before the first use of a sub-layer's output on a server, check in one request that the block's sums hold."""
        for site in at:
            if site.kind not in ("attn_out", "resid_mid", "mlp_out") or site.kind in self._checked:
                continue
            self._checked.add(site.kind)
            here = [Site(k, site.layer) for k in SUMMED if k in self._sites.layers[site.layer or 0].places]
            short = self.tokenize(((torch.arange(8)[None] * 7919 + 11) % self.vocab_size).tolist())
            with self._server.aside():
                found = self.run(short, here, logits=False)[0]
            x = {s.kind: values[0].float() for s, values in found.items()}
            halves = all(bool((v.bfloat16().float() == v).all()) for v in x.values())  # as the server computes
            for parts, whole in broken_sums(x, torch.bfloat16 if halves else torch.float32):
                if site.kind in parts[1:] or site.kind == whole:
                    self._checked.discard(site.kind)
                    raise ValueError(
                        f"on this server {' + '.join(parts)} of layer {site.layer} is not {whole}, so that {site} is "
                        "not what its name says: name a module's path"
                    )

    @as_annotated
    def gradient(
        self, batch: TokenBatch, site: Site, metric: Callable[..., Tensor], x: Float[Tensor, "batch pos d"]
    ) -> Float[Tensor, "batch pos d"]:
        """The gradient of ``metric(logits, tokens)``, summed over rows, with respect to a site's activations, at x."""
        import nnsight

        self._require_known(batch.ids)
        place = passes.plain(self._sites.place(site))
        if place.less:
            raise ValueError(f"{site} is a difference of two tensors in this model: there is no gradient of it")
        inputs = {"input_ids": batch.ids.to(self.device), "use_cache": False}
        nn, tokens, x, found = self._nn, batch.plain(), x.detach(), cast(Tensor, None)
        form = Float[Tensor, " ".join(map(str, x.shape))]
        backend = self._server.request(nn, form, 4 * x.numel()) if self._server else None
        read, value_of, put, slope = passes.read, passes.value_of, passes.put, passes.slope
        with self._lock, torch.enable_grad(), nn.trace(inputs, backend=backend):
            here = read(nn, place, tokens.ids.shape[1])
            there = x.to(here).requires_grad_(True)
            # A copy: the stream in mid-block is written in place, which torch forbids for a leaf with a gradient.
            put(nn, place, here, value_of(here, place, {}), there.clone())
            found = nnsight.save(slope(nn.output.logits, tokens, there, metric))
        return found if backend is None else backend.saved("found")

    @as_annotated
    def read(self, prompts: Prompts, at: Site | str | Iterable[Site | str], edits: Edits = ()) -> Reading:
        """Activations ``{site: (batch, pos, d) float32}``, right-padded, 0 at padding, with the prompts' ``.mask``."""
        batch = self.tokenize(prompts)
        acts, _ = self.run(batch, as_sites(at), self._writes(edits, batch), logits=False)
        pad = ~batch.mask.unsqueeze(-1)
        return Reading({s: x.masked_fill(pad.to(x.device), 0.0) for s, x in acts.items()}, batch)

    @as_annotated
    def logits(self, prompts: Prompts, edits: Edits = ()) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits, float32, right-padded (rows end where ``lm.tokenize(prompts).mask`` does)."""
        batch = self.tokenize(prompts)
        return self._in_parts(batch, self._writes(edits, batch), True, None).float()

    @as_annotated
    def loss(self, prompts: Prompts, edits: Edits = (), per_token: bool = False) -> Tensor:
        """Cross-entropy of the next token in nats/token: the mean, or with ``per_token`` a tensor ``batch pos``.

        ``per_token[b, p]`` is the loss of token p given the ones before it: NaN at position 0 and at padding.
        """
        batch = self.tokenize(prompts)
        form = Float[Tensor, " ".join(map(str, batch.ids.shape))]
        losses = self._in_parts(batch, self._writes(edits, batch), token_losses, form)
        if not per_token and bool(losses.isnan().all()):
            raise ValueError("a loss needs at least two tokens (one given, one predicted); this text has one")
        return losses if per_token else losses.nanmean()

    def _in_parts(self, batch: TokenBatch, writes: list[Write], logits: Any, form: Any) -> Tensor:
        """Logits, or what a function makes of them, for ``LOGITS_BYTES`` of logits at a time; on a server in one
        request."""
        rows = max(1, LOGITS_BYTES // (4 * batch.ids.shape[1] * self.vocab_size))
        if self._server or rows >= len(batch.ids):
            return self.run(batch, writes=writes, logits=logits, form=form)[1]
        found: Any = None
        for at in torch.arange(len(batch.ids)).split(rows):
            part = TokenBatch(batch.ids[at], batch.mask[at], batch.positions[at], rows=batch.row_numbers[at])
            out = self.run(part, writes=writes, logits=logits)[1]
            found = out.new_empty(len(batch.ids), *out.shape[1:]) if found is None else found
            found[at] = out
        return found

    @as_annotated
    def generate(
        self,
        prompts: Prompts,
        edits: Edits = (),
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str | list[str]:
        """The prompts continued: a str for one prompt, else a list. temperature 0 is greedy; ``seed`` fixes sampling.

        Edits act at every position of the prompt and of the generated text. Rows of unequal length run one after the
        other, so that each gets the same tokens as alone.
        """
        batch, writes, generator = self._ready_to_generate(prompts, edits, max_new_tokens, temperature, seed)
        ids = [row[:n] for row, n in zip(batch.ids.tolist(), batch.mask.sum(1).tolist(), strict=True)]
        for rows, new in generation.continued(self, batch, writes, max_new_tokens, temperature, generator):
            for row, token in zip(rows, new, strict=True):
                ids[row] += [] if token is None else [token]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        return texts[0] if tokens.is_single(prompts) else texts

    @as_annotated
    def stream(
        self,
        prompt: Prompts,
        edits: Edits = (),
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The text that ``generate`` adds to one prompt, token by token: ``for piece in lm.stream(prompt): ...``.
        ``break`` or ``.close()`` stops it. A piece is "" while a character's bytes are incomplete.
        """
        if not tokens.is_single(prompt):
            raise ValueError("lm.stream takes one prompt, got several: call it for each, or lm.generate for all")
        batch, writes, generator = self._ready_to_generate(prompt, edits, max_new_tokens, temperature, seed)
        return generation.pieces(self, batch, writes, max_new_tokens, temperature, generator)

    def _ready_to_generate(
        self, prompts: Prompts, edits: Edits, new: int, temperature: float, seed: int | None
    ) -> tuple[TokenBatch, list[Write], torch.Generator | None]:
        if new < 1 or not temperature >= 0:
            raise ValueError(f"generate needs max_new_tokens >= 1 and temperature >= 0, got {new} and {temperature}")
        batch = self.tokenize(prompts)
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        return batch, self._writes(edits, batch, new), generator

    @cached_property
    def _empty_state(self) -> State | None:
        return empty_state(self._module, self.device)

    @as_annotated
    def edited(self, edits: Edits) -> AbstractContextManager[nn.Module]:
        """``with lm.edited([sl.Steer(sae, 7)]) as module: ...``: the transformers module with the edits inside, for
        tools that run it themselves: ``module(**inputs)``, ``module.generate``, lm-eval, a trainer.

        Positions are read from ``input_ids`` and ``attention_mask``, rows padded on the right; a cache is followed from
        the prompt on. In the block, calls of ``lm`` itself have their own edits and not these. A gradient takes what an
        edit adds as a constant. Raises ValueError for edits that name rows or steps, for a model on a server, and in
        the pass for inputs_embeds, other padding, and a cache of prompts that did not run in the block.
        """
        return inside.edited(self, listed_edits(edits))

    @as_annotated
    def compare(self, prompt: Prompts, edits: Edits, answer: str = "") -> Comparison:
        """One prompt without and with the edits, token by token: KL of the next-token distributions, log-probabilities,
        the edited features' activations, perplexity. answer: what the model said to a text or a chat, as ``lm.stream``
        gives it; it is compared too."""
        if not tokens.is_single(prompt):
            raise ValueError("lm.compare takes one prompt, got several: call it for each")
        found = listed_edits(edits)
        batch = self.tokenize(tokens.answered(self.tokenizer, prompt, answer))
        reads = list(dict.fromkeys(edit.read_site for edit in found))
        before, clean = self.run(batch, reads)
        after, edited = self.run(batch, reads, self._writes(found, batch))
        measured: dict[str, tuple[Tensor, Tensor]] = {}
        for edit in found:
            was, now = edit.measured(before[edit.read_site]), edit.measured(after[edit.read_site])
            measured |= {name: (codes[0], now[name][0]) for name, codes in was.items()}
        return compared(self.tokens(prompt, answer), batch, clean, edited, measured, self.tokenizer)

    @as_annotated
    def submit(self, method: str, *args: Any, job: str | None = None, **kwargs: Any) -> Any:
        """Start a call on the server and return at once: ``job = lm.submit("logits", prompts)``, then ``job.status``
        and ``job.result()``.

        Args:
            method: "read", "logits", "loss" or "generate", which are one request each; then its arguments.
            job: the id of a job sent before, even by a kernel that has died: the same call with that id gets the job's
                result, and sends nothing.
        """
        from sae_lab.lm.remote import Job

        if self._server is None:
            raise ValueError("lm.submit is for a model on a server, LM(..., remote=True): here, call the method itself")
        if method not in ("read", "logits", "loss", "generate"):
            raise ValueError(f"lm.submit takes read, logits, loss or generate, which are one request, got {method!r}")
        return Job(method, partial(getattr(self, method), *args, **kwargs), self._server, job)

    @as_annotated
    @torch.no_grad()
    def embedding(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Input embeddings of token ids, float32 on the CPU, centred on the mean over the vocabulary."""
        if self._server:
            path = self._sites.path_of(self._module.get_input_embeddings())
            d = self.width("embed")
            form = Float[Tensor, f"{len(ids)} {d}"]
            return self._there(passes.embedded, form, 4 * len(ids) * d, ids=ids, path=path, size=self.vocab_size)
        table = self._module.get_input_embeddings().weight.float()
        return (table[ids.to(table.device)] - table.mean(0)).cpu()

    @as_annotated
    def lens(self, directions: Float[Tensor, "n d"], at: Site | str, of: Callable[[Tensor], Any] | None = None) -> Any:
        """Logit lens of directions written at a site: W_dec·diag(gain)·W_U, "n vocab", arbitrary units; None for a site
        that does not write to the residual stream (``mlp_in``, unknown modules).

        At ``attn_z`` the directions first go through W_O (and the norm that some models have after it). The gain is
        the final norm's (1+w for Gemma); directions are centred if that norm centres.

        of: a function of the logits, whose value is returned; it runs where the model runs. None: the logits.
        """
        site = Site.of(at)
        way = self._way(site)
        if way is None:
            return None
        x = directions.detach().float().cpu()
        if self._server:
            form = Float[Tensor, f"{len(x)} {self.vocab_size}"] if of is None else None
            return self._there(passes.lens, form, 4 * len(x) * self.vocab_size, x=x, of=of, **way)
        with self._lock, torch.no_grad():
            return passes.lens(self._module, x=x, of=of, **way)

    def _way(self, site: Site) -> dict[str, Any] | None:
        """The modules between a site and the logits, without the later layers, as ``passes.lens`` takes them; None if
        the site does not write to the residual stream, or a module on the way is neither a norm nor a linear map."""
        at = self._sites
        if site.kind in ("mlp_in", "module") or not self._has_a_way_out:
            return None
        width = at.width(site)  # ValueError where the model has none
        if site.kind == "embed" and width != at.width(Site("resid_post", 0)):
            return None  # a map to the stream's width lies between (OPT 350m)
        way, w_o = list(at.way_out or []), None
        if site.kind == "attn_z":
            block = at.layers[site.layer or 0]
            if block.w_o_factor is None:
                return None  # attention's output is added to the stream, and one norm reads the sum
            w_o = block.w_o, at.width(Site("attn_z", site.layer)), at.place(site).columns
            way = [block.after_attention] * bool(block.after_attention) + way
        return {"w_o": w_o, "way": way, "head": at.path_of(self._module.get_output_embeddings())}

    @cached_property
    def _has_a_way_out(self) -> bool:
        """Whether only norms and linear maps lie between the last layer and the logits."""
        way = self._sites.way_out
        if way is None or self._server:
            return way is not None
        width = self._sites.width(Site("resid_post", self.n_layers - 1))
        try:
            with self._lock, torch.no_grad():
                passes.before_head(self._module, torch.ones(1, width), None, way)
        except ValueError:
            return False
        return True

    def _before_head(self, x: Float[Tensor, "n d"], site: Site) -> Float[Tensor, "n d_model"]:
        """Directions written at a site, mapped to what W_U reads, without the norms' divisions. ValueError if a module
        between is neither a norm nor a linear map."""
        way = self._way(site)
        if way is None:
            raise ValueError(
                f"what is written at {site} gets to this model's logits by more than norms and linear maps: direct "
                "effects are not known for it"
            )
        factor = self._sites.layers[site.layer or 0].w_o_factor if site.kind == "attn_z" else None
        x = passes.before_head(self._module, x.float(), way["w_o"], way["way"]).to(self.device)
        return x if factor is None else factor * x

    def _there(self, fn: Callable[..., Any], form: Any, expected: int, **settings: Any) -> Any:
        """The value of fn(root envoy, **settings) on the server. form, expected: of this value, as in ``run``."""
        import nnsight

        nn, ids, found = self._nn, torch.zeros(1, 1, dtype=torch.long, device=self.device), None
        backend = self._server.request(nn, form, expected)
        with self._lock, torch.no_grad(), nn.trace({"input_ids": ids, "use_cache": False}, backend=backend) as tracer:
            found = nnsight.save(fn(nn, **settings))  # noqa: F841 (the name under which it comes back)
            tracer.stop()
        return backend.saved("found")


def _padded(x: Tensor, batch: TokenBatch) -> Tensor:
    """Rows of real tokens as "batch pos d", 0 at padding."""
    out = x.new_zeros(*batch.mask.shape, x.shape[-1])
    out[batch.mask] = x
    return out


def _require_travelling(writes: Iterable[Write]) -> None:
    """ValueError for edits that need a coder's class, which a server does not have."""
    for w in writes:
        settings = getattr(w.fn, "keywords", {})
        plans = [getattr(settings.get("change"), "keywords", {}).get("plan") or {}]
        plans += [place["when"]["plan"] for place in settings.get("places", ()) if place["when"]]
        if coder := next((c for plan in plans if (c := plan.get("own", {}).get("coder"))), None):
            raise ValueError(
                f"a {type(coder).__name__} does not say how its codes are made without this library, so no edit with "
                "it runs on a server: give the family eval_act, see sae_lab.saes.portable"
            )
