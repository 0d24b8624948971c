"""The report: right numbers in the right cells, and a page that is safe and needs nothing else."""

import io
import json
import math
import pathlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from advmeta import Check, report
from advmeta.report import plots, records, style
from advmeta.report.folder import read

PLACE = {
    "setting": "same architecture", "dataset": "digits", "architecture": "mlp-32", "norm": "linf",
    "epsilon": 0.1, "attack": "pgd-40x3", "inner_steps": 200,
}  # fmt: skip
COST = {"gradient_evaluations": 200, "adversarial_examples": 0, "seconds": 2.0}
ROBUST = {  # (optimizer, inner gradient): of seeds 0, 1, 2
    ("meta-optimizer", "clean"): (0.60, 0.64, 0.68),
    ("adam", "adversarial"): (0.70, 0.72, 0.74),
    ("sgd", "noisy"): (0.50, 0.52, 0.54),
    ("adam", "clean"): (0.48, 0.50, 0.52),
    ("adam, no decay", "clean"): (0.44, 0.45, 0.46),
}
IN_ORDER = ["adam, no decay", "adam", "sgd", "adam", "meta-optimizer"]


def make_records(seeds=3, **changes) -> list[dict]:
    return [
        PLACE | COST | {
            "optimizer": optimizer, "inner_gradient": inner, "seed": seed,
            "clean_accuracy": 0.9 + 0.01 * seed, "robust_accuracy": robust[seed],
            "tuning_gradient_evaluations": 0 if "meta" in optimizer else 5000,
            "hyperparameters": {} if "meta" in optimizer else {"learning_rate": 0.003},
        } | changes
        for optimizer, inner in ROBUST
        for robust in [ROBUST[optimizer, inner]]
        for seed in range(seeds)
    ]  # fmt: skip


def make_curves() -> dict:
    common = [{"optimizer": optimizer, "inner_gradient": inner, "seed": seed}
              for optimizer, inner in ROBUST for seed in range(2)]  # fmt: skip
    learning = {"steps": [0, 50, 100], "clean_accuracy": [0.1, 0.8, 0.9],
                "robust_accuracy": [0.1, 0.4, 0.5]}  # fmt: skip
    epsilon = {"epsilons": [0.0, 0.1, 0.2], "robust_accuracy": [0.9, 0.5, 0.1]}
    return {"learning": [c | learning for c in common], "epsilon": [c | epsilon for c in common]}


METRICS = [
    {"outer_step": 50 * i, "meta_loss": 2 / i, "clean_accuracy": 0.9, "robust_accuracy": 0.1 * i}
    for i in range(1, 5)
]


def make_checks() -> list[dict]:
    passed = Check("randomized_model", 1, 0.0, 1e-4, True, "largest difference")
    failed = Check("stable_loss", 15, math.nan, 0.25, False, "[red] <i>: average")
    left_out = Check("full_disclosure", 24, None, None, None, "left out: the report")
    return [check._asdict() for check in (passed, failed, left_out)]


@pytest.fixture
def folder(tmp_path):
    """A run folder with every file in it."""
    contents = {
        "config.json": {
            "seed": 0,
            "tasks": [{"epsilon": 0.1}],
            "note": "<script>alert(1)</script>",
        },
        "card.json": {"name": "a & b", "command": 'advmeta run "x"', "seed": 0, "seconds": 300.0},
        "results.json": make_records(),
        "curves.json": make_curves(),
        "sanity.json": make_checks(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in METRICS))
    return tmp_path


class Outline(HTMLParser):
    """Tags, their attributes and the text of a page; unclosed or crossed tags are an error."""

    VOID = ("meta", "br", "path", "use", "rect", "line", "stop")

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def terminal(made, width: int = 80) -> str:
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    console.print(made)
    return console.file.getvalue()


def test_a_cell_holds_the_mean_and_the_sample_standard_deviation():
    # {m - d, m, m + d} has mean m and sample variance (d^2 + 0 + d^2) / 2 = d^2.
    layout = records.transfer(make_records())
    (column,) = layout.columns
    cell = layout.cells[records.Row("meta-optimizer", "clean"), column]
    np.testing.assert_allclose(cell.robust[:2], (0.64, 0.04), rtol=1e-12)
    np.testing.assert_allclose(cell.clean[:2], (0.91, 0.01), rtol=1e-12)
    assert str(cell) == "0.640 ± 0.040 (0.910)"


