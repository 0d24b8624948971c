"""What does one inner step of meta-training cost, against PyTorch and a naive JAX version?

    pip install -e '.[benchmarks]'
    python -m benchmarks.meta_step

An MLP 784-20-10 on Fashion-MNIST, batch 128, an LSTM of 2x20 units, a truncation of 20 inner steps,
float32, fresh weights, all on JAX's default device. Timed is a whole truncation, forward in theta
and back to d meta-loss / d phi, and divided by 20. The meta-loss of the peers, and of "advmeta, the
same work", is the sum of the losses whose gradients the LSTM gets, and its only features are the
gradient's logarithm and sign. Two more rows are what advmeta does beyond it: all features and Adam
within the update ("all features"), and a batch of held-out examples attacked by PGD with 5 steps
after each inner step, whose loss is the meta-loss ("as trained": `advmeta.outer_step`).
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.tree_util import Partial
from rich.console import Console
from rich.table import Table

import advmeta
from advmeta import outer_step
from advmeta.inner_gradients import mean_cross_entropy
from advmeta.meta_loss import MetaLossConfig
from advmeta.meta_optimizer import MetaOptimizerConfig, init_meta_params, scale_by_meta_optimizer
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.types import Batch
from advmeta.unroll import init_inner, unroll
from benchmarks import naive_jax, timing, torch_lstm

OURS = "advmeta, the same work"
EAGER = "PyTorch, eager"


def task(batch_size: int = 128) -> advmeta.Task:
    dataset = advmeta.data.load("fashion_small")
    model = advmeta.optimizees.mlp(widths=(20,))
    threat_model = advmeta.ThreatModel("linf", 0.1)
    return advmeta.Task(dataset.train, dataset.test, threat_model, model, batch_size)


def advmeta_truncation(config: MetaOptimizerConfig, problem: advmeta.Task, steps: int):
    """A call that takes a truncation and its meta-gradient by `advmeta.unroll`."""
    phi = init_meta_params(config, jax.random.key(0))
    state = init_inner(problem, scale_by_meta_optimizer(phi, config), jax.random.key(1))

    @jax.jit
    def run(phi, problem, state, key):
        def objective(phi):
            optimizer = scale_by_meta_optimizer(phi, config)
            after, trajectory = unroll(problem, optimizer, state, key, steps=steps)
            return trajectory.loss.sum(), after

        return jax.value_and_grad(objective, has_aux=True)(phi)

    return lambda: jax.block_until_ready(run(phi, problem, state, jax.random.key(2)))


def advmeta_as_trained(problem: advmeta.Task, steps: int):
    """The same by what `advmeta.meta_training` runs for each lane: held-out examples, attacked."""
    meta_loss = MetaLossConfig(attack_steps=5, every=1, examples=128, loss="calibrated")
    config = MetaTrainingConfig(
        truncation=steps, horizon=(steps, steps), estimator="backpropagation", meta_loss=meta_loss
    )
    train, held_out = problem.train, problem.held_out
    pool = Batch(jnp.concatenate([train.x, held_out.x]), jnp.concatenate([train.y, held_out.y]))
    family = advmeta.TaskFamily(
        pool, problem.threat_model, problem.optimizee, len(train.y), problem.batch_size
    )
    phi = init_meta_params(config.meta_optimizer, jax.random.key(0))
    lane = outer_step.new_lane(config, family, phi, jax.random.key(1))
    gradient = jax.value_and_grad(
        lambda phi, family, lane: outer_step.run_truncation(config, family, phi, lane), has_aux=True
    )
    run = jax.jit(gradient)
    return lambda: jax.block_until_ready(run(phi, family, lane))


def naive_truncation(problem: advmeta.Task, steps: int):
    params, (x, y) = start(problem, steps)
    model = naive_jax.CoordinateWise()
    state = model.init_state(sum(p.size for p in jax.tree.leaves(params)))
    weights = model.init(jax.random.key(0), state[0][0][:, 0], state)

    def loss(params, x, y):
        return mean_cross_entropy(problem, params, Batch(x, y))

    run = jax.jit(Partial(functools.partial(naive_jax.truncation, loss)))
    return lambda: jax.block_until_ready(run(weights, params, state, (x, y)))


def torch_truncations(problem: advmeta.Task, steps: int) -> dict:
    params, (x, y) = start(problem, steps)
    theta = torch_lstm.flatten(params)
    device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
    theta = theta.to(device)
    x = torch.from_numpy(np.array(x)).flatten(2).to(device)
    batches = list(zip(x, torch.from_numpy(np.array(y)).long().to(device), strict=True))
    torch.manual_seed(0)
    lstm = torch_lstm.CoordinateWise().to(device)
    state = tuple(part.to(device) for part in lstm.init(len(theta)))

    def contender(truncation, step):
        def run():
            lstm.zero_grad()
            truncation(step, theta, state, batches)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    return {
        EAGER: contender(torch_lstm.truncation, lstm),
        "PyTorch, torch.compile": contender(torch_lstm.truncation, torch.compile(lstm)),
        "PyTorch, eager, backward() at each step": contender(
            torch_lstm.truncation_as_published, lstm
        ),
    }


def start(problem: advmeta.Task, steps: int):
    """Fresh parameters, and the batches of a truncation, [steps, batch, ...]."""
    params = problem.optimizee.init(jax.random.key(1), problem.train.x.shape[1:])
    size = (steps, problem.batch_size)
    indices = jax.random.randint(jax.random.key(2), size, 0, len(problem.train.y))
    return params, jax.tree.map(lambda a: a[indices], tuple(problem.train))


def measure(rounds: int, steps: int = 20) -> dict[str, list[float]]:
    """Seconds an inner step, of each contender and round."""
    problem = task()
    same = MetaOptimizerConfig(hidden=(20, 20), features=("log_sign",))
    contenders = {
        OURS: advmeta_truncation(same, problem, steps),
        "advmeta, all features": advmeta_truncation(MetaOptimizerConfig(), problem, steps),
        "advmeta, as trained": advmeta_as_trained(problem, steps),
        "naive JAX": naive_truncation(problem, steps),
        **torch_truncations(problem, steps),
    }
    seconds = timing.take_turns(contenders, rounds, warm_up=2)
    return {name: [s / steps for s in times] for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    seconds = measure(parser.parse_args().rounds)
    medians = timing.medians(seconds)
    table = Table(
        "contender", "ms an inner step", "fastest", "advmeta, the same work, is faster by"
    )
    for name, value in medians.items():
        ratio = value / medians[OURS]
        table.add_row(name, f"{1e3 * value:.2f}", f"{1e3 * min(seconds[name]):.2f}", f"{ratio:.2f}")
    Console().print(table)
    ratios = {name: value / medians[OURS] for name, value in medians.items()}
    timing.write("meta_step", {"ratios": ratios, "seconds": seconds})


if __name__ == "__main__":
    main()
