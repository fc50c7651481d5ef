"""Imports between the modules and between the rooms of the project, read from the code.

`python -m tests.rooms` draws the diagrams of docs/architecture.md anew.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"mmmae_kernels": ROOT / "kernels", "mmmae": ROOT, "bench": ROOT, "tests": ROOT}
PAGE = ROOT / "docs" / "architecture.md"
ROWS = (  # a room imports only from rows before its own
    ("mmmae_kernels", "mmmae.checks", "mmmae.extras", "mmmae.files", "mmmae.interrupts", "mmmae.text", "mmmae.tuning"),
    ("mmmae.config", "mmmae.data", "mmmae.precision"),
    ("mmmae.info",),
    ("mmmae.model", "mmmae.phantom"),
    ("mmmae.cost",),
    ("mmmae.training",),
    ("mmmae",),
    ("mmmae.cli", "mmmae.interop", "mmmae.recipes"),
    ("mmmae.__main__",),
    ("tests.cases", "tests.emulator", "tests.fuzz"),
    ("bench",),
    ("tests",),
)

Imports = Mapping[str, set[str]]


def modules() -> dict[str, Path]:
    """Return the files of all modules by name."""
    paths = [(path, base) for package, base in PACKAGES.items() for path in sorted((base / package).rglob("*.py"))]
    return {
        ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path for path, base in paths
    }


def imports() -> dict[str, set[str]]:
    """Return which modules each module imports, within functions and for type checking too."""
    known = modules()
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def imported(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            wanted = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for found in wanted:  # a name in a module stands for the module
            while found and found not in known:
                found = found.rpartition(".")[0]
            if found:
                yield found


def reachable(graph: Imports) -> dict[str, set[str]]:
    """Return for each node the nodes that a path leads to."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        reach[start] = seen
    return reach


def circles(graph: Imports) -> list[list[str]]:
    """Return the groups of nodes that can all be reached from each other."""
    reach = reachable(graph)
    groups = {
        frozenset(other for other in reach[node] if node in reach[other]) for node in graph if node in reach[node]
    }
    return sorted(map(sorted, groups))


def room_of(module: str) -> str:
    """Return the room of a module: a folder or file of mmmae or mmmae_kernels, a shared part of tests, or a package."""
    first, *rest = module.split(".")
    is_room = first.startswith("mmmae") or rest[:1] in (["cases"], ["emulator"], ["fuzz"])
    return f"{first}.{rest[0]}" if rest and is_room else first


def package_of(module: str) -> str:
    """Return the room of a module, with mmmae_kernels as one room."""
    return "mmmae_kernels" if module.startswith("mmmae_kernels.") else room_of(module)


def between(rooms: Callable[[str], str], graph: Imports) -> dict[str, set[str]]:
    """Return which rooms each room imports, from the imports of modules."""
    found: dict[str, set[str]] = {}
    for module, imported in graph.items():
        room = rooms(module)
        found[room] = (found.get(room, set()) | {rooms(name) for name in imported}) - {room}
    return found


def upwards(graph: Imports) -> list[tuple[str, str]]:
    """Return the imports of a room from one that is not in a row below its own; a room without a row has no place."""
    rows = {room: number for number, row in enumerate(ROWS) for room in row}
    return [(room, other) for room in graph for other in sorted(graph[room]) if rows[room] <= rows[other]]


def drawn(graph: Imports) -> str:
    """Draw rooms as a Mermaid diagram, without the arrows that follow from others."""
    lines = ["```mermaid", "flowchart TD"]
    reach = reachable(graph)
    ids = {room: room.removeprefix("mmmae_kernels.").replace(".", "_") for room in graph}
    for room in sorted(graph):
        lines.append(f'    {ids[room]}["{room.removeprefix("mmmae_kernels.")}"]')
        implied = set().union(*(reach[other] for other in graph[room]))
        lines += [f"    {ids[room]} --> {ids[other]}" for other in sorted(graph[room] - implied)]
    return "\n".join([*lines, "```"])


def page(text: str) -> str:
    """Return the architecture page with the diagrams of the code as it is."""
    graph = imports()
    kernels = between(room_of, {name: used for name, used in graph.items() if name.startswith("mmmae_kernels")})
    for name, diagram in (("rooms", drawn(between(package_of, graph))), ("kernels", drawn(kernels))):
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = block.subn(rf"\1{diagram}\n\2", text)
        if count != 1:
            raise ValueError(f"the page has {count} blocks <!-- {name} -->, expected 1")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
