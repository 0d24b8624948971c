import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmeta.checkpoint import Checkpoints

ARRAYS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": jnp.array([1.5, -2.0], jnp.bfloat16),
    "keys": jax.random.split(jax.random.key(3), 2),
    "step": np.int32(7),
}


def at(step):
    return {**ARRAYS, "w": ARRAYS["w"] + step}


def same(a, b):
    def plain(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(u.dtype == v.dtype and (plain(u) == plain(v)).all() for u, v in pairs)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with checkpoints of the steps 1 to 5, of which the last three are kept."""
    folder = tmp_path_factory.mktemp("runs") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, at(step), {"metrics": [{"loss": step / 10}]})
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def newest(folder, like=ARRAYS):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.newest(like)


def test_what_is_read_is_what_was_written(folder):
    restored = newest(folder)
    assert restored.step == 5 and same(restored.arrays, at(5))
    assert restored.record == {"metrics": [{"loss": 0.5}]} and restored.damaged == ()
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4", "5"]


def test_an_empty_folder_holds_none(tmp_path):
    assert newest(tmp_path / "checkpoints") is None


def test_arrays_may_be_donated_once_they_are_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        w = jnp.arange(1000.0)
        checkpoints.save(1, {"w": w}, {})
        jax.jit(lambda w: w + 1, donate_argnums=0)(w).block_until_ready()
        restored = checkpoints.newest({"w": jnp.zeros(1000)})
    np.testing.assert_array_equal(restored.arrays["w"], np.arange(1000.0))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_named_and_passed_over(folder, damage):
    """Whichever of its files is damaged: what is read was written, or it is not read."""
    names = [path.relative_to(folder) for path in sorted((folder / "5").rglob("*"))]
    passed_over = 0
    for name in names:
        if not (folder / name).is_file():
            continue
        copy = shutil.copytree(folder, folder.with_name("copy") / "checkpoints")
        damage(copy / name)
        restored = newest(copy)
        assert same(restored.arrays, at(restored.step))
        assert restored.record == {"metrics": [{"loss": restored.step / 10}]}
        if restored.step != 5:
            passed_over += 1
            assert restored.step == 4 and restored.damaged[0].startswith("checkpoint 5: ")
            with Checkpoints(copy) as checkpoints:  # the run writes this step again
                checkpoints.save(5, at(9), {})
            assert same(newest(copy).arrays, at(9))
            assert (copy.parent / "checkpoints-damaged-5").is_dir()
        shutil.rmtree(copy.parent)
    assert passed_over >= 3  # the arrays, what they are, and the record


def test_where_all_are_damaged_it_says_so(folder):
    for path in folder.glob("*/about/metadata"):
        path.write_text("{")
    for _ in range(2):  # it does not take the second look for a fresh start
        with pytest.raises(ValueError, match=r"no checkpoint in .* is whole \(checkpoint 5: "):
            newest(folder)


def test_a_step_may_be_damaged_again(folder):
    for content in (7, 8):
        (folder / "5" / "about" / "metadata").write_text("{")
        assert newest(folder).step == 4
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(5, at(content), {})
    assert same(newest(folder).arrays, at(8))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({**ARRAYS, "w": np.zeros((3, 3), np.float32)}, r"float32\[2, 3\] where float32\[3, 3\]"),
        ({"w": ARRAYS["w"]}, "holds 4 arrays where 1 belong"),
    ],
)
def test_a_checkpoint_of_other_arrays_is_refused(folder, like, message):
    with pytest.raises(ValueError, match=message):
        newest(folder, like)
