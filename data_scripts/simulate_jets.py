"""Simulator of jets of the ten JetClass classes: Pythia 8, a parametrised detector, fastjet.

Proton-proton collisions at 13 TeV; anti-kT jets of R = 0.8 with 500 <= pT < 1000 GeV and |eta| < 2; signal jets hold
all decay quarks and charged leptons of their resonance. Processes, detector, comparison and limits:
docs/simulate_jets.md.
"""

import argparse
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from hepzoo.data_scripts.jets_schema import JETS_FEATURES, PARTICLE_FLAGS, label_values
from hepzoo.data_scripts.shards import ShardWriter
from hepzoo.data_scripts.worker_processes import run_jobs

__all__ = ["CLASS_SETTINGS", "detect", "iter_jets", "parse_classes", "simulate_jets"]

# Part of the random-number scheme: other values give other jets.
CHUNK_JETS = 250
BATCH_EVENTS = 50

JET_RADIUS = 0.8
JET_PT = (500.0, 1000.0)  # GeV, of the reconstructed jet
JET_MAX_ETA = 2.0
MIN_CONSTITUENTS = 4

_COMMON_SETTINGS = (
    "Print:quiet = on",
    "Beams:eCM = 13000",
    "PhaseSpace:pTHatMin = 480",
    "PhaseSpace:pTHatMax = 1100",
    "ParticleDecays:limitTau0 = on",
    "ParticleDecays:tau0Max = 10",
)
_QUARKS = "1 2 3 4 5"
_TOP_PAIRS = ("Top:gg2ttbar = on", "Top:qqbar2ttbar = on", "6:onMode = off", "6:onIfAny = 5", "24:onMode = off")
_HIGGS_WITH_INVISIBLE_Z = ("HiggsSM:ffbar2HZ = on", "23:onMode = off", "23:onIfAny = 12 14 16", "25:onMode = off")
CLASS_SETTINGS = {
    "QCD": ("HardQCD:all = on",),
    "Hbb": (*_HIGGS_WITH_INVISIBLE_Z, "25:onIfMatch = 5 -5"),
    "Hcc": (*_HIGGS_WITH_INVISIBLE_Z, "25:onIfMatch = 4 -4"),
    "Hgg": (*_HIGGS_WITH_INVISIBLE_Z, "25:onIfMatch = 21 21"),
    "H4q": (*_HIGGS_WITH_INVISIBLE_Z, "25:onIfMatch = 24 -24", "24:onMode = off", f"24:onIfAny = {_QUARKS}"),
    # The W decays are set in `_generator`.
    "Hqql": (*_HIGGS_WITH_INVISIBLE_Z, "25:onIfMatch = 24 -24", "24:onMode = off"),
    "Zqq": (
        "WeakBosonAndParton:qqbar2gmZg = on",
        "WeakBosonAndParton:qg2gmZq = on",
        "WeakZ0:gmZmode = 2",
        "23:onMode = off",
        f"23:onIfAny = {_QUARKS}",
    ),
    "Wqq": (
        "WeakBosonAndParton:qqbar2Wg = on",
        "WeakBosonAndParton:qg2Wq = on",
        "24:onMode = off",
        f"24:onIfAny = {_QUARKS}",
    ),
    "Tbqq": (*_TOP_PAIRS, f"24:onIfAny = {_QUARKS}"),
    "Tbl": (*_TOP_PAIRS, "24:onIfAny = 11 13"),
}
_RESONANCES = {"H": 25, "Z": 23, "W": 24, "T": 6}  # by the first letter of the class
_HIGGS_CODES = {"Hbb": 41, "Hcc": 42, "Hgg": 44, "H4q": 45, "Hqql": 46}
_QCD_CODE = 50
_VISIBLE_PRODUCTS = (1, 2, 3, 4, 5, 21, 11, 13)

