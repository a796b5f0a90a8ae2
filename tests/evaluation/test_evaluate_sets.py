"""Distances with errors, particle types and impact parameters, the command and its pictures."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

from hepzoo.evaluation import evaluate_sets, jet_particles
from hepzoo.evaluation.distances import quantile_kl, wasserstein
from hepzoo.evaluation.evaluate_sets import compare_sets
from hepzoo.evaluation.jets import as_jets, observe, read_jets
from hepzoo.evaluation.resampled import resampled_distances, reversed_kl, split_reversed_kl
from tests.evaluation.test_jets import cartesian, random_jets, table


def make_columns(number: int, seed: int, muons: float = 0.02, displacement: float = 0.02) -> dict[str, list]:
    """Jets of two classes with particle types and impact parameters; those of Tbqq are more displaced."""
    columns = cartesian(random_jets(number, seed=seed, most=25))
    rng = np.random.default_rng(seed)
    label = np.arange(number) % 2
    names = (*jet_particles.TYPES, "part_charge", *jet_particles.TRACKS)
    columns |= {name: [] for name in names}
    for top, px in zip(label, columns["part_px"], strict=True):
        kind = rng.choice(5, size=len(px), p=(0.6 - muons, 0.1, 0.25, 0.05, muons))
        charge = np.where(np.isin(kind, (0, 3, 4)), rng.choice((-1, 1), size=len(px)), 0)
        for k, name in enumerate(jet_particles.TYPES):
            columns[name].append((kind == k).astype(int))
        columns["part_charge"].append(charge.astype(float))
        for name in ("d0", "dz"):
            error = rng.uniform(0.01, 0.03, len(px))
            columns[f"part_{name}err"].append(error * (charge != 0))
            columns[f"part_{name}val"].append(rng.normal(0, displacement * (1 + 4 * top), len(px)) * (charge != 0))
    return columns | {"label_QCD": 1 - label, "label_Tbqq": label}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    pq.write_table(table(make_columns(120, 1)), folder / "real.parquet")
    pq.write_table(table(make_columns(100, 2, muons=0.2)), folder / "generated.parquet")
    return folder


@pytest.fixture(scope="module")
def samples(files):
    columns = jet_particles.known_columns([files / "real.parquet"], [files / "generated.parquet"])
    assert columns == list(jet_particles.COLUMNS)
    return [jet_particles.read_particle_jets([files / f"{name}.parquet"], columns) for name in ("real", "generated")]


# ---- distances


def test_reversed_kl():
    rng = np.random.default_rng(0)
    real, same, other = rng.normal(0, 1, 50_000), rng.normal(0, 1, 50_000), rng.normal(1, 1, 50_000)
    assert reversed_kl(real, real) == pytest.approx(0, abs=1e-4)
    assert 0 < reversed_kl(real, same) < 0.01
    assert reversed_kl(real, other) == pytest.approx(0.5, abs=0.05)  # of two unit Gaussians one apart
    # half of the generated values are beyond the real ones
    uniform, wide = rng.random(20_000), 2 * rng.random(20_000)
    assert reversed_kl(uniform, wide) == pytest.approx(0, abs=0.01)
    assert reversed_kl(uniform, wide, renormalise=False) == pytest.approx(0.5 * np.log(0.5), abs=0.01)
    last = 0.505 * np.log(0.505 / 0.01) + 0.495 * np.log(0.5)
    for renormalise in (True, False):
        assert reversed_kl(uniform, wide, clip=True, renormalise=renormalise) == pytest.approx(last, abs=0.05)
    # not the same the other way round, and by hand in two bins
    assert reversed_kl([0, 1, 2, 3], [0, 2, 2, 2], bins=2) == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    assert np.isnan(reversed_kl([1.0, 1.0], [1.0]))


def test_draws_have_the_right_mean_and_spread(samples):
    observed = [observe(jets) for jets in samples]
    names = ("jet_mass", "part_d0val", "d0", "jet_eta")
    found = resampled_distances(*observed, names, num_jets=50, draws=4, seed=3)
    rng = np.random.default_rng(3)
    w1, kl = [], []
    for _ in range(4):
        drawn = [o.scalars["jet_mass"][rng.integers(len(o), size=50)] for o in observed]
        w1.append(wasserstein(*drawn))
        kl.append(quantile_kl(*drawn))
    assert found["jet_mass"]["w1"] == pytest.approx(np.mean(w1))
    assert found["jet_mass"]["w1_std"] == pytest.approx(np.std(w1))
    assert found["jet_mass"]["kl"] == pytest.approx(np.mean(kl))
    assert found["d0"]["w1"] > found["part_d0val"]["w1"] > 0  # neutral constituents have a d0 of 0 in both
    relative = observe(samples[1].centered())
    assert np.isnan(resampled_distances(observed[0], relative, ["jet_eta"])["jet_eta"]["w1"])


def test_disjoint_splits(samples):
    observed = [observe(jets) for jets in samples]
    mean, std = split_reversed_kl(*observed, ["multiplicity"], splits=2, bins=5)["multiplicity"]
    halves = [[o.scalars["multiplicity"][part] for part in np.array_split(np.arange(len(o)), 2)] for o in observed]
    values = [reversed_kl(*pair, bins=5) for pair in zip(*halves, strict=True)]
    assert (mean, std) == pytest.approx((np.mean(values), np.std(values)))


def test_hostile_distances(samples):
    observed = [observe(jets) for jets in samples]
    with pytest.raises(ValueError, match="bins must be at least 2"):
        reversed_kl([1.0, 2.0], [1.0], bins=1)
    with pytest.raises(ValueError, match="the generated sample: value 0 is inf"):
        reversed_kl([1.0, 2.0], [np.inf])
    with pytest.raises(ValueError, match="draws must be at least 1"):
        resampled_distances(*observed, ["jet_mass"], draws=0)
    with pytest.raises(ValueError, match="1000 splits of 120 real"):
        split_reversed_kl(*observed, ["jet_mass"], splits=1000)


# ---- features of constituents


def test_features_follow_their_constituents(samples):
    jets = samples[0]
    numbers = np.array([5, 2, 5])
    chosen, original = jets.select(numbers), np.split(jets.features["part_d0val"], jets.offsets[1:-1])
    np.testing.assert_array_equal(chosen.features["part_d0val"], np.concatenate([original[i] for i in numbers]))
    cut = jets.cut(max_constituents=3)
    np.testing.assert_array_equal(cut.features["part_charge"], jets.features["part_charge"][np.isin(
        np.arange(len(jets.pt)) - jets.offsets[:-1][jets.owner], (0, 1, 2)
    )])  # fmt: skip
    both = type(jets).concatenate([chosen, cut])
    assert len(both.features["d0"]) == len(both.pt)
    with pytest.raises(ValueError, match="other features"):
        type(jets).concatenate([chosen, as_jets(random_jets(2))])


def test_impact_parameters_are_of_charged_constituents(samples):
    features = samples[0].features
    charged = features["part_charge"] != 0
    assert np.isfinite(features["d0"][charged]).all() and np.isnan(features["d0"][~charged]).all()
    expected = features["part_dzval"][charged] / features["part_dzerr"][charged]
    np.testing.assert_allclose(features["dz_significance"][charged], expected)
    without = jet_particles._impact_parameters({k: v for k, v in features.items() if k != "part_charge"})
    np.testing.assert_array_equal(without["d0"], features["d0"])  # by the flags


def test_type_shares(samples):
    rows = jet_particles.type_shares(jet_particles.by_class(*samples))
    table = {(row["class"], row["what"]): row for row in rows}
    assert {name for name, _ in table} == {"all", "QCD", "Tbqq"}
    muons = table["all", "muon"]
    flags = samples[0].features["part_isMuon"]
    assert muons["real"] == pytest.approx(flags.mean()) and muons["generated"] > 0.15 and muons["pull"] > 5
    # independent constituents: the binomial error
    assert muons["real_error"] == pytest.approx(np.sqrt(flags.mean() / len(flags)), rel=0.4)
    assert abs(table["all", "photon"]["pull"]) < 4
    total = sum(table["QCD", title]["generated"] for title in jet_particles.TYPES.values())
    assert total == pytest.approx(1)
    assert table["all", "charge of another type"]["real"] == 0


def test_wrong_charges_are_counted(files):
    columns = make_columns(30, 3)
    columns["part_charge"] = [np.zeros(len(values)) for values in columns["part_charge"]]
    jets = as_jets(columns, features=(*jet_particles.TYPES, "part_charge"))
    rows = {row["what"]: row for row in jet_particles.type_shares({"all": (jets, jets)})}
    charged = sum(rows[name]["real"] for name in ("charged hadron", "electron", "muon"))
    assert rows["charge of another type"]["real"] == pytest.approx(charged)


def test_impact_parameter_table(samples):
    rows = jet_particles.impact_parameters(jet_particles.by_class(*samples))
    table = {(row["class"], row["what"]): row for row in rows}
    displaced = "displaced tracks, d0 above 3 errors"
    assert table["Tbqq", displaced]["real"] > 0.3 > table["QCD", displaced]["real"]
    sizes = {name: table[name, "median size of d0 of charged"]["real"] for name in ("QCD", "Tbqq")}
    assert sizes["Tbqq"] > 3 * sizes["QCD"]
    assert table["all", "median size of d0 / error"]["w1"] > 0
    kinematics = as_jets(random_jets(20))
    assert jet_particles.impact_parameters({"all": (kinematics, kinematics)}) == []
    assert jet_particles.type_shares({"all": (kinematics, kinematics)}) == []


def test_hostile_features(files, tmp_path):
    columns = make_columns(6, 1)
    broken = {
        "part_isMuon": ([values + 1 for values in columns["part_isMuon"]], "of the flags|expected 0 or 1"),
        "part_isPhoton": ([0.5 + 0 * values for values in columns["part_isPhoton"]], "part_isPhoton.*expected 0 or 1"),
        "part_d0val": ([values * np.nan for values in columns["part_d0val"]], r"part_d0val\[0\] is nan"),
        "part_dzerr": ([values[:-1] for values in columns["part_dzerr"]], "part_dzerr has .* expected equal lengths"),
    }
    for name, (values, message) in broken.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table(columns | {name: values}), path)
        with pytest.raises(ValueError, match=message):
            jet_particles.read_particle_jets([path], jet_particles.COLUMNS)
    with pytest.raises(ValueError, match="column 'nothing' is missing"):
        read_jets([files / "real.parquet"], features=["nothing"])


# ---- command and pictures


def test_command(files, tmp_path, capsys):
    outputs = [str(tmp_path / f"report.{ending}") for ending in ("json", "md")]
    arguments = ["--real", str(files / "real.parquet"), "--generated", str(files / "generated.parquet")]
    few = ["--draws", "2", "--draw_jets", "40", "--emd_jets", "2", "--emd_draws", "1"]
    plots = ["--plots", str(tmp_path / "plots")]
    assert evaluate_sets.main([*arguments, *few, *plots, "--axes", "WTA_pt", "--output", *outputs]) == 0
    assert "W1-EFP" in capsys.readouterr().out
    report = json.loads(Path(outputs[0]).read_text())
    assert {row["class"] for row in report["distances"]} == {"all", "QCD", "Tbqq"}
    rows = {row["observable"]: row for row in report["distances"] if row["class"] == "all"}
    assert {"jet_mass", "tau21", "tau32", "d2", "part_d0val", "d0_significance", "part_charge"} <= set(rows)
    assert all(np.isfinite(rows["jet_mass"][key]) for key in ("w1", "w1_std", "w1_floor", "kl", "reversed_kl_clipped"))
    metrics = {row["metric"] for row in report["jetnet"]}
    assert metrics == {
        "w1m", "w1p", "w1p_eta", "w1p_phi", "w1p_pt", "w1efp", "coverage", "mmd",
        "w1m_gev", "w1p_gev", "w1p_pt_gev", "w1efp_gev",
    }  # fmt: skip
    auc = {(row["class"], row["features"]): row["auc"] for row in report["classifier"]}
    everything = "kinematics, types, impact parameters"
    assert set(auc) == {(name, f) for name in ("all", "QCD", "Tbqq") for f in ("kinematics", everything)}
    # ten times as many muons
    assert auc["all", everything] > 0.85 > auc["all", "kinematics"]
    assert Path(outputs[1]).read_text().count("\n## ") == 5
    pictures = ["particle_types", "impact_parameters", *(f"observables_{name}" for name in ("all", "QCD", "Tbqq"))]
    assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == sorted(pictures)
    for name in pictures:
        picture = imread(tmp_path / "plots" / f"{name}.png")
        assert picture.shape[0] > 300 and picture[..., :3].std() > 0.02


def test_particle_features(samples):
    jets = samples[0]
    found = jet_particles.particle_features(jets)
    assert found.shape == (len(jets), 10 + 2 + 3 + 3 + 1 + 1)
    jet, part = 4, slice(*jets.offsets[4:6])
    features = {name: values[part] for name, values in jets.features.items()}
    pt = jets.pt[part]
    assert found[jet, 0] == pytest.approx(features["part_isChargedHadron"].mean())
    assert found[jet, 1] == pytest.approx((features["part_isChargedHadron"] * pt).sum() / pt.sum())
    assert found[jet, 10] == pytest.approx((features["part_charge"] * pt).sum() / pt.sum())
    assert (found[:, 11] == 0).all()
    size = np.abs(features["d0_significance"][np.isfinite(features["d0_significance"])])
    np.testing.assert_allclose(found[jet, 12:15], [size.mean(), size.max(), np.mean(size > 3)])
    assert found[jet, 18] == pytest.approx(np.nanmean(features["d0err"]))
    # without charged constituents there is no impact parameter
    neutral = jets.keep(jets.features["part_charge"] == 0)
    some = neutral.multiplicity > 0
    found = jet_particles.particle_features(neutral.select(some))
    assert np.isnan(found[:, 12:]).all() and np.isfinite(found[:, :12]).all()
    assert jet_particles.particle_features(as_jets(random_jets(5))).shape == (5, 0)


def test_fpnd_of_the_command(files, tmp_path, capsys, monkeypatch):
    arguments = ["--real", str(files / "real.parquet"), "--generated", str(files / "generated.parquet")]
    arguments += ["--draws", "1", "--draw_jets", "20", "--no_classes", "--no_classifier"]
    assert evaluate_sets.main([*arguments, "--fpnd", "t", "--fpnd_files", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "t_mu.txt is missing; it is in the folder fpnd_resources" in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        evaluate_sets.main([*arguments, "--fpnd", "t"])
    assert "--fpnd and --fpnd_files belong together" in capsys.readouterr().err
    monkeypatch.setattr(evaluate_sets, "frechet_particlenet_distance", lambda jets, kind, folder: 0.25 * len(jets))
    assert evaluate_sets.main([*arguments, "--fpnd", "t", "--fpnd_files", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "FPND to the t jets of JetNet: 25 (100 jets)." in out and "Classifier" not in out


def test_floors_are_scaled_to_the_samples(samples):
    """The floor of a sample against another one of the same kind is about its distance."""
    jets = as_jets(random_jets(400, seed=5)), as_jets(random_jets(400, seed=6))
    report = compare_sets(*jets, draws=3, per_class=False)
    (row,) = report["classifier"]
    assert row["features"] == "kinematics" and row["jets"] == 400 and abs(row["auc"] - 0.5) < 4 * row["error"] + 0.02
    ratios = [row["w1"] / row["w1_floor"] for row in report["distances"] if row["observable"] != "part_ptrel"]
    assert 0.4 < np.median(ratios) < 2.5
    assert report["types"] == [] and report["impact_parameters"] == []


def test_hostile_command(files, tmp_path, capsys):
    arguments = ["--real", str(files / "real.parquet"), "--generated", str(tmp_path / "none.parquet")]
    assert evaluate_sets.main(arguments) == 2
    error = capsys.readouterr().err
    assert "no Parquet file found" in error and error.count("\n") == 1
    arguments[-1] = str(files / "generated.parquet")
    assert evaluate_sets.main([*arguments, "--max_jets", "15"]) == 2
    assert "at least 20 are needed" in capsys.readouterr().err
    for wrong in (["--output", "table.txt"], ["--draws", "0"], ["--emd_jets", "-1"]):
        with pytest.raises(SystemExit) as stop:
            evaluate_sets.main([*arguments, *wrong])
        assert stop.value.code == 2
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    assert evaluate_sets.main([*arguments[:-1], str(tmp_path / "broken.parquet")]) == 2
    assert "not a readable Parquet file" in capsys.readouterr().err
