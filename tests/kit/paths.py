"""Where things are in a checkout, for tests in any folder."""

from pathlib import Path

KIT = Path(__file__).resolve().parent
ROOT = KIT.parents[1]
RECIPES = ROOT / "recipes"
