"""Every writer on disks that are too small: the process lives, the error says what is kept and how to go on, and the
same call with room gives what it gives on a large disk.

Disks are tmpfs mounts; where those are not allowed, a limit on the size of files stands in (EFBIG in place of ENOSPC).
dead: the process ended otherwise than by an exception. unclear: another error than ours. silent: no error, and other
files. lost: with room, the same call did not give the same files.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from batteries.writers import Writers, in_child, tree

TITLE = "full disk"
PAGE = 4096


def run(
    full: bool, seed: int = 0, sizes: int | None = None, mounts: bool = True, writers: Writers | None = None
) -> dict[str, Any]:
    """sizes: of disks for each writer; None: 10, or 3. writers: None makes them."""
    sizes, draw = sizes or (10 if full else 3), random.Random(seed)
    found, bad = {"tries": 0, "dead": 0, "unclear": 0, "silent": 0, "lost": 0}, []
    with tempfile.TemporaryDirectory() as scratch:
        folder, disk = Path(scratch), Path(scratch) / "disk"
        disk.mkdir()
        mounts = mounts and _mount(disk, 10 * PAGE)
        writers = writers or Writers(folder / "made")
        for name, call in (writers.calls | writers.files).items():
            whole, path = folder / f"{name} whole", disk / "here"
            code, words, _ = in_child(lambda call=call, whole=whole: call(whole))
            expected = tree(whole)
            assert code == 0 and expected, f"{name}: {words}"
            sums = [f.stat().st_size for f in [whole, *whole.rglob("*")] if f.is_file()]
            for _ in range(sizes):
                found["tries"] += 1
                room = int(draw.uniform(0.05, 0.95) * (sum(sums) if mounts else max(sums)))
                if mounts:
                    _mount(disk, max(2 * PAGE, room))
                code, words, _ = in_child(lambda call=call, path=path, room=room: _limited(call, path, room, mounts))
                faults = [f"dead by signal {-code}"] if code < 0 else []
                if code == 0 and tree(path) != expected:
                    faults.append("silent")
                if code > 0 and not (words.startswith("NoRoom") and "make room" in words):
                    faults.append(f"unclear {words[:300]}")
                if mounts:
                    subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
                code, words, _ = in_child(lambda call=call, path=path: call(path))
                if code != 0 or tree(path) != expected:
                    wrong = sorted(n for n in tree(path).items() ^ expected.items())[:4]
                    faults.append(f"lost {words[:300] or wrong}")
                for kind in ("dead", "unclear", "silent", "lost"):
                    found[kind] += any(fault.startswith(kind) for fault in faults)
                bad += [f"{name} with room for {room:,} of {sum(sums):,} bytes: {fault}" for fault in faults]
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if mounts:
            subprocess.run(["umount", str(disk)], check=True)
    return {**found, "bad": bad}


def _mount(disk: Path, size: int) -> bool:
    """A disk of this size, in the place of the one before; whether that is allowed."""
    subprocess.run(["umount", str(disk)], capture_output=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def _limited(call: Any, path: Path, room: int, mounts: bool) -> None:
    if not mounts:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    call(path)
