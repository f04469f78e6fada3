"""The training step of a flow by each library in JAX; those in PyTorch are in `in_torch.py`.

A loss is a function of the parameters, the samples, the noise and a tolerance. Peers get FFJORD's
state, `z` and the log-determinant, in their fastest form: the estimate of the divergence is a
Jacobian-vector product.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxode
from benchmarks.harness.fairness import (
    EXACT,
    JaxStep,
    Step,
    double_precision,
    doubled,
    exact_gradient,
)
from benchmarks.harness.problems import FlowProblem, batched

AXIS = "batch"  # of devices


def flow_at(tolerance, dim: int, **options):
    return jaxode.cnf(
        jaxode.nn.field, jaxode.standard_normal(dim), rtol=tolerance, atol=tolerance,
        divergence=jaxode.divergence.hutchinson(), **options,
    )  # fmt: skip


def jaxode_loss(**options):
    def loss(params, x, key, tolerance):
        return flow_at(tolerance, x.shape[1], **options).nll(params, x, key=key)

    return loss


def jaxode_step(p: FlowProblem, **options) -> JaxStep:
    return JaxStep(jaxode_loss(**options), p.params, p.x, p.key)


def augmented(t, state, params, probe):
    """`dz/dt` and the estimate of the divergence, `v . df/dz v`, for the batch."""
    dz, jvp = jax.jvp(lambda z: batched(t, z, params), (state[0],), (probe,))
    return dz, jnp.sum(probe * jvp, axis=1)


def augmented_exact(t, state, params, probe):
    """`dz/dt` and the trace of the Jacobian."""
    del probe

    def one(z):
        f, jvp = jax.linearize(lambda z: params(t, z), z)
        return f, jnp.trace(jax.vmap(jvp)(jnp.eye(z.size, dtype=z.dtype)))

    return jax.vmap(one)(state[0])


def log_likelihoods(z, log_det):
    log_base = -0.5 * jnp.sum(z**2, axis=1) - 0.5 * z.shape[1] * np.log(2 * np.pi)
    return log_base + log_det


def negative_log_likelihood(z, log_det):
    return -jnp.mean(log_likelihoods(z, log_det))


def seminorm_backsolve(tolerance) -> diffrax.BacksolveAdjoint:
    """As diffrax advises: its backward error control does not see the parameters."""
    norm = diffrax.adjoint_rms_seminorm
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=norm)
    return diffrax.BacksolveAdjoint(stepsize_controller=controller)


def diffrax_loss(
    solver: Any = diffrax.Tsit5(),
    adjoint: Any = diffrax.RecursiveCheckpointAdjoint(),
    field=augmented,
    per_sample: bool = False,
    max_steps: int = 4096,
    dt0: float | None = None,
    value=negative_log_likelihood,
):
    """One step size for all samples or, by `jax.vmap`, one a sample.

    `adjoint` is one of diffrax, or makes one for a tolerance. Without a tolerance steps are `dt0`.
    The loss is `value(z, log_det)`.
    """

    def solve(params, x, probe, tolerance):
        term = diffrax.ODETerm(lambda t, state, args: field(t, state, *args))
        controller: Any = diffrax.ConstantStepSize()
        if tolerance is not None:
            controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        chosen: Any = adjoint(tolerance) if callable(adjoint) else adjoint
        start = (x, jnp.zeros(x.shape[0], x.dtype))
        solution: Any = diffrax.diffeqsolve(
            term, solver, 1.0, 0.0, dt0, start, args=(params, probe), adjoint=chosen,
            stepsize_controller=controller, max_steps=max_steps, throw=False,
        )  # fmt: skip
        return jax.tree.map(lambda leaf: leaf[0], solution.ys)

    def loss(params, x, probe, tolerance):
        if not per_sample:
            return value(*solve(params, x, probe, tolerance))
        row = lambda x, v: solve(params, x[None], v[None], tolerance)
        z, log_det = jax.vmap(row)(x, probe)
        return value(z[:, 0], log_det[:, 0])

    return loss


def diffrax_step(p: FlowProblem, *choice, **options) -> JaxStep:
    return JaxStep(diffrax_loss(*choice, **options), p.params, p.x, p.probe)


def odeint_loss(params, x, probe, tolerance):
    """By `jax.experimental.ode.odeint`, whose times increase and whose tolerance is known to the
    compiler."""
    arrays, static = eqx.partition(params, eqx.is_array)

    def backwards(state, s, arrays, probe):
        derivative = augmented(-s, state, eqx.combine(arrays, static), probe)
        return jax.tree.map(jnp.negative, derivative)

    start, times = (x, jnp.zeros(x.shape[0], x.dtype)), jnp.array([-1.0, 0.0])
    options = {"rtol": tolerance, "atol": tolerance}
    z, log_det = odeint(backwards, start, times, arrays, probe, **options)
    return negative_log_likelihood(z[-1], log_det[-1])


def odeint_step(p: FlowProblem) -> JaxStep:
    return JaxStep(odeint_loss, p.params, p.x, p.probe, static=True)


def exact(p: FlowProblem) -> list[np.ndarray]:
    return exact_gradient(lambda q: diffrax_step(q, diffrax.Dopri8()), p)


def jaxode_log_prob(p: FlowProblem) -> Step:
    def log_prob(params, x, key, tolerance):
        return flow_at(tolerance, x.shape[1]).log_prob(params, x, key=key)

    program = jax.jit(log_prob)
    return lambda tolerance: (None, [program(p.params, p.x, p.key, tolerance)])


def diffrax_log_prob(p: FlowProblem, *choice) -> Step:
    program = jax.jit(diffrax_loss(*choice, value=log_likelihoods))
    return lambda tolerance: (None, [program(p.params, p.x, p.probe, tolerance)])


def exact_log_prob(p: FlowProblem) -> list[np.ndarray]:
    with double_precision():
        return [np.asarray(diffrax_log_prob(doubled(p), diffrax.Dopri8())(EXACT)[1][0])]


@jax.jit
def exact_nll(params, x, tolerance=1e-6, key=None):
    """Nats a sample of a flow of jaxode, with the exact trace, or with one probe from a key."""
    divergence = jaxode.divergence.exact() if key is None else jaxode.divergence.hutchinson()
    options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "divergence": divergence}
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(x.shape[1]), **options)
    return flow.nll(params, x, key=key)


def over_devices(p: FlowProblem, mesh: Mesh) -> FlowProblem:
    """The samples split over the devices, and all else on each."""
    split, replicated = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
    params, key = jax.device_put((p.params, p.key), replicated)
    x, probe = jax.device_put((p.x, p.probe), split)
    return FlowProblem(params, x, probe, key)


def shard_mapped(loss, mesh: Mesh, *specs):
    """Value and gradient of the mean of a loss over the devices; `specs` of its arguments."""
    mean = lambda *args: jax.lax.pmean(loss(*args), AXIS)
    return jax.shard_map(jax.value_and_grad(mean), mesh=mesh, in_specs=specs, out_specs=P())


def shard_mapped_untyped(loss, mesh: Mesh, *specs):
    """The same for the loops of peers, which do not know over which axes an array varies."""
    local = lambda *args: jax.lax.pmean(jax.value_and_grad(loss)(*args), AXIS)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)


def on_devices(mesh: Mesh) -> dict[str, Any]:
    """Compiled training steps by contender, of the arguments of a loss over the devices."""
    rows, whole = P(AXIS), P()
    typed = lambda loss: jax.jit(shard_mapped(loss, mesh, whole, rows, whole, whole))

    def by_odeint(params, x, probe, tolerance):
        loss = at(tolerance, odeint_loss)
        return shard_mapped_untyped(loss, mesh, whole, rows, rows)(params, x, probe)

    return {
        "jaxode": typed(jaxode_loss()),
        "jaxode, joint steps": typed(jaxode_loss(axis_name=AXIS)),
        # https://github.com/patrick-kidger/diffrax/issues/765
        "diffrax, jit": jax.jit(
            jax.value_and_grad(diffrax_loss()), out_shardings=NamedSharding(mesh, whole)
        ),
        "jax odeint, shard_map": jax.jit(by_odeint, static_argnums=3),
    }


def at(tolerance: float, loss):
    """The loss at a tolerance, without that argument."""
    return lambda *args: loss(*args, tolerance)
