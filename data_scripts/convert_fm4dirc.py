"""FM4DIRC data files (pickled lists of tracks) -> sharded Parquet, and back.

The files of FM4DIRC (arXiv 2505.08736) are Python pickles: a list of dicts of numpy arrays, written by `pickle.dump`
or `numpy.save`. A pickle can run any program when it is loaded, so they are read by an unpickler that knows arrays of
numbers, the built-in containers and nothing else; it never calls into code that the file names.
"""

import argparse
import ast
import io
import mmap
import os
import pickle
import pickletools
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hepzoo.data_scripts.dirc_schema import DIRC_FEATURES, SPECIES_PDG, columns_to_records
from hepzoo.data_scripts.shards import ShardWriter
from hepzoo.tokenization.geometry_dirc import DircGeometry
from hepzoo.tokenization.records_dirc import fiducial_cut, rows_to_columns

HIT_FIELDS = ("pmtID", "pixelID", "leadTime")
KNOWN_FIELDS = {"P", "Theta", "Phi", "PDG", "PID", "NHits", "channel", "x", "y", *HIT_FIELDS}
CHUNK_ROWS = 1000
FLOAT32_MAX = float(np.finfo(np.float32).max)


# ---------------------------------------------------------------------------------------------------------------------
# The restricted unpickler
# ---------------------------------------------------------------------------------------------------------------------


class _PickledDtype:
    """Stands for numpy.dtype while unpickling: a plain number type, or object."""

    __slots__ = ("dtype",)

    def __init__(self, name: str):
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        if not (isinstance(state, tuple) and len(state) >= 8 and state[1] in ("<", ">", "|", "=")):
            raise pickle.UnpicklingError("malformed numpy dtype")
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("structured numpy dtypes are not allowed")
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """Stands for numpy.ndarray while unpickling; the array is built from its raw bytes by `_array_from_bytes`."""

    __slots__ = ("value",)

    def __init__(self):
        self.value = None

    def __setstate__(self, state):
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _PickledDtype)):
            raise pickle.UnpicklingError("malformed numpy array")
        _, shape, dtype, fortran, raw = state
        if dtype.dtype == object:
            if not isinstance(raw, list) or _size(shape) != len(raw):
                raise pickle.UnpicklingError("malformed numpy object array")
            # Kept as a list: only the outermost container of a file may be one.
            self.value = _ObjectArray(raw)
            return
        self.value = _array_from_bytes(raw, dtype, shape, "F" if fortran else "C")


class _ObjectArray(list):
    """Elements of a numpy object array."""


