"""How the examples read a user's table, and the table that they make up."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common.arguments import InputError

Frame = Column = Any  # of pandas, whose own annotations are too wide for a type checker
LEAST_ROWS = 20
FEW = 20  # numbers that are drawn as bars


def read(path: Path) -> Frame:
    """The table of a CSV file, as pandas reads it."""
    try:
        frame = pd.read_csv(path, skipinitialspace=True)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {str(error).strip()}") from None
    if len(frame) < LEAST_ROWS:
        raise InputError(f"{path}: at least {LEAST_ROWS} rows are needed; got {len(frame)}")
    return frame


def flats(rows: int, seed: int) -> Frame:
    """Made-up flats with text, integers, decimals, round numbers and missing values.

    The rents of old flats are more uncertain than those of new ones.
    """
    rng = np.random.default_rng(seed)
    cities, levels = (
        np.array(["Bern", "Lyon", "Porto", "Turin"]),
        np.array([26.0, 16.0, 13.0, 11.0]),
    )
    place = rng.choice(4, rows, p=[0.35, 0.3, 0.15, 0.2])
    city, level = cities[place], levels[place]
    rooms = 1 + rng.binomial(5, np.where(city == "Bern", 0.3, 0.4))
    area = np.round(rng.gamma(20, (14 + 17 * rooms) / 20), 1)
    old = rng.random(rows) < 0.4
    year = np.clip(np.round(rng.normal(np.where(old, 1905, 1980), 18)), 1850, 2024)
    pump = rng.random(rows) < 0.6 / (1 + np.exp((1990 - year) / 8))
    heating = np.where(pump, "heat pump", rng.choice(["gas", "oil"], rows, p=[0.7, 0.3]))
    balcony = rng.random(rows) < 1 / (1 + np.exp((1950 - year) / 20 + 0.3 * (2 - rooms)))
    rent = 1.6 * level * area**0.85 * (1 + 0.05 * balcony + 0.1 * pump)
    rent = rent * np.exp(np.where(year < 1945, 0.28, 0.12) * rng.normal(size=rows))
    rent = np.where(rng.random(rows) < 0.5, 10 * np.round(rent / 10), np.round(rent))
    frame = pd.DataFrame(
        {
            "city": city, "rooms": rooms, "area": area, "year": year, "heating": heating,
            "balcony": balcony, "rent": rent.astype(int),
        }
    )  # fmt: skip
    frame.loc[rng.random(rows) < np.where(old, 0.3, 0.05), "year"] = np.nan
    frame.loc[rng.random(rows) < 0.08, "heating"] = np.nan
    return frame


def without_identifiers(frame: Frame) -> Frame:
    """Leave out texts that hardly repeat, such as names and dates, and the index of pandas."""
    names = [str(name) for name in frame if str(name).startswith("Unnamed: ")]
    texts = [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])]
    names += [name for name in texts if frame[name].nunique() > max(len(frame) / 20, 20)]
    if names:
        print(f"left out, as texts that hardly repeat or as an index: {', '.join(names)}")
    return frame.drop(columns=names)


def split(frame: Frame, most: int, seed: int) -> tuple[Frame, Frame]:
    """Rows to train on, and held-out rows whose categories and gaps occur among those."""
    frame = frame.sample(frac=1, random_state=seed, ignore_index=True)
    count = min(len(frame) // 5, most)
    held_out, rest = frame[:count], frame[count:]
    known = pd.Series(True, held_out.index)
    for name in frame:
        if is_bars(frame[name]):
            known &= held_out[name].isin(rest[name])
        elif rest[name].notna().all():
            known &= held_out[name].notna()
    return pd.concat([held_out[~known], rest]), held_out[known]


def is_bars(column: Column) -> bool:
    """Whether a column has few values, or none that are numbers."""
    return not is_number(column) or column.nunique() <= FEW


def is_number(column: Column) -> bool:
    """Whether a column holds numbers, not booleans."""
    types = pd.api.types
    return types.is_numeric_dtype(column) and not types.is_bool_dtype(column)
