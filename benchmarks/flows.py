"""The flows that several benchmarks train, and the training step of each library.

All steps have the same weights, data, probe and network: jaxode's own ConcatSquash, written again
in PyTorch below. Peers get FFJORD's state, `z` and the log-determinant, in their fastest form:
in JAX the estimate of the divergence is a Jacobian-vector product.
"""

from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint

import jaxode
from benchmarks.fairness import check_equal, double_precision

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
        return Problem(*arrays, self.key, self.span)


def eight_gaussians(rng: np.random.Generator, n: int) -> np.ndarray:
    angle = 2 * np.pi * rng.integers(0, 8, n) / 8
    centers = 2.8 * np.stack([np.cos(angle), np.sin(angle)], 1)
    return (centers + 0.3 * rng.standard_normal((n, 2))).astype(np.float32)


def network(workload: Workload):
    key = jax.random.key(0)
    m = jaxode.nn.ConcatSquash(workload.dim, workload.widths, key=key, activation=jax.nn.softplus)
    if not workload.trained:
        return eqx.tree_at(lambda m: m.weight, m, 10 * m.weight)
    paths, structure = jax.tree_util.tree_flatten_with_path(m)
    with np.load(WEIGHTS) as saved:
        leaves = [jnp.asarray(saved[jax.tree_util.keystr(path)]) for path, _ in paths]
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


def jaxode_step(p: Problem, divergence=None, **options):
    divergence = jaxode.divergence.hutchinson() if divergence is None else divergence
    base = jaxode.standard_normal(p.x.shape[1])

    def loss(params, x, key, tolerance):
        flow = jaxode.cnf(
            jaxode.nn.field, base, t1=p.span, divergence=divergence, rtol=tolerance,
            atol=tolerance, **options,
        )  # fmt: skip
        return flow.nll(params, x, key=key)

    step = jax.jit(jax.value_and_grad(loss))
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


def diffrax_loss(solver, adjoint, field=augmented, span=1.0, per_sample=False):
    """The loss of diffrax: one system with one step size, or `jax.vmap` over the samples."""

    def solve(params, x, probe, tolerance):
        term = diffrax.ODETerm(lambda t, state, args: field(t, state, *args))
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        start = (x, jnp.zeros(x.shape[0], x.dtype))
        solution = diffrax.diffeqsolve(
            term, solver, span, 0.0, None, start, args=(params, probe), adjoint=adjoint,
            stepsize_controller=controller, max_steps=4096,
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
    loss = diffrax_loss(solver, adjoint, span=p.span, **options)
    step = jax.jit(jax.value_and_grad(loss))
    return lambda tolerance: _leaves(step(p.params, p.x, p.probe, tolerance))


def odeint_step(p: Problem):
    """`jax.experimental.ode.odeint`, which takes increasing times and tolerances known to trace."""

    def loss(params, x, probe, tolerance):
        arrays, static = eqx.partition(params, eqx.is_array)

        def backwards(state, s, arrays, probe):
            derivative = augmented(-s, state, eqx.combine(arrays, static), probe)
            return jax.tree.map(jnp.negative, derivative)

        start, times = (x, jnp.zeros(x.shape[0], x.dtype)), jnp.array([-p.span, 0.0])
        options = {"rtol": tolerance, "atol": tolerance}
        z, log_det = odeint(backwards, start, times, arrays, probe, **options)
        return negative_log_likelihood(z[-1], log_det[-1])

    step = jax.jit(jax.value_and_grad(loss), static_argnums=3)
    return lambda tolerance: _leaves(step(p.params, p.x, p.probe, tolerance))


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


# PyTorch. A module is imported when it is needed, so that JAX alone will do for the rest.


class TorchField:
    """The network and FFJORD's dynamics on tensors, with the leaves of the JAX module in order."""

    def __init__(self, params):
        import torch

        tensor = lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True)
        self.leaves = [tensor(leaf) for leaf in jax.tree.leaves(params)]
        names = [
            jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(params)[0]
        ]
        named = dict(zip(names, self.leaves, strict=True))
        each = ("weight", "bias", "gate", "shift")
        hidden = range(len(params.hidden))
        self.hidden = [[named[f".hidden[{i}].{name}"] for name in each] for i in hidden]
        self.last = named[".weight"], named[".bias"]

    def __call__(self, t, z):
        """`t` is a scalar, or `[batch, 1]`."""
        import torch

        for weight, bias, gate, shift in self.hidden:
            gated = torch.nn.functional.linear(z, weight, bias) * torch.sigmoid(
                t * gate[0] + gate[1]
            )
            z = torch.nn.functional.softplus(gated + t * shift, threshold=1e9)
        return torch.nn.functional.linear(z, *self.last)

    def augmented(self, t, z, probe):
        """FFJORD's `divergence_approx`: a vector-Jacobian product, kept for differentiation."""
        import torch

        with torch.enable_grad():
            z = z if z.requires_grad else z.requires_grad_(True)
            dz = self(t, z)
            vjp = torch.autograd.grad(dz, z, probe, create_graph=True)[0]
        return dz, (vjp * probe).sum(1)