class _Callable:
    """What a global name in the file resolves to; it has no state that a file could change."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args):
        return self._function(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError("the file tries to change a function")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("the file tries to change a function")


def _size(shape: Any) -> int:
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise pickle.UnpicklingError("malformed numpy array shape")
    size = 1
    for n in shape:
        size *= n
    return size


def _array_from_bytes(raw: Any, dtype: Any, shape: Any, order: Any = "C", axes: Any = None) -> np.ndarray:
    if isinstance(raw, str):  # written by Python 2
        raw = raw.encode("latin1")
    if not isinstance(dtype, _PickledDtype) or dtype.dtype == object or not isinstance(raw, (bytes, bytearray)):
        raise pickle.UnpicklingError("malformed numpy array")
    if axes is not None:
        raise pickle.UnpicklingError("numpy arrays with permuted axes are not read")
    if order not in ("C", "F") or _size(shape) * dtype.dtype.itemsize != len(raw):
        raise pickle.UnpicklingError("a numpy array whose shape does not fit its data")
    native = dtype.dtype.newbyteorder("=")
    return np.frombuffer(raw, dtype=dtype.dtype).astype(native).reshape(shape, order=order)


def _make_dtype(name: Any, *flags) -> _PickledDtype:
    if not isinstance(name, str) or not re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248]|O8?)", name):
        raise pickle.UnpicklingError(f"numpy dtype {str(name)[:40]!r} is not allowed")
    return _PickledDtype(name)


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> _PickledArray:
    if kind is not _NDARRAY:
        raise pickle.UnpicklingError("malformed numpy array")
    return _PickledArray()


def _scalar(dtype: Any, raw: Any) -> Any:
    return _array_from_bytes(raw, dtype, ())[()]


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("malformed bytes")
    return text.encode("latin1")


def _buffer(kind: type):
    def make(raw: Any = b"", encoding: Any = "latin1"):
        if isinstance(raw, str):
            raw = _latin1(raw, encoding)
        if not isinstance(raw, (bytes, bytearray)):  # an integer would allocate that many bytes
            raise pickle.UnpicklingError("malformed bytes")
        return kind(raw)

    return make


def _container(kind: type):
    def make(values: Any = ()):
        if not isinstance(values, (list, tuple, dict, set, frozenset)):
            raise pickle.UnpicklingError(f"malformed {kind.__name__}")
        return kind(values)

    return make


def _number(kind: type):
    def make(value: Any = 0):
        if not isinstance(value, (bool, int, float, complex)):
            raise pickle.UnpicklingError(f"malformed {kind.__name__}")
        return kind(value)

    return make


_NDARRAY = _Callable(lambda *args: _PickledArray())
_GLOBALS = {("numpy", "ndarray"): _NDARRAY, ("numpy", "dtype"): _Callable(_make_dtype)}
for _core in ("numpy.core", "numpy._core"):
    _GLOBALS[f"{_core}.multiarray", "_reconstruct"] = _Callable(_reconstruct)
    _GLOBALS[f"{_core}.multiarray", "scalar"] = _Callable(_scalar)
    _GLOBALS[f"{_core}.numeric", "_frombuffer"] = _Callable(_array_from_bytes)
_GLOBALS["_codecs", "encode"] = _Callable(_latin1)
for _builtins in ("builtins", "__builtin__"):
    for _kind in (list, tuple, dict, set, frozenset):
        _GLOBALS[_builtins, _kind.__name__] = _Callable(_container(_kind))
    for _kind in (bool, int, float, complex):
        _GLOBALS[_builtins, _kind.__name__] = _Callable(_number(_kind))
    for _kind in (bytes, bytearray):
        _GLOBALS[_builtins, _kind.__name__] = _Callable(_buffer(_kind))


class _ForbiddenGlobal(pickle.UnpicklingError):
    pass


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles numbers, strings, built-in containers and numpy arrays of numbers; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise _ForbiddenGlobal(
                f"the pickle asks for {_printable(module)}.{_printable(name)}, which is refused and was not run; "
                "only numpy arrays and built-in containers are read"
            ) from None


def _opcode_table() -> list[tuple[str, int] | None]:
    """How the argument of every opcode is laid out: ("fixed", bytes), ("counted", size of the count), ("lines", n)."""
    table: list[tuple[str, int] | None] = [None] * 256
    counts = {
        pickletools.TAKEN_FROM_ARGUMENT1: 1,
        pickletools.TAKEN_FROM_ARGUMENT4: 4,
        pickletools.TAKEN_FROM_ARGUMENT4U: 4,
        pickletools.TAKEN_FROM_ARGUMENT8U: 8,
    }
    for opcode in pickletools.opcodes:
        size = 0 if opcode.arg is None else opcode.arg.n
        if size >= 0:
            layout = ("fixed", size)
        elif size == pickletools.UP_TO_NEWLINE:
            layout = ("lines", 2 if opcode.name in ("GLOBAL", "INST") else 1)
        else:
            layout = ("counted", counts[size])
        table[ord(opcode.code)] = layout
    return table


_OPCODES = _opcode_table()


def _check_sizes(data: Any, start: int):
    """Walks the opcodes and refuses lengths beyond the file and memo indices that skip far ahead.

    The unpickler allocates both before it notices, so that a few bytes could ask for many GiB.
    """
    position, end, memoised = start, len(data), 0
    while True:
        code = data[position] if position < end else None
        if code is None:
            raise EOFError
        layout = _OPCODES[code]
        if layout is None:
            raise pickle.UnpicklingError(f"unknown opcode {code}")
        kind, size = layout
        argument = position = position + 1
        if kind == "fixed":
            position += size
        elif kind == "counted":
            position += size + int.from_bytes(data[position : position + size], "little")
        else:
            for _ in range(size):
                position = data.find(b"\n", position) + 1
                if not position:
                    raise EOFError
        if position > end:
            raise EOFError
        if code == 0x2E:  # STOP
            return
        if code in (0x70, 0x71, 0x72, 0x94):  # PUT, BINPUT, LONG_BINPUT, MEMOIZE
            memoised += 1
            if code == 0x72:
                index = int.from_bytes(data[argument:position], "little")
            elif code == 0x70:
                index = int(data[argument : min(position, argument + 20)])
            else:
                continue
            if index > 2 * memoised + 1000:
                raise pickle.UnpicklingError(f"memo index {index} without that many objects")


def _printable(text: Any, width: int = 60) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(text))[:width]


def _describe(value: Any) -> str:
    """Short text of a value from a file; containers are not spelt out, they may be nested without end."""
    if isinstance(value, str):
        return repr(_printable(value))
    if value is None or isinstance(value, (bool, float, np.number)):
        return repr(value)
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with shape {value.shape}"
    return f"a value of type {type(value).__name__.lstrip('_')}"


def load_fm4dirc(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads one FM4DIRC data file without running anything in it.

    Args:
        path: pickle of a list of dicts, or the same saved by `numpy.save`.

    Returns:
        One dict per track: numbers, and numpy arrays or lists for the hits.

    Raises:
        ValueError: one line: the file is truncated, not a pickle, asks for a forbidden name, or holds something else.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            if file.read(6) == b"\x93NUMPY":
                _skip_npy_header(file)
            else:
                file.seek(0)
            _check_file_sizes(file)
            content = RestrictedUnpickler(file, encoding="latin1").load()
            if file.read(1):
                raise pickle.UnpicklingError("there is data after the end of the pickle")
        except _ForbiddenGlobal as error:
            raise ValueError(f"{path}: {error}") from None
        except EOFError:
            raise ValueError(f"{path}: the file is truncated or empty; expected a pickled list of tracks") from None
        # A damaged stream can fail in any of these ways inside the unpickler.
        except (
            pickle.UnpicklingError,
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            OverflowError,
            MemoryError,
            RecursionError,
            ImportError,
            SyntaxError,
        ) as error:
            detail = _printable(" ".join(str(error).split()) or type(error).__name__, 120)
            raise ValueError(f"{path}: not a readable list of tracks ({detail})") from None
    if isinstance(content, _PickledArray):
        content = content.value
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{path}: expected a list of tracks, found {type(content).__name__.lstrip('_')}")
    return [_plain_record(record, f"{path}: row {index}") for index, record in enumerate(content)]


def _check_file_sizes(file: io.BufferedReader):
    start = file.tell()
    if os.fstat(file.fileno()).st_size <= start:
        raise EOFError
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _check_sizes(data, start)


def _skip_npy_header(file: io.BufferedReader):
    major = file.read(2)[:1]
    size = file.read(2 if major == b"\x01" else 4)
    length = int.from_bytes(size, "little")
    if length > 10_000:
        raise pickle.UnpicklingError("malformed .npy header")
    text = file.read(length)
    if len(text) < length or not size:
        raise EOFError
    header = ast.literal_eval(text.decode("latin1").strip())
    if not isinstance(header, dict) or header.get("descr") != "|O":
        raise pickle.UnpicklingError("a .npy file of numbers, not of tracks")


def _plain_record(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a dict per track, found {type(record).__name__.lstrip('_')}")
    plain = {}
    for name, value in record.items():
        if not isinstance(name, str):
            raise ValueError(f"{place}: field names must be strings, found {_describe(name)}")
        if isinstance(value, _PickledArray):
            if isinstance(value.value, _ObjectArray):
                raise ValueError(f"{place}: {_printable(name)} is an object array; expected an array of numbers")
            if value.value is None:
                raise ValueError(f"{place}: {_printable(name)} is an array without data")
            value = value.value
        plain[name] = value
    return plain


# ---------------------------------------------------------------------------------------------------------------------
# Conversion
# ---------------------------------------------------------------------------------------------------------------------


def species_from_name(path: str | os.PathLike) -> int | None:
    """PDG code from a file name that holds "Pion" or "Kaon" (FM4DIRC's files must); None if neither or both do."""
    name = Path(path).name.lower()
    found = [pdg for species, pdg in SPECIES_PDG.items() if species.lower() in name]
    return found[0] if len(found) == 1 else None


def convert_records(
    records: Sequence[dict[str, Any]],
    geometry: DircGeometry | None = None,
    default_pdg: int | None = None,
    place: str = "records",
    on_invalid: str = "error",
    reasons: Counter | None = None,
    first_row: int = 0,
) -> dict[str, list]:
    """Brings FM4DIRC records into the columns of `DIRC_FEATURES`.

    Args:
        records: tracks with P, Theta, NHits, pmtID, pixelID, leadTime; Phi (default 0) and PDG or PID.
        geometry: gives channel and pixel centres; None is the hpDIRC.
        default_pdg: used where PDG and PID are absent or -1.
        place: start of error lines, usually the file name.
        on_invalid: "error", or "drop" to leave out invalid tracks, counted in `reasons`.
        reasons: counts dropped tracks by reason.
        first_row: number of the first record, for error lines.

    Raises:
        ValueError: one line naming place, row, field, value and what was expected.
    """
    if on_invalid not in ("error", "drop"):
        raise ValueError(f"on_invalid must be 'error' or 'drop', got {on_invalid!r}")
    geometry = geometry or DircGeometry()
    columns: dict[str, list] = {name: [] for name in DIRC_FEATURES}
    for index, record in enumerate(records):
        try:
            row = _convert_record(record, geometry, default_pdg)
        except _BadRecord as bad:
            if on_invalid == "error":
                raise ValueError(f"{place}: row {first_row + index}: {bad}") from None
            if reasons is not None:
                reasons[bad.field] += 1
            continue
        for name, value in row.items():
            columns[name].append(value)
    return columns


class _BadRecord(Exception):
    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


def _scalar_field(record: dict, name: str) -> float:
    value = record[name]
    array = np.asarray(value) if isinstance(value, (bool, int, float, np.ndarray, np.generic)) else None
    if array is None or array.size != 1 or array.dtype.kind not in "iuf":
        raise _BadRecord(name, f"{name} must be a number, got {_describe(value)}")
    value = float(array.reshape(())[()])
    if not abs(value) <= FLOAT32_MAX:
        raise _BadRecord(name, f"{name} = {value:g}, expected a finite number")
    return value


def _hit_field(record: dict, name: str, upper: int | None) -> np.ndarray:
    value = record[name]
    good = isinstance(value, (np.ndarray, list, tuple))
    if good and not isinstance(value, np.ndarray):
        good = all(isinstance(v, (int, float, np.integer, np.floating)) and not isinstance(v, bool) for v in value)
        value = np.asarray(value) if good and len(value) else np.empty(0)
    if not good or value.ndim != 1 or value.dtype.kind not in "iuf":
        raise _BadRecord(name, f"{name} must be a flat array of numbers, got {_describe(record[name])}")
    wide = value.astype(np.float64)
    bad = ~(np.abs(wide) <= FLOAT32_MAX)
    if upper is not None:
        bad |= (wide < 0) | (wide >= upper) | (wide != np.floor(wide))
    if bad.any():
        i = int(np.argmax(bad))
        wanted = "a finite time in ns" if upper is None else f"an integer in 0..{upper - 1}"
        raise _BadRecord(name, f"{name}[{i}] = {wide[i]:g}, expected {wanted}")
    return value if upper is None else value.astype(np.int64)


def _convert_record(record: dict, geometry: DircGeometry, default_pdg: int | None) -> dict[str, Any]:
    for name in ("P", "Theta", "NHits", *HIT_FIELDS):
        if name not in record:
            raise _BadRecord(name, f"field {name} is missing; the record has {_printable(', '.join(record), 100)}")
    pmt = _hit_field(record, "pmtID", geometry.num_pmts * geometry.num_boxes)
    pixel = _hit_field(record, "pixelID", geometry.pixels_per_pmt)
    times = _hit_field(record, "leadTime", None)
    if not len(pmt) == len(pixel) == len(times):
        raise _BadRecord(
            "unequal_lengths",
            f"hit arrays differ in length: pmtID {len(pmt)}, pixelID {len(pixel)}, leadTime {len(times)}",
        )
    hits = _scalar_field(record, "NHits")
    if hits != len(pmt):
        raise _BadRecord("NHits", f"NHits = {hits:g} but the hit arrays have {len(pmt)} entries; expected equal")
    code = next((_scalar_field(record, name) for name in ("PDG", "PID") if name in record), -1)
    if code == -1:
        if default_pdg is None:
            raise _BadRecord("PDG", "PDG is missing or -1 and the file name says neither Pions nor Kaons")
        code = default_pdg
    if abs(code) not in SPECIES_PDG.values():
        raise _BadRecord("PDG", f"PDG = {code:g}, expected +-211 or +-321")
    x, y = geometry.pixel_center(pmt, pixel)
    return {
        "P": _scalar_field(record, "P"),
        "Theta": _scalar_field(record, "Theta"),
        "Phi": _scalar_field(record, "Phi") if "Phi" in record else 0.0,
        "PDG": int(code),
        "NHits": len(pmt),
        "pmtID": pmt.astype(np.int16),
        "pixelID": pixel.astype(np.int16),
        "channel": geometry.channel(pmt, pixel).astype(np.int32),
        "leadTime": times.astype(np.float32),
        "x": x.astype(np.float32),
        "y": y.astype(np.float32),
    }


def convert_files(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    split: str = "train",
    rows_per_shard: int = 5000,
    apply_fiducial_cut: bool = False,
    on_invalid: str = "error",
    geometry: DircGeometry | None = None,
    overwrite: bool = False,
    report: Any = None,
) -> list[Path]:
    """Converts data files to the shards of one split.

    Args:
        paths: FM4DIRC data files.
        output: directory of the shards.
        apply_fiducial_cut: keeps only tracks that pass FM4DIRC's selection; how many pass is reported either way.
        on_invalid: "error" or "drop" (counted and reported).
        report: called with one line per file; None is silent.

    Returns:
        The written files.

    Raises:
        ValueError: a file or a track is not usable; nothing is written then.
    """
    report = report or (lambda line: None)
    unknown_fields: Counter = Counter()
    with ShardWriter(output, DIRC_FEATURES, split, rows_per_shard, overwrite=overwrite) as writer:
        for path in tqdm(paths, desc="convert", unit="file", file=sys.stderr, disable=None):
            records = load_fm4dirc(path)
            written, passed, reasons = 0, 0, Counter()
            for start, chunk in _chunks(records):
                unknown_fields.update(name for record in chunk for name in record.keys() - KNOWN_FIELDS)
                columns = convert_records(
                    chunk, geometry, species_from_name(path), str(path), on_invalid, reasons, first_row=start
                )
                # The selection reads the times of the file, before they are rounded to float32.
                keep = _fiducial_mask(columns, chunk)
                passed += int(keep.sum())
                if apply_fiducial_cut:
                    columns = {
                        name: [v for v, good in zip(values, keep, strict=True) if good]
                        for name, values in columns.items()
                    }
                written += writer.write(columns)
            line = f"{path}: {len(records)} tracks read, {passed} inside the fiducial cut, {written} written"
            if reasons:
                line += "; invalid and dropped: " + ", ".join(f"{field} {n}" for field, n in sorted(reasons.items()))
            report(line)
        if unknown_fields:
            names = ", ".join(f"{_printable(name)} ({n} tracks)" for name, n in sorted(unknown_fields.items()))
            report(f"fields that the schema does not have were left out: {names}")
    return writer.paths


def _fiducial_mask(columns: dict[str, list], chunk: list) -> np.ndarray:
    if not columns["P"]:
        return np.zeros(0, dtype=bool)
    if len(columns["P"]) == len(chunk):
        return fiducial_cut(
            {
                "P": [float(np.asarray(record["P"]).reshape(())) for record in chunk],
                "Theta": [float(np.asarray(record["Theta"]).reshape(())) for record in chunk],
                "NHits": columns["NHits"],
                "leadTime": [np.asarray(record["leadTime"], dtype=np.float64) for record in chunk],
            }
        )
    return fiducial_cut(columns)


def _chunks(records: list) -> Iterator[tuple[int, list]]:
    for start in range(0, len(records), CHUNK_ROWS):
        yield start, records[start : start + CHUNK_ROWS]


def write_fm4dirc_pickle(rows: Any, path: str | os.PathLike) -> int:
    """Writes tracks as an FM4DIRC data file: a pickled list of plain dicts of numpy arrays.

    Args:
        rows: list of records, dict of columns, or one record. The species is written under both of FM4DIRC's keys,
            `PDG` (read by its data sets) and `PID` (written by its generator).
        path: the file; it appears only when complete.

    Returns:
        `int`: number of tracks.

    Raises:
        ValueError: a track lacks a field.
    """
    columns, _, _ = rows_to_columns(rows)
    records = []
    for index, row in enumerate(columns_to_records(columns)):
        for name in ("P", "Theta", "NHits", *HIT_FIELDS):
            if name not in row:
                raise ValueError(f"row {index}: field {name} is missing; an FM4DIRC record needs it")
        code = int(row.get("PDG", row.get("PID", -1)))
        record = {name: float(row.get(name, 0.0)) for name in ("P", "Theta", "Phi")}
        record.update(NHits=int(row["NHits"]), PDG=code, PID=code)
        for name, dtype in (
            ("pmtID", np.int64),
            ("pixelID", np.int64),
            ("channel", np.int64),
            ("leadTime", np.float64),
            ("x", np.float64),
            ("y", np.float64),
        ):
            if name in row:
                record[name] = np.asarray(row[name], dtype=dtype)
        records.append(record)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            pickle.dump(records, file, protocol=4)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return len(records)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo convert-data fm4dirc",
        description="Convert FM4DIRC data files (pickled lists of tracks) to sharded Parquet.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python data_scripts/convert_fm4dirc.py Pions_train.pkl Kaons_train.pkl --output data/hpdirc --fiducial-cut
  python data_scripts/convert_fm4dirc.py Kaons_test.pkl --output data/hpdirc --split test --drop-invalid

Pickles are read without running anything in them. The species comes from PDG or PID of each track, else from
"Pions" or "Kaons" in the file name.""",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="pickle, or .npy with pickled objects")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the Parquet shards")
    parser.add_argument("--split", default="train", help="split name, first part of the file names (default: train)")
    parser.add_argument("--rows_per_shard", type=int, default=5000, metavar="N", help="default: 5000")
    parser.add_argument(
        "--fiducial-cut",
        action="store_true",
        help="keep only 25 < Theta < 160 deg, 0.5 < P < 10 GeV/c, 5 < NHits < 250, all times in (9, 157) ns",
    )
    parser.add_argument("--drop-invalid", action="store_true", help="leave out invalid tracks instead of stopping")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of the same split")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        paths = convert_files(
            args.files,
            args.output,
            split=args.split,
            rows_per_shard=args.rows_per_shard,
            apply_fiducial_cut=args.fiducial_cut,
            on_invalid="drop" if args.drop_invalid else "error",
            overwrite=args.overwrite,
            report=print,
        )
    except (ValueError, OSError) as error:
        print(f"convert_fm4dirc: {error}", file=sys.stderr)
        return 2
    print(f"{len(paths)} shards in {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
