"""An example that misses a package names the extra to install; the extra has all that they use."""

import ast
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "nflows_mongeampere" / "examples"
SHARED = sorted(file for file in FOLDER.glob("*.py") if not file.stem.endswith("_test"))
FILES = [*sorted((ROOT / "examples").rglob("*.py")), *SHARED]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def modules_of(requirements):
    """The modules that a list of requirements installs."""
    names = {Requirement(line).name.lower() for line in requirements}
    return {
        module
        for module, distributions in packages_distributions().items()
        if names & {name.lower() for name in distributions}
    }


def imports_of(file):
    """What a file imports, as the first parts of the names."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return {name.partition(".")[0] for name in modules}


NEEDED = modules_of(PROJECT["dependencies"])
EXTRA = modules_of(PROJECT["optional-dependencies"]["examples"]) - NEEDED
SCRIPTS = [
    pytest.param(file, sorted(imports_of(file) & EXTRA), id=file.stem)
    for file in FILES
    if '__name__ == "__main__"' in file.read_text() and imports_of(file) & EXTRA
]


def test_the_extra_holds_what_the_examples_import():
    known = NEEDED | EXTRA | sys.stdlib_module_names | {file.stem for file in FILES}
    known |= {"nflows_mongeampere", "torchvision"}  # the latter comes with torchdyn
    for file in FILES:
        assert imports_of(file) <= known, file.name


def run_without(missing, script):
    """Run a script beside modules of these names that fail to import, as if not installed."""
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({missing}))
runpy.run_path({str(script)!r}, run_name="__main__")
"""
    environment = {**os.environ, "PYTHONPATH": f"{script.parent}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(("script", "missing"), SCRIPTS)
def test_a_missing_package_names_the_extra(script, missing):
    run = run_without(missing, script)
    assert run.returncode == 1
    assert run.stderr.startswith(tuple(f"{module}: " for module in missing)), run.stderr
    assert run.stderr.endswith('pip install --editable ".[examples]"\n')
