"""Weights on disk: a round trip, and files that are refused."""

import functools
import json
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advmeta
from advmeta.meta_optimizer import pretrained, weights


@pytest.fixture
def saved(tmp_path):
    config = advmeta.MetaOptimizerConfig(
        hidden=(3, 4), features=("log_sign", "parameter"), memory_dtype="bfloat16"
    )
    meta_params = advmeta.init_meta_params(config, jax.random.key(0))
    path = tmp_path / "mine.safetensors"
    weights.save_weights(path, meta_params, config, command="advmeta meta-train", seed=7)
    return path, meta_params, config


def test_round_trip_is_exact(saved):
    path, meta_params, config = saved
    loaded, loaded_config, card = weights.load_weights(path)
    assert loaded_config == config
    assert card["seed"] == 7 and card["command"] == "advmeta meta-train"
    assert jax.tree.structure(loaded) == jax.tree.structure(meta_params)
    jax.tree.map(np.testing.assert_array_equal, loaded, meta_params)
    assert sorted(p.name for p in path.parent.iterdir()) == ["mine.json", "mine.safetensors"]


def test_loaded_by_path_it_updates_as_the_original(saved):
    path, meta_params, config = saved
    params = {"w": jax.random.normal(jax.random.key(1), (3, 2))}
    results = []
    original = advmeta.scale_by_meta_optimizer(meta_params, config)
    for optimizer in (original, advmeta.load_meta_optimizer(path)):
        results.append(optimizer.update(params, optimizer.init(params), params)[0]["w"])
    np.testing.assert_array_equal(*results)


def test_a_pickle_is_refused_unread(saved):
    path, _, _ = saved

    class Bomb:
        def __reduce__(self):
            return (path.with_name("exploded").touch, ())

    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        weights.load_weights(path)
    assert not path.with_name("exploded").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights_are_refused(saved, share):
    path, _, _ = saved
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        weights.load_weights(path)


def test_shapes_that_do_not_fit_the_config_are_named(saved):
    path, _, _ = saved
    card = json.loads(path.with_suffix(".json").read_text())
    card["meta_optimizer"]["hidden"] = [3, 5]
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"own_1.*\(16,\).*needs \(20,\)"):
        weights.load_weights(path)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("not json", "is not JSON"),
        ("[1]", "a card is a JSON object"),
        ("{}", "no 'meta_optimizer'"),
        ('{"meta_optimizer": {"layers": 3}}', "no 'meta_optimizer'"),
        ('{"meta_optimizer": {"features": ["colour"]}}', "colour.*log_sign"),
        ('{"meta_optimizer": {"shift": 3.0}}', "lacks .*'learning_rate', 'memory_dtype'"),
    ],
)
def test_a_bad_card_is_refused(saved, card, message):
    path, _, _ = saved
    path.with_suffix(".json").write_text(card)
    with pytest.raises(ValueError, match=message):
        weights.load_weights(path)


def test_an_aim_that_training_did_not_cover_is_warned_of():
    balls = "l2 0.25 to 1, linf 0.005 to 0.02, linf 0.025 to 0.1, linf 0.05 to 0.2"
    cases = {
        advmeta.Aim(0.1, "linf", 200): None,
        advmeta.Aim(0.3): f"mixture was trained for {balls} alone",
        advmeta.Aim(0.1, "l2"): f"mixture was trained for {balls} alone",
        advmeta.Aim(np.float32(0.3)): f"mixture was trained for {balls} alone",
        advmeta.Aim(horizon=301): "mixture was trained for 100 to 300 steps",
        advmeta.Aim(horizon=np.int64(99)): "mixture was trained for 100 to 300 steps",
    }
    for aim, message in cases.items():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            advmeta.load_meta_optimizer("mixture", aim)
        assert [str(warning.message) for warning in seen] == ([message] if message else [])
    # A family whose epsilon varies by a factor covers what is between; traced ones are not seen.
    task = {"norm": "linf", "epsilon": 0.1, "variation": {"epsilon": 2.0}}
    card = {"training": {"horizon": [20, 100], "tasks": [task, task | {"norm": "l2"}]}}
    notes = functools.partial(pretrained.outside_of, card, "mine")
    assert notes(advmeta.Aim(0.05)) == notes(advmeta.Aim(0.2, "l2", 100)) == []
    (note,) = notes(advmeta.Aim(0.21))
    assert note == "mine was trained for l2 0.05 to 0.2, linf 0.05 to 0.2 alone"
    assert len(notes(advmeta.Aim(jnp.float32(0.5), "linf", jnp.int32(200)))) == 2

    @jax.jit
    def traced(epsilon, horizon):
        assert notes(advmeta.Aim(epsilon, "linf", horizon)) == []
        return epsilon

    traced(0.5, 200)
    assert pretrained.outside_of({}, "mine", advmeta.Aim(9.0)) == []


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'imagenet' is unknown.*mixture"):
        advmeta.load_meta_optimizer("imagenet")
    with pytest.raises(ValueError, match="no card"):
        advmeta.load_meta_optimizer(tmp_path / "missing.safetensors")


def test_shipped_weights_load_and_have_whole_cards():
    for name in advmeta.list_pretrained():
        path = pretrained.weights_path(name)
        _, _, card = weights.load_weights(path)
        made = {"command", "seed", "seconds", "hardware", "versions", "training"}
        assert made | {"tested", "weak_at"} <= card.keys()
        assert path.stat().st_size < 200_000


def test_what_is_said_of_gradients_that_weights_are_not_for():
    (note,) = pretrained.untested_on(
        pretrained.load_card("mixture-adversarial"), "mine", ["clean", "fgsm-rs"]
    )
    assert note.startswith("mine is for remembered and fgsm-rs gradients, and was not tested on cl")
    assert pretrained.untested_on(pretrained.load_card("mixture"), "mixture", ["clean"]) == []
    assert pretrained.untested_on({}, "mine", ["clean"]) == []  # of one's own


@pytest.mark.parametrize("name", advmeta.list_pretrained())
def test_with_x64_parameters_of_32_bits_keep_their_state(name):
    # As a scan's carry has to, in a program whose other parts need 64 bits.
    kernels = {
        f"layer_{i}": {"kernel": jnp.ones(s, jnp.float32)} for i, s in enumerate([(4, 3), (3, 2)])
    }
    for horizon in (None, 200):
        optimizer = advmeta.load_meta_optimizer(name, advmeta.Aim(0.1, "linf", horizon))
        with jax.enable_x64(True):
            state = optimizer.init(kernels)
            update = functools.partial(optimizer.update, value=jnp.float64(1.0))
            updates, after = jax.eval_shape(update, kernels, state, kernels)
        types = [jax.tree.map(lambda x: x.dtype, tree) for tree in (kernels, state, updates, after)]
        assert types[:2] == types[2:]
