#!/usr/bin/env bash
# onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, Python 3.11, Linux, 2026-11-28
# One would guess: onnxruntime's quantize_dynamic(), which needs no data, makes a network of
#   convolutions a quarter as large and faster, or at least not slower.
# What happens: it is a quarter as large, and runs many times slower, depthwise convolutions most of
#   all, of which networks for small devices are made. With the defaults each Conv becomes a
#   ConvInteger on numbers that are quantized anew at every run. op_types_to_quantize=["MatMul"]
#   leaves the convolutions as they are.
# Seen (8 convolutions of 96 channels, 28 x 28 pixels, one thread of an Intel Xeon with AVX-512):
#   depthwise 3x3   0.21 ms   quantized   7.16 ms, 34 times as long
#   depthwise 5x5   0.40 ms   quantized  14.76 ms, 37 times as long
#   1x1             0.68 ms   quantized   3.80 ms, 5.6 times as long
#   3x3             5.98 ms   quantized  30.69 ms, 5.1 times as long
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import os, time
import numpy as np, onnx, onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

C, S, DEPTH = 96, 28, 8

def write(path, kernel, groups):
    """A chain of convolutions."""
    rng, nodes, weights = np.random.default_rng(0), [], []
    shape = (C, C // groups, kernel, kernel)
    for i in range(DEPTH):
        weight = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"], group=groups,
                                      pads=4 * [kernel // 2]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, C, S, S])
            for name in ("x0", f"x{DEPTH}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)

images = np.random.default_rng(1).standard_normal((1, C, S, S)).astype(np.float32)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for name, kernel, groups in (("depthwise 3x3", 3, C), ("depthwise 5x5", 5, C), ("1x1", 1, 1),
                             ("3x3", 3, 1)):
    write("float.onnx", kernel, groups)
    quantize_dynamic("float.onnx", "int8.onnx")
    sessions = [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                for path in ("float.onnx", "int8.onnx")]
    times = [[], []]
    for _ in range(25):  # in turns
        for session, seconds in zip(sessions, times):
            start = time.perf_counter()
            session.run(None, {"x0": images})
            seconds.append(time.perf_counter() - start)
    plain, quantized = (1000 * np.median(seconds) for seconds in times)
    print(f"{name:13} {plain:6.2f} ms   quantized {quantized:6.2f} ms, "
          f"{quantized / plain:.2g} times as long")
    assert quantized > 1.5 * plain, name
    if groups > 1:
        assert quantized > 5 * plain, name
quantize_dynamic("float.onnx", "kept.onnx", op_types_to_quantize=["MatMul"])
assert [node.op_type for node in onnx.load("kept.onnx").graph.node] == DEPTH * ["Conv"]
size = [os.path.getsize(path) for path in ("float.onnx", "int8.onnx")]
assert size[1] < size[0] / 3
PY
cd "$folder" && venv/bin/python check.py
