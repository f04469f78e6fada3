"""Models of mixed tables for `mixed`, each set as its own documentation advises.

A contender is a function of the training rows, a seed and seconds. It returns a function that
trains and returns a `Model`, whose time is that of training, compilation included.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.harness.mixed_data import Frame, is_category

EPOCHS = 300  # of CTGAN and TVAE, their default
TREES = 30  # of ARF, its default
SHARES = (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)  # of the kernels, beside the frequencies
PRIOR = 0.5  # rows that each category has beside those in training
MISSING = "missing"


class Model(NamedTuple):
    sample: Callable[[int], Frame]
    log_prob: Callable[[Frame], Any] | None = None
    """`[rows]`: a probability of all that is discrete, integers too, and else a density."""


Train = Callable[[], Model]


def by_jaxode(train: Frame, seed: int, seconds: float) -> Train:
    """The defaults of `tabular.fit`, for so many seconds by the clock."""
    from jaxode import tabular

    def trained():
        fit_key, sample_key = jax.random.split(jax.random.key(seed))
        table, _ = tabular.fit(train, key=fit_key, seconds=seconds, progress=False)
        return Model(lambda n: table.sample(sample_key, n), table.log_prob)

    return trained


def by_columns(train: Frame, seed: int, seconds: float) -> Train:
    """Independent columns: frequencies, of numbers mixed with a kernel estimate."""

    def trained():
        log_probs = {name: frequencies(column) for name, column in train.items()}
        draw = np.random.default_rng(seed)

        def sample(n):
            rows = lambda column: column.iloc[draw.integers(0, len(column), n)].to_numpy()
            return train.iloc[:0].assign(**{name: rows(train[name]) for name in train})

        return Model(sample, lambda frame: sum(of(frame[name]) for name, of in log_probs.items()))

    return trained


def frequencies(column: Any) -> Callable[[Any], Any]:
    """The log-probability of values, by how often training rows have them."""
    counts = column.value_counts(dropna=False)
    smooth = (counts + PRIOR) / (len(column) + PRIOR * len(counts))
    if is_category(column):
        return lambda values: np.log(smooth.reindex(values).to_numpy(float))
    numbers = column.dropna().to_numpy(float)
    step, unit = steps(column)
    of_numbers = mixed(numbers, step)

    def log_prob(values):
        missing, found = values.isna().to_numpy(), np.zeros(len(values))
        if column.isna().any():
            share = (column.isna().sum() + PRIOR) / (len(column) + 2 * PRIOR)
            found = np.where(missing, np.log(share), np.log1p(-share))
        found[~missing] += of_numbers(values[~missing].to_numpy(float)) - np.log(unit)
        return found

    return log_prob


def steps(column: Any) -> tuple[float, float]:
    """How far numbers are apart, 0 if they are not rounded; and the unit of their density."""
    from jaxode.tabular.columns.modes_of_column import numeric

    values, missing = column.to_numpy(float), column.isna().to_numpy()
    if (values[~missing] == np.round(values[~missing])).all():
        return 1.0, 1.0
    step = numeric("", "continuous", values, missing, -np.inf, np.inf).resolution
    return step, step or 1.0


def mixed(numbers: Any, step: float) -> Callable[[Any], Any]:
    """The mixture of frequencies and kernels that is most likely with each row left out."""
    from scipy import stats

    n, width = len(numbers), max(1.06 * numbers.std() * len(numbers) ** -0.2, step / 2, 1e-9)
    levels, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)

    def kernel(at):
        if not step:
            return stats.norm.pdf(at, scale=width)
        return np.diff(stats.norm.cdf([at - step / 2, at + step / 2], scale=width), axis=0)[0]

    def kernels(x):
        return np.array([kernel(value - levels) @ counts for value in x]) / n

    of_levels, own = kernels(levels), kernel(np.zeros(1))
    smooth = (n * of_levels - own) / (n - 1)
    others = (counts - 1) / (n - 1)
    of_share = lambda share: np.log((1 - share) * others + share * smooth + 1e-300)[place].sum()
    share = max(SHARES, key=of_share) if step else 1.0

    def log_prob(x):
        at = np.minimum(np.searchsorted(levels, x), len(levels) - 1)
        often = np.where(levels[at] == x, counts[at] / n, 0.0)
        return np.log((1 - share) * often + share * kernels(x) + 1e-300)

    return log_prob


def by_copula(train: Frame, seed: int, seconds: float) -> Train:
    """A Gaussian copula of ranks, ties at random; categories from the most to the least common."""
    from scipy import special

    def trained():
        draw, n = np.random.default_rng(seed), len(train)
        places, scores = {}, []
        for name, column in train.items():
            rank = column.map(column.value_counts()).rank(method="dense", ascending=False)
            words = column.astype(object).where(column.notna(), MISSING).astype(str)
            keys = (words, rank) if is_category(column) else (column,)
            order = np.lexsort((draw.random(n), *keys))
            places[name] = column.to_numpy()[order]
            score = np.empty(n)
            score[order] = special.ndtri((np.arange(n) + 0.5) / n)
            scores.append(score)
        factor = np.linalg.cholesky(np.corrcoef(scores) + 1e-9 * np.eye(len(scores)))

        def sample(count):
            z = special.ndtr(draw.standard_normal((count, len(scores))) @ factor.T)
            rows = np.minimum((z * n).astype(int), n - 1).T
            values = {name: places[name][row] for name, row in zip(train, rows, strict=True)}
            return train.iloc[:0].assign(**values)

        return Model(sample)

    return trained


def filled(train: Frame) -> Frame:
    """Without missing values: a category of their own, or their mean and a column that tells so."""
    frame = train.copy()
    for name, column in train.items():
        if is_category(column):
            frame[name] = column.astype(object).where(column.notna(), MISSING).astype(str)
        elif column.isna().any():
            frame[name] = column.fillna(column.mean())
            frame[f"{name} is missing"] = np.where(column.isna(), "yes", "no")
    return frame


def restored(drawn: Frame, train: Frame) -> Frame:
    """With missing values, and numbers in the range and as round as those of the training rows."""
    frame = drawn.reset_index(drop=True).copy()
    for name, column in train.items():
        if is_category(column):
            frame[name] = frame[name].where(frame[name] != MISSING, None)
            continue
        step, _ = steps(column)
        numbers = frame[name].to_numpy(float)
        numbers = np.round(numbers / step) * step if step else numbers
        frame[name] = np.clip(numbers, column.min(), column.max())
        if column.isna().any():
            frame[name] = frame[name].where(frame[f"{name} is missing"] == "no")
    return frame[list(train)]


def by_ctgan(train: Frame, seed: int, seconds: float) -> Train:
    from ctgan import CTGAN

    return in_torch(CTGAN, train, seed)


def by_tvae(train: Frame, seed: int, seconds: float) -> Train:
    from ctgan import TVAE

    return in_torch(TVAE, train, seed)


def in_torch(kind: Any, train: Frame, seed: int) -> Train:
    """The defaults of the package `ctgan`. Columns of words are discrete."""

    def trained():
        model = kind(epochs=EPOCHS, enable_gpu=False)
        model.set_random_state(seed)
        frame = filled(train)
        model.fit(frame, [name for name in frame if is_category(frame[name])])
        return Model(lambda n: restored(model.sample(n), train))

    return trained


def by_arf(train: Frame, seed: int, seconds: float) -> Train:
    """Adversarial random forests by the defaults of `arfpy`, which has no likelihood."""
    from arfpy import arf

    def trained():
        np.random.seed(seed)  # noqa: NPY002, it draws from it
        if not hasattr(np, "in1d"):  # which it calls, and NumPy 2.4 has no more
            setattr(np, "in1d", np.isin)  # noqa: B010
        model = arf.arf(filled(train), num_trees=TREES, verbose=False, random_state=seed)
        model.forde()
        return Model(lambda n: restored(model.forge(n), train))

    return trained


CONTENDERS: dict[str, Callable[[Frame, int, float], Train]] = {
    "jaxode": by_jaxode,
    "independent columns": by_columns,
    "Gaussian copula": by_copula,
    "CTGAN": by_ctgan,
    "TVAE": by_tvae,
    "ARF": by_arf,
}
