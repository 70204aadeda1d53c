#!/usr/bin/env bash
# torch 2.14.1, numpy 2.4.6, Python 3.11, Linux, 2026-11-28
# One would guess: persistent_workers=True of a DataLoader saves time and changes nothing else:
#   with the same generator and seed, the images come in the same order.
# What happens: the first epoch is the same, all later ones are others. A loader draws a seed for
#   its workers from the generator before it shuffles, in each epoch with new workers (and with
#   none), but only once with persistent ones. Without a generator it is torch's global one, so
#   drop-path or dropout behind it change, too. A run and its repetition agree only if both have
#   the option or both lack it.
# Seen (8 images, 3 epochs, generator seed 0):
#   no workers         53172640 23471065 35670214
#   2 workers          53172640 23471065 35670214
#   2 persistent ones  53172640 03461752 10732564
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import torch
from torch.utils.data import DataLoader

def epochs(**options):
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(range(8), batch_size=8, shuffle=True, generator=generator, **options)
    orders = []
    for _ in range(3):
        (batch,) = loader
        orders.append("".join(map(str, batch.tolist())))
    return orders

if __name__ == "__main__":
    none = epochs()
    fresh = epochs(num_workers=2)
    persistent = epochs(num_workers=2, persistent_workers=True)
    print("no workers        ", *none)
    print("2 workers         ", *fresh)
    print("2 persistent ones ", *persistent)
    changed = persistent[1] != fresh[1] and persistent[2] != fresh[2]
    raise SystemExit(0 if none == fresh and persistent[0] == fresh[0] and changed else 1)
PY
"$folder/venv/bin/python" "$folder/check.py"
