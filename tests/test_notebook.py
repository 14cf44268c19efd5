"""The notebook from top to bottom, with small settings, in a kernel of its own."""

import base64
import io
import json
import pathlib
import re

import nbclient
import nbformat
import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]


def pictures(cell) -> list[np.ndarray]:
    """What a cell shows: frames of its animations."""
    found = []
    for output in cell.outputs:
        for uri in re.findall(r'data:image/webp;base64,([\w+/=]+)', str(output.get('data', {}))):
            image = Image.open(io.BytesIO(base64.b64decode(uri)))
            assert image.n_frames > 1
            found.append(np.asarray(image.convert('RGB')))
    return found


def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / 'notebooks/colab.ipynb', as_version=4)
    assert not any(cell.get('outputs') for cell in notebook.cells)  # none are committed
    monkeypatch.setenv('CMD_JAX_WORKDIR', str(tmp_path / 'run'))
    monkeypatch.setenv('CMD_JAX_CONFIG', 'configs/quickstart.py:all,tiny')
    monkeypatch.setenv('CMD_JAX_NUM_VIDEOS', '4')
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={'metadata': {'path': str(ROOT / 'notebooks')}}
    )
    client.execute()
    shown = [pictures(cell) for cell in notebook.cells if cell.cell_type == 'code']
    # New videos, the four rows, the motions, the way from one to another; numbers; the report.
    assert [len(found) > 0 for found in shown] == [False] * 3 + [True] * 4 + [False, True]
    assert all(image.std() > 5 for found in shown for image in found)
    numbers = json.loads((tmp_path / 'run/evaluation/ablation.json').read_text())
    assert numbers['num_generated'] == 4 and numbers['generation_frechet'] > 0
