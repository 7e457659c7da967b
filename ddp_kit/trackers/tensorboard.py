"""TensorBoard event files in the run directory's `tensorboard` folder.

Records appear there as train/loss or eval/accuracy. Steps repeated by a later attempt overwrite
nothing; TensorBoard shows both.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ddp_kit.errors import require
from ddp_kit.trackers.base import RunInfo, numbers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker:
    """Writes scalars, images and texts with torch's own writer.

    View them with: tensorboard --logdir runs
    """

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def start(self, info: RunInfo) -> None:
        """Opens a new event file and writes the settings as a text.

        Raises: MissingPackageError without tensorboard.
        """
        require("tensorboard", extra="tensorboard")
        module = require("torch.utils.tensorboard", extra="tensorboard")
        self._writer = module.SummaryWriter(str(info.run_dir / "tensorboard"))
        # Four spaces: Markdown takes the lines as they are.
        lines = [
            f"    {name} = {json.dumps(value, default=str)}"
            for name, value in info.settings.items()
        ]
        self._text("settings", "\n".join(lines), step=0)

    def log(self, record: Mapping[str, object]) -> None:
        """Writes every number of the record at its step."""
        assert self._writer is not None, "start first"
        step = record["step"]
        for name, number in numbers(record).items():
            self._writer.add_scalar(name, number, step)

    def event(self, event: Mapping[str, object]) -> None:
        """Writes nothing: TensorBoard has no place for events."""

    def sample(self, name: str, value: object, *, step: int) -> None:
        """Writes a text or an image."""
        assert self._writer is not None, "start first"
        if isinstance(value, str):
            self._text(name, value, step=step)
        else:
            layout = "HW" if getattr(value, "ndim", 3) == 2 else "CHW"
            self._writer.add_image(name, value, step, dataformats=layout)

    def finish(self, status: Mapping[str, object]) -> None:
        """Writes what is still queued and ends the writer's thread."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _text(self, name: str, text: str, *, step: int) -> None:
        assert self._writer is not None
        self._writer.add_text(name, text, step)
