"""Training of any nflows or normflows flow by Lightning: resumable, bounded in time, guarded."""

from nflows_mongeampere.training.batches import EndlessBatches, endless
from nflows_mongeampere.training.callbacks import BudgetBar, History, SolverGuard
from nflows_mongeampere.training.divergence import DivergenceError, DivergenceGuard
from nflows_mongeampere.training.fitting import fit, restore
from nflows_mongeampere.training.objectives import MaximumLikelihood, Objective, ReverseKL

__all__ = [
    "BudgetBar",
    "DivergenceError",
    "DivergenceGuard",
    "EndlessBatches",
    "History",
    "MaximumLikelihood",
    "Objective",
    "ReverseKL",
    "SolverGuard",
    "endless",
    "fit",
    "restore",
]
