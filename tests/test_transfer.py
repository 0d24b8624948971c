"""The transfer table: choosing, counting costs, and telling good training from bad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast
from rich.console import Console

import advmeta
from advmeta.attacks.adaptive_boundary import _fab
from advmeta.attacks.auto_pgd import _apgd
from advmeta.attacks.square_attack import _square
from advmeta.evaluation import baselines, transfer, tuning
from advmeta.evaluation.stronger import autoattack_accuracy, with_autoattack
from advmeta.evaluation.transfer_config import Cell, TransferConfig
from advmeta.held_out import held_out_accuracy
from advmeta.progress import TableProgress
from advmeta.tasks import Task


def test_choose_takes_the_best_point_that_belongs():
    points = baselines.grid((0.1, 0.2), (0.0, 1.0), (0.0,), (1.0,))
    # Points in order: (.1, 0), (.1, 1), (.2, 0), (.2, 1). The best without decay is the third.
    scores = jnp.array([0.3, 0.9, 0.4, 0.8])
    chosen = baselines.choose(points, scores, lambda point: point.weight_decay == 0)
    assert np.isclose(chosen.learning_rate, 0.2) and chosen.weight_decay == 0
    # A point that diverged never wins.
    chosen = baselines.choose(points, jnp.array([0.3, jnp.nan, 0.4, 0.8]), lambda p: p.noise == 0)
    assert np.isclose(chosen.learning_rate, 0.2) and chosen.weight_decay == 1


def test_grids_hold_every_combination_and_rows_cover_them():
    for baseline in baselines.BASELINES.values():
        points = np.stack(baseline.grid, axis=1)
        assert len(np.unique(points, axis=0)) == len(points)
    for row in baselines.ROWS.values():
        assert row.belongs(baselines.BASELINES[row.baseline].grid).any()
    noisy, clean = (
        row.belongs(baselines.BASELINES["sgd"].grid)
        for row in baselines.ROWS.values()
        if row.baseline == "sgd" and row.inner_gradient in ("noisy", "clean")
    )
    assert (noisy ^ clean).all()


@pytest.mark.parametrize("name", ["adam", "sgd", "adamw"])
def test_weight_decay_of_each_baseline_is_its_textbook_one(name):
    """One step from theta = 2 with gradient 0.5, learning rate 0.1 and decay 0.3."""
    point = baselines.Hyperparameters(0.1, 0.3, 0.0, 1.0)
    optimizer, params = baselines.BASELINES[name].optimizer(point, 2), jnp.array([2.0])
    update, state = optimizer.update(jnp.array([0.5]), optimizer.init(params), params)
    # SGD: -0.1 (0.5 + 0.3 * 2). Adam's first step is -0.1 sign(g); AdamW adds -0.1 * 0.3 * 2.
    expected = {"sgd": -0.11, "adam": -0.1, "adamw": -0.16}[name]
    np.testing.assert_allclose(update, [expected], rtol=1e-5)
    # The rate is half after half of the steps, and 0 after all.
    half, state = optimizer.update(jnp.array([0.5]), state, params)
    momentum = 1.9 if name == "sgd" else 1.0
    np.testing.assert_allclose(half, [0.5 * momentum * expected], rtol=1e-3)
    last, _ = optimizer.update(jnp.array([0.5]), state, params)
    np.testing.assert_allclose(last, [0.0], atol=1e-6)
    # Where it is constant, the second step is as large as the first.
    optimizer = baselines.BASELINES[name].optimizer(point._replace(annealed=0.0), 2)
    _, state = optimizer.update(jnp.array([0.5]), optimizer.init(params), params)
    second, _ = optimizer.update(jnp.array([0.5]), state, params)
    np.testing.assert_allclose(second, [momentum * expected], rtol=1e-3)


def test_a_cell_may_have_fewer_examples_to_tune_and_train_on():
    cell = Cell("few", "digits", "linear", 0.1, train_examples=100)
    tuning, task = transfer.make_tasks(TransferConfig(batch_size=16), cell)
    assert (len(tuning.train.y), len(tuning.held_out.y), len(task.train.y)) == (80, 20, 100)
    assert len(task.held_out.y) == len(advmeta.data.load("digits").test.y)


def test_unknown_rows_list_the_known_ones():
    with pytest.raises(ValueError, match=r"rows=\['mart'\] are unknown; .*'adam', .*'trades'"):
        TransferConfig(rows=("adam", "mart"))


def tuned_adam(aim):
    """In the place of the meta-optimizer: what tuning finds."""
    return baselines.adam(baselines.Hyperparameters(3e-2, 0.0, 0.0, 1.0), aim.horizon)


def mark(task, params, key, records):
    """In the place of `with_autoattack`: the same accuracies under its name."""
    return [record | {"attack": "autoattack-standard"} for record in records]


@pytest.fixture(scope="module")
def tiny_table():
    """A table of one cell on few examples, with a row of each kind and grids of a few points."""
    small = {
        name: baseline._replace(grid=baselines.grid((1e-3, 3e-2), (0.0,), (0.0, 1.0), (1.0,)))
        for name, baseline in baselines.BASELINES.items()
    }
    # Adam and SGD are tuned by one program; their grids may be of any size.
    small["sgd"] = small["sgd"]._replace(
        grid=baselines.grid((1e-3, 0.3, 1e-4), (0.0,), (0.0,), (1.0,))
    )
    config = TransferConfig(
        cells=(Cell("same architecture", "digits", "linear", 0.05),),
        rows=("adam-no-decay", "adam-noisy", "sgd", "adversarial", "free"),
        inner_steps=20, batch_size=32, seeds=2, tuning_seeds=1, attack_steps=5, restarts=1,
        attack="autoattack",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "with_autoattack", mark)  # the real one has a test of its own
        patch.setattr(tuning, "BASELINES", small)
        messages, kept = [], []
        ((records, curves),) = transfer.transfer_cells(
            config, tuned_adam, key=jax.random.key(0), report=messages.append,
            keep=lambda *trained: kept.append(trained),
        )  # fmt: skip
    assert transfer.judge._cache_size() == 0  # else the maps of many cells' programs add up
    return config, records, curves, messages, kept


@pytest.mark.slow
def test_chunks_of_a_grid_score_as_the_whole(monkeypatch):
    small = baselines.BASELINES["adam"]._replace(
        grid=baselines.grid((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0.0,), (0.0,), (1.0,))
    )
    monkeypatch.setattr(tuning, "BASELINES", {"adam": small})
    cell = Cell("few", "digits", "linear", 0.05, train_examples=200)
    config = TransferConfig(inner_steps=20, batch_size=32, tuning_seeds=2)
    task, _ = transfer.make_tasks(config, cell)

    def score(at_once):
        monkeypatch.setattr(tuning, "MODELS_AT_ONCE", at_once)
        tuning.score_grids.clear_cache()
        return tuning.score_grids(config, ("adam",), task, jax.random.key(0))["adam"]

    whole, chunks = score(14), score(6)  # of seven points, and thrice of three
    np.testing.assert_allclose(chunks, whole, atol=0.03)  # one of 40 examples, rounding apart
    assert np.abs(whole - whole[::-1]).max() > 0.1, whole  # so that a lost order would show


@pytest.mark.slow
def test_table_has_a_record_for_every_row_and_seed(tiny_table):
    config, records, curves, messages, _ = tiny_table
    rows = {(r["optimizer"], r["inner_gradient"]) for r in records}
    named = [baselines.ROWS[name] for name in config.rows]
    expected = {(row.optimizer, row.inner_gradient) for row in named}
    assert rows == expected | {("meta-optimizer", "clean")}
    assert len(records) == 2 * len(rows) and {r["seed"] for r in records} == {0, 1}
    assert len(curves["learning"]) == len(curves["epsilon"]) == len(records)
    assert {r["attack"] for r in records} == {"autoattack-standard"}
    # One for tuning, then two for each row; the command line adds one and its bar ends there.
    assert len(messages) == 2 * len(rows) + 1 == TableProgress(config, Console())._total - 1
    for record in records:
        assert 0 <= record["robust_accuracy"] <= record["clean_accuracy"] <= 1
        assert record["seconds"] > 0


@pytest.mark.slow
def test_costs_are_counted(tiny_table):
    """20 steps on batches of 32: 20 gradients, 160 with PGD-7; 640 examples with an attack."""
    _, records, *_ = tiny_table
    for record in records:
        recipe = record["inner_gradient"]
        assert record["gradient_evaluations"] == (160 if recipe == "adversarial" else 20)
        assert record["adversarial_examples"] == 640 * (recipe in ("adversarial", "free"))
        tuned = record["optimizer"] != "meta-optimizer"
        assert (record["tuning_gradient_evaluations"] > 0) == tuned
        assert bool(record["hyperparameters"]) == tuned


@pytest.mark.slow
def test_tuning_finds_the_learning_rate_that_learns(tiny_table):
    """In 20 steps a linear model learns with 3e-2 and is near chance with 1e-3."""
    _, records, *_ = tiny_table
    plain = [r for r in records if r["optimizer"] == "adam, no decay"]
    assert all(np.isclose(r["hyperparameters"]["learning_rate"], 3e-2) for r in plain)
    sgd = [r for r in records if r["optimizer"] == "sgd"]
    assert all(np.isclose(r["hyperparameters"]["learning_rate"], 0.3) for r in sgd)
    # The optimizer in the place of the meta-optimizer is that same one, on other batches.
    ours = [r["robust_accuracy"] for r in records if r["optimizer"] == "meta-optimizer"]
    tuned = [r["robust_accuracy"] for r in plain]
    assert abs(np.mean(ours) - np.mean(tuned)) < 0.1


@pytest.mark.slow
def test_curves_end_where_the_table_is(tiny_table):
    _, records, curves, _, _ = tiny_table
    for record, learning, epsilon in zip(
        records, curves["learning"], curves["epsilon"], strict=True
    ):
        assert learning["optimizer"] == record["optimizer"]
        assert learning["steps"][-1] == 20
        np.testing.assert_allclose(learning["clean_accuracy"][-1], record["clean_accuracy"])
        np.testing.assert_allclose(epsilon["robust_accuracy"][0], record["clean_accuracy"])
        assert epsilon["robust_accuracy"][-1] <= epsilon["robust_accuracy"][1]


@pytest.mark.slow
def test_what_was_trained_is_what_the_records_are_of(tiny_table):
    _, records, _, _, kept = tiny_table
    found = [
        (entry.optimizer, entry.inner_gradient, float((logits.argmax(1) == task.held_out.y).mean()))
        for entry, task, params in kept
        for logits in jax.vmap(task.optimizee.apply, in_axes=(0, None))(params, task.held_out.x)
    ]
    for record, (optimizer, inner_gradient, accuracy) in zip(records, found, strict=True):
        assert (record["optimizer"], record["inner_gradient"]) == (optimizer, inner_gradient)
        np.testing.assert_allclose(record["clean_accuracy"], accuracy, atol=2e-3)


def test_autoattack_judges_all_models_with_the_same_programs_and_pgd_stays_beside_it():
    """A linear model of two pixels and three classes; the third is never near.

    The margin of x = (a, b) is w (a - b), whatever w > 0: robust where a - b > 2 epsilon = 0.2.
    The first model has w = 1, the second w = 3. With w < 0 only the last example is classified
    correctly, by less than that.
    """
    pixels = jnp.array([[0.55, 0.45], [0.7, 0.3], [0.9, 0.1], [0.45, 0.55]])
    batch = advmeta.Batch(pixels[:, None, :, None], jnp.zeros(4, jnp.int32))

    def apply(params, x):
        a, b = x[:, 0, 0, 0], x[:, 0, 1, 0]
        return jnp.stack([params["w"] * a, params["w"] * b, 0 * a - 9], axis=1)

    optimizee = advmeta.Optimizee(None, apply)
    task = Task(batch, batch, advmeta.ThreatModel("linf", 0.1), optimizee, batch_size=1)
    records = [{"attack": "pgd-40x3", "robust_accuracy": pgd, "seed": 0} for pgd in (0.75, 0.5)]
    programs = (_apgd, _fab, _square)
    key, w = jax.random.key(0), jnp.array([1.0, 3.0])
    found = with_autoattack(task, {"w": w[:1]}, key, records[:1])
    compiled = [program._cache_size() for program in programs]
    found += with_autoattack(task, {"w": w[1:]}, key, records[1:])
    assert autoattack_accuracy(task, {"w": jnp.array([2.0, -1.0])}, key) == [0.5, 0.0]
    assert [program._cache_size() for program in programs] == compiled
    shared = {"attack": "autoattack-standard", "robust_accuracy": 0.5, "pgd": "pgd-40x3", "seed": 0}
    assert found == [shared | {"pgd_accuracy": 0.75}, shared | {"pgd_accuracy": 0.5}]


def test_held_out_accuracy_of_a_known_model():
    """Margin x_0 - x_1 with labels 0: robust where it is above 2 epsilon = 0.2."""
    x = jnp.array([[0.5, 0.4], [0.8, 0.1], [0.3, 0.6], [0.9, 0.65]])
    batch = advmeta.Batch(x, jnp.zeros(4, jnp.int32))
    optimizee = advmeta.Optimizee(lambda key, shape: {}, lambda params, x: x)
    task = Task(batch, batch, advmeta.ThreatModel("linf", 0.1), optimizee, batch_size=1)
    accuracy = held_out_accuracy(task, {}, jax.random.key(0), attack_steps=10, restarts=1)
    assert accuracy.clean == 0.75 and accuracy.robust == 0.5
