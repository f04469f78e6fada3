"""Every core of the CPU as a device, or the devices of an accelerator."""

import contextlib
import os

import jax
from jax.sharding import Mesh

AXIS = "batch"


def all_devices() -> Mesh:
    """Before JAX starts: a device for each core of the CPU, up to a power of two, which divides a
    batch. JAX uses an accelerator instead, if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(RuntimeError):  # it has started
        jax.config.update("jax_num_cpu_devices", 2 ** ((cores or 1).bit_length() - 1))
    count = 2 ** (len(jax.devices()).bit_length() - 1)
    return Mesh(jax.devices()[:count], AXIS)
