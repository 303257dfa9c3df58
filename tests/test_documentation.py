"""Every public function and class says what it does, and every argument and setting what it means."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from hf_safe_ema.arguments import SafetyArguments
from hf_safe_ema.recipe import TrainArguments

PACKAGE = Path(__file__).resolve().parents[1] / "hf_safe_ema"
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
# Overrides of a callback's hooks and of argparse: their arguments are documented where they come from.
INHERITED = re.compile(r"on_\w+|error|parse_known_args")


def undocumented(body: list[ast.stmt], within: str = ""):
    """Names of what has no docstring, and of arguments that it does not mention."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        name, text = within + node.name, ast.get_docstring(node)
        if text is None:
            yield name
        elif isinstance(node, ast.FunctionDef) and not INHERITED.fullmatch(node.name):
            arguments = [argument.arg for argument in node.args.args + node.args.kwonlyargs]
            yield from (
                f"{name}({a}=)" for a in arguments if a not in ("self", "cls") and not re.search(rf"\b{a}\b", text)
            )
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{name}.")


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_and_arguments_are_documented(module):
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert list(undocumented(tree.body)) == []


def test_what_is_undocumented_is_found():
    tree = ast.parse("def f(a, b):\n    'About a.'\nclass C:\n    'C'\n    def g(self): pass\n    def _h(self): pass")
    assert list(undocumented(tree.body)) == ["f(b=)", "C.g"]


@pytest.mark.parametrize("settings", [SafetyArguments, TrainArguments])
def test_every_setting_has_a_help_text(settings):
    fields = dataclasses.fields(settings)
    assert len(fields) > 5
    assert [field.name for field in fields if len(field.metadata.get("help", "")) < 10] == []
