"""FPND: Fréchet distance of the activations of a published ParticleNet on generated and on JetNet jets.

arXiv:2106.11535. Network and statistics of the real jets were published with the JetNet library, for gluon, light quark
and top jets of 30 constituents; nothing is downloaded here. The folder with them (`fpnd_resources/jetnet/30_particles`
of the `jetnet` package, whose own code is not needed) holds `pnet_state_dict.pt` and, for each of the types g, q and t,
`<type>_mu.txt` and `<type>_sigma.txt`. The distance says nothing about jets of another selection.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.jetnet import relative_jets

TYPES = ("g", "q", "t")
SOURCE = "it is in the folder fpnd_resources/jetnet/30_particles of the jetnet package"
PARTICLES = 30
NEIGHBOURS = 16
CHANNELS = (64, 128, 256)
ACTIVATIONS = 256
# eta, phi, pT of the constituents are divided and then shifted by
SCALES = (1.6211985349655151, 0.520724892616272, 0.8934717178344727)
SHIFTS = (0.0, 0.0, -0.5)


def frechet_distance(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians."""
    # the eigenvalues of C1 C2 are real and not negative, but for rounding
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariance @ other_covariance).real, 0))
    difference = mean - other_mean
    return float(difference @ difference + np.trace(covariance) + np.trace(other_covariance) - 2 * roots.sum())


def load_particlenet(folder: str | Path) -> Any:
    """
    The published ParticleNet: jets `(jets, 30, 3)`, scaled, to activations `(jets, 256)`.

    Raises:
        ValueError: the file is missing, or holds another network.
    """
    import torch
    from torch import nn

    class EdgeConvolution(nn.Module):
        """Mean over the nearest neighbours of a network of (own features, difference of the neighbour's)."""

        def __init__(self, features: int, channels: int):
            super().__init__()
            sizes = (2 * features, channels, channels, channels)
            layers = [
                layer
                for size, next_size in zip(sizes[:-1], sizes[1:])
                for layer in (nn.Linear(size, next_size), nn.BatchNorm1d(next_size), nn.ReLU())
            ]
            self.model = nn.Sequential(*layers)

        def forward(self, x: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
            jets, slots, features = x.shape
            distance = torch.cdist(coordinates, coordinates, compute_mode="donot_use_mm_for_euclid_dist")
            distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
            nearest = distance.topk(NEIGHBOURS, largest=False).indices
            rows = torch.arange(jets)[:, None, None]
            center = x[:, :, None].expand(-1, -1, NEIGHBOURS, -1)
            edges = torch.cat([center, x[rows, nearest] - center], dim=-1)
            return self.model(edges.reshape(-1, 2 * features)).reshape(jets, slots, NEIGHBOURS, -1).mean(dim=2)

    class ParticleNet(nn.Module):
        def __init__(self):
            super().__init__()
            widths = np.cumsum((len(SCALES), *CHANNELS)).tolist()
            self.edge_nets = nn.ModuleList(EdgeConvolution(*sizes) for sizes in zip(widths[:-1], CHANNELS))
            self.fc1 = nn.Sequential(nn.Linear(widths[-1], ACTIVATIONS))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number, block in enumerate(self.edge_nets):
                x = torch.cat([block(x, x if number else x[..., :2]), x], dim=-1)
            return self.fc1(x.mean(dim=1))

    path = Path(folder) / "pnet_state_dict.pt"
    if not path.is_file():
        raise ValueError(f"{path} is missing; {SOURCE}")
    network = ParticleNet()
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        # every edge network is stored twice; the last layer is not used
        network.load_state_dict({name: stored[name] for name in network.state_dict()})
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the published ParticleNet ({str(error).splitlines()[0]})") from None
    except Exception as error:  # unpickling refuses by an exception of its own
        raise ValueError(f"{path}: not a file of weights ({type(error).__name__})") from None
    return network.eval()


def particlenet_activations(network: Any, rows: Any, batch_size: int = 256) -> np.ndarray:
    """
    Activations `(jets, 256)` of jets, rows as `hepzoo.evaluation.jets.as_jets` takes them: their 30 hardest
    constituents, coordinates relative to the jet, pT over that of the jet. Empty slots are at the origin with pT 0, and
    the network sees them, as published.
    """
    import torch

    jets = relative_jets(rows)
    padded = np.zeros((len(jets), PARTICLES, 3), dtype=np.float32)
    order = np.lexsort((-jets.pt, jets.owner))
    rank = np.arange(len(order)) - jets.offsets[:-1][jets.owner]
    chosen = order[rank < PARTICLES]
    place = jets.owner[rank < PARTICLES], rank[rank < PARTICLES]
    for k, name in enumerate(("eta", "phi", "pt")):
        padded[..., k][place] = getattr(jets, name)[chosen]
    scaled = torch.from_numpy(padded / np.float32(SCALES) + np.float32(SHIFTS))
    with torch.no_grad():
        return np.concatenate([network(part).numpy() for part in scaled.split(batch_size)])


def frechet_particlenet_distance(rows: Any, jet_type: str, folder: str | Path) -> float:
    """
    FPND of generated jets to the JetNet jets of a type; published with 50 000 jets.

    Args:
        rows: as `hepzoo.evaluation.jets.as_jets` takes them.
        jet_type (`str`): "g", "q" or "t".
        folder: with the published files, see the module.

    Raises:
        ValueError: an unknown type, a missing or wrong file, or fewer than 2 jets.
    """
    if jet_type not in TYPES:
        raise ValueError(f"unknown jet type {jet_type!r}, expected one of {', '.join(TYPES)}")
    statistics = []
    for name, shape in (("mu", (ACTIVATIONS,)), ("sigma", (ACTIVATIONS, ACTIVATIONS))):
        path = Path(folder) / f"{jet_type}_{name}.txt"
        if not path.is_file():
            raise ValueError(f"{path} is missing; {SOURCE}")
        try:
            values = np.loadtxt(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not the published statistics ({str(error).splitlines()[0]})") from None
        if values.shape != shape or not np.isfinite(values).all():
            raise ValueError(f"{path}: array of {values.shape}, expected finite numbers of {shape}")
        statistics.append(values)
    activations = particlenet_activations(load_particlenet(folder), rows)
    if len(activations) < 2:
        raise ValueError(f"{len(activations)} jets, at least 2 are needed")
    return frechet_distance(*statistics, activations.mean(axis=0), np.cov(activations, rowvar=False))