# Reconstruction types, as indices in PARTICLE_FLAGS.
CHARGED_HADRON, NEUTRAL_HADRON, PHOTON, ELECTRON, MUON = range(5)
_CHARGED_HADRONS = (211, 321, 2212, 3112, 3222, 3312, 3334)
_POSITIVE = (211, 321, 2212, 3222, -3112, -3312, -3334, -11, -13)
MAX_ETA = 3.2
MAX_TRACK_ETA = 2.5
MIN_TRACK_PT = 0.75  # GeV
# Cell size in eta and phi; constant and stochastic (sqrt GeV) terms; threshold in GeV; width of the angles.
_CALORIMETERS = {PHOTON: (0.02, 0.007, 0.07, 1.0, 0.0), NEUTRAL_HADRON: (0.087, 0.05, 1.0, 2.0, 0.01)}
_WHOLE_JET = 1000.0  # radius that clusters all constituents


def simulate_jets(num_jets: int, classes: Sequence[str] = ("QCD", "Tbqq"), seed: int = 0) -> dict[str, Any]:
    """Simulates jets and returns the columns of `JETS_FEATURES`.

    Args:
        num_jets: of each class.
        classes: names of `jets_schema.CLASSES`.
        seed: non-negative integer.

    Returns:
        float32, int32 or bool arrays of shape (jets,) and, for the part_* columns, lists of per-jet arrays.

    Raises:
        ValueError: an argument out of range, or Pythia or fastjet is not installed.
    """
    parts = list(iter_jets(num_jets, classes, seed))
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def iter_jets(
    num_jets: int, classes: Sequence[str] = ("QCD", "Tbqq"), seed: int = 0, processes: int = 1
) -> Iterator[dict[str, Any]]:
    """`simulate_jets` as a stream of rounds of at most 250 jets of each class, shuffled inside the round.

    The jets depend on the seed and the class alone: not on the number of processes or on the other classes. A longer
    run starts with the same whole rounds.

    Args:
        processes: worker processes.
        others: see `simulate_jets`.

    Raises:
        ValueError: as `simulate_jets`, before the first round.
    """
    for name, value, lowest in (("num_jets", num_jets, 1), ("seed", seed, 0), ("processes", processes, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < lowest:
            raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
    if isinstance(classes, str) or not classes:
        raise ValueError(f"classes must be a list of {', '.join(CLASS_SETTINGS)}, got {classes!r}")
    for name in classes:
        if name not in CLASS_SETTINGS:
            raise ValueError(f"class must be one of {', '.join(CLASS_SETTINGS)}, got {name!r}")
    if len(set(classes)) != len(classes):
        raise ValueError(f"classes must differ, got {', '.join(classes)}")
    _check_packages()
    jobs = [
        (int(seed), name, chunk, min(CHUNK_JETS, num_jets - start))
        for chunk, start in enumerate(range(0, num_jets, CHUNK_JETS))
        for name in classes
    ]
    return _rounds(run_jobs(_simulate_chunk, jobs, min(processes, len(jobs))), len(classes), int(seed))


def _rounds(results, num_classes: int, seed: int):
    collected = []
    number = 0
    for columns in results:
        collected.append(columns)
        if len(collected) == num_classes:
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, number)))
            columns = {name: _joined([part[name] for part in collected]) for name in columns}
            yield _selected(columns, rng.permutation(len(columns["jet_pt"])))
            collected, number = [], number + 1


def _joined(parts: list):
    return [row for part in parts for row in part] if isinstance(parts[0], list) else np.concatenate(parts)


def _selected(columns: dict, rows) -> dict:
    return {
        name: [values[row] for row in rows] if isinstance(values, list) else values[rows]
        for name, values in columns.items()
    }


def _check_packages() -> None:
    try:
        import awkward  # noqa: F401
        import fastjet
        import pythia8mc  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'simulating jets needs pythia8mc and fastjet ({error}); install them with: pip install "hepzoo[sim]"'
        ) from None
    # The banner would come between the lines of a script.
    fastjet._swig.ClusterSequence.set_fastjet_banner_stream(None)


# ---------------------------------------------------------------------------------------------------------------------
# Events
# ---------------------------------------------------------------------------------------------------------------------


