"""What a gradient method costs in memory, and where the adjoint ODE recomputed backwards fails.

    python -m benchmarks.cases.adjoints

1. Temporary memory of a gradient, as the compiler allots it, over the number of equal steps.
2. Relative error of a gradient over the rate at which the ODE contracts, at tolerance 1e-5, in
   float32, against `DiscreteAdjoint` in float64 at 1e-11.
3. The gradient over the tolerance, whose mesh is fixed, beside a finite difference of the computed
   loss, whose mesh moves, in float64, for van der Pol's oscillator after ten units of time.

Nothing is timed, so the numbers do not depend on the load of the machine. Prints the tables; writes
benchmarks/results/adjoints.json and docs/images/adjoints.png.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from benchmarks.harness import runner, show
from benchmarks.harness.fairness import double_precision, temporary_bytes
from benchmarks.harness.machine import ROOT

RESULTS = runner.RESULTS / "adjoints.json"
STEPS = (16, 64, 256, 1024, 4096)
RATES = (1, 3, 10, 30, 100)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
ADJOINTS = {
    "DiscreteAdjoint()": jaxode.DiscreteAdjoint(),
    "DiscreteAdjoint(checkpoints=8)": jaxode.DiscreteAdjoint(checkpoints=8),
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

            size = temporary_bytes(jax.jit(jax.grad(loss)), m)
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
        tight = lambda rate: gradient(rate, jaxode.DiscreteAdjoint(), 1e-11)
        exact = [float(tight(jnp.asarray(float(rate)))) for rate in rates]
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
            rows.append({
                "tolerance": tolerance, "gradient": float(gradient),
                "finite difference of the computed loss": float(difference),
                "exact derivative": float(slope), "error of the loss": abs(float(value - exact)),
            })  # fmt: skip
    return rows


def over(rows: list[dict], name: str, value: str, cell) -> str:
    """The table of a value by gradient method, over what has this name."""
    values = dict.fromkeys(str(row[name]) for row in rows)
    cells = {adjoint: [f"`{adjoint}`"] for adjoint in dict.fromkeys(row["adjoint"] for row in rows)}
    for row in rows:
        cells[row["adjoint"]].append(cell(row[value]))
    return show.markdown([name, *values], cells.values())


def tables(results: dict) -> list[str]:
    mesh = results["moving mesh"]
    digits = lambda name: ".0e" if "error" in name else ".4f"
    moving = [
        [name, *(f"{row[name]:{digits(name)}}" for row in mesh)] for name in list(mesh[0])[1:]
    ]
    error = lambda e: "NaN" if np.isnan(e) else f"{e:.0e}"
    return [
        over(results["memory"], "steps", "states", lambda s: f"{s:.0f}"),
        over(results["contraction"], "rate", "error", error),
        show.markdown(["tolerance", *(f"{row['tolerance']:.0e}" for row in mesh)], moving),
    ]


def draw(results: dict, path: Path) -> None:
    def curves(part: str, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for row in results[part]:
            found.setdefault(row["adjoint"], []).append((row[x], row[y]))
        return found

    panels = [
        show.Panel("steps", "temporary memory, in states", curves("memory", "steps", "states")),
        show.Panel(
            "rate of contraction", "relative error (absent where it is NaN)",
            curves("contraction", "rate", "error"),
        ),
    ]  # fmt: skip
    show.save(show.curves(panels), "A gradient by each method", path)


def main() -> None:
    measured = {"memory": memory(), "contraction": contraction(), "moving mesh": moving_mesh()}
    print(*tables(measured), sep="\n\n")
    runner.save(RESULTS, {"jax": jax.__version__} | measured)
    draw(measured, ROOT / "docs" / "images" / "adjoints.png")


if __name__ == "__main__":
    main()
