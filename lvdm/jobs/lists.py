"""Lists of samples in files: CSV, TSV, JSONL or Parquet."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lvdm.errors import UserError

CAPTION_COLUMNS = ("caption", "text")
"""What a column of captions is usually called."""

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NUMBER = re.compile(r"[-+]?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")  # 007 is a name


def read_rows(path: str, texts: Collection[str] = ()) -> list[dict[str, Any]]:
    """The rows of a local file by column, of which there is at least one.

    Columns of a CSV or TSV file that hold numbers or booleans alone are such, and their empty cells None.

    Args:
        texts: columns of such files that stay texts, whatever they hold.
    Raises:
        UserError: the file cannot be read, or has no rows.
    """
    try:
        match suffix := Path(path).suffix.lower():
            case ".csv" | ".tsv":
                with open(path, newline="", encoding="utf-8-sig") as stream:
                    rows = list(csv.DictReader(stream, delimiter=_DELIMITERS[suffix]))
                for number, row in enumerate(rows, start=1):
                    if any(row.pop(None, ())):
                        raise UserError(f"{path}: row {number} has more cells than there are columns; quote its texts")
                rows = _typed(rows, texts)
            case ".jsonl" | ".ndjson":
                with open(path, encoding="utf-8-sig") as stream:
                    rows = [json.loads(line) for line in stream if line.strip()]
                if not all(isinstance(row, dict) for row in rows):
                    raise UserError(f"{path}: each line must hold one JSON object")
            case ".parquet":
                rows = pq.read_table(path).to_pylist()
            case _:
                raise UserError(f"{path}: a list is .csv, .tsv, .jsonl or .parquet, not {suffix or 'without suffix'}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UserError:
        raise
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be parsed: {error}") from None
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def pick_column(
    path: str, rows: Sequence[dict[str, Any]], chosen: str, usual: Sequence[str], needed: bool = True
) -> str:
    """The column ``chosen``, or else the first of the usual ones; empty if there is none and none is needed.

    Raises:
        UserError: there is no such column.
    """
    columns = dict.fromkeys(name for row in rows for name in row)
    name = chosen or next((name for name in usual if name in columns), "")
    if (needed or name) and name not in columns:
        raise UserError(f"{path} has no column {chosen or ' / '.join(usual)}; it has {', '.join(map(str, columns))}")
    return name


def _typed(rows: list[dict[str, Any]], texts: Collection[str]) -> list[dict[str, Any]]:
    """Rows whose columns of numbers or of booleans are such, as conditions want them; an empty cell is None there."""
    kinds: dict[str, Callable[[str], Any]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name not in texts):
        cells = {str(row.get(name) or "").strip() for row in rows} - {""}
        if cells and all(_NUMBER.fullmatch(cell) for cell in cells):
            kinds[name] = float
        elif cells and cells <= {"True", "False", "true", "false"}:
            kinds[name] = lambda cell: cell.lower() == "true"
    return [
        {
            name: (kinds[name](value) if str(value or "").strip() else None) if name in kinds else value
            for name, value in row.items()
        }
        for row in rows
    ]
