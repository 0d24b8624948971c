"""Imports go one way: a module sees only what is above it in the data flow."""

import ast
from pathlib import Path

import pytest

import advmeta

ROOT = Path(advmeta.__file__).parent
# From what sees nothing to what sees everything. Those in one set do not see each other.
LAYERS = [
    {"types", "imports", "notebook"},
    {"parameter_files"},
    {"data", "optimizees", "attacks", "meta_optimizer"},
    {"tasks"},
    {"task_families"},
    {"inner_gradients"},
    {"held_out", "unroll"},
    {"patching"},
    {"meta_loss"},
    {"checkpoint", "meta_training_config", "persistent_evolution", "sharding"},
    {"outer_step"},
    {"meta_training"},
    {"evaluation"},
    {"report"},
    # Of the command line.
    {"config_files", "environment", "event_log", "named_models", "processes", "progress"},
    {"run_folder"},
    {"attack_command", "patch_command", "table_command", "training_command"},
    {"cli"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
FILES = sorted(ROOT.rglob("*.py"))


def part_of(path):
    """The part of the package that a file belongs to; the package's own __init__ to none."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_parts(source):
    """Parts of advmeta that a module imports, wherever in it it does."""
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "advmeta":
                parts.add(rest[0] if rest else "the whole package")
    return parts


def test_imports_are_seen_in_every_form():
    source = "import jax, advmeta.data.npz\nfrom advmeta import tasks\ndef f():\n import advmeta\n"
    assert imported_parts(source) == {"data", "tasks", "the whole package"}
    assert imported_parts("from advmeta.attacks.projected_gradient import pgd") == {"attacks"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_above(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in LEVEL, f"{part} has no place in LAYERS yet"
    imports = imported_parts(path.read_text()) - {part}
    assert imports <= LEVEL.keys()
    below = {name for name in imports if LEVEL[name] >= LEVEL[part]}
    assert not below, f"{part} may not import {below}"


def test_no_module_has_the_name_of_a_function_beside_it():
    """`from package import name` must not depend on whether a module was imported before."""
    for init in ROOT.rglob("__init__.py"):
        package = ".".join(init.parent.relative_to(ROOT.parent).parts)
        modules = {path.stem for path in init.parent.glob("*.py")} - {"__init__"}
        exported = {
            alias.asname
            for node in ast.walk(ast.parse(init.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module != package  # a module as itself
            for alias in node.names
        }
        assert not modules & exported, f"{package}: {modules & exported}"
