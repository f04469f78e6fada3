"""What a gradient method costs in memory, and where the adjoint ODE recomputed backwards fails.

    python -m benchmarks.adjoints

1. Temporary memory of a gradient, as the compiler allots it, over the number of equal steps.
2. Relative error of a gradient over the rate at which the ODE contracts, at tolerance 1e-5, in
   float32, against `DiscreteAdjoint` in float64 at 1e-11.
3. The gradient over the tolerance, whose mesh is fixed, beside a finite difference of the computed
   loss, whose mesh moves, in float64, for van der Pol's oscillator after ten units of time.

Nothing is timed, so the numbers do not depend on the load of the machine. Prints the tables; writes
benchmarks/results/adjoints.json and docs/images/adjoints.png.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from benchmarks.fairness import double_precision

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "adjoints.json"
STEPS = (16, 64, 256, 1024, 4096)
RATES = (1, 3, 10, 30, 100)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
ADJOINTS = {
    "DiscreteAdjoint()": jaxode.DiscreteAdjoint(),
    "DiscreteAdjoint(checkpoints=8)": jaxode.DiscreteAdjoint(checkpoints=8),
    "InterpolatingAdjoint()": jaxode.InterpolatingAdjoint(),
    "BacksolveAdjoint()": jaxode.BacksolveAdjoint(),
}
BATCH, SIZE = 512, 256
STATE_BYTES = 4 * BATCH * SIZE


def memory(steps=STEPS) -> list[dict]:
    """Temporary memory of the gradient in the parameters, in states."""
    m = jaxode.nn.MLP(SIZE, (64,), key=jax.random.key(0))
    z = jnp.ones((BATCH, SIZE), jnp.float32)
    rows = []
    for name, adjoint in ADJOINTS.items():
        for count in steps:

            def loss(m, adjoint=adjoint, count=count):
                options = {"adjoint": adjoint, "steps": count, "throw": False}
                return jnp.sum(jaxode.flow(jaxode.nn.field, z, 0.0, 1.0, m, **options) ** 2)

            compiled = jax.jit(jax.grad(loss)).lower(m).compile()
            size = compiled.memory_analysis().temp_size_in_bytes
            rows.append({"adjoint": name, "steps": count, "states": size / STATE_BYTES})
    return rows


def contracting(t, y, rate):
    """Every trajectory is drawn to one that moves with the time."""
    return -rate * jnp.sinh(y - jnp.sin(3 * t))


def gradient(rate, adjoint, tolerance):
    def loss(rate):
        y0 = jnp.asarray([1.0, -0.5, 0.2], rate.dtype)
        options = {"adjoint": adjoint, "rtol": tolerance, "atol": tolerance, "throw": False}
        return jnp.sum(jaxode.solve(contracting, y0, 0.0, 1.0, rate, **options).y1 ** 2)

    return jax.jit(jax.grad(loss))(rate)


def contraction(rates=RATES) -> list[dict]:
    """Relative error of the gradient in the rate; NaN where the backward solve failed."""
    with double_precision():
        exact = [
            float(gradient(jnp.asarray(float(rate)), ADJOINTS["DiscreteAdjoint()"], 1e-11))
            for rate in rates
        ]
    rows = []
    for name, adjoint in ADJOINTS.items():
        if "checkpoints" in name:
            continue
        for rate, expected in zip(rates, exact, strict=True):
            value = float(gradient(jnp.asarray(rate, jnp.float32), adjoint, 1e-5))
            rows.append({"adjoint": name, "rate": rate, "error": abs(value / expected - 1)})
    return rows


def van_der_pol(t, y, mu):
    """A limit cycle, which the time of ten units goes around one and a half times."""
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def moving_mesh(tolerances=TOLERANCES, step=1e-6) -> list[dict]:
    """The derivative of the first component by `mu` at 1, and a central difference."""

    @jax.jit
    def at(mu, tolerance):
        def loss(mu):
            y0 = jnp.asarray([2.0, 0.0], mu.dtype)
            options = {"rtol": tolerance, "atol": tolerance, "throw": False}
            return jaxode.solve(van_der_pol, y0, 0.0, 10.0, mu, **options).y1[0]

        return jax.value_and_grad(loss)(mu)

    with double_precision():
        mu = jnp.asarray(1.0)
        exact, slope = at(mu, 1e-12)
        rows = []
        for tolerance in tolerances:
            value, gradient = at(mu, tolerance)
            difference = (at(mu + step, tolerance)[0] - at(mu - step, tolerance)[0]) / (2 * step)
            rows.append(
                {
                    "tolerance": tolerance,
                    "gradient": float(gradient),
                    "finite difference of the computed loss": float(difference),
                    "exact derivative": float(slope),
                    "error of the loss": abs(float(value - exact)),
                }
            )
    return rows


def table(rows: list[dict], over: str, value: str, cell) -> str:
    values = list(dict.fromkeys(row[over] for row in rows))
    lines = [f"| {over} | " + " | ".join(map(str, values)) + " |", "|---" * (len(values) + 1) + "|"]
    for name in dict.fromkeys(row["adjoint"] for row in rows):
        cells = [cell(row[value]) for row in rows if row["adjoint"] == name]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mesh_table(rows: list[dict]) -> str:
    lines = ["| tolerance | " + " | ".join(f"{row['tolerance']:.0e}" for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for name in list(rows[0])[1:]:
        digits = ".0e" if "error" in name else ".4f"
        lines.append(f"| {name} | " + " | ".join(f"{row[name]:{digits}}" for row in rows) + " |")
    return "\n".join(lines)


def tables(results: dict) -> list[str]:
    error = lambda e: "NaN" if np.isnan(e) else f"{e:.0e}"
    return [
        table(results["memory"], "steps", "states", lambda s: f"{s:.0f}"),
        table(results["contraction"], "rate", "error", error),
        mesh_table(results["moving mesh"]),
    ]


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for color, name in enumerate(ADJOINTS):
        style = {"color": f"C{color}", "marker": "o", "ms": 4, "label": name}
        points = [(r["steps"], r["states"]) for r in results["memory"] if r["adjoint"] == name]
        left.loglog(*zip(*points, strict=True), **style)
        points = [(r["rate"], r["error"]) for r in results["contraction"] if r["adjoint"] == name]
        if points:
            right.loglog(*zip(*points, strict=True), **style)
    left.set(xlabel="steps", title="Temporary memory of a gradient, in states", ylim=(5, 200))
    right.set(
        xlabel="rate of contraction", title="Relative error of a gradient (absent where it is NaN)"
    )
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    measured = {"memory": memory(), "contraction": contraction(), "moving mesh": moving_mesh()}
    results = {"jax": jax.__version__} | measured
    print(*tables(results), sep="\n\n")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, ROOT / "docs" / "images" / "adjoints.png")


if __name__ == "__main__":
    main()
