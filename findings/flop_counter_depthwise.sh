#!/usr/bin/env bash
# torch 2.14.1, torchvision 0.29.1, Python 3.11, 2026-11-28
# One would guess: FlopCounterMode counts about twice as much for a backward pass as for the
#   forward pass: one convolution gives the input's gradient, another one the weight's.
# What happens: this holds for dense convolutions only. For the weight's gradient it forgets the
#   groups, and counts a depthwise convolution of C channels as a dense one, C times too much. The
#   forward pass is right. So "FLOPs of a training step" rank networks of depthwise convolutions
#   far behind the rest.
# Seen:
#   conv 3x3, 64 channels, 1 group:   backward = 2.0 x forward
#   conv 3x3, 64 channels, 8 groups:  backward = 9.0 x forward
#   conv 3x3, 64 channels, 64 groups: backward = 65.0 x forward
#   MobileNetV2, 96 pixels: backward = 19.1 x forward
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" - <<'PY'
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

def backward_per_forward(network, images):
    with FlopCounterMode(display=False) as forward:
        loss = network(images).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return backward.get_total_flops() / forward.get_total_flops()

ratios = []
for groups in (1, 8, 64):
    conv = torch.nn.Conv2d(64, 64, 3, padding=1, groups=groups, bias=False)
    ratios.append(backward_per_forward(conv, torch.randn(2, 64, 16, 16, requires_grad=True)))
    title = f"{groups} group{'s' * (groups > 1)}:"
    print(f"conv 3x3, 64 channels, {title:10} backward = {ratios[-1]:.1f} x forward")
ratios.append(backward_per_forward(torchvision.models.mobilenet_v2(), torch.randn(2, 3, 96, 96)))
print(f"MobileNetV2, 96 pixels: backward = {ratios[-1]:.1f} x forward")
raise SystemExit(0 if ratios[:3] == [2, 9, 65] and 19 < ratios[3] < 19.2 else 1)
PY
