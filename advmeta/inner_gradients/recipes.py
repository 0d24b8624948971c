"""Inner gradients by name, each with what an inner step of it costs."""

from typing import NamedTuple

from advmeta.imports import import_function, is_import_name
from advmeta.inner_gradients.basic import InnerGradient, adversarial, clean, noisy, replayed
from advmeta.inner_gradients.divergence import trades, vat
from advmeta.inner_gradients.low_cost import fgsm_rs, free, remembered, yopo


class Recipe(NamedTuple):
    """An inner gradient and its cost.

    A gradient evaluation is one pass of a batch forward and backward through the whole model.
    Passes forward alone, and passes through the first layer alone, are not counted.
    """

    inner_gradient: InnerGradient
    gradient_evaluations: int  # an inner step
    adversarial_examples: int  # made for each example of the batch, an inner step


RECIPES = {
    "clean": Recipe(clean, 1, 0),
    "noisy": Recipe(noisy, 1, 0),
    "adversarial": Recipe(adversarial(steps=7), 7 + 1, 1),
    "replayed": Recipe(replayed, 1, 0),
    "trades": Recipe(trades(steps=10), 10 + 2, 1),
    "fgsm-rs": Recipe(fgsm_rs, 1 + 1, 1),
    "free": Recipe(free(m=8), 1, 1),
    "remembered": Recipe(remembered(), 1, 1),
    "yopo": Recipe(yopo(m=5, n=3), 5, 5),
    "vat": Recipe(vat(iterations=1), 1 + 2, 1),
}


def by_name(name: str) -> InnerGradient:
    """An inner gradient of this package, or one of one's own, as module:function.

    The names are "clean", "noisy", "adversarial", "replayed", "trades", "fgsm-rs", "free",
    "remembered", "yopo" and "vat". Each is the function of that name with the constants that
    `RECIPES` gives it.

    Raises:
      ValueError: another name.
    """
    if is_import_name(name):
        return import_function(name, "inner_gradient")
    if name not in RECIPES:
        raise ValueError(f"inner_gradient={name!r} is unknown; the known ones are {list(RECIPES)}")
    return RECIPES[name].inner_gradient
