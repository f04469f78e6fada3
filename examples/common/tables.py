"""How the examples read a user's table, and write one: every problem gets one clear line."""

import csv
import math
from pathlib import Path

import numpy as np
from common.arguments import InputError

Row = tuple[int, list[str]]  # its line number and its cells


def read(path: Path) -> tuple[list[str], np.ndarray]:
    """Names and values of the numeric columns of a CSV file. A header is optional."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in enumerate(csv.reader(file), 1) if any(map(str.strip, row[1]))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    mark = _other_separator([row for _, row in rows])
    columns = _numeric_columns([row for _, row in rows[1:]])
    header = _split_header(path, rows, columns)
    if len(rows) < 20:
        raise InputError(f"{path}: at least 20 rows are needed; got {len(rows)}")
    if mark or len(columns) < 2:
        got = f"cells that seem to be separated by {mark!r}" if mark else len(columns)
        raise InputError(
            f"{path}: two numeric columns separated by a comma are needed, with points in the "
            f"numbers; got {got}"
        )
    names = [header.get(i, "").strip() or f"column {i + 1}" for i in columns]
    for line, row in rows:
        for i, name in zip(columns, names, strict=True):
            if i >= len(row) or not _is_number(row[i]):
                cell = repr(row[i]) if i < len(row) else "nothing"
                raise InputError(f"{path}, line {line}: {name} must be a finite number; got {cell}")
    values = np.array([[float(row[i]) for i in columns] for _, row in rows])
    if header and not header[columns[0]].strip() and (np.diff(values[:, 0]) == 1).all():
        raise InputError(
            f"{path}: {names[0]} has no name and counts the rows, as an index does. "
            "Leave it out (pandas: index=False), or give it a name"
        )
    if np.abs(values).max() > 1e30:
        raise InputError(f"{path}: numbers beyond 1e30 are too large for single precision")
    return names, values


def _other_separator(rows: list[list[str]]) -> str | None:
    """What separates cells, if not commas, which may be those of decimals or of texts."""
    if not rows:
        return None
    first, last = rows[0], rows[-1]
    for mark in ";\t|":
        cells = ",".join(last).split(mark)
        numbers = all(_is_number(cell.replace(",", ".", 1)) for cell in cells)
        alone = len(first) == 1 or len(first) < len(last)  # a header with other separators
        if mark in ",".join(last) and (numbers or (alone and mark in ",".join(first))):
            return mark
    return None


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell)) and "_" not in cell
    except ValueError:
        return False


def _numeric_columns(rows: list[list[str]]) -> list[int]:
    """Columns with more numbers than text. Empty cells do not count: they are errors later."""
    columns = []
    for i in range(max(map(len, rows), default=0)):
        cells = [row[i] for row in rows if i < len(row) and row[i].strip()]
        if 2 * sum(map(_is_number, cells)) > len(cells):
            columns.append(i)
    return columns


def _split_header(path: Path, rows: list[Row], columns: list[int]) -> dict[int, str]:
    """Remove the first row from `rows` if it has no number above the numeric columns."""
    if not rows or not columns:
        return {}
    line, first = rows[0]
    cells = {i: first[i] if i < len(first) else "" for i in columns}
    numbers = [cell for cell in cells.values() if _is_number(cell)]
    if not numbers:
        del rows[0]
        return cells
    if len(cells) > 2 and [cell.strip() for cell in first] == [str(i) for i in range(len(first))]:
        raise InputError(
            f"{path}, line {line}: looks like the column numbers of pandas, not like data. Write "
            "names in their place, or no header"
        )
    if len(numbers) < len(cells):
        other = next(cell for cell in cells.values() if not _is_number(cell))
        raise InputError(
            f"{path}, line {line}: must have a name above each column of numbers, or a finite "
            f"number in each; got {numbers[0]!r} and {other!r}"
        )
    return {}


def check_density(names: list[str], x: np.ndarray) -> None:
    """Raise `InputError` if the rows lie in a hyperplane, where they have no density."""
    as_flow_sees = x.astype(np.float32).astype(float)
    for name, column in zip(names, as_flow_sees.T, strict=True):
        # `bind` refuses columns whose spread is nearly lost in the rounding of float32.
        if column.std() <= 5e-7 * abs(column.mean()):
            raise InputError(
                f"{name} is constant in the rows to train on, at least in single precision, so "
                "they have no density. Leave it out, or subtract an offset from it"
            )
    if len(x) <= len(names):
        raise InputError(
            f"{len(names)} columns need at least {len(names) + 1} rows to train on; got {len(x)}. "
            "Leave columns out, or get more rows"
        )
    # Linear dependence, such as c = 2 a, leaves a direction with nothing but rounding.
    variances, directions = np.linalg.eigh(np.corrcoef(x.T))
    if variances[0] < 1e-9 * len(names):
        weights = np.abs(directions[:, 0])
        involved = [name for name, weight in zip(names, weights, strict=True) if weight > 0.01]
        raise InputError(
            f"the columns {', '.join(involved)} depend linearly on each other, so the rows have no "
            "density. Leave one of them out"
        )


def write(path: Path, names: list[str], rows: np.ndarray) -> None:
    """Write all digits of each number, and quote names that contain a comma."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
