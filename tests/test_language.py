"""The language of docstrings: plain sentences that say what a function does, as PyTorch's documentation writes them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["bench", "experiments", "kernels", "mmmae", "tests"]
# A docstring of a function begins with a verb: "Return the sum of all rows." These begin something else.
NO_VERBS = (
    " a all an and another any as at both by each every everything few for from given how if in is it its like many "
    "more most no none not nothing of on one only other our over same some such that the their there these they this "
    "those two three under until up what when where whether which who whose why with without "
)


def functions(path):
    """Yield name, line and docstring of the functions of a module, but for properties and tests."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("test_"):
            continue
        decorators = {ast.unparse(decorator).split("(")[0].rsplit(".", 1)[-1] for decorator in node.decorator_list}
        text = ast.get_docstring(node)
        if text and not decorators & {"property", "cached_property", "fixture"}:
            yield node.name, node.lineno, text


@pytest.mark.parametrize("room", ROOMS)
def test_the_docstring_of_a_function_begins_with_a_verb(room):
    found = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for name, line, text in functions(path):
            first = re.match(r"[\w'-]*", text)[0]
            if f" {first.lower()} " in NO_VERBS or first.lower().endswith(("ed", "ing")) or not first[:1].isupper():
                found.append(f"{path.relative_to(ROOT)}:{line}: {name}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)