def _simulate_chunk(job) -> dict:
    """`size` jets of one class, from a Pythia and random streams of their own.

    A Pythia that has made events before is not reused: it adapts its maxima, so its events depend on its history.
    """
    seed, name, chunk, size = job
    _check_packages()
    sequence = np.random.SeedSequence(seed, spawn_key=(1 + list(CLASS_SETTINGS).index(name), chunk))
    generator_seed, detector_seed = sequence.spawn(2)
    # Pythia takes seeds of 1..900000000.
    pythia = _generator(name, chunk, 1 + int(generator_seed.generate_state(1, np.uint64)[0] % 900_000_000))
    rng = np.random.default_rng(detector_seed)
    parts, found = [], 0
    while found < size:
        batch = pythia.nextBatch(BATCH_EVENTS)
        if not len(batch):
            raise ValueError(f"class {name}: Pythia makes no events any more")
        columns = _batch_jets(batch, name, rng)
        if columns is not None:
            parts.append(columns)
            found += len(columns["jet_pt"])
    columns = {key: _joined([part[key] for part in parts])[:size] for key in parts[0]}
    return columns


def _generator(name: str, chunk: int, seed: int):
    from pythia8mc import Pythia

    pythia = Pythia("", False)
    settings = [*_COMMON_SETTINGS, *CLASS_SETTINGS[name], "Random:setSeed = on", f"Random:seed = {seed}"]
    if name == "Hqql":
        # One W to quarks, the other to leptons. Pythia sets this by charge; both signs take turns.
        quarks, leptons = ("Pos", "Neg") if chunk % 2 == 0 else ("Neg", "Pos")
        settings += [f"24:on{quarks}IfAny = {_QUARKS}", f"24:on{leptons}IfAny = 11 13"]
    for setting in settings:
        if not pythia.readString(setting):
            raise ValueError(f"class {name}: Pythia refuses the setting {setting!r}")
    if not pythia.init():
        raise ValueError(f"class {name}: Pythia does not start; its message is above")
    return pythia


def _batch_jets(batch, name: str, rng) -> dict | None:
    """The jets of a batch of Pythia events that pass the selection; None without any."""
    import awkward as ak
    import fastjet

    record = batch.prt
    counts = ak.num(record).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(counts)])

    def flat(values):
        return ak.flatten(values).to_numpy().astype(np.float64)

    momentum = np.stack([flat(record.p[key]) for key in ("px", "py", "pz", "e")])
    vertex = np.stack([flat(ak.fill_none(record.vProd[key], 0.0)) for key in ("px", "py", "pz")])
    pid = ak.flatten(record.id).to_numpy()
    stable = ak.flatten(record.status).to_numpy() > 0
    event = np.repeat(np.arange(len(counts)), counts)
    particles = detect(event[stable], pid[stable], momentum[:, stable], vertex[:, stable], rng)

    per_event = np.bincount(particles["event"], minlength=len(counts))
    starts = np.concatenate([[0], np.cumsum(per_event)])
    four = {"px": particles["px"], "py": particles["py"], "pz": particles["pz"], "E": particles["energy"]}
    definition = fastjet.JetDefinition(fastjet.antikt_algorithm, JET_RADIUS)
    cluster = fastjet.ClusterSequence(ak.unflatten(ak.zip(four), per_event), definition)
    jets = cluster.inclusive_jets(min_pt=JET_PT[0])
    members = cluster.constituent_index(min_pt=JET_PT[0])

    daughters = [ak.flatten(record[key]).to_numpy() for key in ("daughter1", "daughter2")]
    resonances = []
    if name != "QCD":
        last = _last_copies(pid, daughters, offsets, _RESONANCES[name[0]])
        resonances = [
            (event[index], index, _decay_products(index, pid, daughters, offsets[event[index]])) for index in last
        ]

    rows = []  # constituents, jet momentum, resonance, decay products
    for number in range(len(counts)):
        for jet, indices in zip(jets[number].tolist(), members[number].tolist(), strict=True):
            px, py, pz, energy = (jet[key] for key in ("px", "py", "pz", "E"))
            pt, eta, phi = _cylindrical(px, py, pz)
            if not (JET_PT[0] <= pt < JET_PT[1] and abs(eta) < JET_MAX_ETA and len(indices) >= MIN_CONSTITUENTS):
                continue
            matched = None
            for where, index, products in resonances:
                if where == number and _inside(products, momentum, eta, phi):
                    matched = (index, products)
                    break
            if name == "QCD" or matched:
                indices = starts[number] + np.array(indices)
                order = np.argsort(-np.hypot(particles["px"][indices], particles["py"][indices]), kind="stable")
                rows.append((indices[order], (pt, eta, phi, energy), matched))
    return _columns(rows, name, particles, momentum, pid) if rows else None


