"""The formats of dates in text."""

import datetime
import math
import re
from typing import Any

from jaxode._checks.caller import arg

# Formats of dates to try; each is also tried with a time from `CLOCKS` after it.
FORMATS = (
    "%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%Y%m%d", "%Y-%m", "%d %b %Y", "%d-%b-%Y", "%b %d, %Y",
    "%d %B %Y", "%B %d, %Y", "%b-%Y", *(f"{first}{sep}%{year}" for sep in "./-" for year in "Yy"
    for first in (f"%d{sep}%m", f"%m{sep}%d")),
)  # fmt: skip
CLOCKS = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%H:%M:%SZ", "%H:%M:%S.%fZ")
TEXTS_TO_JUDGE = 100  # categories that tell whether a column holds dates or numbers
MIN_SHARE_OF_NUMBERS = 0.8  # of texts: the others may stand for missing numbers


def cure_of_dates(frame: Any, column: str) -> str:
    """How to read a column of texts that are dates; empty if they are not."""
    texts = frame[column].drop_nulls().head(TEXTS_TO_JUDGE).to_list()
    if not all(isinstance(text, str) and re.search(r"\d", text) for text in texts):
        return ""
    if not (formats := _formats(texts)):
        return ""
    kind = "date" if len(formats) == 1 else ("date", formats[0])
    return f"Read it as dates: kinds={{{column!r}: {kind!r}}}."


def cure_of_numbers(frame: Any, column: str) -> str:
    """How to read a column of texts of which most are numbers; empty if they are not."""
    texts = frame[column].drop_nulls().head(TEXTS_TO_JUDGE).to_list()
    if not texts or sum(map(_is_number, texts)) < MIN_SHARE_OF_NUMBERS * len(texts):
        return ""
    return f"If it holds numbers, pass pandas.to_numeric(frame[{column!r}], errors='coerce'). "


def _is_number(text: Any) -> bool:
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False


def texts_of(name: str, series: Any) -> list[str]:
    """The texts of a column that are not missing. Raises if it holds anything else."""
    texts = series.drop_nulls().to_list()
    if str(series.dtype).startswith("Enum") or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"{arg('kinds')} column {name!r} must hold dates, or texts of dates, to be a date; got "
            f"{series.dtype}. Convert it, such as by pandas.to_datetime."
        )
    return texts


def format_of(name: str, texts: list[str]) -> str:
    """The format of all texts. Raises if there is none, or several that differ in meaning."""
    formats = _formats(texts)
    if len(formats) == 1:
        return formats[0]
    start = f"{arg('kinds')} column {name!r} must hold texts of one format of dates"
    if not formats:
        raise ValueError(
            f"{start}; got {texts[:3]}. Pass kinds={{{name!r}: ('date', format)}}, with the format "
            "as datetime.strptime has it, or convert the column."
        )
    raise ValueError(
        f"{start}; got {texts[:3]}, which {' and '.join(formats)} read. Pass one: "
        f"kinds={{{name!r}: ('date', {formats[0]!r})}}."
    )


def _formats(texts: list[str]) -> list[str]:
    """The formats that read all texts; of those that read the same dates, the first."""
    distinct = dict.fromkeys(texts)
    with_time = {f"{date}{sep}{clock}" for date in FORMATS for sep in " T" for clock in CLOCKS}
    formats = [*FORMATS, *sorted(with_time)] if distinct else []
    for text in distinct:
        formats = [format for format in formats if parse(text, format) is not None]
    meanings = {tuple(parse(text, format) for text in distinct): format for format in formats[::-1]}
    return [*meanings.values()][::-1]


def parse(text: str, format: str) -> datetime.datetime | None:
    """The time of a text in wall-clock time, or None if it has another format."""
    try:
        return datetime.datetime.strptime(text, format).replace(tzinfo=None)
    except ValueError:
        return None
