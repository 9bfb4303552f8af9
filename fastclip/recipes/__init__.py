"""Recipes: functions that return a complete `TrainConfig`.

A recipe is chosen by its short name (``fastclip train demo``) or as ``package.module:function``, so
that recipes may live outside this package. Its only argument is where the data is.
"""

from collections.abc import Callable

from fastclip.config import TrainConfig
from fastclip.recipes.demo import demo
from fastclip.recipes.gpu_demo import gpu_demo
from fastclip.recipes.paper import PAPER_RECIPES
from fastclip.recipes.smoke import smoke

Recipe = Callable[[str], TrainConfig]

RECIPES: dict[str, Recipe] = {
    "demo": demo,
    "gpu_demo": gpu_demo,
    "smoke": smoke,
    **PAPER_RECIPES,
}
