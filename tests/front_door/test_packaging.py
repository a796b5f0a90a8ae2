"""The wheel and the source tree agree: rooms, entry point, pins."""

import configparser
import email
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import hepzoo
from hepzoo.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
NOT_PACKAGED = {"tests", "benchmarks", "docs", "examples", "model_cards"}


def rooms() -> tuple[str, ...]:
    match = re.search(r"^ROOMS = \((.*?)\)", (ROOT / "setup.py").read_text(), re.MULTILINE | re.DOTALL)
    return tuple(re.findall(r'"(\w+)"', match[1]))


def test_rooms_of_setup_are_the_folders_with_an_init():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"hepzoo"} - NOT_PACKAGED
    assert set(rooms()) == folders
    assert len(rooms()) == len(set(rooms()))


def test_files_that_checkpoints_carry_import_only_their_neighbours():
    """`save_pretrained` copies what a regular expression finds: only `from .x import y`, in flat folders."""
    for room in ("modeling", "tokenization"):
        files = sorted((ROOT / room).glob("**/*.py"))
        assert all(path.parent == ROOT / room for path in files)
        for path in files:
            for line in path.read_text().splitlines():
                statement = line.strip()
                if statement.startswith(("from .", "import .")):
                    name = re.fullmatch(r"from \.(\w+) import .+", statement)
                    assert name, f"{path.name}: {statement}"
                    assert (ROOT / room / f"{name[1]}.py").is_file(), f"{path.name}: {statement}"
                assert not re.match(r"(from|import) hepzoo\b", statement), f"{path.name}: {statement}"


def test_no_room_imports_against_the_arrows():
    allowed = {"data_scripts": "modeling tokenization data_scripts", "evaluation": "modeling tokenization evaluation"}
    allowed["evaluation"] += " data_scripts"
    allowed["training"] = "modeling tokenization data_scripts training evaluation"
    for room, known in allowed.items():
        for path in (ROOT / room).glob("*.py"):
            for imported in re.findall(r"(?:from|import) hepzoo\.(\w+)", path.read_text()):
                assert imported in known.split(), f"{room}/{path.name} imports hepzoo.{imported}"


def test_constraints_pin_the_tested_set():
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.+]+)(?:; .+)?", line) for line in lines if line]
    assert all(pins), "every line of constraints.txt pins one version"
    pinned = {re.sub(r"[-_.]+", "-", match[1]).lower() for match in pins}
    assert "torch==2.13.0" in lines
    project = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)[1]
    required = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r'"([\w.-]+)[<>=~]', block)}
    assert len(required) >= 10
    assert required <= pinned, f"not pinned: {required - pinned}"


def test_version_is_stated_once_for_all():
    stated = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert stated == hepzoo.__version__


def tracked_tree(folder: Path) -> Path:
    """A copy of what belongs to a distribution; built there, so that nothing appears in the repository."""
    copy = folder / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for name in ("hepzoo", "tests", *rooms()):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored, ignore_dangling_symlinks=True)
    return copy


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip(f"setuptools {version('setuptools')} is older than the 77 that pyproject.toml asks for")
    folder = tmp_path_factory.mktemp("wheel")
    tree = tracked_tree(folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder / "dist"), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_all_rooms_under_hepzoo_and_nothing_else(wheel):
    names = [name for name in wheel.namelist() if not name.endswith("/")]
    info = f"hepzoo-{hepzoo.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"hepzoo", info}
    packaged = {name for name in names if name.endswith(".py")}
    expected = {f"hepzoo/{path.name}" for path in (ROOT / "hepzoo").glob("*.py")}
    for room in rooms():
        expected |= {f"hepzoo/{room}/{path.relative_to(ROOT / room)}" for path in (ROOT / room).glob("**/*.py")}
    assert packaged == expected
    assert "hepzoo/py.typed" in names
    assert not [name for name in names if "test" in name.lower() or "__pycache__" in name]


def test_wheel_holds_the_files_that_scripts_read(wheel):
    """Whatever lies in a room beside its code (configurations, tables) is is installed with it."""
    names = set(wheel.namelist())
    for room in rooms():
        for path in (ROOT / room).glob("**/*"):
            if path.suffix in (".json", ".yaml", ".yml", ".csv", ".npz", ".safetensors"):
                assert f"hepzoo/{room}/{path.relative_to(ROOT / room)}" in names


def test_wheel_has_the_command_and_its_modules(wheel):
    names = set(wheel.namelist())
    entry_points = configparser.ConfigParser()
    (path,) = (name for name in names if name.endswith("entry_points.txt"))
    entry_points.read_string(wheel.read(path).decode())
    assert dict(entry_points["console_scripts"]) == {"hepzoo": "hepzoo.cli:main"}
    for _, target in COMMANDS.values():
        for module in [target] if isinstance(target, str) else target.values():
            assert f"{module.replace('.', '/')}.py" in names


def test_wheel_metadata(wheel):
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(path))
    assert (metadata["Name"], metadata["Version"]) == ("hepzoo", hepzoo.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    assert {"data", "sim", "plots", "mamba", "dev"} <= set(metadata.get_all("Provides-Extra"))
    required = {re.match(r"[\w-]+", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {"torch", "transformers", "datasets", "accelerate", "safetensors", "evaluate", "numpy"} <= required
    assert not {"matplotlib", "h5py", "uproot", "pytest"} & required
