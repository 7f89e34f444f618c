"""An append-only file of finished blocks of rows, so that work killed at any moment goes on where it was.

One line a block; the first line says what the work is: another work never goes on from it. Notes of the work, what is
to be found out once only, have lines of their own. Knows no teachers.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from core.errors import ConfigError
from training.data_format import Row, parse_json_line, parse_list, parse_row, row_to_json
from training.data_quality import DataError, ReadPolicy, RowError

TRUSTED = ReadPolicy(need_answer=False)  # its rows were checked before they came here


class Journal:
    """Finished rows by id. A block counts once its whole line is on disk; a torn last line is cut off at opening.

    rows   what is finished
    notes  what `note` was given
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Open or begin a journal. Raises ConfigError where it is of other settings, DataError where it is damaged."""
        self.rows: dict[str, Row] = {}
        self.notes: dict[str, Any] = {}
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            self._read(settings)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self, settings: dict[str, Any]) -> None:
        """Take in what is there, cut off what is torn, and begin the file where nothing is left.

        One of other settings without a single block is begun anew: its work ended before it did anything, as it does
        where a teacher's name is wrong. Raises ConfigError, and DataError where a line before the last is damaged.
        """
        self._file.seek(0)
        kept = 0
        found: Any = settings
        for number, line in enumerate(self._file, start=1):
            try:
                if not line.endswith(b"\n"):
                    break
                values = parse_json_line(line)
                if number == 1:
                    found = values.get("settings")
                elif isinstance(values.get("notes"), dict):
                    self.notes |= values["notes"]
                else:
                    self._remember(parse_row(row, TRUSTED) for row in parse_list(values, "rows"))
            except RowError as error:
                if next(self._file, None) is not None:
                    raise DataError(f"{self._path}, line {number}: {error}; delete the file to begin anew") from None
                break  # a torn write: this block is done again
            kept += len(line)
        if found != settings:
            if self.rows:
                raise self._other_settings(found, settings)
            kept = 0
            self.notes.clear()
        self._file.truncate(kept)
        if kept == 0:
            self._append(json.dumps({"settings": settings}, sort_keys=True))

    def add(self, rows: Sequence[Row]) -> None:
        """Append a finished block; it is on disk when this returns. Raises DataError."""
        self._append(f'{{"rows": [{", ".join(map(row_to_json, rows))}]}}')
        self._remember(rows)

    def note(self, name: str, value: Any) -> None:
        """Keep `value`, plain JSON, under `name`; it is on disk when this returns. Raises DataError."""
        self._append(json.dumps({"notes": {name: value}}))
        self.notes[name] = value

    def delete(self) -> None:
        """Remove the journal: the work is done and saved elsewhere."""
        self._file.close()
        self._path.unlink()

    def _remember(self, rows: Iterable[Row]) -> None:
        self.rows |= {row.id: row for row in rows}

    def _append(self, line: str) -> None:
        try:
            self._file.write(f"{line}\n".encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self._path.name}: cannot be written: {error.strerror or error}") from None

    def _other_settings(self, found: Any, wanted: dict[str, Any]) -> ConfigError:
        old = found if isinstance(found, dict) else {}
        changed = sorted(key for key in old.keys() | wanted.keys() if old.get(key) != wanted.get(key))
        return ConfigError(
            f"{self._path}: was begun with other settings ({', '.join(changed)}); "
            "go on with those, or delete the file to begin anew"
        )
