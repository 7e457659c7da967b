"""Which evaluation is the best one, by which metric.

Owns: the choice of the metric, and saying at start where "best" may be another one than was meant.
Refuses: keeping weights: checkpoints do.
"""

import re
from collections.abc import Collection, Iterable

from ddp_kit.checkpoint.retention import Keep
from ddp_kit.settings import EarlyStop, Settings


def best_metric(rule: EarlyStop, names: Iterable[str]) -> str:
    """Returns the evaluation metric that decides: the early-stopping one, else the (first) loss; "" if there is neither."""
    return rule.metric or next((name for name in names if name == "loss" or name.endswith("/loss")), "")


def keep_of(settings: Settings, names: Iterable[str]) -> Keep:
    """Returns which checkpoints stay, `names` being those of an evaluation's metrics."""
    rule = settings.early_stop
    return Keep(
        newest=settings.keep,
        every=settings.keep_every,
        metric=best_metric(rule, names),
        mode=rule.mode if rule.metric else "min",
    )


def best_notes(rule: EarlyStop, names: Collection[str], *, has_test: bool) -> list[str]:
    """Says at start where "best" may be another one than was meant."""
    notes = []
    if rule.mode == "min" and re.search(r"acc|auc|auroc|f1|top[-_]?\d", rule.metric):
        notes.append(f"a smaller {rule.metric} counts as the better one: if it is the larger one, type --early-stop.mode max")
    if has_test and names and not best_metric(rule, names):
        notes.append(
            "the last weights are the ones tested, not the best, since evaluation reports no loss: let it report one, or type "
            f"--early-stop.metric with one of {', '.join(names)}"
        )
    return notes
