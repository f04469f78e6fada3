"""What a divergence costs, and how noisy it is: exact, estimated, and in closed form.

    python benchmarks/divergence.py

1. One evaluation of `(f, div f)` and its gradient in the parameters, over the dimension: time,
   temporary memory, and standard deviations over the probe. It sets
   `jaxode.divergence.EXACT_UP_TO`.
2. Estimators at equal cost on the Jacobians of a flow trained on scikit-learn's digits: whether a
   variance-reduced one beats Hutchinson's. Needs traceax.

Prints two Markdown tables; writes benchmarks/results/divergence.json and
docs/images/divergence.png.
"""

import argparse
import functools
import json
import platform
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import matplotlib
import numpy as np
import optax
import traceax
from sklearn.datasets import load_digits

import jaxode
from jaxode import divergence, images
from jaxode.divergence import FieldAt
from jaxode.nn import ConcatSquash, field

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
DIMENSIONS = (2, 4, 8, 16, 32, 64, 256, 1024)
WIDTH, BATCH = 128, 128
ESTIMATORS = {
    "exact": divergence.exact(),
    "exact(chunk=16)": divergence.exact(16),
    "hutchinson()": divergence.hutchinson(),
    "hutchinson(probes=8)": divergence.hutchinson(8),
    "closed form": divergence.closed_form(),
}


def evaluation(estimator):
    """Value and gradient of the mean of `div f + |f|^2 / 2`, the terms of a training objective."""

    def loss(m, z, key):
        keys = jax.random.split(key, len(z))
        probe = jax.vmap(estimator.init)(keys, z)
        g = FieldAt(field, jnp.array(0.5), m)
        dz, div = jax.vmap(lambda z, probe: estimator.apply(g, z, probe))(z, probe)
        return jnp.mean(div + jnp.sum(dz**2, axis=1) / 2), div

    return jax.value_and_grad(loss, has_aux=True)


def noise(compiled, m, z, keys) -> tuple[float, float]:
    """Standard deviations over the probe: of a sample's divergence, and of the batch's gradient,
    relative to the gradient's norm."""
    values, gradients = [], []
    for key in keys:
        (_, div), gradient = compiled(m, z, key)
        values.append(np.asarray(div))
        leaves = jax.tree.leaves(gradient)
        gradients.append(np.concatenate([np.ravel(leaf) for leaf in leaves]))
    spread = np.sqrt(np.var(gradients, axis=0, ddof=1).sum())
    norm = np.linalg.norm(np.mean(gradients, axis=0))
    return float(np.std(values, axis=0, ddof=1).mean()), float(spread / norm)


def run(dimensions=DIMENSIONS, seconds: float = 0.25) -> list[dict]:
    """One row for each dimension and estimator; calls of the estimators alternate."""
    rows = []
    for size in dimensions:
        m = ConcatSquash(size, (WIDTH, WIDTH), key=jax.random.key(0))
        m = eqx.tree_at(lambda m: m.weight, m, 10 * m.weight)  # the size that training reaches
        z = jax.random.normal(jax.random.key(1), (BATCH, size))
        keys = jax.random.split(jax.random.key(2), 12)
        compiled, at_size = {}, []
        for name, estimator in ESTIMATORS.items():
            # All at once, the tangents of 512 dimensions take more than a GB.
            if name == "exact" and size > 256:
                continue
            compiled[name] = jax.jit(evaluation(estimator)).lower(m, z, keys[0]).compile()
            memory = compiled[name].memory_analysis().temp_size_in_bytes
            value, gradient = noise(compiled[name], m, z, keys)
            at_size.append({"dimension": size, "divergence": name, "bytes": memory,
                            "value_std": value, "gradient_std": gradient})  # fmt: skip
        times = {name: [] for name in compiled}
        start = time.perf_counter()
        while (
            time.perf_counter() - start < seconds * len(compiled)
            or len(times["exact(chunk=16)"]) < 5
        ):
            for name, call in compiled.items():
                begin = time.perf_counter()
                jax.block_until_ready(call(m, z, keys[0]))
                times[name].append(time.perf_counter() - begin)
        for row in at_size:
            row["ms"] = 1e3 * float(np.median(times[row["divergence"]]))
        rows += at_size
    return rows


