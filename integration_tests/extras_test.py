"""An example that misses a package names the extra to install; the extra has all that they use."""

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "nflows_mongeampere" / "examples"
SHARED = sorted(file for file in FOLDER.glob("*.py") if not file.stem.endswith("_test"))
FILES = [*sorted((ROOT / "examples").rglob("*.py")), *SHARED]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def modules_of(requirements):
    """The modules that a list of requirements installs."""
    names = {canonicalize_name(Requirement(line).name) for line in requirements}
    return {
        module
        for module, distributions in packages_distributions().items()
        if names & set(map(canonicalize_name, distributions))
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
    (file, sorted(imports_of(file) & EXTRA))
    for file in FILES
    if '__name__ == "__main__"' in file.read_text() and imports_of(file) & EXTRA
]


def test_the_extra_holds_what_the_examples_import():
    known = NEEDED | EXTRA | sys.stdlib_module_names | {file.stem for file in FILES}
    known |= {"nflows_mongeampere", "torchvision"}  # the latter comes with torchdyn
    for file in FILES:
        assert imports_of(file) <= known, file.name


# Run each script beside modules that fail to import, as if not installed; in one process, as
# importing what is there takes seconds.
PROGRAM = """
import json, runpy, sys
from contextlib import redirect_stderr
from io import StringIO

scripts, ours = json.loads(sys.argv[1])
answers = []
for script, folder, missing in scripts:
    for name in list(sys.modules):
        if name.partition(".")[0] in {*missing, *ours} or "nflows_mongeampere.examples" in name:
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(missing))
    sys.path[0], sys.excepthook = folder, sys.__excepthook__
    with redirect_stderr(StringIO()) as answer:
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:
            sys.excepthook(*sys.exc_info())
    answers.append(answer.getvalue())
    for name in missing:
        del sys.modules[name]
print(json.dumps(answers))
"""


def test_a_missing_package_names_the_extra():
    scripts = [[str(file), str(file.parent), missing] for file, missing in SCRIPTS]
    given = json.dumps([scripts, [file.stem for file in FILES]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, given]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    answers = json.loads(run.stdout.splitlines()[-1])
    assert len(answers) == len(SCRIPTS) > 15
    for (file, missing), answer in zip(SCRIPTS, answers, strict=True):
        assert answer.startswith(tuple(f"{module}: " for module in missing)), (file, answer)
        assert answer.endswith('pip install --editable ".[examples]"\n'), (file, answer)