def torch_problem(p: Problem):
    import torch

    tensor = lambda leaf: torch.tensor(np.asarray(leaf))
    return TorchField(p.params), tensor(p.x), tensor(p.probe)


def torch_step(field: TorchField, end):
    """A step from `end(tolerance) -> (z, log_det)` at the time of the base density."""
    import torch

    def step(tolerance):
        z, log_det = end(tolerance)
        log_base = -0.5 * (z**2).sum(1) - 0.5 * z.shape[1] * np.log(2 * np.pi)
        loss = -(log_base + log_det).mean()
        gradient = torch.autograd.grad(loss, field.leaves, allow_unused=True)
        pairs = zip(gradient, field.leaves, strict=True)
        gradient = [torch.zeros_like(w) if g is None else g for g, w in pairs]
        return loss.item(), [g.numpy() for g in gradient]

    return step


def torchdiffeq_step(p: Problem):
    import torch
    import torchdiffeq

    field, x, probe = torch_problem(p)

    class Dynamics(torch.nn.Module):
        def forward(self, t, state):
            return field.augmented(t, state[0], probe)

    def end(tolerance):
        start = (x, torch.zeros(x.shape[0], dtype=x.dtype))
        z, log_det = torchdiffeq.odeint_adjoint(
            Dynamics(), start, torch.tensor([p.span, 0.0], dtype=x.dtype), rtol=tolerance,
            atol=tolerance, method="dopri5", adjoint_params=tuple(field.leaves),
        )  # fmt: skip
        return z[-1], log_det[-1]

    return torch_step(field, end)


def zuko_step(p: Problem):
    import torch
    import zuko

    field, x, probe = torch_problem(p)

    def end(tolerance):
        start = (x.clone(), torch.zeros(x.shape[0], dtype=x.dtype))
        dynamics = lambda t, z, log_det: field.augmented(t, z, probe)
        return zuko.utils.odeint(
            dynamics, start, p.span, 0.0, field.leaves, atol=tolerance, rtol=tolerance
        )

    return torch_step(field, end)


def torchode_step(p: Problem):
    """torchode steps each sample by itself, and differentiates through the steps."""
    import torch
    import torchode

    field, x, probe = torch_problem(p)

    def dynamics(t, state):
        dz, divergence = field.augmented(t[:, None], state[:, :-1], probe)
        return torch.cat([dz, divergence[:, None]], 1)

    term = torchode.ODETerm(dynamics)

    def end(tolerance):
        controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Tsit5(term=term), controller)
        times = torch.tensor([p.span, 0.0], dtype=x.dtype).expand(x.shape[0], 2)
        start = torch.cat([x, torch.zeros(x.shape[0], 1, dtype=x.dtype)], 1)
        start_end = {"t_start": times[:, 0], "t_end": times[:, 1]}
        ys = solver.solve(torchode.InitialValueProblem(y0=start, t_eval=times, **start_end)).ys
        return ys[:, -1, :-1], ys[:, -1, -1]

    return torch_step(field, end)


def check_networks(p: Problem) -> None:
    """Raise unless field and estimate in PyTorch equal those in JAX, in float64."""
    import torch

    with double_precision():
        q = p.double()
        field, x, probe = torch_problem(q)
        for t in (0.0, 0.37, 1.0):
            dz, divergence = augmented(jnp.asarray(t), (q.x,), q.params, q.probe)
            # FFJORD's vector-Jacobian product and ours the other way are the same number.
            other, estimate = field.augmented(torch.tensor(t, dtype=x.dtype), x.clone(), probe)
            check_equal({"JAX": dz, "PyTorch": other.detach().numpy()})
            check_equal({"JAX": divergence, "PyTorch": estimate.detach().numpy()})


def train(steps: int = 1500) -> None:
    """Make `benchmarks/data/eight_gaussians.npz`: `python -m benchmarks.flows`."""
    import optax

    m = jaxode.nn.ConcatSquash(2, (64, 64, 64), key=jax.random.key(0), activation=jax.nn.softplus)
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
    np.savez_compressed(WEIGHTS, **{jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in paths})


if __name__ == "__main__":
    train()