def test_pgd_and_the_gap_stand_beside_autoattack(tmp_path):
    """PGD's accuracy is 0.03 above AutoAttack's everywhere, so the gap of the means is too."""
    rows = [
        r | {"attack": "autoattack-standard", "pgd": "pgd-40x3",
             "pgd_accuracy": r["robust_accuracy"] + 0.03}
        for r in make_records()
    ]  # fmt: skip
    text = report.markdown(rows)
    assert "| **0.640 ± 0.040 (0.910)<br>PGD 0.670<br>gap 0.030** |" in text
    assert "attack autoattack-standard; PGD pgd-40x3, gap: PGD minus that attack" in text
    assert "PGD" not in report.markdown(make_records())
    shown = terminal(report.table(rows))
    assert "P 0.670" in shown and "Δ 0.030" in shown and "P: under PGD" in " ".join(shown.split())
    (tmp_path / "results.json").write_text(json.dumps(rows))
    page = report.write(tmp_path).read_text()
    assert "<span>(0.910)</span><span>PGD 0.670</span><span>gap 0.030</span>" in page
    # An accuracy in single precision is a little below the same one in double precision.
    equal = [r | {"pgd_accuracy": r["robust_accuracy"] - 1e-8} for r in make_records()]
    assert "gap 0.000" in report.markdown(equal)


def test_costs_are_means_over_the_runs_of_a_row():
    seconds = (1.0, 2.0, 6.0)
    rows = [record | {"seconds": s, "gradient_evaluations": 1600, "adversarial_examples": 25600}
            for record, s in zip(make_records()[:3], seconds, strict=True)]  # fmt: skip
    (cost,) = records.transfer(rows).costs.values()
    assert cost.strings() == ("1,600", "25,600", "3.00")


def test_the_meta_optimizer_is_the_last_row_and_highlighted():
    lines = report.markdown(make_records()).splitlines()
    assert [line.split("|")[1].strip(" *") for line in lines[2:7]] == IN_ORDER
    assert lines[6].startswith("| **meta-optimizer** | **clean** | **0.640 ± 0.040 (0.910)** |")
    made = report.table(make_records())
    assert [row.style is not None for row in made.rows] == [False] * 4 + [True]


def test_settings_come_in_the_order_of_the_protocol_whatever_the_order_of_the_records():
    settings = ("other data set", "made up", "CNN", "same architecture", "wider")
    rows = [record for setting in settings for record in make_records(1, setting=setting)]
    found = [column.setting for column in records.transfer(rows).columns]
    assert found == ["same architecture", "wider", "CNN", "other data set", "made up"]


@pytest.mark.parametrize(
    "key, value",
    [("epsilon", 0.2), ("attack", "autoattack"), ("inner_steps", 400), ("architecture", "mlp-64")],
)
def test_what_was_measured_differently_does_not_share_a_cell(key, value):
    text = report.markdown(make_records() + make_records(**{key: value, "robust_accuracy": 0.0}))
    assert "0.640 ± 0.040 (0.910)" in text and "0.000 ± 0.000 (0.910)" in text
    header = text.splitlines()[0]
    assert str(PLACE[key]) in header and str(value) in header


def test_the_caption_says_how_many_seeds_which_attack_and_who_was_tuned():
    caption = report.markdown(make_records()).splitlines()[-1]
    tuning = "Baselines tuned on a validation split; the meta-optimizer is not tuned."
    for part in ("± standard deviation over 3 seeds", "pgd-40x3", "200 inner steps", tuning):
        assert part in caption
    untuned = report.markdown(make_records(tuning_gradient_evaluations=0))
    assert "Baselines not tuned" in untuned
    partly = [r | {"tuning_gradient_evaluations": 5 * ("no" not in r["optimizer"])}
              for r in make_records()]  # fmt: skip
    assert "(but not adam, no decay (clean))" in report.markdown(partly)


def test_one_seed_has_no_spread():
    text = report.markdown(make_records(1))
    assert "±" not in text and "of one seed" in text
    assert "±" not in terminal(report.table(make_records(1)))


