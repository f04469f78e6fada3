"""What a divergence costs, and how noisy it is: exact, estimated, and in closed form.

Value and gradient of one evaluation of `(f, div f)`, the terms of a training objective.

1. Over the dimension: time, temporary memory, and standard deviations over the probe. Where the
   exact trace costs more than eight probes is `jaxode.divergence.EXACT_UP_TO`.
2. Time at equal noise of the gradient, for independent and orthogonal probes and for the
   variance-reduced Hutch++ and XTrace of traceax, on networks trained on scikit-learn's digits.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jaxode
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench, alternate, at_error, attempt, compared, summary
from benchmarks.harness.problems import trainer
from benchmarks.peers.traces import hutch_plus_plus, xtrace
from jaxode import divergence, images
from jaxode.divergence import Divergence, FieldAt
from jaxode.nn import ConcatSquash, field

ESTIMATORS = {
    "exact()": divergence.exact(),
    "exact(chunk=16)": divergence.exact(16),
    "hutchinson()": divergence.hutchinson(),
    "hutchinson(probes=8)": divergence.hutchinson(8),
    "closed form": divergence.closed_form(),
}
QUANTITIES = {
    "median": "seconds", "bytes": "temporary memory, bytes",
    "gradient_std": "gradient: std over the probe / norm",
}  # fmt: skip
TARGET = 0.1  # standard deviation of the gradient over its norm


class Size(NamedTuple):
    dim: int
    noise: bool = False
    """Time at equal noise, not by dimension."""
    trained: bool = False
    width: int = 128
    batch: int = 128
    draws: int = 12
    """Of the probe."""
    steps: int = 300
    """Of the training."""


def by_noise() -> dict[str, dict[int, Divergence]]:
    """Estimators by the number of their products with the Jacobian."""
    of = lambda name: {k: divergence.hutchinson(k, name) for k in (1, 4, 8, 16, 32)}
    return {
        "independent probes": of("rademacher"),
        "orthogonal probes": of("orthogonal"),
        "Hutch++": {k: hutch_plus_plus(k) for k in (9, 18, 33)},
        "XTrace": {k: xtrace(k) for k in (8, 16, 32)},
    }


def evaluation(estimator: Divergence):
    """Value and gradient of the mean of `div f + |f|^2 / 2`."""

    def loss(m, z, key):
        probe = jax.vmap(estimator.init)(jax.random.split(key, len(z)), z)
        g = FieldAt(field, jnp.array(0.5), m)
        dz, div = jax.vmap(lambda z, probe: estimator.apply(g, z, probe))(z, probe)
        return jnp.mean(div + jnp.sum(dz**2, axis=1) / 2), div

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def noise(call, m, z, draws: int) -> tuple[float, float]:
    """Standard deviations over the probe: of a sample's divergence, and of the batch's gradient,
    relative to the gradient's norm."""
    values, gradients = [], []
    for key in jax.random.split(jax.random.key(2), draws):
        (_, div), gradient = call(m, z, key)
        values.append(np.asarray(div))
        leaves = jax.tree.leaves(gradient)
        gradients.append(np.concatenate([np.ravel(leaf) for leaf in leaves]))
    spread = np.sqrt(np.var(gradients, axis=0, ddof=1).sum())
    norm = np.linalg.norm(np.mean(gradients, axis=0))
    value_std = np.sqrt(np.var(values, axis=0, ddof=1).mean())
    return float(value_std), float(spread / norm)


def initial(size: Size):
    """A network with output weights of the size that training reaches, and its input."""
    m = ConcatSquash(size.dim, 2 * (size.width,), key=jax.random.key(0))
    m = eqx.tree_at(lambda m: m.weight, m, 10 * m.weight)
    return m, jax.random.normal(jax.random.key(1), (size.batch, size.dim))


def trained(size: Size):
    """A flow of the first principal components of the digits, and samples at half time."""
    from sklearn.datasets import load_digits

    pixels = jnp.asarray(np.asarray(load_digits(return_X_y=True)[0]), jnp.float32)
    y = images.logit(images.dequantize(jax.random.key(0), pixels, 17)[0])[0]
    values, vectors = jnp.linalg.eigh(jnp.cov(y.T))
    data = ((y - y.mean(0)) @ vectors / jnp.sqrt(values))[:, -size.dim :]
    flow = jaxode.cnf(field, jaxode.standard_normal(size.dim), rtol=1e-2, atol=1e-2)
    loss = lambda m, key: flow.nll(m, jax.random.choice(key, data, (256,)))
    start = ConcatSquash(size.dim, 2 * (size.width,), key=jax.random.key(1))
    m = trainer(loss, size.steps, 3e-3)(start, jax.random.key(2))
    return m, jaxode.flow(field, data[: size.batch], 1.0, 0.5, m)


def measure(bench: Bench, m, z, estimators, draws: int) -> Result:
    """Time, memory and noise of each estimator; calls alternate."""
    failed: dict[str, str] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    calls = {}
    for name, by_products in estimators.items():
        for products, estimator in by_products.items():

            def start(estimator=estimator):
                return evaluation(estimator).lower(m, z, jax.random.key(0)).compile()

            call = attempt(bench, failed, name, start)
            if call is None:
                break
            value, gradient = noise(call, m, z, draws)
            memory = call.memory_analysis().temp_size_in_bytes
            calls[name, products] = lambda call=call: call(m, z, jax.random.key(0))
            curves.setdefault(name, []).append(
                {"products": products, "bytes": memory, "value_std": value,
                 "gradient_std": gradient}
            )  # fmt: skip
    bench.announce("timing all")
    times = alternate(calls, bench.seconds)
    for name, rows in curves.items():
        for row in rows:
            row |= summary(times[name, row["products"]])
            if row["products"]:
                row["times"] = times[name, row["products"]]
    return {"failed": failed, "curves": curves}


