"""Whether the tensors that a file holds are those that are wanted, and the table that says which
are not.
"""

from collections.abc import Mapping

import torch

from ddp_kit.errors import ConfigError, nearest

Kind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor
MOST_ROWS = 20  # of a table


def misfits(found: Mapping[str, Kind], wanted: Mapping[str, Kind]) -> dict[str, str]:
    """Returns a row of a table for each tensor that is missing, unexpected or of another shape or
    dtype, by its name.
    """
    rows = {}
    for name in sorted({*found, *wanted}):
        if name not in found:
            near = nearest(name, set(found) - set(wanted))
            hint = f"   (the same? type --rename {near}={name})" if near else ""
            rows[name] = f"  missing     {name} {wanted[name][0]}{hint}"
            continue
        found_shape, found_dtype = found[name]
        if name not in wanted:
            rows[name] = f"  unexpected  {name} {found_shape}"
            continue
        wanted_shape, wanted_dtype = wanted[name]
        if found_shape != wanted_shape:
            rows[name] = f"  shape       {name}: here {wanted_shape}, there {found_shape}"
        elif found_dtype != wanted_dtype:
            rows[name] = f"  dtype       {name}: here {wanted_dtype}, there {found_dtype}"
    return rows


def table(rows: Mapping[str, str]) -> str:
    """Returns the first twenty rows, and how many more there are."""
    shown = list(rows.values())[:MOST_ROWS]
    if len(rows) > MOST_ROWS:
        shown.append(f"  ... and {len(rows) - MOST_ROWS} more")
    return "\n".join(shown)


def require_fit(
    found: Mapping[str, Kind], wanted: Mapping[str, Kind], *, where: str, hint: str = ""
) -> None:
    """Raises: ConfigError with a table of what does not fit, and the hint; nothing has been applied
    then.
    """
    rows = misfits(found, wanted)
    if rows:
        raise ConfigError(f"{where} does not fit; nothing was loaded.\n{table(rows)}{hint}")
