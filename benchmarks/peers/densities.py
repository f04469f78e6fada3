"""Log-densities of a trained conditional flow, by libraries in JAX; zuko is in `in_torch.py`.

And spline flows, which take one pass: their densities are of another model, trained here.
"""

import time
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from benchmarks.harness.fairness import Step, double_precision, doubled
from benchmarks.harness.problems import Conditional, stepper

EXACT = 1e-10  # tolerance of exact densities, by Dopri8 in float64
BATCH = 256  # rows of a training step of a spline flow


def of_density(p: Conditional) -> Step:
    """As users call it: steps of each row, in batches, outside of `jit`."""
    dim, options = p.x.shape[1], {"context_shape": p.context.shape[1:]}

    def step(tolerance):
        rtol: Any = jnp.asarray(tolerance, jnp.float32)
        flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim), rtol=rtol, atol=rtol)
        density = jaxode.bind(flow, p.params, **options)
        return None, [density.log_prob(p.x, context=p.context)]

    return step


def of_flow(p: Conditional) -> Step:
    """Joint steps."""

    def log_prob(params, x, context, tolerance):
        flow = jaxode.cnf(
            jaxode.nn.field, jaxode.standard_normal(x.shape[1]), rtol=tolerance, atol=tolerance,
            divergence=jaxode.divergence.exact(),
        )  # fmt: skip
        return flow.log_prob(params, x, context=context)

    return _step(log_prob, p)


def of_diffrax(p: Conditional, solver: Any = diffrax.Tsit5(), per_sample: bool = False) -> Step:
    """The volume among the states, with the exact trace."""

    def trace(t, state, args):
        params, context = args

        def one(z, row):
            f, jvp = jax.linearize(lambda z: params(t, z, row), z)
            return f, jnp.trace(jax.vmap(jvp)(jnp.eye(z.size, dtype=z.dtype)))

        return jax.vmap(one)(state[0], context)

    def solve(params, x, context, tolerance):
        solution: Any = diffrax.diffeqsolve(
            diffrax.ODETerm(trace), solver, 1.0, 0.0, None, (x, jnp.zeros(len(x), x.dtype)),
            args=(params, context), max_steps=4096, throw=False,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        )  # fmt: skip
        z, log_det = (leaf[0] for leaf in solution.ys)
        return log_det + jaxode.standard_normal(z.shape[1]).log_prob(z)

    def by_row(params, x, context, tolerance):
        row = lambda x, context: solve(params, x[None], context[None], tolerance)[0]
        return jax.vmap(row)(x, context)

    return _step(by_row if per_sample else solve, p)


def _step(log_prob: Callable[..., Any], p: Conditional) -> Step:
    program = jax.jit(log_prob)
    return lambda tolerance: (None, [program(p.params, p.x, p.context, tolerance)])


def exact(p: Conditional, rows: int) -> list[np.ndarray]:
    """Of the first rows."""
    with double_precision():
        few = doubled(Conditional(p.params, p.x[:rows], p.context[:rows], p.train))
        return [np.asarray(leaf) for leaf in of_diffrax(few, diffrax.Dopri8())(EXACT)[1]]


def flowjax_spline(p: Conditional, seconds: float) -> Callable[[], Any]:
    """A masked autoregressive flow of rational quadratic splines: a call for the log-densities."""
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from paramax import unwrap

    key, (x, context) = jax.random.key(0), p.train
    flow = masked_autoregressive_flow(
        key, base_dist=Normal(jnp.zeros(x.shape[1])), cond_dim=context.shape[1],
        transformer=RationalQuadraticSpline(knots=8, interval=4),
    )  # fmt: skip
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    optimizer = optax.adam(5e-4)

    def loss(params, key):
        rows = jax.random.randint(key, (BATCH,), 0, len(x))
        of_batch = unwrap(eqx.combine(params, static)).log_prob(x[rows], context[rows])
        return -jnp.mean(of_batch)

    train, state = jax.jit(stepper(loss, optimizer)), optimizer.init(params)
    end, step = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        params, state = jax.block_until_ready(train(params, state, jax.random.key(step)))
        step += 1
    evaluate = jax.jit(lambda params: unwrap(eqx.combine(params, static)).log_prob(p.x, p.context))
    return lambda: evaluate(params)


def zuko_spline(p: Conditional, seconds: float) -> Callable[[], Any]:
    """`zuko.flows.NSF` with its defaults, and the optimizer of its tutorials."""
    import torch
    import zuko

    tensors = lambda *leaves: [torch.tensor(np.asarray(leaf)) for leaf in leaves]
    (x, context), (new, new_context) = tensors(*p.train), tensors(p.x, p.context)
    torch.manual_seed(0)
    flow = zuko.flows.NSF(x.shape[1], context.shape[1])
    optimizer, end = torch.optim.Adam(flow.parameters(), lr=1e-3), time.perf_counter() + seconds
    while time.perf_counter() < end:
        rows = torch.randint(len(x), (BATCH,))
        loss = -flow(context[rows]).log_prob(x[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def evaluate():
        with torch.no_grad():
            return flow(new_context).log_prob(new).numpy()

    return evaluate
