"""Tables of a user, in the examples."""

import numpy as np
import pandas as pd
import pytest
from common import tables


def lines(*rows):
    return "".join(f"{row}\n" for row in rows)


SQUARES = [f"{i},{i * i}" for i in range(30)]
FEW = "at least 20 rows are needed; got "
# (content, what is wrong with it)
BAD_TABLES = {
    "missing": (None, "cannot read "),
    "binary": (b"\xff\xfe\x00\x01" * 20, "cannot read "),
    "empty": ("", "cannot read "),
    "long row": (lines("a,b", *SQUARES, "1,2,3"), "Expected 2 fields in line 32, saw 3"),
    "19 rows": (lines("a,b", *SQUARES[:19]), f"{FEW}19"),
}
BAD_COLUMNS = {
    "nothing in it": (lines("a,b,c", *(f"{row}," for row in SQUARES)), "must have a value"),
    "infinite": (lines("a,b", *SQUARES, "inf,2"), "must hold finite numbers; got inf"),
}
BAD_TARGETS = {"text": (lines("a,b", *(f"{i},t" for i in range(30))), "--target must be a column")}
BAD_POINTS = {
    "constant": (lines("a,b", *(f"{i},1" for i in range(30))), "constant"),
    "three columns": (lines("a,b,c", *(f"{row},{row[0]}" for row in SQUARES)), "needed; got 3."),
    "gap": (lines("a,b", *SQUARES, "1,"), "a number is missing"),
    "missing": (None, "is neither one of 8gaussians, moons, checkerboard, pinwheel, rings nor a"),
}
BAD = {
    f"{name}, {case}": (name, *row)
    for name, rows in {
        "tabular": BAD_TABLES | BAD_COLUMNS, "regression": BAD_TARGETS, "density_2d": BAD_POINTS
    }.items()
    for case, row in rows.items()
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_a_table_that_cannot_be_learned_gets_one_clear_line(name, content, message, run, tmp_path):
    table = tmp_path / "table.csv"
    if content is not None:
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = run(name, "--data", table, code=2)
    assert message in text
    last = text.splitlines()[-1]
    assert last.startswith(f"{name}: ")  # before it trains


def test_no_argument_makes_a_user_lose_the_table(run, tmp_path):
    """New rows would go beside the picture."""
    table = tmp_path / "table.csv"
    table.write_text(lines("a,b", *SQUARES))
    text = run("tabular", "--data", table, "--out", table.with_suffix(".png"), code=2)
    assert "must be different files" in text.splitlines()[-1]  # before it trains
    assert table.read_text() == lines("a,b", *SQUARES)


def test_texts_that_hardly_repeat_and_an_index_are_left_out(tmp_path, capsys):
    flats = tables.flats(100, 0).assign(name=[f"flat {i}" for i in range(100)])
    flats.to_csv(tmp_path / "table.csv")
    frame = tables.without_identifiers(tables.read(tmp_path / "table.csv"))
    assert list(frame) == list(tables.flats(100, 0))
    assert capsys.readouterr().out.endswith(": Unnamed: 0, name\n")


def test_held_out_rows_have_no_category_and_no_gap_that_training_has_not():
    rows = {"a": ["x"] * 38 + ["y", None], "b": [*range(39), np.nan], "c": [1.0] * 39 + [np.nan]}
    frame = pd.DataFrame(rows | {"row": range(40)})
    for seed in range(20):
        rest, held_out = tables.split(frame, 8, seed)
        assert sorted([*rest["row"], *held_out["row"]]) == list(range(40))
        assert 6 <= len(held_out) <= 8
        assert set(held_out["a"]) == {"x"}
        assert held_out["b"].notna().all()
