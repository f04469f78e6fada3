"""The flows that several benchmarks train, and the training step of each library.

All steps have the same weights, data, probe and network: one of `jaxode.nn`, or one as users write
it; `torch_flows.py` has both in PyTorch. Peers get FFJORD's state, `z` and the log-determinant, in
their fastest form: in JAX the estimate of the divergence is a Jacobian-vector product.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.ode import odeint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxode
from benchmarks.fairness import EXACT, double_precision

AXIS = "batch"  # of devices
ROWS, RATE = 256, 3e-3  # of a training


class Workload(NamedTuple):
    """A flow trained by matching on eight Gaussians, and a batch of their samples."""

    dim: int
    batch: int
    widths: tuple[int, ...]
    own: bool = False
    """A network as a user writes it, not one of `jaxode.nn`."""
    steps: int = 3000
    """Of matching; some seconds."""


class Plain(eqx.Module):
    """A multilayer perceptron, the time beside the state."""

    layers: list[eqx.nn.Linear]
    activation: Callable[[jax.Array], jax.Array] = eqx.field(static=True)

    def __init__(self, dim: int, widths: tuple[int, ...], key, activation=jax.nn.softplus):
        self.activation = activation
        sizes = [(dim + 1, widths[0]), *itertools.pairwise(widths), (widths[-1], dim)]
        keys = jax.random.split(key, len(sizes))
        pairs = zip(sizes, keys, strict=True)
        self.layers = [eqx.nn.Linear(*size, key=key) for size, key in pairs]

    def __call__(self, t, y):
        x = jnp.append(y, t)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Problem(NamedTuple):
    params: Any
    x: Any
    probe: Any
    """One random sign for each entry of `x`: the one that jaxode draws from `key`."""
    key: Any

    def double(self) -> "Problem":
        """The same numbers in float64; call it within `double_precision`."""
        cast = lambda leaf: jnp.asarray(leaf, jnp.float64)
        arrays = jax.tree.map(cast, (self.params, self.x, self.probe))
        return Problem(*arrays, self.key)


def eight_gaussians(rng: np.random.Generator, n: int, dim: int = 2) -> np.ndarray:
    """On a ring in two dimensions; in more, around points that are drawn at random."""
    angle = 2 * np.pi * np.arange(8) / 8
    centers = 2.8 * np.stack([np.cos(angle), np.sin(angle)], 1)
    if dim > 2:
        centers = 2 * np.random.default_rng(0).standard_normal((8, dim))
    chosen = centers[rng.integers(0, 8, n)]
    return (chosen + 0.3 * rng.standard_normal((n, dim))).astype(np.float32)


def network(workload: Workload):
    """Before its training."""
    key = jax.random.key(0)
    if workload.own:
        return Plain(workload.dim, workload.widths, key)
    options: dict[str, Any] = {"key": key, "activation": jaxode.nn.softplus}
    return jaxode.nn.ConcatSquash(workload.dim, workload.widths, **options)


def trained(params, loss, steps: int):
    """The parameters after a training on `loss(params, key)`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0][0])
    return run((params, optimizer.init(params)))


def problem(workload: Workload) -> Problem:
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(workload.dim))
    data = jnp.asarray(eight_gaussians(np.random.default_rng(0), 50_000, workload.dim))

    def matching(params, key):
        rows = data[jax.random.randint(key, (ROWS,), 0, len(data))]
        return flow.matching_loss(params, rows, key=key)

    params = trained(network(workload), matching, workload.steps)
    rng, key = np.random.default_rng(1), jax.random.key(2)
    x = jnp.asarray(eight_gaussians(rng, workload.batch, workload.dim))
    return Problem(params, x, probe_of_jaxode(x, key), key)


def probe_of_jaxode(x: jax.Array, key: jax.Array) -> jax.Array:
    """The signs with which `flow.nll(..., key=key)` estimates the divergence, `[batch, dim]`.

    Read off its results: for the field `f(z) = e_0 z_k` the estimate is `v_0 v_k`, and the
    log-determinant is minus that. The sign of the whole probe does not matter to an estimate.
    """
    dim = x.shape[1]
    field = lambda t, z, a: jnp.zeros_like(z).at[0].set(a @ z)
    estimate = jaxode.divergence.hutchinson()
    flow = jaxode.cnf(field, jaxode.standard_normal(dim), divergence=estimate, steps=1)
    products = lambda a: -flow.nll_and_stats(a, x, key=key)[1].log_det
    probe = jnp.sign(jax.lax.map(jax.jit(products), jnp.eye(dim, dtype=x.dtype))).T
    return probe.at[:, 0].set(1)


def jaxode_loss(p: Problem, divergence=None, **options):
    """`loss(params, x, key, tolerance)`."""
    divergence = jaxode.divergence.hutchinson() if divergence is None else divergence
    base = jaxode.standard_normal(p.x.shape[1])

    def loss(params, x, key, tolerance):
        flow = jaxode.cnf(
            jaxode.nn.field, base, divergence=divergence, rtol=tolerance,
            atol=tolerance, **options,
        )  # fmt: skip
        return flow.nll(params, x, key=key)

    return loss


def jaxode_step(p: Problem, divergence=None, **options):
    step = jax.jit(jax.value_and_grad(jaxode_loss(p, divergence, **options)))
    return lambda tolerance: _leaves(step(p.params, p.x, p.key, tolerance))


