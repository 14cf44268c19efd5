"""The tables of docs/speed.md and docs/text_to_video.md are those of benchmarks/results."""

import json
import pathlib

from benchmarks import tables

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'docs/speed.md').read_text()
TEXT_TO_VIDEO = (ROOT / 'docs/text_to_video.md').read_text()


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


def test_memory():
    assert tables.memory(rows('memory_sd21')) in TEXT_TO_VIDEO


def test_loading():
    assert tables.loading(rows('stable_diffusion_cpu')) in TEXT_TO_VIDEO
