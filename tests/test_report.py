"""The report: right numbers in the right cells, and a page that is safe and needs nothing else."""

import io
import json
import math
import pathlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from report_folders import (
    METRICS,
    PLACE,
    ROBUST,
    fill_folder,
    make_checks,
    make_curves,
    make_records,
)

from advmeta import report
from advmeta.report import plots, records, style
from advmeta.report.folder import read

IN_ORDER = ["adam, no decay", "adam", "sgd", "adam", "meta-optimizer"]


@pytest.fixture
def folder(tmp_path):
    """A run folder with every file in it but the two with the most panels, which take seconds."""
    fill_folder(tmp_path)
    for name in ("behaviour.json", "twins.json"):
        (tmp_path / name).unlink()
    return tmp_path


@pytest.fixture
def full_folder(tmp_path):
    fill_folder(tmp_path)
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
    rows += [
        records.Row("adam", recipe)
        for recipe in ("trades", "fgsm-rs", "free", "remembered", "yopo", "vat")
    ]
    lines = {(look.color, look.dash) for look in style.looks(rows).values()}
    assert len(lines) == len(rows)
    assert {look.color for row, look in style.looks(rows).items() if row.meta} == {"meta"}


def test_the_page_says_what_the_run_did(full_folder):
    path = report.write(full_folder)
    assert path == full_folder / "report.html"
    page = Outline(path.read_text())
    headings = re.findall(r"<h2>(.*?)</h2>", path.read_text())
    assert headings == ["Transfer", "Learning curves", "Robustness against epsilon",
                        "Meta-training", "What the meta-optimizer does",
                        "Effective step of each layer", "Adversarial twins", "Sanity checks",
                        "Details"]  # fmt: skip
    for part in ("0.640 ± 0.040", "5.0 min", 'advmeta run "x"', "tasks[0].epsilon",
                 "learning_rate 0.003"):  # fmt: skip
        assert part in page.text
    images = [attributes for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(images) == 11 and all(image["aria-label"] for image in images)
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
    links = [link for link in links if not link.startswith("data:image/png;base64,")]
    assert links and all(link.startswith("#") for link in links)
    identifiers = set(re.findall(r' id="([^"]*)"', text))
    assert {link[1:] for link in links} <= identifiers
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(style.COLORS)


def test_what_the_run_did_not_do_is_left_out(folder):
    for path in folder.glob("*.json"):
        path.unlink()
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


def test_the_plots_show_something(full_folder):
    from PIL import Image

    report.write(full_folder)
    names = {"transfer", "learning_curves", "epsilon", "meta_training", "response",
             "effective_step", "images"}  # fmt: skip
    assert {path.stem for path in full_folder.glob("plots/*")} == names
    for path in full_folder.glob("plots/*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 250
        ink = (pixels < 250).any(axis=-1).mean()
        if path.stem == "images":
            assert 0.2 < ink < 0.95
            continue
        assert 0.01 < ink < 0.5  # and mostly paper
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
