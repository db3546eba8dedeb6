"""Flows in files: tensors and a plain-data description of how the flow is built, nothing else.

A file is a `safetensors <https://huggingface.co/docs/safetensors>`_ archive, a format that holds
tensors and strings and cannot hold code. The description, JSON in its header, names classes from
the list below and their arguments; loading builds those and no others.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nflows import distributions, flows, transforms
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from nflows_mongeampere import potentials, validation
from nflows_mongeampere.atomic import write as write  # for those who write beside a flow
from nflows_mongeampere.coupling import Bumps, MongeAmpereCouplingTransform
from nflows_mongeampere.flow import MongeAmpereFlow, Noise
from nflows_mongeampere.groups import Group
from nflows_mongeampere.lattices import LatticeFlow
from nflows_mongeampere.tabular import Bounded, NormalMixture, SinhArcsinh, Table
from nflows_mongeampere.transform import MongeAmpereTransform
from nflows_mongeampere.version import __version__

FORMAT = "nflows-mongeampere"
FORMAT_VERSION = 2

Arguments = dict[str, Any]


def save(flow: nn.Module, path: str | Path) -> None:
    """Write a flow, with its configuration, to a file.

    Args:
        flow: a flow, transform or potential of this package, or a flow or transform of nflows
            composed of these and of transforms in :data:`KNOWN`.
        path: where to; an existing file is replaced, atomically.

    Raises:
        TypeError: if some part of the flow cannot be described as plain data, or if its parameters
            are not all float32 or all float64.
        ValueError: if the parameters are on the meta device, or the path is no place for a file.
        FileNotFoundError: if there is no such directory.
    """
    validation.kind("flow", flow, isinstance(flow, nn.Module), "a flow, transform or potential")
    description = json.dumps(_describe(flow, type(flow).__name__))
    dtype = _dtype(flow)
    target = _path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: there is no directory {target.parent}")
    if target.is_dir():
        raise ValueError(f"path: {target} is a directory, expected a file")
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "package_version": __version__,
        "dtype": dtype,
        "flow": description,
    }
    # clones, because safetensors refuses tensors that share memory
    tensors = {name: t.detach().cpu().clone() for name, t in flow.state_dict().items()}
    write(target, serialize(tensors, metadata))


def load(path: str | Path) -> nn.Module:
    """Build the flow that :func:`save` wrote, on the CPU.

    Nothing in the file is executed, so that it may come from anywhere.

    Args:
        path: the file.

    Returns:
        A flow with the same configuration and the same numbers.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, of another kind, from a newer version, or if its tensors
            do not fit its description.
    """
    target = _path(path)
    if not target.is_file():
        raise FileNotFoundError(f"path: there is no file {target}")
    try:
        with safe_open(target, framework="pt") as archive:
            metadata = archive.metadata() or {}
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"path: {target} is damaged or no safetensors file ({error}); save the flow again with "
            "nflows_mongeampere.files.save"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"path: {target} was not written by nflows_mongeampere.files.save; load its tensors "
            "with safetensors and build the flow in code"
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"path: {target} has format version {metadata.get('format_version')}, written by "
            f"nflows-mongeampere {metadata.get('package_version')}; this is {__version__}, which "
            f"reads version {FORMAT_VERSION}: install the version that wrote it"
        )
    try:
        flow: nn.Module = _build(json.loads(metadata["flow"]))
        flow.to(_DTYPES[metadata["dtype"]]).load_state_dict(tensors)
    except Exception as error:  # whatever a constructor says to arguments from anywhere
        raise ValueError(
            f"path: the description and the tensors in {target} do not fit together: {error}"
        ) from error
    return flow


def _path(path: object) -> Path:
    try:
        target = Path(path)  # type: ignore[arg-type]
        if not target.name:
            raise ValueError("no name of a file")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.stat()  # raises for names that the file system cannot hold
    except TypeError as error:
        raise TypeError(f"path: got {path!r}, expected a str or a pathlib.Path") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"path: got {str(path)[:100]!r}: {error}") from error
    return target


def _dtype(flow: nn.Module) -> str:
    """The name of the dtype that all parameters share."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in flow.parameters()} or {"float32"}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise TypeError(
            f"flow: got parameters of {', '.join(sorted(dtypes))}, expected all of float32 or all "
            "of float64; convert the flow with .to(...)"
        )
    if any(t.is_meta for t in (*flow.parameters(), *flow.buffers())):
        raise ValueError("flow: got parameters on meta, where there are no numbers")
    return dtypes.pop()


def _describe(part: object, place: str) -> object:
    """Plain data from which :func:`_build` makes the same part."""
    if isinstance(part, (str, int, float, bool, type(None))):
        return part
    if isinstance(part, (list, tuple, nn.ModuleList)):
        return [_describe(p, f"{place}[{i}]") for i, p in enumerate(part)]
    name = type(part).__name__
    if KNOWN.get(name, (None,))[0] is not type(part):
        raise TypeError(
            f"flow: {place} is a {type(part).__module__}.{name}, which cannot be described as "
            f"plain data; known are {', '.join(sorted(KNOWN))}; save its state_dict()"
        )
    arguments = KNOWN[name][1](part)
    return {
        "class": name,
        "arguments": {key: _describe(value, f"{place}.{key}") for key, value in arguments.items()},
    }


