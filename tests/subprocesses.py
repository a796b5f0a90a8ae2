"""Fresh Python processes for tests of imports, installation, the Hub and the code that checkpoints carry."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# what a machine without hepzoo does on `import hepzoo`, although it is installed here
WITHOUT_HEPZOO = """
import sys

class _NoHepzoo:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hepzoo":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, _NoHepzoo())
try:
    import hepzoo
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hepzoo can be imported: this is no test")
"""


def run_python(
    code: str, folder: Path, *arguments, hepzoo: bool = True, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess:
    """
    Run `code` in a fresh process that finds neither the repository nor the caches of the user.

    Args:
        folder: working directory; `HF_HOME` is inside it.
        arguments: `sys.argv[1:]` of the process.
        hepzoo: `False` makes `import hepzoo` fail.
        environment: variables to set, over offline defaults.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    variables |= {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    code = code if hepzoo else WITHOUT_HEPZOO + code
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def checked(result: subprocess.CompletedProcess) -> str:
    """Standard output of a process that must have succeeded."""
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-5000:]}"
    return result.stdout


def answer(result: subprocess.CompletedProcess) -> Any:
    """The last line that a process has printed, which is JSON."""
    return json.loads(checked(result).splitlines()[-1])


def load_and_load_again(code: str, saved: Path, folder: Path) -> tuple[Any, Any]:
    """
    Run `code` in processes without hepzoo, on the folder `saved` and on what it saves in its own folder `again`, which
    must have the same files. The second process has another cache and other working directory.

    Args:
        code: loads `sys.argv[1]`, saves to `again` and prints JSON.
        folder: empty.

    Returns:
        What the two processes have printed.
    """
    first = answer(run_python(code, folder, saved, hepzoo=False))
    files = {path.relative_to(saved) for path in saved.rglob("*")}
    assert {path.relative_to(folder / "again") for path in (folder / "again").rglob("*")} == files
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    return first, answer(run_python(code, elsewhere, folder / "again", hepzoo=False))


def assert_complete(saved: Path):
    """The folder of a model has every file of code that its settings name, and none of them needs hepzoo."""
    references = []
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (saved / name).is_file():
            for reference in json.loads((saved / name).read_text()).get("auto_map", {}).values():
                # tokenizers have two, one of them empty
                references += reference if isinstance(reference, list) else [reference]
    code = {path.name: path.read_text() for path in saved.glob("*.py")}
    assert references and {f"{reference.split('.')[0]}.py" for reference in filter(None, references)} <= set(code)
    for name, text in code.items():
        assert "import hepzoo" not in text and "from hepzoo" not in text, name
