"""Shower plots: every figure is written, shows what it should, and `hepzoo plot showers` runs."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from hepzoo.evaluation import figures, plot_showers, plots_showers
from hepzoo.evaluation.showers import OBSERVABLES, PROFILES, observe, read_showers
from tests.evaluation.test_showers import EMPTY, RECORD, toy_showers, write_showers


@pytest.fixture(scope="module")
def samples():
    return observe(toy_showers(120, 1)), observe([*toy_showers(80, 2, 0.021), EMPTY])


def drawn(axis, label: str) -> np.ndarray:
    """Heights of the stairs with a legend entry."""
    (patch,) = [p for p in axis.patches if p.get_label() == label]
    return np.asarray(patch.get_data().values)


def test_histogram_and_ratio_show_the_samples(samples):
    real, generated = samples
    top, bottom = plots_showers.plot_observable(real, generated, "cog_z").axes
    edges = next(p for p in top.patches if p.get_label() == "real").get_data().edges
    for sample, label in ((real, "real"), (generated, "generated")):
        values = sample.scalars["cog_z"][np.isfinite(sample.scalars["cog_z"])]
        wanted = np.histogram(values, edges)[0] / len(values) / np.diff(edges)
        np.testing.assert_allclose(drawn(top, label), wanted)
    assert "centre of gravity" in bottom.get_xlabel() and bottom.get_ylabel() == "gen. / real"
    low, high = bottom.get_ylim()
    assert low + high == pytest.approx(2)


def test_profiles_are_means_over_showers(samples):
    real, generated = samples
    top = plots_showers.plot_observable(real, generated, "energy_per_layer").axes[0]
    np.testing.assert_allclose(drawn(top, "real"), real.profiles["energy_per_layer"].mean(axis=0))
    np.testing.assert_allclose(drawn(top, "generated"), generated.profiles["energy_per_layer"].sum(axis=0) / 81)


def test_cell_energy_has_a_mip_axis_and_greys_what_is_below_the_cut(samples):
    figure = plots_showers.plot_observable(*samples, "cell_energy")
    top = figure.axes[0]
    assert any("MIP" in child.get_xlabel() for child in top.child_axes)
    assert any(text.get_text() == "below cut" for text in top.texts)
    assert drawn(top, "real").sum() > samples[0].profiles["cell_energy"].mean(axis=0).sum()


@pytest.mark.parametrize("name", [*OBSERVABLES, *PROFILES])
def test_every_observable_can_be_drawn(name, samples):
    assert len(plots_showers.plot_observable(*samples, name).axes) == 2


def test_correlations_and_response(samples):
    figure = plots_showers.plot_correlations(*samples)
    assert [a.get_title() for a in figure.axes[:3]] == ["real", "generated", "generated $-$ real"]
    shown = np.array([text.get_text() for text in figure.axes[0].texts])
    assert len(shown) == 12 * 13 // 2 and shown[0] == "100"
    response = plots_showers.plot_response(*samples, edges=[10, 55, 100])
    assert len(response.axes) == 4


def test_ratio_far_outside_and_empty_bins():
    _, axes = figures.subplots(1, 1, figsize=(3, 3))
    values = [np.array([1.0, 1.0, 0.0, 1.0]), np.array([1.01, 9.0, 1.0, 0.0])]
    figures.draw_ratio(axes[0, 0], np.arange(5.0), values, [0.05 * v for v in values])
    low, high = axes[0, 0].get_ylim()
    markers = {line.get_marker(): line.get_ydata() for line in axes[0, 0].lines if len(line.get_xdata())}
    assert low < 1.01 < high < 9 and "^" in markers and all(low < y < high for y in markers["^"])


def test_event_display_of_one_and_of_many():
    one = plots_showers.plot_event_display(RECORD, RECORD)
    assert "real: 10.0 GeV, 3 hits" in one.axes[0].get_title(loc="left")
    mesh = one.axes[0].collections[0]
    assert np.nansum(np.ma.filled(mesh.get_array().astype(float), np.nan)) == pytest.approx(4.0)
    many = plots_showers.plot_event_display(toy_showers(5, 1), toy_showers(4, 2))
    assert "4 showers" in many.axes[3].get_title(loc="left")


def test_hostile_plots(samples, tmp_path):
    real, generated = samples
    with pytest.raises(ValueError, match="unknown observable 'mass'; known: visible_energy"):
        plots_showers.plot_observable(real, generated, "mass")
    with pytest.raises(ValueError, match="unknown picture format"):
        plots_showers.plot_observable(real, generated, "cog_z", tmp_path / "a.doc")
    with pytest.raises(ValueError, match="start_layer: no generated shower has this observable"):
        plots_showers.plot_observable(real, observe([EMPTY] * 3), "start_layer")
    with pytest.raises(ValueError, match="generated: no hit above 0.1 MeV"):
        plots_showers.plot_event_display(RECORD, EMPTY)
    with pytest.raises(ValueError, match="no energy bin has 20 showers"):
        plots_showers.plot_response(observe([RECORD] * 3), observe([RECORD] * 3))
    with pytest.raises(ValueError, match="unknown mplhep style"):
        plots_showers.plot_overview(real, generated, style="paper")
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, capsys):
    first = write_showers(tmp_path / "real.parquet", toy_showers(60, 3))
    second = write_showers(tmp_path / "generated.parquet", toy_showers(60, 4))
    common = ["--real", first, "--generated", second, "--energy_bins", "10,100"]
    code = plot_showers.main(
        [*common, "--output", str(tmp_path / "plots"), "--observables", "start_layer", "cell_energy"]
    )
    names = [Path(line).name for line in capsys.readouterr().out.split()]
    assert code == 0
    assert names == [
        "overview.png",
        "start_layer.png",
        "cell_energy.png",
        "response.png",
        "correlations.png",
        "display.png",
    ]
    assert sorted(names) == sorted(p.name for p in (tmp_path / "plots").iterdir())
    code = plot_showers.main(
        [*common, "--output", str(tmp_path / "pdf"), "--kind", "display", "--display_energy", "30", "--format", "pdf"]
    )
    assert code == 0 and (tmp_path / "pdf" / "display.pdf").stat().st_size > 1000
    near = plot_showers.nearest_shower([first], 30.0, (30, 30, 30))
    everyone = read_showers(first).incident_energy
    assert near.incident_energy[0] == everyone[np.argmin(np.abs(everyone - 30))]


def test_hostile_command_line(tmp_path, capsys):
    first = write_showers(tmp_path / "real.parquet", toy_showers(30, 3))
    out = ["--output", str(tmp_path / "plots")]
    assert plot_showers.main(["--real", first, "--generated", str(tmp_path / "none"), *out]) == 2
    captured = capsys.readouterr()
    assert "no Parquet file found" in captured.err and len(captured.err.splitlines()) == 1
    assert not (tmp_path / "plots").exists()
    with pytest.raises(SystemExit):
        plot_showers.main(["--real", first, "--generated", first, *out, "--observables", "mass"])
