"""The run that most tests of checkpoints kill."""

from paths import KIT

MORTAL = str(KIT / "mortal.py")


SMALL = [
    "--epochs",
    "1",
    "--width",
    "16",
    "--save-every",
    "4",
    "--eval-every",
    "100",
]  # saves at 4, 8 and 10
