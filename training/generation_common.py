"""What the generation scripts share: options, folders that a restart continues, files that are made one by one."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

METADATA = "generation.json"


def parse_range(text: str, name: str, limits: tuple[float, float]) -> tuple[float, float]:
    """`"6"` or `"1-10"` to (low, high) within the limits.

    Raises:
        ValueError: `text` is neither, or outside; names the option `name`.
    """
    parts = text.split("-")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise ValueError(f"--{name} {text!r}: expected a number such as 6 or a range such as 1-10")
    low, high = values[0], values[-1]
    if not limits[0] <= low <= high <= limits[1]:
        raise ValueError(f"--{name} {text!r}: expected {limits[0]:g} <= low <= high <= {limits[1]:g}")
    return low, high


def check_at_least(arguments: argparse.Namespace, least: int, *names: str):
    """Options that are given must not be smaller."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}, expected at least {least}")


def load_config(path: str, model_type: str):
    """The configuration of a model of the given type.

    Raises:
        ValueError: there is none, or it is of another type.
    """
    from transformers import AutoConfig

    import hepzoo  # noqa: F401  registers the families

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no model that can be loaded ({str(error).splitlines()[0]})") from None
    if config.model_type != model_type:
        raise ValueError(f"{path}: model type {config.model_type!r} cannot be generated here, expected {model_type!r}")
    return config


def check_metadata(folder: Path, options: Mapping[str, Any], files: str):
    """A restarted run continues a folder only if it was started with the same options."""
    path = folder / METADATA
    if path.is_file():
        try:
            stored = json.loads(path.read_text())
        except ValueError:
            stored = None
        if not isinstance(stored, dict):
            raise ValueError(f"{path}: not the options of an earlier run; choose another --output")
        changed = sorted(name for name in options if stored.get(name) != options[name])
        if changed:
            differences = ", ".join(f"{name} {stored.get(name)!r} -> {options[name]!r}" for name in changed)
            raise ValueError(
                f"{folder}: holds {files} made with other options ({differences}); choose another --output"
            )
        return
    if any(folder.iterdir()):
        raise ValueError(f"{folder}: exists, is not empty and holds no {METADATA}; choose another --output")
    path.write_text(json.dumps(options, indent=2) + "\n")


def make_missing_files(
    state,
    options: Mapping[str, Any],
    paths: Sequence[Path],
    sizes: Sequence[int],
    make_file: Callable[[int, Any], None],
    files: str,
    unit: str,
):
    """
    Make the files that are not there yet, shared between the processes.

    Args:
        state: `accelerate.PartialState`.
        options: what decides about the content; a folder made with others is refused.
        paths, sizes: of all files, in one folder; rows of each.
        make_file: takes the number of a file and the progress bar, which it updates by the rows it has made.
        files, unit: what files and rows are called.

    Raises:
        ValueError: the folder holds something else.
    """
    from tqdm import tqdm

    folder = paths[0].parent
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        check_metadata(folder, options, files)
    state.wait_for_everyone()
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    if state.is_main_process and len(missing) < len(paths):
        print(f"{folder}: {len(paths) - len(missing)} of {len(paths)} {files} are there already", file=sys.stderr)
    # every process must have looked before the first one writes
    state.wait_for_everyone()
    own = missing[state.process_index :: state.num_processes]
    total = sum(sizes[index] for index in own)
    with tqdm(total=total, unit=unit, disable=not state.is_main_process, desc="generating") as bar:
        for index in own:
            make_file(index, bar)
    state.wait_for_everyone()
