"""Parquet tables and Arrow files, also as Hugging Face datasets writes them.

A unit is a parquet row group, or the consecutive record batches of an Arrow file that make up
about `unit_samples` rows: pieces that the formats let one read alone. Images are paths, bytes, or
the {bytes, path} record of the datasets library.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsr_scale.base.errors import InputError
from dsr_scale.data.rows import RowColumns, row_to_sample
from dsr_scale.data.sources import Dropped, RawSample, SourceOptions, Unit

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_AT_A_TIME = 64


class TableSource:
    """Parquet or Arrow files; a unit's span is (first piece, end piece, first row number)."""

    def __init__(self, files: list[Path], kind: str, options: SourceOptions) -> None:
        self.kind = kind
        self.files = files
        self._options = options
        self._columns = {
            str(file): RowColumns.choose(self._names(file), options, str(file)) for file in files
        }

    def units(self) -> list[Unit]:
        """Row groups, or runs of record batches."""
        wanted = 1 if self.kind == "parquet" else self._options.unit_samples
        units = []
        for file in self.files:
            first = row = rows = 0
            lengths = self._piece_lengths(file)
            for piece, length in enumerate(lengths):
                rows += length
                if rows >= wanted or piece == len(lengths) - 1:
                    units.append(Unit(str(file), (first, piece + 1, row)))
                    first, row, rows = piece + 1, row + rows, 0
        return units

    def read(self, unit: Unit) -> Iterator[RawSample | Dropped]:
        """The unit's rows in order."""
        file = Path(unit.path)
        first, end, number = unit.span
        for batch in self._batches(file, first, end, None):
            for row in batch.to_pylist():
                yield row_to_sample(
                    row,
                    self._columns[unit.path],
                    default_key=f"{file.stem}:{number}",
                    root=self._root(file),
                )
                number += 1

    def missing_images(self) -> list[str]:
        """Paths in the image column that are no files; other columns are not read."""
        import pyarrow as pa

        missing = []
        for file in self.files:
            column = self._columns[str(file)].image
            kind = self._schema(file).field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                continue
            pieces = len(self._piece_lengths(file))
            for batch in self._batches(file, 0, pieces, column):
                paths = [path for path in batch.column(column).to_pylist() if path]
                missing += [path for path in paths if not (self._root(file) / path).is_file()]
        return missing

    def _root(self, file: Path) -> Path:
        return Path(self._options.image_root) if self._options.image_root else file.parent

    def _names(self, file: Path) -> list[str]:
        return list(self._schema(file).names)

    def _schema(self, file: Path) -> pa.Schema:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self.kind == "parquet":
                return pq.read_schema(file)
            with pa.memory_map(str(file)) as source:
                return _open_arrow(source).schema
        except pa.ArrowInvalid as error:
            raise InputError(
                found=f"{file} cannot be read as {self.kind} ({error})",
                required="a whole parquet file, or an Arrow IPC stream or file",
                remedy="fetch or write the file again",
            ) from error

    def _piece_lengths(self, file: Path) -> list[int]:
        """Rows of each row group or record batch."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.kind == "parquet":
            metadata = pq.read_metadata(file)
            return [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        with pa.memory_map(str(file)) as source:
            return [batch.num_rows for batch in _arrow_batches(_open_arrow(source))]

    def _batches(
        self, file: Path, first: int, end: int, column: str | None
    ) -> Iterator[pa.RecordBatch]:
        """Small record batches of the pieces first ≤ n < end; `column` None reads all columns."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.kind == "parquet":
            with pq.ParquetFile(file) as table:
                yield from table.iter_batches(
                    _ROWS_AT_A_TIME,
                    row_groups=list(range(first, end)),
                    columns=None if column is None else [column],
                )
            return
        with pa.memory_map(str(file)) as source:
            for piece, batch in enumerate(_arrow_batches(_open_arrow(source))):
                if first <= piece < end:
                    for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                        yield batch.slice(start, _ROWS_AT_A_TIME)


def _open_arrow(source: Any) -> Any:
    """A reader for the file format if the magic bytes say so, else for the stream format."""
    import pyarrow as pa

    magic = source.read(6)
    source.seek(0)
    return pa.ipc.open_file(source) if magic == b"ARROW1" else pa.ipc.open_stream(source)


def _arrow_batches(reader: Any) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)