def augmented(t, state, params, probe):
    """`dz/dt` and the estimate of the divergence, `v . df/dz v`, for the batch."""
    f = lambda z: jax.vmap(lambda z: params(t, z))(z)
    dz, jvp = jax.jvp(f, (state[0],), (probe,))
    return dz, jnp.sum(probe * jvp, axis=1)


def augmented_exact(t, state, params, probe):
    """`dz/dt` and the trace of the Jacobian."""
    del probe

    def one(z):
        f, jvp = jax.linearize(lambda z: params(t, z), z)
        return f, jnp.trace(jax.vmap(jvp)(jnp.eye(z.size, dtype=z.dtype)))

    return jax.vmap(one)(state[0])


def negative_log_likelihood(z, log_det):
    log_base = -0.5 * jnp.sum(z**2, axis=1) - 0.5 * z.shape[1] * np.log(2 * np.pi)
    return -jnp.mean(log_base + log_det)


def seminorm_backsolve(tolerance) -> diffrax.BacksolveAdjoint:
    """As diffrax advises: its backward error control does not see the parameters."""
    norm = diffrax.adjoint_rms_seminorm
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=norm)
    return diffrax.BacksolveAdjoint(stepsize_controller=controller)


def diffrax_loss(
    p: Problem, solver, adjoint, field=augmented, per_sample=False, max_steps=4096, dt0=None
):
    """`loss(params, x, probe, tolerance)`, with one step size or, by `jax.vmap`, one a sample.

    `adjoint` is an adjoint of diffrax, or makes one for a tolerance.
    """

    def solve(params, x, probe, tolerance):
        term = diffrax.ODETerm(lambda t, state, args: field(t, state, *args))
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        start = (x, jnp.zeros(x.shape[0], x.dtype))
        solution = diffrax.diffeqsolve(
            term, solver, 1.0, 0.0, dt0, start, args=(params, probe),
            adjoint=adjoint(tolerance) if callable(adjoint) else adjoint,
            stepsize_controller=controller, max_steps=max_steps, throw=False,
        )  # fmt: skip
        return jax.tree.map(lambda leaf: leaf[0], solution.ys)

    def loss(params, x, probe, tolerance):
        if not per_sample:
            return negative_log_likelihood(*solve(params, x, probe, tolerance))
        row = lambda x, v: solve(params, x[None], v[None], tolerance)
        z, log_det = jax.vmap(row)(x, probe)
        return negative_log_likelihood(z[:, 0], log_det[:, 0])

    return loss


def diffrax_step(p: Problem, solver, adjoint, **options):
    step = jax.jit(jax.value_and_grad(diffrax_loss(p, solver, adjoint, **options)))
    return lambda tolerance: _leaves(step(p.params, p.x, p.probe, tolerance))


def odeint_loss(p: Problem):
    """`loss(params, x, probe, tolerance)` with `jax.experimental.ode.odeint`, whose times increase
    and whose tolerance is known to the compiler."""

    def loss(params, x, probe, tolerance):
        arrays, static = eqx.partition(params, eqx.is_array)

        def backwards(state, s, arrays, probe):
            derivative = augmented(-s, state, eqx.combine(arrays, static), probe)
            return jax.tree.map(jnp.negative, derivative)

        start, times = (x, jnp.zeros(x.shape[0], x.dtype)), jnp.array([-1.0, 0.0])
        options = {"rtol": tolerance, "atol": tolerance}
        z, log_det = odeint(backwards, start, times, arrays, probe, **options)
        return negative_log_likelihood(z[-1], log_det[-1])

    return loss


def odeint_step(p: Problem):
    step = jax.jit(jax.value_and_grad(odeint_loss(p)), static_argnums=3)
    return lambda tolerance: _leaves(step(p.params, p.x, p.probe, tolerance))


def over_devices(p: Problem, mesh: Mesh) -> Problem:
    """The samples split over the devices, and all else on each."""
    split, replicated = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
    params, key = jax.device_put((p.params, p.key), replicated)
    x, probe = jax.device_put((p.x, p.probe), split)
    return Problem(params, x, probe, key)


def shard_mapped(loss, mesh: Mesh, *specs):
    """Value and gradient of the mean of a loss over the devices; `specs` of its arguments."""
    mean = lambda *args: jax.lax.pmean(loss(*args), AXIS)
    return jax.shard_map(jax.value_and_grad(mean), mesh=mesh, in_specs=specs, out_specs=P())


def shard_mapped_untyped(loss, mesh: Mesh, *specs):
    """The same for the loops of peers, which do not know over which axes an array varies."""
    local = lambda *args: jax.lax.pmean(jax.value_and_grad(loss)(*args), AXIS)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)


def partitioned(loss, mesh: Mesh):
    """Value and gradient, divided by `jit` as the samples are."""
    return jax.jit(jax.value_and_grad(loss), out_shardings=NamedSharding(mesh, P()))


def _leaves(outcome):
    loss, gradient = outcome
    return loss, jax.tree.leaves(gradient)


def reference(p: Problem) -> list[np.ndarray]:
    """The gradient in float64, by diffrax's Dopri8: not by the library under test."""
    with double_precision():
        q = p.double()
        adjoint = diffrax.RecursiveCheckpointAdjoint()
        step = diffrax_step(q, diffrax.Dopri8(), adjoint)
        return [np.asarray(leaf) for leaf in step(EXACT)[1]]
