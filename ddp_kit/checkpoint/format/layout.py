"""The files of a checkpoint: their names, the manifest, and reading it without trust.

Format version 1: safetensors shards (`shard`), `state.json`, and `manifest.json` written last. A
checkpoint may come from a stranger, or from a torn disk: every claim of a file is checked before it
is acted upon. Names that leave the folder, sizes beyond the file, and anything but plain JSON are
damage.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, BinaryIO, NamedTuple

import torch

from ddp_kit.errors import DdpKitError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SHARD = re.compile(r"rank-\d{1,7}\.safetensors")
FOLDER = re.compile(r"step-(\d{8,})")
JSON_LIMIT = 256 << 20  # bytes that are read before anything is known about a file
PIECE = 1 << 20  # bytes that are read and hashed at a time: they stay in a core's cache
READ = 1 << 24  # bytes asked of a file at a time where all of them are wanted
SEAL = b',\n "sha256": "'
NOT_FINITE = ("nan", "inf", "-inf")  # metrics as texts
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "C64": torch.complex64,
    "C128": torch.complex128,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DamagedError(DdpKitError):
    """A checkpoint is not whole: a file is missing, torn, changed or foreign. It is set aside and
    an older one is used.
    """

    def __init__(self, message: str):
        # A damaged name may be no text that can be written.
        super().__init__(message.encode(errors="backslashreplace").decode())


class FormatError(DdpKitError):
    """A checkpoint was written by a later version of ddp_kit. It is whole, so it is left where it
    is.
    """


class Fingerprint(NamedTuple):
    """What a file's content is told by. The reader compares size and CRC-32, `ckpt verify` the
    SHA-256 too: on one core they take 0.14 and 0.37 s for 0.6 GB in the page cache.
    """

    size: int
    sha256: str
    crc32: int


def fingerprint(content: memoryview) -> Fingerprint:
    """Returns the fingerprint of a file's content. Each hash in one call: the thread does not ask
    for Python's lock in between.
    """
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
    # "min loss": how the run tells its best checkpoint; empty if it evaluates nothing.
    best_by: str = ""
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


# Of the manifest's fields, as JSON has them.
FIELD_TYPES: Mapping[str, type] = {
    "format": int,
    "step": int,
    "world_size": int,
    "cursor": dict,
    "metrics": dict,
    "files": dict,
    "run_id": str,
    "settings_sha256": str,
    "best_by": str,
    "time": float,
}


def seal(text: bytes) -> bytes:
    """Returns a manifest that ends with the SHA-256 of all before it: in every format, so that a
    later one is not called damaged.
    """
    head = text.removesuffix(b"\n}")
    return head + SEAL + hashlib.sha256(head).hexdigest().encode() + b'"\n}'


def folder_of(step: int) -> str:
    """Returns the name of a step's checkpoint."""
    return f"step-{step:08d}"


def parse_manifest(content: bytes, *, step: int) -> Manifest:
    """Returns the manifest of the checkpoint of `step`.

    Raises: DamagedError if it is not whole, not ours or not of that step; FormatError if a later
        ddp_kit wrote it.
    """
    if seal(content.rpartition(SEAL)[0]) != content:
        raise DamagedError(f"{MANIFEST} does not have its own SHA-256")
    found = parse_json(content, MANIFEST)
    found.pop("sha256", None)
    version = found.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise FormatError(
            f"it has format version {version}, this ddp_kit reads up to {FORMAT}. "
            "Install a later ddp_kit."
        )
    _require_fields(found)
    if found["step"] != step:
        raise DamagedError(f"{MANIFEST} is that of step {found['step']}")
    found["files"] = {name: _listed(name, entry) for name, entry in found["files"].items()}
    manifest = Manifest(**found)
    if STATE not in manifest.files or not any(SHARD.fullmatch(name) for name in manifest.files):
        raise DamagedError(f"{MANIFEST} lists no {STATE} or no shard")
    return manifest


def _require_fields(found: Mapping[str, Any]) -> None:
    """Raises: DamagedError if a manifest has other fields than ours, or of other types."""
    wrong = [name for name, kind in FIELD_TYPES.items() if not isinstance(found.get(name), kind)]
    if not wrong and not all(map(_is_metric, found["metrics"].values())):
        wrong = ["metrics"]
    if wrong or set(found) != {field.name for field in fields(Manifest)}:
        raise DamagedError(f"{MANIFEST} is not one of ours: {', '.join(wrong) or 'other fields'}")


def _listed(name: str, entry: Any) -> Fingerprint:
    """Returns the fingerprint that a manifest lists for a file. Raises: DamagedError."""
    if not (name == STATE or SHARD.fullmatch(name)):
        raise DamagedError(f"{MANIFEST} lists {name[:80]!r}, which is no file of a checkpoint")
    if not _is_fingerprint(entry):
        raise DamagedError(f"{MANIFEST} has no size, SHA-256 and CRC-32 for {name}")
    return Fingerprint(*entry)


def _is_fingerprint(entry: Any) -> bool:
    # By their exact types: a bool is an int, too.
    if not isinstance(entry, list) or [type(item) for item in entry] != [int, str, int]:
        return False
    size, sha256, crc32 = entry
    return size >= 0 and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None and 0 <= crc32 < 2**32


def _is_metric(value: Any) -> bool:
    if isinstance(value, str):
        return value in NOT_FINITE
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, float)


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """Returns an object of strict JSON. Raises: DamagedError if it is none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} is not JSON") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{name} is no JSON object")
    return found


def read_exactly(file: BinaryIO, size: int, *, name: str) -> bytes:
    """Returns the next `size` bytes. Raises: DamagedError if the file ends before."""
    parts = []
    left = size
    while left:
        part = file.read(min(left, READ))
        if not part:
            raise DamagedError(f"{name} ends after {size - left} of {size} bytes")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
