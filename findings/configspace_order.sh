#!/usr/bin/env bash
# ConfigSpace 1.2.2, numpy 2.4.6, Python 3.11, 2026-11-28
# A search space has one categorical parameter for each of 14 edges, edge_0 to edge_13.
# One would guess: the vector of a configuration (get_array, what predictors are trained on) has
#   them in the order in which they were added.
# What happens: they are sorted as text, so edge_10 comes after edge_1. Column i is edge i for the
#   first two only. values() has that order, too. Up to 10 edges (NAS-Bench-201, NAS-Bench-Macro)
#   nothing is amiss; the 14 edges of a DARTS cell are mixed up without a word, and all of these
#   vectors are valid architectures. To index by edge, look up config[f"edge_{i}"].
# Seen (operation i % 7 on edge i):
#   added:     [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]
#   get_array: [0, 1, 3, 4, 5, 6, 2, 3, 4, 5, 6, 0, 1, 2]
#   values():  [0, 1, 3, 4, 5, 6, 2, 3, 4, 5, 6, 0, 1, 2]
#   with 10 edges all three are equal: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ConfigSpace==1.2.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
from ConfigSpace import Categorical, Configuration, ConfigurationSpace

OPS = ["max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5",
       "dil_conv_3x3", "dil_conv_5x5"]

def orders(num_edges):
    space, architecture = ConfigurationSpace(seed=0), {}
    for i in range(num_edges):
        space.add(Categorical(f"edge_{i}", OPS))
        architecture[f"edge_{i}"] = OPS[i % len(OPS)]
    config = Configuration(space, values=architecture)
    return ([OPS.index(op) for op in architecture.values()],
            [int(value) for value in config.get_array()],
            [OPS.index(op) for op in config.values()])

added, array, values = orders(14)
print("added:    ", added)
print("get_array:", array)
print("values(): ", values)
few = orders(10)
print("with 10 edges all three are equal:", few[0] == few[1] == few[2])
by_text = sorted(range(14), key=str)
mixed = array == values == [added[i] for i in by_text] and array != added
raise SystemExit(0 if mixed and few[0] == few[1] == few[2] else 1)
PY
