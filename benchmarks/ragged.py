"""The training step of a Neural ODE on series of unequal length, each with its own times.

256 series start and end at their own times, and are seen at 2 to 64 times each, padded by
repeating the last. jaxode solves them in one call; diffrax by `vmap` of a solve; torchode as a
batch. diffrax's BacksolveAdjoint, which took 17 seconds a step here, is not among them. Memory is
that which the compiler allots for the step, for a small network and a large one.
"""

from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from benchmarks import report
from benchmarks.fairness import (
    EXACT,
    Bench,
    attempt,
    check_same,
    double_precision,
    work_precision,
)
from benchmarks.neural_ode_step import check_fields
from benchmarks.neural_ode_step import problem as regular

TITLE = "Training step on ragged series"
ROWS, MOST, STATE, WIDTH = 256, 64, 4, 64
LARGE = 512  # width of the network whose memory is also looked at
CASES: dict[str, tuple[int, int]] = {f"{ROWS} series of 2 to {MOST} times, 64-64": (ROWS, MOST)}
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
TARGET = 1e-4  # the error of the gradient at which times are compared
DIFFRAX = "diffrax vmap checkpointed"
GROUPS = {"diffrax": [DIFFRAX], "torchode": ["torchode"]}


class Problem(NamedTuple):
    params: Any
    y0: Any
    ts: Any
    """`[rows, times]`; each series starts at its first time and ends at its last."""
    real: Any
    """Which of them are no padding."""


def problem(rows: int, most: int, width: int = WIDTH) -> Problem:
    p, rng = regular(STATE, width, rows, 1), np.random.default_rng(0)
    counts = rng.integers(2, most + 1, rows)
    starts, spans = rng.uniform(0, 1, rows), rng.uniform(0.2, 2, rows)
    real = np.arange(most) < counts[:, None]
    times = np.sort(np.where(real, rng.uniform(0, 1, (rows, most)), np.inf), axis=1)
    times = np.where(real, times, times[np.arange(rows), counts - 1][:, None])
    ts = (starts[:, None] + spans[:, None] * times).astype(np.float32)
    return Problem(p.params, p.y0, jnp.asarray(ts), jnp.asarray(real))


def loss_of(ys, ts, real, xp=jnp):
    """The mean square of the distance to a wave, over what is no padding."""
    squares = ((ys - xp.sin(3 * ts)[..., None]) ** 2).mean(-1)
    return xp.where(real, squares, xp.zeros_like(squares)).sum() / real.sum()


def step_of(p: Problem, ys):
    """A step from `ys(params, y0, ts, tolerance)`, the states `[rows, times, state]`."""
    loss = lambda params, y0, ts, real, tolerance: loss_of(ys(params, y0, ts, tolerance), ts, real)
    step = jax.jit(jax.value_and_grad(loss))

    def run(tolerance):
        value, gradient = step(*p, tolerance)
        return value, jax.tree.leaves(gradient)

    return run, step


def of_jaxode(params, y0, ts, tolerance):
    return jaxode.solve(
        jaxode.nn.field, y0, ts[:, 0], ts[:, -1], params, batch="per_sample", ts=ts, rtol=tolerance,
        atol=tolerance, throw=False,
    ).ys  # fmt: skip


def of_diffrax(solver: Any = diffrax.Tsit5()):
    adjoint = diffrax.RecursiveCheckpointAdjoint()

    def ys(params, y0, ts, tolerance):
        def one(y0, ts):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(jaxode.nn.field), solver, ts[0], ts[-1], None, y0, args=params,
                saveat=diffrax.SaveAt(ts=ts), throw=False, adjoint=adjoint,
                stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            ).ys  # fmt: skip

        return jax.vmap(one)(y0, ts)

    return ys


def torchode_step(p: Problem):
    import torch
    import torchode

    from benchmarks.torch_flows import TorchField

    f = TorchField(p.params)
    y0, ts, real = (torch.tensor(np.asarray(x)) for x in (p.y0, p.ts, p.real))
    term: Any = torchode.ODETerm(lambda t, y: f(t[:, None], y))

    def run(tolerance):
        controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Tsit5(term=term), controller)
        start_end: Any = {"t_start": ts[:, 0], "t_end": ts[:, -1]}
        ys = solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=ts, **start_end)).ys
        loss = loss_of(ys, ts, real, torch)
        return loss.item(), [g.numpy() for g in torch.autograd.grad(loss, f.leaves)]

    return run


def reference(p: Problem) -> list[np.ndarray]:
    """The gradient in float64, by diffrax's Dopri8."""
    with double_precision():
        q = jax.tree.map(lambda x: x if x.dtype == bool else jnp.asarray(x, jnp.float64), p)
        step, _ = step_of(q, of_diffrax(diffrax.Dopri8()))
        return [np.asarray(leaf) for leaf in step(EXACT)[1]]


def mebibytes(p: Problem, ys) -> float:
    """Of temporary memory."""
    compiled = step_of(p, ys)[1].lower(*p, 1e-5).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def run(case: str, bench: Bench) -> dict[str, Any]:
    rows, most = CASES[case]
    p, failed = problem(rows, most), {}
    check_same(
        failed, "the same field in PyTorch", lambda: check_fields(regular(STATE, WIDTH, 8, 1))
    )
    bench.announce("reference")
    exact = reference(p)
    in_jax = {"jaxode": of_jaxode, DIFFRAX: of_diffrax()}
    makers = {name: lambda ys=ys: step_of(p, ys)[0] for name, ys in in_jax.items()}
    makers["torchode"] = lambda: torchode_step(p)
    result = work_precision(bench, makers, exact, TOLERANCES, TARGET, GROUPS)
    result["memory"] = {
        name: [
            attempt(bench, failed, name, lambda q=q, ys=ys: mebibytes(q, ys))
            for q in (p, problem(rows, most, LARGE))
        ]
        for name, ys in in_jax.items()
    }
    result["failed"] |= failed
    return result


def table(cases: dict[str, Any]) -> str:
    rows = []
    for result in cases.values():
        for name, sizes in result["memory"].items():
            rows.append([name, *("" if size is None else f"{size:.1f}" for size in sizes)])
    memory = report.markdown(["MiB", f"{WIDTH}-{WIDTH}", f"{LARGE}-{LARGE}"], rows)
    return report.work_precision_tables(cases) + "\n\n" + memory


def draw(cases: dict[str, Any], path: str) -> None:
    report.draw_work_precision(cases, path, TITLE)


def sentence(cases: dict[str, Any]) -> str:
    return report.work_precision_sentence(cases)
