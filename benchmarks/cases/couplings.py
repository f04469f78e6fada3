"""What a coupling costs: the assignment alone, and the step of matching that it is part of.

    python -m benchmarks.cases.couplings            about two minutes on two cores
    python -m benchmarks.cases.couplings --large    with groups of 2048 rows, minutes more

It prints the tables of benchmarks/NOTES.md. Data are 8 Gaussians in two dimensions and normal in
43, batches of 512 rows or one group; times take turns, as everywhere (`fairness.alternate`).
"""

import argparse
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

import jaxode
from benchmarks.harness import fairness, show
from benchmarks.harness.problems import eight_gaussians
from jaxode.coupling import assignment, independent, optimal_transport

BATCH, WIDTHS, SECONDS = 512, (64, 64, 64), 8.0


def samples(dim: int, rows: int):
    rng = np.random.default_rng(0)
    normal = lambda: rng.standard_normal((rows, dim)).astype(np.float32)
    return normal(), eight_gaussians(rng, rows) if dim == 2 else normal()


def on_the_host(cost):
    """SciPy's assignment of each group, from inside of a compiled program."""
    solve = lambda cost: np.stack([linear_sum_assignment(c)[1] for c in cost]).astype(np.int32)
    return jax.pure_callback(solve, jax.ShapeDtypeStruct(cost.shape[:2], jnp.int32), cost)


def by_optax(cost):
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return columns[jnp.argsort(rows)]


def assignments(dim: int, group: int) -> list[str]:
    z, x = (jnp.asarray(a).reshape(-1, group, dim) for a in samples(dim, max(BATCH, group)))
    cost = jnp.sum((x[:, :, None] - z[:, None]) ** 2, -1)
    host, programs = np.asarray(cost, np.float64), {
        "jaxode": jax.jit(jax.vmap(assignment)),
        "scipy": jax.jit(on_the_host),
        "optax": jax.jit(jax.vmap(by_optax)),
    }  # fmt: skip
    calls: dict[str, Any] = {name: partial(program, cost) for name, program in programs.items()}
    best = sum(c[linear_sum_assignment(c)].sum() for c in host)
    for name, call in calls.items():
        columns = np.asarray(call())[:, :, None]
        total = np.take_along_axis(host, columns, 2).sum()
        assert abs(total / best - 1) < 1e-5, (name, total, best)
    calls["scipy alone"] = lambda: [linear_sum_assignment(c) for c in host]
    times = fairness.alternate(calls, SECONDS, least=3)
    return [f"{dim}", f"{group}", *(f"{1e3 * np.median(times[name]):.2f}" for name in calls)]


def steps(dim: int) -> list[str]:
    """Training steps with Adam, relative to independent pairs, which are relative to regression."""
    x = jnp.asarray(samples(dim, BATCH)[1])
    m: Any = jaxode.nn.ConcatSquash(dim, WIDTHS, key=jax.random.key(0))
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim))
    optimizer = optax.adam(2e-3)

    def regression(m, x, key):
        z_key, t_key = jax.random.split(key)
        z0, u = jax.random.normal(z_key, x.shape), jax.random.uniform(t_key, x.shape[:1])
        z = (1 - u[:, None]) * z0 + u[:, None] * x
        return jnp.mean((jax.vmap(jaxode.nn.field, (0, 0, None))(u, z, m) - (x - z0)) ** 2)

    matching = lambda coupling: (
        lambda m, x, key: flow.matching_loss(m, x, key=key, coupling=coupling)
    )

    def call(loss):
        def step(m, state, x, key):
            value, gradient = jax.value_and_grad(loss)(m, x, key)
            updates, state = optimizer.update(gradient, state)
            return eqx.apply_updates(m, updates), state, value

        return partial(jax.jit(step), m, optimizer.init(m), x, jax.random.key(1))

    calls = {"regression": call(regression), "independent": call(matching(independent()))}
    calls |= {g: call(matching(optimal_transport(g))) for g in (16, 32, 64, 128)}
    for one in calls.values():
        jax.block_until_ready(one())
    times = fairness.alternate(calls, SECONDS)
    ratio = lambda a, b: f"{np.median(np.divide(times[a], times[b])):.2f}"
    first = [f"{1e3 * np.median(times['regression']):.2f}", ratio("independent", "regression")]
    return [f"{dim}", *first, *(ratio(g, "independent") for g in (16, 32, 64, 128))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", action="store_true")
    groups = [32, 64, 128, 512] + [2048] * parser.parse_args().large
    header = ["dimensions", "group", "compiled, ms", "SciPy by a callback", "Optax", "SciPy alone"]
    print(show.markdown(header, [assignments(d, g) for d in (2, 43) for g in groups]))
    header = ["dimensions", "regression, ms", "independent / regression"]
    header += [f"groups of {g} / independent" for g in (16, 32, 64, 128)]
    print(show.markdown(header, [steps(dim) for dim in (2, 43)]))


if __name__ == "__main__":
    main()
