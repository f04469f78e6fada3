"""The same problems in PyTorch: torchdiffeq with FFJORD's dynamics, zuko and torchode.

Imported where it is used, so that the other benchmarks run without PyTorch.
"""

# torchode and zuko annotate what they take more narrowly than they work.
# pyright: reportArgumentType=false

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.functional import gelu, linear, pad, silu, softplus, unfold

from benchmarks.harness.fairness import Step, check_equal, double_precision, doubled
from benchmarks.harness.problems import Conditional, FlowProblem, OdeProblem, Plain, Series, batched
from benchmarks.peers.flows import augmented, augmented_exact
from benchmarks.peers.odes import series_loss
from jaxode.nn import Mixer, Residual
from jaxode.nn.base import WAVES
from jaxode.nn.residual import LARGEST_ACTIVATION

ACTIVATIONS = {jnp.tanh: torch.tanh, jax.nn.gelu: partial(gelu, approximate="tanh")}


def tensor(array) -> torch.Tensor:
    return torch.tensor(np.asarray(array))


class TorchField:
    """A network of JAX on tensors, with its leaves in order; and FFJORD's dynamics."""

    def __init__(self, params: Any):
        self.network: Any = jax.tree.map(lambda leaf: tensor(leaf).requires_grad_(), params)
        self.leaves: list[torch.Tensor] = jax.tree.leaves(self.network)
        self.activation: Any = partial(softplus, threshold=1e9)
        if params.activation in ACTIVATIONS:
            self.activation = ACTIVATIONS[params.activation]
        self.field = FIELDS.get(type(params), _squash)

    def __call__(self, t, z, *context) -> torch.Tensor:
        """`t` is a scalar, or `[batch, 1]`."""
        return self.field(self.network, self.activation, t, z, *context)

    def in_jax(self, leaves) -> Any:
        arrays = [jnp.asarray(leaf.detach().numpy()) for leaf in leaves]
        return jax.tree.unflatten(jax.tree.structure(self.network), arrays)

    def augmented(self, t, z, probe, create_graph=True):
        """FFJORD's `divergence_approx`: a vector-Jacobian product, kept for differentiation.

        Without a probe its `divergence_bf`, the exact trace, row by row.
        """
        with torch.enable_grad():
            z = z if z.requires_grad else z.requires_grad_(True)
            dz = self(t, z)
            grad = lambda output, v: torch.autograd.grad(output, z, v, create_graph=create_graph)[0]
            if probe is not None:
                return dz, (grad(dz, probe) * probe).sum(1)
            diagonal = [grad(dz[:, i].sum(), None)[:, i] for i in range(z.shape[1])]
            return dz, torch.stack(diagonal).sum(0)


def _beside(t, z):
    return torch.as_tensor(t, dtype=z.dtype).expand(len(z), 1)


def _plain(m, activation, t, z, *context):
    z = torch.cat([z, *context, _beside(t, z)], 1)
    for layer in m.layers[:-1]:
        z = activation(linear(z, layer.weight, layer.bias))
    return linear(z, m.layers[-1].weight, m.layers[-1].bias)


def _squash(m, activation, t, z):
    """A network of `jaxode.nn` with a closed form, without a context."""
    for layer in m.hidden:
        z = linear(z, layer.weight, layer.bias)
        if layer.gate is not None:
            z = z * torch.sigmoid(t * layer.gate[0] + layer.gate[1])
        if layer.shift is not None:
            z = z + t * layer.shift
        z = activation(z)
    return linear(z, m.weight, m.bias)


