"""The house rules that a linter does not know: sizes, docstrings, what numbers may import, the public names."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import finetrial

SOURCE = Path(finetrial.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [path.relative_to(SOURCE).as_posix() for path in FILES]
MOST_LINES = 400
NUMBERS = (
    "stats.py",
    "power.py",
    "effects.py",
    "resampling.py",
    "tuning_curves.py",
    "matching.py",
    "cka.py",
    "similarity.py",
    "rows.py",
    "linear_probe.py",
    "heads/squad_metrics.py",
)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_says_what_it_is_for_is_not_too_long_and_prints_nothing(path):
    assert ast.get_docstring(tree(path)), "opens with what it is for"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_public_class_and_long_function_has_a_docstring(path):
    """A short function may speak for itself; what a protocol asks for is described there."""
    bare = []
    for node in tree(path).body:
        public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        if not public or ast.get_docstring(node):
            continue
        lines = (node.end_lineno or 0) - node.lineno
        plain_record = isinstance(node, ast.ClassDef) and all(isinstance(n, ast.AnnAssign) for n in node.body)
        if lines > 12 and not plain_record:
            bare.append(node.name)
    assert not bare


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_import_arrays_numbers_and_the_standard_library_alone(name):
    roots = set()
    for node in ast.walk(tree(SOURCE / name)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.removeprefix("finetrial.") + ".py" not in NUMBERS:
                roots.add(module.partition(".")[0])
    assert roots - set(sys.stdlib_module_names) <= {"numpy", "scipy"}


def test_what_the_package_offers_is_there():
    assert finetrial.__all__ == sorted(finetrial.__all__)
    for name in finetrial.__all__:
        assert getattr(finetrial, name).__doc__


def test_every_kind_of_plug_in_is_a_folder_with_a_line_about_itself():
    for kind in ("tasks", "methods", "probes", "engines", "trackers"):
        assert (ast.get_docstring(tree(SOURCE / kind / "__init__.py")) or "").startswith("One file per ")
