"""Are the attacks faster than PyTorch's, and do they find the same?

    pip install -e '.[benchmarks]'
    python -m benchmarks.attacks

Two networks trained by PGD on Fashion-MNIST, 256 images, the same weights in JAX and PyTorch.
Contenders take turns in one process; medians of images per second. The first call of ours, which
compiles, is printed apart. The oracle run gives our JAX model to the reference's own attacks.
"""

import argparse
import dataclasses
import functools
import time

import foolbox
import jax
import numpy as np
import torch
import torchattacks
from jax.tree_util import Partial
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_tf import FABAttack_TF
from rich.console import Console
from rich.table import Table

import advmeta
from benchmarks import timing
from benchmarks.torch_models import JaxAdapter, torch_model
from tests import fixtures

STEPS = 40


@dataclasses.dataclass(frozen=True)
class Problem:
    """The same images and weights for both libraries."""

    logits_fn: Partial
    x: jax.Array
    y: jax.Array
    threat_model: advmeta.ThreatModel
    module: torch.nn.Module
    torch_x: torch.Tensor
    torch_y: torch.Tensor

    @property
    def epsilon(self) -> float:
        return float(self.threat_model.epsilon)

    @property
    def reference_norm(self) -> str:
        return {"linf": "Linf", "l2": "L2"}[self.threat_model.norm]


def load(setting: str, examples: int) -> Problem:
    name, norm, epsilon = fixtures.SETTINGS[setting]
    apply, params = fixtures.load_model(name)
    x, y = (a[:examples] for a in fixtures.load_images())
    problem = Problem(
        logits_fn=Partial(apply, params),
        x=x,
        y=y,
        threat_model=advmeta.ThreatModel(norm, epsilon),
        module=torch_model(params),
        torch_x=torch.from_numpy(np.array(x).transpose(0, 3, 1, 2)).contiguous(),
        torch_y=torch.from_numpy(np.array(y)).long(),
    )
    with torch.no_grad():
        difference = np.abs(problem.module(problem.torch_x).numpy() - apply(params, x)).max()
    if difference > 1e-3:
        raise AssertionError(f"the two libraries' logits differ by {difference}")
    return problem


def ours(attack, problem: Problem, **options):
    """A call that returns when the result is there."""
    run = functools.partial(
        attack, problem.logits_fn, problem.x, problem.y,
        threat_model=problem.threat_model, key=jax.random.key(0), **options,
    )  # fmt: skip
    return lambda: jax.block_until_ready(run())


def pgd_contenders(problem: Problem) -> dict:
    epsilon, x, y = problem.epsilon, problem.torch_x, problem.torch_y
    step = 2.5 * epsilon / STEPS
    model = foolbox.PyTorchModel(problem.module, bounds=(0, 1), device="cpu")
    if problem.threat_model.norm == "linf":
        theirs = torchattacks.PGD(problem.module, eps=epsilon, alpha=step, steps=STEPS)
        foolbox_attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=STEPS)
    else:
        theirs = torchattacks.PGDL2(problem.module, eps=epsilon, alpha=step, steps=STEPS)
        foolbox_attack = foolbox.attacks.L2PGD(abs_stepsize=step, steps=STEPS)
    return {
        "advmeta": ours(advmeta.attacks.pgd, problem, steps=STEPS),
        "torchattacks": lambda: theirs(x, y),
        "foolbox": lambda: foolbox_attack(model, x, y, epsilons=epsilon),
    }


def reference(problem: Problem, attacks: list[str] | None = None, model=None):
    """The reference's AutoAttack: the standard ensemble, or some of its attacks; -> x_adv, y_adv.

    ``model`` is a `JaxAdapter` to attack instead of the PyTorch model.
    """
    options = {"eps": problem.epsilon, "norm": problem.reference_norm, "seed": 0}
    adversary = AutoAttack(model or problem.module, **options)
    if model:
        adversary.apgd = APGDAttack(model, is_tf_model=True, device="cpu", **options)
        adversary.apgd_targeted = APGDAttack_targeted(
            model, is_tf_model=True, device="cpu", **options
        )
        adversary.fab = FABAttack_TF(model, device="cpu", **options)
        adversary._set_version("standard")
    if attacks:
        adversary.attacks_to_run = attacks
    return lambda: adversary.run_standard_evaluation(
        problem.torch_x, problem.torch_y, batch_size=len(problem.torch_y)
    )


def apgd_contenders(problem: Problem) -> dict:
    theirs = torchattacks.APGD(
        problem.module, norm=problem.reference_norm, eps=problem.epsilon, steps=100, loss="ce"
    )
    return {
        "advmeta": ours(advmeta.attacks.apgd, problem, steps=100, loss="ce"),
        "torchattacks": lambda: theirs(problem.torch_x, problem.torch_y),
        "reference": reference(problem, attacks=["apgd-ce"]),
    }


def autoattack_contenders(problem: Problem) -> dict:
    return {
        "advmeta": ours(advmeta.autoattack, problem, batch_size=256),
        "reference": reference(problem),
    }


QUESTIONS = {
    "PGD-40": pgd_contenders,
    "APGD-CE, 100 steps": apgd_contenders,
    "AutoAttack standard": autoattack_contenders,
}


def oracle(problem: Problem) -> dict:
    """Ours and the reference's own attack code, both on the JAX model, image by image."""
    adapter = JaxAdapter(problem.logits_fn)
    x_adv, _ = reference(problem, model=adapter)()
    theirs = adapter(x_adv).argmax(1).numpy() == np.array(problem.y)
    found = np.array(ours(advmeta.autoattack, problem, batch_size=256)().robust)
    return {
        "images": len(found),
        "robust_ours": int(found.sum()),
        "robust_reference": int(theirs.sum()),
        "agree": int((found == theirs).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--autoattack-rounds", type=int, default=2, help="the same for AutoAttack")
    parser.add_argument("--examples", type=int, default=256, help="images, at most 256")
    parser.add_argument("--settings", nargs="+", default=list(fixtures.SETTINGS))
    arguments = parser.parse_args()
    console, results = Console(), []
    table = Table("setting", "attack", "contender", "images a second", "advmeta is faster by")
    for setting in arguments.settings:
        problem = load(setting, arguments.examples)
        for question, make in QUESTIONS.items():
            whole = question == "AutoAttack standard"
            rounds = arguments.autoattack_rounds if whole else arguments.rounds
            contenders = make(problem)
            start = time.perf_counter()
            contenders["advmeta"]()
            first = time.perf_counter() - start
            console.print(f"{setting}: {question}, first call of ours {first:.1f} s")
            seconds = timing.take_turns(contenders, rounds, warm_up=0 if whole else 1)
            median = timing.medians(seconds)
            for name, value in median.items():
                speed = arguments.examples / value
                ratio = value / median["advmeta"]
                table.add_row(setting, question, name, f"{speed:.1f}", f"{ratio:.2f}")
            results.append(
                {"setting": setting, "attack": question, "first_call": first, "seconds": seconds}
            )
        agreement = oracle(problem)
        console.print(f"{setting}: oracle run, {agreement}")
        results.append({"setting": setting, "attack": "oracle", **agreement})
    console.print(table)
    timing.write("attacks", {"examples": arguments.examples, "results": results})


if __name__ == "__main__":
    main()
