"""
What the frozen features of TPC backbones hold: straight lines from the block outputs to noise, particle, charge, place.

No head is trained: least squares have one solution, which takes seconds, so that backbones can be compared over many
random initialisations. The features are the `mixture` that a head of FM4NPP starts from (the mean of the block
outputs), the same with every block `normalized` to one size, the `last` block alone, and `all` numbers of all blocks,
of which the others are parts.
"""

import argparse
import sys
from typing import Any

import numpy as np
import torch

from hepzoo.training.generation_common import check_at_least, load_config
from hepzoo.training.tpc_data import POINT_COLUMNS

EXAMPLES = """\
examples:
  python training/tpc_probe.py --models runs/npp --random_models 3 --train data/tpc/train --test data/tpc/validation
  python training/tpc_probe.py --models runs/npp_1 runs/npp_2 --features mixture normalized --train_events 200 \\
      --train data/tpc/train --test data/tpc/validation
"""

# feature set -> what it makes of the block outputs (blocks, points, size): (points, numbers)
FEATURES = {
    "mixture": lambda blocks: blocks.mean(dim=0),
    "normalized": lambda blocks: torch.nn.functional.rms_norm(blocks, blocks.shape[-1:]).mean(dim=0),
    "last": lambda blocks: blocks[-1],
    "all": lambda blocks: blocks.transpose(0, 1).flatten(1),
}
HEADINGS = ("noise, accuracy", "particle, accuracy", "log E, R²", "place, R²", "nearest, squared error")
NUM_CLASSES = {"noise_labels": 2, "pid_labels": 5}
# of standardised features
RIDGE = 1e-4


def read_rows(paths: list[str], number: int, max_points: int) -> list[dict[str, np.ndarray]]:
    """The first `number` events of Parquet files, without those that are longer, in ascending length.

    Raises:
        ValueError: a column is missing, or no event is left.
    """
    from hepzoo.evaluation.tracking import read_events

    events = read_events(paths, number)
    columns = {name: np.split(events[name], events.offsets[1:-1]) for name in (*POINT_COLUMNS, "noise", "pid")}
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    rows = [row for row in rows if len(row["E"]) <= max_points]
    if not rows:
        raise ValueError(f"{', '.join(paths)}: no event has at most {max_points} points")
    return sorted(rows, key=lambda row: len(row["E"]))


