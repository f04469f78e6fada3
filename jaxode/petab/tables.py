"""The files of a problem: its YAML file and tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxode._checks.caller import arg

Table = list[dict[str, str]]
COLUMNS = {
    "parameter": (
        "parameterId", "parameterScale", "lowerBound", "upperBound", "nominalValue", "estimate",
    ),
    "condition": ("conditionId",),
    "observable": ("observableId", "observableFormula", "noiseFormula"),
    "measurement": ("observableId", "simulationConditionId", "measurement", "time"),
}  # fmt: skip


class Tables(NamedTuple):
    """The lines of each table, and the file of the model."""

    sbml: Path
    parameter: Table
    condition: Table
    observable: Table
    measurement: Table


def read_tables(path: Any) -> Tables:
    """Read the YAML file of a problem, and the tables that it names."""
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{arg('path')} must be a file; got {str(path)!r}. Look for it.") from None
    except (IsADirectoryError, UnicodeDecodeError, yaml.YAMLError):
        content = None
    content = content if isinstance(content, dict) else {}
    problems = content.get("problems")
    if not isinstance(problems, list) or not all(isinstance(entry, dict) for entry in problems):
        raise ValueError(
            f"{arg('path')} must be the YAML file of a PEtab problem; got {path.name!r}, which has "
            "no problems. Pass the file that names the tables."
        )
    if str(content.get("format_version")) != "1" or len(problems) != 1:
        raise ValueError(
            f"{arg('path')} must be one problem of PEtab's version 1; got version "
            f"{content.get('format_version')!r} and {len(problems)} problems. Write a file for "
            "each."
        )
    entry = {**problems[0], "parameter_files": content.get("parameter_file")}

    def files(kind):
        return _files(path, entry, f"{kind}_files")

    models, tables = files("sbml"), {}
    if len(models) > 1:
        raise ValueError(
            f"{arg('path')} must have one model; got {len(models)} sbml_files. Write a file "
            "for each."
        )
    for kind, columns in COLUMNS.items():
        tables[kind] = [line for file in files(kind) for line in _lines(file, columns)]
        if kind != "measurement":
            _check_unique([line[columns[0]] for line in tables[kind]], columns[0], kind)
    if not tables["measurement"]:
        raise ValueError(f"{arg('path')} must have measurements; got an empty table. Add them.")
    return Tables(models[0], **tables)


def number(line: dict[str, str], column: str, kind: str) -> float:
    """The number in a cell of a table of some kind. NaN if it is empty."""
    try:
        return float(line[column] or "nan")
    except ValueError:
        raise ValueError(
            f"{arg('path')} {column} must be numbers; got {line[column]!r} for "
            f"{line[COLUMNS[kind][0]]!r}. Mend the table of {kind}s."
        ) from None


def _check_unique(names: list[str], column: str, kind: str) -> None:
    for name in names:
        if not name:
            raise ValueError(
                f"{arg('path')} {column} must not be empty; got a line without one. Mend the "
                f"table of {kind}s."
            )
        if names.count(name) > 1:
            raise ValueError(
                f"{arg('path')} {column} must be unique; got {name!r} {names.count(name)} times. "
                f"Mend the table of {kind}s."
            )


def _files(path: Path, entry: dict[str, Any], key: str) -> list[Path]:
    """The files that an entry of the YAML file names under a key."""
    named = entry.get(key) or []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{arg('path')} {key} must be names of files; got {named!r}. Mend them.")
    files = [path.parent / name for name in named]
    if not files:
        raise ValueError(f"{arg('path')} must have {key}; got none in {path.name!r}. Add them.")
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{arg('path')} {key} must be files; got {str(file)!r}, which there is not. Add it."
            )
    return files


def _lines(file: Path, columns: Sequence[str]) -> Table:
    import csv  # `import jaxode` does not load it

    with file.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened, delimiter="\t")
        header = list(reader.fieldnames or ())
        lines = [
            {key: (cell or "").strip() for key, cell in line.items() if key} for line in reader
        ]
    for column in columns:
        if column not in header:
            raise ValueError(
                f"{arg('path')} {file.name} must have the column {column!r}; got {header}. Add it."
            )
    return [line for line in lines if any(line.values())]
