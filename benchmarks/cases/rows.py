"""Many systems at once, each with parameters of its own: time per system, and memory.

Predators and prey in 1, 4 and 16 patches, between which prey wanders: 2, 8 and 32 states, 11 times.
jaxode takes the parameters as `row_args`, or is mapped by `jax.vmap` as diffrax is; torchode solves
a batch; SciPy takes one system after the other, so only some of them. All at one tolerance, with
their errors beside. Memory is that which the compiler allots.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import jaxode
from benchmarks.cases.ffjord_step import in_torch
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import (
    EXACT,
    Bench,
    alternate,
    attempt,
    double_precision,
    doubled,
    ratio,
    summary,
    timed,
)

END, TIMES, MAX_STEPS, TOLERANCE = 10.0, 11, 256, 1e-5
CHECKED = 100  # systems whose error is looked at
ONE_BY_ONE = 20  # systems of SciPy


class Systems(NamedTuple):
    y0: Any
    """`[rows, states]`: prey, then predators."""
    p: Any
    """`[rows, 4]`."""
    ts: Any


def systems(rows: int, states: int) -> Systems:
    rng = np.random.default_rng(0)
    p = np.array([1.5, 1.0, 3.0, 1.0]) * rng.uniform(0.8, 1.2, (rows, 4))
    made = 1 + rng.random((rows, states)), p, np.linspace(0.0, END, TIMES)
    return Systems(*(jnp.asarray(x, jnp.float32) for x in made))


def slope(y, p, join: Callable[..., Any] = jnp.concatenate):
    """Of one system, or of `[rows, states]`; in JAX, NumPy and PyTorch."""
    half = y.shape[-1] // 2
    prey, predators = y[..., :half], y[..., half:]
    a, b, c, d = (p[..., i : i + 1] for i in range(4))
    wandering = prey.mean(-1)[..., None] - prey
    return join([prey * (a - b * predators) + wandering, predators * (d * prey - c)], -1)


def by_row_args(s: Systems):
    return jaxode.solve(
        lambda t, y, args: slope(y, args[1]), s.y0, 0.0, END, row_args=s.p, batch="per_sample",
        ts=jnp.broadcast_to(s.ts, (len(s.y0), TIMES)), rtol=TOLERANCE, atol=TOLERANCE,
        max_steps=MAX_STEPS, throw=False,
    ).ys  # fmt: skip


def by_vmap(s: Systems):
    one = lambda y0, p: jaxode.solve(
        lambda t, y, p: slope(y, p), y0, 0.0, END, p, ts=s.ts, rtol=TOLERANCE, atol=TOLERANCE,
        max_steps=MAX_STEPS, throw=False,
    ).ys  # fmt: skip
    return jax.vmap(one)(s.y0, s.p)


def by_diffrax(s: Systems, solver: Any = diffrax.Tsit5(), tolerance: float = TOLERANCE):
    one = lambda y0, p: diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, p: slope(y, p)), solver, 0.0, END, None, y0, args=p,
        saveat=diffrax.SaveAt(ts=s.ts), max_steps=MAX_STEPS, throw=False,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    ).ys  # fmt: skip
    return jax.vmap(one)(s.y0, s.p)


IN_JAX = {"jaxode": by_row_args, "jaxode, vmap": by_vmap, "diffrax, vmap": by_diffrax}


def gradient_of(solve: Callable[[Systems], Any]):
    """By states and parameters, of the sum of squares."""
    loss = lambda y0, p, ts: jnp.sum(solve(Systems(y0, p, ts)) ** 2)
    return lambda s: jax.grad(loss, (0, 1))(*s)


def by_scipy(s: Systems):
    """The first systems, one by one."""
    y0, p, ts = (np.asarray(x, float) for x in s)
    one = lambda y0, p: solve_ivp(
        lambda t, y: slope(y, p, np.concatenate), (0.0, END), y0, t_eval=ts, rtol=TOLERANCE,
        atol=TOLERANCE,
    ).y.T  # fmt: skip
    return np.stack([one(*row) for row in zip(y0[:ONE_BY_ONE], p[:ONE_BY_ONE], strict=True)])


def by_torchode(s: Systems, gradient: bool):
    """A call, whose result is that of JAX's contenders."""
    torch, library = in_torch().torch, in_torch()
    y0, p = (library.tensor(x).requires_grad_(gradient) for x in (s.y0, s.p))
    ts = library.tensor(s.ts).expand(len(y0), TIMES)

    def call():
        f = lambda t, y: slope(y, p, torch.cat)
        ys = library.torchode_solve(f, y0, ts, TOLERANCE)
        if gradient:
            return [x.numpy() for x in torch.autograd.grad((ys**2).sum(), (y0, p))]
        return ys.numpy()

    return call


