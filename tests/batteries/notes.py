"""Notes: writers that are killed, two that write at once, and files that are damaged."""

import logging
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from sae_lab import noting

TITLE = "notes: kill -9 of one of two writers; damage"
FEATURES, FIELDS = 12, ("label", "text", "said:somebody")
SECONDS = 0.15  # within which a writer is killed


def run(full: bool, seed: int = 0) -> dict[str, object]:
    rng = random.Random(seed)
    found: dict[str, object] = {"tries": 0, "lost": 0, "leftovers": 0, "silent": 0, "bad": []}
    for kind, times in ((_killed, 100 if full else 20), (_damaged, 200 if full else 40)):
        for number in range(times):
            with tempfile.TemporaryDirectory() as folder:
                fault, words = kind(Path(folder), random.Random(rng.random()))
            found["tries"] += 1  # type: ignore[operator]
            if fault:
                found[fault] += 1  # type: ignore[operator]
                found["bad"].append(f"{kind.__name__} {number}: {words}")  # type: ignore[attr-defined]
    return found


def _value(field: str, text: str):
    return [{"text": text, "scores": {}}] if field.startswith(noting.SAID) else text


def _write(file: Path, rng: random.Random, name: str, out: int) -> None:
    """Until it is killed: says each value that is written."""
    log = noting.Log(file)
    for i in range(1_000_000):
        feature, field, text = rng.randrange(FEATURES), rng.choice(FIELDS), f"{name} {i} {'x' * rng.randrange(3000)}"
        log.write({feature: {field: _value(field, text)}})
        os.write(out, f"{feature} {field} {name} {i}\n".encode())


def _killed(folder: Path, rng: random.Random) -> tuple[str, str]:
    file, children, heard = folder / "a.jsonl", [], []
    for name in ("a", "b"):
        end, out = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                _write(file, rng, name, out)
            finally:
                os._exit(1)
        os.close(out)
        children.append((pid, end))
    time.sleep(rng.random() * SECONDS)
    for pid, end in children:  # the second goes on while the first is dead
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with open(end, "rb") as pipe:
            heard += [line.decode().split() for line in pipe.read().split(b"\n")[:-1]]
        time.sleep(rng.random() * SECONDS / 4)
    log = noting.Log(file)
    log.write({0: {"label": "after"}})  # the next writer goes on
    changes, damaged = noting.parsed(file.read_bytes())
    written = {(c.feature, *field_name_number) for c in changes for field_name_number in _told(c)}
    if lost := [one for one in heard if (int(one[0]), *one[1:]) not in written] or damaged:
        return "lost", f"{lost[:3]}"
    newest: dict[tuple[int, str], noting.Change] = {}
    for change in changes:
        newest |= {(change.feature, field): change for field in change.fields}
    if wrong := [key for key, c in newest.items() if log.fields(key[0])[key[1]] != c.fields[key[1]]]:
        return "lost", f"not the newest: {wrong[:3]}"
    if left := {path.name for path in folder.iterdir()} - {file.name}:
        return "leftovers", f"{left}"
    return "", ""


def _told(change: noting.Change):
    for field, value in change.fields.items():
        text = value if isinstance(value, str) else value[0]["text"]
        yield (field, *text.split()[:2])


def _damaged(folder: Path, rng: random.Random) -> tuple[str, str]:
    """What is flipped, zeroed or cut out of a file's middle is said, and the whole file kept."""
    log = noting.Log(folder / "a.jsonl")
    for i in range(5):  # each waits for the disk, which other tests may keep busy
        log.write({rng.randrange(FEATURES): {rng.choice(FIELDS[:2]): f"{i} {rng.random()}"}})
    before, data = log.all(), bytearray(log.file.read_bytes())
    kind, at = rng.choice(["flipped", "zeroed", "cut"]), rng.randrange(len(data) - 1)
    size = rng.randrange(1, 1 + min(60, len(data) - at - 1))
    data[at : at + size] = {"flipped": bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 : at + size],
                            "zeroed": bytes(size), "cut": b""}[kind]  # fmt: skip
    log.file.write_bytes(data)
    said: list[str] = []
    logger, heard = logging.getLogger("sae_lab.noting"), logging.Handler()
    heard.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(heard)
    logger.propagate = False
    try:
        found = noting.Log(log.file).all()
        log.write({0: {"label": "after"}})
    finally:
        logger.removeHandler(heard)
        logger.propagate = True
    kept = any(path.read_bytes() == data for path in folder.iterdir()) or any("half a last" in one for one in said)
    if found != before and not (said and kept):
        return "silent", f"{kind} {size} bytes at {at}"
    return "", ""
