"""JSONL and CSV lists: one sample per record, the image given by its path.

Planning reads the file once and notes the byte offset of every unit's first record; a CSV record
may span lines, so offsets are taken where the CSV reader itself has finished one.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dsr_scale.base.errors import InputError
from dsr_scale.data.rows import RowColumns, row_to_sample
from dsr_scale.data.sources import Dropped, RawSample, SourceOptions, Unit

csv.field_size_limit(1 << 27)


class ListSource:
    """JSONL or CSV files. A unit's span is (byte offset, first record number, record count)."""

    def __init__(self, files: list[Path], kind: str, options: SourceOptions) -> None:
        self.kind = kind
        self.files = files
        self._options = options
        self._columns = {str(file): self._choose_columns(file) for file in files}

    def units(self) -> list[Unit]:
        """Units of `unit_samples` records each."""
        size = self._options.unit_samples
        units = []
        for file in self.files:
            starts = [
                (offset, number)
                for number, (offset, _) in enumerate(self._records(file, 0))
                if number % size == 0
            ]
            units += [Unit(str(file), (offset, number, size)) for offset, number in starts]
        return units

    def read(self, unit: Unit) -> Iterator[RawSample | Dropped]:
        """The unit's records in order."""
        file = Path(unit.path)
        offset, first, count = unit.span
        records = itertools.islice(self._records(file, offset), count)
        for number, (_, row) in enumerate(records, first):
            yield row_to_sample(
                row,
                self._columns[unit.path],
                default_key=f"{file.stem}:{number}",
                root=self._root(file),
            )

    def missing_images(self) -> list[str]:
        """Paths in the lists that are no files."""
        missing = []
        for file in self.files:
            column, root = self._columns[str(file)].image, self._root(file)
            for _, row in self._records(file, 0):
                value = row.get(column)
                if isinstance(value, str) and value and not (root / value).is_file():
                    missing.append(value)
        return missing

    def _root(self, file: Path) -> Path:
        return Path(self._options.image_root) if self._options.image_root else file.parent

    def _choose_columns(self, file: Path) -> RowColumns:
        first = next(iter(self._records(file, 0)), None)
        if first is None:
            raise InputError(
                found=f"{file} has no records",
                required="at least one sample",
                remedy="correct the path, or remove the empty file",
            )
        return RowColumns.choose(list(first[1]), self._options, str(file))

    def _records(self, path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(byte offset, row) of every record from `offset` on."""
        parse = _json_records if self.kind == "jsonl" else _csv_records
        with path.open("rb") as file:
            yield from parse(file, offset, path)


def _json_records(file: BinaryIO, offset: int, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    file.seek(offset)
    for line in file:
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _bad_record(path, offset, str(error)) from error
            if not isinstance(row, dict):
                raise _bad_record(path, offset, f"a {type(row).__name__}")
            yield offset, row
        offset += len(line)


def _csv_records(file: BinaryIO, offset: int, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines, position = _counted_lines(file, path)
    header = next(csv.reader(lines, delimiter=delimiter), None)
    if header is None:
        return
    header[0] = header[0].removeprefix("\ufeff")
    if offset > position():
        file.seek(offset)
        lines, position = _counted_lines(file, path)
    start = position()
    for values in csv.reader(lines, delimiter=delimiter):
        if values:
            if len(values) != len(header):
                raise _bad_record(path, start, f"{len(values)} values for {len(header)} columns")
            yield start, dict(zip(header, values, strict=True))
        start = position()


def _counted_lines(file: BinaryIO, path: Path) -> tuple[Iterator[str], Callable[[], int]]:
    """The file's lines as text, and a function that tells the offset behind the last one taken."""
    taken = file.tell()

    def lines() -> Iterator[str]:
        nonlocal taken
        for line in iter(file.readline, b""):
            start, taken = taken, taken + len(line)
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise _bad_record(path, start, str(error)) from error

    return lines(), lambda: taken


def _bad_record(path: Path, offset: int, problem: str) -> InputError:
    return InputError(
        found=f"{path}, record at byte {offset}: {problem}",
        required="one JSON object per line, or UTF-8 CSV with a header and as many values",
        remedy="correct that record",
    )
