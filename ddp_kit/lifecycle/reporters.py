"""The reporter of a run on this rank: rank 0's has the trackers, and the peak that MFU is taken
of.
"""

import torch

from ddp_kit.checkpoint.format.writer import Saved
from ddp_kit.distributed.process_group import Group
from ddp_kit.io.logs import logger
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings
from ddp_kit.trackers.base import Tracker
from ddp_kit.trackers.console import Console
from ddp_kit.trackers.jsonl import JsonlTracker
from ddp_kit.training.peak_flops import peak_flops
from ddp_kit.training.reporter import Reporter

MIB = 2**20


def reporter_of(recipe: Recipe, settings: Settings, group: Group) -> Reporter:
    """Returns the reporter of this rank; rank 0's has the trackers."""
    if group.rank:
        return Reporter([], log_every=settings.log_every)
    console = Console()
    lines = JsonlTracker()
    trackers: list[Tracker] = [lines, console]
    if "wandb" in settings.tracker:
        from ddp_kit.trackers.wandb import WandbTracker

        trackers.append(WandbTracker(settings.wandb))
    if "tensorboard" in settings.tracker:
        from ddp_kit.trackers.tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker())
    return Reporter(
        [*trackers, *recipe.trackers],
        log_every=settings.log_every,
        peak_rate=peak_rate(recipe, settings, group),
        progress=[console.progress],
        on_burst=[lines.flush],
    )


def peak_rate(recipe: Recipe, settings: Settings, group: Group) -> float:
    """Returns the samples/s of a recipe if every rank's device, taken to be alike, ran at its peak;
    0 if that is not known.
    """
    if not recipe.flops_per_sample or group.device.type != "cuda":
        return 0.0
    device_peak = peak_flops(torch.cuda.get_device_name(group.device), precision=settings.precision)
    return group.world_size * device_peak / recipe.flops_per_sample


def tell_of_save(reporter: Reporter, save: Saved) -> None:
    """Writes down a save that has ended. A failed one is a warning, and training goes on."""
    said = save.error or save.note
    if said:
        logger.warning("checkpoint of step %s: %s", save.step, said)
    if save.error:
        reporter.event("save_failed", step=save.step, message=save.error)
        return
    words = f"{save.nbytes / MIB:.1f} MiB in {save.seconds:.2f} s"
    if save.note:
        words = f"{words}; {save.note}"
    reporter.event("save", step=save.step, message=words)
