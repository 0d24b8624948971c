"""AutoAttack's verdict on the models of the transfer table, with PGD's beside it."""

import jax
from jax.tree_util import Partial

from advmeta.evaluation.ensemble import autoattack
from advmeta.tasks import Task
from advmeta.types import Key, PyTree


def with_autoattack(task: Task, params: PyTree, key: Key, records: list[dict]) -> list[dict]:
    """The records of models with AutoAttack's robust accuracy in the place of PGD's.

    What they said of PGD stays in them as "pgd" and "pgd_accuracy".

    Args:
      task: what the models are judged on.
      params: the models, stacked along the first axis.
      key: for the attacks.
      records: one a model, as `transfer_table` makes them with PGD.
    """
    robust = autoattack_accuracy(task, params, key)
    return [
        {
            **record,
            "attack": "autoattack-standard",
            "robust_accuracy": accuracy,
            "pgd": record["attack"],
            "pgd_accuracy": record["robust_accuracy"],
        }
        for record, accuracy in zip(records, robust, strict=True)
    ]


def autoattack_accuracy(task: Task, params: PyTree, key: Key) -> list[float]:
    """Robust accuracy under AutoAttack-standard of models stacked along the first axis.

    Models of one architecture go through the same compiled attacks: only the first one waits.
    """
    count = jax.tree.leaves(params)[0].shape[0]
    models = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(count)]
    ball = task.threat_model
    return [
        float(
            autoattack(
                Partial(task.optimizee.apply, model), *task.held_out, threat_model=ball, key=key
            ).robust_accuracy
        )
        for model in models
    ]
