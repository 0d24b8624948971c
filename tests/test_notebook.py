"""What results look like in a notebook."""

import re

import jax
import jax.numpy as jnp
import pytest

import advmeta
from advmeta.held_out import Accuracy
from advmeta.notebook import html_table


def texts(shown: str) -> list[str]:
    return re.findall(r"<t[hd]>(.*?)</t[hd]>", shown)


def test_text_is_escaped_and_fractions_are_short():
    shown = html_table(("a<b", "n"), [("x & y", 1), (0.12345, "")], "note > 1")
    assert texts(shown) == ["a&lt;b", "n", "x &amp; y", "1", "0.123", ""]
    assert shown.endswith("</table><p>note &gt; 1</p>")
    assert not html_table(("a",), []).endswith("</p>")


def test_a_patch_shows_before_and_after_and_its_cost():
    report = advmeta.PatchReport(
        Accuracy(0.96, 0.25), Accuracy(0.94, 0.625), 0.5, 100, 100, 4.0, "stopped <early>"
    )
    shown = report._repr_html_()
    assert texts(shown)[3:] == ["before", "0.960", "0.250", "after", "0.940", "0.625"]
    assert "100 steps" in shown and "moved by 50.0%" in shown and "&lt;early&gt;" in shown
    assert texts(report.after._repr_html_())[2:] == ["0.940", "0.625"]


@pytest.mark.parametrize("epsilons", [None, (0.1, 0.3)])
def test_autoattack_shows_who_broke_how_many(epsilons):
    """Margins of 0.1 and 0.4 fall by 2 epsilon: one of two is broken at 0.1, the other at 0.3."""
    x, y = jnp.array([[0.55, 0.45], [0.7, 0.3]]), jnp.array([0, 0])
    result = advmeta.autoattack(
        lambda x: 9 * x, x, y, threat_model=advmeta.ThreatModel("linf", 0.1), key=jax.random.key(0),
        version="custom", attacks=("apgd-ce",), epsilons=epsilons,
    )  # fmt: skip
    found = texts(result._repr_html_())[3:]
    if epsilons is None:
        assert found == ["nothing", "", "1.000", "apgd-ce", "1", "", "all", "", "0.500"]
    else:
        assert found == ["nothing", "", "1.000", "apgd-ce at epsilon 0.1", "1", "",
                         "all at epsilon 0.1", "", "0.500", "apgd-ce at epsilon 0.3", "1", "",
                         "all at epsilon 0.3", "", "0.000"]  # fmt: skip


def test_checks_show_their_verdicts():
    from advmeta.evaluation.sanity.checks import Checks

    checks = Checks(
        [advmeta.Check("stable_loss", 15, 0.5, 0.25, False, "shattered: average"),
         advmeta.Check("full_disclosure", 24, None, None, None, "left out")]
    )  # fmt: skip
    assert checks == list(checks)
    assert texts(checks._repr_html_())[6:] == [
        "15", "stable_loss", "0.5", "0.25", "FAIL", "shattered: average",
        "24", "full_disclosure", "-", "-", "left out", "left out",
    ]  # fmt: skip
