"""The embedded hpDIRC simulator: optics against formulas and step-by-step ray tracing, records, command line."""

import subprocess
import sys

import numpy as np
import pytest
from datasets import load_dataset

from hepzoo.data_scripts import dirc_optics as optics
from hepzoo.data_scripts import simulate_dirc
from hepzoo.data_scripts.dirc_schema import DIRC_FEATURES
from hepzoo.data_scripts.simulate_dirc import DircDetector, SimulationStats, simulate_tracks, species_codes

QUIET = {"delta_rays": False, "multiple_scattering": False, "angular_resolution": 0.0}


def all_hits(columns, name):
    return np.concatenate(columns[name])


@pytest.fixture(scope="module")
def pions_30deg():
    stats = SimulationStats()
    return simulate_tracks(1000, 211, 6.0, 30.0, seed=11, stats=stats), stats


# Optics


@pytest.mark.parametrize(
    ("wavelength", "index"), [(213.856, 1.53430), (404.656, 1.46961), (587.561, 1.45846), (656.27, 1.45637)]
)
def test_refractive_index_of_malitson(wavelength, index):
    assert optics.refractive_index(wavelength) == pytest.approx(index, abs=2e-5)


def test_group_index_is_the_derivative():
    wavelength = np.linspace(250, 700, 50)
    step = 1e-2
    slope = (optics.refractive_index(wavelength + step) - optics.refractive_index(wavelength - step)) / (2 * step)
    expected = optics.refractive_index(wavelength) - wavelength * slope
    np.testing.assert_allclose(optics.group_index(wavelength), expected, rtol=1e-8)
    assert (np.diff(expected) < 0).all()


def test_cherenkov_angle_and_threshold():
    index = 1.47
    assert np.cos(optics.cherenkov_angle(0.95, index)) == pytest.approx(1 / (0.95 * index))
    assert np.isnan(optics.cherenkov_angle(0.9 / index, index))
    mass = optics.PARTICLE_MASSES[321]
    threshold = optics.threshold_momentum(mass, index)
    assert optics.velocity(threshold, mass) == pytest.approx(1 / index)
    assert threshold == pytest.approx(0.458, abs=2e-3)


def test_kaon_angle_is_smaller_and_approaches_the_pion_angle():
    momentum = np.array([1.0, 3.0, 6.0, 10.0])
    pion, kaon = (
        optics.cherenkov_angle(optics.velocity(momentum, optics.PARTICLE_MASSES[code]), 1.47) for code in (211, 321)
    )
    difference = (pion - kaon) * 1e3
    assert (difference > 0).all() and (np.diff(difference) < 0).all()
    # (m_K^2 - m_pi^2) / (2 p^2 tan theta_C)
    masses = optics.PARTICLE_MASSES
    estimate = (masses[321] ** 2 - masses[211] ** 2) / (2 * 36 * np.tan(pion[2])) * 1e3
    assert difference[2] == pytest.approx(estimate, rel=0.02)
    assert difference[2] == pytest.approx(2.9, abs=0.1)


def test_frank_tamm_yield():
    # Textbook: 2 pi alpha (1/400 nm - 1/700 nm) = 491 photons per cm and unit sin^2(theta_C).
    wavelength = np.linspace(400, 700, 3001)
    index = optics.refractive_index(wavelength)
    sin_squared = 1 - 1 / index.mean() ** 2
    value = optics.frank_tamm_yield(1.0, 10.0, wavelength, np.ones_like(wavelength))
    assert value == pytest.approx(491 * sin_squared, rel=0.01)
    assert optics.frank_tamm_yield(0.6, 10.0, wavelength, np.ones_like(wavelength)) == 0
    np.testing.assert_allclose(
        optics.frank_tamm_yield(np.array([1.0, 0.9]), 20.0, wavelength, np.ones_like(wavelength)),
        2 * optics.frank_tamm_yield(np.array([1.0, 0.9]), 10.0, wavelength, np.ones_like(wavelength)),
    )


