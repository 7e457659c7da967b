"""Any recipe, made mortal: `RECIPE` in the environment names the file, `DEATHS="8:1"` kills rank 1 after step 8. `HELD_OUT="100"`: so
many training images of MNIST and CIFAR-10 are for validation, instead of 5,000, which take longer to look at than a test may."""

import os
from dataclasses import replace
from typing import Any

from mortal import Death

from ddp_kit import Recipe
from ddp_kit.data import known
from ddp_kit.recipe import load_recipe

SHIPPED = load_recipe(os.environ["RECIPE"])
known.VALIDATION = int(os.environ.get("HELD_OUT", known.VALIDATION))
Settings = SHIPPED.settings


def recipe(settings: Any) -> Recipe:
    made = SHIPPED.build(settings)
    return replace(made, callbacks=[*made.callbacks, Death(os.environ.get("DEATHS", ""))])
