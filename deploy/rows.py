"""The rows of a file of past chats, one by one: JSON Lines, CSV or Parquet, in memory that does not grow with the file."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, get_args

from deploy.door import NotDone

Format = Literal["jsonl", "csv", "parquet"]
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"
}  # fmt: skip
LONGEST_BYTES = 8 << 20
"""Of one line, or one cell: twice what a chat may be over HTTP."""
NEEDS_PYARROW = "Parquet needs pyarrow, which is not installed: pip install 'heed[parquet]'"

_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: what it says, or why it cannot be read."""

    number: int
    """Of its first line in the file, from 1; of a Parquet file, of the row."""
    values: Values
    """By column; what is absent, empty or NaN is not among them."""
    problem: str | None
    share: float
    """Of the file that was read so far, 0 to 1."""


def format_of(path: Path, named: str | None) -> Format:
    """The format that was named, else the suffix's. Raises NotDone."""
    if named is not None and named not in get_args(Format):
        raise NotDone(f"--format {named}: must be one of {', '.join(get_args(Format))}.")
    found = next((one for one in get_args(Format) if one == named), SUFFIXES.get(path.suffix.lower()))
    if found is None:
        raise NotDone(f"{path} has none of the suffixes {', '.join(SUFFIXES)}: say what it is with --format.")
    return found


class Rows:
    """The rows of one file, to be gone through as often as needed."""

    def __init__(self, path: Path, kind: Format, columns: Collection[str]) -> None:
        """`columns`: those that mean something; others are passed over."""
        self.path, self.kind, self.columns = path, kind, columns
        self.unknown: dict[str, None] = {}
        """Columns that mean nothing here, in the order in which they were met."""

    def __iter__(self) -> Iterator[Row]:
        """Raises NotDone for a file of another format, OSError for one that cannot be read."""
        if not self.path.is_file():
            raise NotDone(f"{self.path} is not a file that is there.")
        if self.kind == "parquet":
            yield from self._parquet()
            return
        with self.path.open("rb") as file:
            size = max(1, self.path.stat().st_size)
            for number, values, problem in self._jsonl(file) if self.kind == "jsonl" else self._csv(file):
                yield Row(number, self._known(values), problem, file.tell() / size)

    def _known(self, values: Values) -> Values:
        self._note(values)
        return {
            name: value
            for name, value in values.items()
            if name in self.columns and value is not None and not (isinstance(value, float) and math.isnan(value))
        }

    def _note(self, names: Collection[str]) -> None:
        new = [name for name in names if name not in self.columns]
        self.unknown.update(dict.fromkeys(new[: max(0, 20 - len(self.unknown))]))

    def _jsonl(self, file: BinaryIO) -> Iterator[tuple[int, Values, str | None]]:
        for number in itertools.count(1):
            line = file.readline(LONGEST_BYTES)
            if not line:
                return
            if len(line) == LONGEST_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(LONGEST_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield number, {}, f"is longer than {LONGEST_BYTES >> 20} MiB"
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, *_object(line)

    def _csv(self, file: BinaryIO) -> Iterator[tuple[int, Values, str | None]]:
        csv.field_size_limit(LONGEST_BYTES)
        # bytes that are no UTF-8 become what no text may hold, so that their row is told by number
        with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
            yield from self._records(text)

    def _records(self, text: TextIO) -> Iterator[tuple[int, Values, str | None]]:
        reader = csv.reader(text, strict=True)
        try:
            names = next(reader, [])
        except csv.Error as error:
            raise NotDone(f"{self.path}: its first line is no CSV: {error}") from error
        if len(set(names)) < len(names):
            raise NotDone(f"{self.path} names a column twice in its first line: {', '.join(names)}.")
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, {}, f"is no CSV: {error}"
                continue
            if len(cells) > len(names):
                yield number, {}, f"has {len(cells)} cells, and the first line names {len(names)} columns"
            elif cells:
                yield number, *_cells(names, cells)

    def _parquet(self) -> Iterator[Row]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise NotDone(NEEDS_PYARROW) from error
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                self._note(names)
                known = [name for name in names if name in self.columns]
                numbers = itertools.count(1)
                for batch in file.iter_batches(batch_size=256, columns=known):
                    for values, number in zip(batch.to_pylist(), numbers, strict=False):
                        yield Row(number, self._known(values), None, number / max(1, file.metadata.num_rows))
        except pyarrow.ArrowException as error:
            raise NotDone(f"{self.path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _cells(names: Sequence[str], cells: Sequence[str]) -> tuple[Values, str | None]:
    """The cells that are not empty; one that begins as a list of messages does is read as JSON."""
    values: Values = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
    try:
        read = {name: json.loads(cell) for name, cell in values.items() if _MESSAGES.match(cell)}
    except (ValueError, RecursionError) as error:
        return dict.fromkeys(values, ""), f"has a cell that begins as a list of messages does and is no JSON: {error}"
    return values | read, None


def _object(line: bytes) -> tuple[Values, str | None]:
    try:
        values = json.loads(line)
    except UnicodeDecodeError:
        return {}, "is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return {}, f"is no JSON: {error}"
    if not isinstance(values, dict):
        return {}, f"must be a JSON object, not {type(values).__name__}"
    return values, None