class Size(NamedTuple):
    states: int
    gradient: bool = False
    rows: tuple[int, ...] = (100, 10_000)
    contenders: tuple[str, ...] = (*IN_JAX, "torchode", "scipy")


class Rows(Benchmark):
    title = "Many systems, each with its own parameters"
    cases = {
        f"{what}, {states} states": Size(states, what == "gradient")
        for what in ("solve", "gradient")
        for states in (2, 8, 32)
    } | {"solve, 2 states, a million": Size(2, rows=(1_000_000,), contenders=tuple(IN_JAX))}

    def run(self, case: str, bench: Bench) -> Result:
        size: Size = self.cases[case]
        failed: dict[str, str] = {}
        curves: dict[str, list[dict[str, Any]]] = {}
        ratios: dict[str, float] = {}
        for rows in size.rows:
            s = systems(rows, size.states)
            exact = reference(s, size.gradient)
            calls, found = {}, {}
            for name in size.contenders:
                if name == "scipy" and (size.gradient or rows != size.rows[0]):
                    continue
                made = attempt(bench, failed, name, lambda s=s, n=name: prepared(n, s, size))
                if made is not None:
                    calls[name], found[name] = made
            times = alternate(calls, bench.seconds / len(size.rows))
            for name, taken in times.items():
                of = min(ONE_BY_ONE, rows) if name == "scipy" else rows
                each = summary([t / of for t in taken])
                curves.setdefault(name, []).append(
                    {"value": rows, "error": error_of(found[name][0], exact),
                     "bytes": found[name][1], **each}
                )  # fmt: skip
            if {"jaxode", "diffrax, vmap"} <= set(times):
                ratios = {"diffrax": ratio(times["jaxode"], times["diffrax, vmap"])}
        return {"failed": failed, "curves": curves, "ratios": ratios}

    def table(self, results: Results) -> str:
        parts = []
        for case, result in results.items():
            rows = []
            for name, curve in result["curves"].items():
                for row in curve:
                    cell = f"{1e6 * row['median']:.3g} / {row['error']:.0e}"
                    memory = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.1f}"
                    rows.append([name, f"{row['value']:,}", cell, memory])
            header = ["", "systems", "microseconds per system / error", "MiB"]
            table = show.markdown(header, rows) + show.failures(result)
            parts.append(f"**{case}**\n\n{table}")
        return "\n\n".join(parts)


def prepared(name: str, s: Systems, size: Size):
    """A call, and its first result with the memory that it is allotted, if that is known."""
    if name in IN_JAX:
        solve = gradient_of(IN_JAX[name]) if size.gradient else IN_JAX[name]
        program = jax.jit(solve).lower(s).compile()
        analysis = program.memory_analysis()
        call, memory = lambda: program(s), analysis and int(analysis.temp_size_in_bytes)
    else:
        made = {
            "scipy": lambda: lambda: by_scipy(s),
            "torchode": lambda: by_torchode(s, size.gradient),
        }
        call, memory = made[name](), None
    return call, (jax.tree.leaves(timed(call)[1]), memory)


def reference(s: Systems, gradient: bool) -> list[np.ndarray]:
    """The result for the first systems, in float64 by Dopri8 of diffrax."""
    few = Systems(s.y0[:CHECKED], s.p[:CHECKED], s.ts)
    solve = lambda s: by_diffrax(s, diffrax.Dopri8(), EXACT)
    with double_precision():
        return list(map(np.asarray, jax.tree.leaves(
            jax.jit(gradient_of(solve) if gradient else solve)(doubled(few))
        )))  # fmt: skip


def error_of(found: list[Any], exact: list[np.ndarray]) -> float:
    """Relative, over all leaves together, of the systems that both have."""
    pairs = [
        (np.asarray(a, float)[: len(b)], b[: len(a)]) for a, b in zip(found, exact, strict=True)
    ]
    squares = sum(((a - b) ** 2).sum() for a, b in pairs)
    return float(np.sqrt(squares / sum((b**2).sum() for _, b in pairs)))


BENCHMARK = Rows()
