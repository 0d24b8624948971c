"""Several runs on one page: what they share, what differs, and whose is whose."""

import json

import pytest
from report_folders import fill_folder, make_records

from advmeta import report
from advmeta.report.comparison import compared
from advmeta.report.folder import read


@pytest.fixture
def runs(tmp_path):
    """Two runs; in the second SGD did otherwise, everything took longer, and a setting differs."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        fill_folder(folder)
    records = [r | {"seconds": 9.0} for r in make_records()]
    for record in records:
        record["robust_accuracy"] -= 0.1 * (record["optimizer"] == "sgd")
    (folders[1] / "results.json").write_text(json.dumps(records))
    (folders[1] / "config.json").write_text('{"seed": 0, "tasks": [{"epsilon": 0.2}], "lanes": 2}')
    return folders


def test_baselines_that_did_the_same_stand_once_and_the_rest_under_its_run(runs):
    merged, names, differing = compared([read(folder) for folder in runs])
    assert names == ("first", "second")
    found = {(r["optimizer"], r["inner_gradient"]): 0 for r in merged.results}
    for record in merged.results:
        found[record["optimizer"], record["inner_gradient"]] += 1
    assert found == {
        ("meta-optimizer [first]", "clean"): 3, ("meta-optimizer [second]", "clean"): 3,
        ("adam", "adversarial"): 3, ("adam", "clean"): 3, ("adam, no decay", "clean"): 3,
        ("sgd [first]", "noisy"): 3, ("sgd [second]", "noisy"): 3,
    }  # fmt: skip
    second = [r["robust_accuracy"] for r in merged.results if r["optimizer"] == "sgd [second]"]
    assert second == pytest.approx([0.40, 0.42, 0.44])
    curves = {r["optimizer"] for r in merged.curves["learning"]}
    assert curves == {name for name, _ in found}
    assert {(line[0], *line[1:]) for line in differing} == {
        ("tasks[0].epsilon", "0.1", "0.2"), ("lanes", "-", "2"),
        ("note", "<script>alert(1)</script>", "-"),
    }  # fmt: skip


def test_a_run_compared_with_itself_differs_in_nothing(runs):
    first = read(runs[0])
    merged, names, differing = compared([first, first])
    assert names == ("first", "first (2)") and differing == []
    baselines = [r for r in merged.results if not r["optimizer"].startswith("meta")]
    assert len(baselines) == len([r for r in first.results if r["optimizer"][0] != "m"])


def test_the_page_shows_both_and_what_differs(runs, tmp_path):
    page = report.compare(runs, tmp_path / "both")
    text = page.read_text()
    assert "<h2>What differs</h2>" in text and "<td>tasks[0].epsilon</td><td>0.1</td>" in text
    assert "meta-optimizer [first] (clean)" in text and "meta-optimizer [second] (clean)" in text
    assert "&lt;script&gt;alert(1)" in text and "<script" not in text
    names = {path.stem for path in (tmp_path / "both" / "plots").iterdir()}
    assert names == {"transfer", "learning_curves", "epsilon", "meta_training"}
    assert (
        'aria-label="Meta-loss against outer steps. At the end: first 0.500, second 0.500."' in text
    )


def test_a_run_named_after_the_meta_optimizer_does_not_make_its_baselines_ours(runs):
    renamed = runs[0].rename(runs[0].parent / "meta-1")
    merged, *_ = compared([read(renamed), read(runs[1])])
    from advmeta.report.records import row_of

    rows = {row_of(record) for record in merged.results}
    assert {row.optimizer for row in rows if row.meta} == {
        "meta-optimizer [meta-1]", "meta-optimizer [second]",
    }  # fmt: skip


def test_one_run_is_not_compared(runs, tmp_path):
    with pytest.raises(ValueError, match="give at least two runs"):
        report.compare(runs[:1], tmp_path / "both")
    with pytest.raises(ValueError, match=r"second is itself the folder of a run"):
        report.compare(runs, runs[1])
