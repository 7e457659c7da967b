"""Any recipe, made mortal: `RECIPE` in the environment names the file, `DEATHS="8:1"` kills rank 1 after step 8."""

import os
from dataclasses import replace
from typing import Any

from mortal import Death

from ddp_kit import Recipe
from ddp_kit.recipe import load_recipe

SHIPPED = load_recipe(os.environ["RECIPE"])
Settings = SHIPPED.settings


def recipe(settings: Any) -> Recipe:
    made = SHIPPED.build(settings)
    return replace(made, callbacks=[*made.callbacks, Death(os.environ.get("DEATHS", ""))])
