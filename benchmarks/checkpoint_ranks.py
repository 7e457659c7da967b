"""What a save costs one rank as the ranks grow in number: metadata only, in one process that plays
rank 0.

    python benchmarks/checkpoint_ranks.py

The state is a Llama of 7 billion fp32 parameters with AdamW's moments, 81 GB. `plan` is the cut and
the shard's header, a part of the call that training waits for. `commit` is the whole protocol, in
the background, with shards that hold their header alone, files on a disk, and the peers' rows made
up: what is left is the gathering of rows, and rank 0's look at every file and its manifest.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ddp_kit.checkpoint.format.commit import Ranks, commit
from ddp_kit.checkpoint.format.layout import MANIFEST, Manifest, folder_of
from ddp_kit.checkpoint.format.shard import shard_header
from ddp_kit.checkpoint.format.sharding import Shape, cut
from ddp_kit.checkpoint.format.storage import LocalDisk

LAYERS, HIDDEN, INNER, WORDS = 32, 4096, 11008, 32000


def llama() -> dict[str, Shape]:
    """Returns the shapes of model and optimizer state by name."""
    model: dict[str, tuple[int, ...]] = {
        "embed": (WORDS, HIDDEN),
        "head": (WORDS, HIDDEN),
        "norm": (HIDDEN,),
    }
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        model |= {f"{name}.{part}": (HIDDEN, HIDDEN) for part in "qkvo"} | {
            f"{name}.norm{i}": (HIDDEN,) for i in (1, 2)
        }
        model |= {
            f"{name}.gate": (INNER, HIDDEN),
            f"{name}.up": (INNER, HIDDEN),
            f"{name}.down": (HIDDEN, INNER),
        }
    state = {f"model/{name}": shape for name, shape in model.items()}
    for name, shape in model.items():
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"optimizer/{name}/{key}"] = shape
    return {name: Shape(shape, 4) for name, shape in state.items()}


@dataclass(frozen=True)
class Played(Ranks):
    """Ranks of which only this one is there."""

    def gather(self, content: bytes) -> list[bytes]:
        return [content] * self.world_size


def measure(
    shapes: dict[str, Shape], world_size: int, *, place: Path
) -> tuple[float, float, float, int]:
    """Returns the seconds of a rank's plan and of rank 0's commit, the largest shard over the mean
    one, and the manifest's bytes.
    """
    dtypes = dict.fromkeys(shapes, torch.float32)
    begin = time.perf_counter()
    header, _ = shard_header(
        cut(shapes, rank=world_size // 2, world_size=world_size), shapes, dtypes
    )
    plan = time.perf_counter() - begin
    sizes = []
    for rank in range(world_size):
        pieces = cut(shapes, rank=rank, world_size=world_size)
        sizes.append(
            sum(
                (piece.stop - piece.start) * shapes[piece.name].nbytes // shapes[piece.name].rows
                for piece in pieces
            )
        )
    temporary = place / f"{folder_of(1)}.tmp-played"
    temporary.mkdir()
    for rank in range(1, world_size):
        (temporary / f"rank-{rank}.safetensors").write_bytes(header)
    about = Manifest(
        run_id="benchmark", step=1, world_size=world_size, settings_sha256="", time=0.0
    )
    begin = time.perf_counter()
    commit(
        LocalDisk(place),
        Played(0, world_size),
        shard=memoryview(header),
        state=b"{}",
        manifest=about,
        token="played",
    )
    committed = time.perf_counter() - begin
    return (
        plan,
        committed,
        max(sizes) * world_size / sum(sizes),
        (place / folder_of(1) / MANIFEST).stat().st_size,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shapes = llama()
    print(
        f"{len(shapes)} tensors, {sum(shape.nbytes for shape in shapes.values()) / 1e9:.1f} GB, "
        f"torch {torch.__version__}, median (min-max)"
    )
    print(
        f"{'ranks':>6}{'plan, ms':>20}{'commit, ms':>22}{'of it a rank, us':>18}"
        f"{'largest shard / mean':>22}{'manifest, kB':>14}"
    )
    for world_size in (8, 64, 512, 1024):
        rounds = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                rounds.append(measure(shapes, world_size, place=Path(folder)))
        plans, commits = ([1e3 * one[i] for one in rounds] for i in (0, 1))
        texts = [
            f"{statistics.median(own):.1f} ({min(own):.1f}-{max(own):.1f})"
            for own in (plans, commits)
        ]
        each = statistics.median(commits) / world_size * 1e3
        print(
            f"{world_size:6}{texts[0]:>20}{texts[1]:>22}{each:18.0f}"
            f"{rounds[0][2]:22.4f}{rounds[0][3] / 1e3:14.1f}"
        )
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
