"""What builds an object again: its class and the arguments of its constructor."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


class Configured:
    """Something that remembers how it was built.

    Each argument of the constructor is kept as an attribute of the same name, as scikit-learn's
    estimators do it; ``repr`` and :mod:`~nflows_mongeampere.files` follow from that. A class whose
    attributes have other names overrides :meth:`arguments`.
    """

    def arguments(self) -> dict[str, Any]:
        """The arguments that build an object like this one, without what it has learnt."""
        given = [*inspect.signature(type(self).__init__).parameters.values()][1:]
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {p.name: getattr(self, p.name) for p in given if p.kind not in several}

    def extra_repr(self) -> str:
        """The arguments that are not modules, which PyTorch shows by itself."""
        shown = {k: v for k, v in self.arguments().items() if not isinstance(v, nn.Module)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
