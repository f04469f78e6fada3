"""Density estimators for `tables`, each set as its own documentation advises.

A contender is a function of the table, a seed and the seconds of training, with three settings: the
documented one, and two others in size or rate. It imports its library and returns an iterator,
which trains: each `Candidate` is what training has come to, with its score on the validation rows.
What happens between two candidates is the time of training, so compilation and validation are in it
and imports are not. Scores are mean nats of a row, the less the better.
"""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from benchmarks.harness.table_data import Table
from benchmarks.peers.flows import exact_nll
from benchmarks.peers.trainers import torchcfm_matching
from jaxode.tabular.fit_table import MEMBER_WIDTH
from jaxode.training.dataset import MAX_VALIDATION_ROWS
from jaxode.training.schedule import VALIDATION_STEP_RATIO
from jaxode.training.validations import MAX_EXACT_DIMENSIONS

# Steps to the first candidate, and the ratio from each to the next. The density of a vector field
# is an ODE solve: there are fewer looks, at most so many seconds apart, and each is that of `fit`.
OF_FIELD, OF_MAP = (250, VALIDATION_STEP_RATIO), (20, 1.05)
SECONDS = 5.0


class Candidate(NamedTuple):
    validation: float
    test: Callable[[], float]


def looks(first: int, apart: float) -> Iterator[bool]:
    """Whether there is a candidate after each step."""
    due = first
    for step in itertools.count(1):
        yield step == due
        if step == due:
            due = max(step + first, math.ceil(apart * step))


def by_jaxode(
    table: Table, seed: int, seconds: float, period: float | None = None, members: int = 1,
    **size: Any,
) -> Iterator[Candidate]:  # fmt: skip
    """With a `period`, on a torus. Several members are as wide as those of `tabular.fit`."""
    start_key, key = jax.random.split(jax.random.key(seed))
    dim = table.train.shape[1]

    def train():
        make = lambda key: jaxode.nn.Residual(dim, key=key, period=period, **size)
        several = lambda: jaxode.nn.Ensemble(make, members, key=start_key)
        params = make(start_key) if members == 1 else several()
        base = jaxode.standard_normal(dim) if period is None else jaxode.torus(dim, period)
        # Matching takes no tolerance, and `log_prob` has the exact trace.
        flow = jaxode.cnf(jaxode.nn.field, base, rtol=1e-6, atol=1e-6)
        options: dict[str, Any] = {"validation": table.validation, "progress": False}
        # `fit` counts training alone, this benchmark all.
        spent = property(lambda stopwatch: stopwatch.since_call)
        with mock.patch("jaxode.training.budget.Stopwatch.spent", spent):
            density, looks = jaxode.fit(
                jaxode.bind(flow, params), table.train, key=key, seconds=seconds, **options
            )
        score = lambda: -float(jnp.mean(density.log_prob(table.test)))
        yield Candidate(min(look.nats for look in looks if math.isfinite(look.nats)), score)

    return train()


def by_torchcfm(table: Table, seed: int, seconds: float, **size: Any) -> Iterator[Candidate]:
    """The network and initial weights of jaxode; evaluated in JAX."""

    dim, rng = table.train.shape[1], np.random.default_rng(seed)
    params = jaxode.nn.Residual(dim, key=jax.random.key(seed), **size)
    step, current = torchcfm_matching(params, dim, 2e-3)

    def train():
        looked, key = (
            time.perf_counter(),
            jax.random.key(seed) if dim > MAX_EXACT_DIMENSIONS else None,
        )
        for look in looks(*OF_FIELD):
            step(
                table.train[rng.integers(0, len(table.train), (1, 512))],
                rng.integers(2**31, size=1),
            )
            if look or time.perf_counter() > looked + SECONDS:
                params = current()
                nll = float(exact_nll(params, table.validation[:MAX_VALIDATION_ROWS], 1e-3, key))
                looked = time.perf_counter()
                yield Candidate(nll, lambda params=params: float(exact_nll(params, table.test)))

    return train()


