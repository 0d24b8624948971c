"""`advmeta attack`: AutoAttack on a model of the user's, or on a saved optimizee."""

import dataclasses
import functools
import json
import pathlib
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial
from rich.console import Console

from advmeta import data, environment
from advmeta.attacks.threat_model import ThreatModel
from advmeta.evaluation.accounting import contributions
from advmeta.evaluation.ensemble import AutoAttackResult, autoattack, check_evaluation
from advmeta.evaluation.versions import attack_list
from advmeta.imports import import_function, is_import_name
from advmeta.named_models import saved_model
from advmeta.report import attack_results
from advmeta.report.figures import to_png
from advmeta.report.images import image_grid
from advmeta.run_folder import Resumable, open_folder, replace_file
from advmeta.types import Batch, LogitsFn, Norm

_RESULTS = "results.json"


@dataclasses.dataclass(frozen=True)
class Attack(Resumable):
    """Evaluate a model with AutoAttack, on the test part of a data set.

    Example: advmeta attack --model my_models:logits --data cifar10 --epsilon 0.03137

    Args:
      model: module:function, images [n, h, w, c] -> logits [n, classes]; for "rand" (images, key)
        -> logits. The current folder is looked in first.
      params: instead of model, nested dicts of arrays: a .safetensors file, Flax's .msgpack, or an
        Orbax checkpoint.
      optimizee: the architecture of those params, such as mlp-20 or cnn-8-16.
      data: digits, fashion_small, a TFDS name, or the path of an .npz file.
      norm: of the perturbation.
      epsilon: its radius, in units of images in [0, 1].
      epsilons: several, for a curve, instead of epsilon.
      version: of AutoAttack; "rand" is for models that draw random numbers.
      attacks: instead of a version's, in this order: names such as apgd-ce, apgd-t, fab-t and
        square, or module:function for one of yours, called as
        function(logits_fn, x, y, threat_model=..., key=...) -> advmeta.attacks.AttackResult.
      examples: how many test images, the first ones; all by default.
      batch_size: images attacked at once; results do not depend on it.
    """

    model: str | None = None
    params: pathlib.Path | None = None
    optimizee: str | None = None
    data: str = "digits"
    norm: Norm = "linf"
    epsilon: float = 0.1
    epsilons: tuple[float, ...] = ()
    version: Literal["standard", "plus", "rand"] = "standard"
    attacks: tuple[str, ...] = ()
    examples: int | None = None
    batch_size: int = 256


class Target(NamedTuple):
    """What is attacked."""

    logits_fn: LogitsFn
    batch: Batch
    threat_model: ThreatModel


def attack(command: Attack, line: str, console: Console) -> pathlib.Path:
    """Evaluates, writes what was found, and prints a table; ``line`` is what was typed.

    The folder holds config.json, state.npz (the progress), ledger.jsonl (a line an example and
    epsilon), results.json, which is written last, images.png if anything was broken, and curve.png
    if there are several epsilons.
    """
    target = open_target(command)
    ask = functools.partial(
        autoattack, target.logits_fn, *target.batch, threat_model=target.threat_model,
        key=jax.random.key(command.seed), version="custom" if command.attacks else command.version,
        batch_size=command.batch_size, epsilons=command.epsilons or None,
    )  # fmt: skip
    attacks = named_attacks(command)
    check_evaluation(*ask.args, **ask.keywords)  # before a folder is made for nothing
    with open_folder("attack", command) as (folder, resumed):
        if resumed and (folder / _RESULTS).exists():  # the seconds to keep are those of the work
            console.print(attack_results.attack_table(json.loads((folder / _RESULTS).read_text())))
            return folder
        result = ask(attacks=attacks, state_path=folder / "state.npz", progress=True)
        results = summarise(command, target, result)
        results = {"command": line, **results, **environment.describe(), "resumed": resumed}
        entries = ledger_lines(command, target, result)
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        replace_file(folder / "ledger.jsonl", lines.encode())
        if len(command.epsilons) > 1:
            replace_file(folder / "curve.png", attack_results.curve(results))
        if grid := _images(command, target, result, entries):
            replace_file(folder / "images.png", grid)
        replace_file(folder / _RESULTS, (json.dumps(results, indent=1) + "\n").encode())
        console.print(attack_results.attack_table(results))
        if result.note:
            console.print(result.note, markup=False)
        return folder


