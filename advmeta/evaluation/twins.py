"""Images next to what breaks a model on them."""

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from advmeta.attacks.projected_gradient import pgd
from advmeta.tasks import Task
from advmeta.types import Key, Params

COUNT = 10


def twins(task: Task, params: Params, key: Key) -> dict[str, list]:
    """The first ten held-out examples that PGD breaks, as JSON can hold them.

    Args:
      task: data, model and threat model.
      params: of the model.
      key: of the attack.

    Returns:
      Lists of at most ten: "x" and "x_adv", images [h, w, c] to three decimals; "label"; and
      "prediction" of the adversarial one. Examples that are misclassified as they are have no part
      in it.

    Example:
      >>> from advmeta.evaluation.twins import twins
      >>> digits = advmeta.data.load("digits", train_examples=100)
      >>> task = advmeta.Task(digits.train, digits.test, advmeta.ThreatModel("linf", 0.2),
      ...                     advmeta.optimizees.linear(), batch_size=32)
      >>> params, _ = advmeta.train(task, optax.adam(1e-2), jax.random.key(0), steps=50)
      >>> pairs = twins(task, params, jax.random.key(1))
      >>> len(pairs["x"]), any(map(int.__eq__, pairs["label"], pairs["prediction"]))
      (10, False)
    """
    logits_fn = Partial(task.optimizee.apply, params)
    x, y = task.held_out
    result = pgd(logits_fn, x, y, threat_model=task.threat_model, key=key, steps=40)
    before, after = (jnp.argmax(logits_fn(images), axis=-1) for images in (x, result.x_adv))
    broken = np.flatnonzero((before == y) & (after != y))[:COUNT]
    images = {"x": x, "x_adv": result.x_adv}
    return {
        **{name: np.round(np.asarray(v[broken], float), 3).tolist() for name, v in images.items()},
        "label": y[broken].tolist(),
        "prediction": after[broken].tolist(),
    }