def by_zuko(name: str):
    """`zuko.flows.NSF` and others with their defaults, and the optimizer of its tutorials."""

    def contender(table: Table, seed: int, seconds: float, **size: Any) -> Iterator[Candidate]:
        import torch
        import torch._dynamo  # which the first optimizer imports
        import zuko

        train_rows, validation, test = (torch.tensor(part) for part in table)

        def score(flow, x) -> float:
            with torch.no_grad():
                return -flow().log_prob(x).mean().item()

        def later(flow, state):
            flow.load_state_dict(state)
            return score(flow, test)

        def train():
            torch.manual_seed(seed)
            flow = getattr(zuko.flows, name)(table.train.shape[1], **size)
            optimizer, look = torch.optim.Adam(flow.parameters(), lr=1e-3), looks(*OF_MAP)
            while True:
                for batch in torch.randperm(len(train_rows)).split(256):
                    loss = -flow().log_prob(train_rows[batch]).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    if next(look):
                        state = {k: leaf.clone() for k, leaf in flow.state_dict().items()}
                        nll = score(flow, validation)
                        yield Candidate(nll, lambda state=state: later(flow, state))

        return train()

    return contender


def by_flowjax(name: str):
    """The loop, batches and rate of `fit_to_data`, which cannot end after some seconds."""

    def contender(
        table: Table, seed: int, seconds: float, rate: float = 5e-4, **size: int
    ) -> Iterator[Candidate]:
        import flowjax.flows
        import paramax
        from flowjax.bijections import RationalQuadraticSpline
        from flowjax.distributions import Normal
        from flowjax.train.losses import MaximumLikelihoodLoss
        from flowjax.train.train_utils import get_batches, step

        def train():
            key, subkey = jax.random.split(jax.random.key(seed))
            spline = RationalQuadraticSpline(knots=8, interval=4)
            options = {"base_dist": Normal(jnp.zeros(table.train.shape[1])), "transformer": spline}
            options |= size
            flow = getattr(flowjax.flows, name)(subkey, **options)
            frozen = lambda leaf: isinstance(leaf, paramax.NonTrainable)
            params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=frozen)
            loss, optimizer, look = MaximumLikelihoodLoss(), optax.adam(rate), looks(*OF_MAP)
            score = lambda params, x: float(loss(params, static, jnp.asarray(x)))
            state, rows = optimizer.init(params), jnp.asarray(table.train)
            while True:
                key, subkey = jax.random.split(key)
                for x in get_batches([jax.random.permutation(subkey, rows)], 100)[0]:
                    options = {"optimizer": optimizer, "opt_state": state, "loss_fn": loss}
                    params, state, _ = step(params, static, x, **options)
                    if next(look):
                        nll = score(params, table.validation)
                        yield Candidate(nll, lambda params=params: score(params, table.test))

        return train()

    return contender


def until_worse(fitted: Iterator[Any], table: Table) -> Iterator[Candidate]:
    """Estimators of scikit-learn, until three in a row are no better on the validation rows."""
    best, worse = math.inf, 0
    for estimator in fitted:
        nll = -float(np.mean(estimator.score_samples(table.validation)))
        yield Candidate(nll, lambda e=estimator: -float(np.mean(e.score_samples(table.test))))
        best, worse = (nll, 0) if nll < best else (best, worse + 1)
        if worse == 3:
            return


def mixture(table: Table, seed: int, seconds: float) -> Iterator[Candidate]:
    """Gaussians with full covariances, more and more."""
    from sklearn.mixture import GaussianMixture

    counts = [round(2 ** (i / 2)) for i in range(20)]
    counts = [count for count in dict.fromkeys(counts) if 4 * count <= len(table.train)]
    make = lambda count: GaussianMixture(count, random_state=seed).fit(table.train)
    return until_worse(quiet(make, counts), table)


