"""Meta-optimizers that come with the package, each with a card that says how it was made."""

import os
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import optax
from jax.core import Tracer

from advmeta.imports import import_function, is_import_name
from advmeta.meta_optimizer.features import Aim
from advmeta.meta_optimizer.transform import scale_by_meta_optimizer
from advmeta.meta_optimizer.weights import load_weights, weights_digest

_FOLDER = pathlib.Path(__file__).parent


def list_pretrained() -> list[str]:
    """The names that `load_meta_optimizer` knows.

    Example:
      >>> advmeta.list_pretrained()
      ['mixture', 'mixture-adversarial', 'mixture-noisy']
    """
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def load_meta_optimizer(
    name_or_path: str | os.PathLike[str],
    aim: Aim = Aim(),
) -> optax.GradientTransformationExtraArgs:
    """A meta-trained optimizer, ready to use: it needs no learning rate.

    Args:
      name_or_path: one of `list_pretrained`; a .safetensors file with its card beside it; or
        module:function, () -> an optax transformation of one's own.
      aim: norm, epsilon and horizon, which those with the features "aim" and "time" look at.

    Raises:
      ValueError: an unknown name, or a file that `load_weights` refuses.

    Warns:
      UserWarning: the aim is not one that the meta-optimizer was trained for.

    Example:
      >>> optimizer = advmeta.load_meta_optimizer("mixture")
      >>> params = {"kernel": jnp.ones((64, 10)), "bias": jnp.zeros(10)}
      >>> state = optimizer.init(params)
      >>> step = jax.jit(optimizer.update)
      >>> updates, state = step(params, state, params)  # params in the place of a gradient
      >>> params = optax.apply_updates(params, updates)
    """
    if is_import_name(str(name_or_path)):
        return import_function(str(name_or_path), "weights")()
    meta_params, config, card = load_weights(weights_path(name_or_path))
    for note in outside_of(card, name_or_path, aim):
        warnings.warn(note, stacklevel=2)
    return scale_by_meta_optimizer(meta_params, config, aim)


def tell_apart(name_or_path: str | os.PathLike[str]) -> str:
    """The `weights_digest` of what `load_meta_optimizer` would load; of a function its name."""
    if is_import_name(str(name_or_path)):
        return str(name_or_path)
    return weights_digest(weights_path(name_or_path))


def load_card(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """How a meta-optimizer was made: command, seed, hardware, versions, training, selection.

    Of those that come with the package, "tested" holds what models came to that it had not met,
    "weak_at" where others do better, and "changed_since" what has become of the code that made it.

    Args and errors as in `load_meta_optimizer`.

    Example:
      >>> from advmeta.meta_optimizer.pretrained import load_card
      >>> load_card("mixture")["training"]["horizon"]
      [100, 300]
    """
    _, _, card = load_weights(weights_path(name_or_path))
    return card


def outside_of(card: dict[str, Any], name: object, aim: Aim) -> list[str]:
    """What a user should know whose aim a meta-optimizer was not trained for.

    Args:
      card: as from `load_card`; one without "training" says nothing.
      name: of the meta-optimizer, for people.
      aim: where it is traced it cannot be looked at.
    """
    if "training" not in card:
        return []
    notes, (shortest, longest) = [], card["training"]["horizon"]
    if not isinstance(aim.epsilon, Tracer):
        epsilon = np.asarray(aim.epsilon)
        balls = [_radii(task) for task in card["training"]["tasks"]]
        if not any(
            norm == aim.norm and (0.999 * low <= epsilon).all() and (epsilon <= 1.001 * high).all()
            for norm, low, high in balls
        ):
            known = ", ".join(
                f"{norm} {low:g}" if low == high else f"{norm} {low:g} to {high:g}"
                for norm, low, high in sorted(set(balls))
            )
            notes.append(f"{name} was trained for {known} alone")
    if aim.horizon is None or isinstance(aim.horizon, Tracer):
        return notes
    if not shortest <= np.asarray(aim.horizon) <= longest:
        notes.append(f"{name} was trained for {shortest} to {longest} steps")
    return notes


def untested_on(card: dict[str, Any], name: object, inner_gradients: Iterable[str]) -> list[str]:
    """What a user should know who gives a meta-optimizer these gradients.

    Args:
      card: as from `load_card`; one without "tested" says nothing.
      name: of the meta-optimizer, for people.
      inner_gradients: their names, as "clean".
    """
    known = list(dict.fromkeys(test["inner_gradient"] for test in card.get("tested", [])))
    others = [gradient for gradient in inner_gradients if gradient not in known]
    if not known or not others:
        return []
    return [
        f"{name} is for {' and '.join(known)} gradients, and was not tested on "
        f"{' and '.join(others)} ones: it may hardly regularise there"
    ]


def _radii(task: dict[str, Any]) -> tuple[str, float, float]:
    """The norm of a `TaskConfig` in JSON, and its smallest and largest epsilon."""
    factor = task.get("variation", {}).get("epsilon", 1.0)
    return task["norm"], task["epsilon"] / factor, task["epsilon"] * factor


def weights_path(name_or_path: str | os.PathLike[str]) -> pathlib.Path:
    """The safetensors file of a name of `list_pretrained`, or the file that is given."""
    if str(name_or_path).endswith(".safetensors"):
        return pathlib.Path(name_or_path)
    if name_or_path in list_pretrained():
        return _FOLDER / f"{name_or_path}.safetensors"
    raise ValueError(
        f"meta-optimizer {str(name_or_path)!r} is unknown; the known ones are "
        f"{list_pretrained()}, or give a file that ends in '.safetensors'"
    )
