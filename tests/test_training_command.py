import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
from fixtures.tiny import compile_fast as compile_fast

import advmeta
from advmeta import cli, processes, training_command
from advmeta.run_folder import open_folder

TRAINING = {
    "tasks": [{"optimizee": "mlp-4"}], "selection": [{"optimizee": "linear"}],
    "meta_optimizer": {"hidden": [4], "features": ["adam", "time"]}, "estimator": "backpropagation",
    "outer_steps": 6, "lanes": 2, "truncation": 2, "horizon": [4, 8], "evaluate_every": 2,
    "meta_loss": {"loss": "calibrated"},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder to run in."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "config.json").write_text(json.dumps({"training": TRAINING}))
    return folder


def arguments(home, name, *more):
    return ["meta-train", "--config", str(home / "config.json"), "--output", str(home / name),
            "--checkpoint-seconds", "0", *more]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(home):
    cli.main(arguments(home, "undisturbed"))
    return outcome(home / "undisturbed")


def environment():
    """Of a process that runs this advmeta and compiles as this module does."""
    source = str(pathlib.Path(advmeta.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def outcome(folder):
    """The weights, and the records without the times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(record.pop("seconds") >= 0 for record in records)
    return (folder / "meta_optimizer.safetensors").read_bytes(), records


def events(folder):
    """The records that TensorBoard reads, in single precision; all but the times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard")).Reload()
    found = {}
    for name in sorted(set(reader.Tags()["tensors"]) - {"seconds"}):
        for event in reader.Tensors(name):
            record = found.setdefault(event.step, {"outer_step": event.step})
            assert name not in record  # no step stands there twice
            record[name] = pytest.approx(event.tensor_proto.float_val[0], rel=1e-6)
    return [found[step] for step in sorted(found)]


def stopped(argv, capsys):
    """The exit code of a command that does not end well, and what it printed."""
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    out, err = capsys.readouterr()
    return exit.value.code, " ".join((out + err).split())


@pytest.mark.slow
def test_it_writes_what_it_says(home, undisturbed):
    folder = home / "undisturbed"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "card.json", "metrics.jsonl", "meta_optimizer.safetensors",
            "meta_optimizer.json", "report.html"} <= names  # fmt: skip
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["outer_step"] == 6 and 0 <= records[-1]["robust_accuracy"] <= 1
    card = json.loads((folder / "meta_optimizer.json").read_text())
    assert card["training"]["meta_optimizer"]["hidden"] == [4] and card["seed"] == 0
    assert card["command"].startswith("advmeta meta-train --config ")
    optimizer = advmeta.load_meta_optimizer(folder / "meta_optimizer.safetensors")
    assert callable(optimizer.update)


@pytest.mark.slow
def test_a_signal_stops_it_where_it_can_go_on(home, undisturbed, monkeypatch, capsys):
    argv, update = arguments(home, "stopped"), training_command.MetaTrainingProgress.update

    def interrupted(self, record):
        update(self, record)
        if record["outer_step"] == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training_command.MetaTrainingProgress, "update", interrupted)
        code, said = stopped([*argv, "--tensorboard"], capsys)
    assert [record["outer_step"] for record in events(home / "stopped")] == [2, 4]
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM: stopped after outer step 4; --resume" in said
    assert not (home / "stopped" / "card.json").exists()
    so_far = home / "stopped" / "meta_optimizer.safetensors"
    assert f"The best weights so far: {so_far}" in said
    assert callable(advmeta.load_meta_optimizer(so_far).update)
    assert json.loads(so_far.with_suffix(".json").read_text())["stopped_after"] == 4
    with (home / "stopped" / "metrics.jsonl").open("a") as log:
        log.write('{"outer_step": 6, "of": "a run that was killed before its next checkpoint"}\n')
    cli.main([*argv, "--resume", "--tensorboard"])
    assert outcome(home / "stopped") == undisturbed
    assert events(home / "stopped") == undisturbed[1]
    # And once more, when there is nothing left to do.
    before = (home / "stopped" / "card.json").read_bytes()
    cli.main([*argv, "--resume"])
    assert (home / "stopped" / "card.json").read_bytes() == before


@pytest.mark.slow
def test_a_killed_run_that_is_resumed_ends_as_an_undisturbed_one(home, undisturbed, capsys):
    """`python -m benchmarks.soak` kills it fifty times; here a checkpoint is damaged too."""
    argv, folder = arguments(home, "killed"), home / "killed"
    command = [sys.executable, "-c", "from advmeta.cli import main; main()", *argv]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment()) as process:
        while not (folder / "checkpoints" / "4").exists():
            assert process.poll() is None, "it ended before it wrote two checkpoints"
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (folder / "checkpoints" / "4" / "about" / "metadata").write_text("{")
    cli.main([*argv, "--resume"])
    assert "passed over a damaged checkpoint, checkpoint 4" in capsys.readouterr().out
    assert outcome(folder) == undisturbed


