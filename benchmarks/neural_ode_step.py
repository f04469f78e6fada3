"""The training step of a Neural ODE, against diffrax and jax.experimental.ode.

    python benchmarks/neural_ode_step.py

Time is compared at equal gradient error: each contender runs at several tolerances, its error is
measured against a float64 solve at 1e-11, and the last column is the time that its work-precision
curve has at the error that jaxode reaches at tolerance 1e-5. Calls are alternated in one process;
times are medians, without the first call. Prints a Markdown table, and writes results as JSON.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from rich.progress import track

import jaxode

WORKLOADS = {  # state, width, batch, outputs
    "MLP 64-64, state 4, batch 256, 20 outputs": (4, 64, 256, 20),
    "MLP 64-64, state 64, batch 256, 20 outputs": (64, 64, 256, 20),
    "MLP 1024-1024, state 64, batch 8, 1 output": (64, 1024, 8, 1),
}
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)


def field(t, y, params):
    (w1, b1), (w2, b2), (w3, b3) = params
    return w3 @ jnp.tanh(w2 @ jnp.tanh(w1 @ y + b1 + t) + b2) + b3


def batched(t, y, params):
    return jax.vmap(lambda y: field(t, y, params))(y)


def make_problem(state, width, batch, outputs):
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [state, width, width, state]
    layer = lambda key, m, n: (1.5 * jax.random.normal(key, (n, m)) / np.sqrt(m), jnp.zeros(n))
    params = [layer(*arguments) for arguments in zip(keys, sizes[:-1], sizes[1:], strict=False)]
    ts = jnp.linspace(0.0, 1.0, outputs + 1)
    return params, jax.random.normal(keys[3], (batch, state)), ts


def contenders(tolerance):
    """Functions `(params, y0, ts) -> ys` without the initial time."""

    def ours(adjoint):
        return lambda params, y0, ts: jaxode.flow(
            field, y0, ts[0], ts[-1], params, ts=ts[1:], adjoint=adjoint, rtol=tolerance,
            atol=tolerance, throw=False, return_solution=True,
        ).ys  # fmt: skip

    def theirs(adjoint):
        return lambda params, y0, ts: diffrax.diffeqsolve(
            diffrax.ODETerm(batched), diffrax.Tsit5(), ts[0], ts[-1], None, y0, args=params,
            saveat=diffrax.SaveAt(ts=ts[1:]), adjoint=adjoint,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        ).ys  # fmt: skip

    swapped = lambda y, t, params: batched(t, y, params)
    options = {"rtol": tolerance, "atol": tolerance}
    return {
        "jaxode DiscreteAdjoint": ours(jaxode.DiscreteAdjoint()),
        "jaxode BacksolveAdjoint": ours(jaxode.BacksolveAdjoint()),
        "jaxode.odeint": lambda params, y0, ts: jaxode.odeint(swapped, y0, ts, params, **options)[
            1:
        ],
        "diffrax RecursiveCheckpointAdjoint": theirs(diffrax.RecursiveCheckpointAdjoint()),
        "diffrax BacksolveAdjoint": theirs(diffrax.BacksolveAdjoint()),
        "jax.experimental.ode": lambda params, y0, ts: odeint(swapped, y0, ts, params, **options)[
            1:
        ],
    }


def loss(run):
    def value(params, y0, ts):
        ys = run(params, y0, ts)
        target = jnp.sin(jnp.arange(ys.shape[0], dtype=ys.dtype))[:, None, None]
        return jnp.mean((ys - target) ** 2)

    return value


def reference(problem):
    """The gradient in float64, as numpy arrays."""
    jax.config.update("jax_enable_x64", True)
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), problem)
    run = lambda params, y0, ts: jaxode.flow(
        field, y0, ts[0], ts[-1], params, ts=ts[1:], solver=diffrax.Dopri8(), rtol=1e-11,
        atol=1e-11, return_solution=True,
    ).ys  # fmt: skip
    gradient = jax.tree.map(np.asarray, jax.grad(loss(run))(*exact))
    jax.config.update("jax_enable_x64", False)
    return jax.tree.leaves(gradient)


def measure(problem, repeats):
    exact, norm = reference(problem), lambda leaves: np.sqrt(sum((x**2).sum() for x in leaves))
    rows, steps = {}, {}
    for tolerance in TOLERANCES:
        for name, run in contenders(tolerance).items():
            step = jax.jit(jax.value_and_grad(loss(run)))
            start = time.perf_counter()
            _, gradient = jax.block_until_ready(step(*problem))
            first = time.perf_counter() - start
            difference = [
                np.asarray(g) - e for g, e in zip(jax.tree.leaves(gradient), exact, strict=True)
            ]
            steps[name, tolerance] = step
            rows[name, tolerance] = {
                "first": first, "error": float(norm(difference) / norm(exact)), "times": [],
            }  # fmt: skip
    for _ in track(range(repeats), description="timing"):
        for key, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*problem))
            rows[key]["times"].append(time.perf_counter() - start)
    return rows


def at_equal_error(rows, name, error):
    """Time on the work-precision curve of `name` at this error: linear between the measured points
    in logarithms; None where its curve does not reach."""
    curve = sorted(
        (row["error"], float(np.median(row["times"]))) for (n, _), row in rows.items() if n == name
    )
    errors, times = np.log(np.array(curve).T)
    if not errors[0] <= np.log(error) <= errors[-1]:
        return None
    return float(np.exp(np.interp(np.log(error), errors, times)))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/neural_ode_step.json"))
    options = parser.parse_args()
    results = {
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "versions": {"jax": jax.__version__, "diffrax": diffrax.__version__},
    }
    for workload, shape in WORKLOADS.items():
        rows = measure(make_problem(*shape), options.repeats)
        error = rows["jaxode DiscreteAdjoint", 1e-5]["error"]
        print(f"\n{workload}; gradient error {error:.0e}\n")
        columns = [
            "",
            "first call, s",
            "step at 1e-5, ms",
            "its gradient error",
            "at equal error, ms",
        ]
        print(f"| {' | '.join(columns)} |")
        print("|---|---|---|---|---|")
        table = {}
        for name in dict.fromkeys(name for name, _ in rows):
            row = rows[name, 1e-5]
            first = float(np.median([rows[name, tolerance]["first"] for tolerance in TOLERANCES]))
            equal = at_equal_error(rows, name, error)
            table[name] = {
                "first_s": first, "median_s": float(np.median(row["times"])),
                "min_s": min(row["times"]), "max_s": max(row["times"]), "error": row["error"],
                "equal_error_s": equal,
            }  # fmt: skip
            shown = "out of its range" if equal is None else f"{equal * 1e3:.1f}"
            middle = f"{table[name]['median_s'] * 1e3:.1f} | {row['error']:.0e}"
            print(f"| {name} | {first:.2f} | {middle} | {shown} |")
        results[workload] = table
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