@pytest.mark.parametrize(("pdg", "momentum", "theta"), [(211, 6.0, 30.0), (-321, 1.2, 75.0), (321, 0.6, 60.0)])
def test_emitted_photons_follow_frank_tamm(pdg, momentum, theta):
    detector, stats = DircDetector(**QUIET), SimulationStats()
    simulate_tracks(600, pdg, momentum, theta, seed=5, detector=detector, stats=stats)
    expected = 600 * optics.expected_photon_yield(momentum, pdg, theta, detector)
    assert stats.redrawn == 0  # redrawn tracks would add to `emitted`
    assert stats.emitted == pytest.approx(expected, abs=4.5 * np.sqrt(expected))


def test_emission_angles_lie_on_the_cone():
    rng = np.random.default_rng(3)
    momentum, theta = np.array([2.0, 8.0]), np.radians([40.0, 120.0])
    detector = DircDetector(**QUIET)
    segments = simulate_dirc._track_segments(momentum, theta, np.array([321, 211]), rng, detector)
    segment, wavelength, index, cosine = simulate_dirc._emitted_photons(segments, rng, detector)
    point, direction, time = simulate_dirc._emission_geometry(segments, segment, cosine, rng)
    np.testing.assert_allclose(index, optics.refractive_index(wavelength))
    np.testing.assert_allclose(cosine, 1 / (segments["beta"][segment] * index))
    np.testing.assert_allclose((direction * segments["axis"][segment]).sum(axis=1), cosine, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(direction, axis=1), 1)
    assert np.abs(point[:, 1]).max() <= detector.bar_thickness / 2
    run = np.linalg.norm(point - segments["start"][segment], axis=1)
    np.testing.assert_allclose(time, run / (segments["beta"][segment] * 299.792458), atol=1e-12)


# Ray tracing against slow step-by-step references


def bounce_through_bar(point, direction, detector):
    """Moves from face to face until the readout end is reached."""
    point, direction = np.array(point, dtype=float), np.array(direction, dtype=float)
    low = np.array([-detector.bar_width / 2, -detector.bar_thickness / 2, detector.mirror_z])
    high = np.array([detector.bar_width / 2, detector.bar_thickness / 2, detector.readout_z])
    path, bounces = 0.0, [0, 0, 0]
    while True:
        target = np.where(direction > 0, high, low)
        steps = np.where(direction != 0, (target - point) / np.where(direction != 0, direction, 1), np.inf)
        axis = int(np.argmin(steps))
        point, path = point + direction * steps[axis], path + steps[axis]
        if axis == 2 and direction[2] > 0:
            return point, direction, path, bounces
        point[axis] = target[axis]
        direction[axis] *= -1
        bounces[axis] += 1


def test_trace_bar_equals_stepping():
    rng = np.random.default_rng(0)
    detector = DircDetector(bar_length=1500.0, readout_z=900.0)
    count = 60
    point = np.stack([rng.uniform(-17, 17, count), rng.uniform(-8, 8, count), rng.uniform(-550, 850, count)], axis=1)
    direction = rng.normal(size=(count, 3))
    direction[:, 2] += np.sign(direction[:, 2]) * 0.5
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    x, y, out, path, bounces_x, bounces_y = optics.trace_bar(*point.T, direction, detector)
    for i in range(count):
        end, heading, length, bounces = bounce_through_bar(point[i], direction[i], detector)
        np.testing.assert_allclose([x[i], y[i], path[i]], [end[0], end[1], length], atol=1e-6)
        np.testing.assert_allclose(out[i], heading, atol=1e-12)
        assert [bounces_x[i], bounces_y[i]] == bounces[:2]


