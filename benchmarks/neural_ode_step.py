"""The training step of a Neural ODE: value and gradient of a loss on the states at given times.

The network is trained, and each size comes twice: as users write it, and as one of `jaxode.nn`.
"""

from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint

import jaxode
from benchmarks import flows, report
from benchmarks.fairness import (
    EXACT,
    Bench,
    check_equal,
    check_same,
    double_precision,
    work_precision,
)

TITLE = "Training step of a Neural ODE"
SHORT = "Neural ODE"
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
SIZES: dict[str, dict[str, int]] = {
    "64-64, state 4, batch 256, 20 times": {"state": 4, "width": 64, "batch": 256, "times": 20},
    "64-64, state 64, batch 256, 20 times": {"state": 64, "width": 64, "batch": 256, "times": 20},
    "1024-1024, state 64, batch 8, 1 time": {"state": 64, "width": 1024, "batch": 8, "times": 1},
}
CASES: dict[str, dict[str, Any]] = {
    f"{size}, {'a network of the user' if own else 'jaxode.nn'}": {**settings, "own": own}
    for size, settings in SIZES.items()
    for own in (True, False)
}
STEPS = 800  # of the training
TARGET = 1e-4  # the error of the gradient at which times are compared
GROUPS = {
    "diffrax": ["diffrax checkpointed", "diffrax backsolve"],
    "jax odeint": ["jax odeint"],
    "torchdiffeq": ["torchdiffeq adjoint", "torchdiffeq direct"],
}


class Problem(NamedTuple):
    params: Any
    y0: Any
    ts: Any


def oscillators(y):
    """Pairs of coordinates that turn on a limit cycle, each at a frequency of 2 to 8."""
    u, v = jnp.split(y, 2, axis=-1)
    frequency, grow = jnp.linspace(2.0, 8.0, u.shape[-1]), 1 - u**2 - v**2
    return jnp.concatenate([grow * u - frequency * v, grow * v + frequency * u], axis=-1)


def problem(state: int, width: int, batch: int, times: int, own: bool = True) -> Problem:
    """A network that was fitted to the slopes of oscillators."""
    network_key, key = jax.random.split(jax.random.key(0))
    if own:
        params: Any = flows.Plain(state, (width, width), network_key, jnp.tanh)
    else:
        params = jaxode.nn.MLP(state, (width, width), key=network_key)

    def slopes(params, key):
        y = jax.random.normal(key, (flows.ROWS, state))
        t = jax.random.uniform(key)
        return jnp.mean((batched(t, y, params) - oscillators(y)) ** 2)

    params = flows.trained(params, slopes, STEPS)
    return Problem(params, jax.random.normal(key, (batch, state)), jnp.linspace(0, 1, times + 1))


def batched(t, y, params):
    return jax.vmap(lambda y: params(t, y))(y)


def loss_of(ys):
    target = jnp.sin(jnp.arange(ys.shape[0], dtype=ys.dtype))[:, None, None]
    return jnp.mean((ys - target) ** 2)


def step_of(p: Problem, ys, static: bool = False):
    """A step from `ys(params, y0, ts, tolerance)`, the states at `ts[1:]`."""
    loss = lambda params, y0, ts, tolerance: loss_of(ys(params, y0, ts, tolerance))
    step = jax.jit(jax.value_and_grad(loss), static_argnums=3 if static else ())

    def run(tolerance):
        value, gradient = step(*p, tolerance)
        return value, jax.tree.leaves(gradient)

    return run


def jaxode_step(p: Problem, adjoint):
    ys = lambda params, y0, ts, tolerance: jaxode.solve(
        jaxode.nn.field, y0, ts[0], ts[-1], params, ts=ts[1:], adjoint=adjoint, rtol=tolerance,
        atol=tolerance, throw=False, batch="joint",
    ).ys  # fmt: skip
    return step_of(p, ys)


