"""The columns of every TPC data set of this repository: one row per collision, space points as lists.

Content and units are those of TPCpp-10M (Zenodo 16970029, arXiv 2509.05792). Unlabeled data have the point columns
only; the truth table is what efficiencies against pT need, and only simulation knows it.
"""

from collections.abc import Iterable

import numpy as np
from datasets import Features, List, Value

POINT_COLUMNS = Features(
    {
        "E": List(Value("float32")),  # ADC counts
        "x": List(Value("float32")),  # cm
        "y": List(Value("float32")),
        "z": List(Value("float32")),
    }
)

# One entry per point, in the order of the points
LABEL_COLUMNS = Features(
    {
        "track_id": List(Value("int64")),
        "pid": List(Value("int8")),  # index in PID_CLASSES
        "noise": List(Value("int8")),  # 1: of a particle with pT < 0.06 GeV/c, or of none
    }
)

# One entry per track of the event; track_id of a point refers to truth_track_id. 0, the id of noise points, has none.
TRUTH_COLUMNS = Features(
    {
        "truth_track_id": List(Value("int64")),
        "truth_pdg": List(Value("int32")),
        "truth_pt": List(Value("float32")),  # at the vertex of the track, GeV/c
        "truth_eta": List(Value("float32")),
        "truth_phi": List(Value("float32")),  # (-pi, pi]
        "truth_vx": List(Value("float32")),  # cm
        "truth_vy": List(Value("float32")),
        "truth_vz": List(Value("float32")),
        "truth_charge": List(Value("int8")),  # e
        "truth_energy": List(Value("float32")),  # GeV
        "truth_num_points": List(Value("int32")),
    }
)

TPC_FEATURES = Features({**POINT_COLUMNS, **LABEL_COLUMNS, **TRUTH_COLUMNS})

PID_CLASSES = ("other", "pion", "kaon", "proton", "electron")
_PDG_CLASSES = {211: 1, 321: 2, 2212: 3, 11: 4}

NOISE_MAX_PT = 0.06  # GeV/c


def tpc_features(columns: Iterable[str]) -> Features:
    """The features of a data set that has `columns`, in the order of `TPC_FEATURES`.

    Raises:
        ValueError: a point column is missing, or a name is not a TPC column.
    """
    columns = set(columns)
    for name in POINT_COLUMNS:
        if name not in columns:
            raise ValueError(f"column {name} is missing; an event needs at least {', '.join(POINT_COLUMNS)}")
    unknown = sorted(columns - TPC_FEATURES.keys())
    if unknown:
        raise ValueError(f"column {unknown[0]} is not a TPC column; expected names of TPC_FEATURES")
    return Features({name: feature for name, feature in TPC_FEATURES.items() if name in columns})


def pid_class(pdg: np.ndarray) -> np.ndarray:
    """Indices in `PID_CLASSES`, int8, of PDG codes of any shape."""
    pdg = np.abs(np.asarray(pdg))
    result = np.zeros(pdg.shape, dtype=np.int8)
    for code, index in _PDG_CLASSES.items():
        result[pdg == code] = index
    return result
