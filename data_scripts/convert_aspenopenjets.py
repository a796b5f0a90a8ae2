"""AspenOpenJets files (HDF5, arXiv 2412.10504; AK8 jets of CMS open data of 2016) -> sharded Parquet.

| dataset | content |
|---|---|
| event_info (N, 3) | run, luminosity block, event |
| jet_kinematics (N, 4) | pt, eta, phi, soft-drop mass |
| PFCands (N, P, 11), zero-padded | px, py, pz, E, d0, d0Err, dz, dzErr, charge, PDG code, PUPPI weight |
| jet_tagging (N, 13) | constituents, tau1..4, ParticleNet H4q, Hbb, Hcc vs QCD, QCD, T, W, Z vs QCD, mass |

Data have no truth, hence no labels. Constituents keep their order; PUPPI weights are a column and not applied.
"""

import argparse
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
from datasets import Features, List, Value

from hepzoo.data_scripts.hdf5_files import opened_hdf5
from hepzoo.data_scripts.jet_files import (
    JetBlock,
    JetFile,
    add_output_options,
    hdf5_dataset,
    relative_angles,
    row_blocks,
    run_conversion,
    stored_places,
)
from hepzoo.data_scripts.jets_schema import PARTICLE_FLAGS, REQUIRED_COLUMNS, jet_features

EVENT_COLUMNS = ("run", "luminosity_block", "event")
KINEMATIC_COLUMNS = ("jet_pt", "jet_eta", "jet_phi", "jet_sdmass")
CANDIDATE_COLUMNS = (
    *REQUIRED_COLUMNS,
    "part_d0val",
    "part_d0err",
    "part_dzval",
    "part_dzerr",
    "part_charge",
    "part_pdgId",
    "part_puppi_weight",
)
SCORE_COLUMNS = tuple(
    f"jet_particleNet_{name}"
    for name in ("H4qvsQCD", "HbbvsQCD", "HccvsQCD", "QCD", "TvsQCD", "WvsQCD", "ZvsQCD", "mass")
)
TAGGING_COLUMNS = ("jet_nparticles", "jet_tau1", "jet_tau2", "jet_tau3", "jet_tau4", *SCORE_COLUMNS)
LENGTH_COLUMNS = ("part_d0val", "part_d0err", "part_dzval", "part_dzerr")
LENGTH_UNITS = {"cm": 10.0, "mm": 1.0}

# |PDG code| -> flag. 1 and 2 are what CMS calls hadrons and photons of the forward calorimeter.
_FLAG_CODES = {
    "part_isChargedHadron": (211, 321, 2212),
    "part_isNeutralHadron": (130, 1),
    "part_isPhoton": (22, 2),
    "part_isElectron": (11,),
    "part_isMuon": (13,),
}

ASPEN_FEATURES = jet_features(
    {
        *(name for name in CANDIDATE_COLUMNS if name not in ("part_pdgId", "part_puppi_weight")),
        *KINEMATIC_COLUMNS,
        *(name for name in TAGGING_COLUMNS if name not in SCORE_COLUMNS),
        *PARTICLE_FLAGS,
        "part_deta",
        "part_dphi",
    },
    Features(
        {
            "part_pdgId": List(Value("int32")),
            "part_puppi_weight": List(Value("float32")),
            **{name: Value("float32") for name in SCORE_COLUMNS},  # mass in GeV
            **{name: Value("int64") for name in EVENT_COLUMNS},
        }
    ),
)


