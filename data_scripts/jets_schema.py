"""The columns of every jet data set of this repository: one row per jet, constituents as lists.

Names and types are those of the JetClass files (arXiv 2202.03772). Only the four-momenta are required; a data set has
those of the other columns that its source knows.
"""

from collections.abc import Iterable

from datasets import Features, List, Value

# In the order of the class indices.
CLASSES = ("QCD", "Hbb", "Hcc", "Hgg", "H4q", "Hqql", "Zqq", "Wqq", "Tbqq", "Tbl")

REQUIRED_COLUMNS = ("part_px", "part_py", "part_pz", "part_energy")

PARTICLE_FLAGS = (
    "part_isChargedHadron",
    "part_isNeutralHadron",
    "part_isPhoton",
    "part_isElectron",
    "part_isMuon",
)

JETS_FEATURES = Features(
    {
        # Constituents, by falling pT
        "part_px": List(Value("float32")),  # GeV
        "part_py": List(Value("float32")),
        "part_pz": List(Value("float32")),
        "part_energy": List(Value("float32")),
        "part_deta": List(Value("float32")),  # (eta - jet_eta) * (+1 if jet_eta > 0 else -1)
        "part_dphi": List(Value("float32")),  # phi - jet_phi in (-pi, pi]
        "part_d0val": List(Value("float32")),  # track impact parameters and errors, mm; 0 for neutrals
        "part_d0err": List(Value("float32")),
        "part_dzval": List(Value("float32")),
        "part_dzerr": List(Value("float32")),
        "part_charge": List(Value("float32")),
        **{name: List(Value("int32")) for name in PARTICLE_FLAGS},
        # One-hot class; the types differ in the published files too
        "label_QCD": Value("float32"),
        "label_Hbb": Value("bool"),
        "label_Hcc": Value("bool"),
        "label_Hgg": Value("bool"),
        "label_H4q": Value("bool"),
        "label_Hqql": Value("bool"),
        "label_Zqq": Value("int32"),
        "label_Wqq": Value("int32"),
        "label_Tbqq": Value("int32"),
        "label_Tbl": Value("int32"),
        # Jet
        "jet_pt": Value("float32"),  # GeV
        "jet_eta": Value("float32"),
        "jet_phi": Value("float32"),
        "jet_energy": Value("float32"),
        "jet_nparticles": Value("float32"),
        "jet_sdmass": Value("float32"),  # soft-drop mass, GeV
        "jet_tau1": Value("float32"),  # N-subjettiness
        "jet_tau2": Value("float32"),
        "jet_tau3": Value("float32"),
        "jet_tau4": Value("float32"),
        # Matched resonance, 0 without one
        "aux_genpart_eta": Value("float32"),
        "aux_genpart_phi": Value("float32"),
        "aux_genpart_pid": Value("float32"),
        "aux_genpart_pt": Value("float32"),  # GeV
        "aux_truth_match": Value("float32"),  # decay code, for example 12 for t -> b q q
    }
)

LABEL_COLUMNS = tuple(f"label_{name}" for name in CLASSES)


def jet_features(columns: Iterable[str], extra: Features | None = None) -> Features:
    """The features of a data set that has `columns` of `JETS_FEATURES`, in their order, and further columns.

    Raises:
        ValueError: a required column is missing, or a name is not a jet column.
    """
    columns = set(columns)
    for name in REQUIRED_COLUMNS:
        if name not in columns:
            raise ValueError(f"column {name} is missing; a jet needs at least {', '.join(REQUIRED_COLUMNS)}")
    unknown = sorted(columns - JETS_FEATURES.keys())
    if unknown:
        raise ValueError(f"column {unknown[0]} is not a jet column; expected names of JETS_FEATURES")
    features = {name: feature for name, feature in JETS_FEATURES.items() if name in columns}
    for name in extra or ():
        if name in JETS_FEATURES:
            raise ValueError(f"column {name} is a jet column already; expected another name")
    return Features({**features, **(extra or {})})


def label_values(label: str) -> dict[str, int]:
    """The ten one-hot label columns of class `label`, such as "Tbqq"."""
    if label not in CLASSES:
        raise ValueError(f"class must be one of {', '.join(CLASSES)}, got {label!r}")
    return {f"label_{name}": int(name == label) for name in CLASSES}
