"""Initial value problems with exact solutions, one without, stiff ones, and the solvers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import diffrax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

import jaxode


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
        "decay", lambda t, y, rate: -rate * y, 1.5, np.array([1.0, -2.0]), 0.0, 2.0,
        lambda t: np.array([1.0, -2.0]) * np.exp(-1.5 * t),
    ),
    Problem(
        "oscillator", lambda t, y, k: jnp.stack([y[1], -k * y[0]]), 4.0, np.array([1.0, 0.0]),
        0.0, 3.0, lambda t: np.array([np.cos(2 * t), -2 * np.sin(2 * t)]),
    ),
    Problem(
        "forced", lambda t, y, a: a * jnp.cos(t) * y, 1.0, np.array([0.7]), 0.5, 4.0,
        lambda t: 0.7 * np.exp(np.array([np.sin(t) - np.sin(0.5)])),
    ),
    Problem(
        "logistic", lambda t, y, r: r * y * (1 - y), 2.0, np.array([0.1]), 0.0, 3.0,
        lambda t: np.array([1 / (1 + 9 * np.exp(-2 * t))]),
    ),
    Problem(
        "coupled",
        lambda t, y, a: a * t * jnp.stack([y[0] * jnp.log(y[1]), -y[1] * jnp.log(y[0])]),
        2.0, np.array([1.0, np.e]), 0.0, 2.0,
        lambda t: np.exp(np.array([np.sin(t * t), np.cos(t * t)])),
    ),
]  # fmt: skip


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


@dataclass(frozen=True)
class Stiff:
    """A stiff problem, solved from time zero."""

    name: str
    f: Callable[..., Any]
    args: Any
    y0: Any
    t1: float
    end: Any
    """The state at `t1`, by SciPy's Radau with rtol 1e-12, in agreement with published values."""
    atol: float = 1e-10
    """For rtol=1e-7."""
    shown: tuple[int, ...] | None = None
    """The components in `end`, by default all."""

    def __str__(self):
        return self.name

    def error(self, y1):
        """The largest relative error of the end state `[..., n]`."""
        y1 = np.asarray(y1, float)
        y1 = y1 if self.shown is None else y1[..., self.shown]
        return np.abs(y1 / np.asarray(self.end) - 1).max()


def robertson(t, y, rates):
    a, b, c = rates[0] * y[0], rates[1] * y[1] ** 2, rates[2] * y[1] * y[2]
    return jnp.stack([-a + c, a - b - c, b])


def hires(t, y, args):
    bound = 280 * y[5] * y[7]
    return jnp.stack([
        -1.71 * y[0] + 0.43 * y[1] + 8.32 * y[2] + 0.0007,
        1.71 * y[0] - 8.75 * y[1],
        -10.03 * y[2] + 0.43 * y[3] + 0.035 * y[4],
        8.32 * y[1] + 1.71 * y[2] - 1.12 * y[3],
        -1.745 * y[4] + 0.43 * y[5] + 0.43 * y[6],
        -bound + 0.69 * y[3] + 1.71 * y[4] - 0.43 * y[5] + 0.69 * y[6],
        bound - 1.81 * y[6],
        -bound + 1.81 * y[6],
    ])  # fmt: skip


def oregonator(t, y, args):
    s, q, w = args
    a = s * (y[1] + y[0] * (1 - q * y[0] - y[1]))
    return jnp.stack([a, (y[2] - (1 + y[0]) * y[1]) / s, w * (y[0] - y[2])])


def van_der_pol(t, y, mu):
    return jnp.stack([y[1], mu * ((1 - y[0] ** 2) * y[1] - y[0])])


# The rates of 25 reactions, the species that each one takes, and those that it makes.
POLLUTION = [
    (0.35, [0], [1, 2]), (26.6, [1, 3], [0]), (12300.0, [4, 1], [0, 5]), (8.6e-4, [6], [4, 4, 7]),
    (8.2e-4, [6], [7]), (15000.0, [6, 5], [4, 7]), (1.3e-4, [8], [4, 7, 9]),
    (24000.0, [8, 5], [10]), (16500.0, [10, 1], [0, 9, 11]), (9000.0, [10, 0], [12]),
    (0.022, [12], [0, 10]), (12000.0, [9, 1], [0, 13]), (1.88, [13], [4, 6]),
    (16300.0, [0, 5], [14]), (4.8e6, [2], [3]), (3.5e-4, [3], [15]), (0.0175, [3], [2]),
    (1e8, [15], [5, 5]), (4.44e11, [15], [2]), (1240.0, [16, 5], [4, 17]), (2.1, [18], [1]),
    (5.78, [18], [0, 2]), (0.0474, [0, 3], [18]), (1780.0, [18, 0], [19]), (3.12, [19], [0, 18]),
]  # fmt: skip
CHANGE = np.zeros((25, 20))
for number, (_, taken, made) in enumerate(POLLUTION):
    for species in taken:
        CHANGE[number, species] -= 1
    for species in made:
        CHANGE[number, species] += 1


