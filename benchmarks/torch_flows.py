"""The same flows in PyTorch: torchdiffeq with FFJORD's dynamics, zuko and torchode.

Imported where it is used, so that the other benchmarks run without PyTorch.
"""

# torchode and zuko annotate what they take more narrowly than they work.
# pyright: reportArgumentType=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.fairness import check_equal, double_precision
from benchmarks.flows import Plain, Problem, augmented, augmented_exact
from jaxode.nn.residual import WAVES


class TorchField:
    """The network and FFJORD's dynamics on tensors, with the leaves of the JAX module in order."""

    def __init__(self, params):
        tensor = lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True)
        self.leaves = [tensor(leaf) for leaf in jax.tree.leaves(params)]
        paths = jax.tree_util.tree_flatten_with_path(params)[0]
        names = [jax.tree_util.keystr(path) for path, _ in paths]
        named = dict(zip(names, self.leaves, strict=True))
        prefixes = [f".layers[{i}]" for i in range(len(named))]
        if not isinstance(params, Plain):
            prefixes = [*(f".hidden[{i}]" for i in range(len(params.hidden))), ""]
        parts = ("weight", "bias", "gate", "shift")
        layers = [{part: named.get(f"{prefix}.{part}") for part in parts} for prefix in prefixes]
        self.layers = [layer for layer in layers if layer["weight"] is not None]
        self.beside = isinstance(params, Plain)  # the time is beside the state
        self.activation = torch.tanh
        if params.activation is not jnp.tanh:
            self.activation = functools.partial(torch.nn.functional.softplus, threshold=1e9)

    def __call__(self, t, z):
        """`t` is a scalar, or `[batch, 1]`."""
        if self.beside:
            z = torch.cat([z, torch.as_tensor(t, dtype=z.dtype).expand(len(z), 1)], 1)
        for i, layer in enumerate(self.layers):
            z = z if i == 0 else self.activation(z)
            z = torch.nn.functional.linear(z, layer["weight"], layer["bias"])
            if layer["gate"] is not None:
                z = z * torch.sigmoid(t * layer["gate"][0] + layer["gate"][1])
            if layer["shift"] is not None:
                z = z + t * layer["shift"]
        return z

    def augmented(self, t, z, probe):
        """FFJORD's `divergence_approx`: a vector-Jacobian product, kept for differentiation.

        Without a probe its `divergence_bf`, the exact trace, row by row.
        """
        with torch.enable_grad():
            z = z if z.requires_grad else z.requires_grad_(True)
            dz = self(t, z)
            grad = lambda output, v: torch.autograd.grad(output, z, v, create_graph=True)[0]
            if probe is not None:
                return dz, (grad(dz, probe) * probe).sum(1)
            return dz, sum(grad(dz[:, i].sum(), None)[:, i] for i in range(z.shape[1]))


def torch_problem(p: Problem):
    tensor = lambda leaf: torch.tensor(np.asarray(leaf))
    return TorchField(p.params), tensor(p.x), tensor(p.probe)


def negative_log_likelihood(z, log_det):
    log_base = -0.5 * (z**2).sum(1) - 0.5 * z.shape[1] * np.log(2 * np.pi)
    return -(log_base + log_det).mean()


def torch_step(field: TorchField, end):
    """A step from `end(tolerance) -> (z, log_det)` at the time of the base density."""

    def step(tolerance):
        loss = negative_log_likelihood(*end(tolerance))
        gradient = torch.autograd.grad(loss, field.leaves, allow_unused=True)
        pairs = zip(gradient, field.leaves, strict=True)
        gradient = [torch.zeros_like(w) if g is None else g for g, w in pairs]
        return loss.item(), [g.numpy() for g in gradient]

    return step


def torchdiffeq_end(field: TorchField, x, probe, rtol, atol, adjoint=True):
    """FFJORD's solve: dopri5 and the adjoint ODE of torchdiffeq, on `(z, log_det)`."""
    import torchdiffeq

    class Dynamics(torch.nn.Module):
        def forward(self, t, state):
            return field.augmented(t, state[0], probe)

    start = (x, torch.zeros(x.shape[0], dtype=x.dtype))
    solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    options = {"adjoint_params": tuple(field.leaves)} if adjoint else {}
    z, log_det = solve(
        Dynamics(), start, torch.tensor([1.0, 0.0], dtype=x.dtype), rtol=rtol, atol=atol,
        method="dopri5", **options,
    )  # fmt: skip
    return z[-1], log_det[-1]


