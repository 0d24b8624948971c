"""`advmeta attack`: what it writes, what it refuses, and a process killed half-way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import advmeta
from advmeta import cli
from advmeta.attack_command import Attack, open_target
from advmeta.report.figures import to_png
from advmeta.report.images import image_grid
from advmeta.run_folder import open_folder

MODEL = """
import jax.numpy as jnp
from advmeta.attacks import AttackResult

KERNEL = jnp.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])

def logits(x):
    return x.reshape(len(x), 4) @ KERNEL - jnp.array([0.0, 0.0, 9.0])

def first(x):
    return logits(x)[:1]

def vector(x):
    return logits(x)[:, 0]

number = 3

def pull(logits_fn, x, y, *, threat_model, key):
    # The first pixel down and the second up, as far as it may; right for label 0 alone.
    direction = jnp.array([-1.0, 1.0, 0.0, 0.0]).reshape(1, 2, 2, 1)
    x_adv = threat_model.project(x + threat_model.radius(x) * direction, x)
    logits = logits_fn(x_adv)
    return AttackResult(x_adv, logits.argmax(1) != y, logits[:, 1] - logits[:, 0])
"""
# Of the two pixels that count: label 0 needs the first above the second.
PIXELS = [(0.55, 0.45), (0.7, 0.3), (0.9, 0.1), (0.4, 0.6), (0.6, 0.5), (0.8, 0.2)]
CURVE = ["--epsilons", "0.1", "0.25"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model in it and a data set of six 2 x 2 test images."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny_model.py").write_text(MODEL)
    images = np.full((6, 2, 2), 0.5, np.float32)
    images[:, 0] = PIXELS
    labels = np.zeros(6, np.int32)
    # A third label in the training part, for as many classes as the model has.
    np.savez(folder / "tiny.npz", train_image=images[:3], train_label=np.arange(3),
             test_image=images, test_label=labels)  # fmt: skip
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return home


def arguments(output, *more, model="tiny_model:logits"):
    return ["attack", "--model", model, "--data", "tiny.npz", "--output", str(output),
            "--batch-size", "8", *more]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(home):
    """The folder of a run that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sys, "path", list(sys.path))
        cli.main(arguments("undisturbed", *CURVE))
    return home / "undisturbed"


def read(folder):
    """results.json without what differs from call to call, and the lines of ledger.jsonl."""
    results = json.loads((folder / "results.json").read_text())
    seconds = results.pop("seconds")
    assert all(value >= 0 for value in seconds.values())
    del results["resumed"], results["command"]
    return results, (folder / "ledger.jsonl").read_text()


def test_it_writes_who_broke_what(undisturbed):
    """The margin is 2 (a - b), and it falls by 4 epsilon: robust where a - b > 2 epsilon."""
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {"config.json", "state.npz", "ledger.jsonl", "results.json", "curve.png",
                     "images.png"}  # fmt: skip
    results, ledger = read(undisturbed)
    assert results["examples"] == 6 and results["clean_accuracy"] == 5 / 6
    assert [point["robust_accuracy"] for point in results["points"]] == [3 / 6, 2 / 6]
    assert [point["broken_before"] for point in results["points"]] == [0, 2]
    assert sum(results["points"][1]["broken"].values()) == 1
    assert {"versions", "hardware", "norm", "version", "seed", "data", "model"} <= results.keys()
    entries = [json.loads(line) for line in ledger.splitlines()]
    assert len(entries) == 12
    broken = [bool(entry["broken_by"]) for entry in entries]
    assert broken == [True, False, False, True, True, False, True, True, False, True, True, False]
    assert entries[3]["broken_by"] == "clean" and entries[3]["distance"] == 0
    assert entries[2]["distance"] is None and entries[2]["run"] == -1
    # APGD-CE alone is given the five that are classified correctly at 0.1, three at 0.25.
    assert results["evaluations"]["apgd-ce"] == {"forward": 808, "backward": 808}


def test_an_attack_of_the_user_s_takes_its_turn(at_home):
    """It is as strong as the whole ensemble on this model; after it nothing is left to break."""
    cli.main(arguments("own", "--attacks", "tiny_model:pull", "apgd-ce", "--epsilon", "0.1"))
    results, ledger = read(at_home / "own")
    assert results["points"][0]["broken"] == {"tiny_model:pull": 2, "apgd-ce": 0}
    assert results["points"][0]["robust_accuracy"] == 3 / 6
    assert results["attacks"] == ["tiny_model:pull", "apgd-ce"]
    names = [json.loads(line)["broken_by"] for line in ledger.splitlines()]
    assert names == ["tiny_model:pull", None, None, "clean", "tiny_model:pull", None]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attacks", "apgd-kl"], "there is no attack 'apgd-kl'; the known ones are ['apgd-ce'"),
        (["--attacks", "tiny_model:number"], "is of type int; name a function"),
        (["--attacks", "apgd-ce", "--version", "plus"], "give one of them"),
    ],
)
def test_attacks_that_cannot_be_are_refused_before_a_folder_is_made(at_home, more, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments("none", *more))
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (at_home / "none").exists()