@torch.no_grad()
def read_features(
    model: Any, extractor: Any, rows: list[dict[str, np.ndarray]], batch_size: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Block outputs of all points, (blocks, points, size), and what the extractor says of them, (points, ...)."""
    blocks, targets = [], []
    for start in range(0, len(rows), batch_size):
        batch = extractor(rows[start : start + batch_size], return_tensors="pt")
        is_point = batch["attention_mask"].bool()
        inputs = {name: batch[name].to(model.device) for name in ("points", "attention_mask")}
        outputs = model(**inputs, use_cache=False).block_outputs
        blocks.append(torch.stack([output.float().cpu()[is_point] for output in outputs]))
        targets.append({name: batch[name][is_point] for name in ("points", "neighbor_labels", *NUM_CLASSES)})
    return torch.cat(blocks, dim=1), {name: torch.cat([part[name] for part in targets]) for name in targets[0]}


def fit_line(features: torch.Tensor, targets: torch.Tensor, test_features: torch.Tensor) -> torch.Tensor:
    """Prediction (test points, numbers) of the least-squares line from `features` (points, n) to `targets`."""
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-9)
    matrices = [
        torch.cat([(values - mean) / std, torch.ones(len(values), 1)], dim=1).double()
        for values in (features, test_features)
    ]
    train, test = matrices
    squares = train.T @ train / len(train) + RIDGE * torch.eye(train.shape[1], dtype=torch.float64)
    return test @ torch.linalg.solve(squares, train.T @ targets.double() / len(train))


def probe(
    train: tuple[torch.Tensor, dict[str, torch.Tensor]], test: tuple[torch.Tensor, dict[str, torch.Tensor]], extractor
) -> list[float]:
    """
    Accuracies of noise and particle, explained fractions of the variance of the logarithm of the charge and of the
    place (mean of three), and the squared error per coordinate of the nearest point of larger radius; on `test`.

    Args:
        train, test: features (points, n), and targets as of `read_features`.
    """
    (features, targets), (test_features, truth) = train, test
    numbers = []
    for name, classes in NUM_CLASSES.items():
        wanted = torch.nn.functional.one_hot(targets[name], classes)
        numbers.append((fit_line(features, wanted, test_features).argmax(dim=1) == truth[name]).double().mean().item())
    charges = [
        (values["points"][:, :1].double() * extractor.energy_std + extractor.energy_mean).clamp(min=1).log()
        for values in (targets, truth)
    ]
    places = [values["points"][:, 1:].double() for values in (targets, truth)]
    for wanted, true in (charges, places):
        errors = (fit_line(features, wanted, test_features) - true).square().mean(dim=0)
        numbers.append((1 - errors / true.var(dim=0, correction=0)).mean().item())
    nearest = [values["neighbor_labels"][:, :3] for values in (targets, truth)]
    exists, test_exists = ((values != -100).all(dim=1) for values in nearest)
    found = fit_line(features[exists], nearest[0][exists], test_features[test_exists])
    return [*numbers, (found - nearest[1][test_exists]).square().mean().item()]


def probe_models(arguments: argparse.Namespace) -> list[tuple[str, str, list[float]]]:
    """Model, features, and the numbers of `probe`, of all models and feature sets; printed as a Markdown table."""
    import transformers

    import hepzoo  # noqa: F401 - registers the families

    check_at_least(arguments, 1, "train_events", "test_events", "batch_size")
    check_at_least(arguments, 0, "random_models")
    config = load_config(arguments.models[0], "fm4npp")
    try:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(arguments.models[0])
    except (ValueError, OSError) as error:
        raise ValueError(f"--models {arguments.models[0]}: {' '.join(str(error).split())}") from None
    train_rows = read_rows(arguments.train, arguments.train_events, extractor.max_points)
    test_rows = read_rows(arguments.test, arguments.test_events, extractor.max_points)

    device = "cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu"
    results = []
    print("| backbone | features | " + " | ".join(HEADINGS) + " |")
    print("|---|---|" + "---:|" * len(HEADINGS))
    for name in [*arguments.models, *range(1, arguments.random_models + 1)]:
        if isinstance(name, str):
            load_config(name, "fm4npp")
            model = transformers.AutoModel.from_pretrained(name)
        else:
            torch.manual_seed(name)
            model, name = transformers.AutoModel.from_config(config), f"random {name}"
        model = model.to(device).eval()
        (blocks, targets), (test_blocks, truth) = (
            read_features(model, extractor, rows, arguments.batch_size) for rows in (train_rows, test_rows)
        )
        for features in arguments.features:
            made = FEATURES[features]
            numbers = probe((made(blocks), targets), (made(test_blocks), truth), extractor)
            results.append((name, features, numbers))
            shown = [*(f"{number:.3f}" for number in numbers[:-1]), f"{numbers[-1]:.5f}"]
            print(f"| {name} | {features} | {' | '.join(shown)} |", flush=True)
        sizes = blocks.square().mean(dim=(1, 2)).sqrt().tolist()
        print(f"{name}: size of the block outputs {' '.join(f'{size:.2g}' for size in sizes)}", file=sys.stderr)
    return results


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="FOLDERS", help="backbones; the first one gives "
                        "the feature extractor, and the size of the random ones")  # fmt: skip
    parser.add_argument("--random_models", type=int, default=0, help="so many more that were never trained (0)")
    parser.add_argument("--train", nargs="+", required=True, metavar="FILES", help="labelled events to fit the lines")
    parser.add_argument("--test", nargs="+", required=True, metavar="FILES", help="labelled events for the table")
    parser.add_argument("--train_events", type=int, default=100, help="most events of --train (100)")
    parser.add_argument("--test_events", type=int, default=100, help="most events of --test (100)")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES), help="default: all of them")
    parser.add_argument("--batch_size", type=int, default=8, help="events at a time (8)")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        probe_models(arguments)
    except (ValueError, OSError) as error:
        print(f"tpc_probe.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
