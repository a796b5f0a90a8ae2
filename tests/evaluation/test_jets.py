"""Jets: reading, four-momenta, and substructure against brute force and against fastjet."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hepzoo.evaluation import jet_substructure as sub
from hepzoo.evaluation.jets import CLASSES, Jets, as_jets, observe, observe_files, read_jets


def random_jets(number: int, seed: int = 0, most: int = 60, prongs: int = 3, width: float = 0.15) -> dict[str, list]:
    """Columns of jets with a few prongs of falling pT, 1 to `most` constituents, anywhere in the detector."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list] = {name: [] for name in ("part_pt", "part_eta", "part_phi")}
    for _ in range(number):
        n = rng.integers(1, most + 1)
        prong = rng.integers(0, prongs, n)
        centers = rng.normal(0, 0.3, (2, prongs))
        columns["part_pt"].append(np.sort(0.5 + 400 * rng.random(n) ** 4)[::-1])
        columns["part_eta"].append(rng.uniform(-1.5, 1.5) + centers[0, prong] + rng.normal(0, width, n))
        phi = rng.uniform(-np.pi, np.pi) + centers[1, prong] + rng.normal(0, width, n)
        columns["part_phi"].append(sub.wrap_phi(phi))
    return columns


def cartesian(columns: dict[str, list]) -> dict[str, list]:
    found: dict[str, list] = {name: [] for name in ("part_px", "part_py", "part_pz", "part_energy")}
    for pt, eta, phi in zip(*columns.values(), strict=True):
        for name, values in zip(
            found, (pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta), pt * np.cosh(eta)), strict=True
        ):
            found[name].append(values)
    return found


def records(columns: dict[str, list]) -> list[dict]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def table(columns: dict[str, list]) -> pa.Table:
    return pa.table({name: pa.array([np.asarray(v).tolist() for v in values]) for name, values in columns.items()})


# ---- rows


def test_every_form_of_rows_gives_the_same_jets():
    import datasets

    columns = cartesian(random_jets(20)) | {"label_QCD": np.zeros(20), "label_Tbqq": np.ones(20, dtype=int)}
    forms = [columns, records(columns), table(columns), datasets.Dataset(table(columns)), as_jets(columns)]
    for form in forms:
        jets = as_jets(form)
        assert len(jets) == 20 and (jets.label == CLASSES.index("Tbqq")).all()
        for name in ("pt", "eta", "phi", "offsets"):
            np.testing.assert_allclose(getattr(jets, name), getattr(forms[-1], name), rtol=1e-12)
    one = as_jets(records(columns)[3])
    assert len(one) == 1
    np.testing.assert_allclose(one.pt, as_jets(columns).select(np.array([3])).pt)


