"""A density estimator as scikit-learn has them: from a table to scores and samples.

Needs scikit-learn: ``pip install "nflows-mongeampere[sklearn]"``.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nflows.flows import Flow
from nflows.transforms import (
    CompositeTransform,
    IdentityTransform,
    PiecewiseRationalQuadraticCDF,
    PointwiseAffineTransform,
    Transform,
)
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from nflows_mongeampere import files, validation
from nflows_mongeampere.accuracy import MAX_STEPS, AccuracyWarning
from nflows_mongeampere.integration import IntegrationError
from nflows_mongeampere.models import refined
from nflows_mongeampere.potentials import Potential, RidgePotential
from nflows_mongeampere.tabular import Bounded, NormalMixture, SinhArcsinh, Table, whitening
from nflows_mongeampere.transform import MongeAmpereTransform

Array = NDArray[np.float64]

FEWEST_ROWS = 10
TINY_ROWS = 100  # below which one flow has to do
FEW_ROWS = 5000  # up to which marginals and base are chosen
AT_AN_END = 0.02  # the part of the rows at an extreme value from which on it is an end
JUDGED_ROWS, WATCHED_ROWS = 2000, 200  # of the held-out part
EVALUATED_ROWS = 4096  # at once
STEPS, MOST_STEPS = 4, 24  # of the solver, in training
TRAINING_ERROR = 0.01  # of the solver, in nats
PATIENCE = 8  # validations without a better one, after which the training ends
MARGINALS = ("affine", "tails", "splines")
FEW_NORMALS = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # of the base, 20 rows for each
MANY_NORMALS = (32, 64, 96)  # where there are many rows
WIDE = 10.0  # standard deviations of the whole, of a normal for outliers among many rows


def choose_potential(features: int, rows: int, hidden_features: int | None = None) -> Potential:
    """The potential for a table of so many columns and rows."""
    return RidgePotential(features, hidden_features or min(128, max(16, rows // 8)))


def choose_members(rows: int) -> int:
    """How many flows a density is the mean of, each with another part of the rows held out."""
    if rows < TINY_ROWS or rows > FEW_ROWS:
        return 1
    return 5 if rows <= 1000 else 3


class MongeAmpereDensity(DensityMixin, BaseEstimator):
    r"""The density of a table, by a Monge-Ampère flow.

    From a row to noise: each column is scaled, put on the real line if it has ends
    (:class:`~nflows_mongeampere.tabular.Bounded`), and made nearly normal by a monotone function
    (:class:`~nflows_mongeampere.tabular.SinhArcsinh`, then a rational-quadratic spline); a linear
    layer whitens the rows; the flow moves them; the base is a mixture of normals. How flexible the
    functions of the columns are, how many normals there are, and when training ends is chosen on a
    part of the rows that is held out. The start is the mixture of normals, so that training has
    only to gain; among more than 5,000 rows one normal is for outliers. From 100 to 1,000
    rows the density is the mean of five flows, and up to 5,000 of three, each with another part
    held out.

    Columns of integers are fitted with uniform noise of half a unit up and down: the density at an
    integer is about its probability. Samples are rounded.

    Args:
        hidden_features: width of the potential; None for a choice by the number of rows.
        components: normals in the base; None for a choice by the held-out rows, 1 for a single one.
        integers: columns of integers, by name or number; ``"auto"`` for those that hold nothing
            else.
        bounds: the ends of columns, a mapping from name or number to ``(lower, upper)``, either of
            them None where there is none. ``"auto"`` takes an extreme value for an end where at
            least 2 % of the rows have it. Samples stay within, and rows outside have no density.
        validation_fraction: the part of the rows that is held out, at most 2,000 of them.
        max_iter: most steps of the optimiser for each flow; None for two for each row, from 50 to
            600, and for 1,500 where there are more than 5,000 rows.
        learning_rate: of Adam, at its highest, for the potential; a tenth for the other layers.
        weight_decay: of the potential; of more than 5,000 rows a part, 1,000 over their number.
        tolerance: the solver's error, in nats, that log-densities may have on average.
        random_state: of everything that is random.
        verbose: whether a progress bar is shown (by rich).

    Attributes:
        model_: a :class:`~nflows_mongeampere.tabular.Table`, with the flow of nflows in it.
        columns_: for each column its name, whether it holds integers, and its ends.
        n_iter_: for each flow the steps of the optimiser after which its held-out rows were most
            likely.
        held_out_score_: their mean log-density then.
        solver_error_: mean error of their log-densities, in nats.
        n_features_in_, feature_names_in_: as scikit-learn has them.

    Example:
        >>> import numpy as np
        >>> from nflows_mongeampere.sklearn import MongeAmpereDensity
        >>> rng = np.random.default_rng(0)
        >>> table = np.stack([rng.lognormal(size=80), rng.poisson(3, size=80)], axis=1)
        >>> density = MongeAmpereDensity(max_iter=20, random_state=0).fit(table)
        >>> density.score_samples(table[:5]).shape, density.sample(3).shape
        ((5,), (3, 2))
        >>> [column.integer for column in density.columns_]
        [False, True]
    """

    def __init__(
        self,
        *,
        hidden_features: int | None = None,
        components: int | None = None,
        integers: str | Sequence[int | str] = "auto",
        bounds: str | Mapping[int | str, tuple[float | None, float | None]] = "auto",
        validation_fraction: float = 0.2,
        max_iter: int | None = None,
        learning_rate: float = 1e-2,
        weight_decay: float = 0.1,
        tolerance: float = 1e-3,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.hidden_features = hidden_features
        self.components = components
        self.integers = integers
        self.bounds = bounds
        self.validation_fraction = validation_fraction
        self.max_iter = max_iter
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.tolerance = tolerance
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: object = None) -> MongeAmpereDensity:
        """Fit the density.

        Args:
            X: numbers, shape (N, D), in NumPy or pandas.
            y: ignored.

        Raises:
            ValueError: for missing values, text, constant columns, too few rows, or arguments that
                do not fit.

        Warns:
            AccuracyWarning: where the solver does not reach the tolerance.
        """
        return self._fit(X)

    def _fit(self, X: ArrayLike, names: Sequence[str] | None = None) -> MongeAmpereDensity:
        """Fit, with names for the columns of an array, which has none."""
        settings = self._settings()
        table: Array = validate_data(self, X, dtype=np.float64, ensure_min_samples=FEWEST_ROWS)
        if names is None:
            names = getattr(self, "feature_names_in_", [f"x{i}" for i in range(table.shape[1])])
        columns = self._describe_columns(table, [str(name) for name in names])
        random = check_random_state(self.random_state)
        with _seeded(int(random.randint(2**31))), _Progress(self.verbose) as progress:
            fitted = _Fit(columns, settings, progress).run(table)
        self.model_, self.columns_ = fitted.table, columns
        self.n_iter_ = fitted.iterations
        self.held_out_score_ = fitted.held_out
        self.solver_error_ = fitted.solver_error
        self.model_.description = json.dumps(self._told())
        if not fitted.solver_error <= settings.tolerance:
            warnings.warn(
                f"log-densities are off by about {fitted.solver_error:.2g} nats, more than "
                f"tolerance={settings.tolerance:g}: raise weight_decay, or lower learning_rate",
                AccuracyWarning,
                stacklevel=3,
            )
        return self

    def score_samples(self, X: ArrayLike) -> Array:
        """The log-density of each row, in nats and in the units of the table, shape (N,)."""
        table = self._check(X)
        with torch.no_grad():
            parts = torch.tensor(table).split(EVALUATED_ROWS)
            log_prob: Array = torch.cat([self.model_.log_prob(part) for part in parts]).numpy()
        return log_prob

    def score(self, X: ArrayLike, y: object = None) -> float:
        """The mean log-density of the rows, as ``GaussianMixture.score``."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> Array:
        """Rows drawn from the density, shape (n_samples, D)."""
        check_is_fitted(self)
        n_samples = validation.integer("n_samples", n_samples)
        random = check_random_state(self.random_state)
        with _seeded(int(random.randint(2**31))), torch.no_grad():
            samples: Array = self.model_.sample(n_samples, EVALUATED_ROWS).numpy()
        return samples

    def save(self, path: str | Path) -> None:
        """Write the estimator to a file that holds no code (:mod:`nflows_mongeampere.files`)."""
        check_is_fitted(self)
        files.save(self.model_, path)

    @classmethod
    def load(cls, path: str | Path) -> MongeAmpereDensity:
        """Read what :meth:`save` wrote, also in another process.

        Raises:
            ValueError: if the file is damaged or holds something else.
            FileNotFoundError: if there is none.
        """
        model = files.load(path)
        if not isinstance(model, Table):
            raise ValueError(f"path: {path} holds a {type(model).__name__}, expected a table")
        return cls._of(model)

    @classmethod
    def _of(cls, model: Table) -> MongeAmpereDensity:
        told = json.loads(model.description)
        parameters = told["parameters"]
        if parameters["bounds"] != "auto":  # JSON has no numbers for keys
            parameters["bounds"] = {int(i): tuple(ends) for i, ends in parameters["bounds"].items()}
        self = cls(**parameters)
        self.model_, self.columns_ = model, [Column(**column) for column in told["columns"]]
        self.n_features_in_ = len(self.columns_)
        if told["named"]:
            self.feature_names_in_ = np.array([c.name for c in self.columns_], dtype=object)
        self.n_iter_, self.held_out_score_ = told["iterations"], told["held_out"]
        self.solver_error_ = told["solver_error"]
        return self

    def _settings(self) -> _Settings:
        hidden, parts, most = self.hidden_features, self.components, self.max_iter
        held_out = validation.positive("validation_fraction", self.validation_fraction)
        if held_out > 0.5:
            raise ValueError(f"validation_fraction: got {held_out:g}, expected at most 0.5")
        return _Settings(
            validation.optional_integer("hidden_features", hidden),
            validation.optional_integer("components", parts),
            held_out,
            validation.optional_integer("max_iter", most, minimum=0),
            validation.positive("learning_rate", self.learning_rate),
            validation.number("weight_decay", self.weight_decay, minimum=0),
            validation.positive("tolerance", self.tolerance),
        )

    def _told(self) -> dict[str, Any]:
        """What a file says of the estimator, as plain data."""
        parameters = self.get_params()
        if not isinstance(self.random_state, (int, type(None))):
            parameters["random_state"] = None
        if self.integers != "auto":
            parameters["integers"] = [i for i, c in enumerate(self.columns_) if c.integer]
        if self.bounds != "auto":
            ends = {i: (c.lower, c.upper) for i, c in enumerate(self.columns_)}
            parameters["bounds"] = {i: pair for i, pair in ends.items() if pair != (None, None)}
        return {
            "parameters": parameters,
            "columns": [vars(column) for column in self.columns_],
            "named": hasattr(self, "feature_names_in_"),
            "iterations": self.n_iter_,
            "held_out": self.held_out_score_,
            "solver_error": self.solver_error_,
        }

    def _describe_columns(self, table: Array, names: list[str]) -> list[Column]:
        """What each column holds, as declared or detected."""
        still = [name for name, values in zip(names, table.T, strict=True) if np.ptp(values) == 0]
        if still:
            raise ValueError(
                f"X: columns {', '.join(still)} are constant, expected columns that vary; leave "
                "them out, since one number has no density"
            )
        if isinstance(self.integers, str):
            validation.choice("integers", self.integers, ["auto"])
            whole = [bool((values == values.round()).all()) for values in table.T]
        else:
            declared = {_number("integers", column, names) for column in self.integers}
            whole = [i in declared for i in range(len(names))]
        columns = [Column(name, integer) for name, integer in zip(names, whole, strict=True)]
        if isinstance(self.bounds, str):
            validation.choice("bounds", self.bounds, ["auto"])
            return [_with_ends(c, values) for c, values in zip(columns, table.T, strict=True)]
        for key, (lower, upper) in self.bounds.items():
            i = _number("bounds", key, names)
            ends = (-math.inf if lower is None else lower, math.inf if upper is None else upper)
            if not ends[0] <= table[:, i].min() <= table[:, i].max() <= ends[1]:
                raise ValueError(
                    f"bounds: got {(lower, upper)} for {names[i]}, whose values are from "
                    f"{table[:, i].min():g} to {table[:, i].max():g}, expected ends around them"
                )
            columns[i] = replace(columns[i], lower=lower, upper=upper)
        return columns

    def _check(self, X: ArrayLike) -> Array:
        check_is_fitted(self)
        table: Array = validate_data(self, X, dtype=np.float64, reset=False)
        return table


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
        name: of the column, ``x0``, ``x1``, ... where the table has no names.
        integer: whether its values are integers.
        lower, upper: its ends, or None.
    """

    name: str
    integer: bool = False
    lower: float | None = None
    upper: float | None = None

    def margin(self, scale: float) -> float:
        """How far beyond the ends there is density, so that values may lie on them."""
        return 0.5 if self.integer else 1e-3 * scale


def _number(argument: str, column: int | str, names: list[str]) -> int:
    """The number of a column that is given by name or number."""
    if isinstance(column, str):
        if column not in names:
            raise ValueError(f"{argument}: got {column!r}, expected one of {', '.join(names)}")
        return names.index(column)
    number = validation.integer(argument, column, minimum=0)
    if number >= len(names):
        raise ValueError(f"{argument}: got column {number}, expected less than {len(names)}")
    return number


def _with_ends(column: Column, values: Array) -> Column:
    """The column with the extreme values that many rows have."""
    lowest, highest = float(values.min()), float(values.max())
    enough = max(3.0, AT_AN_END * len(values))
    return replace(
        column,
        lower=lowest if (values == lowest).sum() >= enough else None,
        upper=highest if (values == highest).sum() >= enough else None,
    )


@dataclass(frozen=True)
class _Settings:
    """The arguments of the estimator, checked."""

    hidden_features: int | None
    components: int | None
    validation_fraction: float
    max_iter: int | None
    learning_rate: float
    weight_decay: float
    tolerance: float


@dataclass
class _Fitted:
    table: Table
    iterations: list[int]
    held_out: float
    solver_error: float


class _Progress:
    """One bar for a whole fit, or none."""

    def __init__(self, visible: bool) -> None:
        self._bar: Any = None
        self.part = 0.0, 1.0  # where what is under way begins, and its length
        if validation.boolean("verbose", visible):
            from rich.progress import Progress, TextColumn

            self._bar = Progress(*Progress.get_default_columns(), TextColumn("{task.fields[told]}"))
            self._task = self._bar.add_task("fit", total=1.0, told="")

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: float, told: str) -> None:
        """How much of the part that is under way is done."""
        if self._bar is not None:
            first, length = self.part
            self._bar.update(self._task, completed=first + done * length, told=told)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch draws from a seed within, and goes on after as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class _Layers(nn.Module):
    """The layers behind the scaling, in the order from a row to noise."""

    def __init__(self, ends: Bounded, features: int, kind: str, rows: int) -> None:
        super().__init__()
        self.ends: Transform = ends
        self.tails: Transform = IdentityTransform() if kind == "affine" else SinhArcsinh(features)
        self.splines: Transform = IdentityTransform()
        if kind == "splines":
            self.splines = PiecewiseRationalQuadraticCDF(
                [features],
                num_bins=8 if rows < FEW_ROWS else 24,
                tails="linear",
                tail_bound=5.0,
                identity_init=True,
                min_bin_width=1e-4,
                min_bin_height=1e-4,
                min_derivative=1e-4,
            )
        self.linear: Transform = IdentityTransform()
        self.flow: Transform = IdentityTransform()
        self.base: Any = NormalMixture(features, 1)

    def marginal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The columns, each made nearly normal."""
        return self._through(x, [self.ends, self.tails, self.splines])

    def white(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What reaches the flow."""
        return self._through(x, [self.ends, self.tails, self.splines, self.linear])

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of scaled rows."""
        z, logabsdet = self.white(x)
        z, of_flow = self.flow(z)
        log_prob: Tensor = self.base.log_prob(z) + logabsdet + of_flow
        return log_prob

    def bending(self) -> Tensor:
        """How far the splines are from straight: minus a log-prior, up to a constant."""
        if not isinstance(self.splines, PiecewiseRationalQuadraticCDF):
            return torch.zeros(())
        parts = (self.splines.unnormalized_widths, self.splines.unnormalized_heights)
        straight = math.log(math.expm1(1 - self.splines.min_derivative))
        slopes = (self.splines.unnormalized_derivatives - straight).square().sum()
        bins = [(p - p.mean(-1, keepdim=True)).square().sum() for p in parts]
        bending: Tensor = slopes + bins[0] + bins[1]
        return bending

    def _through(self, x: Tensor, layers: Sequence[Transform]) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in layers:
            x, logabsdet = layer(x)
            total = total + logabsdet
        return x, total


class _Fit:
    """One fit, from the scaling of the columns to the steps of the solver."""

    def __init__(self, columns: Sequence[Column], settings: _Settings, progress: _Progress) -> None:
        self.columns, self.settings, self.progress = columns, settings, progress
        self.mixed: bool | None = None  # whether a base of several normals is the better start

    def run(self, table: Array) -> _Fitted:
        """Choose by the held-out rows, and fit."""
        self._scale(table)
        rows = torch.as_tensor((table - self.centre) / self.unit, dtype=torch.float32)
        held = max(2, min(round(self.settings.validation_fraction * len(rows)), JUDGED_ROWS))
        order, members = torch.randperm(len(rows)), choose_members(len(rows))
        flows, iterations, scores, errors = [], [], [], []
        for member in range(members):
            shifted = order.roll(-member * held)
            judged, taught = self._noisy(rows[shifted[:held]]), rows[shifted[held:]]
            self.progress.part = member / members, 1 / members
            layers, reached, score = self._member(taught, judged)
            flows.append(self._assemble(layers))
            iterations.append(reached)
            scores.append(score - float(np.log(self.unit).sum()))
            errors.append(self._choose_steps(flows[-1], judged))
        lower = [-math.inf if c.lower is None else float(c.lower) for c in self.columns]
        upper = [math.inf if c.upper is None else float(c.upper) for c in self.columns]
        model = Table(flows, [column.integer for column in self.columns], lower, upper)
        return _Fitted(model, iterations, float(np.mean(scores)), float(np.mean(errors)))

    def _member(self, taught: Tensor, judged: Tensor) -> tuple[_Layers, int, float]:
        """One flow, from its base of normals or from a single one.

        Of few rows the first flow is trained from both; the others follow the better one.
        """
        layers = self._start(taught, judged)
        single = NormalMixture(taught.shape[1], 1).float()
        if self.mixed is False:
            layers.base = single
        bases = [layers.base]
        if self.mixed is None and TINY_ROWS <= len(taught) <= FEW_ROWS:
            bases.append(single)
        found, part = [], self.progress.part
        for number, base in enumerate(bases):
            start = copy.deepcopy(layers)
            start.base = base
            self.progress.part = part[0] + part[1] * number / len(bases), part[1] / len(bases)
            found.append(self._train(start, taught, judged))
        best = max(range(len(found)), key=lambda i: found[i][2])
        self.mixed = best == 0
        return found[best]

    def _limit(self, rows: int) -> int:
        given = self.settings.max_iter
        most = 600 if rows <= FEW_ROWS else 1500
        return min(most, max(50, 2 * rows)) if given is None else given

    def _scale(self, table: Array) -> None:
        """Median and spread of the columns, and what follows in units of the spread."""
        self.centre = np.median(table, axis=0)
        low, high = np.quantile(table, [0.16, 0.84], axis=0)
        deviation = table.std(axis=0)
        spread = (high - low) / 2
        self.unit = np.where(spread > 0.05 * deviation, spread, deviation)
        lower, upper = [], []
        for column, centre, unit in zip(self.columns, self.centre, self.unit, strict=True):
            ends, margin = (column.lower, column.upper), column.margin(unit)
            lower.append(-math.inf if ends[0] is None else (ends[0] - margin - centre) / unit)
            upper.append(math.inf if ends[1] is None else (ends[1] + margin - centre) / unit)
        self.lower, self.upper = lower, upper
        whole = np.array([column.integer for column in self.columns])
        self.noise = torch.as_tensor(np.where(whole, 1 / self.unit, 0.0), dtype=torch.float32)

    def _noisy(self, rows: Tensor) -> Tensor:
        """Rows with their integers spread over intervals of one."""
        if not bool(self.noise.any()):
            return rows
        # a little less than half a unit, so that rounding keeps them within the ends
        return rows + 0.9999 * (torch.rand_like(rows) - 0.5) * self.noise

    def _start(self, taught: Tensor, judged: Tensor) -> _Layers:
        """Marginals, linear layer and base, by closed forms and by EM."""
        found: list[tuple[float, _Layers]] = []
        many = len(taught) > FEW_ROWS
        for kind in ("affine", "splines") if many else MARGINALS:
            layers = self._marginals(taught, kind)
            self._whiten(layers, taught)
            if many:  # atoms of a column are better left to narrow normals than to a spline
                self._enrich(layers, taught, judged, MANY_NORMALS[:1])
            value = self._mean(layers, judged)
            found.append((value if math.isfinite(value) else -math.inf, layers))
        layers = max(found, key=lambda one: one[0])[1]
        few = [k for k in FEW_NORMALS if 20 * k <= len(taught)]
        self._enrich(layers, taught, judged, MANY_NORMALS[1:] if many else few)
        if many:
            layers.base = _with_outliers(layers.base, 1 / len(taught)).float()
        return layers

    def _marginals(self, taught: Tensor, kind: str) -> _Layers:
        """Functions of the columns, by maximum likelihood of each for itself."""
        features = taught.shape[1]
        layers = _Layers(Bounded(self.lower, self.upper), features, kind, len(taught)).float()
        with torch.no_grad():
            inside, _ = layers.ends(self._noisy(taught))
            if isinstance(layers.tails, SinhArcsinh):
                part = inside[: 4 * FEW_ROWS]
                layers.tails.location.copy_(part.median(0).values)
                low, high = part.quantile(torch.tensor([0.16, 0.84]), dim=0)
                layers.tails.log_scale.copy_(((high - low) / 2).clamp(min=0.05).log())
        learnt = [p for part in (layers.tails, layers.splines) for p in part.parameters()]
        if not learnt:
            return layers
        optimizer, steps = torch.optim.Adam(learnt, lr=3e-2), 150 if len(taught) > 300 else 60
        batch = 2000 if len(taught) <= FEW_ROWS else 1000
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 3e-2 * (1 - 0.8 * step / steps)
            x = taught[torch.randint(len(taught), (batch,))] if len(taught) > batch else taught
            z, logabsdet = layers.marginal(self._noisy(x))
            loss = (0.5 * z.square().sum(1) - logabsdet).mean()
            loss = loss + layers.bending() / len(taught)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learnt, 10.0 * taught.shape[1])
            optimizer.step()
        return layers

    @torch.no_grad()
    def _whiten(self, layers: _Layers, taught: Tensor) -> None:
        """The linear layer, from a covariance that is shrunk where rows are few."""
        z, _ = layers.marginal(self._noisy(taught[: 10 * FEW_ROWS]))
        covariance = LedoitWolf().fit(z.double().numpy()).covariance_
        mean = z.double().mean(0)
        layers.linear = whitening(mean, torch.as_tensor(covariance).reshape(len(mean), -1)).float()

    @torch.no_grad()
    def _enrich(
        self, layers: _Layers, taught: Tensor, judged: Tensor, counts: Sequence[int]
    ) -> None:
        """As many normals in the base as the held-out rows ask for, by EM."""
        given = self.settings.components
        if given is not None:
            counts = [given] if given > 1 else []
        z = layers.white(self._noisy(taught[: 4 * FEW_ROWS]))[0].double().numpy()
        aside = layers.white(judged[:JUDGED_ROWS])[0]
        chosen, score = None, float(layers.base.log_prob(aside).mean())
        many, seed = len(z) > FEW_ROWS, int(torch.randint(2**31, ()))
        for covariance in ("full",) if many else ("full", "diag"):
            worse = 0
            for count in counts:
                mixture = GaussianMixture(
                    count,
                    covariance_type=covariance,
                    random_state=seed,
                    max_iter=20 if many else 50,
                    warm_start=many,
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # EM need not end: training goes on
                    value = float(mixture.fit(z).score(aside.double().numpy()))
                if value > score:
                    chosen, score, worse = mixture, value, 0
                else:
                    worse += 1
                if worse == 2:
                    break
        if chosen is None:
            return
        if many and len(counts) > 1:  # the choice was made before EM had ended
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                chosen.set_params(max_iter=60).fit(z)
        layers.base = _base_of(chosen).float()

    def _train(
        self,
        layers: _Layers,
        taught: Tensor,
        judged: Tensor,
    ) -> tuple[_Layers, int, float]:
        """Maximum likelihood of all layers together.

        Returns:
            The layers with the weights that the held-out rows like best, the steps after which they
            had them, and the mean log-density of the held-out rows.
        """
        settings, features = self.settings, taught.shape[1]
        transform = MongeAmpereTransform(
            choose_potential(features, len(taught), settings.hidden_features), steps=STEPS
        )
        layers.flow = transform.float()
        others = [p for name, p in layers.named_parameters() if not name.startswith("flow.")]
        many = len(taught) > FEW_ROWS
        rate = settings.learning_rate
        prior = 1000 / len(taught) if many else 1.0
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [*transform.parameters()],
                    "weight_decay": settings.weight_decay * prior,
                },
                {"params": others, "weight_decay": 0.0},
            ],
            lr=rate,
        )
        best, kept = self._mean(layers, judged), copy.deepcopy(layers.state_dict())
        reached, stale, limit = 0, 0, self._limit(len(taught))
        batch = min(len(taught), 512 if many else 128)
        every = max(10, limit // 24)
        for step in range(1, limit + 1):
            part = step / limit
            factor = min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * part))
            for group, share in zip(optimizer.param_groups, (1.0, 0.1), strict=True):
                group["lr"] = rate * factor * share
            x = self._noisy(taught[torch.randint(len(taught), (batch,))])
            try:
                loss = -layers.log_prob(x).mean() + layers.bending() / len(taught)
            except (IntegrationError, ValueError):
                break  # diverged: the best weights are kept
            if not bool(loss.isfinite()):
                break
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(layers.parameters(), 10.0)
            optimizer.step()
            if step % every == 0 or step == limit:
                self.progress.show(part, f"held out {best - np.log(self.unit).sum():.3f}")
                if not self._guard(layers, transform, judged):
                    break
                value = self._mean(layers, judged)
                if value > best:
                    best, reached, stale = value, step, 0
                    kept = copy.deepcopy(layers.state_dict())
                else:
                    stale += 1
                if stale >= PATIENCE and (part > 0.5 or not many):
                    break
        layers.load_state_dict(kept)
        return layers, reached, best

    @torch.no_grad()
    def _guard(self, layers: _Layers, transform: MongeAmpereTransform, rows: Tensor) -> bool:
        """More steps where training lives off the solver's error; False where none will do."""
        few = rows[:WATCHED_ROWS]
        while True:
            try:
                error = _solver_error(layers, lambda: layers.log_prob(few))
            except (IntegrationError, ValueError):
                error = math.inf
            if error <= TRAINING_ERROR:
                return True
            if transform.steps >= MOST_STEPS:
                return False
            transform.steps = min(MOST_STEPS, math.ceil(1.5 * transform.steps))

    @torch.no_grad()
    def _mean(self, layers: _Layers, judged: Tensor) -> float:
        """The mean log-density of held-out rows at twice the steps; NaN where it fails."""
        few = judged[:JUDGED_ROWS]
        try:
            with refined(layers):
                return float(layers.log_prob(few).double().mean())
        except (IntegrationError, ValueError):
            return math.nan

    def _assemble(self, layers: _Layers) -> Flow:
        """All layers as a flow of nflows over rows in the units of the table, in double."""
        scale = torch.as_tensor(1 / self.unit)
        scaling = PointwiseAffineTransform(-torch.as_tensor(self.centre) * scale, scale)
        ends = [Bounded(self.lower, self.upper)] if self._ends() else []
        parts = [layers.tails, layers.splines, layers.linear, layers.flow]
        parts = [part for part in parts if not isinstance(part, IdentityTransform)]
        return Flow(CompositeTransform([scaling, *ends, *parts]), layers.base).double().eval()

    def _ends(self) -> bool:
        return any(map(math.isfinite, [*self.lower, *self.upper]))

    @torch.no_grad()
    def _choose_steps(self, flow: Flow, judged: Tensor) -> float:
        """Set the steps of the solver by its error on held-out rows, and return that."""
        (transform,) = (m for m in flow.modules() if isinstance(m, MongeAmpereTransform))
        few = judged[:WATCHED_ROWS].double()
        rows = torch.as_tensor(self.centre) + torch.as_tensor(self.unit) * few
        transform.steps, error = 1, math.inf
        while True:
            try:
                error = _solver_error(flow, lambda: flow.log_prob(rows))
            except IntegrationError:
                error = math.inf
            if error <= self.settings.tolerance or 2 * transform.steps > MAX_STEPS // 8:
                return error
            transform.steps *= 2


