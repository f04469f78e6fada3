"""Stiff problems: alone, and a thousand of Robertson's at once with rates over three decades.

The problems, their ends and tolerances are those of `tests/problems.py`. Errors are of the end
states, and of the gradient by the logarithms of the rates, each relative to its exact value.
"""

import functools
import runpy
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate

import jaxode
from benchmarks.harness.benchmark import Contest, Result, WorkPrecision
from benchmarks.harness.fairness import Bench, Step, double_precision
from benchmarks.harness.machine import ROOT

OURS = {"jaxode": jaxode.Rodas5P(), "jaxode Rosenbrock23": jaxode.Rosenbrock23()}
THEIRS = {
    "diffrax Kvaerno3": diffrax.Kvaerno3(),
    "diffrax Kvaerno5": diffrax.Kvaerno5(),
    "diffrax KenCarp4": diffrax.KenCarp4(),
}
OF_SCIPY = ("Radau", "BDF", "LSODA")
ROWS, T1, MOST = 1000, 100.0, 4096  # of Robertson's problems; steps


@functools.cache
def problems() -> dict[str, Any]:
    tests = runpy.run_path(str(ROOT / "tests" / "problems.py"))
    return {problem.name: problem for problem in tests["STIFF"]}


def by_jaxode(f, y0, t1, args, rtol, atol, solver: Any, **options):
    return jaxode.solve(
        f, y0, 0.0, t1, args, solver=solver, rtol=rtol, atol=atol, max_steps=MOST, throw=False,
        **options,
    ).y1  # fmt: skip


def rows_by_jaxode(f, y0, t1, rates, rtol, atol, solver: Any):
    """Each row with its own rates and steps."""
    of_row = lambda t, y, args: f(t, y, args[1])
    options = {"batch": "per_sample", "row_args": rates}
    return by_jaxode(of_row, y0, t1, None, rtol, atol, solver, **options)


def by_diffrax(f, y0, t1, args, rtol, atol, solver: Any):
    terms: Any = diffrax.ODETerm(f)
    if isinstance(solver, diffrax.KenCarp4):  # whose explicit part has nothing to do
        terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, args: 0 * y), terms)
    ys = diffrax.diffeqsolve(
        terms, solver, 0.0, t1, None, y0, args, max_steps=MOST, throw=False,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
    ).ys  # fmt: skip
    assert ys is not None
    return ys[0]


def alone(problem, name: str, reference) -> Step:
    """The solve of one problem, as a step without a loss."""
    p, y0 = problem, jnp.asarray(problem.y0)
    relative = lambda y1: (None, [np.asarray(y1)[shown(p)] / reference])
    scale = p.atol / 1e-7  # of the absolute to the relative tolerance
    if name.startswith("scipy"):
        f = jax.jit(lambda t, y: p.f(t, y, p.args))
        jacobian = jax.jit(jax.jacfwd(lambda t, y: p.f(t, y, p.args), 1))

        def solve(tolerance):
            found = scipy.integrate.solve_ivp(
                lambda t, y: np.asarray(f(t, y)), (0.0, p.t1), p.y0, method=name.split()[1],
                jac=lambda t, y: np.asarray(jacobian(t, y)), rtol=tolerance, atol=scale * tolerance,
            )  # fmt: skip
            return relative(found.y[:, -1])

        return solve
    way, solver = (by_jaxode, OURS[name]) if name in OURS else (by_diffrax, THEIRS[name])
    run = jax.jit(lambda y0, args, rtol: way(p.f, y0, p.t1, args, rtol, scale * rtol, solver))
    return lambda tolerance: relative(run(y0, p.args, tolerance))


def shown(problem):
    return slice(None) if problem.shown is None else list(problem.shown)


def rates_of_rows(rows: int) -> np.ndarray:
    spread = np.random.default_rng(0).uniform(-1.5, 1.5, (rows, 3))
    return np.array([0.04, 3e7, 1e4]) * 10**spread


def exact_rows(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """End states, and their derivatives by the logarithm of each rate, from LSODA's solution of the
    problem with its sensitivities."""

    robertson = problems()["robertson"].f

    @jax.jit
    def f(t, state, k):
        y, s = state[:3], state[3:].reshape(3, 3)
        by_y, by_k = jax.jacfwd(robertson, (1, 2))(t, y, k)
        return jnp.concatenate([robertson(t, y, k), (by_y @ s + by_k * k).ravel()])

    start = np.array([1.0, *[0.0] * 11])
    states = np.stack([
        scipy.integrate.solve_ivp(
            lambda *args: np.asarray(f(*args)), (0.0, T1), start, method="LSODA", args=(k,),
            rtol=1e-11, atol=1e-15,
        ).y[:, -1]
        for k in rates
    ])  # fmt: skip
    return states[:, :3], states[:, 3:].reshape(-1, 3, 3)


def together(name: str, rates, ends, gradient: bool) -> Step:
    """The ends of all rows, or the gradient of their sum, each end relative to its value."""
    f, y0 = problems()["robertson"].f, jnp.array([1.0, 0.0, 0.0])

    def states(rates, tolerance):
        atol = 1e-3 * tolerance
        if name in OURS:
            rows = jnp.tile(y0, (len(rates), 1))
            return rows_by_jaxode(f, rows, T1, rates, tolerance, atol, OURS[name])
        one = lambda rates: by_diffrax(f, y0, T1, rates, tolerance, atol, THEIRS[name])
        return jax.vmap(one)(rates)

    def loss(logarithms, tolerance):
        return jnp.sum(states(rates * jnp.exp(logarithms), tolerance) / ends)

    if gradient:
        run = jax.jit(jax.value_and_grad(loss))
        return lambda tolerance: (None, [run(jnp.zeros_like(rates), tolerance)[1]])
    solve = jax.jit(lambda tolerance: states(rates, tolerance) / ends)
    return lambda tolerance: (None, [solve(tolerance)])


class Stiff(WorkPrecision):
    title = "Stiff problems"
    error_of = "relative error"
    number = ROWS
    cases = {
        "1,000 of Robertson's, solve": False,
        "1,000 of Robertson's, gradient": True,
        **{
            f"alone: {name}": name
            for name in (
                "robertson", "hires", "oregonator", "van der pol, mu = 1e3",
                "van der pol, mu = 1e6", "pollution", "diffusion of 100 cells",
            )
        },
    }  # fmt: skip
    target = 1e-4
    tolerances = tuple(10.0**-n for n in range(3, 10))
    groups = {
        "best of diffrax": list(THEIRS),
        "best of SciPy": [f"scipy {method}" for method in OF_SCIPY],
    }

    def contest(self, case: str) -> Contest:
        of = self.cases[case]
        if isinstance(of, str):
            problem = problems()[of]
            reference = np.asarray(problem.end)
            names = [*OURS, *THEIRS, *self.groups["best of SciPy"]]
            makers = {name: lambda n=name: alone(problem, n, reference) for name in names}
            exact = [np.ones_like(reference)]
        else:
            rates = rates_of_rows(self.number)
            ends, sensitivities = exact_rows(rates)
            makers = {
                name: lambda n=name: together(n, jnp.asarray(rates), jnp.asarray(ends), of)
                for name in [*OURS, *THEIRS]
            }
            exact = [np.sum(sensitivities / ends[:, :, None], axis=1) if of else ends / ends]
        return Contest(makers, lambda: exact, tolerances=self.tolerances)

    def run(self, case: str, bench: Bench) -> Result:
        with double_precision():
            return super().run(case, bench)


BENCHMARK = Stiff()
