"""Dates and times as numbers of a unit, in wall-clock time, and back."""

import datetime
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxode._checks.caller import arg
from jaxode._checks.errors import first_row
from jaxode.tabular.columns.formats import format_of, parse, texts_of
from jaxode.tabular.columns.multiples import LARGEST_MULTIPLE
from jaxode.tabular.frames import Values, column_of

# The units of NumPy in which dates may be counted, from coarse to fine.
NAMES_OF_UNITS = {
    "Y": "years", "M": "months", "D": "days", "h": "hours", "m": "minutes", "s": "seconds",
    "ms": "milliseconds", "us": "microseconds",
}  # fmt: skip
UNITS = tuple(NAMES_OF_UNITS)
DAY = np.timedelta64(1, "D")
MICROSECOND = np.timedelta64(1, "us")
ROUND_SPANS = tuple(np.timedelta64(n, unit) for n, unit in (  # spacings of grids of times
    (1, "D"), (1, "h"), (30, "m"), (15, "m"), (1, "m"), (1, "s"), (1, "ms")
))  # fmt: skip
EPOCH = np.datetime64(0, "us")
DAYS_OF_YEAR = 365.25
DAYS_OF_WEEK = 7


@dataclass(frozen=True)
class Dates:
    """Count a unit of time from a date within the data, and return dates of the type read.

    Times are those that a clock on the wall shows: a day starts at midnight in its zone.
    """

    zone: str | None
    format: str | None
    """The format of texts, as `strptime` reads it."""
    days_alone: bool
    """Whether the type holds dates without a time."""
    unit: str = "us"
    start: np.datetime64 = EPOCH
    turns: tuple[str, ...] = ()
    """Those of "year", "week" and "day" in which a given column has an angle."""

    @classmethod
    def from_column(cls, name: str, frame: Any, format: str | None, is_given: bool) -> "Dates":
        """Find the type, the unit and the start of a training column."""
        series = frame[name]
        if series.is_null().all():
            return cls(None, None, False)
        if not is_date(series):
            format = format_of(name, texts_of(name, series)) if format is None else format
        elif format is not None:
            raise ValueError(
                f"{arg('kinds')} column {name!r} holds dates, not text; got the format {format!r}. "
                f"Pass kinds={{{name!r}: 'date'}}."
            )
        present = series.drop_nulls()
        examples = (present if str(series.dtype) == "Object" else present.head(1)).to_list()
        days_alone = all(type(date) is datetime.date for date in examples)
        dates = cls(_zone_of(series), format, days_alone)
        moments, missing = dates.read("frame", frame, name)
        moments = np.sort(moments[~missing])
        middle = moments[len(moments) // 2].astype("M8[D]")
        dates = replace(dates, start=middle.astype("M8[us]"))
        unit = next(u for u in UNITS if (moments.astype(f"M8[{u}]") == moments).all())
        if is_given:
            return replace(dates, unit="D", turns=_turns(moments, unit))
        dates = replace(dates, unit=unit)
        if np.abs(dates.numbers(moments)).max() > LARGEST_MULTIPLE:
            raise ValueError(
                f"{arg('frame')} column {name!r} must span at most 2**50 of the units that its "
                f"times are rounded to; got {dates.name_of_unit} from {moments[0]} to "
                f"{moments[-1]}. Round them, such as to seconds."
            )
        return dates

    @property
    def ratios(self) -> tuple[int, ...]:
        """Spacings of the grids of times, in units: whole days, hours and so on."""
        if self.unit in "YMD":
            return ()
        unit = np.timedelta64(1, self.unit)
        return tuple(int(span / unit) for span in ROUND_SPANS if span > unit)

    @property
    def name_of_unit(self) -> str:
        return NAMES_OF_UNITS[self.unit]

    def values(self, name: str, frame: Any, column: str) -> Values:
        """A column of a frame, as numbers."""
        moments, missing = self.read(name, frame, column)
        return Values(np.where(missing, np.nan, self.numbers(moments)), missing, False)

    def read(self, name: str, frame: Any, column: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of a frame as `datetime64[us]` of wall clocks, and the mask of missing ones."""
        series = column_of(name, frame, column)
        missing = np.array(series.is_null().to_numpy(), bool)
        moments = np.full(len(missing), self.start)
        if missing.all():  # whatever its type
            return moments, missing
        start = f"{arg(name)} column {column!r}"
        if is_date(series) != (self.format is None):
            had = f"texts of format {self.format!r}" if self.format else "dates"
            raise TypeError(
                f"{start} must have the type it had in training, {had}; got {series.dtype}."
            )
        if self.format is not None:
            moments[~missing] = self._parsed(
                start, texts_of(column, series), np.flatnonzero(~missing)
            )
            return moments, missing
        zone = _zone_of(series)
        if (zone is None) != (self.zone is None):
            raise TypeError(
                f"{start} must have {self.zone or 'no'} time zone, as in training; got "
                f"{zone or 'none'}. Convert it: .dt.tz_localize({self.zone!r})."
            )
        present = series.drop_nulls()
        if self.zone is None:
            times = present.to_list() if str(series.dtype) == "Object" else present.to_numpy()
        elif series.implementation.is_pandas_like():
            times = present.to_native().dt.tz_convert(self.zone).dt.tz_localize(None)
        else:
            times = present.dt.convert_time_zone(self.zone).dt.replace_time_zone(None).to_numpy()
        moments[~missing] = np.asarray(times).astype("M8[us]")
        return moments, missing

    def _parsed(self, start: str, texts: list[str], rows: np.ndarray) -> np.ndarray:
        """The dates of texts, which stand in these rows. `start` begins the message of an error."""
        parsed = {text: parse(text, str(self.format)) for text in dict.fromkeys(texts)}
        first_row(
            np.array([parsed[text] is None for text in texts], bool),
            lambda i: (
                f"{start} must hold dates of format {self.format!r}; got {texts[i]!r} in row "
                f"{rows[i]}. Correct it, or make it missing."
            ),
        )
        return np.array([parsed[text] for text in texts], "M8[us]")

    def numbers(self, moments: np.ndarray) -> np.ndarray:
        """Units since the start; a fraction for a time between two units."""
        if self.unit not in "YM":
            unit = np.timedelta64(1, self.unit)
            return (moments - self.start.astype(f"M8[{self.unit}]")) / unit
        units = moments.astype(f"M8[{self.unit}]")
        count = (units - self.start.astype(units.dtype)).astype(float)
        return np.where(units == moments, count, count + 0.5)

    def moments(self, numbers: np.ndarray) -> np.ndarray:
        """The inverse of `numbers`, for whole numbers: days, or `datetime64` of the unit."""
        start = self.start.astype(f"M8[{self.unit}]")
        moments = start + np.round(numbers).astype(f"m8[{self.unit}]")
        return moments.astype("M8[D]") if self.unit in "YM" else moments

    def objects(self, numbers: np.ndarray) -> np.ndarray:
        """Dates of the type that was read, or texts. None stays None."""
        objects = np.full(len(numbers), None, object)
        rows = np.flatnonzero([number is not None for number in numbers])
        moments = self.moments(numbers[rows].astype(float)).astype("M8[us]").tolist()
        for row, moment in zip(rows, moments, strict=True):
            objects[row] = self._object(moment)
        return objects

    def _object(self, moment: datetime.datetime) -> Any:
        """A time of wall clocks as a date of the type that was read, or as text."""
        if self.format is not None:
            return moment.strftime(self.format)
        if self.days_alone:
            return moment.date()
        if self.zone is None:
            return moment
        zone = _zone(self.zone)
        # By way of UTC, a time that the clocks skip becomes the one after it.
        return moment.replace(tzinfo=zone).astimezone(datetime.UTC).astimezone(zone)

    def angles(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The angles of given dates in the year, the week and the day, where they vary."""
        moments = self.start.astype("M8[D]") + (numbers * (DAY / MICROSECOND)).round().astype(
            "m8[us]"
        )
        days = moments.astype("M8[D]")
        turns = {
            "year": (days - moments.astype("M8[Y]")) / DAY / DAYS_OF_YEAR,
            "week": days.astype(int) % DAYS_OF_WEEK / DAYS_OF_WEEK,
            "day": (moments - days) / DAY,
        }
        return [2 * np.pi * turns[name] for name in self.turns]

    def bounds(self, name: str, bounds: Any) -> Any:
        """Pairs of dates or ISO texts as numbers, rounded inwards to whole units."""
        if not isinstance(bounds, tuple | list) or len(bounds) != 2:
            return bounds  # `kinds._bounds` raises for it
        pairs = zip(bounds, (np.ceil, np.floor), strict=True)
        return [
            None if bound is None else float(inwards(self._bound(name, bound)))
            for bound, inwards in pairs
        ]

    def _bound(self, name: str, value: Any) -> float:
        """A date or an ISO text as a number. Raises if it is neither, or has a needless zone."""
        try:
            moment = datetime.datetime.fromisoformat(value) if isinstance(value, str) else value
            if getattr(moment, "tzinfo", None) is not None and self.zone is not None:
                moment = moment.astimezone(_zone(self.zone)).replace(tzinfo=None)
            if not isinstance(moment, datetime.date | np.datetime64) or moment != moment:
                raise ValueError
            if getattr(moment, "tzinfo", None) is not None:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{arg('bounds')} column {name!r} must have dates as bounds, or texts such as "
                f"'2020-01-31', without a time zone if it has none; got {value!r}."
            ) from None
        return float(self.numbers(np.array([moment], "M8[us]"))[0])

    def show(self, number: float) -> str:
        """A number as a date."""
        return str(self.moments(np.array(number))) if np.isfinite(number) else str(number)


def is_date(series: Any) -> bool:
    """Whether a column has a type of dates, or all of its objects are dates."""
    kind = str(series.dtype).split("(")[0]
    if kind != "Object":
        return kind in ("Date", "Datetime") or _zone_of(series) is not None
    values = series.drop_nulls().to_list()

    def naive(v):
        return isinstance(v, datetime.date) and getattr(v, "tzinfo", None) is None

    return bool(values) and all(map(naive, values))


def _zone_of(series: Any) -> str | None:
    """The name of the time zone; that of pandas, too, if narwhals cannot read it (`New_York`)."""
    zone = getattr(getattr(series.to_native(), "dtype", None), "tz", None)
    return getattr(series.dtype, "time_zone", None) or (None if zone is None else str(zone))


def _zone(name: str) -> datetime.tzinfo:
    """A named zone, or a fixed offset such as UTC+01:00."""
    import zoneinfo  # not loaded with jaxode

    if offset := re.search(r"[+-]\d\d:\d\d$", name):
        zone = datetime.datetime.strptime(offset.group(), "%z").tzinfo
        assert zone is not None
        return zone
    return zoneinfo.ZoneInfo(name)


def _turns(moments: np.ndarray, unit: str) -> tuple[str, ...]:
    """Those of "year", "week" and "day" in which the times differ."""

    def differ(places):
        return len(np.unique(places)) > 1

    days, fine = moments.astype("M8[D]"), UNITS.index(unit)
    months = moments.astype("M8[M]").astype(int) % 12
    varies = {
        "year": differ(months),
        "week": fine >= UNITS.index("D") and differ(days.astype(int) % DAYS_OF_WEEK),
        "day": fine > UNITS.index("D") and differ((moments - days) // np.timedelta64(1, "h")),
    }
    return tuple(name for name, does_vary in varies.items() if does_vary)