def _solver_error(model: nn.Module, log_prob: Any) -> float:
    """By how much twice the steps change log-densities, on average over the rows."""
    coarse = log_prob()
    with refined(model):
        return float((log_prob() - coarse).abs().double().mean())


def _base_of(mixture: GaussianMixture) -> NormalMixture:
    """A mixture of scikit-learn as a base of nflows."""
    count, features = mixture.means_.shape
    base = NormalMixture(features, count)
    factors = torch.as_tensor(mixture.precisions_cholesky_)
    with torch.no_grad():
        base.logits.copy_(torch.as_tensor(mixture.weights_).log())
        base.means.copy_(torch.as_tensor(mixture.means_))
        base.factors.copy_(factors.diag_embed() if mixture.covariance_type == "diag" else factors)
    return base


@torch.no_grad()
def _with_outliers(base: NormalMixture, part: float) -> NormalMixture:
    """A mixture with one more normal for a part of the rows, ``WIDE`` times as wide as the whole.

    Narrow normals are blind to outliers, one of which can outweigh all other rows.
    """
    count, features = base.means.shape
    wider = NormalMixture(features, count + 1)
    wider.logits.copy_(torch.cat([base.logits.log_softmax(0), torch.tensor([math.log(part)])]))
    wider.means[:count] = base.means
    wider.means[count] = 0
    wider.factors[:count] = base.factors
    wider.factors[count] = torch.eye(features) / WIDE
    return wider
