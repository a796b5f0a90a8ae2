"""Aligned text tables and files that appear whole or not at all."""

import csv
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def format_value(value: Any, digits: int = 4) -> str:
    """A table cell: numbers with `digits` significant digits, NaN and None as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return str(value)


def format_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None, digits: int = 4) -> str:
    """Rows as aligned text; numbers to the right, words to the left.

    Args:
        rows: one mapping per line.
        columns (*optional*): key -> heading, in order; default: the keys of the first row.
        digits (`int`): significant digits of floats.
    """
    if not rows:
        return "(empty table)"
    columns = {key: key for key in rows[0]} if columns is None else columns
    cells = [[format_value(row.get(key), digits) for key in columns] for row in rows]
    numeric = [all(isinstance(row.get(key), (int, float, type(None))) for row in rows) for key in columns]
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(columns.values())]

    def line(items: Sequence[str]) -> str:
        padded = (t.rjust(w) if n else t.ljust(w) for t, w, n in zip(items, widths, numeric, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(list(columns.values())), line(["-" * w for w in widths]), *map(line, cells)])


def plain(value: Any) -> Any:
    """JSON-able copy: arrays become lists, numpy numbers plain numbers, NaN and infinities `None`."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_text(path: str | Path, text: str) -> Path:
    """Writes a text file under a temporary name and renames it, so that no partial file is ever seen."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_table(path: str | Path, rows: Sequence[Mapping[str, Any]], report: Any = None) -> Path:
    """Saves by file ending: `.json` (the `report`, else the rows) or `.csv` (the rows)."""
    path = Path(path)
    if path.suffix == ".json":
        return write_text(path, json.dumps(plain(rows if report is None else report), indent=2) + "\n")
    if path.suffix == ".csv":
        import io

        keys = list(dict.fromkeys(key for row in rows for key in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain(row) for row in rows)
        return write_text(path, buffer.getvalue())
    raise ValueError(f"{path}: the report is written as .json or .csv, got {path.suffix or 'no ending'!r}")
