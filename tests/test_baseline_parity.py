"""What benchmarks/baseline.py compares is the same work."""

import pytest

from benchmarks import networks

pytestmark = pytest.mark.parity


def test_the_autoencoders_have_the_same_products():
    ours = networks.ours(networks.AUTOENCODER)[1]
    theirs = networks.theirs(networks.AUTOENCODER, 'plain')[1]
    assert ours == pytest.approx(theirs, rel=0.005)