def _cylindrical(px, py, pz):
    pt = np.hypot(px, py)
    # Beam remnants can be exactly parallel to the beam.
    return pt, np.arcsinh(pz / np.maximum(pt, 1e-9)), np.arctan2(py, px)


def _wrapped(angle):
    """An azimuth difference in (-pi, pi]."""
    return np.pi - (np.pi - angle) % (2 * np.pi)


# ---------------------------------------------------------------------------------------------------------------------
# Truth. Indices count the particles of the whole batch; Pythia's daughters count inside the event.
# ---------------------------------------------------------------------------------------------------------------------


def _daughters_of(index: int, daughters, start: int) -> list[int]:
    first, second = int(daughters[0][index]), int(daughters[1][index])
    if not first:
        return []
    # A range, one, or two apart from each other (then in falling order).
    numbers = range(first, second + 1) if second >= first else [number for number in (first, second) if number]
    return [start + number for number in numbers]


def _last_copies(pid, daughters, offsets, resonance: int) -> list[int]:
    """Indices of the resonances (both charges) that decay, rather than go on as a copy of themselves."""
    found = []
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        for index in start + np.flatnonzero(np.abs(pid[start:stop]) == resonance):
            family = _daughters_of(index, daughters, start)
            if len(family) and not any(pid[child] == pid[index] for child in family):
                found.append(int(index))
    return found


def _decay_products(index: int, pid, daughters, start: int) -> list[int]:
    """Quarks, gluons and charged leptons of a decay, through intermediate W and their copies."""
    products = []
    for child in _daughters_of(index, daughters, start):
        if abs(pid[child]) == 24:
            products += _decay_products(child, pid, daughters, start)
        elif abs(pid[child]) in _VISIBLE_PRODUCTS:
            products.append(child)
    return products


def _inside(products: list[int], momentum, eta: float, phi: float) -> bool:
    """Whether all decay products are within the radius of the jet axis."""
    _, etas, phis = _cylindrical(*momentum[:3, products])
    return bool(np.all(np.hypot(etas - eta, _wrapped(phis - phi)) < JET_RADIUS))


def truth_match(name: str, products: np.ndarray) -> int:
    """The JetClass code of a decay.

    Args:
        name: class.
        products: PDG codes of the visible decay products.
    """
    kinds = np.abs(products)
    if name == "QCD":
        return _QCD_CODE
    if name == "Tbl":
        return 15 if 11 in kinds else 16
    if name == "Tbqq":
        return 11 if 4 in kinds else 12
    if name == "Wqq":
        return 21 if 4 in kinds else 22
    if name == "Zqq":
        return {5: 31, 4: 32}.get(int(kinds[0]), 33)
    return _HIGGS_CODES[name]


# ---------------------------------------------------------------------------------------------------------------------
# Detector
# ---------------------------------------------------------------------------------------------------------------------


