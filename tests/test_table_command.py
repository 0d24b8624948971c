"""The table in a folder: what is looked at closely, and a run that was killed between columns."""

import io
import json

import jax
import numpy as np
import optax
import pytest
from fixtures.tiny import compile_fast as compile_fast
from rich.console import Console

import advmeta
from advmeta import cli, table_command
from advmeta.attacks import losses
from advmeta.evaluation.transfer import transfer_cells
from advmeta.evaluation.transfer_config import Cell, TransferConfig
from advmeta.evaluation.tuning import Entry
from advmeta.table_command import make_table


def make_entry(name: str) -> Entry:
    return Entry(name, "clean", None, None, 0, 0)


def make_task(epsilon: float) -> advmeta.Task:
    x, y = np.full((2, 1), 0.5, np.float32), np.array([0, 1])
    optimizee = advmeta.Optimizee(None, lambda params, x: params["w"] * x)
    batch = advmeta.Batch(x, y)
    return advmeta.Task(batch, batch, advmeta.ThreatModel("linf", epsilon), optimizee, 1)


def fake_cells(config, optimizer, *, key, first, report, keep):
    """Two rows of two seeds a cell; the model of seed s in cell c has one parameter, 10 c + s."""
    for cell in range(first, len(config.cells)):
        task = make_task(0.1 * (cell + 1))
        for name, offset in (("adam", 5), ("meta-optimizer", 0)):
            keep(make_entry(name), task, {"w": 10 * cell + np.arange(2) + offset})
        record = {"clean_accuracy": 1.0, "robust_accuracy": 0.5, "inner_gradient": "clean"}
        yield (
            [{"optimizer": name, "seed": seed, "setting": str(cell), **record}
             for name in ("adam", "meta-optimizer") for seed in (0, 1)],
            {"learning": [], "epsilon": []},
        )  # fmt: skip


@pytest.fixture
def faked(monkeypatch) -> list:
    """The sanity checks that are asked for; behaviour and twins are empty."""
    asked = []

    def fake_checks(logits_fn, x, y, **options):
        asked.append((float(logits_fn(1.0)), float(options.pop("surrogate")(1.0)), options))
        return [advmeta.Check("stable_loss", 15, 0.5, 0.25, False, "shattered")]

    monkeypatch.setattr(table_command, "transfer_cells", fake_cells)
    monkeypatch.setattr(table_command, "sanity_checks", fake_checks)
    monkeypatch.setattr(table_command, "behaviour", lambda *args, **options: {})
    monkeypatch.setattr(table_command, "twins", lambda *args: {})
    return asked


def test_the_first_cell_s_model_is_checked_with_the_table_s_attack(tmp_path, faked, capsys):
    argv = ["evaluate", "--output", str(tmp_path), "--table.attack-steps", "7", "--seed", "3"]
    cli.main([*argv, "--table.seeds", "2", "--table.restarts", "2", "--table.rows", "adam"])
    ((checked, surrogate, options),) = faked
    assert (checked, surrogate) == (0, 1)  # not 5, which is adam's, nor 10, of the second cell
    assert options.pop("key") == jax.random.key(3)
    ball = advmeta.ThreatModel("linf", 0.1)
    expected = {"threat_model": ball, "attack_steps": 7, "restarts": 2, "loss": losses.margin}
    assert options == expected
    (record,) = json.loads((tmp_path / "sanity.json").read_text())
    assert record["name"] == "stable_loss" and record["passed"] is False
    assert "FAIL" in capsys.readouterr().out
    assert "shattered" in (tmp_path / "report.html").read_text()
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["seed"] == 3 and card["weights"] == "mixture" and "jax" in card["versions"]


