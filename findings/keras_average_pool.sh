#!/usr/bin/env bash
# keras 3.15.1, torch 2.14.1, jax 0.10.2, Python 3.11, 2026-11-28
# The layer is AveragePooling2D(3, strides=2, padding="same"), avg_pool_3x3 of a reduction cell.
# One would guess: Keras computes the same with each of its backends, so weights can be moved.
# What happens: with torch, images with an even number of pixels differ in the last row and
#   column. There the window reaches beyond the image. JAX averages the pixels that exist; with
#   torch, Keras repeats the last pixel, and so counts it twice. With stride 1, or an odd number of
#   pixels, both agree.
# Seen (a row of the output; each pixel of the input has its column's number as its value):
#   8 pixels  jax [1.0, 3.0, 5.0, 6.5]   torch [1.0, 3.0, 5.0, 6.667]
#   7 pixels  jax [0.5, 2.0, 4.0, 5.5]   torch [0.5, 2.0, 4.0, 5.5]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 torch==2.14.1 jax==0.10.2
cat > "$folder/pool.py" <<'PY'
import keras
import numpy as np

rows = []
for pixels in (8, 7):
    images = np.tile(np.arange(pixels, dtype="float32"), (pixels, 1))[None, :, :, None]
    pooled = keras.layers.AveragePooling2D(3, strides=2, padding="same")(images)
    row = keras.ops.convert_to_numpy(pooled)[0, 1, :, 0]
    rows.append([round(float(value), 3) for value in row])
print(*rows)
PY
export KERAS_HOME="$folder/keras"
jax=$(KERAS_BACKEND=jax "$folder/venv/bin/python" "$folder/pool.py")
torch=$(KERAS_BACKEND=torch "$folder/venv/bin/python" "$folder/pool.py")
echo "8 and 7 pixels, jax:   $jax"
echo "8 and 7 pixels, torch: $torch"
[ "$jax" = "[1.0, 3.0, 5.0, 6.5] [0.5, 2.0, 4.0, 5.5]" ] || exit 1
[ "$torch" = "[1.0, 3.0, 5.0, 6.667] [0.5, 2.0, 4.0, 5.5]" ] || exit 1
