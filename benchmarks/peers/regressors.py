"""Regressors with uncertainty for `regression`, each set as its own documentation advises.

A contender is a function of the split and a seed. It imports its library and returns a function
that trains and returns a `Forecast`, whose time is that of training, compilation included.
"""

import functools
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from benchmarks.harness.regression_data import Rows, Split
from jaxode import tabular

Array = Any  # of NumPy
SECONDS = 60.0  # of `tabular.fit`
MEMBERS = 5  # of the mixture networks
STAGES, PATIENCE = 2000, 50  # of NGBoost, and of early stopping
LEAVES = (1, 2, 5, 10, 20, 50)  # the least rows in a leaf of a forest, to choose from
DRAWN = 200  # samples of a row from Treeffuser
# Mixtures: components, the least scale in those of `y`, looks, and settings to choose from.
COMPONENTS, LEAST, LOOKS = 8, 1e-3, 400
SETTINGS = tuple((width, decay) for width in (64, 256) for decay in (1e-4, 0.1))


class Forecast(NamedTuple):
    """The distribution of `y` of each row, in its units."""

    quantiles: Callable[[Array, Sequence[float]], Array]
    """Of rows `x` and levels: `[rows, levels]`."""
    log_density: Callable[[Array, Array], Array] | None = None
    """Of rows `x`, and one `y` for each."""
    cdf: Callable[[Array, Array], Array] | None = None
    of_levels: bool = False
    """Whether the density is already the mean of the cell around a level, where `y` has levels."""


Train = Callable[[], Forecast]


def by_table(split: Split, seed: int, calibrate: bool = False) -> Train:
    """The defaults of `tabular.fit` for a minute of this process. A `y` with few levels has
    probabilities, which are not calibrated."""
    x, y = (np.concatenate(both) for both in zip(split.validation, split.train, strict=True))
    inputs = [f"x{column}" for column in range(x.shape[1])]

    def frame(x: Array, y: Array | None = None) -> pd.DataFrame:
        rows = pd.DataFrame(np.asarray(x, float), columns=inputs)
        return rows if y is None else rows.assign(y=y)

    def train():
        clock = mock.patch("time.perf_counter", time.process_time)
        with clock, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "tabular.fit.frame=")  # of columns that depend
            table, _ = tabular.fit(
                frame(x, y), given=inputs, key=jax.random.key(seed), seconds=SECONDS,
                progress=False, calibrate=calibrate and split.step is None,
            )  # fmt: skip

        # Of a rounded `y`, the density of a table is the mean of the cell around each level.
        return Forecast(
            lambda x, q: table.quantile(list(q), frame(x)),
            lambda x, y: table.log_prob(frame(x, y)),
            of_levels=True,
        )

    return train


def by_ngboost(split: Split, seed: int) -> Train:
    """Normals by natural gradients, up to 2,000 stages as in its paper."""
    from ngboost import NGBRegressor
    from scipy import stats

    def train():
        model = NGBRegressor(n_estimators=STAGES, verbose=False, random_state=seed)
        aside = {"X_val": split.validation.x, "Y_val": split.validation.y}
        model.fit(*split.train, **aside, early_stopping_rounds=PATIENCE)

        def normal(x):
            fitted = model.pred_dist(x, max_iter=model.best_val_loss_itr)
            return fitted.loc, fitted.scale

        return Forecast(
            lambda x, q: stats.norm.ppf(np.asarray(q)[:, None], *normal(x)).T,
            lambda x, y: stats.norm.logpdf(y, *normal(x)),
            lambda x, y: stats.norm.cdf(y, *normal(x)),
        )

    return train


def by_forest(split: Split, seed: int) -> Train:
    """The least rows in a leaf are those with the least loss of the validation rows."""
    from quantile_forest import RandomForestQuantileRegressor

    levels = (np.arange(19) + 1) / 20

    def train():
        def fitted(leaf):
            forest = RandomForestQuantileRegressor(min_samples_leaf=leaf, random_state=seed)
            return forest.fit(*split.train)

        def loss(forest):
            (x, y) = split.validation
            return pinball(forest.predict(x, quantiles=list(levels)), y, levels).mean()

        best = min(map(fitted, LEAVES), key=loss)

        def quantiles(x, q):
            return np.asarray(best.predict(x, quantiles=list(q))).reshape(len(x), len(q))

        return Forecast(quantiles)

    return train