def test_four_momenta():
    columns = random_jets(50)
    a, b = as_jets(columns), as_jets(cartesian(columns))
    np.testing.assert_allclose(a.momentum, b.momentum, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(a.masses(), b.masses(), rtol=1e-5, atol=1e-3)
    assert not a.relative
    # two massless constituents: m^2 = 2 pT1 pT2 (cosh deta - cos dphi)
    pair = as_jets({"part_pt": [[100.0, 50.0]], "part_eta": [[1.0, 1.4]], "part_phi": [[3.1, -3.1]]})
    dphi = 2 * np.pi - 6.2
    assert pair.masses()[0] == pytest.approx(np.sqrt(2 * 5000 * (np.cosh(0.4) - np.cos(dphi))))
    assert pair.axes[0][0] == pytest.approx(np.hypot(100 + 50 * np.cos(dphi), 50 * np.sin(dphi)))
    assert abs(pair.centered().phi).max() < 0.1
    heavy = as_jets({"part_pt": [[30.0]], "part_eta": [[0.5]], "part_phi": [[0.0]], "part_mass": [[4.0]]})
    assert heavy.masses()[0] == pytest.approx(4.0) and heavy.massless().masses()[0] == pytest.approx(0, abs=1e-5)
    kept, massless = (observe(heavy, keep_mass=k).scalars["jet_mass"][0] for k in (True, False))
    assert kept == pytest.approx(4.0) and massless == pytest.approx(0, abs=1e-5)


def test_cut_and_select():
    jets = as_jets(random_jets(40, width=0.4))
    cut = jets.cut(max_relative=0.5, max_constituents=10)
    assert len(cut) == 40 and cut.multiplicity.max() == 10
    around = jets.centered()
    near = (abs(around.eta) < 0.5) & (abs(around.phi) < 0.5)
    expected = np.minimum(np.bincount(jets.owner[near], minlength=40), 10)
    np.testing.assert_array_equal(cut.multiplicity, expected)
    np.testing.assert_array_equal(cut.pt[cut.owner == 5], jets.pt[(jets.owner == 5) & near][:10])
    chosen = jets.select(np.array([7, 3]))
    np.testing.assert_array_equal(chosen.multiplicity, jets.multiplicity[[7, 3]])
    np.testing.assert_array_equal(chosen.pt[-jets.multiplicity[3] :], jets.pt[jets.owner == 3])
    both = Jets.concatenate([chosen, jets])
    np.testing.assert_array_equal(both.multiplicity, np.r_[jets.multiplicity[[7, 3]], jets.multiplicity])


def test_files(tmp_path):
    columns = cartesian(random_jets(30))
    label = np.arange(30) % 2
    pq.write_table(table(columns | {"label_QCD": 1 - label, "label_Wqq": label}), tmp_path / "a.parquet")
    whole = read_jets(tmp_path)
    assert len(whole) == 30
    some = read_jets(tmp_path, classes=["Wqq"], max_jets=5)
    np.testing.assert_array_equal(some.label, [CLASSES.index("Wqq")] * 5)
    np.testing.assert_allclose(some.pt, whole.select(np.arange(1, 10, 2)).pt)
    observables = observe_files(tmp_path, max_jets=10)
    np.testing.assert_allclose(observables.scalars["tau21"], observe(columns).scalars["tau21"][:10])


def test_observables_of_small_and_empty_jets():
    rows = [
        {"part_pt": [], "part_etarel": [], "part_phirel": []},
        {"part_pt": [10.0], "part_etarel": [0.0], "part_phirel": [0.1]},
        {"part_pt": [10.0, 5.0], "part_etarel": [0.0, 0.1], "part_phirel": [0.1, 0.0]},
        {"part_pt": [10.0, 5.0, 2.0], "part_etarel": [0.0, 0.1, 0.3], "part_phirel": [0.1, 0.0, 0.0]},
    ]
    o = observe(rows)
    np.testing.assert_array_equal(o.scalars["multiplicity"], [0, 1, 2, 3])
    assert np.isnan(o.scalars["jet_pt"]).tolist() == [True, False, False, False]
    assert np.isnan(o.scalars["tau21"]).tolist() == [True, True, True, False]
    assert o.scalars["tau32"][3] == 0 and o.scalars["d2"][3] > 0
    assert np.isnan(o.scalars["jet_eta"]).all()  # relative coordinates: not known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part_px": None}, r"no constituents: a jet needs part_px"),
        ({"part_pz": [[1.0], [2.0]]}, r"row 1: part_pz has 1 constituents, part_px has 2"),
        ({"part_pz": [[1.0], [2.0, np.nan]]}, r"row 1: part_pz\[1\] is nan, expected a finite number"),
        ({"part_energy": [[9.0], [9.0, 1.0]]}, r"row 1: part_energy\[1\] is 1, expected at least the momentum"),
        ({"part_px": [[3.0], [3.0, 0.0]], "part_py": [[0.0], [0.0, 0.0]]}, r"row 1: pT.*\[1\] is 0.*remove padding"),
        ({"part_px": [["a"], [3.0, 3.0]]}, "must be a list of numbers"),
        ({"part_px": [[3.0]]}, "rows"),
        ({"label_QCD": [1, 1], "label_Hbb": [0, 1]}, "row 1: 2 of the label columns are 1"),
        ({"label_QCD": [1, 7]}, "row 1: label_QCD is 7, expected 0 or 1"),
        ({"label_QCD": ["x", "y"]}, "label_QCD"),
    ],
)
def test_hostile_rows(change, message):
    columns = {
        "part_px": [[3.0], [3.0, 3.0]],
        "part_py": [[0.0], [1.0, 1.0]],
        "part_pz": [[1.0], [2.0, 2.0]],
        "part_energy": [[9.0], [9.0, 9.0]],
    } | change
    columns = {name: values for name, values in columns.items() if values is not None}
    with pytest.raises(ValueError, match=message) as error:
        as_jets(columns)
    assert "\n" not in str(error.value)


def test_hostile_kinds(tmp_path):
    for rows in ("a.parquet", 3, [1, 2]):
        with pytest.raises(ValueError, match="expected"):
            as_jets(rows)
    with pytest.raises(ValueError, match="part_pt.* is -1"):
        as_jets({"part_pt": [[-1.0]], "part_eta": [[0.0]], "part_phi": [[0.0]]})
    with pytest.raises(ValueError, match="part_eta.* is 700"):
        as_jets({"part_pt": [[1.0]], "part_eta": [[700.0]], "part_phi": [[0.0]]})
    with pytest.raises(ValueError, match="unknown jet class 'top'"):
        read_jets(tmp_path, classes=["top"])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"bad\.parquet: not a readable Parquet file"):
        read_jets(tmp_path)
    with pytest.raises(ValueError, match="some jets have coordinates relative"):
        Jets.concatenate([as_jets(random_jets(2)), as_jets(random_jets(2)).centered()])


