"""Examples, run in this process."""

import functools

import pytest
from common.arguments import status
from running import PNG, load_once

import jaxode


@pytest.fixture
def run(capsys, tmp_path):
    """Run an example in this process: what it prints. It writes `out.png` in a folder."""

    def of(name, *arguments, code=0, folder=tmp_path):
        picture = folder / "out.png"
        arguments = [str(argument) for argument in ("--out", picture, *arguments)]
        try:
            found = status(load_once(name).main, arguments)
        except SystemExit as stop:
            found = stop.code
        text = "".join(capsys.readouterr())
        assert found == code, text
        assert code or picture.read_bytes().startswith(PNG)
        return text

    return of


@pytest.fixture
def one_block(monkeypatch):
    """Residual networks of one block in place of three, which are the same code."""
    one = functools.partial(jaxode.nn.Residual, blocks=1)
    monkeypatch.setattr(jaxode.nn, "Residual", one)