def zuko_end(field: TorchField, x, probe, rtol, atol):
    """As its `FreeFormJacobianTransform`, whose error control sees a hundredth of the trace."""
    import zuko

    def dynamics(t, z, log_det):
        dz, divergence = field.augmented(t, z, probe)
        return dz, 1e-2 * divergence

    start = (x.clone(), torch.zeros(x.shape[0], dtype=x.dtype))
    z, scaled = zuko.utils.odeint(dynamics, start, 1.0, 0.0, field.leaves, atol=atol, rtol=rtol)
    return z, 1e2 * scaled


def torchdiffeq_step(p: Problem, adjoint: bool = True):
    field, x, probe = torch_problem(p)
    return torch_step(field, lambda tol: torchdiffeq_end(field, x, probe, tol, tol, adjoint))


def zuko_step(p: Problem):
    field, x, probe = torch_problem(p)
    return torch_step(field, lambda tol: zuko_end(field, x, probe, tol, tol))


def torchode_step(p: Problem):
    """torchode steps each sample by itself, and differentiates through the steps."""
    import torchode

    field, x, probe = torch_problem(p)

    def dynamics(t, state):
        dz, divergence = field.augmented(t[:, None], state[:, :-1], probe)
        return torch.cat([dz, divergence[:, None]], 1)

    term = torchode.ODETerm(dynamics)

    def end(tolerance):
        controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Tsit5(term=term), controller)
        times = torch.tensor([1.0, 0.0], dtype=x.dtype).expand(x.shape[0], 2)
        start = torch.cat([x, torch.zeros(x.shape[0], 1, dtype=x.dtype)], 1)
        start_end = {"t_start": times[:, 0], "t_end": times[:, 1]}
        ys = solver.solve(torchode.InitialValueProblem(y0=start, t_eval=times, **start_end)).ys
        return ys[:, -1, :-1], ys[:, -1, -1]

    return torch_step(field, end)


def check_networks(p: Problem) -> None:
    """Raise unless field and estimate in PyTorch equal those in JAX, in float64."""
    with double_precision():
        q = p.double()
        field, x, probe = torch_problem(q)
        for t in (0.0, 0.37, 1.0):
            dz, divergence = augmented(jnp.asarray(t), (q.x,), q.params, q.probe)
            # FFJORD's vector-Jacobian product and ours the other way are the same number.
            other, estimate = field.augmented(torch.tensor(t, dtype=x.dtype), x.clone(), probe)
            check_equal({"JAX": dz, "PyTorch": other.detach().numpy()})
            check_equal({"JAX": divergence, "PyTorch": estimate.detach().numpy()})
            _, exact = augmented_exact(jnp.asarray(t), (q.x,), q.params, None)
            check_equal({"JAX": exact, "PyTorch": field.augmented(t, x, None)[1].detach().numpy()})


class TorchResidual:
    """`jaxode.nn.Residual` on tensors, with its weights and leaves in order."""

    def __init__(self, params):
        tensor = lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True)
        self.network = jax.tree.map(tensor, params)
        self.leaves = jax.tree.leaves(self.network)

    def in_jax(self, leaves):
        arrays = [jnp.asarray(leaf.detach().numpy()) for leaf in leaves]
        return jax.tree.unflatten(jax.tree.structure(self.network), arrays)

    def __call__(self, t, z):
        """`t` is `[batch, 1]`."""
        m, silu = self.network, torch.nn.functional.silu
        affine = lambda dense, x: torch.nn.functional.linear(x, dense.weight, dense.bias)
        angles = torch.pi * t * torch.arange(1, WAVES + 1, dtype=z.dtype)
        known = torch.cat([torch.sin(angles), torch.cos(angles)], 1)
        h = affine(m.first, z)
        for block, modulation in zip(m.blocks, m.modulation, strict=True):
            a, b = affine(modulation, known).chunk(2, dim=1)
            h = h + affine(block, silu((1 + a) * h + b))
        return affine(m.last, silu(h)) + affine(m.scale, known) * z
