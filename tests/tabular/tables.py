"""Small frames and their tables, untrained and trained."""

import functools
from typing import Any

import jax
import numpy as np
import pandas as pd
from untrained import small_networks, untrained

from jaxode import tabular

KEY, ROWS = jax.random.key(0), 300
RNG = np.random.default_rng(0)
GROUP = RNG.choice(["a", "b", "c"], ROWS, p=[0.5, 0.3, 0.2])
AGE = RNG.normal(40, 10, ROWS)
SIGNS = {f"s{i}": RNG.normal(size=ROWS) for i in range(4)}
COUNT = np.where(RNG.random(ROWS) < 0.4, 0, RNG.integers(1, 36, ROWS))
FRAMES = {
    # A category and a number that may be missing, and an integer with an atom.
    "mixed": pd.DataFrame(
        {
            "group": pd.Series(np.where(GROUP == "c", None, GROUP), dtype="str"),
            "count": COUNT,
            "age": np.where(RNG.random(ROWS) < 0.2, np.nan, AGE + 20 * (GROUP == "a")),
        }
    ),
    "atom": pd.DataFrame(
        {
            "count": COUNT.astype(float),
            "group": pd.Categorical(GROUP, ["c", "z", "b", "a"], ordered=True),
            "age": np.where(RNG.random(ROWS) < 0.2, np.nan, AGE),
        }
    ),
    "continuous": pd.DataFrame({"y": 3 * AGE + RNG.normal(size=ROWS), "group": GROUP, **SIGNS}),
    "few": pd.DataFrame({"n": RNG.integers(0, 5, ROWS), "group": GROUP}),
    "one integer": pd.DataFrame({"n": np.arange(ROWS) % 5, "group": GROUP}),
    "categories": pd.DataFrame({"group": GROUP, "old": np.where(GROUP == "a", 30, 45) < AGE}),
    "one": pd.DataFrame({"x": RNG.exponential(size=ROWS)}),
}
# Two networks share the programs of one, and have a mean.
OPTIONS = {
    "mixed": {"bounds": {"count": (0, 40)}},
    "atom": {"given": ["age", "group"]},
    "continuous": {"given": ["group", *SIGNS], "members": 2},
    "few": {"given": "group"},
    "one integer": {},
    "categories": {"steps": 120, "members": 2},
    "one": {"bounds": {"x": (0, None)}},
}


@functools.cache
def table(name: str) -> tabular.Table:
    """Not trained: what holds for any parameters."""
    return untrained(FRAMES[name], **OPTIONS[name])


@functools.cache
def training(name: str) -> tuple[tabular.Table, list[Any]]:
    """What `tabular.fit` returns, hardly trained."""
    options = {"key": KEY, "steps": 50, "members": 1, "progress": False} | OPTIONS[name]
    with small_networks():
        return tabular.fit(FRAMES[name], **options)


def trained(name: str) -> tabular.Table:
    return training(name)[0]
