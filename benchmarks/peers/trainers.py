"""Trainings for `time_to_nll` and `images`, one step of Adam for each batch.

A trainer is made from the parameters, the dimension of the data and a rate, which may be a function
of the step. It returns `train(xs, seeds)`, which takes a step for each batch, and `current()`, the
parameters to evaluate and to go on with.
"""

import functools
import itertools
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from benchmarks.harness.problems import stepper
from benchmarks.peers import flows

AVERAGE = 0.005  # weight of a step in the moving average of the parameters
TOLERANCE = 1e-5  # of those that control the error


def in_jax(loss, params, rate, average=1.0, first=0.0):
    """Of `loss(params, x, key)`. Step `n` has the weight `first / (first + n)` in the average, and
    `average` at least."""
    optimizer = optax.adam(rate)
    carry, step = (params, params, optimizer.init(params), 0), stepper(loss, optimizer)

    def one(carry, inputs):
        params, averaged, state, n = carry
        x, seed = inputs
        params, state = step(params, state, x, jax.random.key(seed))
        weight = jnp.maximum(average, first / jnp.maximum(first + n, 1.0))
        return (params, optax.incremental_update(params, averaged, weight), state, n + 1), None

    steps = jax.jit(lambda carry, inputs: jax.lax.scan(one, carry, inputs)[0])

    def train(xs, seeds):
        nonlocal carry
        carry = jax.block_until_ready(steps(carry, (xs, seeds)))

    return train, lambda: carry[1]


def jaxode_likelihood(params, dim, rate):
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim))
    return in_jax(lambda params, x, key: flow.nll(params, x, key=key), params, rate)


def jaxode_matching(params, dim, rate, first=0.0, **options):
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim))
    loss = lambda params, x, key: flow.matching_loss(params, x, key=key, **options)
    return in_jax(loss, params, rate, AVERAGE, first)


def diffrax_likelihood(params, dim, rate, dt0=None, tolerance=TOLERANCE):
    """With steps of `dt0`, or with error control."""
    field = flows.augmented_exact if dim == 2 else flows.augmented
    of_batch = flows.diffrax_loss(diffrax.Tsit5(), field=field, dt0=dt0)

    def loss(params, x, key):
        probe = jax.random.rademacher(key, x.shape, x.dtype)
        return of_batch(params, x, probe, tolerance if dt0 is None else None)

    return in_jax(loss, params, rate)


def in_torch(loss, params, rate, average=1.0, first=0.0):
    """Of `loss(field, x, generator)`, as `in_jax`."""
    import torch

    from benchmarks.peers.in_torch import TorchField

    field = TorchField(params)
    optimizer = torch.optim.Adam(field.leaves, lr=1.0)
    of_step: Any = rate if callable(rate) else lambda n: rate
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: float(of_step(n)))
    averaged = [leaf.detach().clone() for leaf in field.leaves]
    steps = itertools.count()

    def train(xs, seeds):
        for x, seed in zip(torch.tensor(xs), seeds, strict=True):
            optimizer.zero_grad()
            loss(field, x, torch.Generator().manual_seed(int(seed))).backward()
            optimizer.step()
            rates.step()
            weight = max(average, first / max(first + next(steps), 1.0))
            with torch.no_grad():
                torch._foreach_lerp_(averaged, field.leaves, weight)

    return train, lambda: field.in_jax(averaged)


def torch_likelihood(params, dim, rate, solver, rtol, atol):
    """`solver` is the name of a loss in `in_torch.py`."""

    def loss(field, x, generator):
        import torch

        from benchmarks.peers import in_torch

        signs = torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
        return getattr(in_torch, solver)(field, x, None if dim == 2 else signs, rtol, atol)

    return in_torch(loss, params, rate)


def ffjord(params, dim, rate):
    return torch_likelihood(params, dim, rate, "torchdiffeq_loss", TOLERANCE, TOLERANCE)


def zuko(params, dim, rate):
    """Its own tolerances."""
    return torch_likelihood(params, dim, rate, "zuko_loss", 1e-5, 1e-6)


def torchcfm_matching(
    params, dim, rate, matcher="ConditionalFlowMatcher", compiled=False, first=0.0
):
    import torch
    from torchcfm import conditional_flow_matching

    draw: Any = getattr(conditional_flow_matching, matcher)(sigma=0.0)
    forward = functools.cache(lambda field: torch.compile(field.__call__) if compiled else field)

    def loss(field, x, generator):
        # torchcfm draws times with PyTorch's generator, and pairs with NumPy's.
        torch.manual_seed(generator.initial_seed())
        np.random.seed(generator.initial_seed())  # noqa: NPY002
        t, z, target = draw.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return (forward(field)(t[:, None], z) - target).square().mean()

    return in_torch(loss, params, rate, AVERAGE, first)
