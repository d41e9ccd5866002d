"""Readers that take a file as data or refuse it, with their limits; and writers of files with checksums.

A JSON object that this library writes has a checksum of its content; a safetensors file has one of its header and one
of each block of BLOCK bytes after it. Files of other libraries, without checksums, are read too.
"""

import gzip
import json
import math
import mmap
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

BLOCK = 1 << 17  # bytes with one checksum: large enough to read fast, small enough to read few rows
# Limits. A message that refuses a file names the limit, so that a user can raise it.
MOST_JSON = 32 << 20  # bytes; in memory, Python's objects take up to 25 times as many
MOST_DEPTH = 64  # of nested lists and objects
MOST_DIGITS = 300  # of a whole number; a float has at most 309
MOST_HEADER = 25 << 20  # bytes of a safetensors header: names, shapes and notes
MOST_RUN = 100_000_000  # bytes of a checkpoint's header, which holds the run's history; safetensors' own limit
MOST_UNPACKED = 256 << 20  # bytes of an unpacked archive or pickle, beyond 4 times its size: weights compress little
MOST_PARTS = 1_000_000  # values in a pickle or YAML, where one value can be named many times
MOST_LINES = 512 << 20  # bytes of lines, unpacked, over all files and gzip members
MOST_LINE = 1 << 20  # bytes of a line
_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "F16": np.float16, "BF16": np.uint16, "I16": np.int16,
    "F32": np.float32, "I32": np.int32, "U32": np.uint32, "F64": np.float64, "I64": np.int64, "U64": np.uint64,
}  # fmt: skip
_SEAL = "checksum"


def limited(name: str) -> str:
    """A limit of this module, as a message names it."""
    return f"{globals()[name]:,} (sae_lab.files.{name}; set it higher if you trust the file)"


def read_bytes(file: Path, most: str = "MOST_JSON") -> bytes:
    """A file's bytes. Raises FileNotFoundError; ValueError for a folder, a pipe or a device, and for more bytes than
    the limit of this name."""
    _size(file)
    try:
        with open(file, "rb") as f:
            data = f.read(globals()[most] + 1)
    except OSError as err:
        raise ValueError(f"{file} cannot be read ({err.strerror})") from err
    if len(data) > globals()[most]:
        raise ValueError(f"{file} has more bytes than {limited(most)}")
    return data


def parse_json(data: bytes | str, nan: bool = False) -> Any:
    """JSON within the limits, else ValueError. nan: whether NaN and Infinity, which are no JSON, are allowed."""
    try:
        content = json.loads(data, parse_int=_whole, parse_constant=None if nan else _no_number)
    except RecursionError:
        raise ValueError(f"its lists and objects lie deeper than {limited('MOST_DEPTH')}") from None
    layer, depth = [content], 0
    while layer := [one for one in layer if isinstance(one, dict | list)]:
        if (depth := depth + 1) > MOST_DEPTH:
            raise ValueError(f"its lists and objects lie deeper than {limited('MOST_DEPTH')}")
        layer = [inner for one in layer for inner in (one.values() if isinstance(one, dict) else one)]
    return content


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number has more digits than {limited('MOST_DIGITS')}")
    return int(digits)


