"""The paper's FLOPs, by the benchmark that tells them."""

import pytest

from benchmarks import counts

TRUE = {50: 59.8}  # T multiply-adds with those inside attention


@pytest.fixture(scope='module')
def rows():
    return {row['name']: row for row in counts.table()}


def test_what_the_paper_counts(rows):
    told = [row for row in rows.values() if row['paper'] is not None]
    assert len(told) == len(counts.PARTS) + len(counts.SAMPLING)
    for row in told:
        # To the digits that are printed, or to 1 %.
        close = row['fvcore'] == pytest.approx(row['paper'], rel=0.01)
        assert close or round(row['fvcore'], 2) == row['paper'], row


def test_what_sampling_costs(rows):
    row = rows['sampling 16 x 512 x 1024, 50 + 50 steps']
    assert row['all'] == pytest.approx(TRUE[50], rel=0.01)
    guided = rows['sampling 16 x 512 x 1024, 50 + 50 steps, guided, to pixels']
    # The guidance of content frames adds 46.3, decoding by the VAE 40.8; that of motion the rest.
    assert guided['all'] > row['all'] + 46.3 + 40.8