def trained_jacobians(steps: int = 300, samples: int = 8) -> jax.Array:
    """Jacobians `[n, 64, 64]` along the trajectories of a flow trained on whitened digits."""
    pixels = jnp.asarray(load_digits(return_X_y=True)[0], jnp.float32)
    y = images.logit(images.dequantize(jax.random.key(0), pixels, 17)[0])[0]
    factor = jnp.linalg.cholesky(jnp.cov(y.T) + 1e-4 * jnp.eye(64))
    data = jax.scipy.linalg.solve_triangular(factor, (y - y.mean(0)).T, lower=True).T
    flow = jaxode.cnf(field, jaxode.standard_normal(64), rtol=1e-2, atol=1e-2)
    m, optimizer = ConcatSquash(64, (128, 128), key=jax.random.key(1)), optax.adam(3e-3)

    @jax.jit
    def step(m, state, key):
        loss = lambda m: flow.nll(m, jax.random.choice(key, data, (256,)))
        updates, state = optimizer.update(jax.grad(loss)(m), state)
        return optax.apply_updates(m, updates), state

    state = optimizer.init(m)
    for key in jax.random.split(jax.random.key(2), steps):
        m, state = step(m, state, key)
    ts = jnp.array([0.9, 0.5, 0.1])
    paths = jaxode.flow(field, data[:samples], 1.0, 0.0, m, ts=ts, return_solution=True).ys
    at = lambda t: jax.vmap(jax.jacfwd(lambda z: m(t, z)))
    return jnp.concatenate([at(t)(z) for t, z in zip(ts, paths, strict=True)])


def equal_cost(jacobians: jax.Array, products=(6, 12, 24), draws: int = 100) -> list[dict]:
    """Root mean square errors of trace estimates from equally many products with the Jacobian."""

    def by_probes(distribution):
        def estimate(key, A, count):
            estimator = divergence.hutchinson(count, distribution)
            z = jnp.zeros(len(A))
            return estimator.apply(lambda z: A @ z, z, estimator.init(key, z))[1]

        return estimate

    def by_traceax(estimator):
        return lambda key, A, count: estimator(key, lineax.MatrixLinearOperator(A), count)[0]

    estimators = {
        "hutchinson": by_probes("rademacher"),
        "hutchinson, gaussian": by_probes("gaussian"),
        "hutchinson, orthogonal": by_probes("orthogonal"),
        "Hutch++": by_traceax(traceax.HutchPlusPlusEstimator()),
        "XTrace": by_traceax(traceax.XTraceEstimator()),
    }
    rows, traces = [], jnp.trace(jacobians, axis1=1, axis2=2)
    keys = jax.random.split(jax.random.key(3), draws)
    for name, estimate in estimators.items():
        for count in products:
            one = functools.partial(estimate, count=count)
            every = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))
            error = float(jnp.sqrt(jnp.mean((every(keys, jacobians) - traces[:, None]) ** 2)))
            rows.append({"divergence": name, "products": count, "rms_error": error})
    return rows


def table(rows, key, columns, values) -> str:
    """A Markdown table with one row for each `key` and one column for each value of `columns`."""
    names = list(dict.fromkeys(row[columns] for row in rows))
    lines = [f"| {key} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for index in dict.fromkeys(row[key] for row in rows):
        cells = {row[columns]: values(row) for row in rows if row[key] == index}
        lines.append(f"| {index} | " + " | ".join(cells.get(name, "") for name in names) + " |")
    return "\n".join(lines)


def draw(rows, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    panels = {"ms": "milliseconds", "bytes": "temporary memory, bytes",
              "gradient_std": "gradient: std over the probe / norm"}  # fmt: skip
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for color, name in enumerate(ESTIMATORS):
            points = [(r["dimension"], r[key]) for r in rows if r["divergence"] == name]
            if key != "gradient_std" or name.startswith("hutchinson"):
                axis.plot(*zip(*points, strict=True), f"C{color}o-", ms=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel="dimension", title=title)
    axes[0].axvline(divergence.EXACT_UP_TO, color="gray", lw=0.8, ls="--", label="EXACT_UP_TO")
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def publish(rows: list[dict], compared: list[dict]) -> None:
    """Print the tables, and write the results and the picture."""
    cells = lambda r: (
        f"{r['ms']:.2f} ms, {r['bytes'] / 1e6:.1f} MB, {r['value_std']:.2f}, "
        f"{r['gradient_std']:.3f}"
    )
    print(table(rows, "dimension", "divergence", cells))
    print(table(compared, "products", "divergence", lambda r: f"{r['rms_error']:.3f}"))
    machine = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
    results = ROOT / "benchmarks" / "results" / "divergence.json"
    results.write_text(
        json.dumps({**machine, "cost": rows, "equal_cost": compared}, indent=1) + "\n"
    )
    draw(rows, ROOT / "docs" / "images" / "divergence.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.25, help="to time each program for")
    options = parser.parse_args(argv)
    publish(run(seconds=options.seconds), equal_cost(trained_jacobians()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
