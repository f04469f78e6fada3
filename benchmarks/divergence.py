"""What a divergence costs, and how noisy it is: exact, estimated, and in closed form.

Value and gradient of one evaluation of `(f, div f)`, the terms of a training objective.

1. Over the dimension: time, temporary memory, and standard deviations over the probe. Where the
   exact trace costs more than eight probes is `jaxode.divergence.EXACT_UP_TO`.
2. Time at equal noise of the gradient, for independent and orthogonal probes and for the
   variance-reduced Hutch++ and XTrace of traceax, on networks trained on scikit-learn's digits.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxode
from benchmarks import report
from benchmarks.fairness import (
    Bench,
    alternate,
    at_error,
    attempt,
    ratios_at_error,
    summary,
)
from jaxode import divergence, images
from jaxode.divergence import Divergence, FieldAt
from jaxode.nn import ConcatSquash, field

TITLE = "Divergence: exact, estimated, in closed form"
SECONDS = 5.0
DIMENSIONS = (2, 4, 8, 16, 32, 64, 256, 1024)
TRAINED = {"noise, 43 dimensions, trained": 43, "noise, 64 dimensions, trained": 64}
CASES: dict[str, Any] = {
    **{f"{size} dimensions": size for size in DIMENSIONS},
    **TRAINED,
    "noise, 64 dimensions, initial": 64,
}
WIDTH, BATCH, DRAWS = 128, 128, 12
STEPS = 300  # of the training
ESTIMATORS = {
    "exact()": divergence.exact(),
    "exact(chunk=16)": divergence.exact(16),
    "hutchinson()": divergence.hutchinson(),
    "hutchinson(probes=8)": divergence.hutchinson(8),
    "closed form": divergence.closed_form(),
}
TARGET = 0.1  # standard deviation of the gradient over its norm


def xtrace(products: int) -> Divergence:
    """XTrace, with a key for its noise. Epperly et al. (2024), arXiv:2301.07825."""

    def apply(g, z, key):
        import lineax
        import traceax

        dz, jvp = jax.linearize(g, z)
        like = jax.ShapeDtypeStruct(z.shape, z.dtype)
        operator = lineax.FunctionLinearOperator(jvp, like)
        return dz, traceax.XTraceEstimator()(key, operator, products)[0]

    return Divergence(lambda key, z: key, apply)


def hutch_plus_plus(products: int) -> Divergence:
    """The trace on the range of a few products, and an estimate of the rest.

    Meyer et al. (2021), arXiv:2010.09649.
    """
    third = products // 3

    def apply(g, z, probe):
        dz, jvp = jax.linearize(g, z)
        times = jax.vmap(jvp, 1, 1)
        q = jnp.linalg.qr(times(probe[:, :third]))[0]
        rest = probe[:, third:] - q @ (q.T @ probe[:, third:])
        both = jnp.concatenate([q, rest / np.sqrt(third)], axis=1)
        return dz, jnp.sum(both * times(both))

    draw = lambda key, z: jax.random.rademacher(key, (z.size, 2 * third), z.dtype)
    return Divergence(draw, apply)


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


def noise(call, m, z) -> tuple[float, float]:
    """Standard deviations over the probe: of a sample's divergence, and of the batch's gradient,
    relative to the gradient's norm."""
    values, gradients = [], []
    for key in jax.random.split(jax.random.key(2), DRAWS):
        (_, div), gradient = call(m, z, key)
        values.append(np.asarray(div))
        leaves = jax.tree.leaves(gradient)
        gradients.append(np.concatenate([np.ravel(leaf) for leaf in leaves]))
    spread = np.sqrt(np.var(gradients, axis=0, ddof=1).sum())
    norm = np.linalg.norm(np.mean(gradients, axis=0))
    value_std = np.sqrt(np.var(values, axis=0, ddof=1).mean())
    return float(value_std), float(spread / norm)


def initial(size: int):
    """A network with output weights of the size that training reaches, and its input."""
    m = ConcatSquash(size, (WIDTH, WIDTH), key=jax.random.key(0))
    m = eqx.tree_at(lambda m: m.weight, m, 10 * m.weight)
    return m, jax.random.normal(jax.random.key(1), (BATCH, size))


def trained(size: int):
    """A flow of the first principal components of the digits, and samples at half time."""
    from sklearn.datasets import load_digits

    pixels = jnp.asarray(np.asarray(load_digits(return_X_y=True)[0]), jnp.float32)
    y = images.logit(images.dequantize(jax.random.key(0), pixels, 17)[0])[0]
    values, vectors = jnp.linalg.eigh(jnp.cov(y.T))
    data = ((y - y.mean(0)) @ vectors / jnp.sqrt(values))[:, -size:]
    flow = jaxode.cnf(field, jaxode.standard_normal(size), rtol=1e-2, atol=1e-2)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def train(m, key):
        def step(carry, key):
            m, state = carry
            gradient = jax.grad(flow.nll)(m, jax.random.choice(key, data, (256,)))
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(m, updates), state), None

        return jax.lax.scan(step, (m, optimizer.init(m)), jax.random.split(key, STEPS))[0][0]

    start = ConcatSquash(size, (WIDTH, WIDTH), key=jax.random.key(1))
    m = train(start, jax.random.key(2))
    return m, jaxode.flow(field, data[:BATCH], 1.0, 0.5, m)


