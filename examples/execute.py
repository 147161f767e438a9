"""Makes `layers.ipynb` from `layers.py` and runs it with a server of its own; see `make notebook`."""

from __future__ import annotations

import os
from pathlib import Path

import jupytext
import nbclient
import nbformat

from layertap_server.testing import running_server

HERE = Path(__file__).parent
CELL_TIMEOUT_S = 120
DEPENDENT = ("execution", "language_info", "jupytext", "kernelspec")
"""What differs from run to run, or from machine to machine."""


def main() -> None:
    notebook = jupytext.read(HERE / "layers.py")
    with running_server() as server:
        os.environ["LAYERTAP_TARGET"] = server.address
        client = nbclient.NotebookClient(
            notebook, timeout=CELL_TIMEOUT_S, startup_timeout=CELL_TIMEOUT_S, kernel_name="python3"
        )
        client.execute()
    for n, cell in enumerate(notebook.cells):
        cell.id = f"cell-{n}"
        cell.metadata = nbformat.NotebookNode()
    for name in DEPENDENT:
        notebook.metadata.pop(name, None)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.validate(notebook)
    nbformat.write(notebook, HERE / "layers.ipynb")


if __name__ == "__main__":
    main()