def bounce_through_prism(x, y, slope_x, slope_y, detector):
    """Moves from plane to plane until the sensor plane is reached; also returns the largest |cos| to a normal."""
    opening = np.radians(detector.prism_opening_deg)
    # n . r <= offset inside
    planes = [
        (np.array([0, -1.0, 0]), 0.0),
        (np.array([0, np.cos(opening), -np.sin(opening)]), detector.prism_entry_height * np.cos(opening)),
        (np.array([-1.0, 0, 0]), 0.0),
        (np.array([1.0, 0, 0]), detector.prism_width),
        (np.array([0, 0, 1.0]), detector.prism_depth),
    ]
    point = np.array([detector.bar_x + x, y + detector.prism_entry_height / 2, 0.0])
    direction = np.array([slope_x, slope_y, 1.0])
    direction /= np.linalg.norm(direction)
    path, steepest = 0.0, 0.0
    while True:
        steps = []
        for normal, offset in planes:
            speed = normal @ direction
            steps.append((offset - normal @ point) / speed if speed > 1e-12 else np.inf)
        hit = int(np.argmin(steps))
        point, path = point + direction * steps[hit], path + steps[hit]
        if hit == 4:
            return point, path, steepest
        normal = planes[hit][0]
        steepest = max(steepest, abs(normal @ direction))
        direction = direction - 2 * (normal @ direction) * normal


def test_trace_prism_equals_stepping():
    rng = np.random.default_rng(1)
    detector, count = DircDetector(), 300
    x, y = rng.uniform(-17, 17, count), rng.uniform(-8, 8, count)
    slope_x, slope_y = rng.uniform(-2, 2, count), rng.uniform(-1.2, 1.2, count)
    index = np.full(count, 1.47)
    plane_x, plane_y, path, total = optics.trace_prism(x, y, slope_x, slope_y, index, detector)
    critical = np.sqrt(1 - (detector.outside_index / 1.47) ** 2)
    for i in range(count):
        point, length, steepest = bounce_through_prism(x[i], y[i], slope_x[i], slope_y[i], detector)
        np.testing.assert_allclose([plane_x[i], plane_y[i], path[i]], [point[0], point[1], length], atol=1e-6)
        assert total[i] == (steepest < critical)
    assert 0 < total.sum() < count
    slanted = ~np.isclose(path, detector.prism_depth * np.sqrt(1 + slope_x**2 + slope_y**2))
    assert 20 < slanted.sum() < count  # both kinds were compared


def test_lens_focuses_parallel_light_on_the_sensor_plane():
    detector = DircDetector(lens_distortion=0.0)
    x, y = np.linspace(-17, 17, 9), np.linspace(-8, 8, 9)
    direction = np.tile([0.1, -0.2, np.sqrt(1 - 0.05)], (9, 1))
    slope_x, slope_y, inside = optics.focus(x, y, direction, detector)
    assert np.ptp(x + slope_x * detector.prism_depth) < 1e-9
    assert np.ptp(y + slope_y * detector.prism_depth) < 1e-9
    assert inside[4] and not inside[-1]


# What the detector does to the light


def test_light_beyond_total_reflection_is_lost():
    """The lost share equals an integral over the cone, and all light is lost where the surroundings match silica."""
    detector, stats = DircDetector(**QUIET, wavelength_range=(399.0, 401.0)), SimulationStats()
    simulate_tracks(800, 211, 6.0, 75.0, seed=2, detector=detector, stats=stats)
    index = optics.refractive_index(400.0)
    angle = optics.cherenkov_angle(optics.velocity(6.0, optics.PARTICLE_MASSES[211]), index)
    azimuth, theta = np.linspace(0, 2 * np.pi, 100001), np.radians(75)
    along_x = np.sin(angle) * np.sin(azimuth)
    along_y = np.cos(angle) * np.sin(theta) + np.sin(angle) * np.cos(theta) * np.cos(azimuth)
    critical = np.sqrt(1 - (detector.outside_index / index) ** 2)
    lost = ((np.abs(along_x) >= critical) | (np.abs(along_y) >= critical)).mean()
    assert 0.3 < lost < 0.8
    # The prism adds a little to the loss in the bar.
    assert lost - 0.01 < stats.not_reflected / stats.emitted < lost + 0.06
    with pytest.raises(ValueError, match="no detected photon"):
        simulate_tracks(1, 211, 6.0, 75.0, detector=DircDetector(outside_index=1.6))