class VonMises:
    """A mixture of products of von Mises distributions, by expectation and maximization."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def fit(self, x: np.ndarray, iterations: int = 500, tolerance: float = 1e-6) -> "VonMises":
        from scipy.special import i0e, i1e
        from sklearn.cluster import KMeans

        z, options = np.exp(1j * np.asarray(x, float)), dict[str, Any](n_init=4)
        points = np.concatenate([np.cos(x), np.sin(x)], axis=1)
        part = KMeans(self.count, random_state=self.seed, **options).fit_predict(points)
        belongs, before = np.eye(self.count)[part], -math.inf
        for _ in range(iterations):
            weights = belongs.sum(axis=0) + 1e-10
            mean = belongs.T @ z / weights[:, None]
            length = np.clip(np.abs(mean), 1e-6, 1 - 1e-6)
            kappa = length * (2 - length**2) / (1 - length**2)
            for _ in range(5):  # Newton's method, on the ratio of Bessel functions
                ratio = i1e(kappa) / i0e(kappa)
                kappa = np.maximum(kappa - (ratio - length) / (1 - ratio**2 - ratio / kappa), 1e-6)
            self.weights, self.centres, self.kappa = weights / len(x), np.angle(mean), kappa
            parts = self.parts(x)
            log_prob = np.logaddexp.reduce(parts, axis=1)
            belongs, now = np.exp(parts - log_prob[:, None]), log_prob.mean()
            if now - before < tolerance:
                break
            before = now
        return self

    def parts(self, x: np.ndarray) -> np.ndarray:
        from scipy.special import i0e

        found = np.log(self.weights) + np.zeros((len(x), 1))
        for i in range(x.shape[1]):  # kappa (cos - 1), and so a Bessel function that is scaled
            near = np.cos(x[:, i, None] - self.centres[:, i]) - 1
            found += self.kappa[:, i] * near - np.log(2 * np.pi * i0e(self.kappa[:, i]))
        return found

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce(self.parts(np.asarray(x, float)), axis=1)


def von_mises(table: Table, seed: int, seconds: float) -> Iterator[Candidate]:
    """More and more parts, as of `mixture`."""
    counts = dict.fromkeys(round(2 ** (i / 2)) for i in range(20))
    return until_worse((VonMises(count, seed).fit(table.train) for count in counts), table)


def kernels(table: Table, seed: int, seconds: float) -> Iterator[Candidate]:
    from sklearn.neighbors import KernelDensity

    make = lambda bandwidth: KernelDensity(bandwidth=bandwidth).fit(table.train)
    return until_worse(map(make, np.geomspace(1, 0.01, 25)), table)


def gaussian(table: Table, seed: int, seconds: float) -> Iterator[Candidate]:
    from sklearn.mixture import GaussianMixture

    return until_worse((GaussianMixture().fit(part) for part in [table.train]), table)


def quiet(make: Callable[..., Any], values) -> Iterator[Any]:
    """EM that ends at its limit of iterations is judged by the validation rows, like any other."""
    from sklearn.exceptions import ConvergenceWarning

    for value in values:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = make(value)
        yield fitted


class Contender(NamedTuple):
    train: Callable[..., Iterator[Candidate]]
    settings: dict[str, dict[str, Any]] = {"": {}}
    """What differs from the documented one, the first, by name."""


WIDTHS = {"": {}, "width 64": {"width": 64}, "width 256": {"width": 256}}
OF_ZUKO = {
    "": {},
    "hidden 256-256": {"hidden_features": (256, 256)},
    "5 transforms, hidden 128-128": {"transforms": 5, "hidden_features": (128, 128)},
}
OF_FLOWJAX = {"": {}, "width 128": {"nn_width": 128}, "rate 2e-3": {"rate": 2e-3}}
CONTENDERS = {
    "jaxode": Contender(by_jaxode, WIDTHS),
    "jaxode, five networks": Contender(by_jaxode, {"": {"members": 5, "width": MEMBER_WIDTH}}),
    "torchcfm": Contender(by_torchcfm, WIDTHS),
    "zuko NSF": Contender(by_zuko("NSF"), OF_ZUKO),
    "zuko MAF": Contender(by_zuko("MAF"), OF_ZUKO),
    "flowjax coupling": Contender(by_flowjax("coupling_flow"), OF_FLOWJAX),
    "flowjax autoregressive": Contender(by_flowjax("masked_autoregressive_flow"), OF_FLOWJAX),
    "mixture of Gaussians": Contender(mixture),  # their sizes are chosen by the validation rows
    "kernel density": Contender(kernels),
    "Gaussian": Contender(gaussian),
}
AT_ONCE = (
    "jaxode",
    "jaxode, five networks",
)  # what they do depends on how long they have: one training for each time
