import json
from pathlib import Path

import pytest
import torch
from nflows import distributions, transforms
from nflows.flows import Flow
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from nflows_mongeampere import (
    AutogradPotential,
    Bumps,
    DeepPotential,
    MongeAmpereCouplingTransform,
    MongeAmpereFlow,
    MongeAmpereTransform,
    RidgePotential,
    files,
)
from nflows_mongeampere.conftest import POTENTIALS, close, make


def shaken(flow, seed=0):
    """The same flow with every parameter and buffer of the state moved from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return flow


def composite():
    parts = [
        transforms.PointwiseAffineTransform(torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.5)),
        transforms.InverseTransform(transforms.LULinear(3)),
        transforms.RandomPermutation(3),
        transforms.ReversePermutation(3),
        MongeAmpereTransform(
            RidgePotential(3, 5, activation="logcosh", time_dependent=True, bias=False),
            time=2.0,
            steps=3,
            solver="midpoint",
            sensitivity="recompute",
        ),
    ]
    return Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([3]))


def coupled():
    def network(passing, outputs):
        return nn.Sequential(
            *(Bumps(passing, 6, sharpness=2.0), nn.Linear(6, 6), nn.SiLU()),
            *(nn.Dropout(0.5), nn.Linear(6, outputs)),
        )

    parts = [
        MongeAmpereCouplingTransform(
            [1, 0, 1], network, RidgePotential(2, 4, context_features=5), steps=2
        ),
        MongeAmpereCouplingTransform(
            [0, 1, 0],
            network,
            DeepPotential(1, 4, context_features=2),
            unconditional_transform=lambda features: transforms.LULinear(features),
        ),
    ]
    flow = Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([3]))
    return flow.eval()  # for the dropout


FLOWS = {
    "coupled": coupled,
    "flow": lambda: MongeAmpereFlow(3, 8, activation="logcosh", steps=4, solver="euler"),
    "conditional": lambda: MongeAmpereFlow(
        3, 8, context_features=2, embedding_net=nn.Linear(4, 2), time_dependent=True
    ),
    "labels": lambda: MongeAmpereFlow(
        3,
        8,
        context_features=2,
        embedding_net=nn.Sequential(nn.Embedding(5, 4), nn.Softplus(2.0), nn.Linear(4, 2)),
        distribution=distributions.ConditionalDiagonalNormal(
            [3], nn.Sequential(nn.Linear(2, 6), nn.Tanh())
        ),
    ),
    "composite": composite,
    "double": lambda: composite().double(),
    "parts": lambda: (lambda f: Flow(f._transform, f._distribution))(MongeAmpereFlow(3, 8)),
    "logit": lambda: Flow(
        transforms.CompositeTransform(
            [transforms.Logit(), MongeAmpereTransform(RidgePotential(3, 4))]
        ),
        distributions.DiagonalNormal([3]),
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_round_trip(name, tmp_path):
    flow = shaken(FLOWS[name]())
    path = tmp_path / "flow.safetensors"
    files.save(flow, path)
    loaded = files.load(path).train(flow.training)
    assert type(loaded) is type(flow)
    assert repr(loaded) == repr(flow)
    x = torch.rand(6, 3, dtype=next(flow.parameters()).dtype)
    contexts = {"conditional": torch.randn(6, 4), "labels": torch.arange(6) % 5}
    context = contexts.get(name)
    assert torch.equal(loaded.log_prob(x, context), flow.log_prob(x, context))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", POTENTIALS)
def test_every_potential_follows_from_its_arguments(name, tmp_path):
    potential, x, context = make(name)
    transform = MongeAmpereTransform(potential, time=0.7, steps=3, solver="midpoint")
    path = tmp_path / "flow"
    if "network" in name:
        with pytest.raises(TypeError, match=r"potential is a .*AutogradPotential|module is a"):
            files.save(transform, path)
        return
    files.save(transform, path)
    loaded = files.load(path)
    assert repr(loaded) == repr(transform)
    for ours, theirs in zip(loaded(x, context), transform(x, context), strict=True):
        close(ours, theirs, 1e-13)  # lattices as small as these move by products


def test_chosen_steps_are_saved(tmp_path):
    transform = shaken(MongeAmpereTransform(RidgePotential(3, 8)))
    choice = transform.choose_steps(torch.randn(20, 3), 1e-3)
    files.save(transform, tmp_path / "t")
    loaded = files.load(tmp_path / "t")
    assert (loaded.steps, loaded.tolerance) == (choice.steps, 1e-3)
    transform = MongeAmpereTransform(RidgePotential(3, 8), steps=2)
    transform.steps = 5  # by a training, say
    files.save(transform, tmp_path / "t")
    assert files.load(tmp_path / "t").steps == 5


def test_file_holds_tensors_and_plain_data_alone(tmp_path):
    files.save(composite(), tmp_path / "t")
    with safe_open(tmp_path / "t", framework="pt") as archive:
        metadata = archive.metadata()
    assert metadata["format"] == "nflows-mongeampere"
    description = json.loads(metadata["flow"])
    assert description["class"] == "Flow"
    first = description["arguments"]["transform"]["arguments"]["transforms"][0]
    assert first == {"class": "PointwiseAffineTransform", "arguments": {"shape": [3], "scale": []}}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: AutogradPotential(nn.LayerNorm(2)), r"module is a .*LayerNorm"),
        (lambda: MongeAmpereFlow(3, 4, embedding_net=nn.Sequential(nn.GELU())), r"net.*0\].*GELU"),
        (lambda: nn.Linear, "flow: got <class"),
        (lambda: nn.GELU(), "flow: GELU is a"),
    ],
)
def test_what_cannot_be_described(part, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        files.save(part(), tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_solver_instance_cannot_be_described(tmp_path):
    from torchdyn.numerics.solvers.ode import RungeKutta4

    with pytest.raises(TypeError, match=r"solver is a .*RungeKutta4"):
        files.save(MongeAmpereFlow(3, 4, solver=RungeKutta4()), tmp_path / "t")


def test_subclass_is_not_taken_for_its_base(tmp_path):
    named_alike = type("RidgePotential", (RidgePotential,), {})
    with pytest.raises(TypeError, match="RidgePotential, which cannot be described"):
        files.save(named_alike(2, 2), tmp_path / "t")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: there is no file .*nowhere"):
        files.load(tmp_path / "nowhere")


@pytest.fixture
def saved(tmp_path):
    """A file, and a function that writes it again with other metadata and tensors."""
    path = tmp_path / "flow"
    files.save(MongeAmpereFlow(3, 4), path)
    with safe_open(path, framework="pt") as archive:
        metadata = archive.metadata()

    def rewrite(tensors=None, **changes):
        merged = {key: value for key, value in (metadata | changes).items() if value is not None}
        save_file(load_file(path) if tensors is None else tensors, path, merged)
        return path

    return rewrite


def test_truncated_file(saved):
    path = saved()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"path: .* is damaged"):
        files.load(path)


def test_pickle_is_not_opened(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "t")
    with pytest.raises(ValueError, match="no safetensors file"):
        files.load(tmp_path / "t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "was not written by"),
        ({"format": None}, "was not written by"),
        ({"format_version": "3", "package_version": "9.9"}, "format version 3.* 9.9"),
        ({"flow": "{"}, "do not fit together"),
        ({"flow": '{"class": "os.system", "arguments": {"command": "true"}}'}, "unknown class"),
        ({"flow": '{"class": "RidgePotential", "arguments": {"features": 3}}'}, "hidden_features"),
        ({"flow": "[]"}, "do not fit together"),
        ({"flow": None}, "do not fit together"),
        ({"dtype": "int8"}, "do not fit together"),
    ],
)
def test_foreign_or_damaged_description(saved, changes, message):
    with pytest.raises(ValueError, match=rf"^path: .*{message}"):
        files.load(saved(**changes))


def test_tensors_of_another_shape(saved):
    path = saved()
    tensors = load_file(path)
    tensors["_transform.potential.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match="bias"):
        files.load(saved(tensors))


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "flow"
    files.save(MongeAmpereFlow(3, 4), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="no space"):
        files.save(MongeAmpereFlow(3, 4), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_the_longest_names_there_are(name, tmp_path):
    files.save(MongeAmpereFlow(3, 4), tmp_path / name)
    assert isinstance(files.load(tmp_path / name), MongeAmpereFlow)
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_two_that_write_at_once_do_not_mix(tmp_path, monkeypatch):
    path, replace = tmp_path / "flow", Path.replace

    def interrupted(partial, target):
        monkeypatch.setattr("pathlib.Path.replace", replace)
        files.write(path, "second")
        assert path.read_text() == "second"
        return replace(partial, target)

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    files.write(path, "first")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", [lambda path: files.save(FLOWS["flow"](), path), files.load])
@pytest.mark.parametrize(
    ("path", "error"),
    [
        (None, TypeError),
        (3, TypeError),
        ("", ValueError),
        ("a\x00b", ValueError),
        ("x" * 300, ValueError),
        ("/nowhere/at/all", FileNotFoundError),
    ],
)
def test_bad_path(call, path, error):
    with pytest.raises(error, match=r"^path: "):
        call(path)


def test_directory_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"^path: .* is a directory"):
        files.save(FLOWS["flow"](), tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda flow: flow.half(), TypeError),
        (lambda flow: flow._transform.potential.weight.data.double(), None),
        (lambda flow: flow.to("meta"), ValueError),
    ],
)
def test_parameters_that_a_file_would_change(change, error, tmp_path):
    flow = FLOWS["flow"]()
    changed = change(flow)
    if error is None:  # one of another precision
        flow._transform.potential.weight = nn.Parameter(changed)
    with pytest.raises(error or TypeError, match=r"^flow: got parameters"):
        files.save(flow, tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_header_without_a_version(tmp_path):
    save_file({}, tmp_path / "t", {"format": "nflows-mongeampere"})
    with pytest.raises(ValueError, match=r"^path: .* format version None"):
        files.load(tmp_path / "t")
