"""`hepzoo evaluate dirc` and `hepzoo plot dirc` on small files."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hepzoo.evaluation
from hepzoo.evaluation import evaluate_dirc, plot_dirc
from hepzoo.evaluation.dll_dirc import fixed_point_dll, split_test_support
from hepzoo.evaluation.tracks_dirc import read_tracks

ROOM = Path(hepzoo.evaluation.__file__).parent


@pytest.mark.parametrize("script", ["evaluate_dirc", "plot_dirc"])
def test_runs_as_a_file_and_shows_examples(script):
    done = subprocess.run(
        [sys.executable, str(ROOM / f"{script}.py"), "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "examples:" in done.stdout


def test_distances(fixed_point_files, tmp_path, capsys):
    folder = str(fixed_point_files)
    code = evaluate_dirc.main(["--real", folder, "--generated", folder, "--output", str(tmp_path / "report.json")])
    out = capsys.readouterr().out
    assert code == 0 and "value/floor" in out and "kaons, generated: 220 tracks" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(
        r["value"] == pytest.approx(0, abs=1e-9)
        for r in report["species"]["pion"]["distances"]
        if "chi2" not in r["distance"]
    )


def test_dll_and_its_scores_as_logits(fixed_point_files, tmp_path, capsys):
    scores = tmp_path / "scores.csv"
    code = evaluate_dirc.main(
        ["--dll", "--real", str(fixed_point_files), "--test-tracks", "60", "--scores-output", str(scores),
         "--output", str(tmp_path / "dll.json")]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0 and "DLL of 120 real tracks; support: real photons" in out
    report = json.loads((tmp_path / "dll.json").read_text())
    (row,) = report["separation"]
    assert row["kaons"] == row["pions"] == 60 and row["auc"] > 0.7
    with open(scores, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 120 and set(rows[0]) == {"P", "Theta", "PDG", "dll"}
    assert evaluate_dirc.main(["--logits", str(scores), "--output", str(tmp_path / "logits.csv")]) == 0
    out = capsys.readouterr().out
    assert f"AUC {row['auc']:.4f}" in out and "pion rejection at 90 % kaon efficiency" in out
    assert len((tmp_path / "logits.csv").read_text().splitlines()) == 2


def test_dll_with_generated_support(fixed_point_files, capsys):
    folder = str(fixed_point_files)
    assert evaluate_dirc.main(["--dll", "--real", folder, "--generated", folder, "--test-tracks", "55"]) == 0
    assert "DLL of 110 real tracks; support: generated photons" in capsys.readouterr().out


def test_dll_is_exact_and_accounts_for_every_track(fixed_point_files):
    test, support = split_test_support(read_tracks(fixed_point_files), 20)
    assert len(test) == 40 and len(support) == 400
    fast = fixed_point_dll(test, support)
    exact = fixed_point_dll(test, support, cut=None)
    np.testing.assert_allclose(fast.scores, exact.scores, rtol=0, atol=1e-4)
    limited = fixed_point_dll(test, support, hits_range=(5, 40), support_photons=1000)
    assert len(limited.scores) + sum(limited.left_out.values()) == 40 and sum(limited.left_out.values()) > 0
    assert limited.points[0]["support_kaon"] == 1000
    with pytest.raises(ValueError, match="cannot be split into 500 test tracks"):
        split_test_support(support, 500)
    with pytest.raises(ValueError, match="no kaon support photon within"):
        fixed_point_dll(test, support.species("pion"))


def test_plots(fixed_point_files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = str(fixed_point_files)
    code = plot_dirc.main(
        ["--real", folder, "--generated", folder, "--output", str(tmp_path), "--momentum", "6", "--theta", "25-35",
         "--kind", "hits", "time", "yield", "ratio", "--photons", "3000"]
    )  # fmt: skip
    listed = capsys.readouterr().out.split()
    assert code == 0 and len(listed) == 12
    assert sorted(listed) == sorted(str(p) for p in tmp_path.iterdir())
    code = plot_dirc.main(
        ["--real", folder, "--output", str(tmp_path / "pdf"), "--momentum", "6", "--kind", "pdf", "dll",
         "--photons", "5000", "--test-tracks", "60", "--format", "pdf"]
    )  # fmt: skip
    captured = capsys.readouterr()
    names = {Path(p).name for p in captured.out.split()}
    assert code == 0
    assert names == {"pdf_hits_real_P6_theta30.pdf", "pdf_time_real_P6_theta30.pdf", "dll_real_P6_theta30.pdf",
                     "separation_vs_momentum.pdf"}  # fmt: skip
    assert captured.err.count("no tracks (wanted 5000)") == 26  # the other angles of 25, 30, .. 155


def test_first_photons_are_exact(fixed_point_files):
    tracks = read_tracks(fixed_point_files / "kaons.parquet")
    for number in (1, 500, int(tracks.offsets[7])):
        part = plot_dirc.first_photons(tracks, number)
        assert part.offsets[-1] == number == len(part.time)
        np.testing.assert_array_equal(part.time, tracks.time[:number])
    assert plot_dirc.first_photons(tracks, 10**9) is tracks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--real", "nothing*", "--generated", "nothing"], "no Parquet file found at 'nothing*'"),
        (["--logits", "{folder}/bad.csv"], "column 'PDG' or 'PID' is missing"),
        (["--logits", "{folder}/nan.csv"], "row 1: logit is not a number"),
        (["--dll", "--real", "{folder}/kaons.parquet", "--test-tracks", "9999"], "cannot be split"),
    ],
)
def test_hostile_evaluate_input(arguments, message, fixed_point_files, tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("P,Theta,logit\n6,30,1\n")
    (tmp_path / "nan.csv").write_text("P,Theta,PDG,logit\n6,30,211,1\n6,30,321,nan\n")
    (tmp_path / "kaons.parquet").write_bytes((fixed_point_files / "kaons.parquet").read_bytes())
    assert evaluate_dirc.main([a.format(folder=tmp_path) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--real", "a"],
        ["--real", "a", "--generated", "b", "--output", "report.txt"],
        ["--dll", "--real", "a", "--support", "generated"],
        ["--logits", "a", "--theta-bins", "3,2"],
        ["--real", "a", "--generated", "b", "--splits", "0"],
    ],
)
def test_hostile_evaluate_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate_dirc.main(arguments)
    assert error.value.code == 2


def test_hostile_plot_input(fixed_point_files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, out = str(fixed_point_files), ["--output", str(tmp_path / "plots")]
    for arguments, message in (
        (["--real", folder, "--momentum", "3"], "no real track is left"),
        (["--real", folder, "--kind", "ratio"], "no species is in both"),
        (["--generated", folder, "--kind", "dll"], "needs --real"),
        (["--real", folder, "--kind", "pdf"], "needs one momentum"),
    ):
        assert plot_dirc.main(arguments + out) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()
    real = ["--real", folder]
    for arguments in ([], [*real, "--theta", "30-20"], [*real, "--photons", "0"], [*real, "--theta-window", "-1"]):
        with pytest.raises(SystemExit):
            plot_dirc.main(arguments + out)


@pytest.mark.parametrize("script", ["evaluate_dirc", "plot_dirc"])
def test_hostile_input_of_the_scripts_themselves(script, tmp_path):
    arguments = ["--real", str(tmp_path / "no"), "--generated", str(tmp_path / "no")]
    if script == "plot_dirc":
        arguments += ["--output", str(tmp_path / "plots")]
    done = subprocess.run(
        [sys.executable, str(ROOM / f"{script}.py"), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "no Parquet file found" in done.stderr and len(done.stderr.splitlines()) == 1
