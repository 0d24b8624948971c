"""The command line: parsing, files written, exit codes."""

import importlib.metadata
import json

import jax
import numpy as np
import pytest

import advmeta
from advmeta import cli
from advmeta.evaluation import baselines, transfer
from advmeta.meta_training_config import MetaTrainingConfig

TINY = [
    "--training.outer-steps", "2", "--training.lanes", "1", "--training.evaluate-every", "2",
    "--training.horizon", "20", "20", "--training.meta-optimizer.hidden", "4",
    "--training.truncation", "20", "--training.selection.0.optimizee", "linear",
]  # fmt: skip


def test_no_options_are_the_defaults():
    assert cli.parse(["run"]) == cli.Run()
    assert cli.parse(["meta-train"]) == cli.MetaTrain(training=MetaTrainingConfig())
    every_row = tuple(baselines.ROWS)
    assert cli.parse(["evaluate"]).table == transfer.TransferConfig(
        rows=every_row, attack="autoattack"
    )
    assert cli.parse(["run"]).table.attack == "pgd"


def test_the_quick_rows_are_made_by_a_run_and_every_row_by_evaluate():
    assert cli.parse(["run"]).table.rows == baselines.QUICK_ROWS
    assert not {"trades", "fgsm-rs", "free", "yopo", "vat"} & set(baselines.QUICK_ROWS)
    chosen = cli.parse(["run", "--table.rows", "adam", "free"]).table.rows
    assert chosen == ("adam", "free")


def test_version_and_help(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"advmeta {importlib.metadata.version('advmeta')}\n"
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([name, "--help"])
        assert stopped.value.code == 0 and f"Example: advmeta {name}" in capsys.readouterr().out


def test_options_reach_the_nested_configs():
    command = cli.parse(["meta-train", "--seed", "5", *TINY])
    assert command.seed == 5
    assert command.training.horizon == (20, 20)
    assert command.training.selection[0].optimizee == "linear"
    assert command.training.meta_optimizer.hidden == (4,)


def test_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"seed": 4, "output": "elsewhere", "training": {"lanes": 3, "clip": 2.0}}')
    for option in (["--config", str(path)], [f"--config={path}"]):
        command = cli.parse(["meta-train", *option, "--training.lanes", "2"])
        assert (command.seed, command.output) == (4, None)
        assert (command.training.lanes, command.training.clip) == (2, 2.0)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_says_how_to_call_it(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"advmeta {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["meta-train", "--training.truncation", "30"], "truncation=30 must divide"),
        (["evaluate", "--weights", "imagenet"], "'imagenet' is unknown"),
        (["run", "--config", "missing.json"], "cannot be read"),
        (
            ["evaluate", "--config", "fgsm.json"],
            "attack must be one of ['pgd', 'autoattack'], not 'fgsm'",
        ),
        (
            ["run", "--table.rows", "mart"],
            "rows=['mart'] are unknown; the known ones are ['adam-no",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fgsm.json").write_text('{"table": {"attack": "fgsm"}}')
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error


def test_the_first_cell_s_model_is_checked_with_the_table_s_attack(tmp_path, monkeypatch, capsys):
    """Two cells of two seeds; the model of seed s in cell c has the one parameter 10 c + s."""
    x, y = np.full((2, 1), 0.5, np.float32), np.array([0, 1])
    optimizee = advmeta.Optimizee(None, lambda params, x: params["w"] * x)
    asked = []

    def fake_table(config, optimizer, *, key, report, keep):
        for cell in (0, 1):
            threat_model = advmeta.ThreatModel("linf", 0.1 * (cell + 1))
            task = advmeta.Task(
                advmeta.Batch(x, y), advmeta.Batch(x, y), threat_model, optimizee, 1
            )
            for name, offset in (("adam", 5), ("meta-optimizer", 0)):
                params = {"w": 10 * cell + np.arange(2) + offset}
                keep(transfer.Entry(name, "clean", None, None, 0, 0), task, params)
        record = {"clean_accuracy": 1.0, "robust_accuracy": 0.5, "inner_gradient": "clean"}
        return [{"optimizer": "meta-optimizer", **record}], {}

    def fake_checks(logits_fn, x, y, **options):
        asked.append((float(logits_fn(1.0)), float(options.pop("surrogate")(1.0)), options))
        return [advmeta.Check("stable_loss", 15, 0.5, 0.25, False, "shattered")]

    monkeypatch.setattr(cli, "transfer_table", fake_table)
    monkeypatch.setattr(cli, "sanity_checks", fake_checks)
    argv = ["evaluate", "--output", str(tmp_path), "--table.attack-steps", "7", "--seed", "3"]
    cli.main([*argv, "--table.seeds", "2", "--table.restarts", "2"])
    ((checked, surrogate, options),) = asked
    assert (checked, surrogate) == (0, 1)  # not 5, which is adam's, nor 10, of the second cell
    assert options.pop("key") == jax.random.key(3)
    ball = advmeta.ThreatModel("linf", 0.1)
    assert options == {"threat_model": ball, "attack_steps": 7, "restarts": 2}
    (record,) = json.loads((tmp_path / "sanity.json").read_text())
    assert record["name"] == "stable_loss" and record["passed"] is False
    assert "FAIL" in capsys.readouterr().out
    assert "shattered" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_meta_train_writes_what_it_says(tmp_path, capsys):
    folder, one_task = tmp_path / "out", tmp_path / "tasks.json"
    one_task.write_text('{"training": {"tasks": [{"optimizee": "linear"}]}}')
    command = ["meta-train", "--config", str(one_task), "--output", str(folder), *TINY]
    cli.main(command)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "card.json", "metrics.jsonl", "meta_optimizer.safetensors",
            "meta_optimizer.json", "report.html"} <= names  # fmt: skip
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["outer_step"] == 2 and 0 <= records[-1]["robust_accuracy"] <= 1
    card = json.loads((folder / "meta_optimizer.json").read_text())
    assert card["training"]["meta_optimizer"]["hidden"] == [4] and card["seed"] == 0
    assert card["command"].startswith("advmeta meta-train --config ")
    optimizer = advmeta.load_meta_optimizer(folder / "meta_optimizer.safetensors")
    assert callable(optimizer.update)
    # A folder with a run in it is never written over.
    before = (folder / "card.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 2 and "already holds a run" in capsys.readouterr().err
    assert (folder / "card.json").read_bytes() == before
