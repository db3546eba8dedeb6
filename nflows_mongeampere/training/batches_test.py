from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from nflows_mongeampere.training import EndlessBatches, endless
from nflows_mongeampere.training.batches import mix

DATA = torch.arange(10)[:, None]


def noisy(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows + torch.rand(rows.shape, generator=generator)


def test_a_pass_deals_out_every_row_once():
    batches = EndlessBatches(DATA, batch_size=5, seed=1)
    for epoch in range(3):
        rows = torch.cat([batches[2 * epoch], batches[2 * epoch + 1]])
        assert sorted(rows.flatten().tolist()) == list(range(10))


def test_each_pass_has_its_own_order_and_each_seed_too():
    orders = {
        tuple(EndlessBatches(DATA, 10, seed)[epoch].flatten().tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_a_batch_depends_on_its_number_alone():
    batches = EndlessBatches(DATA, 4, seed=3, prepare=noisy)
    expected = [batches[k] for k in range(6)]
    torch.manual_seed(17)
    again = EndlessBatches(DATA, 4, seed=3, prepare=noisy)
    for k in reversed(range(6)):
        torch.rand(3)
        assert torch.equal(again[k], expected[k])


def test_noise_differs_from_batch_to_batch():
    batches = EndlessBatches(torch.zeros(8, 2), 4, prepare=noisy)
    values = torch.cat([batches[k] for k in range(4)])
    assert len(values.unique()) == values.numel()


def test_processes_share_one_batch(monkeypatch):
    whole = EndlessBatches(DATA, 6, seed=3, prepare=noisy)[4]
    parts = []
    for rank in range(2):
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
        parts.append(EndlessBatches(DATA, 6, seed=3, prepare=noisy)[4])
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)
    with pytest.raises(ValueError, match="batch_size: got 5, expected a multiple of the 2"):
        EndlessBatches(DATA, 5)[0]


def test_batches_go_to_spawned_workers():
    batches = EndlessBatches((DATA, 2 * DATA), 4, seed=3)
    loader = endless(batches, 4, num_workers=1, multiprocessing_context="spawn")
    for k, (rows, doubled) in enumerate(loader):
        assert torch.equal(rows, batches[k][0])
        assert torch.equal(doubled, batches[k][1])


def test_a_worker_has_the_part_of_its_process(monkeypatch):
    """torch.distributed runs in the process that spawned it, and not in the worker."""
    batches = EndlessBatches(DATA, 6, seed=3, prepare=noisy)
    whole = batches[4]
    with monkeypatch.context() as process:
        process.setattr("torch.distributed.is_initialized", lambda: True)
        process.setattr("torch.distributed.get_rank", lambda: 1)
        process.setattr("torch.distributed.get_world_size", lambda: 2)
        sent = pickle.dumps(batches)
    assert torch.equal(pickle.loads(sent)[4], whole)  # loaded where there is one process
    module = "nflows_mongeampere.training.batches"
    monkeypatch.setattr(f"{module}.get_worker_info", lambda: "a worker")
    assert torch.equal(pickle.loads(sent)[4], whole[1::2])


def test_intervals_follow_each_other():
    batches = EndlessBatches(DATA, 4, seed=3)
    loader = endless(batches, interval=3)
    assert len(loader) == 3
    loader.sampler.set_epoch(5)
    for k, batch in enumerate(loader):
        assert torch.equal(batch, batches[15 + k])


def test_seeds_do_not_collide():
    seeds = {mix(a, b) for a in range(-30, 30) for b in range(30)}
    assert len(seeds) == 60 * 30
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("size", [0, 11])
def test_errors_name_the_argument(size):
    with pytest.raises(ValueError, match="batch_size: got"):
        EndlessBatches(DATA, size)
    with pytest.raises(ValueError, match="interval: got 0"):
        endless(EndlessBatches(DATA, 2), 0)


def test_several_tensors_are_dealt_out_alike(monkeypatch):
    data, labels = torch.arange(10.0)[:, None], torch.arange(10)
    batches = EndlessBatches((data, labels), 4, seed=3)
    for number in range(5):
        rows, chosen = batches[number]
        assert torch.equal(rows[:, 0].long(), chosen)
        assert torch.equal(rows, EndlessBatches(data, 4, seed=3)[number])
    noisy_pair = EndlessBatches(
        [data, labels], 4, 3, lambda pair, generator: (noisy(pair[0], generator), pair[1])
    )
    whole = noisy_pair[2]
    assert torch.equal(whole[0], EndlessBatches(data, 4, seed=3, prepare=noisy)[2])
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for part, of in zip(noisy_pair[2], whole, strict=True):
        assert torch.equal(part, of[1::2])


def test_several_tensors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"data: got tensors of \[10, 9\] rows"):
        EndlessBatches((DATA, DATA[1:]), 2)
    with pytest.raises(TypeError, match=r"data: got list, expected a torch.Tensor"):
        EndlessBatches((DATA, [1, 2]), 2)
