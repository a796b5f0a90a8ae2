"""The columns of every DIRC data set of this repository: one row per charged track, hits as lists of length NHits.

Names are those of the FM4DIRC data files (arXiv 2505.08736). Hits are not ordered in time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Features, List, Value

DIRC_FEATURES = Features(
    {
        "P": Value("float32"),  # momentum, GeV/c
        "Theta": Value("float32"),  # polar angle, degrees
        "Phi": Value("float32"),  # azimuth, degrees; 0 for the hpDIRC
        "PDG": Value("int32"),  # +-211 pion, +-321 kaon, -1 unknown
        "NHits": Value("int32"),
        "pmtID": List(Value("int16")),
        "pixelID": List(Value("int16")),  # inside the PMT
        "channel": List(Value("int32")),  # pmtID * pixels per PMT + pixelID
        "leadTime": List(Value("float32")),  # arrival time, ns
        "x": List(Value("float32")),  # pixel centre, mm
        "y": List(Value("float32")),
    }
)

# Data of the noise filter: 1 marks a dark count.
DIRC_NOISE_FEATURES = Features({**DIRC_FEATURES, "is_noise": List(Value("int8"))})

SPECIES_PDG = {"Pion": 211, "Kaon": 321}


def columns_to_records(columns: Mapping[str, Sequence]) -> list[dict[str, Any]]:
    """A dict of columns -> a list of record dicts.

    Raises:
        ValueError: the columns differ in length.
    """
    sizes = {name: len(values) for name, values in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"columns differ in length: {', '.join(f'{name} {size}' for name, size in sizes.items())}")
    count = next(iter(sizes.values()), 0)
    return [{name: values[i] for name, values in columns.items()} for i in range(count)]
