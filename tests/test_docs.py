"""The example of docs/custom.md: its files and its commands, with smaller numbers."""

import json
import pathlib
import re
import runpy
import shlex
import sys

import pytest
from fixtures.tiny import compile_fast as compile_fast

from advmeta import cli, optimizees

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "custom.md").read_text()
FILES = dict(re.findall(r'^```\w+ title="(\S+)"\n(.*?)^```$', PAGE, re.M | re.S))
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S)
    for line in block.splitlines()
]
SMALLER = {
    "meta-train": [
        "--training.lanes", "2", "--training.truncation", "2", "--training.horizon", "4", "20",
        "--training.outer-steps", "2", "--training.evaluate-every", "2",
        "--training.meta-optimizer.hidden", "4",
    ],
    "patch": ["--examples", "64"],
    "attack": ["--examples", "8"],
}  # fmt: skip


@pytest.mark.slow
def test_the_example_does_what_the_page_says(tmp_path, monkeypatch, capsys):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    runpy.run_path("train_and_attack.py")
    said = capsys.readouterr().out
    # The attack that is asked first breaks something, and APGD breaks more than 20 guesses.
    assert "'corners'" in said and "'apgd-ce'" in said
    for program, command, *options in COMMANDS:
        assert program == "advmeta"
        cli.main([command, *options, *SMALLER[command]])
    metrics = (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["outer_step"] == 2
    # 20 is the longest episode that the weights of runs/mine were trained for.
    steps = {"patched": 20, "patched-by-adam": 100}
    for name, expected in steps.items():
        results = json.loads((tmp_path / "runs" / name / "results.json").read_text())
        assert results["steps"] == expected and results["before"]["clean"] > 0.9
    ledger = (tmp_path / "runs/attacked/ledger.jsonl").read_text().splitlines()
    names = {json.loads(line)["broken_by"] for line in ledger}
    assert len(ledger) == 8 and names <= {None, "clean", "my_code:corners", "apgd-ce"}
    sys.modules.pop("my_code")
    optimizees.by_name.cache_clear()
