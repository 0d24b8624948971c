"""What does one update of the optimizer cost, in nanoseconds and bytes a parameter?

    python -m benchmarks.update

One square matrix of each size and a fresh state, which is donated as a training loop would; the
gradient and the parameters stay. Beside the default configuration, one layer of 8 units: two layers
of 20, the size of the published one; both with their memory in bfloat16; `optax.adam`; and the
naive JAX version, of the published size, whose LSTM sees the gradient alone ("advmeta, the same
work"). On a GPU also with the LSTM's step as one Pallas kernel. The limits are measured in the same
turns: the rate of a large matrix product, for the 2 FLOP of each weight and coordinate, and that of
adding 1 to a large array, for the state read once and written once (a state that fits into the
cache can be faster). A program that would need more than --gigabytes is left out.
"""

import argparse
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from advmeta.meta_optimizer import MetaOptimizerConfig, init_meta_params, scale_by_meta_optimizer
from benchmarks import naive_jax, timing

SIZES = (1_000, 16_000, 100_000, 1_000_000, 10_000_000)
PUBLISHED = (20, 20)  # the size of the published one (Andrychowicz et al. 2016)
MATRIX, VECTOR = 2_000, 20_000_000
KEY = jax.random.key(0)


class Contender(NamedTuple):
    optimizer: optax.GradientTransformation
    weights: int  # numbers that each coordinate is multiplied with


def naive() -> Contender:
    """`naive_jax.CoordinateWise` as an optimizer of one array."""
    model = naive_jax.CoordinateWise()
    phi = model.init(KEY, jnp.zeros(1), model.init_state(1))

    def update(gradient, state, params=None):
        flat, state = model.apply(phi, gradient.ravel(), state)
        return flat.reshape(gradient.shape), state

    init = functools.partial(jax.tree.map, lambda params: model.init_state(params.size))
    return Contender(optax.GradientTransformation(init, update), _numbers(phi))


def ours(kernel: Literal["xla", "pallas"] = "xla", **options) -> Contender:
    config = MetaOptimizerConfig(**options)
    phi = init_meta_params(config, KEY)
    return Contender(scale_by_meta_optimizer(phi, config, kernel=kernel), _numbers(phi))


def contenders() -> dict[str, Contender]:
    found = {
        "advmeta": ours(),
        "advmeta, the same work": ours(hidden=PUBLISHED, features=("log_sign",)),
        "advmeta, memory in bfloat16": ours(memory_dtype="bfloat16"),
        "advmeta, two layers of 20": ours(hidden=PUBLISHED),
        "advmeta, two layers of 20, bfloat16": ours(hidden=PUBLISHED, memory_dtype="bfloat16"),
        "naive JAX": naive(),
        "optax.adam": Contender(optax.adam(1e-3), 0),
    }
    if jax.default_backend() == "gpu":
        found["advmeta, Pallas"] = ours("pallas")
        found["advmeta, two layers of 20, Pallas"] = ours("pallas", hidden=PUBLISHED)
    return found


def program(optimizer: optax.GradientTransformation, size: int):
    """The compiled update of one array of so many parameters, and the bytes that it needs."""
    rows = math.isqrt(size)
    params = jax.ShapeDtypeStruct((rows, size // rows), jnp.float32)
    state = jax.eval_shape(optimizer.init, params)
    compiled = jax.jit(optimizer.update, donate_argnums=1).lower(params, state, params).compile()
    return compiled, timing.bytes_needed(compiled)


def call(optimizer: optax.GradientTransformation, compiled, size: int):
    """A call that makes one update and keeps the state for the next."""
    rows = math.isqrt(size)
    params = 0.1 * jax.random.normal(jax.random.key(1), (rows, size // rows))
    gradient = 0.01 * jax.random.normal(jax.random.key(2), params.shape)
    kept = [jax.jit(optimizer.init)(params)]

    def run():
        updates, kept[0] = compiled(gradient, kept[0], params)
        jax.block_until_ready((updates, kept[0]))

    return run


def limits() -> dict:
    """What the machine can do: a large product, and a stream that reads and writes one array."""
    square, kept = jnp.ones((MATRIX, MATRIX)), [jnp.ones(VECTOR)]
    product, increment = jax.jit(jnp.matmul), jax.jit(lambda a: a + 1, donate_argnums=0)

    def stream():
        kept[0] = jax.block_until_ready(increment(kept[0]))

    return {"product": lambda: jax.block_until_ready(product(square, square)), "stream": stream}


def measure(size: int, rounds: int, gigabytes: float) -> list[dict]:
    """Nanoseconds and bytes a parameter, and the shares of the limits, of each contender."""
    calls, rows = limits(), []
    for name, (optimizer, weights) in contenders().items():
        compiled, needed = program(optimizer, size)
        if needed < 1e9 * gigabytes:
            calls[name] = call(optimizer, compiled, size)
            state = _bytes(jax.eval_shape(optimizer.init, jnp.zeros(size)))
            rows.append({"optimizer": name, "weights": weights, "state_bytes": state / size})
            rows[-1]["peak_bytes"] = needed / size
    seconds = timing.take_turns(calls, rounds, warm_up=2)
    median = timing.medians(seconds)
    rate, bandwidth = 2 * MATRIX**3 / median["product"], 2 * 4 * VECTOR / median["stream"]
    for row in rows:
        taken = median[row["optimizer"]] / size
        row["parameters"] = size
        row["ns"] = 1e9 * taken
        row["fastest_ns"] = 1e9 * min(seconds[row["optimizer"]]) / size
        row["of_product_rate"] = 2 * row["weights"] / rate / taken
        row["of_bandwidth"] = 2 * row["state_bytes"] / bandwidth / taken
        row |= {"gflops": rate / 1e9, "gigabytes_a_second": bandwidth / 1e9}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="parameters")
    parser.add_argument("--gigabytes", type=float, default=8, help="most that a program may need")
    arguments = parser.parse_args()
    table = Table(
        "parameters", "optimizer", "ns", "fastest", "state, bytes", "peak, bytes",
        "of the product rate", "of the bandwidth",
    )  # fmt: skip
    rows = []
    for size in arguments.sizes:
        for row in measure(size, arguments.rounds, arguments.gigabytes):
            rows.append(row)
            numbers = [f"{row[c]:.1f}" for c in ("ns", "fastest_ns", "state_bytes", "peak_bytes")]
            shares = [f"{row[c]:.2f}" for c in ("of_product_rate", "of_bandwidth")]
            table.add_row(f"{size:,}", row["optimizer"], *numbers, *shares)
    Console().print(table)
    timing.write("update", {"rows": rows})


def _numbers(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
