"""Who writes what: every row once, and as many bytes on each rank as rows allow."""

import pytest

from ddp_kit.checkpoint.format.sharding import Shape, cut


def transformer(layers: int = 12, width: int = 768, words: int = 50304) -> dict[str, Shape]:
    """Returns the shapes of a model of GPT-2's size with AdamW's state, in fp32."""
    shapes = {"words": (words, width), "places": (1024, width), "norm": (width,)}
    for i in range(layers):
        shapes |= {
            f"{i}.qkv": (3 * width, width),
            f"{i}.out": (width, width),
            f"{i}.up": (4 * width, width),
            f"{i}.down": (width, 4 * width),
        }
        shapes |= {f"{i}.{name}": (width,) for name in ("norm1", "norm2", "bias1", "bias2")}
    every = {}
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        every |= {f"{kind}/{name}": Shape(shape, 4) for name, shape in shapes.items()}
    return every | {f"step/{name}": Shape((), 4) for name in shapes}


AWKWARD = {
    "scalars": {f"s{i}": Shape((), 8) for i in range(5)},
    "empty": {
        "a": Shape((0,), 4),
        "b": Shape((3, 0), 4),
        "c": Shape((2,), 4),
        "d": Shape((0, 7), 4),
    },
    "one row": {"a": Shape((1, 1000), 4), "b": Shape((1, 1), 1), "c": Shape((1, 70), 2)},
    "nothing": {},
    "mixed": {
        "a": Shape((), 4),
        "b": Shape((300, 5), 8),
        "c": Shape((0, 5), 8),
        "d": Shape((1, 4000), 1),
        "e": Shape((7,), 1),
    },
}


@pytest.mark.parametrize("kind", [*AWKWARD, "transformer"])
def test_every_row_is_written_once_at_any_world_size(kind: str) -> None:
    shapes = transformer(layers=2) if kind == "transformer" else AWKWARD[kind]
    for world_size in range(1, 65):
        rows: dict[str, list[int]] = {name: [] for name in shapes}
        for rank in range(world_size):
            for piece in cut(shapes, rank=rank, world_size=world_size):
                rows[piece.name] += range(piece.start, piece.stop)
        for name, shape in shapes.items():
            assert rows[name] == list(range(shape.rows)) or not shape.nbytes, (name, world_size)


def test_shards_of_a_realistic_model_are_even_within_5_percent() -> None:
    shapes = transformer()
    for world_size in (1, 2, 3, 4, 7, 8, 16, 33, 64):
        sizes = [
            sum(
                (piece.stop - piece.start) * shapes[piece.name].nbytes // shapes[piece.name].rows
                for piece in cut(shapes, rank=rank, world_size=world_size)
            )
            for rank in range(world_size)
        ]
        assert max(sizes) <= 1.05 * sum(sizes) / world_size, (world_size, sizes)
