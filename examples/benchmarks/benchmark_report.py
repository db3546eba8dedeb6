"""What a benchmark found: tables for the terminal, Markdown and JSON."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import nflows_mongeampere
from nflows_mongeampere.examples.runs import write_json
from nflows_mongeampere.files import write


@dataclass
class Section:
    """One table of a report.

    Attributes:
        name: its key in the JSON file.
        title: its heading.
        columns: the headings of the columns.
        rows: the cells, row by row.
        notes: sentences below the table.
        figures: the numbers behind the cells, for the JSON file.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def show(self, console: Console) -> None:
        """Print the table."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", highlight=False)
        console.print()

    def markdown(self) -> str:
        """The table in Markdown."""
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        table = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        return "\n".join([f"## {self.title}", "", *table, *(f"\n{note}" for note in self.notes)])


def environment() -> dict[str, str]:
    """The machine and the versions that timings depend on."""
    return {
        "CPU": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "load average before": f"{os.getloadavg()[0]:.2f}",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "nflows-mongeampere": nflows_mongeampere.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_report(folder: Path, name: str, title: str, sections: list[Section]) -> None:
    """Write ``NAME.md`` and ``results.json`` into ``folder``, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    command = f"`python {' '.join(sys.argv)}`"
    text = "\n\n".join([f"# {title}", command, *(section.markdown() for section in sections)])
    figures = {section.name: section.figures for section in sections}
    write(folder / f"{name}.md", text + "\n")
    write_json(folder / "results.json", figures)
