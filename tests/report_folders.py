"""Run folders for the tests of reports."""

import json
import math
import pathlib

from advmeta import Check

PLACE = {
    "setting": "same architecture", "dataset": "digits", "architecture": "mlp-32", "norm": "linf",
    "epsilon": 0.1, "attack": "pgd-40x3", "inner_steps": 200,
}  # fmt: skip
COST = {"gradient_evaluations": 200, "adversarial_examples": 0, "seconds": 2.0}
ROBUST = {  # (optimizer, inner gradient): of seeds 0, 1, 2
    ("meta-optimizer", "clean"): (0.60, 0.64, 0.68),
    ("adam", "adversarial"): (0.70, 0.72, 0.74),
    ("sgd", "noisy"): (0.50, 0.52, 0.54),
    ("adam", "clean"): (0.48, 0.50, 0.52),
    ("adam, no decay", "clean"): (0.44, 0.45, 0.46),
}


def make_records(seeds=3, **changes) -> list[dict]:
    return [
        PLACE | COST | {
            "optimizer": optimizer, "inner_gradient": inner, "seed": seed,
            "clean_accuracy": 0.9 + 0.01 * seed, "robust_accuracy": robust[seed],
            "tuning_gradient_evaluations": 0 if "meta" in optimizer else 5000,
            "hyperparameters": {} if "meta" in optimizer else {"learning_rate": 0.003},
        } | changes
        for optimizer, inner in ROBUST
        for robust in [ROBUST[optimizer, inner]]
        for seed in range(seeds)
    ]  # fmt: skip


def make_curves() -> dict:
    common = [{"optimizer": optimizer, "inner_gradient": inner, "seed": seed}
              for optimizer, inner in ROBUST for seed in range(2)]  # fmt: skip
    learning = {"steps": [0, 50, 100], "clean_accuracy": [0.1, 0.8, 0.9],
                "robust_accuracy": [0.1, 0.4, 0.5]}  # fmt: skip
    epsilon = {"epsilons": [0.0, 0.1, 0.2], "robust_accuracy": [0.9, 0.5, 0.1]}
    return {"learning": [c | learning for c in common], "epsilon": [c | epsilon for c in common]}


METRICS = [
    {"outer_step": 50 * i, "meta_loss": 2 / i, "clean_accuracy": 0.9, "robust_accuracy": 0.1 * i}
    for i in range(1, 5)
]


def make_checks() -> list[dict]:
    passed = Check("randomized_model", 1, 0.0, 1e-4, True, "largest difference")
    failed = Check("stable_loss", 15, math.nan, 0.25, False, "[red] <i>: average")
    left_out = Check("full_disclosure", 24, None, None, None, "left out: the report")
    return [check._asdict() for check in (passed, failed, left_out)]


def make_behaviour() -> dict:
    """Of two optimizers and two layers."""
    x = [10 ** (k / 4 - 3) for k in range(16)]
    curves = [
        {
            "optimizer": name,
            "x": x,
            "low": [rate * v / 2 for v in x],
            "median": [rate * v for v in x],
            "high": [rate * v * 2 for v in x],
        }
        for name, rate in (("meta-optimizer", 1e-3), ("adam 0.01", 2e-3))
    ]
    names = ("meta-optimizer", "adam 0.01")
    return {
        "against_gradient": curves,
        "against_parameter": curves,
        "effective_step": [
            {"optimizer": name, "layer": layer, "steps": [50, 100], "share": share}
            for name, share in zip(names, ([0.05, 0.01], [0.02, 0.02]), strict=True)
            for layer in ("layer_0/kernel", "layer_1/kernel")
        ],
    }


def make_twins() -> dict:
    images = [[[[(r + c + n) % 2 / 2] for c in range(8)] for r in range(8)] for n in range(10)]
    moved = [[[[0.1 + v[0]] for v in row] for row in image] for image in images]
    return {"x": images, "x_adv": moved, "label": [3] * 10, "prediction": [8] * 10}


def fill_folder(folder: pathlib.Path) -> None:
    """A run folder with every file in it."""
    contents = {
        "config.json": {
            "seed": 0,
            "tasks": [{"epsilon": 0.1}],
            "note": "<script>alert(1)</script>",
        },
        "card.json": {"name": "a & b", "command": 'advmeta run "x"', "seed": 0, "seconds": 300.0},
        "results.json": make_records(),
        "curves.json": make_curves(),
        "sanity.json": make_checks(),
        "behaviour.json": make_behaviour(),
        "twins.json": make_twins(),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in METRICS))