def detect(event, pid, momentum, vertex, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What a CMS-like detector makes of stable particles, without pile-up and magnetic bending.

    Args:
        event: index of the event, shape (particles,).
        pid: PDG codes.
        momentum: px, py, pz, energy in GeV, shape (4, particles).
        vertex: production point x, y, z in mm, shape (3, particles).
        rng: random numbers.

    Returns:
        Arrays of the reconstructed particles, ordered by event: event, px, py, pz, energy (GeV), d0val, d0err, dzval,
        dzerr (mm, 0 for neutrals), charge, kind (index in `jets_schema.PARTICLE_FLAGS`).
    """
    kind = _kinds(pid)
    pt, eta, phi = _cylindrical(*momentum[:3])
    charged = np.isin(kind, (CHARGED_HADRON, ELECTRON, MUON))
    # Softer charged particles curl up in the field of 3.8 T before they reach the calorimeter.
    seen = (kind >= 0) & (np.abs(eta) < MAX_ETA) & ~(charged & (pt < MIN_TRACK_PT))
    event, pid, kind, pt, eta, phi, charged = (v[seen] for v in (event, pid, kind, pt, eta, phi, charged))
    momentum, vertex = momentum[:, seen], vertex[:, seen]

    central = np.abs(eta) < 1.5
    efficiency = np.where(
        kind == CHARGED_HADRON,
        np.where(pt < 1.0, np.where(central, 0.70, 0.60), np.where(central, 0.95, 0.85)),
        np.where(central, 0.98, 0.93),
    )
    track = charged & (np.abs(eta) < MAX_TRACK_ETA) & (rng.random(len(pt)) < efficiency)
    electromagnetic = (kind == PHOTON) | ((kind == ELECTRON) & ~track)
    hadronic = (kind == NEUTRAL_HADRON) | ((kind == CHARGED_HADRON) & ~track)  # a muon without track is lost
    parts = [
        _tracks(*(v[..., track] for v in (event, pid, kind, pt, eta, phi, momentum, vertex)), rng),
        _deposits(*(v[electromagnetic] for v in (event, momentum[3], eta, phi)), PHOTON, rng),
        _deposits(*(v[hadronic] for v in (event, momentum[3], eta, phi)), NEUTRAL_HADRON, rng),
    ]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined["event"], kind="stable")
    return {name: values[order] for name, values in joined.items()}


def _kinds(pid) -> np.ndarray:
    """Reconstruction type of stable particles; -1 for those that leave no signal."""
    code = np.abs(pid)
    kind = np.full(len(pid), NEUTRAL_HADRON)
    kind[np.isin(code, _CHARGED_HADRONS)] = CHARGED_HADRON
    kind[code == 22] = PHOTON
    kind[code == 11] = ELECTRON
    kind[code == 13] = MUON
    kind[np.isin(code, (12, 14, 16))] = -1
    return kind


def _tracks(event, pid, kind, pt, eta, phi, momentum, vertex, rng) -> dict[str, np.ndarray]:
    size = len(pt)
    # sigma(pT)/pT = a (+) b pT
    region = np.digitize(np.abs(eta), (0.5, 1.5))
    width = np.hypot(np.array([0.010, 0.015, 0.025])[region], np.array([1e-4, 1.5e-4, 3.5e-4])[region] * pt)
    # At high momentum and |eta| the width is a third: without the limit a few tracks would turn round.
    reco_pt = pt * np.maximum(1 + width * rng.standard_normal(size), 0.1)
    reco_eta = eta + 3e-4 * rng.standard_normal(size)
    reco_phi = phi + 3e-4 * rng.standard_normal(size)
    mass_squared = np.maximum(momentum[3] ** 2 - np.sum(momentum[:3] ** 2, axis=0), 0)

    px, py, pz, _ = momentum
    x, y, z = vertex
    d0_error = np.hypot(0.020, 0.060 / reco_pt)
    dz_error = np.hypot(0.040, 0.120 / reco_pt)
    charge = np.where(np.isin(pid, _POSITIVE), 1.0, -1.0)
    return {
        "event": event,
        "px": reco_pt * np.cos(reco_phi),
        "py": reco_pt * np.sin(reco_phi),
        "pz": reco_pt * np.sinh(reco_eta),
        "energy": np.sqrt((reco_pt * np.cosh(reco_eta)) ** 2 + mass_squared),
        "d0val": (x * py - y * px) / pt + d0_error * rng.standard_normal(size),
        "d0err": d0_error,
        "dzval": z - (x * px + y * py) * pz / pt**2 + dz_error * rng.standard_normal(size),
        "dzerr": dz_error,
        "charge": charge,
        "kind": kind,
    }


def _deposits(event, energy, eta, phi, kind: int, rng) -> dict[str, np.ndarray]:
    """Calorimeter clusters: what falls in one cell, at its energy-weighted centre, massless."""
    cell, constant, stochastic, threshold, jitter = _CALORIMETERS[kind]
    rows = np.floor(eta / cell).astype(np.int64) + 10_000
    columns = np.floor((phi % (2 * np.pi)) / cell).astype(np.int64)
    _, first, inverse = np.unique((event * 20_000 + rows) * 10_000 + columns, return_index=True, return_inverse=True)
    total = np.bincount(inverse, energy, minlength=len(first))
    # Azimuths relative to the first particle of the cell, so that the mean is right where phi jumps.
    eta = np.bincount(inverse, energy * eta, minlength=len(first)) / total
    shift = np.bincount(inverse, energy * _wrapped(phi - phi[first][inverse]), minlength=len(first)) / total
    phi = phi[first] + shift + jitter * rng.standard_normal(len(first))
    eta = eta + jitter * rng.standard_normal(len(first))
    measured = total + np.hypot(constant * total, stochastic * np.sqrt(total)) * rng.standard_normal(len(total))
    keep = measured > threshold
    event, eta, phi, measured = event[first][keep], eta[keep], phi[keep], measured[keep]
    pt = measured / np.cosh(eta)
    zero = np.zeros(len(pt))
    return {
        "event": event,
        "px": pt * np.cos(phi),
        "py": pt * np.sin(phi),
        "pz": pt * np.sinh(eta),
        "energy": measured,
        **dict.fromkeys(("d0val", "d0err", "dzval", "dzerr", "charge"), zero),
        "kind": np.full(len(pt), kind),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------------------------------


def _columns(rows, name: str, particles, momentum, pid) -> dict[str, Any]:
    """The columns of `JETS_FEATURES` of the jets `rows`, from (constituents, (pt, eta, phi, energy), truth)."""
    lengths = np.array([len(indices) for indices, _, _ in rows])
    flat = np.concatenate([indices for indices, _, _ in rows])
    jet_pt, jet_eta, jet_phi, jet_energy = np.array([jet for _, jet, _ in rows]).T
    jet = np.repeat(np.arange(len(rows)), lengths)
    px, py, pz, energy = (particles[key][flat] for key in ("px", "py", "pz", "energy"))
    _, eta, phi = _cylindrical(px, py, pz)

    lists = {"part_px": px, "part_py": py, "part_pz": pz, "part_energy": energy}
    lists["part_deta"] = np.where(jet_eta > 0, 1, -1)[jet] * (eta - jet_eta[jet])
    lists["part_dphi"] = _wrapped(phi - jet_phi[jet])
    lists |= {f"part_{key}": particles[key][flat] for key in ("d0val", "d0err", "dzval", "dzerr", "charge")}
    ends = np.cumsum(lengths)[:-1]
    columns: dict[str, Any] = {key: np.split(values.astype(np.float32), ends) for key, values in lists.items()}
    for index, key in enumerate(PARTICLE_FLAGS):
        columns[key] = np.split((particles["kind"][flat] == index).astype(np.int32), ends)

    size = len(rows)
    for key, value in label_values(name).items():
        columns[key] = np.full(size, value, dtype=JETS_FEATURES[key].dtype)
    jets = {"jet_pt": jet_pt, "jet_eta": jet_eta, "jet_phi": jet_phi, "jet_energy": jet_energy}
    jets["jet_nparticles"] = lengths
    jets |= _substructure(px, py, pz, energy, lengths)

    truth = {key: np.zeros(size) for key in ("aux_genpart_eta", "aux_genpart_phi", "aux_genpart_pid")}
    truth |= {"aux_genpart_pt": np.zeros(size), "aux_truth_match": np.full(size, float(_QCD_CODE))}
    for row, (_, _, matched) in enumerate(rows):
        if matched:
            index, products = matched
            values = _cylindrical(*momentum[:3, index])
            for key, value in zip(("aux_genpart_pt", "aux_genpart_eta", "aux_genpart_phi"), values, strict=True):
                truth[key][row] = value
            truth["aux_genpart_pid"][row] = pid[index]
            truth["aux_truth_match"][row] = truth_match(name, pid[products])
    columns |= {key: values.astype(np.float32) for key, values in (jets | truth).items()}
    return {key: columns[key] for key in JETS_FEATURES}


def _substructure(px, py, pz, energy, lengths) -> dict[str, np.ndarray]:
    """Soft-drop mass (Cambridge/Aachen, z_cut 0.1, beta 0) and tau_1..4 (beta 1, exclusive-kT winner-takes-all axes).

    Args:
        px, py, pz, energy: constituents of all jets one after the other, GeV.
        lengths: constituents of each jet, at least 4.
    """
    import awkward as ak
    import fastjet

    constituents = ak.unflatten(ak.zip({"px": px, "py": py, "pz": pz, "E": energy}), lengths)
    whole = fastjet.JetDefinition(fastjet.cambridge_algorithm, _WHOLE_JET)
    groomed = fastjet.ClusterSequence(constituents, whole).exclusive_jets_softdrop_grooming(
        njets=1, beta=0, symmetry_cut=0.1, R0=JET_RADIUS
    )
    result = {"jet_sdmass": groomed.msoftdrop.to_numpy()}

    pt, eta, phi = _cylindrical(px, py, pz)
    jet = np.repeat(np.arange(len(lengths)), lengths)
    scale = np.bincount(jet, pt) * JET_RADIUS
    axes_definition = fastjet.JetDefinition(fastjet.kt_algorithm, _WHOLE_JET, fastjet.WTA_pt_scheme)
    cluster = fastjet.ClusterSequence(constituents, axes_definition)
    for number in (1, 2, 3, 4):
        with warnings.catch_warnings():
            # About algorithms other than kT; comes with kT as well.
            warnings.simplefilter("ignore")
            axes = cluster.exclusive_jets(n_jets=number)
        momenta = [ak.flatten(axes[key]).to_numpy().reshape(-1, number) for key in ("px", "py", "pz")]
        _, axis_eta, axis_phi = _cylindrical(*momenta)
        distance = np.hypot(eta[:, None] - axis_eta[jet], _wrapped(phi[:, None] - axis_phi[jet])).min(axis=1)
        result[f"jet_tau{number}"] = np.bincount(jet, pt * distance) / scale
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_classes(text: str) -> list[str]:
    """`"QCD,Tbqq"` -> ["QCD", "Tbqq"]; `"all"` -> all ten."""
    names = list(CLASS_SETTINGS) if text == "all" else text.split(",")
    for name in names:
        if name not in CLASS_SETTINGS:
            raise argparse.ArgumentTypeError(f"expected classes of {','.join(CLASS_SETTINGS)} or all, got {name!r}")
    return names


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hepzoo simulate jets",
        description="Simulate jets with Pythia 8, a parametrised detector and fastjet, and write sharded Parquet.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python data_scripts/simulate_jets.py --output data/jets --classes QCD,Tbqq --n_jets 10000 --processes 8
              python data_scripts/simulate_jets.py --output data/jets --n_jets 2000 --seed 1 --split test
              python data_scripts/simulate_jets.py --output data/ten_classes --classes all --n_jets 5000 --processes 8
            read back:
              datasets.load_dataset("parquet", data_files="data/jets/train-*.parquet", streaming=True)
            Give every split a seed of its own: several jets can come from one event.
            """
        ),
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the Parquet files")
    parser.add_argument(
        "--classes",
        type=parse_classes,
        default="QCD,Tbqq",
        help=f"of {','.join(CLASS_SETTINGS)}, or all (default: %(default)s)",
    )
    parser.add_argument("--n_jets", type=int, default=1000, help="jets of each class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same jets (default: %(default)s)")
    parser.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    parser.add_argument("--rows_per_shard", type=int, default=5000, help="jets per file (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="worker processes; does not change the jets")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing split")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    particles = 0
    try:
        rounds = iter_jets(args.n_jets, args.classes, args.seed, args.processes)
        writer = ShardWriter(
            args.output, JETS_FEATURES, args.split, rows_per_shard=args.rows_per_shard, overwrite=args.overwrite
        )
        total = args.n_jets * len(args.classes)
        with writer, tqdm(total=total, unit="jet", desc="simulate", file=sys.stderr) as bar:
            for columns in rounds:
                writer.write(columns)
                particles += int(columns["jet_nparticles"].sum())
                bar.update(len(columns["jet_pt"]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{total} jets, {particles / total:.1f} constituents per jet, {len(writer.paths)} file(s) in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
