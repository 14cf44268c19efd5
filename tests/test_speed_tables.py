"""The tables of docs/speed.md are those of benchmarks/results."""

import json
import pathlib

from benchmarks import tables

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'docs/speed.md').read_text()


def rows(name):
    return json.loads((ROOT / f'benchmarks/results/{name}.json').read_text())['rows']


def test_compilation():
    assert tables.compilation(rows('compile_cpu')) in TEXT


def test_beside_pytorch():
    found = rows('baseline_autoencoder_cpu') + rows('baseline_cpu')
    assert tables.beside_pytorch(found) in TEXT


def test_convolutions():
    assert tables.convolutions(rows('convolution_cpu')) in TEXT


def test_samplers():
    assert tables.samplers(rows('samplers_cpu')) in TEXT
