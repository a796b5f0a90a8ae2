"""Access to the golden sets: outputs of the reference implementations on random small models."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

DEFAULT_FOLDER = Path(__file__).parent / "golden"


class GoldenSet:
    """
    One folder of golden vectors. Every output handed out by `expected` counts as compared; leaving the `with` block
    fails if any output of the folder was not.
    """

    def __init__(self, name: str):
        root = Path(os.environ.get("HEPZOO_GOLDEN_DIR", DEFAULT_FOLDER))
        self.folder = root / name
        if not self.folder.is_dir():
            if "HEPZOO_GOLDEN_DIR" in os.environ:
                pytest.skip(f"{name} is not in HEPZOO_GOLDEN_DIR")
            pytest.fail(f"golden set {self.folder} is missing")
        for file in ("config.json", "inputs.safetensors", "outputs.safetensors"):
            assert (self.folder / file).is_file(), f"golden set {self.folder} is incomplete: no {file}"
        self.config = json.loads((self.folder / "config.json").read_text())
        self.inputs = load_file(self.folder / "inputs.safetensors")
        self.outputs = load_file(self.folder / "outputs.safetensors")
        self.compared: set[str] = set()

    def path(self, file: str) -> str:
        assert (self.folder / file).is_file(), f"golden set {self.folder} is incomplete: no {file}"
        return str(self.folder / file)

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name in self.outputs if name.startswith(prefix))

    def expected(self, name: str) -> torch.Tensor:
        assert name in self.outputs, f"golden set {self.folder} is incomplete: no output {name}"
        self.compared.add(name)
        return self.outputs[name]

    def compare(self, name: str, actual: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-5):
        expected = self.expected(name)
        torch.testing.assert_close(
            actual.detach().to(expected.dtype), expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
        )

    def __enter__(self) -> "GoldenSet":
        return self

    def __exit__(self, error, *_):
        if error is None:
            left = sorted(set(self.outputs) - self.compared)
            assert not left, f"outputs of {self.folder} that nothing compares: {', '.join(left)}"
