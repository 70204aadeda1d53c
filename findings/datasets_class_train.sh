#!/usr/bin/env bash
# datasets 5.2.0 (Hugging Face), pillow 13.0.0, Python 3.11, 2026-11-28
# Images lie in {train,test}/<class>/*.png. One class is called "train", as one of CIFAR-100's is.
# One would guess: load_dataset("imagefolder") gives every image to the split of its outer folder.
# What happens: it gives the test images of that class to the training split, too, and says
#   nothing. A folder of any depth with the name counts as a split. So the network is trained on
#   test images. With data_files={"train": "train/**", "test": "test/**"} the splits are right.
# Seen (4 training and 2 test images in each of 3 classes, so 12 and 6 are right):
#   found by the folders' names: 14 in train, 6 in test, 2 in both
#   named with data_files:       12 in train, 6 in test, 0 in both
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pillow==13.0.0
cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()
grey = 0
for split, count in (("train", 4), ("test", 2)):
    for name in ("bicycle", "bus", "train"):
        path = Path("images", split, name)
        path.mkdir(parents=True)
        for i in range(count):
            grey += 10  # no two images are the same
            Image.new("RGB", (8, 8), (grey, grey, grey)).save(path / f"{i}.png")

def look_at(title, loaded):
    grey = {split: [image.getpixel((0, 0))[0] for image in loaded[split]["image"]]
            for split in ("train", "test")}
    both = set(grey["train"]) & set(grey["test"])
    print(f"{title} {len(grey['train'])} in train, {len(grey['test'])} in test, "
          f"{len(both)} in both")
    return len(grey["train"]), len(grey["test"]), len(both)

found = look_at("found by the folders' names:",
                datasets.load_dataset("imagefolder", data_dir="images"))
named = look_at("named with data_files:      ",
                datasets.load_dataset("imagefolder", data_files={
                    "train": "images/train/**", "test": "images/test/**"}))
raise SystemExit(0 if found == (14, 6, 2) and named == (12, 6, 0) else 1)
PY
