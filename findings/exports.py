"""Do other runtimes compute what torch computes? The published networks, exported.

    pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 openvino==2026.4.1
    pip install MNN==3.6.1 tract==0.23.9 ncnn==1.0.20261020 pnnx==20261020
    python findings/exports.py            # some 3 minutes
    python findings/exports.py --ms       # and how long an image takes
    pip install thop==0.1.1.post2209072238 ptflops==0.7.5 fvcore==0.1.5.post20221221
    python findings/exports.py --count    # instead: how other tools count multiply-adds

It builds five published networks with random weights, lets their BatchNorms see synthetic images,
exports each for one image at a time (to ONNX, and for ncnn by pnnx), and runs it on 8 more images.
It prints a table: the largest difference of a runtime's logits to torch's, divided by the standard
deviation of torch's logits. The row "torch, float64" shows what rounding makes out. onnx and
onnxscript are needed; of the runtimes, those that are missing are named. No data is needed.

--ms prints a second table: the median time of one image in milliseconds, with one thread. All
networks and runtimes take turns, so that other work on the machine slows all of them.
"""
import argparse, copy, importlib.metadata, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import retrain

NETWORKS = {  # the side of the images, the number of classes
    "DDPNAS_2": (32, 10), "DDPNAS_IMAGENET": (224, 1000), "DDPNAS_GPU": (224, 1000),
    "MDENAS_GPU": (224, 1000), "MDENAS_CPU": (224, 1000)}
ROUNDS = 20  # of --ms

# ==== the networks ================================================================================
def make_network(name, seed=0):
    """-> a network in eval mode with random weights, and 8 images for it (8, 3, S, S)."""
    size, num_classes = NETWORKS[name]
    torch.manual_seed(seed)
    dataset = "cifar10" if size == 32 else "imagenet"
    network = retrain.build_network(retrain.PUBLISHED[name], dataset, num_classes)
    images = (retrain.make_gratings(40, size, seed)[0].float() - 128) / 64
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # running statistics: the mean over the batches
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        for batch in images[:32].split(16):
            network(batch)
    return network.eval(), images[32:]

def reduce_by_pools(self, x):
    """What FactorizedReduce computes, with pools of one pixel in place of slices of step 2."""
    even, odd = F.max_pool2d(x, 1, 2), F.max_pool2d(x[:, :, 1:, 1:], 1, 2)
    return self.bn(torch.cat([self.conv1(F.relu(even)), self.conv2(F.relu(odd))], 1))

# ==== the runtimes ================================================================================
# Each function takes the network, an image and the ONNX file, and returns a function: an array
# (1, 3, S, S) -> its logits.

def load_torch(network, image, path, dtype=torch.float32):
    network = copy.deepcopy(network).to(dtype)

    def run(array):
        with torch.no_grad():
            return network(torch.from_numpy(array).to(dtype)).numpy()
    return run

def load_onnxruntime(network, image, path):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})[0]

def load_openvino(network, image, path, **settings):
    import openvino
    core = openvino.Core()
    model = core.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1, **settings})
    return lambda array: model(array)[0]

def load_mnn(network, image, path):
    import MNN
    # The converter itself. The command mnnconvert wraps it: it runs `pip install` for a package
    # with which it reports its use to a server.
    from _tools import mnnconvert
    mnnconvert(["", "-f", "ONNX", "--modelFile", path, "--MNNModel", f"{path}.mnn"])
    model = MNN.nn.load_module_from_file(f"{path}.mnn", [], [], thread_num=1)

    def run(array):
        variable = MNN.expr.const(array, array.shape, MNN.expr.NCHW)
        return MNN.expr.convert(model.forward(variable), MNN.expr.NCHW).read().copy()
    return run

def load_tract(network, image, path):
    import tract
    model = tract.onnx().load(path).into_model().into_runnable()
    return lambda array: model.run([array])[0].to_numpy()

def load_ncnn(network, image, path, fp16=0, storage=False, pools=False):
    """fp16: pnnx rounds the weights to 16 bits; storage: ncnn does. Both are so by default."""
    import ncnn, pnnx
    forward = retrain.FactorizedReduce.forward
    if pools:
        retrain.FactorizedReduce.forward = reduce_by_pools
    torch.jit.trace(network, image).save(f"{path}.pt")
    retrain.FactorizedReduce.forward = forward
    # The program itself: pnnx.export stumbles over modules whose names are numbers.
    shape = ",".join(map(str, image.shape))
    command = [pnnx.EXEC_PATH, f"{path}.pt", f"inputshape=[{shape}]f32", f"fp16={fp16}"]
    subprocess.run(command, cwd=Path(path).parent, capture_output=True, check=True)
    model = ncnn.Net()
    model.opt.num_threads = 1
    model.opt.use_fp16_storage = storage
    # Both return 0, or another number where they fail.
    if model.load_param(f"{path}.ncnn.param") or model.load_model(f"{path}.ncnn.bin"):
        return None

    def run(array):
        extractor = model.create_extractor()
        extractor.input("in0", ncnn.Mat(array[0]))
        return np.array(extractor.extract("out0")[1])
    return run

