"""The rows of a solve in chunks, so that memory depends on a chunk and not on the batch.

Outside of transformations a loop in Python runs one compiled program, chunk after chunk: it can
tell how far it is, and be interrupted. Inside of one the loop is a part of the program, and reverse
mode solves each chunk again on its way back.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxode._checks.arguments import check_bool, integer
from jaxode._checks.caller import caller
from jaxode._checks.rules import is_eager
from jaxode._jax.closure import compiled
from jaxode.flows.keys import keys_of_rows
from jaxode.ode.solution import Solution
from jaxode.ode.system import System

# By default, rows of a chunk times parameters are `CHUNK_ACTIVATIONS`, with rows in these bounds.
# Measured: benchmarks/NOTES.md.
LEAST_CHUNK_ROWS = 1024
MOST_CHUNK_ROWS = 4096
CHUNK_ACTIVATIONS = 1 << 25

# A program of a flow: (system, integrands_and_base, key) -> solution.
Program = Callable[[System, Any, Any], Solution]


class Chunks(NamedTuple):
    """Options for solving a batch with per-sample steps in chunks."""

    size: int
    """Rows at once."""
    progress: bool = False
    """Whether to write on stderr how many rows are done."""

    @classmethod
    def make(cls, size: Any, progress: bool, params: PyTree) -> "Chunks":
        """Check the arguments, and choose the size if it is None."""
        check_bool("progress", progress)
        if size is None:
            weights = sum(leaf.size for leaf in jax.tree.leaves(params) if eqx.is_array(leaf))
            size = max(LEAST_CHUNK_ROWS, min(MOST_CHUNK_ROWS, CHUNK_ACTIVATIONS // max(weights, 1)))
        return cls(integer("batch_size", size), progress)


def in_chunks(
    program: Program, chunks: Chunks | None, system: System, integrands_and_base: Any, key
) -> Solution:
    """`program(system, integrands_and_base, key)`, chunk by chunk.

    Neither noise nor steps of a row depend on the chunks.
    """
    count = system.y0.shape[0]
    # A symbolic number of `jax.export` is not split.
    if chunks is None or not isinstance(count, int) or count <= chunks.size:
        return program(system, integrands_and_base, key)
    keys = None if key is None else keys_of_rows(key, system.y0, None)
    points = system.breakpoints
    of_rows = None if points is None or points.ndim == 1 else points
    rows = _split((system.y0, system.row_args, of_rows, keys), count, chunks.size)
    whole = system._replace(y0=None, row_args=None, breakpoints=points if of_rows is None else None)
    if is_eager((rows, whole, integrands_and_base)):
        told = count if chunks.progress else None
        solutions = _one_by_one(program, whole, integrands_and_base, rows, told)
        solution = jax.tree.map(lambda *leaves: jnp.stack(leaves), *solutions)
    else:
        solution = _looped(program, whole, integrands_and_base, rows)

    def join(leaf):
        return leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])[:count]

    return jax.tree.map(join, solution)


def _split(rows: PyTree, count: int, most: int) -> PyTree:
    """Split leaves into `[chunks, rows, ...]`. Neighbouring rows come into different chunks.

    So rows that are split over devices stay split over them in every chunk. The last chunk is
    filled up with the first row. Sizes are eighths of `most`, so that batches of different sizes
    share their programs.
    """
    chunks = -(-count // most)
    unit = -(-most // 8)
    size = min(most, -(-count // (chunks * unit)) * unit)

    def split(leaf):
        fill = jnp.broadcast_to(leaf[:1], (chunks * size - count, *leaf.shape[1:]))
        leaf = jnp.concatenate([leaf, fill])
        return leaf.reshape(size, chunks, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, rows)


def _one(program: Program, whole: System, integrands_and_base: Any, rows: PyTree) -> Solution:
    y0, row_args, points, keys = rows
    points = whole.breakpoints if points is None else points
    return program(
        whole._replace(y0=y0, row_args=row_args, breakpoints=points), integrands_and_base, keys
    )


def _one_by_one(
    program: Program, whole: System, integrands_and_base: Any, rows: PyTree, told: int | None
) -> Iterator[Solution]:
    """Solve chunk after chunk.

    `told` is the number of rows in lines of progress on stderr; None for no lines.
    """
    chunks, begin = rows[0].shape[0], time.perf_counter()
    for i in range(chunks):
        chunk = jax.tree.map(lambda leaf: leaf[i], rows)  # noqa: B023
        yield jax.block_until_ready(_one(program, whole, integrands_and_base, chunk))
        if told is not None:
            rows_done, seconds = (i + 1) * told // chunks, time.perf_counter() - begin
            text = f"\r{caller()}: {rows_done:,} of {told:,} rows, {seconds:.0f} s "
            print(text, end="" if i + 1 < chunks else "\n", file=sys.stderr, flush=True)


@compiled
def _looped(program: Program, whole: System, integrands_and_base: Any, rows: PyTree) -> Solution:
    solve_chunk = jax.checkpoint(lambda rows: _one(program, whole, integrands_and_base, rows))
    return jax.lax.map(solve_chunk, rows)
