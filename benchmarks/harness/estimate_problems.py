"""Problems of `estimate`: equations, noisy observations, starts, and the referee of what is found.

A parameter vector has the logarithms of the rates, then the initial state where that is unknown.
Data and scores are by LSODA, which is not among the solvers of jaxode or diffrax.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.integrate
import scipy.optimize

STARTS = 20
SPREAD = 10.0  # how far a rate of a start may be from the truth, as a factor
REFEREE = 1e-8  # its relative tolerance
EXCESS = 1.02  # the cost at the truth, relative to the least
STEP = 1e-4  # of differences
MOST = 2_000_000  # evaluations of one solve of the referee, which are some seconds

Slope = Callable[[Any, Any], tuple[Any, ...]]
"""Of a state and rates, floats or arrays of JAX."""


class Problem(NamedTuple):
    slope: Slope
    rates: tuple[float, ...]
    y0: tuple[float, ...]
    ts: np.ndarray
    noise: float
    known: bool
    """If not, the initial state is estimated, too, and starts at the first observation."""
    atol: float = 1e-6
    stiff: bool = False
    logs: bool = False
    """Whether logarithms of the state are observed."""

    def rates_of(self, params: Any) -> Any:
        """Their logarithms."""
        return params[: len(self.rates)]

    def y0_of(self, params: Any) -> Any:
        return np.array(self.y0) if self.known else params[len(self.rates) :]

    @property
    def truth(self) -> np.ndarray:
        return np.concatenate([np.log(self.rates), [] if self.known else self.y0])


class Data(NamedTuple):
    problem: Problem
    ys: np.ndarray
    """`[times, states]`, as observed."""
    starts: np.ndarray
    """`[starts, parameters]`."""


def lotka_volterra(y, rates):
    (x, z), (a, b, c, d) = y, rates
    return x * (a - b * z), z * (d * x - c)


def fitzhugh_nagumo(y, rates):
    (v, r), (a, b, c) = y, rates
    return c * (v - v**3 / 3 + r), -(v - a + b * r) / c


def goodwin(y, rates):
    (x1, x2, x3), (a1, a2, k1, k2, decay) = y, rates
    made = a1 / (1 + a2 * abs(x3) ** 10)
    return made - decay * x1, k1 * x1 - decay * x2, k2 * x2 - decay * x3


def robertson(y, rates):
    (a, b, c), (k1, k2, k3) = y, rates
    r1, r2, r3 = k1 * a, k2 * b * b, k3 * b * c
    return r3 - r1, r1 - r2 - r3, r2


def times(end: float, count: int) -> np.ndarray:
    return np.linspace(0, end, count + 1)[1:]


# The second is that of Ramsay et al. (2007), doi:10.1111/j.1467-9868.2007.00610.x.
PROBLEMS = {
    "Lotka-Volterra, 20 periods": Problem(
        lotka_volterra, (1.0, 1.0, 1.0, 1.0), (2.5, 1.0), times(130, 300), 0.1, known=False
    ),
    "FitzHugh-Nagumo": Problem(
        fitzhugh_nagumo, (0.2, 0.2, 3.0), (-1.0, 1.0), times(20, 400), 0.5, known=False
    ),
    "Goodwin": Problem(
        goodwin, (1.0, 3.0, 2.0, 1.0, 0.5), (0.1, 0.1, 0.1), times(80, 120), 0.1, known=True
    ),
    "Robertson": Problem(
        robertson, (0.04, 3e7, 1e4), (1.0, 0.0, 0.0), np.logspace(-4, 5, 40), 0.05, known=True,
        atol=1e-10, stiff=True, logs=True,
    ),
}  # fmt: skip


def states(
    problem: Problem,
    params: np.ndarray,
    method: str,
    rtol: float,
    atol: float,
    watch: Callable[[], Any],
) -> np.ndarray:
    """`[times, states]` by SciPy, NaN if it fails. `watch` is called in each evaluation."""
    with np.errstate(all="ignore"):
        rates = np.exp(problem.rates_of(params)).tolist()
    nothing = np.full((len(problem.ts), len(problem.y0)), np.nan)

    def slope(t, y):
        watch()
        try:
            return problem.slope(y.tolist(), rates)
        except OverflowError:
            return nothing[0]

    with np.errstate(all="ignore"):
        found = scipy.integrate.solve_ivp(
            slope, (0.0, problem.ts[-1]), problem.y0_of(params), method, problem.ts,
            rtol=rtol, atol=atol,
        )  # fmt: skip
    return found.y.T if found.success else nothing


def observed(problem: Problem, ys: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.log(ys) if problem.logs else ys


def residuals(data: Data, params: np.ndarray, *solver: Any) -> np.ndarray:
    """By SciPy, relative to the noise; `solver` is of `states`."""
    problem = data.problem
    return ((observed(problem, states(problem, params, *solver)) - data.ys) / problem.noise).ravel()


def exact(problem: Problem) -> tuple[Any, ...]:
    """The solver of the referee, for `states`, which gives up after `MOST` evaluations."""
    count = 0

    def watch():
        nonlocal count
        count += 1
        if count > MOST:
            raise TimeoutError

    return "LSODA", REFEREE, 1e-4 * problem.atol, watch


def observe(problem: Problem, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    true = observed(problem, states(problem, problem.truth, *exact(problem)))
    ys = true + problem.noise * rng.standard_normal(true.shape)
    logs = np.log(SPREAD) * rng.uniform(-1, 1, (STARTS, len(problem.rates)))
    starts = np.log(problem.rates) + logs
    if not problem.known:
        starts = np.concatenate([starts, np.tile(ys[0], (STARTS, 1))], axis=1)
    return Data(problem, ys, starts)


def cost(data: Data, params: np.ndarray) -> float:
    """Half the sum of squares; infinite where the referee finds no solution."""
    if not np.isfinite(params).all():
        return np.inf
    try:
        found = residuals(data, params, *exact(data.problem))
    except TimeoutError:
        return np.inf
    with np.errstate(over="ignore"):
        half = 0.5 * float(found @ found)
    return half if np.isfinite(half) else np.inf


def jacobian(of: Callable[[np.ndarray], np.ndarray], params: np.ndarray) -> np.ndarray:
    """By differences far above the error of a solve; those of SciPy are as small as rounding."""
    here = of(params)
    return np.stack([(of(params + step) - here) / STEP for step in STEP * np.eye(len(params))], 1)


def least(data: Data) -> float:
    """The cost at the minimum next to the truth."""
    of = lambda params: residuals(data, params, *exact(data.problem))
    by_params: Any = functools.partial(jacobian, of)
    return float(scipy.optimize.least_squares(of, data.problem.truth, by_params).cost)
