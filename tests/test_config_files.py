"""Configs to JSON and back, and what is refused."""

import dataclasses
import json

import pytest

from advmeta import cli, config_files
from advmeta.meta_optimizer import MetaOptimizerConfig
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.task_families import TaskConfig


def test_round_trip_of_a_whole_command(tmp_path):
    training = MetaTrainingConfig(
        tasks=(TaskConfig(), TaskConfig(optimizee="linear", epsilon=0.05)),
        meta_optimizer=MetaOptimizerConfig(hidden=(8,), features=("adam",)),
        horizon=(200, 400),
    )
    run = cli.Run(seed=3, training=training, output=tmp_path / "out")
    (tmp_path / "config.json").write_text(config_files.to_json(run))
    assert config_files.from_json(cli.Run, tmp_path / "config.json") == run


def test_what_is_left_out_keeps_its_default(tmp_path):
    (tmp_path / "c.json").write_text('{"training": {"lanes": 3, "clip": 2}}')
    read = config_files.from_json(cli.Run, tmp_path / "c.json")
    assert read == dataclasses.replace(cli.Run(), training=MetaTrainingConfig(lanes=3, clip=2.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sede": 1}, r"has \['sede'\]; Run knows"),
        ({"seed": "1"}, "seed must be of type int, not '1'"),
        ({"seed": True}, "seed must be of type int, not True"),
        ({"training": 3}, "training must be a JSON object"),
        ({"training": {"horizon": [20, 40, 60]}}, "horizon must have 2 entries"),
        ({"training": {"horizon": [30, 200]}}, "truncation=100 must divide both ends"),
        ({"table": {"cells": [{"setting": "x"}]}}, r"lacks \['dataset', 'epsilon', 'optimizee'\]"),
        ({"training": {"tasks": [{"norm": "l7"}]}}, "norm must be one of .*, not 'l7'"),
    ],
)
def test_values_that_cannot_be(tmp_path, values, message):
    (tmp_path / "c.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        config_files.from_json(cli.Run, tmp_path / "c.json")


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as a JSON config"):
        config_files.from_json(cli.Run, tmp_path / "missing.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a JSON config"):
        config_files.from_json(cli.Run, tmp_path / "c.json")