RUNTIMES = {  # the packages that a row needs, and its function
    "torch": (["torch"], load_torch),
    "torch, float64": (["torch"], partial(load_torch, dtype=torch.float64)),
    "onnxruntime": (["onnxruntime"], load_onnxruntime),
    "MNN": (["MNN"], load_mnn),
    "tract": (["tract"], load_tract),
    "OpenVINO": (["openvino"], load_openvino),
    "OpenVINO, INFERENCE_PRECISION_HINT f32": (
        ["openvino"], partial(load_openvino, INFERENCE_PRECISION_HINT="f32")),
    "ncnn": (["ncnn", "pnnx"], partial(load_ncnn, fp16=1, storage=True)),
    "ncnn, fp16=0": (["ncnn", "pnnx"], partial(load_ncnn, storage=True)),
    "ncnn, use_fp16_storage = False": (["ncnn", "pnnx"], partial(load_ncnn, fp16=1)),
    "ncnn, both": (["ncnn", "pnnx"], load_ncnn),
    "ncnn, both, pools for slices": (["ncnn", "pnnx"], partial(load_ncnn, pools=True)),
}

def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

# ==== the tables ==================================================================================
def load_all(folder):
    """-> {(row, network): function or None}, and the images of the networks, as arrays."""
    runs, images = {}, {}
    for name in NETWORKS:
        network, tensor = make_network(name)
        images[name] = tensor.numpy()
        path = f"{folder}/{name}.onnx"
        torch.onnx.export(network, (tensor[:1],), path, dynamo=True, external_data=False,
                          verbose=False)
        for row, (packages, load) in RUNTIMES.items():
            if all(map(installed, packages)):
                runs[row, name] = load(network, tensor[:1], path)
    return runs, images

def print_table(title, columns, rows):
    print(f"\n{title}\n| | {' | '.join(columns)} |\n|---{'|--:' * len(columns)}|")
    for row, cells in rows.items():
        print(f"| {row} | {' | '.join(cells)} |")

def compare(runs, images):
    rows = {}
    for row, (packages, _) in RUNTIMES.items():
        missing = [package for package in packages if not installed(package)]
        cells = []
        for name in NETWORKS:
            if missing:
                cells.append(f"no {missing[0]}")
            elif runs[row, name] is None:
                cells.append("does not load")
            else:
                expected, logits = [
                    np.stack([run(image[None]).reshape(-1) for image in images[name]])
                    for run in (runs["torch", name], runs[row, name])]
                cells.append(f"{np.abs(logits - expected).max() / expected.std():.1g}")
        rows[row] = cells
    del rows["torch"]  # compared with itself
    print_table("largest difference of logits to torch's / their standard deviation",
                NETWORKS, rows)

def measure_times(runs, images):
    times = {key: [] for key, run in runs.items() if run and key[0] != "torch, float64"}
    for _ in range(ROUNDS):
        for row, name in times:
            image = images[name][:1]
            runs[row, name](image)  # fills the caches, which the network before has emptied
            start = time.perf_counter()
            runs[row, name](image)
            times[row, name].append(time.perf_counter() - start)
    medians = {key: 1000 * np.median(values) for key, values in times.items()}
    rows = {}
    for row in dict.fromkeys(row for row, _ in times):
        cells = []
        for name in NETWORKS:
            ms = medians.get((row, name))
            cells.append(f"{ms:.1f} ({medians['torch', name] / ms:.1f})" if ms else "")
        cells.append(f"{medians[row, 'MDENAS_GPU'] / medians[row, 'MDENAS_CPU']:.2f}")
        rows[row] = cells
    title = (f"milliseconds for one image, one thread, median of {ROUNDS} "
             "(in brackets: how many times as fast as torch)")
    print_table(title, [*NETWORKS, "MDENAS_GPU / MDENAS_CPU"], rows)

def count():
    """Print the multiply-adds of MDENAS on CIFAR-10, as several tools count them."""
    network = retrain.build_network(retrain.PUBLISHED["MDENAS"]).eval()
    image = torch.randn(1, 3, 32, 32)

    def by_torch():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(image)
        return counter.get_total_flops() / 2

    def by_thop():
        import thop
        return thop.profile(copy.deepcopy(network), (image,), verbose=False)[0]

    def by_ptflops():
        import ptflops
        return ptflops.get_model_complexity_info(
            network, (3, 32, 32), as_strings=False, print_per_layer_stat=False, verbose=False,
            backend="pytorch")[0]

    def by_fvcore():
        from fvcore.nn import FlopCountAnalysis
        analysis = FlopCountAnalysis(network, image).unsupported_ops_warnings(False)
        print(f"fvcore in parts: {dict(analysis.by_operator())}")
        return analysis.total()

    tools = {"torch": by_torch, "thop": by_thop, "ptflops": by_ptflops, "fvcore": by_fvcore}
    for package, run in tools.items():
        if not installed(package):
            print(f"{package} is missing")
        else:
            print(f"{package} {installed(package)}: {run() / 1e6:.1f} M multiply-adds")

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ms", action="store_true", help="measure times, too")
    parser.add_argument("--count", action="store_true", help="count multiply-adds instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.count:
        return count()
    packages = ["torch", "onnx", "onnxscript"]
    packages += [package for needed, _ in RUNTIMES.values() for package in needed]
    for package in dict.fromkeys(packages):
        print(f"{package} {installed(package) or 'is missing'}")
    with tempfile.TemporaryDirectory() as folder:
        runs, images = load_all(folder)
        compare(runs, images)
        if args.ms:
            measure_times(runs, images)

if __name__ == "__main__":
    main()
