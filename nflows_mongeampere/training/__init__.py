"""Training of any nflows or normflows flow by Lightning: resumable, bounded in time, guarded."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nflows_mongeampere.training.batches import EndlessBatches, endless
    from nflows_mongeampere.training.callbacks import BudgetBar, History, SolverGuard
    from nflows_mongeampere.training.checkpoints import restore
    from nflows_mongeampere.training.divergence import DivergenceError, DivergenceGuard
    from nflows_mongeampere.training.fitting import fit
    from nflows_mongeampere.training.matching import FlowMatching
    from nflows_mongeampere.training.objectives import MaximumLikelihood, Objective, ReverseKL
    from nflows_mongeampere.training.optimizers import FullMatrixSOAP

__all__ = [
    "BudgetBar",
    "DivergenceError",
    "DivergenceGuard",
    "EndlessBatches",
    "FlowMatching",
    "FullMatrixSOAP",
    "History",
    "MaximumLikelihood",
    "Objective",
    "ReverseKL",
    "SolverGuard",
    "endless",
    "fit",
    "restore",
]

_MODULES = {
    "batches": ("EndlessBatches", "endless"),
    "callbacks": ("BudgetBar", "History", "SolverGuard"),
    "divergence": ("DivergenceError", "DivergenceGuard"),
    "checkpoints": ("restore",),
    "fitting": ("fit",),
    "matching": ("FlowMatching",),
    "objectives": ("MaximumLikelihood", "Objective", "ReverseKL"),
    "optimizers": ("FullMatrixSOAP",),
}


def __getattr__(name: str) -> Any:
    """Import a name where it is first used: Lightning takes seconds, and loads Matplotlib."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