def _datasets(file, path) -> dict:
    kinematics = hdf5_dataset(file, "jet_kinematics", path, columns=len(KINEMATIC_COLUMNS))
    size = len(kinematics)
    candidates = hdf5_dataset(file, "PFCands", path, rows=size)
    if candidates.ndim != 3 or candidates.shape[2] != len(CANDIDATE_COLUMNS) or candidates.dtype.kind not in "iuf":
        raise ValueError(
            f"{path}: PFCands must be numbers (N, P, {len(CANDIDATE_COLUMNS)}), found {candidates.dtype} of shape "
            f"{candidates.shape}"
        )
    return {
        "jet_kinematics": kinematics,
        "PFCands": candidates,
        "event_info": hdf5_dataset(file, "event_info", path, columns=len(EVENT_COLUMNS), rows=size),
        "jet_tagging": hdf5_dataset(file, "jet_tagging", path, columns=len(TAGGING_COLUMNS), rows=size),
    }


def describe_aspenopenjets(path: str | os.PathLike) -> JetFile:
    """The jets and columns of an AspenOpenJets file.

    Raises:
        UnreadableFileError: not HDF5, or damaged.
        ValueError: a dataset is missing or has another shape.
    """
    with opened_hdf5(path) as file:
        data = _datasets(file, path)
        return JetFile(len(data["PFCands"]), ASPEN_FEATURES, sorted(file.keys() - data.keys()))


def read_aspenopenjets(
    path: str | os.PathLike, counts: Counter | None = None, length_unit: str = "cm"
) -> Iterator[JetBlock]:
    """Reads an AspenOpenJets file in blocks.

    Args:
        counts: increased for candidates of unknown type and for jets with more constituents than stored.
        length_unit: "cm", as in CMS data, or "mm": unit of the impact parameters of the file; the column is in mm.

    Raises:
        UnreadableFileError: the file is truncated or damaged.
        ValueError: an impossible value.
    """
    if length_unit not in LENGTH_UNITS:
        raise ValueError(f"length_unit must be cm or mm, got {length_unit!r}")
    counts = Counter() if counts is None else counts
    with opened_hdf5(path) as file:
        data = _datasets(file, path)
        candidates = data["PFCands"]
        for rows in row_blocks(len(candidates), candidates.dtype.itemsize * int(np.prod(candidates.shape[1:])), path):
            padded = candidates[rows]
            jet, place = stored_places(padded[..., :4], rows.start, path)
            flat = padded[jet, place]
            particles = dict(zip(CANDIDATE_COLUMNS, flat.T, strict=True))
            for name in LENGTH_COLUMNS:
                particles[name] = particles[name] * LENGTH_UNITS[length_unit]
            code = np.abs(particles["part_pdgId"])
            for name in PARTICLE_FLAGS:
                particles[name] = np.isin(code, _FLAG_CODES[name]).astype(np.int32)
            unknown = ~np.isin(code, [number for codes in _FLAG_CODES.values() for number in codes])
            counts["constituents of unknown type"] += int(unknown.sum())

            jets = {}
            for dataset, names in (
                ("jet_kinematics", KINEMATIC_COLUMNS),
                ("jet_tagging", TAGGING_COLUMNS),
                ("event_info", EVENT_COLUMNS),
            ):
                jets |= dict(zip(names, data[dataset][rows].T, strict=True))
            lengths = np.bincount(jet, minlength=len(padded))
            counts["jets with more constituents than stored"] += int((jets["jet_nparticles"] > lengths).sum())
            block = JetBlock(lengths, particles, jets)
            particles |= relative_angles(block)
            yield block


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hepzoo convert-data aspenopenjets",
        description="Convert AspenOpenJets HDF5 files to sharded Parquet.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python data_scripts/convert_aspenopenjets.py Run2016G_*.h5 Run2016H_*.h5 --output data/aspen
              python data_scripts/convert_aspenopenjets.py Run2016G_00.h5 --output data/aspen --split validation
            """
        ),
    )
    add_output_options(parser)
    parser.add_argument(
        "--length_unit",
        choices=tuple(LENGTH_UNITS),
        default="cm",
        help="of the impact parameters in the files (default: %(default)s); written in mm",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_conversion(args, describe_aspenopenjets, partial(read_aspenopenjets, length_unit=args.length_unit))


if __name__ == "__main__":
    sys.exit(main())
