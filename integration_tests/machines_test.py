"""The guide's program for several machines, in one process and on two machines."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nflows_mongeampere import files

pytestmark = pytest.mark.long

GUIDE = (Path(__file__).parent.parent / "docs" / "guide" / "machines.md").read_text()
PROGRAM = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SECONDS = 300


def trained(folder, *commands):
    """The weights after commands that run at the same time."""
    (folder / "train.py").write_text(PROGRAM)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = [
        subprocess.Popen(
            [*command, "train.py"], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == 0, error
    return files.load(folder / "flow.safetensors").state_dict()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone"), [sys.executable])


def assert_same_training(weights, alone):
    assert alone["_transform.potential.amplitude"].abs().max() > 0.1  # it has learnt
    for name, value in alone.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def test_two_machines_learn_what_one_does(alone, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machines = ["--nnodes", "2", "--nproc-per-node", "1"]
    first = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    commands = [[*TORCHRUN, *machines, *first, "--node-rank", str(rank)] for rank in range(2)]
    assert_same_training(trained(tmp_path, *commands), alone)
