"""What an import loads: Lightning and Matplotlib take seconds, and not everybody has them."""

import subprocess
import sys

import pytest

import nflows_mongeampere.training


def loaded(statement: str) -> set[str]:
    command = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, check=True, text=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import nflows_mongeampere.training",
        "from nflows_mongeampere.training import EndlessBatches, endless",
        "import nflows_mongeampere.variational",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_used(statement):
    heavy = {"matplotlib", "nflows.flows", "normflows", "pandas", "pytorch_lightning", "sklearn"}
    assert not heavy & loaded(statement)


def test_a_training_loads_neither_normflows_nor_the_flows_of_nflows():
    modules = loaded("from nflows_mongeampere.training import *")
    assert "pytorch_lightning" in modules
    assert not {"normflows", "nflows.flows"} & modules


def test_the_module_lists_what_it_has():
    module = nflows_mongeampere.training
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name).__name__ == name for name in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = module.Missing