def _residual(m, activation, t, z, *context):
    affine = lambda dense, x: linear(x, dense.weight, dense.bias)
    angles = torch.pi * _beside(t, z) * torch.arange(1, WAVES + 1, dtype=z.dtype)
    known = torch.cat([torch.sin(angles), torch.cos(angles)], 1)
    if context:
        inner, outer = m.encoder
        known = torch.cat([known, affine(outer, silu(affine(inner, *context)))], 1)
    h = affine(m.first, z)
    for block, modulation in zip(m.blocks, m.modulation, strict=True):
        a, b = affine(modulation, known).chunk(2, dim=1)
        h = h + affine(block, silu((1 + a) * h + b))
    bounded = LARGEST_ACTIVATION * torch.tanh(silu(h) / LARGEST_ACTIVATION)
    return affine(m.last, bounded) + affine(m.scale, known) * z


def _mixer(m, activation, t, z):
    """A network for images of one channel; `activation` is the default of jaxode."""
    affine = lambda dense, x: linear(x, dense.weight, dense.bias)
    bounded = lambda x: LARGEST_ACTIVATION * torch.tanh(x / LARGEST_ACTIVATION)
    layers = lambda pair, x: affine(pair[1], activation(affine(pair[0], x)))
    down, size, across = m._tiled[:3]
    n, numbers = len(z), size * size
    angles = torch.pi * torch.as_tensor(t, dtype=z.dtype).reshape(-1, 1)
    angles = angles * torch.arange(1, WAVES + 1, dtype=z.dtype)
    known = torch.cat([torch.sin(angles), torch.cos(angles)], 1)  # a row, or one for each image
    patches = z.reshape(n, down, size, across, size).transpose(2, 3).reshape(n, -1, numbers)
    slope, shift = affine(m.feature, known)[:, None, :, None].chunk(2, dim=2)
    phi = activation(slope * patches[:, :, None] + shift)
    before = size // 2
    image = pad(z.reshape(n, 1, down * size, across * size), (before, size - before) * 2)
    windows = unfold(image, 2 * size, stride=size).transpose(1, 2)
    h = affine(m.first, torch.cat([windows, phi.flatten(2)], 2)) + m.place
    for block in m.blocks:
        a, b, c, d = affine(block.modulation, known)[:, None].chunk(4, dim=2)
        h = h + layers(block.tokens, ((1 + a) * h + b).transpose(1, 2)).transpose(1, 2)
        h = h + layers(block.channels, (1 + c) * h + d)
    k = affine(m.last, bounded(activation(h))).unflatten(2, (-1, numbers))
    out = (k[:, :, 0] + (k[:, :, 1:] * bounded(phi)).sum(2)).reshape(n, down, across, size, size)
    return out.transpose(2, 3).reshape(z.shape) + affine(m.scale, known) * z


FIELDS = {Plain: _plain, Residual: _residual, Mixer: _mixer}


def log_likelihoods(z, log_det):
    return -0.5 * (z**2).sum(1) - 0.5 * z.shape[1] * np.log(2 * np.pi) + log_det


def negative_log_likelihood(z, log_det):
    return -log_likelihoods(z, log_det).mean()


def torch_step(field: TorchField, loss: Callable[[float], torch.Tensor]) -> Step:
    def step(tolerance):
        value = loss(tolerance)
        gradient = torch.autograd.grad(value, field.leaves, allow_unused=True)
        pairs = zip(gradient, field.leaves, strict=True)
        return value.item(), [(torch.zeros_like(w) if g is None else g).numpy() for g, w in pairs]

    return step


def torchdiffeq_solve(field: TorchField, f, start, ts, rtol, atol, adjoint=True) -> Any:
    """dopri5, and the adjoint ODE of torchdiffeq."""
    import torchdiffeq

    solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    options = {"adjoint_params": tuple(field.leaves)} if adjoint else {}
    return solve(f, start, ts, rtol=rtol, atol=atol, method="dopri5", **options)


def torchdiffeq_loss(field: TorchField, x, probe, rtol, atol, adjoint=True):
    """FFJORD's, on `(z, log_det)`."""

    class Dynamics(torch.nn.Module):
        def forward(self, t, state):
            return field.augmented(t, state[0], probe)

    start = (x, torch.zeros(x.shape[0], dtype=x.dtype))
    times = torch.tensor([1.0, 0.0], dtype=x.dtype)
    z, log_det = torchdiffeq_solve(field, Dynamics(), start, times, rtol, atol, adjoint)
    return negative_log_likelihood(z[-1], log_det[-1])


