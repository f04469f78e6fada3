"""Runs an example in this process, or in another."""

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG"


def load(name):
    """The module, with constants in single precision, whichever test is the first to load it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    double = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        spec.loader.exec_module(module)
    finally:
        jax.config.update("jax_enable_x64", double)
    return module


load_once = functools.cache(load)


def start(name, *arguments, output):
    """Run an example in a process of its own, with the compiled programs of those before it."""
    # The tests may run in the background of a shell, where interrupts are ignored. One block, too.
    code = (
        "import functools, runpy, signal, sys; sys.argv = sys.argv[1:];"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"sys.path.insert(0, {str(EXAMPLES)!r}); import jaxode;"
        "jaxode.nn.Residual = functools.partial(jaxode.nn.Residual, blocks=1);"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, EXAMPLES / f"{name}.py", *arguments]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),  # as many threads as here: the same bits
    }
    return subprocess.Popen(
        [str(word) for word in command], stdout=output, stderr=subprocess.STDOUT, text=True,
        env=os.environ | cache,
    )  # fmt: skip


def numbers(text):
    return [float(word) for word in re.findall(r"-?\d+\.?\d*(?:e[+-]\d+)?", text)]


def after(output, pattern):
    """All numbers that stand in a line behind the pattern."""
    found = (re.search(pattern, text) for text in output.splitlines())
    return [n for match in found if match for n in numbers(match.string[match.end() :])]
