"""Where the records of a run go, on rank 0.

That is JSON lines, the console, W&B, TensorBoard, and trackers of a user's own.
"""

from ddp_kit.trackers.base import RunInfo, Tracker

__all__ = ["RunInfo", "Tracker"]