def pinball(quantiles: Array, y: Array, levels: Array) -> Array:
    """The loss of quantiles `[rows, levels]`; twice its mean over many levels is the CRPS."""
    over = y[:, None] - quantiles
    return np.maximum(levels * over, (levels - 1) * over)


def by_treeffuser(split: Split, seed: int) -> Train:
    """Its defaults; it sets rows aside itself. Quantiles are those of samples."""
    from treeffuser import Treeffuser

    def train():
        model = Treeffuser(seed=seed, n_jobs=1)
        x, y = (np.concatenate(parts) for parts in zip(split.train, split.validation, strict=True))
        model.fit(x, y)

        def quantiles(x, q):
            drawn = model.sample(x, n_samples=DRAWN, seed=seed, verbose=False)
            return np.quantile(np.reshape(drawn, (DRAWN, len(x))), q, axis=0).T

        return Forecast(quantiles)

    return train


def by_mixture_networks(split: Split, seed: int) -> Train:
    """Five networks of two layers for the weights, means and scales of normals, in JAX.

    The mean of their densities is a mixture again. Each has another fifth of all rows aside. The
    first one takes the best of the settings for all (Lakshminarayanan et al. 2017,
    arXiv:1612.01474).
    """
    rng = np.random.default_rng(seed)
    together = zip(split.validation, split.train, strict=True)
    rows = Rows(*(np.concatenate(both) for both in together))
    mean, scale = rows.y.mean(), rows.y.std()
    noise = 0.0 if split.step is None else split.step / scale
    folds = np.array_split(rng.permutation(len(rows.y)), MEMBERS)

    def member(aside, settings):
        own = np.setdiff1d(np.arange(len(rows.y)), aside)
        of = lambda part: standardized(Rows(rows.x[part], rows.y[part]), mean, scale)
        return best_of(of(own), of(aside), noise, rng, settings)

    def train():
        first, _, best = member(folds[0], SETTINGS)
        members = [first, *(member(aside, [best])[0] for aside in folds[1:])]

        @jax.jit
        def of_rows(x):
            log_weights, means, scales = zip(*(mixture(each, x) for each in members), strict=True)
            joined = lambda parts: jnp.concatenate(parts, axis=1)
            return joined(log_weights) - np.log(MEMBERS), joined(means), joined(scales)

        return of_mixture(of_rows, mean, scale)

    return train


def standardized(rows: Rows, mean: float, scale: float) -> tuple[Any, Any]:
    return jnp.asarray(rows.x), jnp.asarray((rows.y - mean) / scale, jnp.float32)


def best_of(train, validation, noise: float, rng, settings) -> tuple[Any, float, Any]:
    """The parameters that are best on the validation rows, their loss and their settings."""
    found = [(*trained(train, validation, noise, rng, *each), each) for each in settings]
    return min(found, key=lambda one: one[1])


def of_mixture(of_rows: Callable[[Array], Any], mean: float, scale: float) -> Forecast:
    """The distribution of `y` from its mixture in standardized units."""
    standard = lambda y: jnp.asarray((np.asarray(y) - mean) / scale, jnp.float32)

    def quantiles(x, q):
        q = jnp.broadcast_to(jnp.asarray(q, jnp.float32), (len(x), len(q)))
        return mean + scale * np.asarray(mixture_quantiles(*of_rows(x), q), float)

    def log_density(x, y):
        return np.asarray(mixture_log_density(*of_rows(x), y=standard(y))) - np.log(scale)

    def cdf(x, y):
        return np.asarray(mixture_cdf(*of_rows(x), y=standard(y)[:, None]), float)[:, 0]

    return Forecast(quantiles, log_density, cdf)