def test_propagation_time_is_path_times_group_index():
    detector = DircDetector(**QUIET, time_resolution=0.0, wavelength_range=(449.0, 451.0), surface_roughness=0.0)
    # At this angle one edge of the cone runs along the bar: the earliest photon takes the straight way.
    theta = np.degrees(optics.cherenkov_angle(1.0, optics.refractive_index(450.0)))
    columns = simulate_tracks(300, 211, 10.0, float(theta), seed=4, detector=detector)
    entry = detector.bar_radius / np.tan(np.radians(theta))
    straight = detector.readout_z - entry + detector.lens_thickness + detector.prism_depth
    earliest = straight * optics.group_index(450.0) / 299.792458
    assert all_hits(columns, "leadTime").min() == pytest.approx(earliest, rel=0.006)


def test_backward_tracks_are_read_out_after_the_mirror():
    detector = DircDetector(**QUIET)
    medians, first = [], []
    for theta in (35.0, 60.0, 120.0, 145.0):
        time = all_hits(simulate_tracks(150, 211, 6.0, theta, seed=1, detector=detector), "leadTime")
        medians.append(np.median(time))
        first.append(np.quantile(time, 0.02))
    assert medians[0] < medians[1] < min(medians[2:])
    # Forward: further from the readout with growing angle; backward: nearer to the mirror.
    assert first[0] < first[1] < first[3] < first[2]


def test_losses_lower_the_yield():
    def hits(**options):
        stats = SimulationStats()
        simulate_tracks(300, 211, 6.0, 130.0, seed=8, detector=DircDetector(**QUIET, **options), stats=stats)
        return stats

    nominal = hits()
    assert hits(mirror_reflectivity=0.5).absorbed > 1.5 * nominal.absorbed
    assert hits(surface_roughness=3.0).detected < 0.8 * nominal.detected
    assert hits(attenuation_length=20e3).detected < 0.9 * nominal.detected
    assert hits(collection_efficiency=0.5).detected < 0.65 * nominal.detected
    assert nominal.emitted == (
        nominal.not_reflected
        + nominal.absorbed
        + nominal.outside_lens
        + nominal.missed
        + nominal.outside_window
        + nominal.detected
    )


def test_yields_and_times_are_those_of_an_hpdirc(pions_30deg):
    columns, stats = pions_30deg
    assert 90 < columns["NHits"].mean() < 140
    assert 35 < simulate_tracks(300, 211, 6.0, 75.0, seed=1)["NHits"].mean() < 60
    stats = SimulationStats()
    sample = simulate_tracks(1500, species_codes(1500, "MixPiK"), seed=3, stats=stats)
    assert sample["NHits"].mean() == pytest.approx(69, abs=5)
    assert stats.outside_window < 5e-3 * stats.detected
    time = all_hits(sample, "leadTime")
    assert time.min() > 9 and time.max() < 157


def test_knock_on_electrons_widen_the_yield():
    with_electrons = simulate_tracks(600, 211, 6.0, 60.0, seed=3)["NHits"]
    without = simulate_tracks(600, 211, 6.0, 60.0, seed=3, detector=DircDetector(**QUIET))["NHits"]
    assert without.var() == pytest.approx(without.mean(), rel=0.2)  # Poisson
    assert with_electrons.var() > 1.3 * with_electrons.mean()
    assert 1.0 < with_electrons.mean() / without.mean() < 1.2


def test_hits_tell_kaons_from_pions():
    """Kernel log-likelihood difference at 3 GeV/c with few support photons; docs/simulate_dirc.md has 6 GeV/c."""
    from scipy.spatial import cKDTree

    def points(pdg, tracks, seed):
        columns = simulate_tracks(tracks, pdg, 3.0, 30.0, seed=seed)
        hits = np.stack([all_hits(columns, name) for name in ("x", "y", "leadTime")], axis=1)
        return hits / [3.3125, 3.3125, 0.1], columns["NHits"]

    support = {pdg: cKDTree(points(pdg, 200, seed)[0][:20000]) for pdg, seed in ((211, 1), (321, 2))}
    score = {}
    for pdg in (211, 321):
        hits, counts = points(pdg, 40, 30 + pdg)
        track = np.repeat(np.arange(len(counts)), counts)
        density = {
            species: np.bincount(track, [len(near) for near in tree.query_ball_point(hits, 1.5)])
            for species, tree in support.items()
        }
        score[pdg] = np.log(density[321]) - np.log(density[211])
    assert (score[321][:, None] > score[211]).mean() > 0.97


