"""`advmeta patch`: makes the model of some files more robust, and writes its parameters."""

import dataclasses
import json
import pathlib

import jax
from rich.console import Console
from rich.table import Table

from advmeta import data, environment
from advmeta.attacks.threat_model import ThreatModel
from advmeta.imports import import_function
from advmeta.named_models import saved_model
from advmeta.parameter_files import load_any_params, save_params
from advmeta.patching import PatchReport, patch
from advmeta.run_folder import Shared, open_folder, replace_file
from advmeta.types import Norm


@dataclasses.dataclass(frozen=True)
class Patch(Shared):
    """Make a trained model more robust with a meta-optimizer and a little clean data.

    Writes patched.safetensors and results.json. Accuracies are measured on the data's test part.

    Example: advmeta patch --params mlp.safetensors --optimizee mlp-20 --data digits

    Args:
      params: nested dicts of arrays: a .safetensors file, Flax's .msgpack, or an Orbax checkpoint.
      model: module:function, (params, images [n, h, w, c]) -> logits [n, classes]. The current
        folder is looked in first.
      optimizee: instead of model, an architecture such as mlp-20 or cnn-8-16.
      data: digits, fashion_small, a TFDS name, or the path of an .npz file.
      examples: how many training images to patch with, drawn at random; all by default.
      weights: a name of advmeta.list_pretrained(), or a .safetensors file.
      steps: inner steps; by default the longest episode of the meta-optimizer's training.
      norm: of the perturbation that accuracies are measured under.
      epsilon: its radius, in units of images in [0, 1].
      max_clean_drop: the most that clean accuracy may fall, such as 0.03.
    """

    params: pathlib.Path | None = None
    model: str | None = None
    optimizee: str | None = None
    data: str = "digits"
    examples: int | None = None
    weights: str = "mixture"
    steps: int | None = None
    norm: Norm = "linf"
    epsilon: float = 0.1
    max_clean_drop: float | None = None


def patch_files(command: Patch, line: str, console: Console) -> pathlib.Path:
    """Patches, writes the folder, and prints a table; ``line`` is what was typed."""
    if command.params is None:
        raise ValueError("--params names the model's parameters, a .safetensors file for one")
    dataset = data.load(command.data)
    apply, params = _model(command.params, command.model, command.optimizee, dataset)
    draw_key, patch_key = jax.random.split(jax.random.key(command.seed))
    x, y = _some(dataset.train, command, draw_key)
    with open_folder("patch", command) as (folder, _):
        with console.status("patching"):
            patched, report = patch(
                apply, params, x, y, threat_model=ThreatModel(command.norm, command.epsilon),
                key=patch_key, meta_optimizer=command.weights, steps=command.steps,
                held_out=dataset.test, max_clean_drop=command.max_clean_drop,
            )  # fmt: skip
        save_params(folder / "patched.safetensors", patched)
        results = {"command": line, **_plain(report), **environment.describe()}
        replace_file(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    console.print(_table(report))
    if report.note:
        console.print(report.note, markup=False)
    return folder


def _model(path: pathlib.Path, model: str | None, optimizee: str | None, dataset: data.Dataset):
    x = dataset.test.x
    if optimizee is not None and model is None:
        return saved_model(path, optimizee, x.shape[1:], dataset.num_classes)
    if model is None or optimizee is not None:
        raise ValueError("give either --model module:function or --optimizee NAME, say mlp-20")
    apply, params = import_function(model, "model"), load_any_params(path)
    try:
        jax.eval_shape(apply, params, x[:1])
    except Exception as error:  # the user's function may raise anything
        raise ValueError(
            f"{model} fails on the parameters of {path} and an image of shape "
            f"{x.shape[1:]}: {type(error).__name__}: {error}"
        ) from error
    return apply, params


def _some(train, command: Patch, key):
    n = len(train.y)
    if command.examples is None:
        return train
    if not 1 <= command.examples <= n:
        raise ValueError(
            f"examples={command.examples} must be from 1 to {n}: so many training images are in "
            f"{command.data}"
        )
    index = jax.random.permutation(key, n)[: command.examples]
    return train.x[index], train.y[index]


def _plain(report: PatchReport) -> dict:
    nested = {name: getattr(report, name)._asdict() for name in ("before", "after")}
    return {**report._asdict(), **nested}


def _table(report: PatchReport) -> Table:
    table = Table("", "clean accuracy", "robust accuracy (PGD-40)")
    for name in ("before", "after"):
        accuracy = getattr(report, name)
        table.add_row(name, f"{accuracy.clean:.3f}", f"{accuracy.robust:.3f}")
    table.caption = (
        f"{report.steps} steps, {report.seconds:.0f} s; the parameters moved by "
        f"{report.distance:.2f} of their norm"
    )
    return table
