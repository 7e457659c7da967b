"""What holds for a field of `Settings` beside its type, said where the field is."""

from dataclasses import dataclass, fields, is_dataclass

RULE = "ddp_kit"  # the key of a field's rule in its metadata


@dataclass(frozen=True)
class Rule:
    """What holds for a field beside its type; `rule` tells what each means."""

    task: str
    least: float | None
    below: float | None
    expected: str
    is_free: bool
    elsewhere: tuple[str, ...]


def rule(
    task: str,
    *,
    least: float | None = None,
    below: float | None = None,
    expected: str = "0 or more",
    free: bool = False,
    elsewhere: tuple[str, ...] = (),
) -> dict[str, Rule]:
    """Returns the metadata of a dataclass field that has a rule.

    Args: `task` the heading it is under in `--help`; `least`, `below` a number is at least the one
        and less than the other, which `expected` says in words; `free` whether a later attempt may
        have another value without `--change`; `elsewhere` the flags of the same meaning in
        Accelerate's examples, Lightning, Hugging Face's Trainer and DeepSpeed.
    """
    return {RULE: Rule(task, least, below, expected, free, elsewhere)}


def rules(cls: type) -> dict[str, Rule]:
    """Returns the rules of the fields that have one.

    A recipe that gives a field another default keeps the rule: it is the class's above it.
    """
    found: dict[str, Rule] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        for each in fields(base):
            if RULE in each.metadata:
                found[each.name] = each.metadata[RULE]
    return found
