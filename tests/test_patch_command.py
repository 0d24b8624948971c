"""`advmeta patch`: the formats that it reads, what it writes, and how it refuses."""

import json
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from fixtures.tiny import compile_fast as compile_fast

import advmeta
from advmeta import cli
from advmeta.optimizees import mlp
from advmeta.parameter_files import load_any_params

MODEL = """
import jax, jax.numpy as jnp

def apply(params, x):
    x = x.reshape(len(x), -1)
    for name in ("layer_0", "layer_1"):
        x = jax.nn.relu(x) @ params[name]["kernel"] + params[name]["bias"]
    return x
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model of digits in all formats, and a function for it: pixels are not below 0."""
    folder = tmp_path_factory.mktemp("home")
    digits, optimizee = advmeta.data.load("digits"), mlp((6,))
    task = advmeta.Task(digits.train, digits.test, advmeta.ThreatModel(), optimizee)
    params, _ = advmeta.train(task, optax.adam(1e-2), jax.random.key(0), steps=100)
    advmeta.save_params(folder / "model.safetensors", params)
    host = jax.tree.map(np.asarray, params)
    (folder / "model.msgpack").write_bytes(flax.serialization.msgpack_serialize(host))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", params)
    (folder / "patched_model.py").write_text(MODEL)
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return home


def run(name, output, *more):
    cli.main(["patch", "--params", name, "--steps", "20", "--examples", "100", "--output", output,
              *more])  # fmt: skip


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda u, v: bool((u == v).all()), a, b))


def test_all_formats_hold_the_same(at_home):
    expected = advmeta.load_params("model.safetensors")
    for name in ("model.safetensors", "model.msgpack", "orbax"):
        assert same(load_any_params(at_home / name), expected)


@pytest.mark.slow
def test_it_writes_what_it_prints_whatever_the_format_and_the_way_to_name_the_model(
    at_home, capsys
):
    run("model.safetensors", "first", "--optimizee", "mlp-6")
    said = capsys.readouterr().out
    assert {path.name for path in (at_home / "first").iterdir()} == {
        "config.json", "patched.safetensors", "results.json"}  # fmt: skip
    results = json.loads((at_home / "first" / "results.json").read_text())
    assert results["steps"] == 20 and results["command"].startswith("advmeta patch --params")
    for part in ("before", "after"):
        assert f"{results[part]['robust']:.3f}" in said and f"{results[part]['clean']:.3f}" in said
    patched = advmeta.load_params(at_home / "first" / "patched.safetensors")
    digits = advmeta.data.load("digits")
    accuracy = (mlp((6,)).apply(patched, digits.test.x).argmax(-1) == digits.test.y).mean()
    assert results["after"]["clean"] == pytest.approx(float(accuracy), abs=1e-6)
    run("orbax", "second", "--model", "patched_model:apply")
    again = advmeta.load_params(at_home / "second" / "patched.safetensors")
    close = jax.tree.map(lambda u, v: np.allclose(u, v, atol=1e-4), again, patched)
    assert jax.tree.all(close)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--params names the model's parameters"),
        (["--params", "model.safetensors"], "give either --model module:function or --optimizee"),
        (["--params", "no.safetensors", "--optimizee", "mlp-6"], "there is no file"),
        (["--params", "no.msgpack", "--optimizee", "mlp-6"], "there is no file"),
        (["--params", "patched_model.py", "--optimizee", "mlp-6"], "is not a safetensors file"),
        (["--params", "bad.msgpack", "--optimizee", "mlp-6"], "is not Flax's msgpack"),
        (["--params", "list.msgpack", "--optimizee", "mlp-6"], "must hold something in a dict"),
        (["--params", "empty", "--optimizee", "mlp-6"], "is not an Orbax checkpoint"),
        (["--params", "orbax", "--optimizee", "mlp-6", "--examples", "0"], "must be from 1 to"),
        (["--params", "orbax", "--optimizee", "mlp-6", "--examples", "9"], "batch_size=64 must"),
        (["--params", "orbax", "--optimizee", "mlp-6", "--norm", "l3"], "invalid choice 'l3'"),
        (["--params", "orbax", "--optimizee", "mlp-6", "--weights", "x"], "'x' is unknown"),
        (["--params", "orbax", "--optimizee", "mlp-6-5"], "mlp-6-5 for images of shape (8, 8, 1)"),
        (["--params", "other.safetensors", "--model", "patched_model:apply"], "KeyError: 'bias'"),
    ],
)
def test_bad_input_exits_with_2_and_leaves_no_run_behind(at_home, capsys, argv, message):
    (at_home / "bad.msgpack").write_bytes(b"\x93\x01")
    listed = flax.serialization.msgpack_serialize([np.zeros(2)])
    (at_home / "list.msgpack").write_bytes(listed)
    advmeta.save_params("other.safetensors", {"layer_0": {"kernel": jnp.ones((64, 6))}})
    (at_home / "empty").mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["patch", *argv, "--output", "refused"])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (at_home / "refused" / "config.json").exists()


def test_an_array_is_an_array_whatever_wrote_it(at_home):
    leaves = jax.tree.leaves(load_any_params(at_home / "model.msgpack"))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)
