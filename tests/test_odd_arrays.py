"""Arrays that are none, do not fit or cannot be: every entry says so, in an error of ours."""

import pathlib
import traceback

import jax
import numpy as np
import optax
import pytest

import advmeta

ROOT = str(pathlib.Path(advmeta.__file__).parent)
N, SIDE, CLASSES = 6, 4, 3
X = np.random.default_rng(0).uniform(size=(N, SIDE, SIDE, 1)).astype(np.float32)
Y = np.arange(N) % CLASSES
ODD_X = {
    "none": None,
    "text": "images",
    "list of text": ["a"] * N,
    "ragged": [[1.0], [1.0, 2.0]],
    "object": np.array([None] * N, dtype=object),
    "strings": np.array(["0.5"] * N),
    "complex": X + 1j,
    "dates": np.zeros(X.shape, "datetime64[s]"),
    "structured": np.zeros(N, dtype=[("a", "f4")]),
    "dict": {"x": X},
    "scalar": np.float32(0.5),
    "vector": X[:, 0, 0, 0],
    "no examples": X[:0],
    "no pixels": X[:, :0],
    "one more axis": X[None],
    "fewer": X[:3],
    "bytes": (255 * X).astype(np.uint8),
    "beyond 32 bits": np.full(X.shape, 2**62),
    "nan": np.where(X > 0.9, np.nan, X),
    "nan in half precision": np.full(X.shape, np.nan, np.float16),
    "inf": np.where(X > 0.9, np.inf, X),
    "negative": X - 1,
}
ODD_MODEL = {"narrower": X[:, :, :2], "more channels": np.repeat(X, 3, axis=-1)}
ODD_Y = {
    "none": None,
    "text": "labels",
    "dict": {},
    "ragged": [[0], [1, 2], 0, 0, 0, 0],
    "strings": Y.astype(str),
    "object": Y.astype(object),
    "complex": Y + 0j,
    "floats": Y.astype(float),
    "bools": Y > 0,
    "one-hot": np.eye(CLASSES)[Y],
    "one-hot integers": np.eye(CLASSES, dtype=int)[Y],
    "column": Y[:, None],
    "scalar": 1,
    "empty": Y[:0],
    "short": Y[:-1],
    "long": np.append(Y, 0),
    "too large": Y + 1,
    "negative": Y - 1,
    "beyond 32 bits": np.full(N, 2**62),
}
LINEAR = advmeta.optimizees.linear(CLASSES)
PARAMS = LINEAR.init(jax.random.key(0), X.shape[1:])
KEY = jax.random.key(0)


def logits_fn(x):
    return LINEAR.apply(PARAMS, x)


def attacked_by(name, norm="linf", **options):
    def call(x, y):
        ball = advmeta.ThreatModel(norm, 0.1)
        attack = getattr(advmeta.attacks, name)
        attack(logits_fn, x, y, threat_model=ball, key=KEY, **options)

    return call


def patched(x, y, held_out=None):
    advmeta.patch(
        LINEAR.apply, PARAMS, x, y, threat_model=advmeta.ThreatModel(), key=KEY, steps=1,
        batch_size=2, held_out=held_out,
    )  # fmt: skip


def trained(x, y):
    good, odd = advmeta.Batch(X, Y), advmeta.Batch(x, y)
    task = advmeta.Task(odd, good, advmeta.ThreatModel(), LINEAR, batch_size=2)
    advmeta.train(task, optax.sgd(0.1), KEY, steps=1)


def meta_trained(x, y):
    family = advmeta.TaskFamily(
        advmeta.Batch(x, y), advmeta.ThreatModel(), LINEAR, train_examples=3, batch_size=2
    )
    advmeta.meta_train(advmeta.MetaTrainingConfig(), key=KEY, families=(family,))


def evaluated(x, y):
    advmeta.autoattack(logits_fn, x, y, threat_model=advmeta.ThreatModel(), key=KEY,
                       version="custom", attacks=("apgd-ce",))  # fmt: skip


def checked(x, y):
    advmeta.sanity_checks(logits_fn, x, y, threat_model=advmeta.ThreatModel(), key=KEY)


ENTRIES = {
    "fgsm": attacked_by("fgsm"),
    "pgd": attacked_by("pgd"),
    "apgd": attacked_by("apgd"),
    "fab": attacked_by("fab"),
    "square": attacked_by("square"),
    "carlini_wagner": attacked_by("carlini_wagner", "l2"),
    "multi_targeted": attacked_by("multi_targeted"),
    "autoattack": evaluated,
    "sanity_checks": checked,
    "patch": patched,
    "patch, held out": lambda x, y: patched(X, Y, (x, y)),
    "train": trained,
    "meta_train": meta_trained,
}
PAIRS = {
    **{f"x: {name}": (x, Y) for name, x in (ODD_X | ODD_MODEL).items()},
    **{f"y: {name}": (X, y) for name, y in ODD_Y.items()},
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_odd_arrays_are_refused(entry):
    """41 pairs for each of 13 entries. A family's model is made for the shape that its data has."""
    for name, (x, y) in PAIRS.items():
        if entry == "meta_train" and name.removeprefix("x: ") in ODD_MODEL:
            continue
        with pytest.raises(ValueError) as refused:
            ENTRIES[entry](x, y)
        *_, (frame, _) = traceback.walk_tb(refused.value.__traceback__)
        assert frame.f_code.co_filename.startswith(ROOT), f"{name}: {refused.value}"


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8, bool])
def test_other_dtypes_that_hold_images_are_taken(dtype):
    x = (X > 0.5).astype(dtype)
    ENTRIES["pgd"](x, Y.astype(np.uint8))
    ENTRIES["train"](x, Y.astype(np.int64))
