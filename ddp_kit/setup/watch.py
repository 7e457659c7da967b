"""How a run watches its own steps: what it does about bad ones, and how it looks for wrong bits."""

from ddp_kit.errors import ConfigError
from ddp_kit.settings import Settings
from ddp_kit.training.agreement import holds_copies
from ddp_kit.training.bad_steps import BadSteps
from ddp_kit.training.computed_twice import ComputedTwice
from ddp_kit.training.spikes import Spikes
from ddp_kit.training.state import Training


def watch_steps(training: Training, settings: Settings) -> None:
    """Gives training what the settings say of bad steps. Every rank calls it.

    Raises: ConfigError if a step could be left out by halves.
    """
    spikes = None
    if settings.on_spike != "off":
        spikes = Spikes(window=settings.spike_window, z=settings.spike_z)
    training.bad_steps = BadSteps(
        on_nonfinite=settings.on_nonfinite,
        on_spike=settings.on_spike,
        most=settings.max_dropped,
        spikes=spikes,
    )
    for name in ("on_nonfinite", "on_spike"):
        if getattr(settings, name) == "skip" and len(training.objectives) > 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} skip: the recipe has {len(training.objectives)} objectives, which step "
                "one after the other, and the step of one cannot be taken back when a later one "
                f"is bad. Type {flag} rollback, which leaves out the whole step."
            )
    if not training.bad_steps.only_stops:
        for objective in training.objectives:
            # The verdict is due before the next step.
            objective.is_deferred = False
    if settings.sdc_check:
        training.look_twice = ComputedTwice(training, every=settings.sdc_check)
    training.check_every = settings.check_every
    if training.group.world_size > 1 and not holds_copies(training):
        training.notes.append(
            f"--strategy {settings.strategy} splits the weights, and no rank has a copy that could "
            "be compared with another's: --check-every looks at buffers alone"
        )
