"""Each Python block of the README runs, as a program of its own."""

import contextlib
import io
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.shown
README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def run(code):
    """What a block defines and prints, alone."""
    scope, shown = {}, io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        exec(code, scope)
    arrays = [x for x in jax.tree.leaves(scope) if isinstance(x, jax.Array | np.ndarray)]
    numbers = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert numbers
    assert all(jnp.isfinite(x).all() for x in numbers)
    return scope, shown.getvalue()


@pytest.mark.slow  # each block compiles what it trains
@pytest.mark.parametrize("code", BLOCKS, ids=["fit", "table", "Neural ODE", "own loop"])
def test_a_code_block_runs_alone(code, default_settings):
    """After three steps of training."""
    _, shown = run(re.sub(r"(steps=|key\(2\), )\d+", r"\g<1>3", code))
    assert re.fullmatch(r"-\d+ nats\n" if "print" in code else "", shown)


@pytest.mark.slow  # two whole trainings, whose results the README promises
def test_code_blocks_learn_what_they_say(default_settings):
    fitted, _, _, own = BLOCKS
    # The four Gaussians have 8.38 nats in the units of the data, and a Gaussian 9.71.
    (output,) = re.findall(r"print\(.*# (.*)\n", fitted)
    assert run(fitted)[1] == f"{output}\n"
    scope, _ = run(own)
    log_prob = scope["flow"].log_prob(scope["params"], scope["z"])
    # A Gaussian of its mean and scale has 2 (log 15**0.5 + 1.42) = 5.5 nats, and the cube 3.2.
    assert 2.9 < -log_prob.mean() < 4.2
