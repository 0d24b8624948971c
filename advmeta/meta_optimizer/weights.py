"""Meta-parameters on disk: a safetensors file with a JSON card beside it."""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from advmeta.meta_optimizer.rule import MetaOptimizerConfig
from advmeta.meta_optimizer.transform import check_meta_params
from advmeta.parameter_files import load_params, save_params
from advmeta.types import MetaParams


def save_weights(
    path: str | os.PathLike[str], meta_params: MetaParams, config: MetaOptimizerConfig, **card: Any
) -> None:
    """Writes ``path`` (safetensors) and its card, the same name ending in ``.json``.

    Args:
      path: ends in ".safetensors".
      meta_params: the weights.
      config: what they fit.
      **card: anything else that JSON can hold and a later user should know.
    """
    path = pathlib.Path(path)
    check_meta_params(meta_params, config)
    save_params(path, meta_params)
    card = {"meta_optimizer": dataclasses.asdict(config), **card}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(card, indent=2) + "\n")
    os.replace(temporary, path.with_suffix(".json"))


def load_weights(
    path: str | os.PathLike[str],
) -> tuple[MetaParams, MetaOptimizerConfig, dict[str, Any]]:
    """Reads what `save_weights` wrote: the meta-parameters, their config, and the whole card.

    Raises:
      ValueError: no such files, not safetensors, a card that is not JSON or lacks the config, or
        weights whose shapes do not fit it.
    """
    path = pathlib.Path(path)
    card = _read_card(path.with_suffix(".json"))
    try:
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in card["meta_optimizer"].items()
        }
        config = MetaOptimizerConfig(**fields)
        # A default may be another one than when the weights were made.
        if missing := dataclasses.asdict(config).keys() - fields.keys():
            raise TypeError(f"it lacks {sorted(missing)}")
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path.with_suffix('.json')} has no 'meta_optimizer' that is a "
            f"MetaOptimizerConfig: {error!r}"
        ) from error
    meta_params = load_params(path)
    check_meta_params(meta_params, config)
    return meta_params, config, card


def weights_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of what `load_weights` makes an optimizer of, in hexadecimal digits.

    Raises:
      ValueError: as `load_weights`.
    """
    _, config, _ = load_weights(path)
    sha = hashlib.sha256(pathlib.Path(path).read_bytes())
    sha.update(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    return sha.hexdigest()


def _read_card(path: pathlib.Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no card {str(path)!r}: weights are a .safetensors file and a .json beside it"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(card, dict):
        raise ValueError(f"{str(path)!r} holds {type(card).__name__}; a card is a JSON object")
    return card