def cell(row: dict[str, Any]) -> str:
    text = f"{show.ms(row['median'])} ms, {row['bytes'] / 1e6:.1f} MB"
    return text if row["gradient_std"] < 1e-6 else f"{text}, {row['gradient_std']:.0%}"


def noise_table(case: str, result: Result) -> str:
    rows = []
    for name, curve in result["curves"].items():
        at = result["at_target"][name]
        note = f" ({at['note']})" if at["note"] else ""
        shown = f"{show.ms(at['median'])}{note}" if "median" in at else "not reached"
        points = "; ".join(
            f"{r['products']}: {show.ms(r['median'])}, {r['gradient_std']:.1%}, "
            f"{r['value_std']:.2f}" for r in curve
        )  # fmt: skip
        rows.append([name, shown, points])
    at = f"ms at {TARGET:.0%} of noise"
    header = ["", at, "products: ms, noise of the gradient, of the value"]
    exact = f"The exact trace, `exact(chunk=16)`, takes {result['exact_ms']:.1f} ms."
    return f"**{case}**\n\n{show.markdown(header, rows)}\n\n{exact}"


class DivergenceCost(Benchmark):
    title = "Divergence: exact, estimated, in closed form"
    seconds = 5.0
    cases = {
        **{f"{dim} dimensions": Size(dim) for dim in (2, 4, 8, 16, 32, 64, 256, 1024)},
        "noise, 43 dimensions, trained": Size(43, noise=True, trained=True),
        "noise, 64 dimensions, trained": Size(64, noise=True, trained=True),
        "noise, 64 dimensions, initial": Size(64, noise=True),
    }

    def run(self, case: str, bench: Bench) -> Result:
        size: Size = self.cases[case]
        if not size.noise:
            # All at once, the tangents of 512 dimensions take more than a GB.
            chosen = ESTIMATORS if size.dim <= 256 else ESTIMATORS.keys() - {"exact()"}
            estimators = {name: {0: e} for name, e in ESTIMATORS.items() if name in chosen}
            return measure(bench, *initial(size), estimators, size.draws)
        bench.announce("training")
        m, z = (trained if size.trained else initial)(size)
        estimators = {"exact(chunk=16)": {0: divergence.exact(16)}, **by_noise()}
        result = measure(bench, m, z, estimators, size.draws)
        calls = result["curves"]
        exact = calls.pop("exact(chunk=16)")[0]
        places = {
            name: at_error(
                [r["gradient_std"] for r in rows], [r.pop("times") for r in rows], TARGET
            )
            for name, rows in calls.items()
        }
        groups = {name: [name] for name in places if name in ("Hutch++", "XTrace")}
        ours = "orthogonal probes"
        return {**result, "exact_ms": 1e3 * exact["median"], **compared(places, groups, ours)}

    def split(self, results: Results) -> tuple[dict[int, Result], Results]:
        """By dimension, and by noise."""
        noisy = {case: result for case, result in results.items() if self.cases[case].noise}
        return {self.cases[c].dim: r for c, r in results.items() if c not in noisy}, noisy

    def table(self, results: Results) -> str:
        by_size, noisy = self.split(results)
        cells = lambda curves: [cell(curves[n][0]) if n in curves else "" for n in ESTIMATORS]
        rows = [[str(size), *cells(result["curves"])] for size, result in by_size.items()]
        parts = [
            "Time, temporary memory, and standard deviation of the gradient over the probe "
            "relative to its norm.",
            show.markdown(["dimension", *ESTIMATORS], rows),
            *(noise_table(case, result) for case, result in noisy.items()),
        ]
        return "\n\n".join(parts) + "".join(show.failures(r) for r in results.values())

    def draw(self, results: Results) -> Figure:
        by_size, noisy = self.split(results)
        of_size = lambda name, quantity: [
            (dim, result["curves"][name][0][quantity])
            for dim, result in by_size.items()
            if name in result["curves"]
        ]
        of_noise = lambda curve: [(row["gradient_std"], 1e3 * row["median"]) for row in curve]
        panels = [
            show.Panel(
                "dimension", label,
                {
                    name: of_size(name, quantity)
                    for name in ESTIMATORS
                    if by_size and (quantity != "gradient_std" or name.startswith("hutchinson"))
                },
            )
            for quantity, label in QUANTITIES.items()
        ]  # fmt: skip
        panels += [
            show.Panel(
                QUANTITIES["gradient_std"], "ms",
                {name: of_noise(curve) for name, curve in result["curves"].items()}, case,
            )
            for case, result in noisy.items()
        ]  # fmt: skip
        figure = show.curves(panels, columns=3)
        line: dict[str, Any] = {"color": "gray", "linewidth": 0.8, "linestyle": "--"}
        figure.axes[0].axvline(divergence.EXACT_UP_TO, label="EXACT_UP_TO, the exact trace", **line)
        for axis, result in zip(figure.axes[len(QUANTITIES) :], noisy.values(), strict=False):
            axis.axhline(result["exact_ms"], **line)
            axis.invert_xaxis()
        return figure

    def brief(self, results: Results) -> str:
        return ""  # a page of the docs has it


BENCHMARK = DivergenceCost()
