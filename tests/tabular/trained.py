"""Small tables, hardly trained: what is tested holds for any parameters."""

import functools

import jax
import numpy as np
import pandas as pd

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
# One network takes a fifth of the time. The tables of several, as by default, are marked by None.
OPTIONS = {
    "mixed": {"bounds": {"count": (0, 40)}},
    "atom": {"given": ["age", "group"]},
    "continuous": {"given": ["group", *SIGNS], "members": None},
    "few": {"given": "group"},
    "one integer": {},
    "categories": {"steps": 300, "members": None},
    "one": {"bounds": {"x": (0, None)}},
}


@functools.cache
def table(name: str) -> tabular.Table:
    options = {"steps": 50, "members": 1, "progress": False} | OPTIONS[name]
    return tabular.fit(FRAMES[name], key=KEY, **options)[0]
