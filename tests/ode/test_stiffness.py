"""A solve that runs out of steps says whether the problem looks stiff."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import with_slow
from problems import ARGS, STIFF, pendulum

import jaxode
from jaxode.ode.loop.tableau import tableau_of

# Of the van der Pol oscillators only the second is limited by stability this early.
PROBLEMS = {p.name: (p.f, p.y0, p.t1, p.args) for p in STIFF if not p.name.endswith("1e3")}
SMOOTH = {
    "pendulum": (pendulum, np.array([1.0, 0.5]), 1e3, ARGS),
    "decay": (lambda t, y, rate: -rate * y, np.ones(2), 1e3, 0.01),
    "a fast oscillator": (
        lambda t, y, a: jnp.stack([y[1], -a * y[0]]), np.array([1.0, 0.0]), 1e2, 1e6,
    ),
}  # fmt: skip


def message(problem, **options):
    f, y0, t1, args = problem
    with pytest.raises(jaxode.SolveError) as error:
        jaxode.solve(f, y0, 0.0, t1, args, **options)
    return str(error.value)


SLOW = ["hires", "oregonator", "van der pol, mu = 1e6", "pollution"]


@pytest.mark.parametrize("name", with_slow(PROBLEMS, SLOW))
def test_stiff_problems(name):
    assert "The problem looks stiff there: use solver=jaxode.Rodas5P()" in message(
        PROBLEMS[name], max_steps=500
    )


@pytest.mark.parametrize("name", SMOOTH)
def test_problems_that_are_not_stiff(name):
    told = message(SMOOTH[name], max_steps=300 if name != "decay" else 4)
    assert "the steps ran out" in told
    assert "looks stiff" not in told


def test_other_solvers_and_rows():
    f, y0, t1, args = PROBLEMS["robertson"]
    rows = np.stack([y0, np.zeros(3)])
    with pytest.raises(jaxode.SolveError, match=r"in 1 of 2 rows.* looks stiff"):
        jaxode.solve(f, rows, 0.0, t1, args, batch="per_sample", max_steps=300)
    assert "looks stiff" in message(PROBLEMS["robertson"], solver=diffrax.Dopri8(), max_steps=300)
    assert "looks stiff" not in message(PROBLEMS["robertson"], solver=diffrax.Bosh3(), max_steps=50)
    assert "looks stiff" not in message(PROBLEMS["robertson"], solver=jaxode.Rodas5P(), max_steps=5)


def test_jumps_and_events_leave_it_open():
    """The stiffness may begin or end with them, and the test solves without."""
    end = PROBLEMS["robertson"][2]
    jumps = jaxode.Jumps(jnp.array([1e-9]), lambda t, y, a, i: y)
    event = jaxode.Event(lambda t, y, a: 1.0 - t / end)
    assert "looks stiff" not in message(PROBLEMS["robertson"], jumps=jumps, max_steps=300)
    assert "looks stiff" not in message(PROBLEMS["robertson"], event=event, max_steps=300)


def test_a_gradient_says_so_too():
    f, y0, t1, args = PROBLEMS["robertson"]
    end = lambda args: jaxode.solve(f, y0, 0.0, t1, args, max_steps=300).y1.sum()
    with pytest.raises(jaxode.SolveError, match="the steps ran out"):
        jax.grad(end)(jnp.asarray(args))


def test_boundaries_of_stability():
    """Those in the literature: Hairer and Wanner (1996), section IV.2, for Dormand and Prince."""
    assert tableau_of(diffrax.Dopri5()).stability == pytest.approx(3.3, abs=0.02)
    assert tableau_of(diffrax.Heun()).stability is None