# ---- substructure


def test_energy_correlators_are_the_sums():
    pt, eta, phi, mask = as_jets(random_jets(12, most=12)).padded()
    for beta in (1.0, 2.0):
        found = sub.energy_correlators(pt, eta, phi, mask, beta)
        for jet in range(len(pt)):
            n = mask[jet].sum()
            distance = np.hypot(eta[jet][:, None] - eta[jet], sub.wrap_phi(phi[jet][:, None] - phi[jet]))
            pairs = sum(
                pt[jet, i] * pt[jet, j] * distance[i, j] ** beta for i, j in itertools.combinations(range(n), 2)
            )
            triples = sum(
                pt[jet, i] * pt[jet, j] * pt[jet, k] * (distance[i, j] * distance[i, k] * distance[j, k]) ** beta
                for i, j, k in itertools.combinations(range(n), 3)
            )
            for value, expected in zip((f[jet] for f in found), (pt[jet].sum(), pairs, triples), strict=True):
                assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_well_separated_prongs():
    """Three prongs of one constituent and its soft neighbour: the axes are the prongs."""
    eta = np.array([[0.0, 0.01, 0.5, 0.51, -0.5, -0.51]])
    phi = np.array([[0.0, 0.0, 0.3, 0.3, 0.3, 0.3]])
    pt = np.array([[100.0, 1.0, 80.0, 1.0, 60.0, 1.0]])
    mask = np.ones_like(pt, dtype=bool)
    subjets = sub.exclusive_jets(pt, eta, phi, mask, 3, recombination="WTA_pt")[3]
    np.testing.assert_allclose(subjets.pt, [[101, 81, 61]])
    np.testing.assert_allclose(subjets.rapidity, [[0, 0.5, -0.5]])
    np.testing.assert_array_equal(subjets.member, [[0, 0, 1, 1, 2, 2]])
    tau3 = sub.n_subjettiness(pt, eta, phi, mask, subjets)
    np.testing.assert_allclose(tau3, 0.03 / (243 * 0.8))


def test_padding_order_and_frame_do_not_matter():
    pt, eta, phi, mask = as_jets(random_jets(30)).padded()
    expected = sub.substructure(pt, eta, phi, mask)
    rng = np.random.default_rng(1)
    wide = [np.concatenate([a, np.full((30, 5), np.nan if a is not mask else False)], axis=1) for a in (pt, eta, phi)]
    wide_mask = np.concatenate([mask, np.zeros((30, 5), dtype=bool)], axis=1)
    order = rng.permuted(np.tile(np.arange(wide_mask.shape[1]), (30, 1)), axis=1)
    shuffled = [np.take_along_axis(a, order, axis=1) for a in (*wide, wide_mask)]
    boosted = (pt, eta + 0.7, sub.wrap_phi(phi + 2.0), mask)
    rows = rng.permutation(30)
    for found, index in (
        (sub.substructure(*shuffled), slice(None)),
        (sub.substructure(*boosted), slice(None)),
        (sub.substructure(pt[rows], eta[rows], phi[rows], mask[rows]), rows),
    ):
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values[index], rtol=1e-6, atol=1e-9, err_msg=name)


def test_batches_of_any_size_give_the_same(monkeypatch):
    arrays = as_jets(random_jets(30)).padded()
    expected = sub.substructure(*arrays)
    monkeypatch.setattr(sub, "_ELEMENTS", 500)
    for name, values in sub.substructure(*arrays).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-12, err_msg=name)


def test_hostile_substructure():
    pt, eta, phi, mask = as_jets(random_jets(3)).padded()
    with pytest.raises(ValueError, match="one shape"):
        sub.exclusive_jets(pt, eta[:, 1:], phi, mask)
    with pytest.raises(ValueError, match="at least 1"):
        sub.exclusive_jets(pt, eta, phi, mask, (0, 1))
    with pytest.raises(ValueError, match="unknown algorithm 'antikt'"):
        sub.exclusive_jets(pt, eta, phi, mask, algorithm="antikt")
    with pytest.raises(ValueError, match="unknown recombination"):
        sub.exclusive_jets(pt, eta, phi, mask, recombination="pt2")
    with pytest.raises(ValueError, match="radius is -1"):
        sub.exclusive_jets(pt, eta, phi, mask, radius=-1)
    with pytest.raises(ValueError, match="jet 1: pt of constituent 0 is 0"):
        sub.substructure(np.where(np.arange(3)[:, None] == 1, 0.0, pt), eta, phi, mask)
    empty = sub.substructure(*(np.zeros((2, 0)),) * 3, np.zeros((2, 0), dtype=bool))
    assert all(np.isnan(values).all() for values in empty.values())


