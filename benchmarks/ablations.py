"""What does each part of meta-training do for robust accuracy?

    python -m benchmarks.ablations

Each row is a meta-training of a few minutes on small models of digits, alike but for the part
that it names, and judged on models and draws of the data that it did not see, at several points of
the training: a part that helps first and hurts later is seen. The first row is not trained: it is
the nominal rule that the LSTM starts from.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import jax

from advmeta import MetaTrainingConfig, TaskConfig, meta_train
from advmeta.meta_loss import MetaLossConfig
from advmeta.meta_optimizer import DEFAULT_FEATURES, MetaOptimizerConfig, init_meta_params
from advmeta.meta_training import evaluate

BASE = MetaTrainingConfig(
    selection=tuple(
        TaskConfig(optimizee=name, train_examples=800)
        for name in ("mlp-24", "mlp-24-16", "cnn-5-8", "mlp-20-tanh")
    ),
    outer_steps=200,
)


def without(*names: str) -> MetaTrainingConfig:
    """The base without some features."""
    seen = tuple(name for name in DEFAULT_FEATURES if name not in names)
    return dataclasses.replace(BASE, meta_optimizer=MetaOptimizerConfig(features=seen))


def with_loss(**options) -> MetaTrainingConfig:
    return dataclasses.replace(BASE, meta_loss=dataclasses.replace(MetaLossConfig(), **options))


ROWS = {
    "as it is": BASE,
    "cross-entropy": with_loss(loss="cross_entropy"),
    "all steps alike": with_loss(lateness=0.0),
    "no clean loss": with_loss(clean_weight=0.0),
    "truncation 50": dataclasses.replace(BASE, truncation=50, horizon=(100, 200), outer_steps=80),
    "two layers of 20": dataclasses.replace(
        BASE, meta_optimizer=MetaOptimizerConfig(hidden=(20, 20))
    ),
    **{
        f"without {name}": without(name)
        for name in ("log_sign", "jacobian", "layer", "aim", "reach", "time")
    },
}


def untrained(config: MetaTrainingConfig) -> dict:
    """The nominal rule, which fresh meta-parameters are."""
    key = jax.random.key(0)
    phi = init_meta_params(config.meta_optimizer, key)
    selection_key = jax.random.split(key, 3)[2]  # as `meta_train` splits it
    found = evaluate(config, tuple(t.build() for t in config.selection), phi, selection_key)
    return {"robust_accuracy": [float(found.robust)], "clean_accuracy": [float(found.clean)]}


def trained(config: MetaTrainingConfig) -> dict:
    _, history = meta_train(config, key=jax.random.key(0))
    looks = [record for record in history if "robust_accuracy" in record]
    return {
        name: [look[name] for look in looks]
        for name in ("outer_step", "robust_accuracy", "clean_accuracy")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["not trained", *ROWS])
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    for name in arguments.rows:
        start = time.perf_counter()
        found = untrained(BASE) if name == "not trained" else trained(ROWS[name])
        line = json.dumps({"row": name, **found, "seconds": time.perf_counter() - start})
        print(line, flush=True)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(line + "\n")
        jax.clear_caches()


if __name__ == "__main__":
    main()