def test_a_table_of_gradients_that_the_weights_are_not_for_says_so(tmp_path, faked, capsys):
    argv = ["evaluate", "--weights", "mixture-noisy", "--output", str(tmp_path)]
    cli.main([*argv, "--table.seeds", "2", "--table.rows", "adam"])
    said = " ".join(capsys.readouterr().out.split())
    assert "mixture-noisy is for noisy gradients, and was not tested on clean ones" in said


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_table_goes_on_after_its_last_whole_column(tmp_path, faked, monkeypatch, killed_at):
    """A kill while cell ``killed_at`` is made; 0: before anything was written."""
    config = TransferConfig(rows=("adam",), seeds=2)
    console, begun = Console(file=io.StringIO()), []

    def make(folder, cells=fake_cells):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(table_command, "transfer_cells", cells)
        make_table(
            config, lambda aim: optax.sgd(1.0), 0, folder, console, weights="sgd", check=True
        )

    def killed(*args, first, **options):
        begun.append(first)
        for place, cell in enumerate(fake_cells(*args, first=first, **options), first):
            if place == killed_at and len(begun) == 1:
                raise KeyboardInterrupt
            yield cell

    make(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed", killed)
    make(tmp_path / "killed", killed)
    assert begun == [0, killed_at]
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {
        "results.json", "table.json", "curves.json", "behaviour.json", "twins.json", "sanity.json",
    }  # fmt: skip
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(faked) == 2  # the first model is looked at once a run


def test_columns_of_something_else_are_not_gone_on_with(tmp_path, faked, monkeypatch):
    config, console = TransferConfig(rows=("adam",), seeds=2), Console(file=io.StringIO())

    def make(config=config, seed=0, weights="first"):
        make_table(config, lambda aim: optax.sgd(1.0), seed, tmp_path, console, weights=weights)

    make()
    whole = (tmp_path / "results.json").read_bytes()
    other = TransferConfig(rows=("adam",), seeds=2, cells=(Cell("new", "digits", "linear", 0.1),))
    with pytest.raises(ValueError, match=r"weights='first' \(now: 'second'\)"):
        make(weights="second")
    with pytest.raises(ValueError, match=r"table\.cells="):
        make(other)
    with pytest.raises(ValueError, match=r"seed=0 \(now: 1\)"):
        make(seed=1)
    (tmp_path / "table.json").unlink()  # nobody knows what these columns are made of
    with pytest.raises(ValueError, match="weights=None"):
        make()
    assert (tmp_path / "results.json").read_bytes() == whole


def test_weights_that_changed_under_an_evaluation_are_refused(tmp_path, faked, capsys):
    config = advmeta.MetaOptimizerConfig((2,), ("adam",))
    path, folder = tmp_path / "weights.safetensors", tmp_path / "run"
    argv = ["evaluate", "--weights", str(path), "--output", str(folder), "--table.rows", "adam"]
    for seed in (0, 1):
        phi = advmeta.init_meta_params(config, jax.random.key(seed))
        advmeta.save_weights(path, phi, config)
        if seed == 0:
            cli.main([*argv, "--table.seeds", "2"])
    with pytest.raises(SystemExit):
        cli.main([*argv, "--table.seeds", "2", "--resume"])
    error = " ".join(capsys.readouterr().err.split())
    assert "holds columns made with weights=" in error


@pytest.mark.slow
def test_a_cell_is_the_same_whichever_cell_comes_first():
    cells = (
        Cell("same architecture", "digits", "linear", 0.1),
        Cell("wider", "digits", "linear", 0.2),
    )
    config = TransferConfig(cells, rows=(), inner_steps=3, seeds=1, attack_steps=2, restarts=1)
    aims = []

    def make(aim):
        aims.append(aim)
        return optax.sgd(0.1)

    whole = list(transfer_cells(config, make, key=jax.random.key(0)))
    assert {(aim.norm, aim.horizon) for aim in aims} == {("linf", 3)}
    (alone,) = transfer_cells(config, make, key=jax.random.key(0), first=1)

    def timeless(records):
        return [{k: v for k, v in record.items() if k != "seconds"} for record in records]

    assert timeless(alone[0]) == timeless(whole[1][0])
    assert timeless(whole[0][0]) != timeless(whole[1][0])
    assert whole[0][1]["learning"] and not alone[1]["learning"]
