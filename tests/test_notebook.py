"""docs/walkthrough.ipynb: runs as it is, and shows what it says."""
import json
import re

import pytest

from tests.common import HERE

NOTEBOOK = HERE / "docs" / "walkthrough.ipynb"


def outputs(cells):
    """(all text that was printed, the number of pictures) of a notebook's cells."""
    made = [output for cell in cells for output in cell.get("outputs", [])]
    text = "".join("".join(output["text"]) for output in made if output["output_type"] == "stream")
    return text, sum("image/png" in output.get("data", {}) for output in made)


def check(cells):
    """The cache stops growing, the discriminator has learnt something, every picture is there."""
    text, pictures = outputs(cells)
    kept = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) numbers kept", text)]
    assert len(kept) == 5 and kept[2] == kept[3] == kept[4] > kept[1]
    assert float(re.search(r"(\d+) % of unseen pairs told apart", text)[1]) >= 65
    losses = re.search(r"fake score: ([\d.]+), then ([\d.]+)", text)
    assert float(losses[2]) < float(losses[1])
    assert pictures == 6


def test_the_notebook_shows_its_results():
    """And nothing of the machine that made them."""
    text = NOTEBOOK.read_text()
    check(json.loads(text)["cells"])
    assert not re.search(r"/(?:work|tmp|home|root)/\w", text) and NOTEBOOK.stat().st_size < 500_000


@pytest.mark.slow
def test_the_notebook_runs():
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-notebook.txt")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.read(NOTEBOOK, as_version=4)
    for cell in book.cells:
        cell.pop("outputs", None) if cell.cell_type == "markdown" else cell.update(outputs=[])
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(HERE / "docs")}}).execute()
    check(book.cells)
