"""Fresh Python processes for tests of imports, installation and the Hub."""

import os
import subprocess
import sys
from pathlib import Path

# what a machine without hepzoo does on `import hepzoo`, although it is installed here
WITHOUT_HEPZOO = """
import sys

class _NoHepzoo:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hepzoo":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, _NoHepzoo())
"""


def run_python(
    code: str, folder: Path, *arguments, hepzoo: bool = True, timeout: float = 300, **environment: str
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
