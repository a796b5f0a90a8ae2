"""Rows in every accepted form become the same flat tracks; broken rows are named."""

import numpy as np
import pytest

from hepzoo.evaluation.tracks_dirc import DircTracks, as_tracks, expand_paths, read_tracks

FIELDS = ("momentum", "theta", "phi", "pdg", "offsets", "pmt", "pixel", "x", "y", "time")


def records(columns: dict) -> list[dict]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def assert_same(a: DircTracks, b: DircTracks):
    for name in FIELDS:
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-6, err_msg=name)


def test_every_form_gives_the_same_tracks(columns, tmp_path):
    import datasets
    import pyarrow as pa

    made = columns(12, 0)
    wanted = as_tracks(made)
    lists = {k: [np.asarray(v).tolist() for v in values] for k, values in made.items()}
    assert_same(as_tracks(records(made)), wanted)
    assert_same(as_tracks(lists), wanted)
    assert_same(as_tracks(pa.table(lists)), wanted)
    assert_same(as_tracks(pa.table(lists).slice(3, 5)), wanted.select(np.arange(3, 8)))
    assert_same(as_tracks(datasets.Dataset.from_dict(lists)), wanted)
    assert_same(as_tracks(records(made)[4]), wanted.select(np.array([4])))
    renamed = {("PID" if k == "PDG" else k): v for k, v in made.items()}
    assert_same(as_tracks(renamed), wanted)
    without = {k: v for k, v in made.items() if k not in ("x", "y", "Phi", "NHits")}
    assert_same(as_tracks(without), wanted)
    assert as_tracks(wanted) is wanted


def test_selections(columns):
    tracks = as_tracks(columns(20, 1))
    assert len(tracks.species("kaon")) + len(tracks.species("pion")) == 20
    picked = tracks.select(np.array([5, 2]))
    assert picked.momentum.tolist() == tracks.momentum[[5, 2]].tolist()
    np.testing.assert_array_equal(picked.time[: picked.offsets[1]], tracks.time[tracks.offsets[5] : tracks.offsets[6]])
    assert picked.hits.shape == (picked.offsets[-1], 3)
    assert len(tracks.at(theta=float(tracks.theta[3]))) == 1
    both = DircTracks.concatenate([tracks, picked])
    assert_same(both.select(np.arange(20, 22)), picked)
    assert len(tracks.select(np.zeros(20, bool))) == 0


def test_reads_files_folders_and_patterns(fixed_point_files):
    kaons = read_tracks(fixed_point_files / "kaons.parquet")
    assert len(kaons) == 220 and set(kaons.pdg) == {321}
    every = read_tracks(fixed_point_files)
    assert len(every) == 440 and len(every.species("pion")) == 220  # the pions' key is PID
    assert_same(read_tracks([str(fixed_point_files / "*.parquet")]), every)
    assert len(read_tracks(fixed_point_files, max_tracks=7)) == 14
    assert len(expand_paths([fixed_point_files, fixed_point_files / "kaons.parquet"])) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leadTime": None}, "column 'leadTime' is missing"),
        ({"P": [1.0]}, "'Theta' has 4 rows, column 'P' has 1"),
        ({"P": [1.0, 2.0, np.nan, 3.0]}, "row 2: P is nan"),
        ({"P": ["a", "b", "c", "d"]}, "column 'P': expected one number per row"),
        ({"NHits": [1, 2, 3, 4]}, "row 0: NHits is 1, the lists hold"),
        (("leadTime", 2, 0, np.inf), "row 2: leadTime is inf, expected a finite number of ns"),
        (("pmtID", 1, 3, 24), r"row 1: pmtID is 24(.0)?, expected an integer in 0..23"),
        (("pixelID", 3, 0, -1), r"row 3: pixelID is -1(.0)?, expected an integer in 0..255"),
        (("pmtID", 0, 0, 1.5), "row 0: pmtID is 1.5"),
        (("leadTime", 1, None, None), "row 1: leadTime has .* hits, pmtID has .*: expected equal lengths"),
    ],
)
def test_hostile_rows(columns, change, message):
    made = {k: [np.asarray(v, dtype=float).tolist() for v in values] for k, values in columns(4, 2).items()}
    if isinstance(change, dict):
        made |= change
        made = {k: v for k, v in made.items() if v is not None}
    else:
        name, row, hit, value = change
        made[name][row] = (
            made[name][row][:-1] if hit is None else [*made[name][row][:hit], value, *made[name][row][hit + 1 :]]
        )
    with pytest.raises(ValueError, match=message) as error:
        as_tracks(made)
    assert "\n" not in str(error.value)


def test_hostile_empty_rows():
    for rows in ([], {"P": [], "Theta": [], "pmtID": [], "pixelID": [], "leadTime": []}):
        with pytest.raises(ValueError, match="no tracks"):
            as_tracks(rows)


def test_hostile_records_of_different_shape(columns):
    rows = records(columns(3, 3))
    del rows[1]["Theta"]
    with pytest.raises(ValueError, match="row 1: column 'Theta' is missing"):
        as_tracks(rows)


def test_hostile_files(tmp_path):
    with pytest.raises(ValueError, match="no Parquet file found"):
        read_tracks(tmp_path / "nothing")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="broken.parquet: not a readable Parquet file"):
        read_tracks(tmp_path)
