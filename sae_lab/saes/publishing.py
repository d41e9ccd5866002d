"""A coder on the hub: ``sae.push_to_hub("user/name")``, in one commit: our format, SAELens's below it, a model card."""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sae_lab.results import Shown, escaped
from sae_lab.saes import writing

BEGIN, END = "<!-- written by sae_lab: it replaces what stands from here -->", "<!-- to here -->"
_REASONS = {
    401: "it does not know your token: log in by `hf auth login`, or set HF_TOKEN",
    403: "your token may not write there: take a token that may, or a repository of your own",
    409: "somebody changes it at the same time, or something of that name is there: wait, or take another name",
}
_TRANSPORT = ("httpx", "httpx2", "httpcore", "requests", "urllib3")  # as in ``io.releases``


def push(coder: Any, repo: str, private: bool | None, report: Shown | None) -> str:
    """See ``SparseCoder.push_to_hub``."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"a repository is named 'user/name', got {repo!r}")
    api, done = HfApi(), set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "coder"
        lens = _write(coder, folder)  # what can fail here fails before the hub is asked
        text = f"{BEGIN}\n{_card(coder, repo, lens, report)}\n{END}\n"
        with _told(repo, done):
            try:
                info = api.model_info(repo)
            except RepositoryNotFoundError:
                api.create_repo(repo, private=private)
                done.add("made")
                info = api.model_info(repo)
            there = {file.rfilename for file in info.siblings or ()}
            if private and not info.private:
                raise ValueError(f"{repo} is public, and private=True does not change that: do it in its settings")
            if "config.json" in there and "sae.safetensors" not in there:
                raise ValueError(f"{repo} holds something else (its config.json is no coder's): take another name")
            before = f"{_head(coder)}{BEGIN}{END}\n"
            if "README.md" in there:
                before = Path(hf_hub_download(repo, "README.md", revision=info.sha)).read_text(encoding="utf-8")
            start, _, rest = before.partition(BEGIN)
            card = start + text + rest.partition(END)[2].lstrip("\n") if rest else f"{before}\n{text}"
            (folder / "README.md").write_text(card, encoding="utf-8")
            done.add("sent")
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A coder of sae_lab")
    return f"{api.endpoint}/{repo}"


def _write(coder: Any, folder: Path) -> str:
    """Write both formats, without your notes. Returns why SAELens cannot hold the coder, or ""."""
    path, why = coder.path, ""
    try:
        writing.save(coder, folder, "sae_lab", torch.float32)
        writing.save(coder, folder / "saelens", "saelens", torch.float32)
    except ValueError as err:
        if not (folder / "config.json").exists():
            raise
        why = str(err)
    finally:
        coder.path = path  # the folder is gone soon
    for notes in folder.rglob("notes-*.jsonl"):
        notes.unlink()
    return why


@contextmanager
def _told(repo: str, done: set[str]) -> Iterator[None]:
    """What the hub refuses, as one sentence. A commit is whole or not there, so that nothing is half done. done: "made"
    once the repository was, "sent" from when the files are."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except Exception as err:
        empty = ", and is there now, empty" if "made" in done else ""
        if isinstance(err, HfHubHTTPError):
            status = err.response.status_code
            why = _REASONS.get(status, f"it answers {status}: try again later")
            raise ValueError(f"the hub did not take {repo}, of which no file was changed{empty}; {why}") from err
        if isinstance(err, OfflineModeIsEnabled | OSError) or type(err).__module__.split(".")[0] in _TRANSPORT:
            left = ", and whether it took the files is not known" if "sent" in done else empty
            raise ValueError(
                f"the hub cannot be reached for {repo} ({type(err).__name__}){left}: check the network, HF_ENDPOINT "
                "and HF_HUB_OFFLINE, and push again"
            ) from err
        raise


def _head(coder: Any) -> str:
    """The part of a model card that the hub reads, in JSON, which is YAML too."""
    model = str(coder.meta.get("model") or "")
    base = f"base_model: {json.dumps(model)}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else ""
    return f"---\n{base}library_name: sae_lab\ntags:\n- sparse-autoencoder\n- interpretability\n---\n"


def _card(coder: Any, repo: str, lens: str, report: Shown | None) -> str:
    meta, card = coder.meta, coder.meta.get("card", {})
    facts = {
        "family": type(coder).__name__, "features": f"{coder.d_sae:,}", "width": coder.d_in,
        "reads": ", ".join(site.key for site in coder.reads), "writes": ", ".join(site.key for site in coder.writes),
        "model": meta.get("model"), "text": meta.get("text"), "tokens of training": meta.get("train_tokens"),
        "distinct tokens": card.get("distinct_tokens"), "dead features": meta.get("dead"),
        "tokens left out": meta.get("excluded"),
        **{n: v for n, v in coder.config.items() if n not in ("d_in", "d_sae", "seed") and v is not None},
    }  # fmt: skip
    rows = [(name, value) for name, value in facts.items() if value not in (None, "")]
    parts = [f"# {_text(repo)}", _table([("", ""), *rows])]
    parts.append(f'```python\nimport sae_lab as sl\nsae = sl.load("{repo}")\n```')
    if lens:
        parts.append(f"SAELens cannot hold it: {_text(lens)}.")
    else:
        parts.append(f'```python\nfrom sae_lens import SAE\nsae = SAE.from_pretrained("{repo}", "saelens")\n```')
    if held := {text: found for text, found in card.get("held_out", {}).items() if isinstance(found, dict)}:
        names = list(dict.fromkeys(name for found in held.values() for name in found))
        lines = [(text, *(found.get(name) for name in names)) for text, found in held.items()]
        parts += ["## On held-out text", _table([("text", *names), *lines])]
    if report is not None:
        parts += ["## Report", _table(report._rows()), _text(report._footer())]
    return "\n\n".join(parts)


def _table(rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(map(_text, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _text(value: Any) -> str:
    """As Markdown that is text alone: what a checkpoint says may come from anybody."""
    shown = "–" if value is None else format(value, {float: ".4g", int: ","}.get(type(value), ""))
    return re.sub(r"[`|*\[\]\\~]", lambda found: f"&#{ord(found[0])};", escaped(shown))
