"""Published coders by the names people know, and any hub repository: which files, and what they do not say themselves.

    sl.load("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    sl.load("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    sl.load("EleutherAI/sae-llama-3-8b-32x", "layers.24")

Names and ids are SAELens's; ``releases.json`` has them. An id is a folder (or file) of the release's repository.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sae_lab import cache
from sae_lab.saes.io.peers import FILES, OURS, coders_in, format_of, home, named


@dataclass(frozen=True)
class Release:
    """An entry of ``releases.json``.

    repo: on the hub. format: of ``peers.FILES``, or "file". ids: id -> path in the repository. rules: [pattern of ids,
    template of paths, an example] for ids that are not listed one by one. facts: what readers are told of all its
    coders; facts_of: and of one id.
    """

    repo: str
    format: str
    ids: Mapping[str, str] = field(default_factory=dict)
    rules: Sequence[Sequence[str]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    facts_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def path(self, id: str) -> str | None:
        """The path of an id in the repository, None for an unknown id."""
        found = (match.expand(path) for pattern, path, _ in self.rules if (match := re.fullmatch(pattern, id)))
        return self.ids.get(id) or next(found, None)

    def known(self) -> list[str]:
        """Its ids, or examples of them."""
        return [*self.ids, *(example for _, _, example in self.rules)]


_DATA = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
RELEASES = {name: Release(**entry) for name, entry in _DATA["releases"].items()}
# Releases of SAELens's directory, and their repositories, that are no coders of one place and one token.
REFUSED: dict[str, str] = _DATA["refused"]


class Found(NamedTuple):
    """What to fetch: a folder or file of a repository, its format (None: to be seen), what readers are told."""

    repo: str
    path: str
    format: str | None
    facts: dict[str, Any]


def locate(name: str, id: str | None) -> Found | None:
    """A release's coder, or a repository's ("user/name"); None where the name is neither.

    Raises ValueError for an id that the release does not have, with near ones.
    """
    if name in REFUSED:
        raise ValueError(f"{name!r} holds {REFUSED[name]}: sl.load takes coders that read one place and write at one")
    if name not in RELEASES:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return None
        path = (id or "").strip("/")
        same = [r for r in RELEASES.values() if r.repo == name]  # what is known of the repository holds here too
        known = {key: value for r in same for key, value in r.facts.items()}
        here = {"path": f"{name}/{path}", "hook": path.rsplit("/", 1)[-1], "listed": bool(same)}
        own = next((r.facts_of.get(i, {}) for r in same for i, there in r.ids.items() if there == path), {})
        return Found(name, path, None, {**known, **own, **here})
    release = RELEASES[name]
    path = None if id is None else release.path(id)
    if id is None or path is None:
        near = difflib.get_close_matches(id or "", release.known(), n=5, cutoff=0.3) or release.known()[:5]
        raise ValueError(
            f"{name!r} has no coder with the id {id!r}: {'ids look like' if len(near) == 1 else 'near ones are'} "
            f"{', '.join(map(repr, near))}"
        )
    facts = {**release.facts, **release.facts_of.get(id, {}), "path": f"{release.repo}/{path}", "listed": True}
    return Found(release.repo, path, release.format, facts)


def near(name: str) -> list[str]:
    """Releases and their repositories with a name like this one."""
    return difflib.get_close_matches(name, {*RELEASES, *(r.repo for r in RELEASES.values())}, cutoff=0.5)


def fetch(found: Found) -> Path:
    """Download what one coder needs, nothing else, and return its folder (or file) in the hub's cache."""
    if found.format == "file":
        return download(found.repo, found.path)
    if found.format is None:
        return _fetch_seen(found, files_of(found.repo, found.path))
    needed, beside, _ = FILES[found.format]
    files = [download(found.repo, _join(found.path, name)) for name in needed]
    for name in beside:
        _download_if_there(found.repo, _join(found.path, name))
    return files[0].parent


def _fetch_seen(found: Found, names: set[str]) -> Path:
    """The same where only the repository's listing tells what lies there."""
    path = named(found.path, names.__contains__)
    folder = home(path, names.__contains__) if path in names else path
    if folder is None:  # a file that stands for itself, and what may say more about it
        above = str(PurePosixPath(path).parent)
        about = ("config.yaml", "config.json", f"{PurePosixPath(path).stem}_cfg.json", "../config.json")
        for name in names & {_join("" if above == "." else above, name) for name in about}:
            download(found.repo, name)
        return download(found.repo, path)
    below = {f.removeprefix(folder + "/" if folder else "") for f in names if f.startswith(folder and folder + "/")}
    kind = format_of(below)
    if kind is None and not set(OURS) <= below:
        known = coders_in(names)
        likely = difflib.get_close_matches(found.path, known, n=5, cutoff=0.3) or known[:5]
        raise ValueError(
            f"{found.repo} has no coder at {found.path or 'its top'!r}: pass id=, "
            + (f"one of {len(known)}, such as {', '.join(map(repr, likely))}" if known else "but it seems to hold none")
        )
    needed, beside = FILES[kind][:2] if kind else (OURS, ())
    files = [download(found.repo, _join(folder, name)) for name in needed]
    for name in beside:
        if name in below or (name.startswith("..") and _join(folder, name) in names):
            download(found.repo, _join(folder, name))
    return files[0].parent


def _join(folder: str, name: str) -> str:
    if name.startswith("../"):
        return str(PurePosixPath(folder).parent / name.removeprefix("../"))
    return f"{folder}/{name}" if folder else name


def files_of(repo: str, path: str) -> set[str]:
    """A repository's files. path: what is looked for, for messages."""
    from huggingface_hub import HfApi

    with _hub(repo, path):
        if not cache.hub_answers():
            raise ConnectionError
        return set(HfApi().list_repo_files(repo))


def download(repo: str, file: str, revision: str | None = None) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub(repo, file):
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=not cache.hub_answers()))


def _download_if_there(repo: str, file: str) -> None:
    """A file that not every coder has: without the network, those downloaded before will do."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with suppress(EntryNotFoundError):
        hf_hub_download(repo, file, local_files_only=not cache.hub_answers())


@contextmanager
def _hub(repo: str, path: str) -> Iterator[None]:
    """The hub's own errors, as this library says things."""
    from huggingface_hub import errors

    what, like = f"{repo}{path and '/' + path}", near(repo)
    others = f"; names like it: {', '.join(like)}" if like and repo not in like else ""
    try:
        yield
    except Exception as err:
        if isinstance(err, errors.GatedRepoError):
            raise ValueError(f"{what} asks you to accept its terms on the hub, and to log in") from err
        if isinstance(err, errors.RepositoryNotFoundError):
            raise ValueError(f"the hub has no repository for {what} (or it is private: log in){others}") from err
        missing = isinstance(err, errors.LocalEntryNotFoundError)
        if isinstance(err, errors.EntryNotFoundError) and not missing:
            raise ValueError(f"{repo} has no file {path!r} on the hub: this id names no coder there") from err
        # The client's versions talk through different libraries, whose errors have no common base.
        transport = type(err).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
        if transport or missing or isinstance(err, errors.HfHubHTTPError | OSError):
            raise ValueError(
                f"the hub could not be asked for {what} ({type(err).__name__}), and it is not in the local cache: "
                f"check the network and HF_ENDPOINT, or download the folder and pass its path{others}"
            ) from err
        raise