FULL_DISK = """
import resource, sys
from advmeta import checkpoint, cli

save = checkpoint.Checkpoints.save

def save_on_a_full_disk(self, step, *rest):
    if step == 4:
        self._manager.wait_until_finished()  # the checkpoint of step 2 is whole
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    save(self, step, *rest)

checkpoint.Checkpoints.save = save_on_a_full_disk
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_full_disk_costs_what_came_after_the_last_checkpoint(home, undisturbed):
    """From outer step 4 on no file may be longer than 1,000 bytes."""
    argv = arguments(home, "full")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *argv], capture_output=True, text=True, env=environment()
    )
    said = " ".join(done.stderr.split())
    assert done.returncode == 1 and "advmeta: a checkpoint could not be written to" in said
    assert not (home / "full" / "card.json").exists()
    assert (home / "full" / "checkpoints" / "2").exists()
    assert not (home / "full" / "checkpoints" / "4").exists()
    cli.main([*argv, "--resume"])
    assert outcome(home / "full") == undisturbed


def test_tensorboard_that_is_not_there_is_named_before_anything_is_done(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training_command.importlib.util, "find_spec", lambda name: None)
    code, said = stopped(["meta-train", "--output", str(tmp_path / "x"), "--tensorboard"], capsys)
    assert code == 2 and "pip install 'advmeta[tensorboard]'" in said
    assert not (tmp_path / "x").exists()


@contextlib.contextmanager
def two_processes(home, name, *more, second="from advmeta.cli import main; main()"):
    """Two processes on this machine that meta-train together; ``second`` is the code of one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        meet = ["--coordinator", f"127.0.0.1:{server.getsockname()[1]}", "--num-processes", "2"]
    codes = ["from advmeta.cli import main; main()", second]
    argv = [arguments(home, name, *meet, "--process-id", str(i), *more) for i in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )
        for code, words in zip(codes, argv, strict=True)
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


DIES_AT_STEP_4 = """
import os, signal
from advmeta import cli, training_command
pause = training_command._pause
def die(command, state, *others):
    if state.outer.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return pause(command, state, *others)
training_command._pause = die
cli.main()
"""


@pytest.fixture(scope="module")
def lost(home):
    """The folder of a run of two processes, one of which was killed."""
    with two_processes(home, "lost", second=DIES_AT_STEP_4) as (first, second):
        _, complaint = first.communicate(timeout=300)  # it does not wait for ever
        assert second.wait(timeout=60) == -signal.SIGKILL and first.returncode != 0
    complaint = " ".join(complaint.split())
    assert "process 0 of 2 cannot go on" in complaint
    assert "If another process ended, start all of them again with --resume" in complaint
    assert [path.name for path in (home / "lost" / "checkpoints").iterdir()] == ["2"]
    return home / "lost"