@pytest.mark.parametrize("algorithm", ["kt", "ca"])
@pytest.mark.parametrize("recombination", ["E", "WTA_pt"])
@pytest.mark.parametrize("width", [0.1, 0.6])
def test_clustering_equals_fastjet(algorithm, recombination, width):
    """Wide jets make the algorithm merge pseudojets with the beam."""
    fastjet = pytest.importorskip("fastjet", reason='needs fastjet: pip install "hepzoo[sim]"')
    jets = as_jets(random_jets(40, seed=int(10 * width), most=70, width=width))
    found = sub.exclusive_jets(*jets.padded(), (1, 2, 3, 5), algorithm=algorithm, recombination=recombination)
    definition = fastjet.JetDefinition(
        {"kt": fastjet.kt_algorithm, "ca": fastjet.cambridge_algorithm}[algorithm],
        0.8,
        {"E": fastjet.E_scheme, "WTA_pt": fastjet.WTA_pt_scheme}[recombination],
    )
    beam = 0
    for number in range(len(jets)):
        inside = jets.owner == number
        particles = []
        for i, (pt, eta, phi) in enumerate(zip(jets.pt[inside], jets.eta[inside], jets.phi[inside], strict=True)):
            p4 = (pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta), pt * np.cosh(eta))
            particles.append(fastjet.PseudoJet(*map(float, p4)))
            particles[-1].set_user_index(i)
        sequence = fastjet.ClusterSequence(particles, definition)
        for n, subjets in found.items():
            if n > len(particles):
                assert np.isfinite(subjets.pt[number]).sum() == len(particles)
                continue
            expected = fastjet.sorted_by_pt(sequence.exclusive_jets(n))
            if algorithm == "ca" and sum(len(p.constituents()) for p in expected) < len(particles):
                beam += 1  # the order of mergers with the beam is not defined
                continue
            values = np.array([(p.pt(), p.rap(), p.eta(), p.m()) for p in expected])
            np.testing.assert_allclose(subjets.pt[number], values[:, 0], rtol=1e-9)
            np.testing.assert_allclose(subjets.rapidity[number], values[:, 1], atol=1e-8)
            np.testing.assert_allclose(subjets.pseudorapidity[number], values[:, 2], atol=1e-7)
            np.testing.assert_allclose(subjets.mass[number], values[:, 3], atol=1e-3)
            np.testing.assert_allclose(
                np.exp(1j * subjets.phi[number]), [np.exp(1j * p.phi()) for p in expected], atol=1e-9
            )
            member = np.full(len(particles), -1)
            for k, p in enumerate(expected):
                member[[c.user_index() for c in p.constituents()]] = k
            np.testing.assert_array_equal(subjets.member[number, : len(particles)], member)
            beam += (member < 0).sum()
    assert width < 0.5 or beam > 0


def test_substructure_of_a_thousand_jets_equals_fastjet():
    """tau 1 to 3 about the axes of fastjet, and its D2."""
    pytest.importorskip("fastjet", reason='needs fastjet: pip install "hepzoo[sim]"')
    ak, vector = pytest.importorskip("awkward"), pytest.importorskip("vector")
    import fastjet

    vector.register_awkward()
    jets = as_jets(random_jets(1070, most=50, width=0.2))
    jets = jets.select(jets.multiplicity >= 3)
    assert len(jets) >= 1000
    px, py, pz = jets.pt * np.cos(jets.phi), jets.pt * np.sin(jets.phi), jets.pt * np.sinh(jets.eta)
    p4 = {"px": px, "py": py, "pz": pz, "E": jets.pt * np.cosh(jets.eta)}
    array = ak.zip({k: ak.unflatten(v, jets.multiplicity) for k, v in p4.items()}, with_name="Momentum4D")
    sequence = fastjet.ClusterSequence(array, fastjet.JetDefinition(fastjet.kt_algorithm, 0.8))
    found = sub.substructure(*jets.padded())
    expected = ak.to_numpy(ak.flatten(sequence.exclusive_jets_energy_correlator(njets=1, func="d2"), axis=None))
    np.testing.assert_allclose(found["d2"], expected, rtol=1e-5)
    pt, eta, phi, mask = jets.padded()
    pt = np.where(mask, pt, 0.0)
    for number in (1, 2, 3):
        axes = sequence.exclusive_jets(n_jets=number)
        x, y, z, energy = (ak.to_numpy(axes[name])[:, None] for name in ("px", "py", "pz", "E"))
        along, around = np.arctanh(z / energy), np.arctan2(y, x)
        distance = np.hypot(eta[..., None] - along, sub.wrap_phi(phi[..., None] - around)).min(axis=-1)
        np.testing.assert_allclose(
            found[f"tau{number}"], (pt * distance).sum(axis=1) / (0.8 * pt.sum(axis=1)), rtol=1e-6, atol=1e-12
        )
