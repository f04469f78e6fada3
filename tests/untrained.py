"""Tables without a training: categories as drawn, and numbers whose density is known."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import numpy as np
from scipy.special import expit, i0, ndtr, ndtri

from jaxode import tabular
from jaxode.nn import Residual
from jaxode.tabular import fit_table
from jaxode.tabular.categorical import CATEGORY_WIDTH, Categories
from jaxode.training import fit

KAPPA = 1.5  # of angles


@dataclasses.dataclass(frozen=True)
class Known:
    """As much of a `jaxode.Density` as a table asks for, in closed form and without programs.

    Numbers are normal and correlated: those with a bound after the logarithm of their distance to
    it, or a logit. Angles are of von Mises. Contexts move all means.
    """

    low: np.ndarray
    high: np.ndarray
    angle: np.ndarray
    mean: np.ndarray
    root: np.ndarray
    """Of Cholesky, of the covariance."""
    moves: np.ndarray
    """`[features, numbers]`."""

    @classmethod
    def of(cls, encoder: Any, rows: Any) -> "Known":
        """With the means and deviations of these rows, and drawn correlations and moves."""
        rng, domain, size = np.random.default_rng(0), encoder.domain, len(encoder.numbers)
        ends = np.array([encoder.columns[i].bounds_with_noise for i in encoder.numbers])
        blank = cls(*ends.T, domain.angle, np.zeros(size), np.eye(size), np.zeros((0, size)))
        v, _ = blank._unbounded(np.where(rows.fill, np.nan, rows.low + rows.width / 2))
        correlation = np.full((size, size), 0.4) + 0.6 * np.eye(size)
        correlation[domain.angle] = correlation[:, domain.angle] = 0.0
        correlation[np.diag_indices(size)] = 1.0
        # Narrower than what stands in for a gap: else a few of its draws have most of the weight.
        scale = 0.6 * np.nanstd(v, axis=0)
        context = encoder.context(rows.modes, rows.features)
        features = 0 if context is None else context.shape[1]
        moves = 0.4 * scale * rng.normal(size=(features, size))
        root = scale[:, None] * np.linalg.cholesky(correlation)
        return dataclasses.replace(blank, mean=np.nanmean(v, axis=0), root=root, moves=moves)

    def log_prob(self, x, *, context=None):
        v, slope = self._unbounded(x)
        away = v - self._means(context)
        of_angles = KAPPA * np.cos(away) - np.log(2 * np.pi * i0(KAPPA))
        e = np.where(self.angle, 0.0, away) @ np.linalg.inv(self.root).T
        of_numbers = slope - 0.5 * e**2 - np.log(np.sqrt(2 * np.pi) * np.diag(self.root))
        return np.where(self.angle, of_angles, of_numbers).sum(axis=-1)

    def sample(self, key, sample_shape, *, context=None):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        mean = np.broadcast_to(self._means(context), (*sample_shape, len(self.mean)))
        v = mean + rng.normal(size=mean.shape) @ self.root.T
        return np.where(self.angle, rng.vonmises(mean, KAPPA) % (2 * np.pi), self._bounded(v))

    def cdf(self, x, *, context=None):
        return ndtr((self._unbounded(x)[0] - self._means(context)) / self.root[0])[..., 0]

    def quantile(self, q, *, context=None, paired=False):
        return self._bounded(self._means(context) + self.root[0] * ndtri(np.asarray(q, float)))

    def _means(self, context):
        return self.mean if context is None else self.mean + np.asarray(context) @ self.moves

    def _unbounded(self, x):
        """Numbers without their bounds, and the logarithm of the slope."""
        x = np.clip(np.asarray(x, float), self.low, self.high)
        below, above = np.isfinite(self.low), np.isfinite(self.high)
        with np.errstate(divide="ignore"):
            from_low = np.log(np.where(below, x - np.where(below, self.low, 0.0), 1.0))
            to_high = np.log(np.where(above, np.where(above, self.high, 0.0) - x, 1.0))
        width = np.where(below & above, self.high - self.low, 1.0)
        v = np.where(below | above, from_low - to_high, x)
        return v, np.log(width) - from_low - to_high

    def _bounded(self, v):
        below, above = np.isfinite(self.low), np.isfinite(self.high)
        low, high = np.where(below, self.low, 0.0), np.where(above, self.high, 0.0)
        distance = np.exp(np.where(below, v, -v) * (below ^ above))
        one = np.where(below, low + distance, np.where(above, high - distance, v))
        return np.where(below & above, low + (high - low) * expit(v), one)


def _known_numbers(encoder, parts, *_):
    return Known.of(encoder, parts[0].rows), []


def _drawn_flow(density, datasets, *_):
    """In place of `fit_table.train`: a flow of one network, far from the identity."""
    density = fit._knowing_contexts(density, datasets[0].validation.context)
    network = density.params
    last = 10 * network.last.weight
    return density.with_params(eqx.tree_at(lambda m: m.last.weight, network, last)), []


def _small(size, width=None, **known):
    return Residual(size, 16, 1, **known)


def _drawn_categories(key, sizes, splits, budget):
    """A network in which every column depends on those before it and on the given ones."""
    rng, (modes, features) = np.random.default_rng(0), splits[0].rows
    total, features = sum(sizes), features.shape[1]
    shares = [np.bincount(modes[:, i], minlength=n) for i, n in enumerate(sizes)]

    def draw(n, m):
        return (rng.normal(size=(n, m)) / max(m, 1) ** 0.5).astype(np.float32)

    network = Categories(
        direct=total**0.5 * draw(total, total), inner=total**0.5 * draw(CATEGORY_WIDTH, total),
        middle=draw(CATEGORY_WIDTH, CATEGORY_WIDTH), outer=draw(total, CATEGORY_WIDTH),
        shared=draw(CATEGORY_WIDTH, features),
        bias=np.log((np.concatenate(shares) + 0.5) / len(modes)).astype(np.float32),
        offset=np.zeros(CATEGORY_WIDTH, np.float32), sizes=sizes,
    )  # fmt: skip
    return network, []


def small_networks() -> Any:
    """`tabular.fit` takes networks of the numbers that are compiled and solved in less time."""
    return mock.patch.object(fit_table, "Residual", _small)


@contextlib.contextmanager
def without_training(*, flow: bool = False) -> Iterator[None]:
    """`tabular.fit` does all but train. Its numbers have a known density, or a flow as drawn."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(small_networks())
        numbers = ("train", _drawn_flow) if flow else ("_train_numbers", _known_numbers)
        for name, stand_in in (numbers, ("trained_categories", _drawn_categories)):
            patches.enter_context(mock.patch.object(fit_table, name, stand_in))
        yield


def untrained(frame: Any, *, flow: bool = False, **options: Any) -> tabular.Table:
    """The table of a frame, `without_training`."""
    options = {"key": jax.random.key(0), "steps": 1, "members": 1, "progress": False} | options
    with without_training(flow=flow):
        return tabular.fit(frame, **options)[0]
