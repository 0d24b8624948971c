"""What do the parts of the shipped meta-optimizers do, and what with other gradients?

    python -m benchmarks.parts --settings "digits, MLP" "digits, CNN"

Rows in the columns of `benchmarks.transfer`, with its keys: `mixture` and `mixture-noisy` as they
are; with their memory in bfloat16; with the LSTM's readout zero, so that the linear map alone adds
to the nominal rule; and weights with replayed gradients, those of adversarial examples that were
made once, for another model that plain Adam trained. A row that is there already is not computed
again.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import advmeta
from advmeta.evaluation.transfer import transfer_cells
from advmeta.evaluation.transfer_config import TransferConfig
from advmeta.meta_optimizer.pretrained import weights_path
from advmeta.meta_optimizer.rule import MetaOptimizerConfig
from advmeta.types import MetaParams
from benchmarks.transfer import CIFAR, PAIRS

Change = Callable[[MetaParams, MetaOptimizerConfig], tuple[MetaParams, MetaOptimizerConfig]]


def as_it_is(phi: MetaParams, config: MetaOptimizerConfig):
    return phi, config


def short_memory(phi: MetaParams, config: MetaOptimizerConfig):
    return phi, dataclasses.replace(config, memory_dtype="bfloat16")


def silent_lstm(phi: MetaParams, config: MetaOptimizerConfig):
    nothing = jax.tree.map(jnp.zeros_like, phi["lstm"]["readout"])
    return {**phi, "lstm": {**phi["lstm"], "readout": nothing}}, config


ROWS: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "mixture": ("mixture", as_it_is, ("clean", "replayed")),
    "mixture, memory in bfloat16": ("mixture", short_memory, ("clean",)),
    "mixture, linear map alone": ("mixture", silent_lstm, ("clean",)),
    "mixture-noisy": ("mixture-noisy", as_it_is, ("noisy",)),
    "mixture-noisy, memory in bfloat16": ("mixture-noisy", short_memory, ("noisy",)),
    "mixture-noisy, linear map alone": ("mixture-noisy", silent_lstm, ("noisy",)),
    "mixture-adversarial": ("mixture-adversarial", as_it_is, ("remembered", "fgsm-rs", "replayed")),
}


def measure(row: str, index: int, seeds: int) -> list[dict]:
    """The records of a row in the column of this index."""
    name, change, inner_gradients = ROWS[row]
    phi, config, _ = advmeta.load_weights(weights_path(name))
    phi, config = change(phi, config)

    def optimizer(aim: advmeta.Aim) -> optax.GradientTransformation:
        return advmeta.scale_by_meta_optimizer(phi, config, aim)

    table = TransferConfig(
        cells=PAIRS, rows=(), inner_gradients=inner_gradients, seeds=seeds, attack="autoattack"
    )
    records, _ = next(transfer_cells(table, optimizer, key=jax.random.key(0), first=index))
    return [record | {"optimizer": row} for record in records]


def show(records: list[dict]) -> None:
    settings = list(dict.fromkeys(r["setting"] for r in records))
    table = Table("optimizer", "inner gradient", *settings)
    for who in dict.fromkeys((r["optimizer"], r["inner_gradient"]) for r in records):
        cells = []
        for setting in settings:
            here = [
                r for r in records
                if (r["optimizer"], r["inner_gradient"], r["setting"]) == (*who, setting)
            ]  # fmt: skip
            robust, clean = (
                [r[name] for r in here] for name in ("robust_accuracy", "clean_accuracy")
            )
            spread = np.std(robust, ddof=1) if len(robust) > 1 else 0.0
            text = f"{np.mean(robust):.3f} ± {spread:.3f} ({np.mean(clean):.3f})" if here else "-"
            cells.append(text)
        table.add_row(*who, *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [cell.setting for cell in PAIRS if cell.dataset != CIFAR]
    parser.add_argument("--settings", nargs="+", default=known, choices=known)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/parts.jsonl"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    records = []
    if arguments.output.exists():
        records = [json.loads(line) for line in arguments.output.open()]
    done = {(r["setting"], r["optimizer"]) for r in records}
    for index, cell in enumerate(PAIRS):
        for row in arguments.rows if cell.setting in arguments.settings else ():
            if (cell.setting, row) not in done:
                found = measure(row, index, arguments.seeds)
                with arguments.output.open("a") as file:
                    file.writelines(json.dumps(record) + "\n" for record in found)
                records += found
    show(records)


if __name__ == "__main__":
    main()