def torchdiffeq_log_prob(p: FlowProblem) -> Step:
    """FFJORD's dynamics, without what only gradients by the parameters need."""
    field, x, probe = TorchField(p.params), tensor(p.x), tensor(p.probe)
    for leaf in field.leaves:
        leaf.requires_grad_(False)
    start, times = (x, torch.zeros_like(x[:, 0])), torch.tensor([1.0, 0.0], dtype=x.dtype)

    def dynamics(t, state):
        dz, divergence = field.augmented(t, state[0].detach(), probe, create_graph=False)
        return dz.detach(), divergence

    def step(tolerance):
        with torch.no_grad():
            ends = torchdiffeq_solve(field, dynamics, start, times, tolerance, tolerance, False)
        z, log_det = (leaf[-1] for leaf in ends)
        return None, [log_likelihoods(z, log_det).numpy()]

    return step


def zuko_loss(field: TorchField, x, probe, rtol, atol):
    """As its `FreeFormJacobianTransform`, whose error control sees a hundredth of the trace."""
    import zuko

    def dynamics(t, z, log_det):
        dz, divergence = field.augmented(t, z, probe)
        return dz, 1e-2 * divergence

    start = (x.clone(), torch.zeros(x.shape[0], dtype=x.dtype))
    z, scaled = zuko.utils.odeint(dynamics, start, 1.0, 0.0, field.leaves, atol=atol, rtol=rtol)
    return negative_log_likelihood(z, 1e2 * scaled)


def zuko_log_prob(p: Conditional, **tolerances: float) -> Step:
    """Its `FreeFormJacobianTransform` with the exact trace, as `CNF` and the FMPE of sbi use it.

    Their tolerances are the defaults.
    """
    from zuko.transforms import FreeFormJacobianTransform

    field, x, context = TorchField(p.params), tensor(p.x), tensor(p.context)
    for leaf in field.leaves:
        leaf.requires_grad_(False)

    def step(tolerance):
        given = tolerances or {"atol": tolerance, "rtol": tolerance}
        flow = FreeFormJacobianTransform(lambda t, z: field(t, z, context), 0.0, 1.0, **given)
        with torch.no_grad():
            z, log_det = flow.inv.call_and_ladj(x)
        return None, [log_likelihoods(z, log_det).numpy()]

    return step


def torchode_solve(f, y0, ts, tolerance) -> Any:
    """Each row with its own steps and times, differentiated through the steps."""
    import torchode

    term = torchode.ODETerm(f)
    controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Tsit5(term=term), controller)
    ends = {"t_start": ts[:, 0], "t_end": ts[:, -1]}
    return solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=ts, **ends)).ys


def flow_step(p: FlowProblem, loss) -> Step:
    """Of `loss(field, x, probe, rtol, atol)`."""
    field, x, probe = TorchField(p.params), tensor(p.x), tensor(p.probe)
    return torch_step(field, lambda tolerance: loss(field, x, probe, tolerance, tolerance))


def torchdiffeq_step(p: FlowProblem, adjoint: bool = True) -> Step:
    return flow_step(p, partial(torchdiffeq_loss, adjoint=adjoint))


def zuko_step(p: FlowProblem) -> Step:
    return flow_step(p, zuko_loss)


def torchode_loss(field: TorchField, x, probe, rtol, atol):
    def dynamics(t, state):
        dz, divergence = field.augmented(t[:, None], state[:, :-1], probe)
        return torch.cat([dz, divergence[:, None]], 1)

    times = torch.tensor([1.0, 0.0], dtype=x.dtype).expand(x.shape[0], 2)
    start = torch.cat([x, torch.zeros(x.shape[0], 1, dtype=x.dtype)], 1)
    end = torchode_solve(dynamics, start, times, rtol)[:, -1]
    return negative_log_likelihood(end[:, :-1], end[:, -1])


