import jax.numpy as jnp
import pytest

from advmeta.held_out import HeldOutLoss
from advmeta.meta_loss import MetaLossConfig, meta_loss
from advmeta.unroll import Trajectory


def of(clean, adversarial):
    nothing = jnp.zeros(len(clean))
    losses = HeldOutLoss(jnp.array(clean), jnp.array(adversarial))
    return Trajectory(loss=nothing, gradient_norm=nothing, evaluation=losses)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # nothing is capped: (2 + 4 + 9) / 3
        (MetaLossConfig(1.0, 0.0, cap=100.0, lateness=0.0), 5.0),
        # (2 + 4 + 5) / 3: the last is capped
        (MetaLossConfig(1.0, 0.0, cap=5.0, lateness=0.0), 11 / 3),
        # (1 + 2 + 5) / 3 of the clean ones, as capped
        (MetaLossConfig(0.0, 1.0, cap=5.0, lateness=0.0), 8 / 3),
        # half of one and twice the other
        (MetaLossConfig(0.5, 2.0, cap=5.0, lateness=0.0), 0.5 * 11 / 3 + 2 * 8 / 3),
        # weights 2 p = 1, 1.5, 2: (2 + 6 + 10) / 3
        (MetaLossConfig(1.0, 0.0, cap=5.0, lateness=1.0), 6.0),
    ],
)
def test_weighted_mean_of_capped_losses(config, expected):
    progress = jnp.array([0.5, 0.75, 1.0])
    found = meta_loss(config, of([1.0, 2.0, 7.0], [2.0, 4.0, 9.0]), progress)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_infinite_loss_counts_as_the_cap():
    losses, progress = of([0.0, 0.0], [1.0, jnp.inf]), jnp.array([0.5, 1.0])
    config = MetaLossConfig(1.0, 0.0, cap=5.0, lateness=0.0)
    assert float(meta_loss(config, losses, progress)) == 3.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"adversarial_weight": -1.0}, "none may be negative"),
        ({"adversarial_weight": 0.0, "clean_weight": 0.0}, "one must be positive"),
        ({"attack_steps": 0}, "attack_steps=0 must be at least 1"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"examples": 0}, "examples=0 must be at least 1"),
        ({"cap": 0.0}, "cap=0.0 must be positive"),
        ({"cap": float("nan")}, "cap=nan must be positive"),
        ({"lateness": -1.0}, "lateness=-1.0 not negative"),
    ],
)
def test_bad_config(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MetaLossConfig(**kwargs)
