"""The density of a table, from the command line: ``python -m nflows_mongeampere --help``."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from nflows_mongeampere.atomic import write

if TYPE_CHECKING:
    from nflows_mongeampere.sklearn import MongeAmpereDensity

try:
    import numpy as np
    import sklearn  # noqa: F401
    import typer
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed: pip install "nflows-mongeampere[sklearn]"')

MISSING = {"", "na", "nan", "null", "none", "?"}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="""The density of a table: fit it once, then score rows and draw new ones.

    A table is a CSV file with a header, then a line of numbers for each row.

        python -m nflows_mongeampere fit table.csv --out model.safetensors

        python -m nflows_mongeampere score table.csv --model model.safetensors --out scores.csv

        python -m nflows_mongeampere sample --model model.safetensors --rows 1000 --out new.csv

    The rows with the lowest log-density are the anomalies. The model is a file of numbers that
    holds no code.
    """,
)

Table = Annotated[Path, typer.Argument(help="A CSV file with a header.", dir_okay=False)]
Model = Annotated[Path, typer.Option(help="What `fit` has written.", dir_okay=False)]
Out = Annotated[Path | None, typer.Option(help="The CSV file to write; on the screen by default.")]
Columns = Annotated[
    str | None, typer.Option(help="The columns to take, separated by commas; all by default.")
]


@app.command()
def fit(
    table: Table,
    out: Annotated[Path, typer.Option(help="The file of the model.", dir_okay=False)],
    columns: Columns = None,
    integers: Annotated[
        str | None,
        typer.Option(
            help="Columns of integers, separated by commas, or `none`; by default those that hold "
            "nothing else."
        ),
    ] = None,
    bounds: Annotated[
        list[str] | None,
        typer.Option(
            help="The ends of a column, as `share=0:1` or `amount=0:`; may be given several "
            "times. By default an extreme value that 2 % of the rows have is an end.",
        ),
    ] = None,
    drop_missing: Annotated[bool, typer.Option(help="Leave rows with missing values out.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is random.")] = 0,
    max_iter: Annotated[
        int | None, typer.Option(min=0, help="Most steps of the optimiser.")
    ] = None,
) -> None:
    """Fit the density of a table and write it to a file."""
    with _one_line_errors():
        from nflows_mongeampere.sklearn import MongeAmpereDensity

        names, rows, _ = read(table, None if columns is None else _split(columns), drop_missing)
        keywords: dict[str, Any] = {"max_iter": max_iter, "random_state": seed}
        if integers is not None:
            whole = [] if integers == "none" else _named(_split(integers), names)
            keywords["integers"] = [names.index(name) for name in whole]
        if bounds:
            ends = dict(map(_ends, bounds))
            keywords["bounds"] = {names.index(n): ends[n] for n in _named([*ends], names)}
        density = MongeAmpereDensity(**keywords, verbose=sys.stderr.isatty())._fit(rows, names)
        density.save(out)
    for column in density.columns_:
        kind = "integers" if column.integer else "numbers"
        low = "" if column.lower is None else f", from {column.lower:g}"
        high = "" if column.upper is None else f", up to {column.upper:g}"
        typer.echo(f"{column.name}: {kind}{low}{high}")
    typer.echo(f"{len(rows)} rows; mean log-density of held-out rows {density.held_out_score_:.3f}")
    typer.echo(f"wrote {out}")


@app.command()
def score(table: Table, model: Model, out: Out = None) -> None:
    """Score rows: the log-density of each, in nats; the lowest are the anomalies."""
    with _one_line_errors():
        density = _load(model)
        _, rows, numbers = read(table, [column.name for column in density.columns_], False)
        scores = density.score_samples(rows)
        lines = [[n, repr(float(s))] for n, s in zip(numbers, scores, strict=True)]
        _write(out, ["line", "log_density"], lines)
    typer.echo(f"{len(rows)} rows; mean log-density {scores.mean():.3f}", err=True)


@app.command()
def sample(
    model: Model,
    rows: Annotated[int, typer.Option(min=1, help="How many to draw.")] = 100,
    out: Out = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other rows.")] = 0,
) -> None:
    """Draw new rows, in the units of the table."""
    with _one_line_errors():
        density = _load(model).set_params(random_state=seed)
        drawn = density.sample(rows)
        whole = [column.integer for column in density.columns_]
        lines = [
            [str(int(v)) if i else repr(float(v)) for v, i in zip(row, whole, strict=True)]
            for row in drawn
        ]
        _write(out, [column.name for column in density.columns_], lines)


def read(
    path: Path, wanted: list[str] | None, drop_missing: bool
) -> tuple[list[str], np.ndarray[Any, Any], list[int]]:
    """The columns of a CSV file.

    Args:
        path: of the file.
        wanted: names of columns, or None for all.
        drop_missing: whether rows with missing values are left out.

    Returns:
        Names, numbers, and the line of the file that each row is from.

    Raises:
        ValueError: for missing values, text, columns that are not there, or no rows at all.
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file)
        header = [name.strip() for name in next(lines, [])]
        names = header if wanted is None else wanted
        places = [header.index(name) for name in _named(names, header)]
        rows, numbers = [], []
        for line in lines:
            if not line:
                continue
            if len(line) != len(header):
                raise ValueError(
                    f"{path}, line {lines.line_num}: got {len(line)} values, expected "
                    f"{len(header)}, as the header has"
                )
            values = [line[place].strip() for place in places]
            missing = [n for n, v in zip(names, values, strict=True) if v.lower() in MISSING]
            if missing and not drop_missing:
                raise ValueError(
                    f"{path}, line {lines.line_num}: no value for {', '.join(missing)}; "
                    "fill it in, "
                    "or leave such rows (fit --drop-missing) or columns (fit --columns) out"
                )
            if not missing:
                rows.append(
                    [
                        _number(n, v, path, lines.line_num)
                        for n, v in zip(names, values, strict=True)
                    ]
                )
                numbers.append(lines.line_num)
    if not rows:
        raise ValueError(f"{path}: got no rows of numbers, expected a header and rows below it")
    return names, np.array(rows), numbers


def _number(name: str, value: str, path: Path, line: int) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {line}: got {value!r} for {name}, expected a number; leave columns of "
            "text out (fit --columns), or replace their values by numbers"
        ) from error


def _named(wanted: list[str], names: list[str]) -> list[str]:
    """The names that are wanted, all of which must be there."""
    for name in wanted:
        if name not in names:
            raise ValueError(f"there is no column {name!r}, only {', '.join(names) or 'none'}")
    return wanted


def _ends(text: str) -> tuple[str, tuple[float | None, float | None]]:
    """A column and its ends."""
    name, equals, ends = text.rpartition("=")
    low, colon, high = ends.partition(":")
    try:
        if not equals or not colon:
            raise ValueError
        return name, (float(low) if low else None, float(high) if high else None)
    except ValueError as error:
        raise ValueError(
            f"--bounds: got {text!r}, expected a column and its ends, like share=0:1 or amount=0:"
        ) from error


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def _load(path: Path) -> MongeAmpereDensity:
    from nflows_mongeampere.sklearn import MongeAmpereDensity

    return MongeAmpereDensity.load(path)


def _write(path: Path | None, header: list[str], lines: list[list[Any]]) -> None:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    if path is None:
        typer.echo(text.getvalue(), nl=False)
    else:
        write(path, text.getvalue())


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors that the user can mend, in one line, and code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app(prog_name="python -m nflows_mongeampere")