def diffrax_step(p: Problem, adjoint, solver: Any = diffrax.Tsit5()):
    ys = lambda params, y0, ts, tolerance: diffrax.diffeqsolve(
        diffrax.ODETerm(batched), solver, ts[0], ts[-1], None, y0, args=params,
        saveat=diffrax.SaveAt(ts=ts[1:]), throw=False,
        adjoint=adjoint(tolerance) if callable(adjoint) else adjoint,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    ).ys  # fmt: skip
    return step_of(p, ys)


def odeint_step(p: Problem, solve):
    swapped = lambda y, t, params: batched(t, y, params)
    ys = lambda params, y0, ts, tolerance: solve(
        swapped, y0, ts, params, rtol=tolerance, atol=tolerance
    )[1:]
    return step_of(p, ys, static=True)


def torchdiffeq_step(p: Problem, adjoint: bool = True):
    import torch
    import torchdiffeq

    from benchmarks.torch_flows import TorchField

    f = TorchField(p.params)
    y0, ts = (torch.tensor(np.asarray(a)) for a in (p.y0, p.ts))
    target = torch.sin(torch.arange(len(ts) - 1, dtype=y0.dtype))[:, None, None]

    def run(tolerance):
        solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        options = {"adjoint_params": tuple(f.leaves)} if adjoint else {}
        ys: Any = solve(f, y0, ts, rtol=tolerance, atol=tolerance, method="dopri5", **options)
        loss = ((ys[1:] - target) ** 2).mean()
        return loss.item(), [g.numpy() for g in torch.autograd.grad(loss, f.leaves)]

    return run


def double(p: Problem) -> Problem:
    return Problem(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tuple(p)))


def check_fields(p: Problem) -> None:
    """Raise unless the field in PyTorch equals that in JAX, in float64."""
    import torch

    from benchmarks.torch_flows import TorchField

    with double_precision():
        q = double(p)
        theirs = TorchField(q.params)(0.37, torch.tensor(np.asarray(q.y0)))
        check_equal({"JAX": batched(0.37, q.y0, q.params), "PyTorch": theirs.detach().numpy()})


def reference(p: Problem) -> list[np.ndarray]:
    """The gradient in float64, by diffrax's Dopri8."""
    with double_precision():
        step = diffrax_step(double(p), diffrax.RecursiveCheckpointAdjoint(), diffrax.Dopri8())
        return [np.asarray(leaf) for leaf in step(EXACT)[1]]


def run(case: str, bench: Bench) -> dict[str, Any]:
    p, failed = problem(**CASES[case]), {}
    check_same(failed, "the same field in PyTorch", lambda: check_fields(p))
    bench.announce("reference")
    exact = reference(p)
    makers = {
        "jaxode": lambda: jaxode_step(p, jaxode.DiscreteAdjoint()),
        "jaxode backsolve": lambda: jaxode_step(p, jaxode.BacksolveAdjoint()),
        "jaxode.odeint": lambda: odeint_step(p, jaxode.odeint),
        "diffrax checkpointed": lambda: diffrax_step(p, diffrax.RecursiveCheckpointAdjoint()),
        "diffrax backsolve": lambda: diffrax_step(p, flows.seminorm_backsolve),
        "jax odeint": lambda: odeint_step(p, odeint),
        "torchdiffeq adjoint": lambda: torchdiffeq_step(p),
        "torchdiffeq direct": lambda: torchdiffeq_step(p, adjoint=False),
    }
    result = work_precision(bench, makers, exact, TOLERANCES, TARGET, GROUPS)
    result["failed"] |= failed
    return result


def table(cases: dict[str, Any]) -> str:
    return report.work_precision_tables(cases)


def draw(cases: dict[str, Any], path: str) -> None:
    report.draw_work_precision(cases, path, TITLE)


def sentence(cases: dict[str, Any]) -> str:
    return report.work_precision_sentence(cases)
