"""The files of a checkpoint: a shard's header, the manifest, and reading both without trust.

Owns: format version 1: safetensors shards, `state.json`, `manifest.json` written last, and every check of what a file claims.
Refuses: names that leave the folder, sizes beyond the file, and anything but plain JSON.

A shard is a safetensors file (source: the format's description in the safetensors repository): 8 bytes with the header's length, little
end first, the header as JSON padded with spaces, then the bytes of the tensors without gaps. Its `__metadata__` says at which row of the
whole tensor each piece begins.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, BinaryIO, NamedTuple

import torch

from ddp_kit.checkpoint.format.sharding import Piece, Shape
from ddp_kit.checkpoint.format.storage import PAGE
from ddp_kit.errors import DdpKitError

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
SHARD = re.compile(r"rank-\d{1,7}\.safetensors")
FOLDER = re.compile(r"step-(\d{8,})")
HEADER_LIMIT, JSON_LIMIT = (
    64 << 20,
    256 << 20,
)  # bytes that are read before anything is known about a file
DTYPES = {
    **{
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "BOOL": torch.bool,
        "U8": torch.uint8,
    },
    **{
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "C64": torch.complex64,
        "C128": torch.complex128,
    },
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
PIECE = 1 << 20  # bytes that are read and hashed at a time: they stay in a core's cache
SEAL = b',\n "sha256": "'
NOT_FINITE = ("nan", "inf", "-inf")  # metrics as texts
PAIRED = "C128"  # which safetensors does not have: its shards hold F64, with the real and the imaginary part in a last dimension
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DamagedError(DdpKitError):
    """A checkpoint is not whole: a file is missing, torn, changed or foreign. It is set aside and an older one is used."""

    def __init__(self, message: str):
        super().__init__(
            message.encode(errors="backslashreplace").decode()
        )  # a damaged name may be no text that can be written


class FormatError(DdpKitError):
    """A checkpoint was written by a later version of ddp_kit. It is whole, so it is left where it is."""


class Fingerprint(NamedTuple):
    """What a file's content is told by. A restore compares size and CRC-32, `ckpt verify` the SHA-256 too: on one core they take 0.14 and
    0.37 s for 0.6 GB in the page cache."""

    size: int
    sha256: str
    crc32: int


def fingerprint(content: memoryview) -> Fingerprint:
    """Returns the fingerprint of a file's content. Each hash in one call: the thread does not ask for Python's lock in between."""
    return Fingerprint(len(content), hashlib.sha256(content).hexdigest(), zlib.crc32(content))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a committed checkpoint consists of; `metrics` are of an evaluation at that step."""

    format: int = FORMAT
    run_id: str
    step: int
    world_size: int
    settings_sha256: str
    time: float
    best_by: str = (
        ""  # "min loss": how the run tells its best checkpoint; empty if it evaluates nothing
    )
    cursor: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    files: Mapping[str, Fingerprint] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def text(self) -> bytes:
        """Returns the file's content, sealed by its own hash."""
        return seal(json.dumps(asdict(self), indent=1).encode())


def seal(text: bytes) -> bytes:
    """Returns a manifest that ends with the SHA-256 of all before it: in every format, so that a later one is not called damaged."""
    head = text.removesuffix(b"\n}")
    return head + SEAL + hashlib.sha256(head).hexdigest().encode() + b'"\n}'


def folder_of(step: int) -> str:
    """Returns the name of a step's checkpoint."""
    return f"step-{step:08d}"


def parse_manifest(content: bytes, *, step: int) -> Manifest:
    """Returns the manifest of the checkpoint of `step`. Raises: DamagedError, FormatError."""
    if seal(content.rpartition(SEAL)[0]) != content:
        raise DamagedError(f"{MANIFEST} does not have its own SHA-256")
    found = parse_json(content, MANIFEST)
    found.pop("sha256", None)
    version = found.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise FormatError(
            f"it has format version {version}, this ddp_kit reads up to {FORMAT}. Install a later ddp_kit."
        )
    kinds: dict[type, tuple[str, ...]] = {
        int: ("format", "step", "world_size"),
        dict: ("cursor", "metrics", "files"),
    }
    kinds |= {str: ("run_id", "settings_sha256", "best_by"), float: ("time",)}
    wrong = [
        name
        for kind, names in kinds.items()
        for name in names
        if not isinstance(found.get(name), kind)
    ]
    if not wrong and not all(map(_is_metric, found["metrics"].values())):
        wrong = ["metrics"]
    if wrong or set(found) != {field.name for field in fields(Manifest)}:
        raise DamagedError(f"{MANIFEST} is not one of ours: {', '.join(wrong) or 'other fields'}")
    if found["step"] != step:
        raise DamagedError(f"{MANIFEST} is that of step {found['step']}")
    manifest = Manifest(
        **{
            **found,
            "files": {name: _listed(name, content) for name, content in found["files"].items()},
        }
    )
    if STATE not in manifest.files or not any(SHARD.fullmatch(name) for name in manifest.files):
        raise DamagedError(f"{MANIFEST} lists no {STATE} or no shard")
    return manifest


