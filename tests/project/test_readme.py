"""The Python blocks of the README run, in order, as one program."""

import contextlib
import io
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.shown
README = pathlib.Path(__file__).parents[2] / "README.md"


def run(steps=None):
    """What the blocks define and print; with other numbers of steps, if given."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    code, scope, shown = "\n".join(blocks), {}, io.StringIO()
    if steps is not None:
        code, count = re.subn(r"(steps=|range\()\d+", rf"\g<1>{steps}", code)
        assert count == 2
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        exec(code, scope)
    arrays = [x for x in jax.tree.leaves(scope) if isinstance(x, jax.Array)]
    numbers = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert numbers
    assert all(jnp.isfinite(x).all() for x in numbers)
    return scope, shown.getvalue()


def test_code_blocks_run(default_settings):
    _, shown = run(steps=3)
    assert re.fullmatch(r"-\d+ nats, \(2,\)\n", shown)


@pytest.mark.slow
def test_code_blocks_learn_what_they_say(default_settings):
    scope, shown = run()
    # The four Gaussians have 8.38 nats in the units of the data, and a Gaussian 9.71.
    (output,) = re.findall(r"^```output\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    assert shown == output
    x, density = scope["data"][:1000], scope["density"]
    assert 8.3 < -density.log_prob(x).mean() < 9.0
    samples = density.sample(jax.random.key(0), (1000,))
    assert jnp.allclose(samples.std(0), x.std(0), rtol=0.15)
