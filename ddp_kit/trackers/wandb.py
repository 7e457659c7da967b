"""Weights & Biases: one of its runs per training run, continued by every later attempt.

The id is kept in the run directory. W&B is not told the command line, the git remote and the code,
which may hold secrets. Its own step counter is not used, since it drops steps that a resumed
attempt repeats: `step` is an axis of its own.
"""

import html
import netrc
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ddp_kit.distributed.topology import environment
from ddp_kit.errors import ConfigError, require
from ddp_kit.io.logs import logger
from ddp_kit.settings import Wandb
from ddp_kit.trackers.base import RunInfo, numbers

if TYPE_CHECKING:
    from wandb import Run, Settings

INIT_TIMEOUT_S = 30.0
# What is not uploaded by then stays on disk for `wandb sync`; a grace period may be running.
FINISH_TIMEOUT_S = 60.0
SERVER = "https://api.wandb.ai"


class WandbTracker:
    """Sends records to W&B.

    Offline it keeps them in the run directory, for `wandb sync` to send later.
    """

    def __init__(self, settings: Wandb) -> None:
        """Args: `settings` project, entity, group, tags and mode, as --wandb.* give them."""
        self._settings = settings
        self._wandb: ModuleType | None = None
        self._run: Run | None = None

    def start(self, info: RunInfo) -> None:
        """Opens the W&B run, offline if there is no key or no server.

        Raises: MissingPackageError without wandb; ConfigError if the key is refused, or online was
            asked for and cannot be had.
        """
        self._wandb = require("wandb", extra="wandb")
        mode = self._mode()
        try:
            self._run = self._init(info, mode=mode)
        except self._wandb.errors.AuthenticationError as error:
            raise ConfigError(
                f"W&B refuses the key: {error}. Type wandb login, or --wandb.mode offline."
            ) from error
        except self._wandb.errors.CommError as error:
            if self._settings.mode == "online":
                raise ConfigError(
                    f"W&B cannot be reached: {error}. Drop --wandb.mode online to log offline."
                ) from error
            logger.warning("wandb: cannot be reached (%s); this life is logged offline", error)
            # Its service still holds the id of the run that did not start.
            self._wandb.teardown()
            mode = "offline"
            self._run = self._init(info, mode=mode)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            logger.info("wandb: %s", self._run.url)
        else:
            folder = Path(self._run.dir).parent
            logger.info("wandb: %s; to upload: wandb sync %s", mode, folder)

    def log(self, record: Mapping[str, object]) -> None:
        """Sends every number of the record, as train/loss, on the axis `step`."""
        assert self._run is not None, "start first"
        self._run.log({**numbers(record), "step": record["step"]})

    def event(self, event: Mapping[str, object]) -> None:
        """Sends nothing: events.jsonl has them, and W&B has no place for them."""

    def sample(self, name: str, value: object, *, step: int) -> None:
        """Sends a text or an image."""
        assert self._wandb is not None, "start first"
        assert self._run is not None, "start first"
        if isinstance(value, str):
            media = self._wandb.Html(f"<pre>{html.escape(value)}</pre>", inject=False)
        else:
            media = self._wandb.Image(_channels_last(value))
        self._run.log({f"samples/{name}": media, "step": step})

    def finish(self, status: Mapping[str, object]) -> None:
        """Puts the ending into the run's summary and waits until W&B has everything."""
        if self._run is None:
            return
        for name in ("status", "reason", "weights_sha256"):
            if status.get(name):
                self._run.summary[name] = status[name]
        self._run.finish(exit_code=1 if status.get("status") == "failed" else 0)
        self._run = None

    def _mode(self) -> str:
        stated = self._settings.mode or environment().get("WANDB_MODE")
        if stated:
            return stated
        return "online" if has_key() else "offline"

    def _init(self, info: RunInfo, *, mode: str) -> "Run":
        assert self._wandb is not None
        wanted = self._settings
        run: Run = self._wandb.init(
            project=wanted.project or "ddp_kit",
            entity=wanted.entity or None,
            group=wanted.group or None,
            tags=list(wanted.tags) or None,
            name=info.run_dir.name,
            job_type=info.name,
            id=run_id(info.run_dir),
            # Offline there is nothing to ask; `wandb sync` joins attempts by the id.
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(info.run_dir),
            config=dict(info.settings),
            settings=_quiet(self._wandb),
        )
        return run


def _quiet(wandb: ModuleType) -> "Settings":
    """Returns W&B's settings that leave the terminal to the console.

    They send neither the command line nor the git remote: both may hold secrets.
    """
    settings: Settings = wandb.Settings(
        silent=True,
        console="off",
        save_code=False,
        disable_git=True,
        x_disable_meta=True,
        x_save_requirements=False,
        init_timeout=INIT_TIMEOUT_S,
    )
    if hasattr(settings, "finish_timeout"):  # older versions wait until everything is uploaded
        settings.finish_timeout = FINISH_TIMEOUT_S
    return settings


def run_id(run_dir: Path) -> str:
    """Returns the W&B run's id.

    The first attempt makes it and keeps it in `wandb_id` for the later ones.
    """
    path = run_dir / "wandb_id"
    if path.exists():
        kept = path.read_text(encoding="utf-8").strip()
        if kept:
            return kept
    made = uuid.uuid4().hex[:8]
    path.write_text(made + "\n", encoding="utf-8")
    return made


def has_key() -> bool:
    """Returns whether a W&B login is at hand.

    That is a key or token in the environment, or a netrc entry for the server.
    """
    environ = environment()
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL", SERVER)).hostname or ""
    paths = [Path.home() / ".netrc", Path.home() / "_netrc"]
    given = environ.get("NETRC")
    if given:
        paths = [Path(given).expanduser()]
    for path in paths:
        try:
            if path.is_file() and netrc.netrc(path).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError):
            continue  # W&B could not read a key from it either
    return False


def _channels_last(value: object) -> object:
    """Returns an image (C, H, W) as a uint8 array (H, W, C), which W&B expects.

    Floats are in 0..1; an image (H, W) keeps its shape.
    """
    numpy = require("numpy", extra="wandb")
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    array = numpy.asarray(value)
    if array.dtype != numpy.uint8:
        array = (numpy.clip(array, 0.0, 1.0) * 255).round().astype(numpy.uint8)
    if array.ndim == 2:
        return array
    return array.transpose(1, 2, 0)
