"""Meta-optimizers that come with the package, each with a card that says how it was made."""

import os
import pathlib
from typing import Any

import optax

from advmeta.imports import import_function, is_import_name
from advmeta.meta_optimizer.transform import scale_by_meta_optimizer
from advmeta.meta_optimizer.weights import load_weights

_FOLDER = pathlib.Path(__file__).parent


def list_pretrained() -> list[str]:
    """The names that `load_meta_optimizer` knows.

    Example:
      >>> advmeta.list_pretrained()
      ['digits-linf']
    """
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def load_meta_optimizer(
    name_or_path: str | os.PathLike[str],
) -> optax.GradientTransformationExtraArgs:
    """A meta-trained optimizer, ready to use: it needs no learning rate.

    Args:
      name_or_path: one of `list_pretrained`; a .safetensors file with its card beside it; or
        module:function, () -> an optax transformation of one's own.

    Raises:
      ValueError: an unknown name, or a file that `load_weights` refuses.

    Example:
      >>> optimizer = advmeta.load_meta_optimizer("digits-linf")
      >>> params = {"kernel": jnp.ones((64, 10)), "bias": jnp.zeros(10)}
      >>> state = optimizer.init(params)
      >>> step = jax.jit(optimizer.update)
      >>> updates, state = step(params, state, params)  # params in the place of a gradient
      >>> params = optax.apply_updates(params, updates)
    """
    if is_import_name(str(name_or_path)):
        return import_function(str(name_or_path), "weights")()
    meta_params, config, _ = load_weights(_path(name_or_path))
    return scale_by_meta_optimizer(meta_params, config)


def load_card(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """How a meta-optimizer was made: command, seed, hardware, versions, training, selection.

    Args and errors as in `load_meta_optimizer`.

    Example:
      >>> from advmeta.meta_optimizer.pretrained import load_card
      >>> load_card("digits-linf")["training"]["horizon"]
      [60, 200]
    """
    _, _, card = load_weights(_path(name_or_path))
    return card


def _path(name_or_path: str | os.PathLike[str]) -> pathlib.Path:
    if str(name_or_path).endswith(".safetensors"):
        return pathlib.Path(name_or_path)
    if name_or_path in list_pretrained():
        return _FOLDER / f"{name_or_path}.safetensors"
    raise ValueError(
        f"meta-optimizer {str(name_or_path)!r} is unknown; the known ones are "
        f"{list_pretrained()}, or give a file that ends in '.safetensors'"
    )
