"""What a coupling costs in the step of matching that it is part of.

    python -m benchmarks.cases.couplings      a minute on two cores

Data are 8 Gaussians in two dimensions and normal in 43, in batches of 512 rows; times take turns,
as everywhere (`fairness.alternate`). The assignment alone, beside those of SciPy and Optax, was
measured once: benchmarks/NOTES.md.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from benchmarks.harness import fairness, show
from benchmarks.harness.problems import eight_gaussians, stepper
from jaxode.coupling import independent, optimal_transport

BATCH, WIDTHS, SECONDS = 512, (64, 64, 64), 8.0


def samples(dim: int):
    rng = np.random.default_rng(0)
    return eight_gaussians(rng, BATCH) if dim == 2 else rng.standard_normal((BATCH, dim))


def steps(dim: int) -> list[str]:
    """Training steps with Adam, relative to independent pairs, which are relative to regression."""
    x = jnp.asarray(samples(dim), jnp.float32)
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
        return partial(
            jax.jit(stepper(loss, optimizer)), m, optimizer.init(m), x, jax.random.key(1)
        )

    calls = {"regression": call(regression), "independent": call(matching(independent()))}
    calls |= {g: call(matching(optimal_transport(g))) for g in (16, 32, 64, 128)}
    for one in calls.values():
        jax.block_until_ready(one())
    times = fairness.alternate(calls, SECONDS)
    ratio = lambda a, b: f"{np.median(np.divide(times[a], times[b])):.2f}"
    first = [f"{1e3 * np.median(times['regression']):.2f}", ratio("independent", "regression")]
    return [f"{dim}", *first, *(ratio(g, "independent") for g in (16, 32, 64, 128))]


def main() -> None:
    header = ["dimensions", "regression, ms", "independent / regression"]
    header += [f"groups of {g} / independent" for g in (16, 32, 64, 128)]
    print(show.markdown(header, [steps(dim) for dim in (2, 43)]))


if __name__ == "__main__":
    main()
