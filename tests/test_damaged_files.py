"""Files from others are data: whatever is in them, reading gives a value or a ValueError of ours.

300 files: five kinds, each cut short, with bits flipped, bytes written over, or pieces repeated.
"""

import io
import json
import pathlib
import pickle
import traceback

import flax.serialization
import numpy as np
import pytest

import advmeta
from advmeta import cli, config_files, data
from advmeta.meta_optimizer.weights import load_weights
from advmeta.parameter_files import load_any_params

ROOT = str(pathlib.Path(advmeta.__file__).parent)
PRETRAINED = advmeta.meta_optimizer.pretrained._FOLDER
SEEDS = range(12)


def cut(content, rng):
    return content[: rng.integers(len(content))]


def flip(content, rng):
    damaged = bytearray(content)
    for place in rng.integers(len(content), size=rng.integers(1, 9)):
        damaged[place] ^= 1 << rng.integers(8)
    return bytes(damaged)


def overwrite(content, rng):
    start, size = rng.integers(len(content)), rng.integers(1, 64)
    return content[:start] + rng.bytes(size) + content[start + size :]


def repeat(content, rng):
    a, b = sorted(rng.integers(len(content), size=2))
    return content[:b] + content[a:]


def header(content, rng):
    """Only the first bytes, where lengths, shapes and types are written."""
    return flip(content[:64], rng) + content[64:]


def npz():
    file = io.BytesIO()
    x = np.random.default_rng(0).uniform(size=(20, 4, 4, 1)).astype(np.float32)
    y = np.arange(20) % 3
    np.savez(file, train_image=x, train_label=y, test_image=x[:6], test_label=y[:6])
    return file.getvalue()


def msgpack():
    return flax.serialization.msgpack_serialize({"layer": {"kernel": np.ones((3, 2), np.float32)}})


WEIGHTS = (PRETRAINED / "mixture.safetensors").read_bytes()
CARD = (PRETRAINED / "mixture.json").read_bytes()
KINDS = {  # name of the file: its content, and who reads it
    "w.safetensors": (WEIGHTS, load_weights),
    "w.json": (CARD, lambda path: load_weights(path.with_suffix(".safetensors"))),
    "p.msgpack": (msgpack(), load_any_params),
    "d.npz": (npz(), lambda path: data.load(str(path))),
    "c.json": (
        config_files.to_json(cli.Run()).encode(),
        lambda path: config_files.from_json(cli.Run, path),
    ),
}


def raised_in(error):
    """The file of the innermost frame."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename


@pytest.mark.parametrize("damage", [cut, flip, overwrite, repeat, header])
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused(tmp_path, name, damage):
    content, read = KINDS[name]
    (tmp_path / "w.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "w.json").write_bytes(CARD)
    path, refused = tmp_path / name, 0
    path.write_bytes(content)
    read(path)  # whole, it is read
    for seed in SEEDS:
        path.write_bytes(damage(content, np.random.default_rng(seed)))
        try:
            read(path)
        except ValueError as error:
            refused += 1
            assert raised_in(error).startswith(ROOT), "a ValueError of somebody else's"
    # A bit of a weight may be another and still be a weight.
    assert refused > 0 or damage not in (cut, header)


def test_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    for name, (_, read) in KINDS.items():
        (tmp_path / "w.safetensors").write_bytes(WEIGHTS)
        (tmp_path / "w.json").write_bytes(CARD)
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError):
            read(path)
    bombs = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "d.npz", train_image=bombs, train_label=bombs)
    with pytest.raises(ValueError):
        data.load(str(tmp_path / "d.npz"))
    assert not (tmp_path / "ran").exists()


ODD = [None, True, -1, 0, 1.5, float("nan"), float("inf"), "", "x", [], [1, "x"], {}, {"a": 1}]


def leaves(value, path=()):
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key)


def with_odd_values(whole, within=()):
    """Each option in turn, with each odd value."""
    part = whole
    for key in within:
        part = part[key]
    for option in leaves(part, within):
        for odd in ODD:
            config = json.loads(json.dumps(whole))
            inner = config
            for key in option[:-1]:
                inner = inner[key]
            inner[option[-1]] = odd
            yield config


def test_odd_values_in_a_config_are_taken_or_refused(tmp_path):
    path, refused, tried = tmp_path / "config.json", 0, 0
    for config in with_odd_values(json.loads(config_files.to_json(cli.Run()))):
        path.write_text(json.dumps(config))
        tried += 1
        try:
            assert isinstance(config_files.from_json(cli.Run, path), cli.Run)
        except ValueError as error:
            refused += 1
            assert raised_in(error).startswith(ROOT)
    assert tried >= 200 and refused > tried / 2


def test_odd_values_in_a_card_are_taken_or_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(WEIGHTS)
    refused = 0
    for card in with_odd_values(json.loads(CARD), ("meta_optimizer",)):
        (tmp_path / "w.json").write_text(json.dumps(card))
        try:
            load_weights(tmp_path / "w.safetensors")
        except ValueError as error:
            refused += 1
            assert raised_in(error).startswith(ROOT)
    assert refused > 20
