"""Seconds of compilation, which limits in seconds leave out."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxode._jax.compile_time import CompileTime, compile_time


def test_a_program_that_is_traced_within_another_counts_once(monkeypatch):
    total, clock = CompileTime(), [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    for end, seconds in ((11.0, 0.5), (12.0, 0.5), (13.0, 2.8), (15.0, 1.0)):
        clock[0] = end
        total.add("/jax/core/compile/jaxpr_trace_duration", duration_secs=seconds)
    total.add("/jax/other", duration_secs=100.0)
    np.testing.assert_allclose(total.seconds, 2.8 + 1.0)


def test_compilation_counts_and_calls_do_not():
    before = compile_time().seconds
    program = jax.jit(lambda x: jnp.sin(x) @ x)
    program(jnp.ones((3, 3))).block_until_ready()
    after = compile_time().seconds
    assert after > before
    program(jnp.ones((3, 3))).block_until_ready()
    assert compile_time().seconds == after
