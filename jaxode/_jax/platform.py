"""The platform that a program is for, where the way to compute depends on it."""

from typing import Any

import jax


def is_for_cpu() -> bool:
    """Whether a program that is traced now will run on a CPU.

    By `jax.default_device`, which `jit` compares, or JAX's backend. Tracing cannot see where the
    data is put, nor for which platforms `jax.export` writes: there the choice may be the slower
    one, with the same numbers. `jax.lax.platform_dependent` would trace each backward pass twice.
    """
    config: Any = jax.config
    device = config.jax_default_device
    if device is None:
        return jax.default_backend() == "cpu"
    return getattr(device, "platform", device) == "cpu"
