"""Every plot is written whole, in the asked format, without a display, and leaves pyplot alone."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from hepzoo.evaluation import plots_dirc as plots  # noqa: E402
from hepzoo.evaluation.separation import separation_table  # noqa: E402
from hepzoo.evaluation.tracks_dirc import as_tracks  # noqa: E402
from hepzoo.tokenization.geometry_dirc import DircGeometry  # noqa: E402


@pytest.fixture(scope="module")
def pair(columns):
    return as_tracks(columns(150, 1)), as_tracks(columns(100, 2))


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    return rng.normal(1.5, 1, 300), rng.normal(-1.5, 1, 300)


def drawings(pair, scores):
    real, generated = pair
    rows = {"P": np.full(600, 6.0), "Theta": np.tile([30.0, 60.0], 300), "PDG": np.repeat([321, 211], 300)}
    table = separation_table(rows, np.concatenate(scores))
    return {
        "hits": lambda path: plots.plot_hit_pattern({"a": real.species("pion"), "b": real.species("kaon")}, path),
        "comparison": lambda path: plots.plot_hit_comparison(real, generated, path),
        "time": lambda path: plots.plot_time_spectrum(real, generated, path),
        "time_one": lambda path: plots.plot_time_spectrum(real, path=path),
        "yield": lambda path: plots.plot_photon_yield({"real": real, "generated": generated}, path),
        "ratios": lambda path: plots.plot_ratios(real, generated, path),
        "dll": lambda path: plots.plot_dll(*scores, path),
        "separation": lambda path: plots.plot_separation({"real": table}, path),
    }


KINDS = ("hits", "comparison", "time", "time_one", "yield", "ratios", "dll", "separation")


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_written_whole(kind, pair, scores, tmp_path):
    import matplotlib.image
    import matplotlib.pyplot as plt

    before = dict(plt.rcParams)
    path = drawings(pair, scores)[kind](tmp_path / "deep" / f"{kind}.png")
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 300 and picture.shape[1] > 500
    assert picture[..., :3].std() > 0.02  # something is drawn
    assert plt.get_fignums() == [] and dict(plt.rcParams) == before
    assert [p.name for p in path.parent.iterdir()] == [f"{kind}.png"]


def test_format_by_the_ending(pair, tmp_path):
    path = plots.plot_time_spectrum(*pair, tmp_path / "time.pdf")
    assert path.read_bytes().startswith(b"%PDF")


def test_axes_have_units(pair, scores):
    for kind in KINDS:
        figure = drawings(pair, scores)[kind](None)
        labels = [axis.get_xlabel() for axis in figure.axes if axis.get_xlabel()]
        assert labels
        for label in labels:
            assert "[" in label or "photons per track" in label or "LL" in label, label


def test_hit_pattern_counts_every_photon(pair):
    geometry = DircGeometry()
    tracks = pair[0]
    density = plots._density(tracks, geometry)
    assert np.nansum(density) == pytest.approx(1)
    assert np.isfinite(density).sum() == geometry.num_channels  # gaps and borders are NaN
    dense = density[np.ix_(plots._live(geometry, "y"), plots._live(geometry, "x"))]
    assert dense.shape == (64, 96)
    rows = (tracks.pmt // 6) * 16 + tracks.pixel // 16
    columns = (tracks.pmt % 6) * 16 + tracks.pixel % 16
    counts = np.zeros((64, 96))
    np.add.at(counts, (rows, columns), 1)
    np.testing.assert_allclose(dense * tracks.offsets[-1], counts)


def test_ratio_blocks_grow_for_small_samples(pair):
    geometry = DircGeometry()
    a, b = (plots._density(tracks, geometry) for tracks in pair)
    assert plots._block_ratio(a, b, 10**9, geometry)[2] == 1
    ratio, few, block = plots._block_ratio(a, b, int(pair[1].offsets[-1]), geometry)
    assert block > 1
    assert (np.isfinite(ratio) | np.isfinite(few) | np.isnan(a)).all()
    assert not (np.isfinite(ratio) & np.isfinite(few)).any()


def test_mplhep_style(pair, tmp_path):
    pytest.importorskip("mplhep")
    assert plots.plot_ratios(*pair, tmp_path / "styled.png", style="CMS").is_file()


def test_hostile_plots(pair, scores, tmp_path):
    import matplotlib.pyplot as plt

    with pytest.raises(ValueError, match="unknown picture format"):
        plots.plot_time_spectrum(*pair, tmp_path / "time.xyz")
    with pytest.raises(ValueError, match="generated: no photons to plot"):
        plots.plot_ratios(pair[0], pair[0].select(np.zeros(150, bool)), tmp_path / "a.png")
    with pytest.raises(ValueError, match="versus must be"):
        plots.plot_separation({}, tmp_path / "a.png", versus="phi")
    with pytest.raises(ValueError, match="no separation to plot"):
        plots.plot_separation({"real": []}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="unknown mplhep style"):
        plots.plot_time_spectrum(*pair, tmp_path / "a.png", style="no such style")
    assert list(tmp_path.iterdir()) == [] and plt.get_fignums() == []


def test_dll_plot_without_a_fit(tmp_path):
    assert plots.plot_dll(np.ones(20), np.zeros(20), tmp_path / "dll.png").is_file()
