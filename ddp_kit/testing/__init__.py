"""A test kit: test bodies that run on real gloo ranks, and the checks that go with them.

The marker `ranks` and the fixtures `group`, `no_leaks` and `one_process_group` are in
`ddp_kit.testing.plugin`. Nothing here imports torch before a test needs it, so pytest starts as
fast with the kit as without it.
"""

from ddp_kit.testing.rank import current_group
from ddp_kit.testing.ranks import Ranks, run_ranks, start_ranks
from ddp_kit.testing.report import RankReport, RanksError
from ddp_kit.testing.same import assert_same_on_all_ranks

__all__ = [
    "RankReport",
    "Ranks",
    "RanksError",
    "assert_same_on_all_ranks",
    "current_group",
    "run_ranks",
    "start_ranks",
]
