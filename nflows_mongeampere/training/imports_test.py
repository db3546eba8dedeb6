"""What an import loads: Lightning and Matplotlib take seconds, and not everybody has them."""

import json
import subprocess
import sys

import pytest

import nflows_mongeampere.training

# one after the other, in one process; each line may load what the lines before have loaded
STATEMENTS = [
    "import torch, nflows, torchdyn.numerics",
    "import nflows_mongeampere",
    "import nflows_mongeampere.training",
    "from nflows_mongeampere.training import EndlessBatches, endless",
    "import nflows_mongeampere.variational",
    "from nflows_mongeampere.training import *",
]
HEAVY = {"matplotlib", "nflows.flows", "normflows", "pandas", "pytorch_lightning", "sklearn"}
HEAVY |= {"scipy", "torch._dynamo"}


@pytest.fixture(scope="module")
def loaded():
    """What each statement has loaded."""
    code = f"""
import json, sys
seen, loaded = set(sys.modules), []
for statement in {STATEMENTS}:
    exec(statement)
    loaded.append(sorted(set(sys.modules) - seen))
    seen = set(sys.modules)
print(json.dumps(loaded))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return dict(zip(STATEMENTS, map(set, json.loads(done.stdout)), strict=True))


@pytest.mark.parametrize("statement", STATEMENTS[1:-1])
def test_nothing_heavy_is_loaded_before_it_is_used(loaded, statement):
    """No compiler, no training engine, no plotting."""
    assert not HEAVY & loaded[statement]


def test_a_training_loads_neither_normflows_nor_the_flows_of_nflows(loaded):
    modules = loaded[STATEMENTS[-1]]
    assert "pytorch_lightning" in modules
    assert not {"normflows", "nflows.flows"} & modules


def test_the_module_lists_what_it_has():
    module = nflows_mongeampere.training
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name).__name__ == name for name in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = module.Missing
