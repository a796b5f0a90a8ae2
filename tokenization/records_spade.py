"""Reading of shower records in whatever form they come: a list of dicts, a dict of columns, one dict, padded arrays.

A record is one calorimeter shower: incident_energy [GeV], and the lists x, y, z (cell indices; z is the layer, 0 in
front) and energy [MeV] of its hits. All other fields are ignored.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .records_dirc import short_repr, to_numpy

HIT_FIELDS = ("x", "y", "z", "energy")
FIELDS = ("incident_energy", *HIT_FIELDS)


def shower_columns(rows: Any) -> tuple[dict[str, Sequence], int, bool]:
    """Brings showers into columns.

    Args:
        rows: a list of record dicts; a dict of columns (as `datasets.map(batched=True)` passes); one record dict; or a
            dict of `showers` (showers, hits, 4) = (x, y, z, energy), padded by rows of zero energy, and
            `incident_energy` (showers,). One padded shower is (hits, 4) with one incident energy.

    Returns:
        (columns, number of showers, whether `rows` was one record).

    Raises:
        ValueError: `rows` is none of these, columns differ in length, or a field is missing.
    """
    if isinstance(rows, Mapping):
        columns = _unpack_showers(rows) if "showers" in rows else {name: rows[name] for name in FIELDS if name in rows}
        _require(columns, "rows have", rows)
        if np.ndim(columns["incident_energy"]) == 0:
            return {name: [value] for name, value in columns.items()}, 1, True
        count = len(columns["incident_energy"])
        for name, values in columns.items():
            if not hasattr(values, "__len__"):
                raise ValueError(f"column {name}: expected one list per row, got {short_repr(values)}")
            if len(values) != count:
                raise ValueError(
                    f"columns differ in length: incident_energy has {count} rows, {name} has {len(values)}"
                )
        return columns, count, False
    if isinstance(rows, (str, bytes)) or not hasattr(rows, "__iter__"):
        raise ValueError(
            f"rows: expected a record dict, a list of records or a dict of columns, got {type(rows).__name__}"
        )
    rows = list(rows)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index}: expected a record dict, got {type(row).__name__}")
        _require(row, f"record of row {index} has", row)
    return {name: [row[name] for row in rows] for name in FIELDS}, len(rows), False


def _require(columns: Mapping, where: str, available: Mapping):
    for name in FIELDS:
        if name not in columns:
            raise ValueError(f"field {name} is missing; the {where} {', '.join(sorted(map(str, available))) or 'none'}")


def _unpack_showers(rows: Mapping) -> dict[str, Any]:
    showers = to_numpy(rows["showers"])
    if showers.ndim not in (2, 3) or showers.shape[-1] != len(HIT_FIELDS) or showers.dtype.kind not in "iuf":
        raise ValueError(
            f"showers must be numbers of shape (showers, hits, 4) = (x, y, z, energy), got {showers.dtype} "
            f"{showers.shape}"
        )
    columns = {name: showers[..., k] for k, name in enumerate(HIT_FIELDS)}
    if "incident_energy" in rows:
        energy = rows["incident_energy"]
        if (np.ndim(energy) == 0) != (showers.ndim == 2):
            raise ValueError(
                f"showers of shape {showers.shape} need one incident_energy per shower, got {short_repr(energy)}"
            )
        columns = {"incident_energy": energy, **columns}
    return columns