def mixture(params: Any, x: Any) -> tuple[Any, Any, Any]:
    """Logarithms of the weights, means and scales, each `[rows, components]`."""
    *hidden, (weight, bias) = params
    for w, b in hidden:
        x = jax.nn.silu(x @ w + b)
    logits, means, scales = jnp.split(x @ weight + bias, 3, axis=-1)
    return jax.nn.log_softmax(logits), means, jax.nn.softplus(scales) + LEAST


def mixture_log_density(log_weights, means, scales, y):
    return jax.nn.logsumexp(log_weights + jax.scipy.stats.norm.logpdf(y[:, None], means, scales), 1)


def mixture_cdf(log_weights, means, scales, y):
    """At `[rows, levels]`."""
    each = lambda part: part[:, None]
    of_parts = jax.scipy.stats.norm.cdf(y[..., None], each(means), each(scales))
    return jnp.sum(jnp.exp(each(log_weights)) * of_parts, axis=-1)


@jax.jit
def mixture_quantiles(log_weights, means, scales, q):
    """By bisection."""
    ends = jnp.min(means - 6 * scales, 1), jnp.max(means + 6 * scales, 1)
    low, high = (jnp.broadcast_to(end[:, None], q.shape) for end in ends)

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        below = mixture_cdf(log_weights, means, scales, middle) < q
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, 40, halve, (low, high))
    return 0.5 * (low + high)


def trained(train, validation, noise: float, rng, width: int, decay: float):
    """The best parameters on the validation rows, and their loss: AdamW at 1e-3, batches of 256,
    until 50 looks in a row, 50 steps apart, are no better, or after 400."""
    (x, y), columns = train, train[0].shape[1]
    sizes = [columns, width, width, 3 * COMPONENTS]
    params = [
        (jnp.asarray(rng.normal(0, 1 / np.sqrt(a), (a, b)), jnp.float32), jnp.zeros(b))
        for a, b in itertools.pairwise(sizes)
    ]
    weight, bias = params[-1]
    spread = np.concatenate([np.zeros(COMPONENTS), np.linspace(-1.5, 1.5, COMPONENTS)])
    bias = bias + jnp.asarray(np.concatenate([spread, np.zeros(COMPONENTS)]), jnp.float32)
    params[-1] = 0.1 * weight, bias
    optimizer = optax.adamw(1e-3, weight_decay=decay)

    def loss(params, x, y):
        return -jnp.mean(mixture_log_density(*mixture(params, x), y))

    @jax.jit
    def steps(params, state, key):
        def step(carry, key):
            params, state = carry
            row_key, noise_key = jax.random.split(key)
            rows = jax.random.randint(row_key, (256,), 0, len(x))
            noisy = y[rows] + noise * jax.random.uniform(noise_key, (256,), minval=-0.5, maxval=0.5)
            gradient = jax.grad(loss)(params, x[rows], noisy)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, state), jax.random.split(key, 50))
        return params, state

    aside_x, aside_y = validation
    aside_y = aside_y + noise * jnp.asarray(rng.uniform(-0.5, 0.5, aside_y.shape), jnp.float32)
    look = jax.jit(functools.partial(loss, x=aside_x, y=aside_y))
    state, key = optimizer.init(params), jax.random.key(int(rng.integers(2**31)))
    best, least, worse = params, np.inf, 0
    for _ in range(LOOKS):
        if worse == PATIENCE:
            break
        key, subkey = jax.random.split(key)
        params, state = steps(params, state, subkey)
        nats = float(look(params))
        best, least, worse = (params, nats, 0) if nats < least else (best, least, worse + 1)
    return best, least


CONTENDERS: dict[str, Callable[[Split, int], Train]] = {
    "jaxode": by_table,
    "jaxode, calibrated": functools.partial(by_table, calibrate=True),
    "NGBoost": by_ngboost,
    "five mixture networks": by_mixture_networks,
    "quantile forest": by_forest,
    "Treeffuser": by_treeffuser,
}
