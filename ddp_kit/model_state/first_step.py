"""Whether the micro-batches of the first step agree on what they make of buffers.

Where they do, as on a counter or on a spectral norm, it does not matter whose value stays. Where
they do not, the user hears of it, and what to type.
"""

import json
import zlib
from collections.abc import Sequence
from typing import final

from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.tensors_from_rank import as_bytes, view_of
from ddp_kit.errors import some
from ddp_kit.io.logs import logger
from ddp_kit.model_state.attributes import PlainAttributes
from ddp_kit.model_state.places import Place


@final
class FirstStep:
    """Compares by checksums."""

    def __init__(self, group: Group):
        self._group = group
        self._seen: list[dict[str, int]] = []

    def capture(self, places: Sequence[Place], attributes: PlainAttributes) -> None:
        """Notes what a micro-batch has made of them."""
        seen = {}
        for place in places:
            tensor = place.tensor
            if tensor is not None:
                # Host-device synchronisation, in the first step alone.
                seen[place.name] = zlib.crc32(view_of(as_bytes(tensor).cpu()))
        for name, value in attributes.saved().items():
            seen[name] = zlib.crc32(json.dumps(value).encode())
        self._seen.append(seen)

    def finish(self) -> None:
        """Tells of those that differ. Every rank calls it."""
        every: list[dict[str, int]] = []
        for row in gather_bytes(self._group, json.dumps(self._seen).encode()):
            every += json.loads(row)
        names = [name for name in every[0] if any(seen[name] != every[0][name] for seen in every)]
        if names:
            logger.info(
                "note: the micro-batches of a step make different values of %s; that of the first "
                "one stays, and what the others have seen is dropped. "
                'Recipe(buffers={"%s": "mean"}) averages them; '
                '"sum", "first" and "own" are the other words',
                some(names),
                names[0],
            )
