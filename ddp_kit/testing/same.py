"""Bitwise equality of values on all ranks, with the first difference named.

There is no tolerance: ranks that differ in the last bit today differ in all of them tomorrow. Only
hashes, bytes and short texts travel, so nothing that a peer has sent is unpickled.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ddp_kit.testing.rank import current_group

if TYPE_CHECKING:
    from ddp_kit.distributed.process_group import Group

# Bytes of a tensor up to which ranks exchange it to find the element that differs.
SMALL = 1 << 20
# What is compared by its repr.
PLAIN = (type(None), bool, int, complex, str, bytes)


@dataclass(frozen=True)
class _Entry:
    """One leaf: where it stands, what it is (dtype and shape of a tensor), and its bytes."""

    path: str
    kind: str
    content: bytes
    text: str

    @property
    def digest(self) -> int:
        parts = (self.path.encode(), self.kind.encode(), self.content)
        framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return _number(framed)


def assert_same_on_all_ranks(value: object, group: "Group | None" = None) -> None:
    """Checks that a value is the same on all ranks, bit for bit.

    Every rank calls it, and every rank raises if one differs.

    Args: `value`: a tensor, array, number, string, bytes, None, dataclass, or a mapping, sequence
        or set of such, for instance a state dict; `group` the test's own if not given.
    Raises: AssertionError naming the first entry that differs and what each rank has; TypeError for
        any other type.
    """
    from ddp_kit.distributed.collectives import first_difference, max_over_ranks

    if group is None:
        group = current_group()
    entries = list(_entries(value, "value"))
    most, minus_least = max_over_ranks(group, [len(entries), -len(entries)])
    if most == 0:
        return
    absent = _Entry("(no such entry)", "", b"", f"the value has {len(entries)} entries")
    padded = entries + [absent] * (most - len(entries))
    index = first_difference(group, [entry.digest for entry in padded])
    if index is None:
        assert most == -minus_least
        return
    raise AssertionError(_explain(group, padded[index], index=index))


def _explain(group: "Group", entry: _Entry, *, index: int) -> str:
    from ddp_kit.distributed.collectives import first_difference, gather_bytes

    text = entry.text
    size = len(entry.content)
    shape = [_number(entry.path.encode()), _number(entry.kind.encode()), size]
    is_alike = first_difference(group, shape) is None
    is_tensor = " " in entry.kind  # its dtype and shape
    if is_alike and is_tensor and size <= SMALL:
        text = _element(entry, every=gather_bytes(group, entry.content))
    ranks_of: dict[str, list[int]] = {}
    for rank, data in enumerate(gather_bytes(group, f"{entry.path} = {text}".encode())):
        ranks_of.setdefault(data.decode(errors="replace"), []).append(rank)
    lines = [f"not the same on all ranks; the first difference is entry {index}:"]
    for what, ranks in ranks_of.items():
        noun = "rank" if len(ranks) == 1 else "ranks"
        lines.append(f"  {noun} {', '.join(map(str, ranks))}: {what}")
    return "\n".join(lines)


def _number(content: bytes) -> int:
    """Returns a hash that fits an int64."""
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "little")


def _element(entry: _Entry, *, every: Sequence[bytes]) -> str:
    """Returns the entry's text and this rank's value of the first element that differs anywhere."""
    import numpy as np

    dtype, _, shape = entry.kind.partition(" ")
    size = len(entry.content)
    dimensions = tuple(int(length) for length in shape.split("x") if length)
    width = size
    if dimensions:
        width = size // int(np.prod(dimensions))
    first_byte = next(at for at in range(size) if len({content[at] for content in every}) > 1)
    first = first_byte // width
    own = entry.content[first * width : (first + 1) * width]
    where = ", ".join(str(int(at)) for at in np.unravel_index(first, dimensions))
    return f"{entry.text}, at [{where}] {_value(dtype, own)}"


def _value(dtype: str, content: bytes) -> str:
    import torch

    kind: Any = getattr(torch, dtype)
    number = torch.frombuffer(bytearray(content), dtype=kind).item()
    return f"{number!r} (bytes {content.hex()})"


def _entries(value: object, path: str) -> Iterator[_Entry]:
    import numpy as np
    import torch

    if isinstance(value, (np.ndarray, np.generic)):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        yield _tensor(value, path)
    elif isinstance(value, float):
        # By its bits: -0.0 is not 0.0, and a nan is itself.
        yield _Entry(path, "float", struct.pack("<d", value), repr(value))
    elif isinstance(value, (*PLAIN, torch.dtype, torch.device, torch.Size)):
        yield _text(path, type(value).__name__, repr(value))
    elif isinstance(value, Mapping):
        yield _text(f"{path}.keys()", "keys", repr(list(value)))
        for key, item in value.items():
            yield from _entries(item, f"{path}[{key!r}]")
    elif isinstance(value, Sequence):
        yield _text(f"len({path})", type(value).__name__, str(len(value)))
        for index, item in enumerate(value):
            yield from _entries(item, f"{path}[{index}]")
    elif isinstance(value, Set):
        yield from _entries(sorted(value, key=repr), path)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _entries(getattr(value, field.name), f"{path}.{field.name}")
    else:
        raise TypeError(
            f"{path} is a {type(value).__name__}; expected tensors, numbers, strings, "
            "or dicts and lists of them (a state_dict())"
        )


def _text(path: str, kind: str, text: str) -> _Entry:
    return _Entry(path, kind, text.encode(), text[:200])


def _tensor(value: Any, path: str) -> _Entry:
    import torch

    # What is sharded is compared as a whole.
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    flat = value.detach().cpu().contiguous()
    content = flat.reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(value.dtype).removeprefix("torch.")
    shape = "x".join(map(str, value.shape)) or "1x"
    digest = hashlib.sha256(content).hexdigest()[:12]
    text = f"{dtype} tensor {tuple(value.shape)}, sha256 {digest}"
    return _Entry(path, f"{dtype} {shape}", content, text)
