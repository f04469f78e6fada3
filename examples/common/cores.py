"""Every core of the CPU as a device, or the devices of an accelerator."""

import contextlib
import os

import jax
from jax.sharding import Mesh

AXIS = "batch"


def all_devices(most: int) -> Mesh:
    """Before JAX starts, make a device of each core of the CPU: the largest power of two of them up
    to `most`, which divides a batch. JAX uses an accelerator instead, if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(RuntimeError):  # it has started
        jax.config.update("jax_num_cpu_devices", _power_of_two(min(cores or 1, most)))
    count = _power_of_two(min(len(jax.devices()), most))
    return Mesh(jax.devices()[:count], AXIS)


def _power_of_two(most: int) -> int:
    """The largest power of two up to `most`."""
    return 2 ** (most.bit_length() - 1)
