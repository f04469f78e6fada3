"""SciPy's least squares on problems of PEtab, from the starts that jaxode gets.

Residuals are those of the field: distances in units of the noise, and the roots of its logarithms
above a floor, so that half their squares are the likelihood up to a constant. Series come from
LSODA at 1e-8, derivatives from SciPy's differences of 1e-4 of a parameter. The field and the
formulas of observables are functions compiled by JAX.
"""

import contextlib
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.integrate import odeint
from scipy.optimize import least_squares

import jaxode
from jaxode.petab.petab_problem import Problem

RTOL, ATOL, DIFFERENCE = 1e-8, 1e-10, 1e-4
LEAST_NOISE = 1e-6
FAILED = 1e5  # in place of residuals that are not finite
EVALUATIONS = 200  # for each parameter, beside those of derivatives; SciPy's default is 100
APART = 1e-8  # of a start from its bounds, in units of their distance
SECONDS_OF_START = 60.0


class LeastSquares:
    """The residuals of a problem as SciPy wants them."""

    def __init__(self, problem: Problem) -> None:
        channels, measurements = problem._channels, problem._measurements
        simple = problem._breaks is None and channels.kinds == {"normal"}
        if not simple or problem.prior(problem.nominal):
            raise ValueError("needs normal noise, no priors, and a field that does not switch.")
        ts = np.asarray(measurements.ts)
        self.ts, self.ys, self.end = ts, np.asarray(channels.ys), np.inf
        self.unravel = ravel_pytree(problem.nominal)[1]

        def start(flat):
            vector = problem._parameters.vector(self.unravel(flat))
            return problem._start(vector, jaxode.ForwardMode())[:2]

        def look(flat, states):
            params = self.unravel(flat)

            def at(t, y, row):
                return jnp.stack(channels._at(t, y, params, row))

            of_row = jax.vmap(at, (0, 0, None))
            return jax.vmap(of_row)(jnp.asarray(ts), states, channels.row_args)

        self.start, self.look = jax.jit(start), jax.jit(look)
        self.slope = jax.jit(lambda t, y, values: problem._slope(t, y, (None, values)))

    def __call__(self, flat: np.ndarray) -> np.ndarray:
        if time.process_time() > self.end:
            raise TimeoutError
        values, y0 = map(np.asarray, self.start(flat))
        pairs = zip(self.ts, values, y0, strict=True)
        states = np.stack([self.series(*pair) for pair in pairs])
        predicted, noise = np.moveaxis(np.asarray(self.look(flat, states)), 2, 0)
        seen = ~np.isnan(self.ys)
        apart = ((predicted - self.ys) / noise)[seen]
        logs = np.sqrt(2 * np.maximum(np.log(noise[seen] / LEAST_NOISE), 0.0))
        found = np.concatenate([apart, logs])
        return np.where(np.isfinite(found), found, FAILED)

    def series(self, ts: np.ndarray, values: np.ndarray, y0: np.ndarray) -> np.ndarray:
        """The states of a row at its times, NaN if the solve fails."""
        times, at = np.unique([0.0, *ts], return_inverse=True)
        if len(times) == 1:
            return np.tile(y0, (len(ts), 1))
        constants = jnp.asarray(values)
        slope = lambda t, y: np.asarray(self.slope(t, y, constants))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ys, told = odeint(
                slope, y0, times, rtol=RTOL, atol=ATOL, tfirst=True, mxstep=5000, full_output=True
            )
        failed = told["message"] != "Integration successful."
        return np.full((len(ts), len(y0)), np.nan) if failed else ys[at[1:]]


def by_scipy(problem: Problem, starts: Any) -> np.ndarray:
    """Minus the log-likelihoods at the ends, infinite for NaN."""
    residuals, found = LeastSquares(problem), []
    low, high = (np.asarray(ravel_pytree(bound)[0]) for bound in problem.bounds)
    least, most = low + APART * (high - low), high - APART * (high - low)
    for i in range(len(next(iter(starts.values())))):
        start = np.asarray(ravel_pytree({name: value[i] for name, value in starts.items()})[0])
        reached = start = np.clip(start, least, most)

        def keep(intermediate_result):
            nonlocal reached
            reached = intermediate_result.x

        residuals.end = time.process_time() + SECONDS_OF_START
        with contextlib.suppress(TimeoutError, np.linalg.LinAlgError):
            reached = least_squares(
                residuals, start, bounds=(low, high), diff_step=DIFFERENCE, callback=keep,
                max_nfev=EVALUATIONS * len(start),
            ).x  # fmt: skip
        found.append(float(problem.nll(residuals.unravel(jnp.asarray(reached)))))
    return np.where(np.isnan(found), np.inf, found)
