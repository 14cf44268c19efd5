"""The table of docs/pods.md is that of benchmarks/results/pods.json, for all configs and slices."""

import json
from pathlib import Path

import pytest

from benchmarks import pods

ROWS = json.loads(pods.RESULTS.read_text())


def test_docs_have_the_results():
    text = (Path(__file__).parents[1] / 'docs/pods.md').read_text()
    for lines in pods.table(ROWS).split('\n\n'):
        assert lines in text, 'paste what python -m benchmarks.pods prints into docs/pods.md'


@pytest.mark.parametrize('title', [title for title, *_ in pods.CONFIGS])
@pytest.mark.parametrize('place', pods.SLICES)
def test_training_fits(title, place):
    row = ROWS[f'{title} on {place}']
    assert row['fits'] and 0 < row['cost']['peak'] <= row['memory_bytes']
    assert not row['replicated']
    _, name, arg = next(found for found in pods.CONFIGS if found[0] == title)
    section = getattr(pods.shipped(name, arg), arg.split(',')[-1])
    assert row['batch_size'] == section.train.batch_size


@pytest.mark.parametrize(('title', 'place'), pods.SAMPLERS)
def test_sampling_fits(title, place):
    row = ROWS[f'sampling {title} on {place}']
    assert row['fits'] and 0 < row['peak'] <= row['memory_bytes']
    assert tuple(row['size'][1:3]) == ((512, 1024) if 'sd21' in title else (512, 512))
