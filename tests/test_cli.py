"""The command line: parsing, files written, exit codes."""

import importlib.metadata

import pytest

from advmeta import cli
from advmeta.evaluation import baselines
from advmeta.evaluation.transfer_config import TransferConfig
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
    assert cli.parse(["evaluate"]).table == TransferConfig(rows=every_row, attack="autoattack")
    assert cli.parse(["run"]).table.attack == "pgd"


def test_the_quick_rows_are_made_by_a_run_and_every_row_by_evaluate():
    assert cli.parse(["run"]).table.rows == baselines.QUICK_ROWS
    assert not {"trades", "fgsm-rs", "free", "remembered", "yopo", "vat"} & set(
        baselines.QUICK_ROWS
    )
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


def test_report_writes_one_run_anew_and_compares_several(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"outer_step": 1, "meta_loss": 2.0}\n')
    cli.main(["report", "a"])
    assert (tmp_path / "a" / "report.html").exists() and not (tmp_path / "runs").exists()
    cli.main(["report", "a", "b", "--output", "both"])
    assert "a · b" in (tmp_path / "both" / "report.html").read_text()
    cli.main(["report", "a", "b"])
    assert len(list((tmp_path / "runs").glob("report-*/report.html"))) == 1
    for argv, message in (
        (["report"], "name the folder of a run"),
        (["report", "c"], "c: there is no such folder"),
        (["report", "a", "--output", "both"], "is for several runs"),
        (["report", "a", "b", "--output", "b"], "b is itself the folder of a run"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_is_a_message_and_exit_code_1(tmp_path, monkeypatch, capsys):
    def write(folder):
        raise OSError(28, "No space left on device", str(folder / "report.html"))

    monkeypatch.setattr(cli.report, "write", write)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "No space left on device" in error
    assert "Traceback" not in error