# Records, streams of random numbers


def test_columns_are_the_record(pions_30deg):
    columns, _ = pions_30deg
    assert list(columns) == list(DIRC_FEATURES)
    geometry = DircDetector().geometry
    lengths = {
        name: [len(row) for row in columns[name]] for name in ("pmtID", "pixelID", "channel", "leadTime", "x", "y")
    }
    assert all(values == columns["NHits"].tolist() for values in lengths.values())
    for name, feature in DIRC_FEATURES.items():
        array = columns[name] if name in ("P", "Theta", "Phi", "PDG", "NHits") else columns[name][0]
        assert str(array.dtype) == getattr(feature, "dtype", None) or str(array.dtype) == feature.feature.dtype
    pmt, pixel = all_hits(columns, "pmtID"), all_hits(columns, "pixelID")
    np.testing.assert_array_equal(all_hits(columns, "channel"), pmt.astype(int) * 256 + pixel)
    x, y = geometry.pixel_center(pmt, pixel)
    np.testing.assert_allclose(all_hits(columns, "x"), x, atol=1e-4)
    np.testing.assert_allclose(all_hits(columns, "y"), y, atol=1e-4)
    assert len(np.unique(pmt)) > 15


def assert_same(first, second):
    for name in first:
        assert len(first[name]) == len(second[name])
        for a, b in zip(first[name], second[name], strict=True):
            np.testing.assert_array_equal(a, b)


def test_seed_decides_and_chunks_do_not():
    long = simulate_tracks(1100, 211, seed=5)
    short = simulate_tracks(520, 211, seed=5)
    # Whole chunks agree; a shorter last chunk is another draw.
    head = {name: values[:500] for name, values in long.items()}
    assert_same({name: values[:500] for name, values in short.items()}, head)
    assert not np.array_equal(simulate_tracks(500, 211, seed=6)["P"], head["P"])
    streamed = list(simulate_dirc.iter_tracks(1100, 211, seed=5))
    assert [len(chunk["P"]) for chunk in streamed] == [500, 500, 100]
    assert_same(streamed[0], head)


def test_processes_do_not_change_the_tracks():
    one = list(simulate_dirc.iter_tracks(700, 321, 6.0, (30.0, 90.0), seed=5))
    stats = SimulationStats()
    two = list(simulate_dirc.iter_tracks(700, 321, 6.0, (30.0, 90.0), seed=5, stats=stats, processes=2))
    for a, b in zip(one, two, strict=True):
        assert_same(a, b)
    assert stats.tracks == 700 and stats.detected == sum(int(chunk["NHits"].sum()) for chunk in two)


def test_kinematics_and_species():
    codes = np.array([211, -211, 321, -321])
    columns = simulate_tracks(4, codes, [1.0, 2.0, 3.0, 4.0], np.array([30.0, 60.0, 90.0, 160.0]))
    assert columns["PDG"].tolist() == codes.tolist()
    assert columns["P"].tolist() == [1, 2, 3, 4]
    assert columns["Theta"].tolist() == [30, 60, 90, 160]
    sample = simulate_tracks(800, 211, (2.0, 3.0), (40.0, 50.0))
    assert sample["P"].min() >= 2 and sample["P"].max() <= 3 and sample["P"].std() == pytest.approx(0.29, abs=0.03)
    assert sample["Theta"].min() >= 40 and sample["Theta"].max() <= 50
    mixture = species_codes(101, "MixPiK", seed=1)
    assert sorted(mixture.tolist()) == [211] * 51 + [321] * 50
    assert len(set(mixture[:20].tolist())) == 2
    assert set(species_codes(5, "Kaon").tolist()) == {321}


