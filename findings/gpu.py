"""What operations and steps cost on a GPU: the tables under "On a GPU" in results.md.

    python findings/gpu.py                     # some 3 minutes on a data centre's GPU
    python findings/gpu.py --tiny --device cpu # a try of the script itself; its times mean nothing

It needs no data: the images are random. Times are medians, in the formats of the scripts: bfloat16
by autocast, and channels_last. cudnn.benchmark is on, as in the scripts.
"""
import argparse, statistics, sys, time
from pathlib import Path

import torch, torch.nn as nn, torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddp_nas, retrain

def median_ms(step, device, repeats):
    """Of whole calls, one after the other; the first three are not counted."""
    times = []
    for _ in range(3 + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])

def device_us(step, device, repeats):
    """The device's own time for a call: CUDA events around many calls in a row."""
    if device.type == "cpu":
        return 1000 * median_ms(step, device, repeats)
    for _ in range(3):
        step()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(200_000_000)  # so that all launches wait in the queue, and none is waited for
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end) / repeats

class DenseSeparable(nn.Module):
    """A depthwise and a pointwise conv as one: nothing stands between them, so it is the same."""
    def __init__(self, separable):
        super().__init__()
        self.relu, self.depthwise, self.pointwise, self.bn = separable

    def forward(self, x):
        kernel = self.pointwise.weight * self.depthwise.weight.transpose(0, 1)  # (C_out, C, k, k)
        d = self.depthwise
        return self.bn(F.conv2d(self.relu(x), kernel, None, d.stride, d.padding, d.dilation))

def dense_form(operation):
    """The operation, with every depthwise-separable convolution in it as a dense one."""
    if isinstance(operation, nn.Sequential) and len(operation) == 4:
        return DenseSeparable(operation)
    return nn.Sequential(*map(dense_form, operation))

def operations(device, tiny):
    norm = lambda c: ddp_nas.SupernetNorm(c, affine=False)
    print("microseconds, forward and backward, batch 512\n"
          "| operation | C, pixels, stride | as it is | gradient is a slice | dense |\n"
          "|---|---|--:|--:|--:|")
    for c, size in ((16, 32), (32, 16), (64, 8)):
        batch, repeats = (4, 2) if tiny else (512, 20)
        for stride in (1, 2):
            x = torch.randn(batch, c, size, size, device=device).contiguous(
                memory_format=torch.channels_last).requires_grad_()
            wide = torch.randn(batch, 4 * c, size // stride, size // stride, device=device)
            sliced = wide.contiguous(memory_format=torch.channels_last)[:, :c]
            for name in list(ddp_nas.OPS)[1:]:
                if name == "skip_connect" and stride == 1:
                    continue
                operation = ddp_nas.OPS[name](c, stride, norm).to(
                    device, memory_format=torch.channels_last)
                forms = [(operation, sliced.contiguous(memory_format=torch.channels_last)),
                         (operation, sliced)]
                if "conv" in name:
                    forms.append((dense_form(operation), forms[0][1]))
                cells = []
                for form, gradient in forms:
                    def step():
                        with ddp_nas.autocast(device):
                            out = form(x)
                        out.backward(gradient.to(out.dtype))
                    cells.append(f"{device_us(step, device, repeats):.0f}")
                cells += (3 - len(cells)) * [""]
                print(f"| {name} | {c}, {size}, {stride} | {' | '.join(cells)} |", flush=True)

def steps(device, tiny):
    """Training steps of the paper's search and of the retraining of its cell."""
    repeats = 2 if tiny else 60
    channels, cells, batch = (4, 3, 8) if tiny else (16, 8, 512)
    torch.manual_seed(0)
    supernet = ddp_nas.CellSupernet(channels, cells, 10).to(
        device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(supernet.parameters(), 0.025, 0.9, weight_decay=3e-4)
    path = torch.randint(8, (28,)).tolist()
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(
        memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    for name, size in (("a step of the search", batch), ("the same with 8 images: launches", 8)):
        batches = [(images[:size], labels[:size])]
        ms = median_ms(lambda: ddp_nas.train_epoch(supernet, optimizer, batches, path), device,
                       repeats)
        print(f"{name}: {ms:.1f} ms")
    channels, cells, batch = (4, 3, 8) if tiny else (36, 20, 96)
    network = retrain.build_network(retrain.PUBLISHED["DDPNAS_2"], channels=channels, cells=cells,
                                    auxiliary=True).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.025, 0.9, weight_decay=3e-4)
    args = argparse.Namespace(smoothing=0.0, cutout=0.5, image_size=32, auxiliary=0.4, clip=5.0)
    batches = [(images[:batch], labels[:batch])]
    ms = median_ms(lambda: retrain.train_epoch(network, optimizer, batches, args), device, repeats)
    print(f"a step of retraining DDPNAS_2: {ms:.1f} ms, 600 epochs of 520: "
          f"{ms * 520 * 600 / 3.6e6:.1f} hours")

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, few repeats")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    operations(device, args.tiny)
    steps(device, args.tiny)

if __name__ == "__main__":
    main()
