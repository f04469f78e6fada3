"""How the examples read a user's table: every problem gets one clear line."""

import csv
import math
from pathlib import Path

import numpy as np


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file that are not blank, each with its line number."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(enumerate(csv.reader(file), 1))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    return [(i, row) for i, row in rows if any(map(str.strip, row))]


def is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell)) and "_" not in cell
    except ValueError:
        return False


def as_numbers(path: Path, rows: list[list[str]]) -> np.ndarray:
    """Numeric cells as an array, `[rows, columns]`."""
    values = np.array([[float(cell) for cell in row] for row in rows])
    if np.abs(values).max() > 1e30:
        raise ValueError(f"{path}: numbers beyond 1e30 are too large for single precision")
    return values
