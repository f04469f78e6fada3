"""What the precision of matrix products costs in accuracy, simulated on a CPU.

    python -m benchmarks.cases.precision      a minute; prints the table of docs/devices.md

At "default" precision an accelerator rounds the operands of a product to bfloat16. At "high" it
adds the products with what the rounding leaves: three in all. "highest" takes six, which is
float32. The field is a plain network, trained by matching on 8 Gaussians. Errors are against
"highest" at a tolerance of 1e-6.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from benchmarks.harness import show
from benchmarks.harness.problems import eight_gaussians, trainer

SIZES, BATCH, STEPS = (3, 64, 64, 64, 2), 512, 6000
PRODUCTS = {"highest": 6, "high": 3, "default": 1}
TOLERANCES = (1e-3, 1e-4, 1e-5)


def matmul(products: int, weight, x):
    full = lambda a, b: jnp.matmul(a, b, precision="highest")
    rounded = lambda a: jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
    if products == PRODUCTS["highest"]:
        return full(weight, x)
    w, y = rounded(weight), rounded(x)
    rest = full(rounded(weight - w), y) + full(w, rounded(x - y)) if products == 3 else 0.0
    return full(w, y) + rest


def field(products: int):
    def f(t, z, layers):
        x = jnp.append(z, t)
        for index, (weight, bias) in enumerate(layers):
            x = matmul(products, weight, x if index == 0 else jax.nn.softplus(x)) + bias
        return x

    return f


def trained(data) -> Any:
    """The weights after matching."""
    base = jaxode.standard_normal(2)
    flow = jaxode.cnf(field(PRODUCTS["highest"]), base)
    keys = jax.random.split(jax.random.key(0), len(SIZES))
    sizes = zip(SIZES[:-1], SIZES[1:], keys[1:], strict=True)
    params = [(jax.random.normal(k, (b, a)) / np.sqrt(a), jnp.zeros(b)) for a, b, k in sizes]

    def loss(params, key):
        row_key, key = jax.random.split(key)
        return flow.matching_loss(params, jax.random.choice(row_key, data, (BATCH,)), key=key)

    return trainer(loss, STEPS, 2e-3)(params, keys[0])


def solved(params, x, products: int, tolerance: float):
    """Log-densities, the gradient of the loss, accepted and rejected steps."""
    base = jaxode.standard_normal(2)
    flow = jaxode.cnf(field(products), base, rtol=tolerance, atol=tolerance)
    loss = lambda params: flow.nll_and_stats(params, x)
    (_, stats), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    log_prob = jax.jit(lambda params: flow.log_prob(params, x))(params)
    work = stats.stats
    return log_prob, jax.tree.leaves(gradient), int(work.num_accepted), int(work.num_rejected)


def main() -> None:
    rng = np.random.default_rng(0)
    data = jnp.asarray(eight_gaussians(rng, 50_000))
    params, x = trained(data), data[:BATCH]
    log_prob, gradient, *_ = solved(params, x, PRODUCTS["highest"], 1e-6)
    norm = lambda leaves: float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in leaves)))
    rows = []
    for tolerance in TOLERANCES:
        for name, products in PRODUCTS.items():
            found, got, accepted, rejected = solved(params, x, products, tolerance)
            wrong = norm([a - b for a, b in zip(got, gradient, strict=True)]) / norm(gradient)
            nats = float(jnp.sqrt(jnp.mean((found - log_prob) ** 2)))
            steps = f"{accepted} + {rejected}"
            rows.append([f"{tolerance:.0e}", name, f"{nats:.0e}", f"{wrong:.0e}", steps])
    header = ["tolerance", "precision", "error, nats", "error of the gradient", "steps + rejected"]
    print(show.markdown(header, rows))


if __name__ == "__main__":
    main()
