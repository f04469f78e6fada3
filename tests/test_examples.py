"""The examples run on tiny settings, write their picture, and answer wrong input in one line."""

import importlib.util
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
PNG = b"\x89PNG"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(tmp_path, capsys, default_settings):
    picture = tmp_path / "digits.png"
    arguments = ["--steps", "3", "--batch", "8", "--width", "4", "--out", str(picture)]
    assert load("digits").main(arguments) == 0
    assert picture.read_bytes().startswith(PNG)
    output = capsys.readouterr().out
    gaussian, flow = (
        [float(word) for word in line.split()[-2:]]
        for line in output.splitlines()
        if line.startswith(("full-covariance Gaussian", "flow "))
    )
    # The Gaussian needs no training; after three steps the flow is still close to it.
    assert 2.3 < gaussian[0] < gaussian[1] < 2.6
    np.testing.assert_allclose(flow, gaussian, atol=0.05)


def test_digits_preprocessing_is_invertible_and_its_log_determinant_is_right(default_settings):
    digits = load("digits")
    x = jax.numpy.asarray(digits.load_digits(return_X_y=True)[0][:200], "float32")
    whitening = digits.fit_whitening(jax.random.key(0), x)
    key = jax.random.key(1)
    z, log_det = digits.whiten(whitening, key, x[:3])
    np.testing.assert_array_equal(digits.to_images(whitening, z), x[:3])
    jacobian = jax.jacfwd(lambda row: digits.whiten(whitening, key, row[None])[0][0])(x[0])
    expected = jax.numpy.linalg.slogdet(jacobian)[1]
    one, log_det = digits.whiten(whitening, key, x[:1])
    np.testing.assert_allclose(log_det[0], expected, rtol=1e-3)
    assert one.shape == (1, 64)


@pytest.mark.parametrize("data", ["8gaussians", "moons", "checkerboard", "pinwheel", "rings"])
def test_toy_densities(data):
    points = load("density_2d").load(data, np.random.default_rng(0))
    assert points.shape == (20_000, 2)
    assert np.isfinite(points).all()
    assert 1 < np.abs(points).max() < 7


def test_density_of_a_csv_file(tmp_path, capsys, default_settings):
    rng, file, picture = np.random.default_rng(0), tmp_path / "points.csv", tmp_path / "a" / "b.png"
    points = rng.normal([100.0, -3.0], [20.0, 0.1], (3000, 2))
    np.savetxt(file, points, delimiter=",", header="x,y", comments="")
    arguments = ["--data", str(file), "--steps", "2", "--batch", "16", "--frames", "2"]
    assert load("density_2d").main([*arguments, "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(PNG)
    assert picture.with_suffix(".gif").read_bytes().startswith(b"GIF89a")
    line = next(line for line in capsys.readouterr().out.splitlines() if "held-out" in line)
    # In the units of the data: a Gaussian of these widths has -3.53 nats; the flow starts near one.
    assert abs(float(line.split()[2]) + 3.53) < 0.3


BAD_FILES = {
    "missing": (
        None,
        "is neither one of 8gaussians, moons, checkerboard, pinwheel, rings nor a file",
    ),
    "three columns": ("1,2,3\n" * 20, "line 1: two columns separated by a comma are needed; got 3"),
    "one column": ("1\n" * 20, "line 1: two columns separated by a comma are needed; got 1"),
    "text": ("1,2\n" * 15 + "1,two\n", "line 16: 'two' is not a finite number"),
    "nan": ("1,2\n" * 15 + "nan,2\n", "line 16: 'nan' is not a finite number"),
    "empty": ("", "at least 10 points are needed; got 0"),
    "header only": ("x,y\n", "at least 10 points are needed; got 0"),
    "constant": ("0.1,2\n" * 20, "a column is constant, so the points have no density"),
    "line": ("".join(f"{i},{2 * i}\n" for i in range(20)), "the points lie on a line"),
    "huge": ("1e200,2\n" * 10 + "1,3\n", "numbers beyond 1e30 are too large"),
    "mistyped first line": ("1.0x,2\n" + "1,2\n" * 20, "line 1: '1.0x' is not a finite number"),
    "semicolons": ("1;2\n" * 20, "two columns separated by a comma are needed; got 1"),
    "binary": (b"\xff\xfe\x00\x01" * 20, "cannot read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_wrong_file_gets_one_clear_line(name, tmp_path, capsys):
    content, message = BAD_FILES[name]
    file = tmp_path / "points.csv"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert load("density_2d").main(["--data", str(file)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert str(file) in error
    assert "\n" not in error


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["digits to train on", "first step"])
def test_interruption_ends_cleanly(tmp_path, moment):
    """Ctrl-C before the first step just ends; later it goes on with what there is."""
    picture = tmp_path / "digits.png"
    # The tests may run in the background of a shell, where interrupts are ignored.
    interruptible = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", interruptible, str(EXAMPLES / "digits.py"), "--width", "4"]
    process = subprocess.Popen(
        [*command, "--out", str(picture), "--steps", "100000"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    output = ""
    while moment not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    process.send_signal(signal.SIGINT)
    output += process.communicate(timeout=200)[0]
    assert "Traceback" not in output
    assert picture.exists() == (moment == "first step")
    assert process.returncode == (0 if moment == "first step" else 130)
