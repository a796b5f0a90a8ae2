"""Track finding: adjusted Rand index, matching rules, reading of events, the metrics, the commands and the pictures."""

import json
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread
from sklearn.metrics import adjusted_rand_score, precision_recall_fscore_support

import hepzoo.evaluation
from hepzoo.evaluation import evaluate_tracking, plot_tracking, plots_tracking
from hepzoo.evaluation.metric_point_classification import PointClassification
from hepzoo.evaluation.metric_tracking_ari import TrackingARI
from hepzoo.evaluation.metric_tracking_efficiency import TrackingEfficiency
from hepzoo.evaluation.tracking import (
    TpcEvents,
    adjusted_rand_index,
    as_events,
    confusion_matrix,
    contingency,
    efficiency_by_pt,
    look_up_truth,
    match_tracks,
    point_classification,
    read_events,
    track_finding,
)

FOLDER = Path(hepzoo.evaluation.__file__).parent


def make_events(number: int, seed: int = 0) -> dict[str, list]:
    """Straight tracks of 5 to 40 points and noise (track 0); 15 % of the predictions are random."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list] = {name: [] for name in ("E", "x", "y", "z", "track_id", "pid", "noise")}
    rows |= {f"predicted_{name}": [] for name in ("track_id", "pid", "noise")}
    rows |= {"truth_track_id": [], "truth_pdg": [], "truth_pt": []}
    for _ in range(number):
        tracks = int(rng.integers(2, 8))
        ids = np.arange(1, tracks + 1) * 7
        lengths = rng.integers(2, 40, tracks)
        track = np.concatenate([np.repeat(ids, lengths), np.zeros(rng.integers(3, 20), int)])
        r, phi = rng.uniform(31, 75, len(track)), track * 0.7 + rng.normal(0, 0.02, len(track))
        found = np.where(rng.random(len(track)) < 0.15, rng.integers(-1, 5, len(track)), track + 100)
        classes = track % 5
        columns = {
            "E": rng.exponential(250, len(track)),
            "x": r * np.cos(phi),
            "y": r * np.sin(phi),
            "z": r * np.sin(track),
            "track_id": track,
            "pid": classes,
            "noise": (track == 0).astype(int),
            "predicted_track_id": found,
            "predicted_pid": np.where(rng.random(len(track)) < 0.2, 1, classes),
            "predicted_noise": (rng.random(len(track)) < np.where(track == 0, 0.9, 0.1)).astype(int),
            "truth_track_id": ids[::-1],
            "truth_pdg": np.full(tracks, 211),
            "truth_pt": 0.1 * ids[::-1],
        }
        for name, values in columns.items():
            rows[name].append(values.tolist())
    return rows


def write(path: Path, rows: dict[str, list]) -> str:
    pq.write_table(pa.table(rows), path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tpc")
    write(folder / "a.parquet", make_events(30, seed=1))
    write(folder / "b.parquet", make_events(20, seed=2))
    return folder


# ---- adjusted Rand index


def test_rand_index_is_that_of_sklearn():
    rng = np.random.default_rng(0)
    cases = [(rng.integers(0, k, n), rng.integers(-1, m, n)) for k, m, n in ((5, 7, 200), (1, 4, 30), (9, 2, 500))]
    true = rng.integers(0, 6, 400)
    cases += [(true, true * 3 - 1), (true, np.where(rng.random(400) < 0.1, -1, true)), (true[:1], true[:1])]
    cases += [(np.arange(20), np.arange(20)[::-1]), (np.zeros(9, int), np.zeros(9, int)), (np.arange(9), np.zeros(9))]
    event = np.repeat(np.arange(len(cases)), [len(t) for t, _ in cases])
    true, found = (np.concatenate([c[i] for c in cases]).astype(np.int64) for i in (0, 1))
    shuffled = rng.permutation(len(event))
    per_event, pooled = adjusted_rand_index(
        contingency(event[shuffled], true[shuffled], found[shuffled], len(cases) + 1)
    )
    assert per_event[:-1] == pytest.approx([adjusted_rand_score(t, f) for t, f in cases], abs=1e-12)
    assert np.isnan(per_event[-1])
    unique = [event * 1000 + part for part in (true, found)]
    assert pooled == pytest.approx(adjusted_rand_score(*unique), abs=1e-12)
    assert pooled < np.nanmean(per_event)


def test_rand_index_of_large_samples_and_ids():
    """Products of pair counts are beyond 64-bit integers; ids may be hashes."""
    rng = np.random.default_rng(1)
    true = rng.integers(0, 3000, 400_000)
    found = np.where(rng.random(len(true)) < 0.3, rng.integers(0, 3000, len(true)), true)
    hashed = true * 2_862_933_555_777_941_757
    _, pooled = adjusted_rand_index(contingency(np.zeros(len(true), int), hashed, found, 1))
    assert pooled == pytest.approx(adjusted_rand_score(true, found), rel=1e-9)


# ---- matching


def matched(true: list[int], found: list[int], **options):
    return match_tracks(contingency(np.zeros(len(true), int), np.array(true), np.array(found), 1), **options)


def test_matching_rules_at_their_edges():
    # 8 points: 5 shared pass, 4 are not more than half
    assert matched([1] * 8, [5] * 5 + [6] * 3).true_found.tolist() == [True]
    assert matched([1] * 8, [5] * 4 + [6] * 4).true_found.tolist() == [False]
    # 3 shared points are too few, though all
    few = matched([1] * 3, [5] * 3)
    assert (few.true_found.tolist(), few.found_id.tolist()) == ([False], [])
    assert matched([1] * 2, [5] * 2).true_id.tolist() == []
    # half of the found track is not more than half
    half = matched([1] * 5 + [2] * 5, [5] * 10)
    assert (half.true_found.tolist(), half.found_passes.tolist()) == ([False, False], [False])
    assert (half.found_purity.tolist(), half.found_true_id.tolist()) == ([0.5], [1])
    # a track split in two: one half passes
    split = matched([1] * 10, [5] * 6 + [6] * 4)
    assert (split.true_found.tolist(), split.found_passes.tolist()) == ([True], [True, False])
    assert split.found_purity.tolist() == [1.0, 1.0]


def test_majority_noise_and_unassigned_points():
    true = [0] * 9 + [1] * 6 + [2] * 6
    found = [3] * 7 + [4] * 2 + [4] * 6 + [-1] * 6
    matches = matched(true, found)
    assert matches.true_id.tolist() == [1, 2] and matches.true_found.tolist() == [True, False]
    assert matches.found_id.tolist() == [3, 4] and matches.found_is_noise.tolist() == [True, False]
    assert matches.found_passes.tolist() == [False, True] and matches.found_true_id.tolist() == [0, 1]
    assert matches.found_purity == pytest.approx([1.0, 6 / 8])
    # without a noise id it is a track as any other
    everything = matched(true, found, noise_id=None)
    assert everything.true_id.tolist() == [0, 1, 2] and everything.true_found.tolist() == [True, True, False]
    # as published: unassigned points are a track, and found track 4 stands for the smaller id, with too few points
    published = matched(true, found, noise_id=None, published=True)
    assert published.true_found.tolist() == [True, True, True]
    assert published.found_id.tolist() == [-1, 3] and published.found_true_id.tolist() == [2, 0]


def test_matching_against_a_plain_loop():
    events = as_events(make_events(25, seed=3))
    report = track_finding(events)
    true_tracks = found_true = found_tracks = passing = 0
    purities = []
    for number in range(len(events)):
        one = events.select(np.array([number]))
        true, found = one["track_id"], one["predicted_track_id"]
        passed = set()
        for a in np.unique(found[found != -1]):
            values, counts = np.unique(true[found == a], return_counts=True)
            best = counts.argmax()
            if counts[best] < 4:
                continue
            purities.append(counts[best] / counts.sum())
            found_tracks += 1
            if values[best] and counts[best] > (true == values[best]).sum() / 2 and purities[-1] > 0.5:
                passing += 1
                passed.add(values[best])
        large = [t for t in np.unique(true[true != 0]) if (true == t).sum() >= 3]
        true_tracks += len(large)
        found_true += len(passed)
    assert (report["true_tracks"], report["found_tracks"]) == (true_tracks, found_tracks)
    assert report["efficiency"] == pytest.approx(found_true / true_tracks)
    assert report["fake_rate"] == pytest.approx(1 - passing / found_tracks)
    assert report["purity"] == pytest.approx(np.mean(purities))
    assert report["noise_tracks"] > 0 and report["fake_rate_without_noise"] < report["fake_rate"]


def test_bins_of_pt():
    events = as_events(make_events(40, seed=4))
    report = track_finding(events, edges=[0.0, 1.0, 2.0, np.inf])
    rows = report["by_pt"]
    assert sum(row["true_tracks"] for row in rows) == report["true_tracks"]
    assert sum(row["found_tracks"] for row in rows) == report["found_tracks"] - report["noise_tracks"]
    share = np.array([row["efficiency"] for row in rows])
    count = np.array([row["true_tracks"] for row in rows])
    assert (share * count).sum() / count.sum() == pytest.approx(report["efficiency"])
    assert [row["efficiency_error"] for row in rows] == pytest.approx(np.sqrt(share * (1 - share) / count))
    # without the bin that has no upper edge
    assert report["mean_efficiency"] == pytest.approx(share[:-1].mean())
    matches = match_tracks(contingency(events.event, events["track_id"], events["predicted_track_id"], len(events)))
    pt = look_up_truth(events, matches.true_event, matches.true_id, "truth_pt")
    assert pt == pytest.approx(0.1 * matches.true_id)
    assert np.isnan(look_up_truth(events, np.array([0]), np.array([5]), "truth_pt")).all()
    empty = efficiency_by_pt(matches, pt, np.full(len(matches.found_id), np.nan), edges=[50, 60])
    assert empty[0]["true_tracks"] == 0 and np.isnan(empty[0]["efficiency"])


def test_perfect_predictions():
    rows = make_events(10, seed=5)
    rows["predicted_track_id"] = rows["track_id"]
    report = track_finding(as_events(rows))
    assert report["ari"] == report["ari_pooled"] == report["ari_tracks"] == 1
    assert report["purity"] == 1 and report["fake_rate_without_noise"] == 0
    # tracks of 3 points cannot share 4
    assert 0.9 < report["efficiency"] <= 1


# ---- classification


def test_point_classification_is_that_of_sklearn():
    rng = np.random.default_rng(0)
    true, found = rng.integers(0, 4, 500), rng.choice([0, 1, 3], 500)
    report = point_classification(confusion_matrix(true, found, 5))
    precision, recall, _, support = precision_recall_fscore_support(true, found, labels=range(5), zero_division=0)
    assert [row["precision"] for row in report["classes"]] == pytest.approx(precision)
    assert [row["recall"] for row in report["classes"]] == pytest.approx(recall)
    assert [row["points"] for row in report["classes"]] == support.tolist()
    macro = precision_recall_fscore_support(true, found, average="macro", zero_division=0)
    assert (report["macro_precision"], report["macro_recall"]) == pytest.approx(macro[:2])
    assert report["accuracy"] == pytest.approx((true == found).mean())


@pytest.mark.parametrize("by", ["class", "file"])
def test_metrics_of_evaluate(by, tmp_path):
    def metric(kind, name):
        if by == "class":
            return kind()
        return evaluate.load(str(FOLDER / f"metric_{name}.py"), cache_dir=str(tmp_path), experiment_id=name)

    rows = make_events(6, seed=6)
    events = as_events(rows)
    report = track_finding(events)
    padded = [[*row, -100, -100] for row in rows["track_id"]]
    found = [[*row, 3, 4] for row in rows["predicted_track_id"]]
    rand = metric(TrackingARI, "tracking_ari").compute(predictions=found, references=padded)
    assert rand == pytest.approx({"ari": report["ari"], "ari_pooled": report["ari_pooled"], "events": 6})
    tracks = metric(TrackingEfficiency, "tracking_efficiency").compute(predictions=found, references=padded)
    assert tracks == pytest.approx({name: report[name] for name in tracks})
    names = ["other", "pion", "kaon", "proton", "electron"]
    points = metric(PointClassification, "point_classification").compute(
        predictions=[*events["predicted_pid"], 4], references=[*events["pid"], -100], names=names
    )
    wanted = point_classification(confusion_matrix(events["pid"], events["predicted_pid"], 5))
    assert points["accuracy"] == wanted["accuracy"] and points["recall_pion"] == wanted["classes"][1]["recall"]


# ---- reading


def test_reading_selects_and_concatenates(files):
    events = read_events([files / "a.parquet", files / "b.parquet"])
    assert len(events) == 50 and len(read_events(files, max_events=35)) == 35
    rows = make_events(20, seed=2)
    part = events.select(np.arange(50) == 33)
    assert part["track_id"].tolist() == rows["track_id"][3]
    assert part.truth["truth_pt"] == pytest.approx(rows["truth_pt"][3])
    records = [{name: values[i] for name, values in rows.items()} for i in range(20)]
    for same in (as_events(records), as_events(rows), as_events(pa.table(rows))):
        assert same["track_id"].tolist() == events.select(np.arange(30, 50))["track_id"].tolist()
    flags = {**rows, "noise": [[bool(v) for v in row] for row in rows["noise"]]}
    for same in (as_events(flags), as_events(pa.table(flags))):
        assert same["noise"].tolist() == as_events(rows)["noise"].tolist()
    without = as_events({name: rows[name] for name in ("x", "track_id")})
    both = TpcEvents.concatenate([events, without])
    assert list(both.points) == ["x", "track_id"] and not both.truth and len(both) == 70


def test_hostile_events(files, tmp_path, capsys):
    good = make_events(4, seed=7)

    def broken(**changes):
        rows = {name: [list(row) for row in values] for name, values in good.items()}
        for name, change in changes.items():
            change(rows[name])
        return rows

    cases = [
        (broken(track_id=lambda c: c[2].pop()), "row 2: track_id has"),
        (broken(x=lambda c: c[1].__setitem__(3, float("nan"))), r"row 1: x\[3\] is nan, expected a finite number"),
        (broken(pid=lambda c: c[0].__setitem__(1, 7)), r"row 0: pid\[1\] is 7, expected a class of 0..4"),
        (broken(predicted_noise=lambda c: c[3].__setitem__(0, -1)), r"row 3: predicted_noise\[0\] is -1"),
        (broken(truth_pt=lambda c: c[1].__setitem__(0, -0.1)), r"row 1: truth_pt\[0\] is -0.1, expected at least 0"),
        (broken(truth_track_id=lambda c: c[1].__setitem__(0, c[1][1])), r"row 1: truth_track_id\[1\].*once"),
        ({**good, "track_id": [[0.5] * len(row) for row in good["x"]]}, r"row 0: track_id\[0\] is 0.5, expected"),
        ({**good, "pid": good["pid"][:3]}, "column 'pid' has 3 rows, column 'E' has 4"),
        ({"x": [[1.0], []]}, "row 1: the event has no points"),
        ({"energy": [[1.0]]}, "no points: a TPC event needs"),
        ({**good, "noise": ["a", "b", "c", "d"]}, "row 0: noise must be a list"),
        ([], "no events: the list of rows is empty"),
        ([{"x": [1.0], "y": [1.0]}, {"x": [1.0]}], "row 1: column 'y' is missing"),
    ]
    for rows, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            as_events(rows)
        assert "\n" not in str(error.value)

    (tmp_path / "text.parquet").write_text("no parquet")
    blind = write(tmp_path / "blind.parquet", {name: good[name] for name in ("E", "x", "y", "z", "track_id")})
    no_truth = write(tmp_path / "no_truth.parquet", {name: good[name] for name in ("x", "predicted_track_id")})
    wrong = write(tmp_path / "wrong.parquet", broken(pid=lambda c: c[2].__setitem__(0, 9)))
    for arguments, message in (
        ([str(tmp_path / "none.parquet")], "no Parquet file found"),
        ([str(tmp_path / "text.parquet")], "not a readable Parquet file"),
        ([blind], "no predictions: expected predicted_track_id"),
        ([no_truth], "column 'track_id' is missing"),
        ([wrong], "row 2: pid[0] is 9"),
    ):
        assert evaluate_tracking.main(["--input", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        evaluate_tracking.main(["--input", blind, "--pt_bins", "3,1"])
    capsys.readouterr()
    for arguments in (["--input", str(files), "--events", "99"], ["--input", blind, "--kind", "efficiency"]):
        assert plot_tracking.main([*arguments, "--output", str(tmp_path / "plots")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "plots").exists()


def test_hostile_metric_input():
    with pytest.raises(ValueError, match="event 1: 1 predictions for 2 references"):
        TrackingARI().compute(predictions=[[1], [1]], references=[[1], [1, 2]])
    with pytest.raises(ValueError, match="no points"):
        TrackingEfficiency().compute(predictions=[[1]], references=[[-100]])
    with pytest.raises(ValueError, match="prediction 1 is 5, expected a class of 0..4"):
        PointClassification().compute(predictions=[0, 5], references=[0, 1], num_classes=5)
    with pytest.raises(ValueError, match="3 names for 2 classes"):
        point_classification(np.eye(2), ["a", "b", "c"])


# ---- commands and pictures


@pytest.mark.parametrize("script", ["evaluate_tracking", "plot_tracking"])
def test_runs_as_a_file_and_shows_examples(script):
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "examples:" in done.stdout


def test_command_prints_and_writes_the_tables(files, tmp_path, capsys):
    outputs = [str(tmp_path / f"report.{ending}") for ending in ("json", "md", "csv")]
    assert evaluate_tracking.main(["--input", str(files), "--output", *outputs]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["events"] == 50 and report["noise"]["accuracy"] == pytest.approx(0.9, abs=0.03)
    assert f"ARI: {report['tracks']['ari']:.4f}" in out and "3 and more" in out and "kaon" in out
    assert np.sum(report["pid"]["confusion"]) == report["points"]
    text = (tmp_path / "report.md").read_text()
    assert "| class | points |" in text and "| pT [GeV/c] |" in text
    assert len((tmp_path / "report.csv").read_text().splitlines()) == 17
    # only what was predicted
    rows = make_events(5, seed=8)
    only = write(tmp_path / "only.parquet", {name: rows[name] for name in ("noise", "predicted_noise")})
    assert evaluate_tracking.main(["--input", only]) == 0
    out = capsys.readouterr().out
    assert "Noise: accuracy" in out and "ARI" not in out


def test_pictures(files, tmp_path, capsys):
    a, b = str(files / "a.parquet"), str(files / "b.parquet")
    arguments = ["--input", a, b, "--labels", "one", "two", "--output", str(tmp_path)]
    assert plot_tracking.main(arguments) == 0
    names = {"event_0_one", "event_0_two", "efficiency", "spectrum_one", "spectrum_two"}
    assert {Path(line).stem for line in capsys.readouterr().out.split()} == names
    for name in names:
        picture = imread(tmp_path / f"{name}.png")
        assert picture.shape[0] > 300 and picture[..., :3].std() > 0.02
    assert {path.stem for path in tmp_path.iterdir()} == names  # no partial files
    # without predictions only the true tracks; the caller's figure is returned
    rows = make_events(1, seed=9)
    figure = plots_tracking.plot_event(as_events({name: rows[name] for name in ("x", "y", "z", "track_id")}))
    assert len(figure.axes) == 3
    with pytest.raises(ValueError, match="event 1, expected one of 0..0"):
        plots_tracking.plot_event(as_events(rows), 1)
