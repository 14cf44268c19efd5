"""Multiply-adds of the networks, as the paper counts them and as they are.

    python -m benchmarks.flops [--out=benchmarks/results/flops.json]

The paper's figures are those of fvcore, which leaves out the products inside attention; they have
no guidance and no VAE, and those of sampling the autoencoder's encoder too, which sampling does not
run. Nothing is computed: the programs of training and sampling are counted.
"""

import json

from absl import flags

from benchmarks import counts
from cmd_jax import atomic, cli

OUT = flags.DEFINE_string('out', None, 'JSON file')


def main():
    rows = counts.table()
    print(f'{"T multiply-adds":56} {"paper":>8} {"as fvcore":>10} {"all":>8}')
    for row in rows:
        paper = '' if row['paper'] is None else f'{row["paper"]:.2f}'
        print(f'{row["name"]:56} {paper:>8} {row["fvcore"]:10.2f} {row["all"]:8.2f}')
    if OUT.value:
        atomic.write(OUT.value, json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    cli.run(main)