def _build(description: Any) -> Any:
    if isinstance(description, list):
        return [_build(d) for d in description]
    if isinstance(description, dict):
        name = description["class"]
        if name not in KNOWN:
            raise ValueError(f"unknown class {name!r}")
        arguments = {key: _build(value) for key, value in description["arguments"].items()}
        return _CONSTRUCTORS.get(name, KNOWN[name][0])(**arguments)
    return description


def _flow(f: flows.Flow) -> Arguments:
    embedding = None if isinstance(f._embedding_net, nn.Identity) else f._embedding_net
    return {
        "transform": f._transform,
        "distribution": f._distribution,
        "embedding_net": embedding,
    }


def _spline(t: Any) -> Arguments:
    names = ("tails", "tail_bound", "min_bin_width", "min_bin_height", "min_derivative")
    shape = t.unnormalized_widths.shape
    return {
        "shape": list(shape[:-1]),
        "num_bins": shape[-1],
        **{name: getattr(t, name) for name in names},
    }


def _affine(t: Any) -> Arguments:
    return {"shape": list(t._shift.shape), "scale": list(t._scale.shape)}


def _features(m: Any) -> Arguments:
    return {"features": m.features}


def _conditional_normal(d: Any) -> Arguments:
    return {"shape": list(d._shape), "context_encoder": d._context_encoder}


def _coupling(t: MongeAmpereCouplingTransform) -> Arguments:
    moving = set(t.transform_features.tolist())
    return {
        "mask": [int(i in moving) for i in range(t.features)],
        "network": t.transform_net.network,
        "transform": t.transform,
        "unconditional": t.unconditional_transform,
    }


def _build_coupling(
    mask: list[int],
    network: nn.Module,
    transform: MongeAmpereTransform,
    unconditional: nn.Module | None,
) -> MongeAmpereCouplingTransform:
    return MongeAmpereCouplingTransform(
        mask,
        lambda *_: network,
        unconditional_transform=None if unconditional is None else lambda **_: unconditional,
        **transform.arguments(),
    )


def _embedding(m: nn.Embedding) -> Arguments:
    names = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type")
    return {name: getattr(m, name) for name in names}


def _linear(m: nn.Linear) -> Arguments:
    return {
        "in_features": m.in_features,
        "out_features": m.out_features,
        "bias": m.bias is not None,
    }


# Ours know the arguments that build them.
OURS: tuple[type, ...] = (
    *(getattr(potentials, name) for name in potentials.__all__),
    Group,
    Bumps,
    MongeAmpereTransform,
    MongeAmpereFlow,
    Bounded,
    SinhArcsinh,
    NormalMixture,
    Table,
    LatticeFlow,
)

# Each class that a file may name, and the arguments that build one like a given instance.
KNOWN: dict[str, tuple[type, Callable[[Any], Arguments]]] = {
    cls.__name__: (cls, arguments)
    for cls, arguments in (
        *((ours, lambda p: p.arguments()) for ours in OURS),
        (MongeAmpereCouplingTransform, _coupling),
        (Noise, lambda d: {"shape": list(d._shape)}),
        (flows.Flow, _flow),
        (distributions.StandardNormal, lambda d: {"shape": list(d._shape)}),
        (distributions.DiagonalNormal, lambda d: {"shape": list(d._shape)}),
        (distributions.ConditionalDiagonalNormal, _conditional_normal),
        (transforms.CompositeTransform, lambda t: {"transforms": list(t._transforms)}),
        (transforms.InverseTransform, lambda t: {"transform": t._transform}),
        (transforms.IdentityTransform, lambda t: {}),
        (transforms.LULinear, lambda t: {"features": t.features, "eps": t.eps}),
        (transforms.NaiveLinear, _features),
        (transforms.ActNorm, lambda t: {"features": len(t.shift)}),
        (transforms.Sigmoid, lambda t: {"eps": t.eps}),
        (transforms.Logit, lambda t: {"eps": t._transform.eps}),
        (transforms.PointwiseAffineTransform, _affine),
        (transforms.PiecewiseRationalQuadraticCDF, _spline),
        (transforms.Permutation, lambda t: {"features": len(t._permutation), "dim": t._dim}),
        (transforms.RandomPermutation, lambda t: {"features": len(t._permutation), "dim": t._dim}),
        (transforms.ReversePermutation, lambda t: {"features": len(t._permutation), "dim": t._dim}),
        (nn.Linear, _linear),
        (nn.Embedding, _embedding),
        (nn.Sequential, lambda m: {"modules": list(m)}),
        (nn.Dropout, lambda m: {"p": m.p}),
        (nn.Softplus, lambda m: {"beta": m.beta, "threshold": m.threshold}),
        (nn.ReLU, lambda m: {}),
        (nn.SiLU, lambda m: {}),
        (nn.Tanh, lambda m: {}),
    )
}

# Where the values come with the tensors, only the shape has to be right.
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "Group": Group.generated_by,
    "MongeAmpereCouplingTransform": _build_coupling,
    "PointwiseAffineTransform": lambda shape, scale: transforms.PointwiseAffineTransform(
        torch.zeros(shape), torch.ones(scale)
    ),
    "Sequential": lambda modules: nn.Sequential(*modules),
    "Permutation": lambda features, dim: transforms.Permutation(torch.arange(features), dim),
}

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
