#!/usr/bin/env bash
# timm 1.0.31, torchvision 0.29.1, torch 2.14.1, Python 3.11, 2026-11-28
# Tiny ImageNet's training images lie in train/<class>/images/*.JPEG.
# One would guess: timm's folder reader takes the same classes as torchvision's ImageFolder.
# What happens: torchvision takes the outermost folder, timm the innermost. So in timm every image
#   has the label 0, of a class "images". That raises nothing, and the validation images, in
#   val/images/*.JPEG, have the label 0, too: any network soon has an accuracy of 100 %.
# Seen (3 classes of 2 images, and 2 validation images):
#   torchvision train: [0, 0, 1, 1, 2, 2] {'n01443537': 0, 'n01629819': 1, 'n01641577': 2}
#   timm train: [0, 0, 0, 0, 0, 0] {'images': 0}
#   timm val: [0, 0] {'images': 0}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet timm==1.0.31 torchvision==0.29.1 torch==2.14.1
cd "$folder"
venv/bin/python - <<'PY'
from pathlib import Path

from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

classes = ("n01443537", "n01629819", "n01641577")
folders = [f"train/{name}/images" for name in classes] + ["val/images"]
for path in map(Path, folders):
    path.mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (64, 64)).save(path / f"{i}.JPEG")

theirs = ImageFolder("train")
print("torchvision train:", theirs.targets, theirs.class_to_idx)
labels = {}
for split in ("train", "val"):
    dataset = create_dataset("", root=".", split=split)
    labels[split] = [label for _, label in dataset]
    print(f"timm {split}:", labels[split], dataset.reader.class_to_idx)
same = theirs.targets == [0, 0, 1, 1, 2, 2] and labels == {"train": 6 * [0], "val": 2 * [0]}
raise SystemExit(0 if same else 1)
PY
