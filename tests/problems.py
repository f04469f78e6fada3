"""Initial value problems with exact solutions, one without, and the solvers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffrax
import jax.numpy as jnp
import numpy as np
import scipy.linalg


@dataclass(frozen=True)
class Problem:
    name: str
    f: Callable[..., Any]
    args: Any
    y0: Any
    t0: float
    t1: float
    exact: Callable[[float], np.ndarray]

    def __str__(self):
        return self.name


PROBLEMS = [
    Problem(
        "decay",
        lambda t, y, rate: -rate * y,
        1.5,
        np.array([1.0, -2.0]),
        0.0,
        2.0,
        lambda t: np.array([1.0, -2.0]) * np.exp(-1.5 * t),
    ),
    Problem(
        "oscillator",
        lambda t, y, k: jnp.stack([y[1], -k * y[0]]),
        4.0,
        np.array([1.0, 0.0]),
        0.0,
        3.0,
        lambda t: np.array([np.cos(2 * t), -2 * np.sin(2 * t)]),
    ),
    Problem(
        "forced",
        lambda t, y, a: a * jnp.cos(t) * y,
        1.0,
        np.array([0.7]),
        0.5,
        4.0,
        lambda t: 0.7 * np.exp(np.array([np.sin(t) - np.sin(0.5)])),
    ),
    Problem(
        "logistic",
        lambda t, y, r: r * y * (1 - y),
        2.0,
        np.array([0.1]),
        0.0,
        3.0,
        lambda t: np.array([1 / (1 + 9 * np.exp(-2 * t))]),
    ),
    Problem(
        "coupled",
        lambda t, y, a: a * t * jnp.stack([y[0] * jnp.log(y[1]), -y[1] * jnp.log(y[0])]),
        2.0,
        np.array([1.0, np.e]),
        0.0,
        2.0,
        lambda t: np.exp(np.array([np.sin(t * t), np.cos(t * t)])),
    ),
]


def pendulum(t, y, args):
    """A damped, driven pendulum: nonlinear, and it depends on the time."""
    stiffness, damping = args
    return jnp.stack([y[1], -stiffness * jnp.sin(y[0]) - damping * y[1] + jnp.cos(t)])


ARGS = (jnp.array(2.0), jnp.array(0.3))
Y0 = jnp.array([1.0, 0.5])
TS = jnp.array([0.0, 0.2, 0.21, 1.0, 2.7, 3.0])


def scalar(y1, ys):
    """A loss that weighs every output differently."""
    return y1 @ jnp.array([1.0, -2.0]) + jnp.sum(
        jnp.sin(ys) * jnp.arange(1.0, ys.size + 1).reshape(ys.shape)
    )


def linear_gradients(A, v, w):
    """The gradients of `w . y(1)` with respect to `v` and `A`, where `y' = A y`, `y(0) = v`."""
    A, n = np.asarray(A), len(v)
    # Van Loan (1978): the block above the diagonal of this exponential is the integral over s of
    # expm(A^T (1 - s)) w (expm(A s) v)^T, which is the gradient with respect to A.
    block = np.block([[A.T, np.outer(w, v)], [np.zeros((n, n)), A.T]])
    return scipy.linalg.expm(A).T @ w, scipy.linalg.expm(block)[:n, n:]


# Every explicit Runge-Kutta solver of diffrax: (solver, order, adaptive). A new one is one row.
SOLVERS = [
    (diffrax.Euler(), 1, False),
    (diffrax.Heun(), 2, True),
    (diffrax.Midpoint(), 2, True),
    (diffrax.Ralston(), 2, True),
    (diffrax.Bosh3(), 3, True),
    (diffrax.Tsit5(), 5, True),
    (diffrax.Dopri5(), 5, True),
    (diffrax.Dopri8(), 8, True),
]
ADAPTIVE = [solver for solver, _, adaptive in SOLVERS if adaptive]


def solver_name(value) -> str:
    return type(value).__name__ if isinstance(value, diffrax.AbstractSolver) else str(value)
