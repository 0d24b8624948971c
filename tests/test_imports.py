"""A user's data set, optimizee, inner gradient and optimizer, named as module:function.

The commands are tested with the example of docs/custom.md, in test_docs.py.
"""

import sys

import jax
import numpy as np
import optax
import pytest

import advmeta
from advmeta import data, inner_gradients, optimizees
from advmeta.imports import import_attribute, is_import_name

MINE = """
import jax, jax.numpy as jnp, numpy as np, optax
from advmeta import inner_gradients

def stripes():
    rng = np.random.default_rng(0)
    label = np.arange(400) % 2
    image = rng.uniform(0, 0.5, size=(400, 4, 4))
    image[:, :, 0] += 0.4 * label[:, None]
    return {"train_image": image[:300], "train_label": label[:300],
            "test_image": image[300:], "test_label": label[300:]}

def no_labels():
    return {"train_image": np.zeros((3, 4, 4))}

def affine(num_classes):
    def init(key, x_shape):
        return {"w": 0.1 * jax.random.normal(key, (16, num_classes)), "b": jnp.zeros(num_classes)}
    def apply(params, x):
        return x.reshape(len(x), -1) @ params["w"] + params["b"]
    return init, apply

def nothing(num_classes):
    return None

def clean(task, params, key):
    return inner_gradients.clean(task, params, key)

def optimizer():
    return optax.adam(0.02)

number = 3
"""


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    (tmp_path / "my_code.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_code", None)
    optimizees.by_name.cache_clear()


def test_each_is_what_the_function_gives(at_home):
    stripes = data.load("my_code:stripes", train_examples=100)
    assert stripes.train.x.shape == (100, 4, 4, 1) and stripes.num_classes == 2
    optimizee = optimizees.by_name("my_code:affine", 2)
    params = optimizee.init(jax.random.key(0), (4, 4, 1))
    assert optimizee.apply(params, stripes.test.x).shape == (100, 2)
    task = advmeta.Task(stripes.train, stripes.test, advmeta.ThreatModel(), optimizee, 32)
    mine = inner_gradients.by_name("my_code:clean")
    optimizer = advmeta.load_meta_optimizer("my_code:optimizer")
    found, _ = advmeta.train(task, optimizer, jax.random.key(1), steps=50, inner_gradient=mine)
    expected, _ = advmeta.train(task, optax.adam(0.02), jax.random.key(1), steps=50)
    np.testing.assert_array_equal(found["w"], expected["w"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: import_attribute("my_code", "data"), "data='my_code' must be module:attribute"),
        (lambda: data.load("my_cod:stripes"), "there is no module 'my_cod'"),
        (lambda: data.load("my_code:stars"), "there is no 'stars' in my_code"),
        (lambda: data.load("my_code:no_labels"), "my_code:no_labels lacks .'train_label'"),
        (lambda: optimizees.by_name("my_code:number"), "is of type int; name a function"),
        (lambda: optimizees.by_name("my_code:nothing"), r"gave None; it must give a pair"),
    ],
)
def test_bad_names(at_home, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_such_name():
    for name in ("cifar10:3.0.2", "C:\\data.npz", "a/b:c", "digits", "a:b:c", ":f", "m:"):
        assert not is_import_name(name)
    assert is_import_name("my.package:thing_2")