def test_the_page_of_one_seed_speaks_of_no_spread(tmp_path):
    curves = {part: made[::2] for part, made in make_curves().items()}
    (tmp_path / "results.json").write_text(json.dumps(make_records(1)))
    (tmp_path / "curves.json").write_text(json.dumps(curves))
    text = report.write(tmp_path).read_text()
    assert "±" not in text and "standard deviation" not in text


def test_nan_is_shown_and_not_left_out_of_a_mean(tmp_path):
    rows = make_records()
    rows[1]["robust_accuracy"] = math.nan  # of the meta-optimizer
    rows[0]["seconds"] = None
    assert "| **nan (0.910)** | **200** | **0** | **nan** |" in report.markdown(rows)
    assert "nan" in terminal(report.table(rows))
    curves = make_curves()
    curves["learning"][0]["robust_accuracy"] = [math.nan, None, 0.5]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    (tmp_path / "curves.json").write_text(json.dumps(curves))
    metrics = [METRICS[0] | {"meta_loss": math.nan}, METRICS[1] | {"robust_accuracy": None}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    assert ">nan<" in report.write(tmp_path).read_text()


def test_checks_have_a_line_each_and_failures_say_what_to_do(folder):
    lines = [line.split() for line in terminal(report.checks(make_checks())).splitlines()]
    assert ["1", "randomized_model", "0", "0.0001", "pass"] in lines
    assert ["15", "stable_loss", "nan", "0.25", "FAIL", "[red]", "<i>:", "average"] in lines
    assert lines[-1][:6] == ["24", "full_disclosure", "-", "-", "left", "out"]
    page = report.write(folder).read_text()
    assert "<td>FAIL</td><td>[red] &lt;i&gt;: average</td>" in page
    assert "<td>pass</td><td>largest difference</td>" in page
    assert "<td>left out</td><td>left out: the report</td>" in page


def test_six_settings_fit_a_terminal_of_80_columns():
    rows = [record for setting in records.SETTINGS for record in make_records(setting=setting)]
    rows = [r | {"gradient_evaluations": 1600, "adversarial_examples": 25600} for r in rows]
    lines = terminal(report.table(rows)).splitlines()
    assert max(map(len, lines)) <= 80
    (line,) = (line for line in lines if line.startswith("meta-optimizer"))
    assert line.split() == ["meta-optimizer", *["0.640"] * 6, "1,600", "25,600", "2.00"]


def test_names_are_text_not_markup():
    rows = make_records(optimizer="a|b [red] <i>", dataset="[bold]x|y", seconds=12345.0)
    text = report.markdown(rows)
    assert "a\\|b [red] &lt;i>" in text and "x\\|y" in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()[:3]}
    assert len(widths) == 1
    shown = "".join(terminal(report.table(rows), 200).split())
    assert "[red]" in shown and "[bold]" in shown and "12,345" in shown


def test_a_curve_is_the_mean_at_the_points_that_all_seeds_have():
    seeds = [{"steps": [0, 10, 20], "accuracy": [0.1, 0.4, 0.9]},
             {"steps": [20, 0], "accuracy": [0.7, 0.3]}]  # fmt: skip
    xs, means, spreads = plots.mean_curve(seeds, "steps", "accuracy")
    np.testing.assert_array_equal(xs, [0, 20])
    np.testing.assert_allclose(means, [0.2, 0.8])
    # Two numbers that are d apart: sample variance 2 (d / 2)^2, so d / sqrt(2).
    np.testing.assert_allclose(spreads, [0.2 / 2**0.5, 0.2 / 2**0.5])


def test_every_row_looks_different():
    rows = [records.Row(*key) for key in ROBUST] + [records.Row("meta-2", "clean")]
    rows += [records.Row("adam", recipe) for recipe in ("trades", "fgsm-rs", "free", "yopo", "vat")]
    lines = {(look.color, look.dash) for look in style.looks(rows).values()}
    assert len(lines) == len(rows)
    assert {look.color for row, look in style.looks(rows).items() if row.meta} == {"meta"}


