"""A flow whose solver is a stiff one: densities and losses are those of an explicit solver."""

import diffrax
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, with_slow

import jaxode

X = jax.random.normal(jax.random.key(0), (4, 2))
# One direction contracts at once, the other one slowly.
PARAMS = jnp.array([[-30.0, 2.0], [0.5, -0.7]])


def field(t, z, params):
    return params @ jnp.sin(z) * (1 + t)


def of(solver, **options):
    return jaxode.cnf(
        field, jaxode.standard_normal(2), solver=solver, rtol=1e-9, atol=1e-9, max_steps=512,
        regularizers=[jaxode.regularizers.kinetic_energy(0.1)], **options,
    )  # fmt: skip


@pytest.mark.parametrize("batch", with_slow(["joint", "per_sample"], ["joint"]))
def test_density_and_loss(batch):
    def all_of(solver):
        flow = of(solver, batch=batch)
        loss = jax.value_and_grad(lambda params: flow.nll(params, X, key=None))
        return flow.log_prob(PARAMS, X), *loss(PARAMS)

    ours = jax.jit(lambda: all_of(jaxode.Rodas5P()))()
    assert_close(ours, jax.jit(lambda: all_of(diffrax.Tsit5()))(), 1e-6)


@pytest.mark.slow
def test_samples():
    flow = of(jaxode.Rodas5P())
    mild = PARAMS / 10  # A sample can be carried back.
    x, log_prob = flow.sample_and_log_prob(mild, jax.random.key(2), 3)
    assert_close(flow.log_prob(mild, x), log_prob, 1e-6)
