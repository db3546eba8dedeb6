"""The notebooks run while the pages are built; a cell that fails ends the build.

They are Markdown as jupytext reads it. What their cells print and draw is set below each cell, and
the page is then a page as any other: same look, links checked, formulas as MathML. The executed
notebook lies beside it, to download.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import jupytext
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, ExecutePreprocessor
from tqdm import tqdm

SECONDS = 300  # for a cell


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs calls this with the sources of the site."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # all that tensors as small as these can use
    notebooks = [page for page in files.documentation_pages() if page.src_uri[:10] == "notebooks/"]
    with ThreadPoolExecutor() as pool:  # each has a kernel, a process, of its own
        done = tqdm(pool.map(_run, notebooks), "notebooks", len(notebooks), leave=False)
        for page, pages in zip(notebooks, done, strict=True):
            files.remove(page)
            for path, content in pages.items():
                files.append(File.generated(config, path, content=content))
    return files


def _run(page: File) -> dict[str, str | bytes]:
    """The files that a notebook becomes: its page, its pictures, and the executed notebook."""
    name = page.src_uri.removesuffix(".md")
    stem = name.rpartition("/")[2]
    notebook = jupytext.reads(page.content_string, "md")
    quiet = ["--log-level=ERROR"]
    kernel = ExecutePreprocessor(timeout=SECONDS, kernel_name="python3", extra_arguments=quiet)
    kernel.preprocess(notebook)
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    template = {"output_files_dir": ".", "unique_key": stem}
    text, resources = MarkdownExporter().from_notebook_node(notebook, template)
    pictures = {f"notebooks/{path}": data for path, data in resources["outputs"].items()}
    title, opening, rest = text.split("\n\n", 2)
    link = f"[Download this page as a notebook]({stem}.ipynb){{ download={stem}.ipynb }}"
    text = f"{title}\n\n{opening}\n\n{link}\n\n{rest}"
    return {f"{name}.md": text, f"{name}.ipynb": nbformat.writes(notebook), **pictures}
