"""Strict settings for every test: double precision, no silent dtype or rank promotion."""

import os
import pathlib

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compilation dominates the run time of the suite; a second run finds its programs here.
_cache = pathlib.Path(__file__).parent.parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAXODE_TEST_CACHE", str(_cache)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
