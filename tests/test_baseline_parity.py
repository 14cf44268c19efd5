"""What benchmarks/baseline.py compares is the same work."""

import pytest

pytestmark = pytest.mark.parity


def test_the_autoencoders_have_the_same_products():
    from benchmarks import baseline

    ours = baseline.ours(baseline.AUTOENCODER)[1]
    theirs = baseline.theirs(baseline.AUTOENCODER, 'plain')[1]
    assert ours == pytest.approx(theirs, rel=0.005)
