"""What a gradient method and a mode cost, and where the adjoint ODE recomputed backwards fails.

    python -m benchmarks.cases.adjoints

1. Temporary memory of a gradient, as the compiler allots it, over the number of equal steps.
2. Relative error of a gradient over the rate at which the ODE contracts, at tolerance 1e-5, in
   float32, against `DiscreteAdjoint` in float64 at 1e-11.
3. The gradient over the tolerance, whose mesh is fixed, beside a finite difference of the computed
   loss, whose mesh moves, in float64, for van der Pol's oscillator after ten units of time.
4. Time, in solves, and temporary memory of the modes that answer a question, such as for a Hessian.

Only the last one is timed, by turns with the solve itself: the rest does not depend on the load of
the machine. Prints the tables; writes
benchmarks/results/adjoints.json and docs/images/adjoints.png.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from benchmarks.harness import runner, show
from benchmarks.harness.fairness import alternate, double_precision, ratio, temporary_bytes
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


FEW, MANY = 10, 1000
EQUAL_STEPS = 200


def waves(t, y, p):
    """Three states, coupled by any number of parameters."""
    at = jnp.arange(len(p)) * 0.01 + t
    return jnp.tanh(jnp.cos(at[None] * (1 + jnp.arange(3.0)[:, None])) @ p + y[::-1]) - y


def mode_questions(few=FEW, many=MANY) -> list[tuple[str, int, dict[str, Any]]]:
    """What a user asks, by how many parameters, and the modes that answer it."""

    def ends(adjoint: Any = jaxode.DiscreteAdjoint()):
        options = {"steps": EQUAL_STEPS, "adjoint": adjoint}
        return lambda p: jaxode.solve(waves, jnp.zeros(3), 0.0, 5.0, p, **options).y1

    def loss(*adjoint):
        run = ends(*adjoint)
        return lambda p: jnp.sum(run(p) ** 2)

    def product(of_gradient):
        return lambda p: of_gradient(jax.grad(loss()), p)

    def transposed(gradient, p):
        return jax.grad(lambda moved: jnp.vdot(gradient(moved), p))(p)

    forward = jaxode.ForwardMode()
    jacobians = {
        "jax.jacrev": jax.jacrev(ends()),
        "jax.jacfwd": jax.jacfwd(ends()),
        "jax.jacfwd, ForwardMode()": jax.jacfwd(ends(forward)),
    }
    products = {
        "jax.jvp of jax.grad": product(lambda g, p: jax.jvp(g, (p,), (p,))[1]),
        "jax.grad of jax.grad": product(transposed),
    }
    hessians = {
        "jax.hessian": jax.hessian(loss()),
        "jax.jacrev of jax.jacrev": jax.jacrev(jax.jacrev(loss())),
        "jax.hessian, ForwardMode()": jax.jacfwd(jax.jacfwd(loss(forward))),
    }
    return [
        ("solve", many, {"": ends()}),
        ("gradient", many, {"jax.grad": jax.grad(loss())}),
        ("Hessian times a vector", many, products),
        ("Hessian", few, hessians),
        ("Jacobian of 3 outputs", many, jacobians),
        ("Jacobian of 3 outputs", few, jacobians),
    ]


def modes(seconds=60.0, few=FEW, many=MANY) -> list[dict]:
    """Median time, in those of a solve with as many parameters, and temporary memory."""
    (_, _, solves), *questions = mode_questions(few, many)
    (solve,), rows = solves.values(), []
    for question, count, ways in questions:
        p = jnp.linspace(-0.1, 0.1, count)
        programs = {way: jax.jit(f) for way, f in ways.items()} | {"solve": jax.jit(solve)}
        calls = {way: functools.partial(f, p) for way, f in programs.items()}
        for call in calls.values():
            jax.block_until_ready(call())
        times = alternate(calls, seconds / len(questions))
        for way in ways:
            rows.append({
                "question": question, "parameters": count, "mode": way,
                "solves": ratio(times[way], times["solve"]),
                "bytes": temporary_bytes(programs[way], p),
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
        show.markdown(
            ["question", "parameters", "answered by", "time, in solves", "memory"],
            [
                [
                    row["question"],
                    f"{row['parameters']:,}",
                    f"`{row['mode']}`",
                    f"{row['solves']:.2g}" if row["solves"] < 10 else f"{row['solves']:.0f}",
                    f"{row['bytes'] / 1e6:.2g} MB",
                ]
                for row in results["modes"]
            ],
        ),
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
    measured["modes"] = modes()
    print(*tables(measured), sep="\n\n")
    runner.save(RESULTS, {"jax": jax.__version__} | measured)
    draw(measured, ROOT / "docs" / "images" / "adjoints.png")


if __name__ == "__main__":
    main()
