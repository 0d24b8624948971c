"""The attacks that the checks are worked out from: each is run once, and several checks use it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from advmeta.attacks import apgd, losses, square, uniform_noise
from advmeta.attacks.projected_gradient import History, ascend
from advmeta.attacks.threat_model import ORDERS, ThreatModel
from advmeta.attacks.validation import AttackResult
from advmeta.evaluation.sanity.probes import logits_of
from advmeta.types import Array, Key

APGD_STEPS = 50
TARGET_RANKS = (2, 3, 4)  # the strongest classes but the predicted one
QUERIES = 1000
SAMPLES = 1000  # with 128 examples a few hundred thousand in all would be 20 times as many
FACTORS = (0.5, 1.0, 2.0)  # of epsilon, before the whole width of the bounds


class Attempt(NamedTuple):
    """One run of the attack that is being checked."""

    result: AttackResult
    history: History  # [restarts, steps + 1, n]


class Attempts(NamedTuple):
    """What each attack did, on the host."""

    attack: Attempt  # the attack that is being checked
    again: Attempt  # the same from other random starts
    ladder: History  # [5, 2 steps + 1, n]: epsilon x `FACTORS`, the width, and a step of FGSM
    targeted: AttackResult  # APGD on the targeted DLR, another loss than PGD's
    square: AttackResult
    noise: AttackResult
    transferred: np.ndarray | None  # bool [n]: broken by what was made for the surrogate


def attempt_all(
    logits_fn: Partial, x: Array, y: Array, threat_model: ThreatModel, key: Key,
    *, attack_steps: int, restarts: int, loss: losses.Loss, surrogate: Partial | None,
) -> Attempts:  # fmt: skip
    """Runs every attack on checked arguments."""
    keys = jax.random.split(key, 7)

    def run_pgd(model: Partial, key: Key) -> Attempt:
        return Attempt(*ascend(
            model, x, y, threat_model, key, None, None, steps=attack_steps, restarts=restarts,
            targeted=False, loss=loss,
        ))  # fmt: skip

    def run(attack, key: Key, **options) -> AttackResult:
        return attack(logits_fn, x, y, threat_model=threat_model, key=key, **options)

    transferred = None
    if surrogate is not None:
        moved = run_pgd(surrogate, keys[6]).result.x_adv
        transferred = np.asarray(logits_of(logits_fn, moved)).argmax(axis=1) != np.asarray(y)
    made = Attempts(
        attack=run_pgd(logits_fn, keys[0]),
        again=run_pgd(logits_fn, keys[1]),
        ladder=_ladder(logits_fn, x, y, threat_model, keys[2], attack_steps, loss),
        targeted=run(apgd, keys[3], loss="dlr", target_ranks=TARGET_RANKS, steps=APGD_STEPS),
        square=run(square, keys[4], queries=QUERIES),
        noise=run(uniform_noise, keys[5], samples=SAMPLES),
        transferred=transferred,
    )
    return jax.tree.map(np.asarray, made)


def _ladder(
    logits_fn: Partial, x: Array, y: Array, threat_model: ThreatModel, key: Key, steps: int,
    loss: losses.Loss,
) -> History:  # fmt: skip
    """PGD from x itself at several epsilons, all at once: five times the examples, one program."""
    n = len(x)
    width = threat_model.widest(x[0].size)
    epsilon = np.broadcast_to(np.asarray(threat_model.epsilon, np.float32), n)
    radii = [np.minimum(factor * epsilon, width) for factor in FACTORS]
    radii = np.stack([*radii, np.full(n, width), epsilon]).astype(np.float32)
    lengths = 2.5 / steps * radii
    lengths[-1] = epsilon  # FGSM goes all the way
    x, y = (jnp.asarray(np.concatenate([np.asarray(v)] * len(radii))) for v in (x, y))
    ball = dataclasses.replace(threat_model, epsilon=radii.reshape(-1))
    _, history = ascend(
        logits_fn, x, y, ball, key, lengths.reshape(-1), x,
        steps=2 * steps, restarts=1, targeted=False, loss=loss,
    )  # fmt: skip
    return History(*(np.asarray(v)[0].reshape(-1, len(radii), n).swapaxes(0, 1) for v in history))


def misjudged_planes(
    shape: tuple[int, ...], threat_model: ThreatModel, key: Key, attack_steps: int, restarts: int,
    loss: losses.Loss,
) -> float:  # fmt: skip
    """How wrong the attack is about a linear model that it should know all about, 0 to 1.

    Examples lie from the plane of two classes as far as 0.8 and 1.2 epsilon, in turns, on the line
    through mid-grey at a right angle to it: the first kind must fall, the other must not.

    Returns:
      The share of examples that the attack takes for the wrong kind.
    """
    n = shape[0]
    lower, upper = threat_model.bounds
    plane_key, attack_key = jax.random.split(key)
    normal = np.asarray(jax.random.normal(plane_key, shape[1:]))
    if threat_model.norm == "l1":
        # A steepest step in l1 moves several coordinates. It is as good as the best one only where
        # all weigh the same.
        normal = np.sign(normal)
    epsilon = min(float(np.max(threat_model.epsilon)), 0.4 * (upper - lower))
    distance = epsilon * np.where(np.arange(n) % 2 == 0, 0.8, 1.2)
    grey = (lower + upper) / 2
    # A move of length 1, from the plane, after which no shorter one leads back to it.
    away = np.sign(normal) if threat_model.norm == "linf" else normal
    away = away / np.linalg.norm(away.ravel(), ord=ORDERS[threat_model.norm])
    x = (grey + np.multiply.outer(distance, away)).astype(np.float32)
    ball = dataclasses.replace(threat_model, epsilon=epsilon)
    plane = Partial(_plane, normal / np.abs(normal).sum(), grey)
    result, _ = ascend(
        plane, jnp.asarray(x), jnp.zeros(n, jnp.int32), ball, attack_key, None, None,
        steps=attack_steps, restarts=restarts, targeted=False, loss=loss,
    )  # fmt: skip
    return float((np.asarray(result.is_adversarial) != (distance < epsilon)).mean())


def _plane(normal: Array, grey: float, x: Array) -> Array:
    side = ((x - grey) * normal).reshape(len(x), -1).sum(axis=1)
    return jnp.stack([side, -side], axis=1)
