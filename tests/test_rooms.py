"""Imports between modules have no circle, rooms import only from rooms below, and the page shows the code as it is."""

import ast
import re

import pytest

from tests import rooms


@pytest.fixture(scope="module")
def imports():
    return rooms.imports()


def test_no_circle_of_modules_exists(imports):
    assert rooms.circles(imports) == []


def test_no_circle_of_rooms_exists_in_the_kernels(imports):
    assert rooms.circles(rooms.between(rooms.room_of, imports)) == []


def test_no_room_imports_upwards(imports):
    assert rooms.upwards(rooms.between(rooms.package_of, imports)) == []


def test_the_architecture_page_shows_the_rooms_as_they_are():
    text = rooms.PAGE.read_text()
    assert text == rooms.page(text), "python -m tests.rooms draws the page's diagrams anew"


def test_the_ways_through_the_code_on_the_architecture_page_exist():
    text = rooms.PAGE.read_text().split("## Two ways through the code")[1]
    ways = re.findall(r"\((.*?)\):\n\n(.*?)\n(?:\n|$)", text, re.DOTALL)
    assert len(ways) == 2
    for title, table in ways:
        steps = re.findall(r"^\| \d+ \| `(.*?)` \| `(.*?)` \|", table, re.MULTILINE)
        files = [file for file, _ in steps]
        assert title == f"{len(files) - 1} moves between {len(set(files))} files"
        for file, name in steps:
            nodes = ast.walk(ast.parse((rooms.ROOT / file).read_text()))
            assert name in {getattr(node, "name", None) for node in nodes}, (file, name)


def test_imports_in_functions_and_for_type_checking_are_found(tmp_path):
    path = tmp_path / "shop.py"
    path.write_text(
        "import typing\nimport town.bank\nfrom . import street\nfrom .street.corner import lamp\n"
        "if typing.TYPE_CHECKING:\n    from .. import harbour\n\ndef buy():\n    from town.market.stall import price\n"
    )
    known = dict.fromkeys(
        ["town.bank", "town.market", "town.market.street", "town.market.street.corner", "town.market.stall"], path
    )
    found = set(rooms.imported("town.market.shop", path, {**known, "town.harbour": path}))
    assert found == {
        "town.bank", "town.market.street", "town.market.street.corner", "town.harbour", "town.market.stall",
    }  # fmt: skip


def test_circles_and_imports_upwards_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert rooms.circles(graph) == [["a", "b", "c"], ["e", "f"]]
    assert rooms.upwards({"mmmae.model": {"mmmae.config", "mmmae.cost", "mmmae.phantom"}}) == [
        ("mmmae.model", "mmmae.cost"),
        ("mmmae.model", "mmmae.phantom"),
    ]
