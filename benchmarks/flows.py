"""The flows that several benchmarks train, and the training step of each library.

All steps have the same weights, data, probe and network: jaxode's own ConcatSquash, which
`torch_flows.py` writes again in PyTorch. Peers get FFJORD's state, `z` and the log-determinant, in
their fastest form: in JAX the estimate of the divergence is a Jacobian-vector product.
"""

from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxode
from benchmarks.fairness import double_precision

AXIS = "batch"  # of devices
WEIGHTS = Path(__file__).parent / "data" / "eight_gaussians.npz"


class Workload(NamedTuple):
    dim: int
    batch: int
    widths: tuple[int, ...]
    trained: bool = False
    """On 8 Gaussians; otherwise initial weights, those of the last layer times ten."""
    span: float = 1.0


class Problem(NamedTuple):
    params: Any
    x: Any
    probe: Any
    """One random sign for each entry of `x`: the one that jaxode draws from `key`."""
    key: Any
    span: float

    def double(self) -> "Problem":
        """The same numbers in float64; call it within `double_precision`."""
        cast = lambda leaf: jnp.asarray(leaf, jnp.float64)
        arrays = jax.tree.map(cast, (self.params, self.x, self.probe))
        return Problem(arrays[0], arrays[1], arrays[2], self.key, self.span)


def eight_gaussians(rng: np.random.Generator, n: int) -> np.ndarray:
    angle = 2 * np.pi * rng.integers(0, 8, n) / 8
    centers = 2.8 * np.stack([np.cos(angle), np.sin(angle)], 1)
    return (centers + 0.3 * rng.standard_normal((n, 2))).astype(np.float32)


def network(workload: Workload, activation=jaxode.nn.softplus):
    key = jax.random.key(0)
    m = jaxode.nn.ConcatSquash(workload.dim, workload.widths, key=key, activation=activation)
    if not workload.trained:
        return eqx.tree_at(lambda m: m.weight, m, 10 * m.weight)
    paths, structure = jax.tree_util.tree_flatten_with_path(m)
    with np.load(WEIGHTS) as saved:
        leaves = [jnp.asarray(saved[jax.tree_util.keystr(path)]) for path, _ in paths]
    for leaf, (path, like) in zip(leaves, paths, strict=True):
        if leaf.shape != like.shape:
            raise ValueError(f"{WEIGHTS}: {jax.tree_util.keystr(path)} has shape {leaf.shape}.")
    return jax.tree.unflatten(structure, leaves)


def problem(workload: Workload) -> Problem:
    rng = np.random.default_rng(1)
    shape = (workload.batch, workload.dim)
    x = eight_gaussians(rng, workload.batch) if workload.trained else rng.normal(size=shape)
    x, key = jnp.asarray(x, jnp.float32), jax.random.key(2)
    return Problem(network(workload), x, probe_of_jaxode(x, key), key, workload.span)


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
            jaxode.nn.field, base, t1=p.span, divergence=divergence, rtol=tolerance,
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
            term, solver, p.span, 0.0, dt0, start, args=(params, probe),
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

        start, times = (x, jnp.zeros(x.shape[0], x.dtype)), jnp.array([-p.span, 0.0])
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
    return Problem(params, x, probe, key, p.span)


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


def reference(p: Problem, field=augmented, tolerance: float = 1e-11) -> list[np.ndarray]:
    """The gradient in float64, by diffrax's Dopri8 at 1e-11: not by the library under test."""
    with double_precision():
        q = p.double()
        adjoint = diffrax.RecursiveCheckpointAdjoint()
        step = diffrax_step(q, diffrax.Dopri8(), adjoint, field=field)
        return [np.asarray(leaf) for leaf in step(tolerance)[1]]


def train(steps: int = 1500) -> None:
    """Make `benchmarks/data/eight_gaussians.npz`: `python -m benchmarks.flows`."""
    import optax

    m: Any = jaxode.nn.ConcatSquash(
        2, (64, 64, 64), key=jax.random.key(0), activation=jaxode.nn.softplus
    )
    flow = jaxode.cnf(
        jaxode.nn.field, jaxode.standard_normal(2), divergence=jaxode.divergence.exact()
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    state, rng = optimizer.init(m), np.random.default_rng(0)

    @jax.jit
    def step(m, state, x):
        loss, gradient = jax.value_and_grad(flow.nll)(m, x)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(m, updates), state, loss

    for i in range(steps):
        m, state, loss = step(m, state, jnp.asarray(eight_gaussians(rng, 512)))
        if i % 100 == 99:
            print(i + 1, float(loss))
    paths = jax.tree_util.tree_flatten_with_path(m)[0]
    WEIGHTS.parent.mkdir(exist_ok=True)
    arrays: dict[str, Any] = {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in paths}
    np.savez_compressed(WEIGHTS, **arrays)


if __name__ == "__main__":
    train()
