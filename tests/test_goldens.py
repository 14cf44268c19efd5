"""cmd_jax against recorded answers of diffusers (`python -m tests.make_goldens`)."""

from pathlib import Path

import numpy as np
import pytest

from cmd_jax.diffusion import Process
from tests import reference_cases as cases


@pytest.fixture(scope='module')
def goldens():
    return dict(np.load(Path(__file__).parent / 'goldens' / 'diffusers.npz'))


def check(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize('schedule', cases.SCHEDULES)
def test_schedule(goldens, schedule):
    check(
        Process(schedule=schedule).alphas_cumprod[cases.TIMES],
        goldens[f'alphas_cumprod/{schedule}'],
        1e-6,
    )


@pytest.mark.parametrize('name', cases.GOLDEN_CASES)
def test_samplers(goldens, name):
    check(cases.toy_sample(*cases.GOLDEN_CASES[name]), goldens[f'sample/{name}'], 1e-4)


def test_content_dit(goldens):
    check(cases.dit_output(cases.dit_params())[cases.DIT_PART], goldens['dit'], 1e-4)
