"""The ten tasks of sbibm: simulators, their priors and likelihoods, and reference posteriors.

Definitions are those of sbibm 1.1.0 (Lueckmann et al. 2021, arXiv:2101.04653), from which the
observations and samples of their posteriors are read. ODEs are solved for logarithms of the state.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxode

COUNTED, POPULATION = 1000, 1e6  # of an epidemic


def log_normal(x, mean, variance):
    """Of independent normal numbers, without the constant."""
    return -0.5 * jnp.sum((x - mean) ** 2 / variance + jnp.log(variance), axis=-1)


def two_moons(key, n):
    prior, angle, radius = jax.random.split(key, 3)
    theta = jax.random.uniform(prior, (n, 2), minval=-1.0, maxval=1.0)
    a = jax.random.uniform(angle, (n,), minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    r = 0.1 + 0.01 * jax.random.normal(radius, (n,))
    crescent = jnp.stack([r * jnp.cos(a) + 0.25, r * jnp.sin(a)], 1)
    return theta, crescent + moved_by(theta)


def moved_by(theta):
    moved = [-jnp.abs(theta[..., 0] + theta[..., 1]), theta[..., 1] - theta[..., 0]]
    return jnp.stack(moved, -1) / jnp.sqrt(2)


def log_two_moons(theta, x):
    u, v = jnp.moveaxis(x - moved_by(theta), -1, 0)
    r = jnp.hypot(u - 0.25, v)
    return jnp.where(u > 0.25, -0.5 * ((r - 0.1) / 0.01) ** 2 - jnp.log(r), -jnp.inf)


def gaussian_linear(key, n):
    prior, noise = jax.random.split(key)
    theta = jnp.sqrt(0.1) * jax.random.normal(prior, (n, 10))
    return theta, theta + jnp.sqrt(0.1) * jax.random.normal(noise, (n, 10))


def log_gaussian_linear(theta, x):
    tenth = jnp.full_like(x, 0.1)
    return log_normal(x, theta, tenth) + log_normal(theta, 0.0, tenth)


def gaussian_linear_uniform(key, n):
    prior, noise = jax.random.split(key)
    theta = jax.random.uniform(prior, (n, 10), minval=-1.0, maxval=1.0)
    return theta, theta + jnp.sqrt(0.1) * jax.random.normal(noise, (n, 10))


def log_gaussian_linear_uniform(theta, x):
    return log_normal(x, theta, jnp.full_like(x, 0.1))


def gaussian_mixture(key, n):
    prior, component, noise = jax.random.split(key, 3)
    theta = jax.random.uniform(prior, (n, 2), minval=-10.0, maxval=10.0)
    scale = jnp.where(jax.random.bernoulli(component, 0.5, (n, 1)), 1.0, 0.1)
    return theta, theta + scale * jax.random.normal(noise, (n, 2))


def log_gaussian_mixture(theta, x):
    components = [log_normal(x, theta, jnp.full_like(x, scale**2)) for scale in (1.0, 0.1)]
    return jnp.logaddexp(*components)


def slcp(key, n):
    """Four points of a Gaussian, whose mean and covariance the five parameters are."""
    prior, noise = jax.random.split(key)
    theta = jax.random.uniform(prior, (n, 5), minval=-3.0, maxval=3.0)
    first, second, rho = theta[:, 2:3] ** 2, theta[:, 3:4] ** 2, jnp.tanh(theta[:, 4:])
    a, b = jax.random.normal(noise, (2, n, 4))
    x = theta[:, :1] + first * a
    y = theta[:, 1:2] + second * (rho * a + jnp.sqrt(1 - rho**2) * b)
    return theta, jnp.stack([x, y], -1).reshape(n, 8)


def log_slcp(theta, x):
    first, second, rho = theta[..., 2] ** 2, theta[..., 3] ** 2, jnp.tanh(theta[..., 4])
    points = x.reshape(4, 2)
    a = (points[:, 0] - theta[..., :1]) / first[..., None]
    b = (points[:, 1] - theta[..., 1:2]) / second[..., None]
    rest = 1 - rho**2
    squares = a**2 - 2 * rho[..., None] * a * b + b**2
    return -0.5 * squares.sum(-1) / rest - 4 * jnp.log(first * second * jnp.sqrt(rest))


def slcp_distractors(key, n):
    """The four points among 92 numbers that know nothing of the parameters."""
    points_key, which_key, normal_key, tail_key = jax.random.split(key, 4)
    theta, points = slcp(points_key, n)
    means, roots, order = distractors()
    which = jax.random.randint(which_key, (n, 1), 0, len(means))
    # Student's t with two degrees of freedom, whose chi-squared is exponential.
    noise = jax.random.normal(normal_key, (n, 92))
    noise /= jnp.sqrt(jax.random.exponential(tail_key, (n, 1)))
    mixed = jnp.zeros_like(noise)
    for k, (mean, root) in enumerate(zip(means, roots, strict=True)):
        mixed = jnp.where(which == k, mean + noise @ root.T, mixed)
    return theta, jnp.concatenate([points, mixed], 1)[:, order]


def log_slcp_distractors(theta, x):
    return log_slcp(theta, x[np.argsort(distractors()[2])[:8]])


@functools.cache
def distractors():
    """Means and roots of the covariances of 20 components, and the order of the columns."""
    drawn = np.random.RandomState(42)  # as in sbibm
    means = np.array([15 * drawn.normal(size=92) for _ in range(20)], np.float32)
    roots = [
        3 * (np.tril(drawn.normal(size=(92, 92))) + np.diag(np.exp(drawn.normal(size=92))))
        for _ in range(20)
    ]
    return means, np.array(roots, np.float32), drawn.permutation(100)


def bernoulli_glm_raw(key, n):
    """Spikes of a neuron for a noise that it hears."""
    prior, spikes = jax.random.split(key)
    design, precision = of_glm()
    root = jnp.asarray(np.linalg.cholesky(np.linalg.inv(precision)), jnp.float32)
    design = jnp.asarray(design, jnp.float32)
    theta = jax.random.normal(prior, (n, 10)) @ root.T
    fired = jax.random.bernoulli(spikes, jax.nn.sigmoid(theta @ design.T))
    return theta, fired.astype(jnp.float32)


def bernoulli_glm(key, n):
    """The count of spikes, and sums of the noise before them."""
    theta, fired = bernoulli_glm_raw(key, n)
    return theta, fired @ jnp.asarray(of_glm()[0], jnp.float32)


def log_bernoulli_glm_raw(theta, x):
    return log_bernoulli_glm(theta, x @ jnp.asarray(of_glm()[0], jnp.float32))


def log_bernoulli_glm(theta, x):
    design, precision = (jnp.asarray(each, jnp.float32) for each in of_glm())
    prior = -0.5 * jnp.sum(theta @ precision * theta, axis=-1)
    return prior + theta @ x - jax.nn.softplus(theta @ design.T).sum(-1)


def of_glm():
    """What the neuron hears, with a constant, and the precision of the prior."""
    noise = np.random.RandomState(42).randn(100)  # as sbibm drew it
    design = np.ones((100, 10))
    for lag in range(9):
        design[:, 1 + lag] = np.concatenate([np.zeros(lag), noise[: 100 - lag]])
    differences = np.eye(9) - np.eye(9, k=-1)
    smooth = differences @ differences + np.diag(np.sqrt(np.arange(9) / 9))
    precision = np.zeros((10, 10))
    precision[0, 0], precision[1:, 1:] = 0.5, smooth.T @ smooth
    return design, precision


def log_normal_prior(key, n, location, scale):
    drawn = jax.random.normal(key, (n, len(location)))
    return jnp.exp(jnp.asarray(location) + jnp.asarray(scale) * drawn)


def log_log_normal_prior(theta, location, scale):
    logs, variance = jnp.log(theta), jnp.broadcast_to(jnp.square(jnp.asarray(scale)), theta.shape)
    return log_normal(logs, jnp.asarray(location), variance) - logs.sum(-1)


def logs_of_states(field, start, theta, times):
    """Of an ODE for logarithms, `[*batch, times, size]`, for parameters `[*batch, dim]`.

    Pass a `field` of a module: a function that each call defines is compiled in each.
    """
    rows = theta.reshape(-1, theta.shape[-1])
    y0 = jnp.broadcast_to(jnp.log(jnp.asarray(start)), (len(rows), len(start)))
    found = jaxode.solve(
        field, y0, 0.0, times[-1], ts=times,
        batch="per_sample", row_args=rows, rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    return jnp.moveaxis(found.ys, 0, -2).reshape(*theta.shape[:-1], len(times), len(start))


SIR = (math.log(0.4), math.log(0.125)), (0.5, 0.2)
EPIDEMIC = np.arange(10) * 17.0  # days


def epidemic(t, y, args):
    _, rates = args
    susceptible, infected = jnp.exp(y)
    return jnp.stack([-rates[0] * infected, rates[0] * susceptible - rates[1]])


def log_infected(theta):
    """The logarithm of the infected part of the population on ten days."""
    start = 1 - 1 / POPULATION, 1 / POPULATION
    return logs_of_states(epidemic, start, theta, EPIDEMIC)[..., 1]


def sir(key, n):
    """Infected people among a thousand."""
    prior, counts = jax.random.split(key)
    theta = log_normal_prior(prior, n, *SIR)
    infected = jnp.exp(log_infected(theta))
    return theta, jax.random.binomial(counts, float(COUNTED), infected)


def log_sir(theta, x):
    logs = log_infected(theta)
    likelihood = x * logs + (COUNTED - x) * jnp.log1p(-jnp.exp(logs))
    return likelihood.sum(-1) + log_log_normal_prior(theta, *SIR)


LOTKA_VOLTERRA = (-0.125, -3.0, -0.125, -3.0), (0.5, 0.5, 0.5, 0.5)
HUNT = np.arange(10) * 2.1  # days


def hunt(t, y, args):
    _, rates = args
    prey, predators = jnp.exp(y)
    return jnp.stack([rates[0] - rates[1] * predators, rates[3] * prey - rates[2]])


def logs_of_populations(theta, times):
    """Logarithms of prey and predators, `[*batch, times, 2]`."""
    logs = logs_of_states(hunt, (30.0, 1.0), theta, times)
    return jnp.clip(logs, math.log(1e-10), math.log(1e4))


def log_populations(theta):
    """Logarithms of the prey on ten days, then of the predators."""
    logs = jnp.swapaxes(logs_of_populations(theta, HUNT), -1, -2)
    return logs.reshape(*theta.shape[:-1], 20)


def lotka_volterra(key, n):
    prior, noise = jax.random.split(key)
    theta = log_normal_prior(prior, n, *LOTKA_VOLTERRA)
    return theta, jnp.exp(log_populations(theta) + 0.1 * jax.random.normal(noise, (n, 20)))


def log_lotka_volterra(theta, x):
    logs = log_populations(theta)
    likelihood = log_normal(jnp.log(x), logs, jnp.full_like(logs, 0.01))
    return likelihood + log_log_normal_prior(theta, *LOTKA_VOLTERRA)


class Task(NamedTuple):
    simulate: Callable[..., Any]
    log_joint: Callable[..., Any]
    """`log p(x | theta) + log p(theta)` inside of the bounds, up to a constant, of many `theta`."""
    bounds: tuple[float, float] | None = None
    """Of the prior, which is uniform if both are finite; None if it is all real numbers."""


ABOVE_ZERO = (0.0, math.inf)
TASKS = {
    "two moons": Task(two_moons, log_two_moons, (-1.0, 1.0)),
    "gaussian linear": Task(gaussian_linear, log_gaussian_linear),
    "gaussian linear uniform": Task(
        gaussian_linear_uniform, log_gaussian_linear_uniform, (-1.0, 1.0)
    ),
    "gaussian mixture": Task(gaussian_mixture, log_gaussian_mixture, (-10.0, 10.0)),
    "bernoulli glm": Task(bernoulli_glm, log_bernoulli_glm),
    "bernoulli glm raw": Task(bernoulli_glm_raw, log_bernoulli_glm_raw),
    "slcp": Task(slcp, log_slcp, (-3.0, 3.0)),
    "slcp distractors": Task(slcp_distractors, log_slcp_distractors, (-3.0, 3.0)),
    "sir": Task(sir, log_sir, ABOVE_ZERO),
    "lotka volterra": Task(lotka_volterra, log_lotka_volterra, ABOVE_ZERO),
}
OTHER_DATA = {
    "bernoulli glm raw": ("bernoulli_glm", "observation_raw.csv"),
    "slcp distractors": ("slcp", "observation_distractors.csv"),
}
"""Tasks that have the posteriors of others: the folder, and the file of the observation."""


def reference(task: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """An observation `[data]`, and samples of its posterior, as sbibm ships them."""
    spec = importlib.util.find_spec("sbibm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("sbibm is not installed: make posterior")
    name, observation = OTHER_DATA.get(task, (task.replace(" ", "_"), "observation.csv"))
    folder = Path(spec.origin).parent / f"tasks/{name}/files/num_observation_{number}"
    read = partial(np.loadtxt, delimiter=",", skiprows=1, ndmin=2, dtype=np.float32)
    return read(folder / observation)[0], read(folder / "reference_posterior_samples.csv.bz2")
