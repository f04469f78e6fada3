"""Every Python block of the README runs, in order, as one program."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_code_blocks_run(default_settings):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    scope = {}
    exec("\n".join(blocks), scope)
    # The four Gaussians have 2.39 nats, the untrained flow about 4.2.
    assert 2.2 < scope["value"] < 3.0
    assert np.isfinite(scope["energy"]({"g": 9.81}))