def assert_same_weights(folder, undisturbed):
    weights, records = outcome(folder)
    weights, expected = safetensors.numpy.load(weights), safetensors.numpy.load(undisturbed[0])
    for name, array in expected.items():
        np.testing.assert_allclose(weights[name], array, atol=1e-5)
    assert len(records) == len(undisturbed[1])
    for record, other in zip(records, undisturbed[1], strict=True):
        assert record == pytest.approx(other, abs=1e-5)


@pytest.mark.slow
def test_a_run_that_lost_a_process_goes_on_in_one(home, lost, undisturbed):
    shutil.copytree(lost, home / "in-one")
    cli.main(arguments(home, "in-one", "--resume"))
    assert_same_weights(home / "in-one", undisturbed)


@pytest.mark.slow
def test_two_processes_make_the_weights_of_one(home, lost, undisturbed):
    shutil.copytree(lost, home / "in-two")
    with two_processes(home, "in-two", "--resume") as (first, second):
        said, complaint = first.communicate(timeout=300)
        assert first.returncode == 0, complaint
        assert "written to" in said
        said, _ = second.communicate(timeout=60)
        assert second.returncode == 0
    assert all(line.startswith("[Gloo]") for line in said.splitlines())  # and nothing of ours
    assert_same_weights(home / "in-two", undisturbed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--process-id", "1"], "the last two go with the coordinator's HOST:PORT, as in"),
        (["--coordinator", "auto", "--num-processes", "2"], "go with the coordinator's HOST:PORT"),
        (["--coordinator", "here:1"], "write --coordinator HOST:PORT --num-processes N --process"),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"], "numbered from 0"),
        (["--coordinator", "h:1", "--num-processes", "5", "--process-id", "0"],
         "num_processes=5 is more than training.lanes=4, and each process needs one at least"),
    ],
)  # fmt: skip
def test_processes_that_cannot_be(options, message, tmp_path, capsys):
    code, said = stopped(["meta-train", "--output", str(tmp_path / "none"), *options], capsys)
    assert code == 2 and message in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("lanes", "used"), [(8, 4), (6, 3), (5, None)])
def test_one_process_takes_as_many_devices_as_divide_the_lanes(lanes, used, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: 4 * jax.local_devices())
    mesh = processes.device_mesh(lanes)
    assert mesh is None if used is None else mesh.shape == {"data": used}


def test_several_processes_need_devices_that_divide_the_lanes(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: 4 * jax.local_devices())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        ValueError, match=r"lanes=6 cannot be split evenly over 4 devices .* lanes=8"
    ):
        processes.device_mesh(6)


def test_both_signals_are_collected_and_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with training_command._signals() as came:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGINT, signal.SIGTERM]
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.slow
def test_a_folder_is_one_runs_alone(home, undisturbed, capsys):
    code, said = stopped(arguments(home, "undisturbed"), capsys)
    assert code == 2 and "already holds a run" in said and "--resume" in said
    other = arguments(home, "undisturbed", "--resume", "--training.lanes", "3", "--seed", "1")
    code, said = stopped(other, capsys)
    assert code == 2
    assert "holds a run with seed=0 (now: 1); training.lanes=2 (now: 3): give the same" in said
    command = training_command.MetaTrain(output=home / "undisturbed", resume=True)
    descriptor = os.open(home / "undisturbed", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is writing"):
        open_folder("meta-train", command).__enter__()
    os.close(descriptor)
    assert outcome(home / "undisturbed") == undisturbed
    # Nor is a checkpoint that came into the folder of another run.
    shutil.copytree(home / "undisturbed" / "checkpoints", home / "foreign" / "checkpoints")
    code, said = stopped(arguments(home, "foreign", "--training.learning-rate", "0.5"), capsys)
    assert code == 2 and "of a run with training.learning_rate=0.0015 (now: 0.5): give" in said
    code, said = stopped(["meta-train", "--resume"], capsys)
    assert code == 2 and "--resume needs the --output folder" in said
