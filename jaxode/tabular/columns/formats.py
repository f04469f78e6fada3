"""The formats of dates in text."""

import datetime
import math
import re
from typing import Any

from jaxode._checks.caller import arg

# Formats of texts that are tried: a date, alone or with a time.
FORMATS = (
    "%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%Y%m%d", "%Y-%m", "%d %b %Y", "%d-%b-%Y", "%b %d, %Y",
    "%d %B %Y", "%B %d, %Y", "%b-%Y", *(f"{first}{sep}%{year}" for sep in "./-" for year in "Yy"
    for first in (f"%d{sep}%m", f"%m{sep}%d")),
)  # fmt: skip
CLOCKS = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%H:%M:%SZ", "%H:%M:%S.%fZ")
LOOKED_AT = 100  # texts, which tell whether categories are dates or numbers
MOSTLY = 0.8  # of the texts of a column of numbers are some: the others stand for missing ones


def cure_of_dates(frame: Any, column: str) -> str:
    """How to read texts that are dates, or nothing if they are none."""
    texts = frame[column].drop_nulls().head(LOOKED_AT).to_list()
    if not all(isinstance(text, str) and re.search(r"\d", text) for text in texts):
        return ""
    if not (found := _formats(texts)):
        return ""
    kind = "date" if len(found) == 1 else ("date", found[0])
    return f"Read it as dates: kinds={{{column!r}: {kind!r}}}."


def cure_of_numbers(frame: Any, column: str) -> str:
    """How to read texts most of which are numbers, or nothing if they are not."""
    texts = frame[column].drop_nulls().head(LOOKED_AT).to_list()
    if not texts or sum(map(_is_number, texts)) < MOSTLY * len(texts):
        return ""
    return f"If it holds numbers, pass pandas.to_numeric(frame[{column!r}], errors='coerce'). "


def _is_number(text: Any) -> bool:
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False


def texts_of(name: str, series: Any) -> list[str]:
    texts = series.drop_nulls().to_list()
    if str(series.dtype).startswith("Enum") or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"{arg('kinds')} column {name!r} must hold dates, or texts of dates, to be a date; got "
            f"{series.dtype}. Convert it, such as by pandas.to_datetime."
        )
    return texts


def format_of(name: str, texts: list[str]) -> str:
    found = _formats(texts)
    if len(found) == 1:
        return found[0]
    start = f"{arg('kinds')} column {name!r} must hold texts of one format of dates"
    if not found:
        raise ValueError(
            f"{start}; got {texts[:3]}. Pass kinds={{{name!r}: ('date', format)}}, with the format "
            "as datetime.strptime has it, or convert the column."
        )
    raise ValueError(
        f"{start}; got {texts[:3]}, which {' and '.join(found)} read. Pass one: kinds={{{name!r}: "
        f"('date', {found[0]!r})}}."
    )


def _formats(texts: list[str]) -> list[str]:
    """The formats that read all texts, one of those that read the same in them."""
    distinct = dict.fromkeys(texts)
    between = {f"{date}{sep}{clock}" for date in FORMATS for sep in " T" for clock in CLOCKS}
    formats = [*FORMATS, *sorted(between)] if distinct else []
    for text in distinct:
        formats = [format for format in formats if parse(text, format) is not None]
    meanings = {tuple(parse(text, format) for text in distinct): format for format in formats[::-1]}
    return [*meanings.values()][::-1]


def parse(text: str, format: str) -> datetime.datetime | None:
    try:
        return datetime.datetime.strptime(text, format).replace(tzinfo=None)
    except ValueError:
        return None