def pollution(t, y, rates):
    """POLLU: 25 reactions of 20 species."""
    pairs = [y[taken[0]] * (y[taken[1]] if len(taken) > 1 else 1) for _, taken, _ in POLLUTION]
    return (rates * jnp.stack(pairs)) @ jnp.asarray(CHANGE, y.dtype)


def diffusion(t, u, rate):
    """A front that grows and spreads, on cells between walls where it is zero."""
    padded = jnp.pad(u, 1)
    spread = padded[2:] - 2 * u + padded[:-2]
    return rate * (len(u) + 1) ** 2 * spread + 10 * u**2 * (1 - u)


CELLS = np.sin(np.pi * np.arange(1, 101) / 101)
STIFF = [
    Stiff(
        "robertson", robertson, np.array([0.04, 3e7, 1e4]), np.array([1.0, 0.0, 0.0]), 40.0,
        [7.158270687194e-01, 9.185534764558e-06, 2.841637457458e-01],
    ),
    Stiff(
        "hires", hires, None, np.array([1.0, 0, 0, 0, 0, 0, 0, 0.0057]), 321.8122,
        [7.371312573325e-04, 1.442485726316e-04, 5.888729740967e-05, 1.175651343283e-03,
         2.386356198831e-03, 6.238968252741e-03, 2.849998395185e-03, 2.850001604815e-03],
    ),
    Stiff(
        "oregonator", oregonator, np.array([77.27, 8.375e-6, 0.161]), np.array([1.0, 2.0, 3.0]),
        360.0, [1.000814870319e00, 1.228178521550e03, 1.320554942847e02], 1e-7,
    ),
    Stiff(
        "van der pol, mu = 1e3", van_der_pol, 1e3, np.array([2.0, 0.0]), 2.0,
        [1.763234540203, -0.835688681678],
    ),
    Stiff(
        "van der pol, mu = 1e6", van_der_pol, 1e6, np.array([2.0, 0.0]), 2.0,
        [1.706167732170, -0.892809701025],
    ),
    Stiff(
        "pollution", pollution, np.array([rate for rate, _, _ in POLLUTION]),
        np.array([0, 0.2, 0, 0.04, 0, 0, 0.1, 0.3, 0.01, *[0] * 7, 0.007, 0, 0, 0]), 60.0,
        [5.646255480021e-02, 1.342484130422e-01, 4.139734331098e-09, 5.523140207482e-03,
         2.018977262303e-07, 1.464541863495e-07, 7.784249118999e-02, 3.245075353396e-01,
         7.494013383882e-03, 1.622293157302e-08, 1.135863833258e-08, 2.230505975719e-03,
         2.087162882799e-04, 1.396921016841e-05, 8.964884856899e-03, 4.352846369328e-18,
         6.899219696263e-03, 1.007803037365e-04, 1.772146513969e-06, 5.682943292311e-05],
    ),
    Stiff(
        "diffusion of 100 cells", diffusion, 0.1, CELLS, 1.0,
        [0.040210427092, 0.798990966793, 0.962159169566], shown=(0, 24, 49),
    ),
]  # fmt: skip


class RK4(diffrax.AbstractERK):
    """The classical method, which has no error estimate, as a user writes it."""

    tableau: ClassVar = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0, 0.5]), np.array([0, 0, 1.0])),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.zeros(4),
        c=np.array([0.5, 0.5, 1.0]),
    )
    interpolation_cls: ClassVar = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


# Every explicit Runge-Kutta solver of diffrax, and a user's: (solver, order, adaptive). A new one
# is one row.
SOLVERS = [
    (diffrax.Euler(), 1, False),
    (diffrax.Heun(), 2, True),
    (diffrax.Midpoint(), 2, True),
    (diffrax.Ralston(), 2, True),
    (diffrax.Bosh3(), 3, True),
    (RK4(), 4, False),
    (diffrax.Tsit5(), 5, True),
    (diffrax.Dopri5(), 5, True),
    (diffrax.Dopri8(), 8, True),
]
ADAPTIVE = [solver for solver, _, adaptive in SOLVERS if adaptive]


# jaxode's own solvers, for stiff problems.
ROSENBROCK = [(jaxode.Rodas5P(), 5, True), (jaxode.Rosenbrock23(), 2, True)]
ALL_SOLVERS = SOLVERS + ROSENBROCK
# Without Rosenbrock23, which does not extrapolate: its steps are less accurate than the tolerance.
ALL_ADAPTIVE = [*ADAPTIVE, jaxode.Rodas5P()]


def solver_name(value) -> str:
    return type(value).__name__ if hasattr(value, "order") else str(value)
