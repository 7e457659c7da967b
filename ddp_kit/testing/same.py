"""Bitwise equality of values on all ranks, with the first difference named.

Owns: `assert_same_on_all_ranks`. Refuses: tolerance, and unpickling what a peer has sent: only hashes, bytes and short texts travel.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ddp_kit.testing.rank import current_group

if TYPE_CHECKING:
    from ddp_kit.distributed.process_group import Group

SMALL = 1 << 20  # bytes of a tensor up to which ranks exchange it to find the element that differs


@dataclass(frozen=True)
class _Entry:
    """One leaf: where it stands in the value, what it is (dtype and shape of a tensor), and its bytes."""

    path: str
    kind: str
    content: bytes
    text: str

    @property
    def digest(self) -> int:
        parts = (self.path.encode(), self.kind.encode(), self.content)
        framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return int.from_bytes(hashlib.sha256(framed).digest()[:7], "little")  # fits an int64


def assert_same_on_all_ranks(value: object, group: "Group | None" = None) -> None:
    """Checks that a value is the same on all ranks, bit for bit. Every rank calls it, and every rank raises if one differs.

    Args: `value`: a tensor, array, number, string, bytes, None, dataclass, or a mapping, sequence or set of such, for instance a
        state dict; `group` the test's own if not given.
    Raises: AssertionError naming the first entry that differs and what each rank has; TypeError for any other type.
    """
    from ddp_kit.distributed.collectives import first_difference, max_over_ranks

    group = current_group() if group is None else group
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
    if (
        first_difference(group, [_number(entry.path), _number(entry.kind), size]) is None
        and "x" in entry.kind
        and size <= SMALL
    ):
        text = _element(entry, every=gather_bytes(group, entry.content))
    ranks_of: dict[str, list[int]] = {}
    for rank, data in enumerate(gather_bytes(group, f"{entry.path} = {text}".encode())):
        ranks_of.setdefault(data.decode(errors="replace"), []).append(rank)
    lines = [
        f"  rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {what}"
        for what, ranks in ranks_of.items()
    ]
    return f"not the same on all ranks; the first difference is entry {index}:\n" + "\n".join(lines)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _element(entry: _Entry, *, every: Sequence[bytes]) -> str:
    """Returns the entry's text with this rank's value of the first element that differs between any two ranks."""
    import numpy as np

    dtype, _, shape = entry.kind.partition(" ")
    dimensions = tuple(int(size) for size in shape.split("x") if size)
    width = len(entry.content) // int(np.prod(dimensions)) if dimensions else len(entry.content)
    first = (
        next(at for at in range(len(entry.content)) if len({content[at] for content in every}) > 1)
        // width
    )
    own = entry.content[first * width : (first + 1) * width]
    where = ", ".join(str(int(at)) for at in np.unravel_index(first, dimensions))
    return f"{entry.text}, at [{where}] {_value(dtype, own)}"


def _value(dtype: str, content: bytes) -> str:
    import torch

    kind: Any = getattr(torch, dtype)
    return (
        repr(torch.frombuffer(bytearray(content), dtype=kind).item()) + f" (bytes {content.hex()})"
    )


def _entries(value: object, path: str) -> Iterator[_Entry]:
    import numpy as np
    import torch

    if isinstance(value, (np.ndarray, np.generic)):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        yield _tensor(value, path)
    elif isinstance(value, float):  # by its bits: -0.0 is not 0.0, and a nan is itself
        yield _Entry(path, "float", struct.pack("<d", value), repr(value))
    elif value is None or isinstance(
        value, (bool, int, complex, str, bytes, torch.dtype, torch.device, torch.Size)
    ):
        yield _Entry(path, type(value).__name__, repr(value).encode(), repr(value)[:200])
    elif isinstance(value, Mapping):
        yield _Entry(f"{path}.keys()", "keys", repr(list(value)).encode(), repr(list(value))[:200])
        for key, item in value.items():
            yield from _entries(item, f"{path}[{key!r}]")
    elif isinstance(value, Sequence):
        yield _Entry(
            f"len({path})", type(value).__name__, repr(len(value)).encode(), str(len(value))
        )
        for index, item in enumerate(value):
            yield from _entries(item, f"{path}[{index}]")
    elif isinstance(value, Set):
        yield from _entries(sorted(value, key=repr), path)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _entries(getattr(value, field.name), f"{path}.{field.name}")
    else:
        raise TypeError(
            f"{path} is a {type(value).__name__}; expected tensors, numbers, strings, or dicts and lists of them (a state_dict())"
        )


def _tensor(value: Any, path: str) -> _Entry:
    import torch

    if hasattr(value, "full_tensor"):  # sharded: compared as a whole
        value = value.full_tensor()
    flat = value.detach().cpu().contiguous()
    content = flat.reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype, shape = str(value.dtype).removeprefix("torch."), "x".join(map(str, value.shape))
    digest = hashlib.sha256(content).hexdigest()[:12]
    return _Entry(
        path,
        f"{dtype} {shape or '1x'}",
        content,
        f"{dtype} tensor {tuple(value.shape)}, sha256 {digest}",
    )
