"""Fits of the parameters of an ODE for `estimate`, each set as its own documentation advises.

A contender is a function of the data that returns an `Ends`. Its seconds are those of this
process's work, compilation included.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import scipy.optimize

import jaxode
from benchmarks.harness.estimate_problems import Data, jacobian, residuals

RTOL = 1e-6
SECONDS_OF_START = 120.0  # of SciPy, for one start
EVALUATIONS = 200  # of SciPy, for each parameter, beside those of derivatives; its default is 100
SECONDS = 1200.0  # of each contender by diffrax, on one problem
STEPS, RATES = 2000, (1e-2, 3e-2, 1e-1)  # of Adam


class Ends(NamedTuple):
    params: np.ndarray
    """Where each start ended, NaN if it has no end."""
    seconds: float
    told: dict[str, Any] = {}
    """What else the results file should have."""


def slope_of(data: Data) -> Callable[[Any, Any, Any], Any]:
    problem = data.problem

    def slope(t, y, params):
        return jnp.stack(problem.slope(y, jnp.exp(problem.rates_of(params))))

    return slope


def by_jaxode(data: Data) -> Ends:
    """All starts at once."""
    problem, begun = data.problem, time.process_time()
    observe = (lambda t, y, params: jnp.log(y)) if problem.logs else None
    y0 = jnp.array(problem.y0) if problem.known else problem.y0_of
    found = jaxode.estimate(
        slope_of(data), y0, jnp.asarray(problem.ts), jnp.asarray(data.ys),
        jnp.asarray(data.starts), observe=observe, noise=problem.noise,
        solver=jaxode.Rodas5P() if problem.stiff else diffrax.Tsit5(), rtol=RTOL,
        atol=problem.atol,
    )  # fmt: skip
    ends = np.asarray(found.starts)
    return Ends(ends, time.process_time() - begun)


def by_scipy(data: Data, differences: str | None = "2-point") -> Ends:
    """One start after another. Derivatives are SciPy's differences, or those of `jacobian`."""
    begun = time.process_time()
    found = [from_start(data, start, differences) for start in data.starts]
    reasons = [reason for _, reason in found if reason]
    ends = np.stack([end for end, _ in found])
    return Ends(ends, time.process_time() - begun, {"reasons": reasons})


def from_start(data: Data, start: np.ndarray, differences: str | None) -> tuple[np.ndarray, str]:
    """The end, NaN if the fit fails, and the reason if it fails or stops at the time limit."""
    problem, end = data.problem, time.process_time() + SECONDS_OF_START
    reached = start

    def watch():
        if time.process_time() > end:
            raise TimeoutError("took too long")

    def keep(intermediate_result):
        nonlocal reached
        reached = intermediate_result.x

    solver = "LSODA" if problem.stiff else "RK45", RTOL, problem.atol, watch
    of = lambda params: residuals(data, params, *solver)
    by_params: Any = differences or partial(jacobian, of)
    most = EVALUATIONS * len(start)
    try:
        found = scipy.optimize.least_squares(of, start, by_params, max_nfev=most, callback=keep)
    except TimeoutError as error:
        return reached, str(error)
    except (ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
        return np.full_like(start, np.nan), f"{type(error).__name__}: {error}"[:100]
    return found.x, ""


def shooting(data: Data, adjoint: Any) -> Callable[[Any], Any]:
    """The residuals of one start by diffrax; not finite where a solve fails."""
    problem, slope = data.problem, slope_of(data)
    ts, ys = jnp.asarray(problem.ts), jnp.asarray(data.ys)
    solver = diffrax.Kvaerno5() if problem.stiff else diffrax.Tsit5()

    def of(params):
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(slope), solver, 0.0, ts[-1], None, jnp.asarray(problem.y0_of(params)),
            params, saveat=diffrax.SaveAt(ts=ts), throw=False, adjoint=adjoint,
            stepsize_controller=diffrax.PIDController(rtol=RTOL, atol=problem.atol),
        ).ys  # fmt: skip
        assert found is not None
        seen = jnp.log(found) if problem.logs else found
        return ((seen - ys) / problem.noise).ravel()

    return of


def by_adam(data: Data) -> Ends:
    """The best of three rates by the loss, all starts under `jax.vmap`; seconds are its own."""
    found = {rate: adam(data, rate, SECONDS / len(RATES)) for rate in RATES}
    best = min(RATES, key=lambda rate: np.log(np.minimum(found[rate].losses, 1e10)).mean())
    chosen = found[best]
    told = {
        "rate": best, "steps": chosen.steps, "failed_starts": int(np.isinf(chosen.losses).sum()),
        "seconds_of_rates": {f"{rate:g}": round(each.seconds, 1) for rate, each in found.items()},
    }  # fmt: skip
    return Ends(chosen.params, chosen.seconds, told)


class Descent(NamedTuple):
    params: np.ndarray
    losses: np.ndarray
    """Infinite for a start that failed on the way, which ends there."""
    steps: int
    seconds: float


def adam(data: Data, rate: float, limit: float) -> Descent:
    begun = time.process_time()
    of = shooting(data, diffrax.RecursiveCheckpointAdjoint())
    loss_and_gradient = jax.vmap(jax.value_and_grad(lambda params: jnp.mean(of(params) ** 2)))
    optimizer = optax.adam(rate)

    @jax.jit
    def step(params, state, going):
        # Those that have ended repeat another, so that no step waits for a solve that fails.
        at = jnp.where(going[:, None], params, params[jnp.argmax(going)])
        losses, gradients = loss_and_gradient(at)
        going &= jnp.isfinite(losses) & jnp.isfinite(gradients).all(axis=1)
        gradients = jnp.where(going[:, None], gradients, 0.0)
        updates, state = optimizer.update(gradients, state)
        moved: Any = optax.apply_updates(params, updates)
        params = jnp.where(going[:, None], moved, params)
        return params, state, going, jnp.where(going, losses, jnp.inf)

    params = jnp.asarray(data.starts)
    state, going = optimizer.init(params), jnp.ones(len(params), bool)
    losses, steps = jnp.zeros(len(params)), 0
    while steps < STEPS and going.any() and time.process_time() - begun < limit:
        params, state, going, losses = step(params, state, going)
        steps += 1
    ends, last = np.asarray(params), np.asarray(losses)
    return Descent(ends, last, steps, time.process_time() - begun)


def by_levenberg_marquardt(data: Data) -> Ends:
    """By Optimistix, one start after another, which takes half of the time of `jax.vmap`."""
    begun = time.process_time()
    of = shooting(data, diffrax.ForwardMode())
    solver = optimistix.LevenbergMarquardt(rtol=1e-8, atol=1e-8)

    @jax.jit
    def fit(start):
        found = optimistix.least_squares(lambda params, _: of(params), solver, start, throw=False)
        return found.value, found.stats["num_steps"]

    ends, steps = np.full_like(data.starts, np.nan), []
    for row, start in enumerate(data.starts):
        if time.process_time() - begun < SECONDS:
            ends[row], taken = fit(jnp.asarray(start))
            steps.append(int(taken))
    return Ends(ends, time.process_time() - begun, {"steps": steps})


CONTENDERS: dict[str, Callable[[Data], Ends]] = {
    "jaxode": by_jaxode,
    "SciPy": by_scipy,
    "SciPy, differences of 1e-4": partial(by_scipy, differences=None),
    "diffrax, Adam": by_adam,
    "diffrax, Levenberg-Marquardt": by_levenberg_marquardt,
}
