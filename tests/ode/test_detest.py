"""The 25 problems of DETEST, against DOP853 of SciPy: Hull, Enright, Fellen and Sedgwick (1972).

"Comparing numerical methods for ordinary differential equations", SIAM Journal on Numerical
Analysis 9(4), pp. 603-637. A field is written once, for NumPy and for JAX.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import jaxode


def decay_chain(rates):
    """`n` species, each of which decays into the next one, at `n - 1` rates."""
    return np.diag([*-rates, 0.0]) + np.diag(rates, -1)


def diffusion(n):
    """The heat equation on a line."""
    return np.diag(-2.0 * np.ones(n)) + np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1)


def linear(matrix):
    def field(xp, t, y):
        return xp.asarray(matrix) @ y

    return field, np.eye(len(matrix))[0]


GRAVITY, SUN = 2.95912208286, 1.00000597682
MASSES = np.array([954786.104043, 285583.733151, 43727.3164546, 51775.9138449, 2.77777777778]) / 1e9
PLANETS = np.array([
    [3.42947415189, 6.64145542550, 11.2630437207, -30.1552268759, -21.1238353380],
    [3.35386959711, 5.97156957878, 14.6952576794, 1.65699966404, 28.4465098142],
    [1.35494901715, 2.18231499728, 6.27960525067, 1.43785752721, 15.3882659679],
])  # fmt: skip
SPEEDS = np.array([
    [-0.557160570446, -0.415570776342, -0.325325669158, -0.024047625417, -0.176860753121],
    [0.505696783289, 0.365682722812, 0.189706021964, -0.287659532608, -0.216393453025],
    [0.230578543901, 0.169143213293, 0.087726532278, -0.117219543175, -0.014864789309],
])  # fmt: skip


def five_bodies(xp, t, y):
    """Jupiter, Saturn, Uranus, Neptune and Pluto about the sun."""
    at, speed = y.reshape(2, 3, 5)
    from_sun = at / xp.sum(at**2, 0, keepdims=True) ** 1.5
    gap = at[:, None, :] - at[:, :, None]
    square = xp.sum(gap**2, 0, keepdims=True) + xp.eye(5)[None]  # no body pulls itself
    pull = (gap / square**1.5 - from_sun[:, None, :]) * MASSES[None, None]
    others = xp.sum(pull * (1 - xp.eye(5)[None]), -1)
    acceleration = GRAVITY * (others - (SUN + MASSES)[None] * from_sun)
    return xp.concatenate([speed.reshape(-1), acceleration.reshape(-1)])


def orbit(xp, t, y):
    cube = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return xp.stack([y[2], y[3], -y[0] / cube, -y[1] / cube])


def start_of_orbit(eccentricity):
    speed = np.sqrt((1 + eccentricity) / (1 - eccentricity))
    return np.array([1 - eccentricity, 0.0, 0.0, speed])


def torus(xp, t, y):
    r = xp.sqrt(y[0] ** 2 + y[1] ** 2)
    return xp.stack([-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r])


def bessel(xp, t, y):
    return xp.stack([y[1], -(y[1] / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * y[0])])


# name: (field, start)
PROBLEMS = {
    "A1": (lambda xp, t, y: -y, [1.0]),
    "A2": (lambda xp, t, y: -(y**3) / 2, [1.0]),
    "A3": (lambda xp, t, y: y * xp.cos(t), [1.0]),
    "A4": (lambda xp, t, y: y / 4 * (1 - y / 20), [1.0]),
    "A5": (lambda xp, t, y: (y - t) / (y + t), [4.0]),
    "B1": (
        lambda xp, t, y: xp.stack([2 * (y[0] - y[0] * y[1]), y[0] * y[1] - y[1]]),
        [1.0, 3.0],
    ),
    "B2": (linear(np.array([[-1.0, 1, 0], [1, -2, 1], [0, 1, -1]]))[0], [2.0, 0.0, 1.0]),
    "B3": (
        lambda xp, t, y: xp.stack([-y[0], y[0] - y[1] ** 2, y[1] ** 2]),
        [1.0, 0.0, 0.0],
    ),
    "B4": (torus, [3.0, 0.0, 0.0]),
    "B5": (
        lambda xp, t, y: xp.stack([y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]]),
        [0.0, 1.0, 1.0],
    ),
    "C1": linear(decay_chain(np.ones(9))),
    "C2": linear(decay_chain(np.arange(1.0, 10.0))),
    "C3": linear(diffusion(10)),
    "C4": linear(diffusion(51)),
    "C5": (five_bodies, np.concatenate([PLANETS.reshape(-1), SPEEDS.reshape(-1)])),
    **{
        f"D{i + 1}": (orbit, start_of_orbit(eccentricity))
        for i, eccentricity in enumerate([0.1, 0.3, 0.5, 0.7, 0.9])
    },
    "E1": (bessel, [0.6713967071418030, 0.09540051444747446]),
    "E2": (lambda xp, t, y: xp.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]]), [2.0, 0.0]),
    "E3": (
        lambda xp, t, y: xp.stack([y[1], y[0] ** 3 / 6 - y[0] + 2 * xp.sin(2.78535 * t)]),
        [0.0, 0.0],
    ),
    "E4": (lambda xp, t, y: xp.stack([y[1], 0.032 - 0.4 * y[1] ** 2]), [30.0, 0.0]),
    "E5": (
        lambda xp, t, y: xp.stack([y[1], xp.sqrt(1 + y[1] ** 2) / (25 - t)]),
        [0.0, 0.0],
    ),
}
SOLVERS = {
    "Tsit5": diffrax.Tsit5(), "Dopri5": diffrax.Dopri5(), "Dopri8": diffrax.Dopri8(),
    "Rodas5P": jaxode.Rodas5P(),
}  # fmt: skip


@pytest.mark.slow  # a program for each solver and field; `test_solve.py` has their orders
@pytest.mark.parametrize("name", PROBLEMS)
def test_detest(name):
    field, start = PROBLEMS[name]
    start, end = np.asarray(start), 20.0
    expected = scipy.integrate.solve_ivp(
        lambda t, y: field(np, t, y), (0, end), start, method="DOP853", rtol=1e-12, atol=1e-12
    ).y[:, -1]  # fmt: skip
    for label, solver in SOLVERS.items():
        solution = jax.jit(
            lambda y0, solver=solver: jaxode.solve(
                lambda t, y, args: field(jnp, t, y), y0, 0.0, end,
                solver=solver, rtol=1e-8, atol=1e-8, max_steps=60_000,
            )
        )(start)  # fmt: skip
        np.testing.assert_allclose(solution.y1, expected, rtol=4e-5, atol=4e-5, err_msg=label)