def test_the_page_says_what_the_run_did(folder):
    path = report.write(folder)
    assert path == folder / "report.html"
    page = Outline(path.read_text())
    headings = re.findall(r"<h2>(.*?)</h2>", path.read_text())
    assert headings == ["Transfer", "Learning curves", "Robustness against epsilon",
                        "Meta-training", "Sanity checks", "Details"]  # fmt: skip
    for part in ("0.640 ± 0.040", "5.0 min", 'advmeta run "x"', "tasks[0].epsilon",
                 "learning_rate 0.003"):  # fmt: skip
        assert part in page.text
    images = [attributes for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(images) == 6 and all(image["aria-label"] for image in images)
    assert "meta-optimizer (clean) 0.500" in images[2]["aria-label"]  # the robust curve's end


def test_the_page_holds_no_script_and_no_text_of_a_file_as_markup(folder):
    nasty = "\"'><img src=x onerror=alert(1)>$\\frac{$"
    rows = make_records(dataset=nasty, architecture=nasty)
    rows += [record | {"optimizer": nasty} for record in rows[:3]]
    (folder / "results.json").write_text(json.dumps(rows))
    (folder / "card.json").write_text(json.dumps({"name": nasty, nasty: nasty, "seed": nasty}))
    text = report.write(folder).read_text()
    page = Outline(text)
    assert not {"script", "img", "iframe", "link", "object"} & {tag for tag, _ in page.tags}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_asks_for_nothing_from_elsewhere(folder):
    text = report.write(folder).read_text()
    assert not re.search(r"https?:|@import|url\((?!#)|\bsrc=", text)
    links = re.findall(r'href="([^"]*)"', text)
    assert links and all(link.startswith("#") for link in links)
    identifiers = set(re.findall(r' id="([^"]*)"', text))
    assert {link[1:] for link in links} <= identifiers
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(style.COLORS)


def test_what_the_run_did_not_do_is_left_out(folder):
    for name in ("results.json", "curves.json", "card.json", "config.json", "sanity.json"):
        (folder / name).unlink()
    text = report.write(folder).read_text()
    assert [path.name for path in folder.glob("plots/*")] == ["meta_training.png"]
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Meta-training"]
    (folder / "metrics.jsonl").unlink()
    (folder / "results.json").write_text(json.dumps(make_records()))
    text = report.write(folder).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Transfer", "Details"]  # of what tuning chose


def test_a_line_cut_short_by_an_interruption_is_passed_over(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"outer_step": 250, "meta_')
    assert read(folder).metrics == METRICS


def test_the_plots_show_something(folder):
    from PIL import Image

    report.write(folder)
    names = {"transfer", "learning_curves", "epsilon", "meta_training"}
    assert {path.stem for path in folder.glob("plots/*")} == names
    for path in folder.glob("plots/*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 250
        assert 0.01 < (pixels < 250).any(axis=-1).mean() < 0.5  # ink, and mostly paper
        vermillion = np.abs(pixels.astype(int) - (0xD5, 0x5E, 0x00)).max(axis=-1) < 8
        assert vermillion.sum() > 100, path


def test_the_same_run_gives_the_same_page_and_leaves_nothing_else(folder):
    first = report.write(folder).read_bytes()
    before = sorted(path.name for path in folder.rglob("*"))
    assert report.write(folder).read_bytes() == first
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert not any(name.startswith(".") for name in before)


def test_settings_of_matplotlib_are_left_as_they_were_and_do_not_matter(folder):
    import matplotlib

    first = report.write(folder).read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        assert report.write(folder).read_bytes() == first
        assert dict(matplotlib.rcParams) == before


def test_bad_input_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"no records; give those of results\.json"):
        report.table([])
    with pytest.raises(ValueError, match=r"record 1 lacks \['robust_accuracy'\]"):
        report.markdown([make_records()[0], {"optimizer": "adam", "inner_gradient": "clean",
                                             "clean_accuracy": 1.0}])  # fmt: skip
    with pytest.raises(ValueError, match="there is no such folder"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"none of config\.json.*nothing to report"):
        report.write(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results\.json holds a dict; it must hold a list"):
        report.write(tmp_path)
    (tmp_path / "results.json").write_text("[1,")
    with pytest.raises(ValueError, match=r"results\.json is not what a run writes"):
        report.write(tmp_path)


def test_matplotlib_and_rich_are_imported_where_they_are_used():
    import subprocess
    import sys

    code = "import sys, advmeta.report.page as page; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    for path in pathlib.Path(report.__file__).parent.glob("*.py"):  # flax imports rich itself
        assert not re.search(r"^(import|from) (matplotlib|rich)", path.read_text(), re.MULTILINE)