def test_a_killed_run_that_is_resumed_ends_as_an_undisturbed_one(at_home, undisturbed):
    argv, folder = arguments("killed", *CURVE), at_home / "killed"
    command = [sys.executable, "-c", "from advmeta.cli import main; main()", *argv]
    tested = {**os.environ, "PYTHONPATH": str(Path(advmeta.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=tested) as process:
        # The state is first written when the first of six runs is done; the next one is compiled
        # then, which takes many times as long as it takes to notice.
        while not (folder / "state.npz").exists():
            assert process.poll() is None, "it ended before it wrote a state"
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with np.load(folder / "state.npz") as state:
        assert state["current"].tolist() == [2, 0]  # the run and the epsilon it was at
    assert not (folder / "results.json").exists()
    cli.main([*argv, "--resume"])
    assert read(folder) == read(undisturbed)
    finished = (folder / "results.json").read_bytes()
    assert json.loads(finished)["resumed"]
    cli.main([*argv, "--resume"])  # nothing is left to do
    assert (folder / "results.json").read_bytes() == finished


def test_a_run_is_neither_written_over_nor_taken_up_as_another(at_home, undisturbed, capsys):
    before = (undisturbed / "results.json").read_bytes()
    for more, message in (
        (CURVE, "already holds a run"),
        (
            ["--resume", *CURVE, "--seed", "1"],
            "holds a run with seed=0 (now: 1): give the same options",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments("undisturbed", *more))
        assert stopped.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert (undisturbed / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "tiny_model.py"}, "must be module:attribute"),
        ({"model": "no_such_model:logits"}, "there is no module 'no_such_model'"),
        ({"model": "tiny_model:logit"}, "there is no 'logit' in "),
        ({"model": "tiny_model:number"}, "is of type int; name a function"),
        ({"model": "tiny_model:first"}, "must give one row of logits an example"),
        ({"model": "tiny_model:vector"}, "must give one row of logits an example"),
        ({"more": ["--examples", "7"]}, "examples=7 must be from 1 to 6"),
        ({"more": ["--params", "x.safetensors"]}, "give either --model"),
        ({"more": ["--version", "rand"]}, "version='rand' is for models"),
        ({"more": ["--epsilon", "8"]}, "write 8 / 255"),
    ],
)
def test_what_cannot_be_is_one_line_and_makes_no_folder(at_home, tmp_path, change, message, capsys):
    more = change.pop("more", [])
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments(tmp_path / "out", *more, **change))
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and "Traceback" not in error


def test_resume_without_a_folder_is_refused(at_home):
    with pytest.raises(ValueError, match="--resume needs the --output folder"):
        open_folder("attack", Attack(resume=True)).__enter__()


def test_an_error_in_the_user_s_module_is_not_hidden(at_home):
    (at_home / "broken_model.py").write_text("import no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        open_target(Attack(model="broken_model:logits", data="tiny.npz"))


def test_a_saved_optimizee_is_what_was_saved(tmp_path):
    optimizee = advmeta.optimizees.by_name("mlp-3")
    params = optimizee.init(jax.random.key(0), (8, 8, 1))
    path = tmp_path / "model.safetensors"
    advmeta.save_params(path, params)
    target = open_target(Attack(params=path, optimizee="mlp-3", examples=5))
    assert target.batch.y.shape == (5,)
    np.testing.assert_array_equal(
        target.logits_fn(target.batch.x), optimizee.apply(params, target.batch.x)
    )
    message = r"\['layer_0'\]\['bias'\] has shape \(3,\), but mlp-4 .* has \(4,\)"
    with pytest.raises(ValueError, match=message):
        open_target(Attack(params=path, optimizee="mlp-4"))
    with pytest.raises(ValueError, match="go together"):
        open_target(Attack(params=path))


def test_the_grid_shows_the_difference_at_full_contrast():
    """Grey images; one half gains 0.1, the other loses it: five times that is white and black."""
    from io import BytesIO

    from PIL import Image

    x = np.full((1, 4, 4, 1), 0.5, np.float32)
    sign = np.where(np.arange(4) < 2, 1, -1)[None, :, None, None]
    png = to_png(image_grid(x, x + 0.1 * sign, ["3"]))
    pixels = np.asarray(Image.open(BytesIO(png)).convert("L")).astype(int)
    black, light = (pixels == 0).sum(), (abs(pixels - 153) <= 1).sum()
    assert black > 1000 and abs(black - light) < 0.05 * black
    assert abs((abs(pixels - 127) <= 1).sum() - 2 * black) < 0.1 * black
