"""Posteriors of sets and series, by a network that summarizes and by statistics made by hand.

    python -m benchmarks.cases.summaries      # two hours of one core

Three simulators, each with 10,000 simulations from its prior: the four points of sbibm's SLCP; 10
to 1,000 draws of a g-and-k distribution, by hand the statistics of their octiles by Drovandi and
Pettitt (2011); sbibm's Lotka-Volterra with 20 times in place of 10, by hand the nine statistics of
Wilkinson (2011), of logarithms: means, variances, correlations with one and two times before, and
of both. Each posterior is a `jaxode.nn.Residual` of its default size after 3,000 steps of 256.
"State" is that of `jaxode.series` after 1,000 steps, trained on the simulated series alone. Nats
are of 2,000 new simulations, lower is better: means of seeds and half of their range. Seconds are
those of simulations, training and nats; the first of a simulator include its compilation.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from benchmarks.harness import posterior_tasks, show

Array = Any
HELD_OUT, BATCH = 2000, 256
FEWEST, MOST = 10, 1000  # draws of a distribution
TIMES = 1.05 * np.arange(20)  # days


class Simulator(NamedTuple):
    simulate: Callable[..., tuple[Array, Array]]
    """`(key, n)` to parameters, and points `[n, points, size]`, NaN where there is none."""
    by_hand: Callable[[Array], Array]
    """Points to `[n, numbers]`."""
    bounds: Any
    ways: tuple[str, ...]
    width: int = 128
    """Of the network for sets."""


def points_of_slcp(key, n):
    theta, x = posterior_tasks.slcp(key, n)
    return theta, x.reshape(n, -1, 2)


def mean_and_covariance(points):
    mean = points.mean(1)
    scale = jnp.maximum(points.std(1), 1e-6)  # four equal numbers in float32 have none
    joint = jnp.prod(points - mean[:, None], axis=2).mean(1) / scale.prod(1)
    rho = jnp.arctanh(0.999 * joint)
    return jnp.concatenate([mean, jnp.log(scale), rho[:, None]], 1)


LARGEST = 10.0, 10.0, 10.0, 1.0  # parameters


def g_and_k(key, n):
    """Location, scale, skewness and tails of a distribution that has no density in closed form."""
    prior, count, noise = jax.random.split(key, 3)
    theta = jax.random.uniform(prior, (n, 4)) * jnp.asarray(LARGEST)
    a, b, g, k = jnp.moveaxis(theta[..., None], 1, 0)
    z = jax.random.normal(noise, (n, MOST))
    x = a + b * (1 + 0.8 * jnp.tanh(g * z / 2)) * (1 + z**2) ** k * z
    logs = jax.random.uniform(count, (n, 1), minval=math.log(FEWEST), maxval=math.log(MOST + 1))
    there = jnp.arange(MOST) < jnp.floor(jnp.exp(logs))
    return theta, jnp.where(there, x, jnp.nan)[..., None]


def octiles(points):
    e = jnp.nanquantile(points[..., 0], jnp.arange(1, 8) / 8, axis=1)
    scale = e[5] - e[1]
    skewness, tails = (e[5] + e[1] - 2 * e[3]) / scale, (e[6] - e[4] + e[2] - e[0]) / scale
    count = jnp.log(jnp.sum(~jnp.isnan(points[..., 0]), axis=1))
    return jnp.stack([e[3], jnp.log(scale), skewness, jnp.log(tails), count], 1)


def animals(key, n):
    """Points `(time, log prey, log predators)`."""
    prior, noise = jax.random.split(key)
    theta = posterior_tasks.log_normal_prior(prior, n, *posterior_tasks.LOTKA_VOLTERRA)
    logs = posterior_tasks.logs_of_populations(theta, TIMES)
    logs += 0.1 * jax.random.normal(noise, logs.shape)
    times = jnp.broadcast_to(jnp.asarray(TIMES, logs.dtype)[:, None], (n, len(TIMES), 1))
    return theta, jnp.concatenate([times, logs], 2)


def wilkinson(points):
    y = points[..., 1:]
    mean, variance = y.mean(1), y.var(1)
    y = (y - mean[:, None]) / jnp.sqrt(variance)[:, None]
    before = [jnp.mean(y[:, lag:] * y[:, :-lag], axis=1) for lag in (1, 2)]
    both = jnp.mean(y[..., 0] * y[..., 1], axis=1)
    return jnp.concatenate([mean, jnp.log(variance), *before, both[:, None]], 1)


WAYS = "by hand", "all numbers", "DeepSet", "state"
SIMULATORS = {
    "SLCP, four points": Simulator(
        points_of_slcp, mean_and_covariance, (-3.0, 3.0), ("by hand", "all numbers", "DeepSet")
    ),
    "g-and-k, 10 to 1,000 draws": Simulator(
        g_and_k, octiles, (jnp.zeros(4), jnp.array(LARGEST)), ("by hand", "DeepSet"), 32
    ),
    "Lotka-Volterra, 20 times": Simulator(animals, wilkinson, (0.0, math.inf), WAYS),
}


def numbers(points):
    return points.reshape(len(points), -1)


def states(points, steps, key):
    """Of a model of the series, just after the last time: a function of points."""
    read = lambda points: (np.asarray(points[..., 0]), np.asarray(points[..., 1:]))
    model, _ = jaxode.series.fit(*read(points), key=key, steps=steps, progress=False)
    return lambda points: model.state(*read(points), at=[TIMES[-1] + 1e-3])[:, 0]


def score(way: str, simulator: Simulator, simulations: int, steps: int, key) -> float:
    key, new_key, network_key, embed_key, fit_key = jax.random.split(key, 5)
    theta, x = simulator.simulate(key, simulations)
    new, new_x = simulator.simulate(new_key, HELD_OUT)
    features, dim = 16, theta.shape[1]
    if way == "DeepSet":
        embed = jaxode.nn.DeepSet(x.shape[2], features, simulator.width, key=embed_key)
    else:
        embed = None
        own = {"by hand": simulator.by_hand, "all numbers": numbers}
        take = own.get(way) or states(x, steps // 3, embed_key)
        x, new_x = np.asarray(take(x)), np.asarray(take(new_x))
        varies = np.ptp(x, axis=0) > 1e-6  # times and ages do not
        x, new_x, features = x[:, varies], new_x[:, varies], int(varies.sum())
    posterior = jaxode.bind(
        jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim)),
        jaxode.nn.Residual(dim, key=network_key, context_size=features),
        support=simulator.bounds, standardize=theta, standardize_context=x, embed=embed,
    )  # fmt: skip
    posterior, _ = jaxode.fit(
        posterior, theta, context=x, key=fit_key, steps=steps, batch_size=BATCH, progress=False
    )
    return float(-posterior.log_prob(new, context=new_x).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--match", default="", help="a part of the names of simulators")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=3000)
    given = parser.parse_args()
    rows = []
    for name, simulator in SIMULATORS.items():
        if given.match not in name:
            continue
        cells = []
        for way in WAYS:
            if way not in simulator.ways:
                cells.append("")
                continue
            begin = time.process_time()
            found = [
                score(way, simulator, given.simulations, given.steps, jax.random.key(seed))
                for seed in range(given.seeds)
            ]
            seconds = (time.process_time() - begin) / given.seeds
            cells.append(f"{np.mean(found):.2f} ± {np.ptp(found) / 2:.2f}, {seconds:.0f} s")
            print(name, way, found, f"{seconds:.0f} CPU s", flush=True)
        rows.append([name, *cells])
    print(show.markdown(["nats, CPU s", *WAYS], rows))


if __name__ == "__main__":
    main()
