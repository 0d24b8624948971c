"""How much of what meta-training learned is to be kept?

    python -m benchmarks.shrink runs/mixture --judge
    python -m benchmarks.shrink runs/mixture --share 0.5 --output mixture.safetensors

Evolution strategies leave noise in the weights, most of it where few tasks say anything. Since a
meta-optimizer whose readout and linear map are zero is the nominal rule, a share of both lies
between that rule and what was learned. ``--judge`` trains models with several shares on the run's
own tasks, training's and selection's, by clean gradients, and prints their robust accuracy under
PGD-20 on the margin and their clean accuracy.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp

import advmeta
from advmeta import config_files
from advmeta.attacks.losses import margin
from advmeta.held_out import Accuracy, held_out_accuracy
from advmeta.meta_optimizer import MetaOptimizerConfig, scale_by_meta_optimizer
from advmeta.meta_optimizer.weights import load_weights, save_weights
from advmeta.task_families import TaskConfig
from advmeta.tasks import aim_at
from advmeta.training_command import MetaTrain
from advmeta.types import Array, Key, MetaParams

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = 200


def shrink(meta_params: MetaParams, share: Array | float) -> MetaParams:
    """The meta-parameters with so much of what takes the update away from the nominal rule."""

    def part(tree: MetaParams) -> MetaParams:
        return jax.tree.map(lambda leaf: share * leaf, tree)

    lstm = {**meta_params["lstm"], "readout": part(meta_params["lstm"]["readout"])}
    return {**meta_params, "lstm": lstm, "linear": part(meta_params["linear"])}


def judge(
    meta_params: MetaParams, config: MetaOptimizerConfig, task: TaskConfig, models: int
) -> list[Accuracy]:
    """Mean accuracy of so many models of the task for each share."""
    family = task.build()

    def train_one(share: Array, key: Key) -> Accuracy:
        task_key, train_key, attack_key = jax.random.split(key, 3)
        task = family.sample(task_key)
        aim = aim_at(task.threat_model, STEPS)
        optimizer = scale_by_meta_optimizer(shrink(meta_params, share), config, aim)
        params, _ = advmeta.train(task, optimizer, train_key, steps=STEPS)
        return held_out_accuracy(task, params, attack_key, attack_steps=20, restarts=1, loss=margin)

    keys = jax.random.split(jax.random.key(0), models)
    train_all = jax.jit(jax.vmap(train_one, in_axes=(None, 0)))
    return [jax.tree.map(jnp.mean, train_all(share, keys)) for share in SHARES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="a folder of advmeta meta-train")
    parser.add_argument("--judge", action="store_true", help="print how each share does")
    parser.add_argument("--models", type=int, default=8, help="of each task and share")
    parser.add_argument("--share", type=float, help="what to keep")
    parser.add_argument("--output", type=pathlib.Path, help="weights to write; .json beside them")
    arguments = parser.parse_args()
    path = arguments.run / "meta_optimizer.safetensors"
    meta_params, config, card = load_weights(path)
    if arguments.judge:
        training = config_files.from_json(MetaTrain, arguments.run / "config.json").training
        print("| task |" + "".join(f" {share} |" for share in SHARES))
        for task in (*training.selection, *training.tasks):
            found = judge(meta_params, config, task, arguments.models)
            name = f"{task.dataset} {task.optimizee} {task.norm} {task.epsilon}"
            print(f"| {name} |" + "".join(f" {a.robust:.3f} ({a.clean:.3f}) |" for a in found))
    if arguments.share is not None:
        about = {k: v for k, v in card.items() if k != "meta_optimizer"}
        about["share_kept"] = arguments.share
        save_weights(arguments.output, shrink(meta_params, arguments.share), config, **about)


if __name__ == "__main__":
    main()