def torchode_step(p: FlowProblem) -> Step:
    return flow_step(p, torchode_loss)


def torchdiffeq_ode_step(p: OdeProblem, adjoint: bool = True) -> Step:
    field, y0, ts = TorchField(p.params), tensor(p.y0), tensor(p.ts)
    target = torch.sin(torch.arange(len(ts) - 1, dtype=y0.dtype))[:, None, None]

    def loss(tolerance):
        ys = torchdiffeq_solve(field, field, y0, ts, tolerance, tolerance, adjoint)
        return ((ys[1:] - target) ** 2).mean()

    return torch_step(field, loss)


def torchode_series_step(p: Series) -> Step:
    field = TorchField(p.params)
    y0, ts, real = (tensor(x) for x in (p.y0, p.ts, p.real))
    f = lambda t, y: field(t[:, None], y)
    return torch_step(
        field, lambda tol: series_loss(torchode_solve(f, y0, ts, tol), ts, real, torch)
    )


def check_fields(p: OdeProblem | Series) -> None:
    """Raise unless the field in PyTorch equals that in JAX, in float64."""
    with double_precision():
        q = doubled(p)
        theirs = TorchField(q.params)(0.37, tensor(q.y0))
        check_equal({"JAX": batched(0.37, q.y0, q.params), "PyTorch": theirs.detach().numpy()})


def check_conditional(p: Conditional) -> None:
    """Raise unless the conditional field in PyTorch equals that in JAX, in float64."""
    with double_precision():
        params, x, context = doubled((p.params, p.x[:8], p.context[:8]))
        ours = jax.vmap(lambda x, row: params(jnp.asarray(0.37), x, row))(x, context)
        theirs = TorchField(params)(0.37, tensor(x), tensor(context))
        check_equal({"JAX": ours, "PyTorch": theirs.detach().numpy()})


def check_matching(p: FlowProblem) -> None:
    """Raise unless the matching loss and its gradient in PyTorch equal those in JAX, in float64,
    at the same times and states."""
    with double_precision():
        q = doubled(p._replace(x=p.x[:4], probe=p.probe[:4]))
        times, target = np.array([0.0, 0.3, 0.7, 1.0])[: len(q.x)], np.roll(q.x, 1, axis=1)

        def loss(params):
            return jnp.mean((jax.vmap(params)(times, q.x) - target) ** 2)

        value, gradient = jax.jit(jax.value_and_grad(loss))(q.params)
        field = TorchField(q.params)
        found = (field(tensor(times)[:, None], tensor(q.x)) - tensor(target)).square().mean()
        theirs = torch.autograd.grad(found, field.leaves)
        check_equal({"JAX": value, "PyTorch": found.detach().numpy()})
        for ours, other in zip(jax.tree.leaves(gradient), theirs, strict=True):
            check_equal({"JAX": ours, "PyTorch": other.numpy()})


def check_networks(p: FlowProblem, traced: bool = True) -> None:
    """Raise unless field, estimates and traces in PyTorch equal those in JAX, in float64."""
    with double_precision():
        q = doubled(p)
        field, x, probe = TorchField(q.params), tensor(q.x), tensor(q.probe)
        for t in (0.0, 0.37, 1.0):
            at, state = jnp.asarray(t), (q.x,)
            dz, divergence = jax.jit(augmented)(at, state, q.params, q.probe)
            # FFJORD's vector-Jacobian product and ours the other way are the same number.
            other, estimate = field.augmented(torch.tensor(t, dtype=x.dtype), x.clone(), probe)
            pairs: list[Any] = [(dz, other), (divergence, estimate)]
            if traced:
                _, trace = field.augmented(t, x, None)
                pairs.append((augmented_exact(at, state, q.params, None)[1], trace))
            for ours, theirs in pairs:
                check_equal({"JAX": ours, "PyTorch": theirs.detach().numpy()})
