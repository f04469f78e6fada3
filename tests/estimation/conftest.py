"""Estimates of this folder use the solutions of fields that are known."""

import pytest
from closed_forms import known_solutions


@pytest.fixture(autouse=True, scope="module")
def solutions():
    with known_solutions():
        yield
