"""The Python blocks of the README run, in order, as one program."""

import pathlib
import re

import jax
import jax.numpy as jnp

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_code_blocks_run(default_settings):
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    scope = {}
    exec("\n".join(blocks), scope)
    arrays = [x for x in jax.tree.leaves(scope) if isinstance(x, jax.Array)]
    numbers = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert numbers
    assert 2.2 < scope["value"] < 3.0  # the four Gaussians have 2.39 nats, the untrained flow 4.2
    assert all(jnp.isfinite(x).all() for x in numbers)