def open_target(command: Attack) -> Target:
    """Loads the model and the data that the options name.

    Raises:
      ValueError: not one of model and params, params without optimizee, or too few examples;
        else as `data.load`, `import_model` and `saved_model`.
    """
    if (command.model is None) == (command.params is None):
        raise ValueError(
            "give either --model module:function, or --params FILE.safetensors and --optimizee NAME"
        )
    if (command.params is None) != (command.optimizee is None):
        raise ValueError(
            f"optimizee={command.optimizee!r} with params={command.params}: --params FILE and "
            "--optimizee NAME, such as mlp-20, go together"
        )
    threat_model = ThreatModel(command.norm, command.epsilon)
    dataset = data.load(command.data)
    x, y = dataset.test
    if command.examples is not None and not 1 <= command.examples <= len(y):
        raise ValueError(
            f"examples={command.examples} must be from 1 to {len(y)}: so many test images are in "
            f"{command.data}"
        )
    if command.model is not None:
        model = import_function(command.model, "model")
    else:
        classes = dataset.num_classes
        of = command.params, command.optimizee, x.shape[1:], classes
        model = Partial(*saved_model(*of))  # pyright: ignore[reportArgumentType]  # both are there
    return Target(model, Batch(x[: command.examples], y[: command.examples]), threat_model)


def named_attacks(command: Attack) -> list | None:
    """The attacks that the options name, as `autoattack` takes them; None for a version's.

    Raises:
      ValueError: a version and attacks, an unknown name, or as `import_function`.
    """
    if not command.attacks:
        return None
    if command.version != "standard":
        raise ValueError(
            f"version={command.version!r} and attacks={command.attacks}: give one of them"
        )
    named = [
        (name, import_function(name, "attacks")) if is_import_name(name) else name
        for name in command.attacks
    ]
    attack_list("custom", 10, named)  # raises for an unknown name
    return named


def summarise(command: Attack, target: Target, result: AutoAttackResult) -> dict:
    """What results.json says of an evaluation.

    "evaluations" counts the examples that went through the model, at most; "seconds" are those of
    this call, compilation included.
    """
    settings = {
        name: getattr(command, name)
        for name in (
            "model",
            "optimizee",
            "data",
            "norm",
            "version",
            "attacks",
            "batch_size",
            "seed",
        )
    }
    return {
        **settings,
        "params": None if command.params is None else str(command.params),
        "bounds": target.threat_model.bounds,
        "examples": len(target.batch.y),
        "clean_accuracy": result.clean_accuracy,
        "points": contributions(result.ledger, _epsilons(command)),
        "evaluations": {name: each._asdict() for name, each in result.evaluations.items()},
        "seconds": {name: round(seconds, 2) for name, seconds in result.seconds.items()},
        "note": result.note,
    }


def ledger_lines(command: Attack, target: Target, result: AutoAttackResult) -> list[dict]:
    """For each epsilon and example: its label, who broke it (or null), in which run, how far."""
    book = result.ledger
    names, runs, distances = (np.atleast_2d(v) for v in (book.names(), book.run, book.distance))
    return [
        {
            "epsilon": epsilon,
            "example": example,
            "label": int(label),
            "broken_by": str(names[place, example]) or None,
            "run": int(runs[place, example]),
            "distance": float(distances[place, example]) if names[place, example] else None,
        }
        for place, epsilon in enumerate(_epsilons(command))
        for example, label in enumerate(target.batch.y)
    ]


def _epsilons(command: Attack) -> tuple[float, ...]:
    return command.epsilons or (command.epsilon,)


def _images(
    command: Attack, target: Target, result: AutoAttackResult, entries: list[dict]
) -> bytes | None:
    """The grid of what is broken at the largest epsilon, where all is that is broken at any."""
    epsilons = _epsilons(command)
    broken = [
        entry
        for entry in entries
        if entry["epsilon"] == max(epsilons) and entry["broken_by"] not in (None, "clean")
    ]
    if not broken:
        return None
    index = [entry["example"] for entry in broken]
    x = np.asarray(target.batch.x)
    x_adv = np.asarray(result.x_adv).reshape(-1, *x.shape)[epsilons.index(max(epsilons))]
    names = [f"{e['label']}\n{e['broken_by']}\n{e['distance']:.3g}" for e in broken]
    return to_png(image_grid(x[index], x_adv[index], names))
