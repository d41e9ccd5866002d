"""kill -9 at random moments of every writer of folders. The same call, made again, gives what an unkilled one gives.

lost: files that differ from the unkilled run's, or an old coder that no longer loads though no new one took its place.
leftovers: files that an unkilled run does not leave. dead: the second call did not end well.
"""

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from batteries.writers import Writers, in_child, tree

import sae_lab as sl

TITLE = "kill -9 while it writes"


def run(full: bool, seed: int = 0, moments: int | None = None, writers: Writers | None = None) -> dict[str, Any]:
    """moments: of each writer; None: 100, or 20. writers: None makes them."""
    moments = moments or (100 if full else 20)
    draw, found = random.Random(seed), {"tries": 0, "killed": 0, "lost": 0, "leftovers": 0, "dead": 0}
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        writers = writers or Writers(folder / "made")
        for name, call in writers.calls.items():
            whole, path = folder / f"{name} whole", folder / f"{name} killed"
            code, words, seconds = in_child(lambda call=call, whole=whole: call(whole))
            assert code == 0, f"{name}: {words}"
            expected = tree(whole)
            for number in range(moments):
                found["tries"] += 1
                after = draw.uniform(0, 1.05) * seconds
                saves = name.startswith(("save", "export"))
                if saves:  # over another coder, with a file of the user's beside
                    shutil.copytree(folder / f"{name} other", path) if number else _other(name, path, folder)
                code, _, _ = in_child(lambda call=call, path=path: call(path), kill_after=after)
                found["killed"] += code == -9
                faults = _half(path, name, folder) if saves else []
                code, words, _ = in_child(lambda call=call, path=path: call(path))
                there = tree(path)
                if saves and there.pop("mine.txt", None) is None:
                    faults.append("lost mine.txt")
                faults += [f"dead {words[:200]}"] if code != 0 else []
                faults += [f"leftovers {left}" for left in there.keys() - expected.keys()]
                faults += [f"lost {n}" for n in expected if there.get(n) != expected[n]] if code == 0 else []
                for kind in ("lost", "leftovers", "dead"):
                    found[kind] += any(fault.startswith(kind) for fault in faults)
                bad += [f"{name}, killed after {after:.3f} of {seconds:.3f} s: {fault}" for fault in faults]
                shutil.rmtree(path)
    assert found["killed"], "no kill came in time, so nothing was tried"
    return {"tries": found["tries"], **{k: found[k] for k in ("lost", "leftovers", "dead")}, "bad": bad}


def _other(name: str, path: Path, folder: Path) -> None:
    """Another coder in the same format, and the user's own file beside it."""
    format = name.removeprefix("export ") if name.startswith("export") else "sae_lab"
    other = sl.TopK(32, 256, k=3, seed=9).eval()
    other.in_raw_units, other.reads, other.writes = True, (sl.Site("resid_post", 1),), (sl.Site("resid_post", 1),)
    other.save(path, format=format)
    (path / "mine.txt").write_text("mine")
    shutil.copytree(path, folder / f"{name} other")


def _half(path: Path, name: str, folder: Path) -> list[str]:
    """What a kill left loads as the old coder or the new one. An export may refuse, between its two renames."""
    try:
        k = sl.load(path).config["k"]
    except ValueError as err:
        return [] if name.startswith("export") else [f"lost: nothing loads any more ({err})"]
    weights = next(n for n in tree(path) if n.endswith((".safetensors", ".pt")) and "/" not in n)
    right = tree(folder / (f"{name} other" if k == 3 else f"{name} whole"))
    return [] if tree(path)[weights] == right[weights] else [f"lost: the config of k={k} beside other weights"]