def _no_number(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number")


def read_json(file: Path, nan: bool = False, most: str = "MOST_JSON") -> dict[str, Any]:
    """A JSON object, its checksum checked and removed. Raises FileNotFoundError, and ValueError for other files."""
    content = parse_json(read_bytes(file, most), nan)
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a JSON object, got a {type(content).__name__}")
    return unsealed(content)


def write_json(file: Path, content: Mapping[str, Any], indent: int | None = None) -> None:
    """A JSON object with its checksum as the last entry."""
    sealed = {**content, _SEAL: _checksum(json.loads(json.dumps(content)))}
    file.write_text(json.dumps(sealed, indent=indent), encoding="utf-8")


def unsealed(content: dict[str, Any]) -> dict[str, Any]:
    """The object without its checksum. ValueError for a wrong checksum."""
    if _SEAL not in content:
        return content
    rest = {key: value for key, value in content.items() if key != _SEAL}
    if content[_SEAL] != _checksum(rest):
        raise ValueError(
            f"its content does not fit its checksum: it is damaged; if you changed it yourself, remove its line "
            f'"{_SEAL}"'
        )
    return rest


def _checksum(content: Any) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def write_tensors(tensors: Mapping[str, Tensor], file: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with checksums among its notes. The same tensors and notes give the same bytes."""
    none = "0" * 8 * -(-sum(t.nbytes for t in tensors.values()) // BLOCK)
    save_file(dict(tensors), file, {**(notes or {}), "blocks": none, _SEAL: "0" * 8})
    with open(file, "r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        header["__metadata__"] |= {"blocks": blocks_of(f)}
        header["__metadata__"] |= {_SEAL: _checksum(_unsealed_header(header))}
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors orders them at random
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(raw) <= length, "this JSON is as compact as that of safetensors"
        f.seek(8)
        f.write(raw.ljust(length))


def _unsealed_header(header: dict[str, Any]) -> dict[str, Any]:
    notes = header.get("__metadata__", {})
    return {**header, "__metadata__": {key: value for key, value in notes.items() if key != _SEAL}}


def blocks_of(file: Path | BufferedIOBase) -> str:
    """The checksum of each block of a file; of an open one, from its present position on."""
    if isinstance(file, Path):
        with open(file, "rb") as f:
            return blocks_of(f)
    return "".join(f"{zlib.crc32(part):08x}" for part in iter(lambda: file.read(BLOCK), b""))


def read_header(file: Path, most: str = "MOST_HEADER") -> tuple[dict[str, Any], dict[str, str], int]:
    """(dtypes, shapes and places of a safetensors file's tensors; its notes; the byte at which its tensors begin).
    Raises FileNotFoundError, and ValueError for a file of another kind or with a damaged header."""
    size = _size(file)
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"its header would have {length:,} bytes, and the file has {size:,}")
        if length > globals()[most]:
            raise ValueError(f"its header has {length:,} bytes, more than {limited(most)}")
        header = parse_json(f.read(length), nan=True)
    notes = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise ValueError("its header is not that of a safetensors file")
    if _SEAL in notes and notes[_SEAL] != _checksum(_unsealed_header(header)):
        raise ValueError("its header does not fit its checksum: it is damaged")
    for name, info in header.items():
        if name != "__metadata__":
            _check_place(name, info, size - 8 - length)
    return {name: info for name, info in header.items() if name != "__metadata__"}, notes, 8 + length


def _check_place(name: str, info: Any, size: int) -> None:
    """ValueError unless a tensor's place lies in the file and has the length that its shape needs."""
    try:
        (start, end), shape = info["data_offsets"], info["shape"]
        whole = all(type(n) is int and n >= 0 for n in (start, end, *shape)) and start <= end <= size
        known = _DTYPES.get(info["dtype"])
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f"its header lacks the type, shape or place of {name!r}") from err
    if not whole or (known is not None and end - start != np.dtype(known).itemsize * math.prod(shape)):
        raise ValueError(f"its header gives {name!r} a place outside the file, or of another length than {shape} needs")


def read_tensors(
    file: Path, take: Callable[[str, Tensor], Tensor] = lambda _, t: t, most: str = "MOST_HEADER"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, notes) of a safetensors file, with all checksums checked. ``take(name, tensor)`` says what is
    kept of each tensor. Raises FileNotFoundError, and ValueError for a file of another kind or a damaged one."""
    _, notes, start = read_header(file, most)
    if "blocks" in notes:
        with open(file, "rb") as f:
            f.seek(start)
            check_blocks(f, notes["blocks"])
    try:
        with safe_open(file, framework="pt") as f:
            return {name: take(name, f.get_tensor(name)) for name in f.keys()}, notes  # noqa: SIM118
    except SafetensorError as err:
        raise ValueError(str(err)) from err


def check_blocks(data: BufferedIOBase, blocks: str) -> None:
    """ValueError unless the bytes have these checksums."""
    found = blocks_of(data)
    for at in range(0, max(len(found), len(blocks)), 8):
        if found[at : at + 8] != blocks[at : at + 8]:
            raise ValueError(_damaged(at // 8))


def _damaged(block: int) -> str:
    return f"it is damaged: its content does not fit its checksum, from byte {block * BLOCK:,} on"


def read_npz(file: Path) -> dict[str, Tensor]:
    """Arrays of a numpy archive, unpacked within the limit. FileNotFoundError, and ValueError for other files."""
    try:
        check_archive(file)
        with np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except FileNotFoundError:
        raise
    except Exception as err:  # numpy reads headers as Python: hostile ones can raise anything
        raise ValueError(str(err) or type(err).__name__) from err


def read_torch(file: Path) -> Any:
    """Tensors and plain values that ``torch.save`` wrote. FileNotFoundError, and ValueError for other content."""
    check_archive(file)
    if not file.stat().st_size:
        raise ValueError("it is empty")
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # Torch checks no checksums, and lets a pickle make a bytearray of any size, which weights never need.
        named = data.find(b"bytearray") >= 0
        if zipfile.is_zipfile(file):
            try:
                with zipfile.ZipFile(file) as archive:
                    damaged = archive.testzip()
                    pickles = [part for part in archive.infolist() if part.filename.endswith("pkl")]
                    named = named or any(b"bytearray" in archive.read(part) for part in pickles)
            except Exception as err:  # hostile bytes can raise anything
                raise ValueError(f"it is no complete archive ({err})") from err
            if damaged is not None:
                raise ValueError(f"its part {damaged!r} is damaged: its content does not fit its checksum")
    if named:
        raise ValueError("it asks for a bytearray, which is no tensor")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as err:  # hostile bytes can raise anything
        reason = str(err).splitlines()[0].split(". ")[0] if str(err) else type(err).__name__  # without torch's advice
        raise ValueError(reason) from err
    check_plain(content, 4 * file.stat().st_size + MOST_UNPACKED)
    return content


def check_archive(file: Path) -> None:
    """ValueError for a zip archive that would unpack to more than the limit, by its table of contents."""
    size = _size(file)
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            whole = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError) as err:
        raise ValueError(f"it is no complete archive ({err})") from err
    if whole > 4 * size + MOST_UNPACKED:
        raise ValueError(
            f"it has {size:,} bytes and unpacks to {whole:,}, more than 4 times that and {limited('MOST_UNPACKED')}"
        )


def check_plain(content: Any, most_bytes: int = 0) -> None:
    """ValueError for more or deeper values than the limits, for tensors other than dense ones of real numbers on the
    CPU, and for tensors of more than ``most_bytes`` together."""
    layer, parts, size = [content], 0, 0
    for depth in range(MOST_DEPTH + 2):
        if not layer:
            return
        parts += len(layer)
        if parts > MOST_PARTS:
            raise ValueError(f"it holds more values than {limited('MOST_PARTS')}")
        if depth > MOST_DEPTH:
            raise ValueError(f"its lists and objects lie deeper than {limited('MOST_DEPTH')}")
        for one in layer:
            if isinstance(one, Tensor):
                if one.layout != torch.strided or one.device.type != "cpu" or one.is_quantized or one.is_complex():
                    raise ValueError(f"it holds a tensor of another kind ({one.dtype}, {one.layout}, {one.device})")
                size += one.numel() * one.element_size()
            elif isinstance(one, int) and abs(one) >= 10**MOST_DIGITS:
                raise ValueError(f"a whole number has more digits than {limited('MOST_DIGITS')}")
        if size > most_bytes:
            raise ValueError(f"its tensors would take more than {size:,} bytes, more than the file can hold")
        nested: list[Any] = []
        for one in layer:
            if isinstance(one, dict):
                nested += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple | set):
                nested += one
            if len(nested) > MOST_PARTS:
                break
        layer = nested


def read_yaml(file: Path) -> Any:
    """Plain values in YAML. Raises FileNotFoundError, and ValueError for other files."""
    import yaml

    data = read_bytes(file)
    try:
        content = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as err:
        raise ValueError(str(err).splitlines()[0] if str(err) else type(err).__name__) from err
    check_plain(content)
    return content


def read_lines(sources: Iterable[tuple[str, BufferedIOBase]]) -> Iterator[tuple[str, int, bytes]]:
    """(name, line number, line) of text files; gzip files are unpacked. ValueError for an incomplete gzip file, and for
    more bytes than the limits, over all files and gzip members."""
    seen = 0
    for name, stream in sources:
        with BufferedReader(stream) as plain:  # type: ignore[type-var]
            packed = plain.peek(2)[:2] == b"\x1f\x8b"
            lines = gzip.GzipFile(fileobj=plain) if packed else plain
            for number in range(1, 1 << 62):
                try:
                    line = lines.readline(MOST_LINE + 1)
                except (EOFError, gzip.BadGzipFile, zlib.error) as err:
                    raise ValueError(f"{name} is no complete gzip file ({err}): fetch it again") from err
                if len(line) > MOST_LINE:
                    raise ValueError(f"{name}, line {number} has more bytes than {limited('MOST_LINE')}")
                if (seen := seen + len(line)) > MOST_LINES:
                    raise ValueError(f"{name} unpacks to more bytes than {limited('MOST_LINES')}: split it")
                if not line:
                    break
                yield name, number, line


def _size(file: Path) -> int:
    """A plain file's length. Raises FileNotFoundError; ValueError for a folder, a pipe or a device."""
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}")
    if not file.is_file():
        raise ValueError(f"{file} is no plain file but a folder, a pipe or a device")
    return file.stat().st_size


class Blocks:
    """A file's bytes, memory-mapped; each block's checksum is checked when the block is first read. blocks: the
    checksums from byte ``start`` on, "" for a file without. remedy: the end of every refusal."""

    def __init__(self, file: Path, start: int, blocks: str, remedy: str):
        self.file, self.start, self.remedy = file, start, remedy
        with open(file, "rb") as f:
            self.bytes = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        self._wanted = blocks
        about = file.stat()
        self._seen = _seen(str(file), about.st_ino, about.st_mtime_ns, about.st_size, blocks)
        if blocks and len(blocks) != 8 * -(-(about.st_size - start) // BLOCK):
            raise ValueError(f"{file} is damaged (its length does not fit its checksums): {remedy}")

    @property
    def checked(self) -> bool:
        return not self._wanted or bool(self._seen.all())

    def check(self, first: int, last: int) -> None:
        """ValueError unless bytes first to last - 1, counted from ``start``, fit their checksums."""
        if not self.checked:
            self.check_each(np.arange(first // BLOCK, -(-last // BLOCK)))

    def check_each(self, blocks: np.ndarray) -> None:
        """``check`` of blocks by number."""
        for block in blocks[~self._seen[blocks]].tolist():
            at = self.start + block * BLOCK
            if f"{zlib.crc32(self.bytes[at : at + BLOCK]):08x}" != self._wanted[8 * block : 8 * block + 8]:
                raise ValueError(f"{self.file} is damaged ({_damaged(block)}): {self.remedy}")
            self._seen[block] = True


@lru_cache(maxsize=1 << 16)
def _seen(file: str, inode: int, changed: int, size: int, blocks: str) -> np.ndarray:
    """Whether each block of a file has been checked: one array for all ``Blocks`` of the same file."""
    return np.zeros(len(blocks) // 8, bool)


class Table:
    """An array in a file. ``table[rows]`` and ``np.asarray(table)`` check the rows that they read."""

    def __init__(self, blocks: Blocks, begin: int, dtype: Any, shape: tuple[int, ...]):
        self._blocks, self._begin = blocks, begin - blocks.start
        self._array = np.ndarray(shape, dtype, blocks.bytes, begin)
        self._width = self._array.nbytes // max(1, *shape[:1], 1)  # of a row
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def __len__(self) -> int:
        return len(self._array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._blocks.check(self._begin, self._begin + self._array.nbytes)
        return self._array.astype(dtype or self.dtype, copy=bool(copy))

    def __getitem__(self, rows: Any) -> Any:
        """Rows by number, slice or array of numbers; or by the first entry of a tuple."""
        if not self._blocks.checked:
            self._check(rows[0] if isinstance(rows, tuple) else rows)
        return self._array[rows]

    def _check(self, rows: Any) -> None:
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            if first < last:
                self._blocks.check(self._begin + first * self._width, self._begin + last * self._width)
            return
        rows = np.asarray(rows, np.int64).reshape(-1)
        first = self._begin + np.where(rows < 0, rows + len(self), rows) * self._width
        if self._width <= BLOCK:
            self._blocks.check_each(np.unique(np.concatenate([first, first + self._width - 1]) // BLOCK))
        else:
            for at in first.tolist():
                self._blocks.check(at, at + self._width)


def map_tensors(file: Path, remedy: str) -> dict[str, Table]:
    """A safetensors file's tensors, not yet read (bfloat16 as raw bits). ValueError, which ends with the remedy."""
    try:
        header, notes, start = read_header(file)
        blocks = Blocks(file, start, notes.get("blocks", ""), remedy)
        return {
            name: Table(blocks, start + info["data_offsets"][0], _DTYPES[info["dtype"]], tuple(info["shape"]))
            for name, info in header.items()
        }
    except (OSError, KeyError, ValueError) as err:
        if str(err).endswith(remedy):
            raise
        raise ValueError(f"{file} is damaged ({err}): {remedy}") from err


def map_npy(file: Path, blocks: str, remedy: str) -> Table:
    """An array that numpy saved, not yet read. blocks: what ``blocks_of`` gave for the file."""
    try:
        if not file.is_file():
            raise FileNotFoundError("there is no such file")
        of = Blocks(file, 0, blocks, remedy)
        if blocks:
            of.check(0, 1)
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        return Table(of, array.offset, array.dtype, array.shape)
    except (OSError, ValueError, EOFError, SyntaxError) as err:
        if str(err).endswith(remedy):
            raise
        raise ValueError(f"{file} is damaged ({err}): {remedy}") from err
