"""Ways to compute that depend on the platform."""

import re

import jax
import jax.numpy as jnp

import jaxode

Y0, W = jnp.ones((2, 3)), jnp.ones((3, 3))


def program():
    """Of a gradient, whose parameters an accelerator gathers once a step."""
    end = lambda w: jaxode.solve(lambda t, y, w: jnp.tanh(w @ y), Y0, 0.0, 1.0, w, batch="joint")
    text = str(jax.make_jaxpr(jax.grad(lambda w: end(w).y1.sum()))(W))
    return re.sub(" at 0x[0-9a-f]+", "", text)


def test_the_default_device_comes_before_the_backend(monkeypatch):
    on_cpu = program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert program() != on_cpu
    for device in (jax.devices("cpu")[0], "cpu"):
        with jax.default_device(device):
            assert program() == on_cpu