def _listed(name: str, content: Any) -> Fingerprint:
    if not (name == STATE or SHARD.fullmatch(name)):
        raise DamagedError(f"{MANIFEST} lists {name[:80]!r}, which is no file of a checkpoint")
    kinds = [type(item) for item in content] if isinstance(content, list) else []
    if (
        kinds != [int, str, int]
        or content[0] < 0
        or not re.fullmatch(r"[0-9a-f]{64}", content[1])
        or not 0 <= content[2] < 2**32
    ):
        raise DamagedError(f"{MANIFEST} has no size, SHA-256 and CRC-32 for {name}")
    return Fingerprint(*content)


def _is_metric(value: Any) -> bool:
    return (
        value in NOT_FINITE
        if isinstance(value, str)
        else isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    )


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """Returns an object of strict JSON. Raises: DamagedError."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} is not JSON") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{name} is no JSON object")
    return found


@dataclass(frozen=True)
class Stored:
    """A piece in a shard: where its bytes begin in the file, its dtype and shape (of the piece)."""

    piece: Piece
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def unpaired(self) -> "Stored":
        """Returns the piece as the complex numbers whose parts it holds; itself if it cannot be that."""
        if self.dtype != torch.float64 or self.shape[-1:] != (2,):
            return self
        shape = self.shape[:-1]
        stop = self.piece.stop if shape else self.piece.start + 1
        return replace(
            self, dtype=torch.complex128, shape=shape, piece=replace(self.piece, stop=stop)
        )


def shard_header(
    pieces: Sequence[Piece], shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]
) -> tuple[bytes, list[Stored]]:
    """Returns the bytes before the tensors, a whole number of pages, and where each piece goes; larger elements first: all are aligned."""
    entries: dict[str, Any] = {"__metadata__": {piece.name: str(piece.start) for piece in pieces}}
    places = []
    at = 0
    for piece in sorted(pieces, key=lambda piece: -shapes[piece.name].itemsize):
        whole = shapes[piece.name]
        shape = (piece.stop - piece.start, *whole.shape[1:]) if whole.shape else ()
        own = Shape(shape, whole.itemsize).nbytes
        entries[piece.name] = {
            "dtype": NAMES[dtypes[piece.name]],
            "shape": list(shape),
            "data_offsets": [at, at + own],
        }
        if NAMES[dtypes[piece.name]] == PAIRED:
            entries[piece.name] |= {"dtype": "F64", "shape": [*shape, 2]}
        places.append((piece, at, own, shape))
        at += own
    text = json.dumps(entries).encode()
    size = -(-(8 + len(text)) // PAGE) * PAGE
    header = (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
    return header, [
        Stored(piece, size + offset, nbytes, dtypes[piece.name], shape)
        for piece, offset, nbytes, shape in places
    ]


def read_header(file: BinaryIO, *, size: int, name: str) -> list[Stored]:
    """Returns what a safetensors file of `size` bytes holds; a plain one, without row numbers, holds whole tensors.

    Raises: DamagedError if the header does not describe exactly this file.
    """
    length = int.from_bytes(read_exactly(file, 8, name=name), "little")
    if length > min(size - 8, HEADER_LIMIT):
        raise DamagedError(f"{name}: its header claims {length} bytes")
    entries = parse_json(read_exactly(file, length, name=name), name)
    starts = entries.pop("__metadata__", {})
    stored = [
        _entry(key, entry, starts, data=8 + length, name=name) for key, entry in entries.items()
    ]
    at = 8 + length
    for item in sorted(stored, key=lambda item: (item.offset, item.nbytes)):
        if item.offset != at:
            raise DamagedError(
                f"{name}: its tensors overlap or leave gaps at {item.piece.name[:80]}"
            )
        at += item.nbytes
    if at != size:
        raise DamagedError(f"{name}: its tensors end at {at}, the file at {size}")
    return stored


def _entry(key: str, entry: Any, starts: Any, *, data: int, name: str) -> Stored:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62

    try:
        dtype, shape, (begin, end) = (
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            entry["data_offsets"],
        )
        start = (
            int(starts[key])
            if isinstance(starts, dict) and str(starts.get(key, "")).isdecimal()
            else 0
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{name}: bad entry for {key[:80]}") from error
    if (
        not all(map(is_size, (*shape, begin, end, start)))
        or len(shape) > 64
        or end - begin != Shape(shape, dtype.itemsize).nbytes
    ):
        raise DamagedError(f"{name}: shape and size of {key[:80]} disagree")
    return Stored(
        Piece(key, start, start + (shape[0] if shape else 1)),
        data + begin,
        end - begin,
        dtype,
        shape,
    )


def read_exactly(file: BinaryIO, size: int, *, name: str) -> bytes:
    """Returns the next `size` bytes. Raises: DamagedError if the file ends before."""
    parts, left = [], size
    while left:
        part = file.read(min(left, 1 << 24))
        if not part:
            raise DamagedError(f"{name} ends after {size - left} of {size} bytes")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