def run(case: str, bench: Bench) -> dict[str, Any]:
    size = CASES[case]
    if not case.startswith("noise"):
        # All at once, the tangents of 512 dimensions take more than a GB.
        estimators = {n: {0: e} for n, e in ESTIMATORS.items() if n != "exact()" or size <= 256}
        return measure(bench, *initial(size), estimators)
    bench.announce("training")
    m, z = trained(size) if case in TRAINED else initial(size)
    estimators = {"exact(chunk=16)": {0: divergence.exact(16)}, **by_noise()}
    result = measure(bench, m, z, estimators)
    calls = result["curves"]
    exact = calls.pop("exact(chunk=16)")[0]
    places = {
        name: at_error([r["gradient_std"] for r in rows], [r.pop("times") for r in rows], TARGET)
        for name, rows in calls.items()
    }
    peers = [name for name in places if name in ("Hutch++", "XTrace")]
    return {
        **result, "exact_ms": 1e3 * exact["median"],
        "at_target": {
            n: {**(summary(p.times) if p.times is not None else {}), "note": p.note}
            for n, p in places.items()
        },
        **ratios_at_error(places, {peer: [peer] for peer in peers}, "orthogonal probes"),
    }  # fmt: skip


def measure(bench: Bench, m, z, estimators) -> dict[str, Any]:
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
            value, gradient = noise(call, m, z)
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


def split(cases: dict[str, Any]):
    """By dimension, and by noise."""
    noisy = {case: result for case, result in cases.items() if case.startswith("noise")}
    return {CASES[case]: r for case, r in cases.items() if case not in noisy}, noisy


def cell(row: dict[str, Any]) -> str:
    text = f"{report.ms(row['median'])} ms, {row['bytes'] / 1e6:.1f} MB"
    return text if row["gradient_std"] < 1e-6 else f"{text}, {row['gradient_std']:.0%}"


def table(cases: dict[str, Any]) -> str:
    by_size, noisy = split(cases)
    parts = [
        "Time, temporary memory, and standard deviation of the gradient over the probe relative to "
        "its norm.",
        report.markdown(
            ["dimension", *ESTIMATORS],
            [
                [
                    str(size),
                    *(cell(r["curves"][n][0]) if n in r["curves"] else "" for n in ESTIMATORS),
                ]
                for size, r in by_size.items()
            ],
        ),
    ]
    for case, result in noisy.items():
        header = [
            "",
            f"ms at {TARGET:.0%} of noise",
            "products: ms, noise of the gradient, of the value",
        ]
        rows = []
        for name, curve in result["curves"].items():
            at = result["at_target"][name]
            note = f" ({at['note']})" if at["note"] else ""
            shown = f"{report.ms(at['median'])}{note}" if "median" in at else "not reached"
            points = "; ".join(
                f"{r['products']}: {report.ms(r['median'])}, {r['gradient_std']:.1%}, "
                f"{r['value_std']:.2f}" for r in curve
            )  # fmt: skip
            rows.append([name, shown, points])
        exact = f"The exact trace, `exact(chunk=16)`, takes {result['exact_ms']:.1f} ms."
        parts.append(f"**{case}**\n\n{report.markdown(header, rows)}\n\n{exact}")
    return "\n\n".join(parts) + "".join(report.failures(r) for r in cases.values())


def draw(cases: dict[str, Any], path: str) -> None:
    by_size, noisy = split(cases)
    columns = max(3, len(noisy))
    figure, axes = plt.subplots(2, columns, figsize=(4.6 * columns, 7.4), layout="constrained")
    panels = {"median": "seconds", "bytes": "temporary memory, bytes",
              "gradient_std": "gradient: std over the probe / norm"}  # fmt: skip
    for axis, (key, label) in zip(axes[0], panels.items(), strict=False):
        for color, name in enumerate(ESTIMATORS):
            points = [
                (n, r["curves"][name][0][key]) for n, r in by_size.items() if name in r["curves"]
            ]
            if points and (key != "gradient_std" or name.startswith("hutchinson")):
                axis.loglog(*zip(*points, strict=True), f"C{color}o-", ms=3, label=name)
        axis.set(xlabel="dimension", ylabel=label)
    axes[0, 0].axvline(divergence.EXACT_UP_TO, color="gray", lw=0.8, ls="--", label="EXACT_UP_TO")
    axes[0, 0].legend(fontsize=8)
    for axis, (case, result) in zip(axes[1], noisy.items(), strict=False):
        for name, rows in result["curves"].items():
            points = [(row["gradient_std"], 1e3 * row["median"]) for row in rows]
            axis.loglog(*zip(*points, strict=True), "o-", ms=3, label=name)
        axis.axhline(result["exact_ms"], color="gray", lw=0.8, ls="--", label="exact(chunk=16)")
        axis.set(title=case, xlabel="gradient: std over the probe / norm", ylabel="ms")
        axis.invert_xaxis()
        axis.legend(fontsize=8)
    report.finish(figure, axes, TITLE, path, {})


def sentence(cases: dict[str, Any]) -> str:
    """Where the exact trace starts to cost more than eight probes, and what variance reduction
    gains."""
    by_size, noisy = split(cases)
    median = lambda result, name: result["curves"][name][0]["median"]
    slower = [
        size
        for size, r in by_size.items()
        if median(r, "exact(chunk=16)") > median(r, "hutchinson(probes=8)")
    ]
    closed = [median(r, "closed form") / median(r, "hutchinson()") for r in by_size.values()]
    parts = []
    if by_size:
        parts = [
            f"The exact trace costs more than 8 probes from {min(slower, default='no')} dimensions "
            f"on; the closed form takes {min(closed):.2f}x to {max(closed):.2f}x as long as a probe"
        ]
    for case, result in noisy.items():
        slow = [n for n, at in result["at_target"].items() if "median" not in at]
        if slow:
            parts.append(f"{' and '.join(slow)} do not reach {TARGET:.0%} of noise ({case})")
        for peer, ratio in result["ratios"].items():
            parts.append(f"orthogonal probes take {ratio:.2f}x as long as {peer} ({case})")
    return "; ".join(parts) + "."
