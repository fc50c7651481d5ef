"""Tables of subjects: CSV files with a name and a value in each row."""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path


def read_table(path: Path, names: Collection[str], *columns: str) -> tuple[str, dict[str, str]]:
    """Read a CSV file with the column `name` and one of the given columns.

    Args:
        path: the file, in UTF-8.
        names: the names that may occur.
        columns: names of columns, of which the file must have exactly one.

    Returns:
        The column that the file has, and the value of each name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no CSV file, a column is missing, a name is unknown or occurs twice, or a value is empty.
    """
    expected = f"name and {columns[0]}" if len(columns) == 1 else f"name, and either {' or '.join(columns)}"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a CSV file with the columns {expected}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            found, rows = reader.fieldnames, list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read as a CSV file in UTF-8: {error}") from error
    given = [column for column in columns if column in (found or ())]
    if "name" not in (found or ()) or len(given) != 1:
        raise ValueError(f"{path} has the columns {found}, expected {expected}")
    (column,) = given
    values: dict[str, str] = {}
    for row in rows:
        name, value = ((row[each] or "").strip() for each in ("name", column))
        if name not in names:
            raise ValueError(f"{path} names {name!r}, which is not a subject")
        if name in values:
            raise ValueError(f"{path} names {name!r} twice")
        if not value:
            raise ValueError(f"{path} has no {column} for {name!r}")
        values[name] = value
    return column, values