def test_every_row_has_hits_near_the_threshold():
    stats = SimulationStats()
    columns = simulate_tracks(200, 321, 0.53, 75.0, seed=1, stats=stats)
    assert len(columns["P"]) == 200 and columns["NHits"].min() >= 1
    assert stats.redrawn > 0


# Command line


def test_command_line_writes_shards(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--n_tracks", "60", "--method", "MixPiK", "--momentum", "6"]
    arguments += ["--theta", "30-40", "--seed", "3", "--split", "test", "--rows_per_shard", "25"]
    assert simulate_dirc.main(arguments) == 0
    assert "60 tracks" in capsys.readouterr().out
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"test-0000{i}-of-00003.parquet" for i in range(3)]
    rows = load_dataset("parquet", data_files=str(tmp_path / "test-*.parquet"), streaming=True)["train"]
    rows = list(rows)
    assert len(rows) == 60 and sum(row["PDG"] == 321 for row in rows) == 30
    assert all(row["P"] == 6 and 30 <= row["Theta"] <= 40 and len(row["x"]) == row["NHits"] for row in rows)
    assert simulate_dirc.main(arguments) == 2  # never over an existing split


# Malformed input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tracks": 0}, "num_tracks must be an integer of at least 1, got 0"),
        ({"num_tracks": 2.5}, "num_tracks must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"pdg": 11}, "pdg of track 0 must be one of"),
        ({"pdg": [211, 321, 2212]}, "pdg of track 2 must be one of .*got 2212"),
        ({"pdg": [211, 321]}, "pdg must be one number or 3"),
        ({"pdg": "pion"}, "pdg must be numbers"),
        ({"momentum": -1.0}, "momentum must be in 0..1000 GeV/c, got -1"),
        ({"momentum": float("nan")}, "momentum must be in .* got nan"),
        ({"momentum": (5.0, 1.0)}, "low <= high"),
        ({"momentum": (1.0, 2.0, 3.0)}, r"must be \(low, high\)"),
        ({"momentum": [1.0, float("inf"), 2.0]}, "momentum of track 1 must be"),
        ({"theta": 10.0}, "theta must be in 25..160 deg, got 10"),
        ({"theta": (25.0, 170.0)}, "theta must be in 25..160 deg, got 170"),
        ({"theta": [[30.0]]}, "theta must be one number or 3"),
        ({"momentum": 0.2, "pdg": 321}, "track 0 gives no detected photon"),
    ],
)
def test_hostile_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        simulate_tracks(**{"num_tracks": 3, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bar_length", -1.0),
        ("mirror_reflectivity", 1.5),
        ("time_window", (157.0, 9.0)),
        ("focal_length", float("nan")),
        ("track_x", 30.0),
        ("wavelength_range", (300.0,)),
    ],
)
def test_hostile_detector(option, value):
    with pytest.raises(ValueError, match=option):
        DircDetector(**{option: value})


@pytest.mark.parametrize(
    "extra", [["--n_tracks", "0"], ["--seed", "-4"], ["--theta", "10"], ["--split", "../up"], ["--momentum", "0.1"]]
)
def test_hostile_command_line_leaves_nothing(tmp_path, capsys, extra):
    output = tmp_path / "out"
    assert simulate_dirc.main(["--output", str(output), "--n_tracks", "10", *extra]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert not output.exists() and not (tmp_path / "up").exists()


def test_hostile_input_of_the_script_itself(tmp_path):
    arguments = ["--output", str(tmp_path / "out"), "--n_tracks", "0"]
    done = subprocess.run([sys.executable, simulate_dirc.__file__, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: n_tracks must be at least 1, got 0"]


@pytest.mark.parametrize("text", ["", "a", "1-2-3", "-3", "1-"])
def test_hostile_range(text):
    with pytest.raises(SystemExit):
        simulate_dirc.build_parser().parse_args(["--output", "x", f"--theta={text}"])


def test_range_texts():
    assert simulate_dirc.parse_range("6") == 6.0
    assert simulate_dirc.parse_range("1-10") == (1.0, 10.0)
