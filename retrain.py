"""Train what DDP-NAS (arXiv:1905.13543) and MdeNAS (arXiv:1905.07529) found, and test it.

    python retrain.py                                         # what `python ddp_nas.py` found
    python retrain.py --genotype runs/mdenas/genotype.json    # another search, on its data set
    python retrain.py --genotype DDPNAS_2 --large             # a published cell, largest setting
    python retrain.py --genotype random:0 --dataset cifar10   # a random cell: the baseline
    python retrain.py --genotype MDENAS --summary             # parameters, multiply-adds, latency
    python retrain.py --genotype MDENAS --evaluate FILE       # weights of the authors, or of ours
    torchrun --nproc_per_node=8 retrain.py --genotype DDPNAS_GPU --data-dir DIR    # ImageNet

The network holds the found architecture alone: its BatchNorms have weights and keep running
statistics, and cells are stacked deeper and wider than in the supernet.
"""
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from Ctrl-C while torch is imported
import argparse, contextlib, fcntl, functools, io, itertools, json, math, os, re, sys, time, zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F, torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

METHOD = "retrain"
DEFAULTS = {  # per data set, the size of the images and of a network of cells
    "synthetic": dict(image_size=16, channels=8, cells=5),
    "cifar10": dict(image_size=32, channels=36, cells=20),
    "imagefolder": dict(image_size=32, channels=36, cells=20),
    "imagenet": dict(image_size=224, channels=48, cells=14),
}
CIFAR10 = dict(epochs=600, batch_size=96, lr=0.025, decay="cosine", weight_decay=3e-4,
               norm_decay=3e-4, clip=5.0, smoothing=0.0, auxiliary=0.4, drop_path=0.2,
               cutout=0.5)  # side of the square / side of the image: 16 of 32 pixels
SYNTHETIC = {**CIFAR10, "epochs": 15, "batch_size": 32, "lr": 0.1, "drop_path": 0.0, "cutout": 0.0}
IMAGENET_CELL = dict(epochs=250, batch_size=512, lr=0.1, decay=0.97, weight_decay=3e-5,
                     norm_decay=3e-5, clip=5.0, smoothing=0.1, auxiliary=0.4, drop_path=0.0,
                     cutout=0.0)
IMAGENET_MOBILE = dict(epochs=120, batch_size=1024, lr=0.4, decay="cosine", weight_decay=4e-5,
                       norm_decay=0.0, clip=math.inf, smoothing=0.1, auxiliary=0.0, drop_path=0.0,
                       cutout=0.0)
LARGE = dict(channels=44, epochs=1800)  # with AutoAugment: DDP-NAS's large setting
MOMENTUM = 0.9

# ==== the architecture ============================================================================
SHORT = {"max": "max_pool_3x3", "avg": "avg_pool_3x3", "skip": "skip_connect",
         "sep3": "sep_conv_3x3", "sep5": "sep_conv_5x5", "dil3": "dil_conv_3x3",
         "dil5": "dil_conv_5x5"}
PUBLISHED_CELLS = {  # normal, then reduction: two operations a node, each with its source
    "MDENAS": "sep5 1 sep3 0, skip 0 sep5 1, sep5 3 sep3 1, dil5 3 max 4; "
              "max 0 sep5 1, skip 0 skip 1, sep3 3 skip 2, dil3 3 sep5 0",
    "DDPNAS_IMAGENET": "sep5 1 max 0, dil3 0 sep3 1, sep3 0 max 3, dil3 2 avg 0; "
                       "sep5 1 avg 0, avg 1 skip 0, skip 2 sep3 1, dil5 0 dil5 4",
    "DDPNAS_1": "sep5 0 max 1, sep3 2 max 0, dil5 0 sep3 1, avg 2 max 4; "
                "sep3 1 dil5 0, dil5 1 sep5 0, sep3 0 avg 3, max 1 sep3 0",
    "DDPNAS_2": "sep5 0 skip 1, dil5 2 max 0, sep5 1 skip 2, skip 1 sep3 3; "
                "max 0 sep3 1, sep3 2 avg 0, avg 0 dil3 1, sep3 0 max 4",
    "DARTS_V2": "sep3 0 sep3 1, sep3 0 sep3 1, sep3 1 skip 0, skip 0 dil3 2; "
                "max 0 max 1, skip 2 max 1, max 0 skip 2, skip 2 max 1",
}
PUBLISHED_BLOCKS = {  # kernel and expansion of every block of a backbone
    "DDPNAS_GPU": "7,6 7,3 5,6 7,1 3,6 7,6 5,1 5,3 5,6 7,6 7,6 5,3 7,6 5,6",
    "MDENAS_GPU": "7,6 5,6 7,3 3,6 5,6 3,1 7,3 7,6 3,3 3,6 7,3 3,3 3,3 5,6",
    "MDENAS_CPU": "5,3 7,1 3,6 5,3 5,3 5,3 5,1 5,6 5,1 5,6 7,3 5,3 7,3 7,6 3,6 5,3 7,6 7,1 3,3 3,3",
}

def published_genotype(name):
    if name in PUBLISHED_BLOCKS:
        pairs = re.findall(r"(\d),(\d)", PUBLISHED_BLOCKS[name])
        blocks = [[int(kernel), int(expansion)] for kernel, expansion in pairs]
        return {"space": "mobile", "backbone": name[-3:].lower(), "blocks": blocks,
                "settings": {"dataset": "imagenet"}}
    edges = re.findall(r"(\w+) (\d)", PUBLISHED_CELLS[name])
    edges = [[SHORT[operation], int(source)] for operation, source in edges]
    nodes = [edges[i:i + 2] for i in range(0, len(edges), 2)]
    return {"space": "cell", "normal": nodes[:NUM_NODES], "reduce": nodes[NUM_NODES:],
            "settings": {"dataset": "imagenet" if "IMAGENET" in name else "cifar10"}}

def random_genotype(seed, backbone=None):
    """Draw uniformly from the mobile space of the backbone; from the cell space without one."""
    g = np.random.default_rng(seed)
    if backbone:
        blocks = g.choice(CANDIDATES, len(BACKBONES[backbone][0])).tolist()
        return {"space": "mobile", "backbone": backbone, "blocks": blocks}
    genotype = {"space": "cell", "normal": [], "reduce": []}
    for nodes in (genotype["normal"], genotype["reduce"]):
        for node in range(NUM_NODES):
            sources = sorted(g.choice(2 + node, 2, replace=False).tolist())
            nodes.append([[str(g.choice(PRIMITIVES[1:])), source] for source in sources])
    return genotype

def load_genotype(text):
    """A published name, random:SEED or a file -> its genotype. Raises InputError."""
    names = [*PUBLISHED_CELLS, *PUBLISHED_BLOCKS]
    drawn = re.fullmatch(r"random:(\d+)(?::(gpu|cpu))?", text)
    if text in names:
        return published_genotype(text)
    if drawn:
        return random_genotype(int(drawn[1]), drawn[2])
    if not Path(text).is_file():
        raise InputError(f"--genotype {text}: no such file: run `python ddp_nas.py` first, or name "
                         "the genotype.json of another search, random:SEED, random:SEED:gpu or "
                         f":cpu, or one of {', '.join(names)}")
    try:
        return json.loads(Path(text).read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"--genotype {text}: the file is not JSON ({error})") from None

def check_genotype(genotype, origin):
    """The part of it that defines the architecture. InputError, saying where it is not valid."""
    def pick(value, allowed, place):
        if value not in allowed:
            raise InputError(f"--genotype {origin}: {place}, not {value}")
        return allowed[allowed.index(value)]  # an int, where the file says 1.0

    def get(name, count):
        value = genotype.get(name)
        if not isinstance(value, list) or len(value) != count:
            raise InputError(f"--genotype {origin}: {name} must be a list of {count}, not {value}")
        return value

    genotype = genotype if isinstance(genotype, dict) else {}
    if pick(genotype.get("space"), ["cell", "mobile"], "space: cell or mobile") == "mobile":
        backbone = pick(genotype.get("backbone"), [*BACKBONES], "backbone: gpu or cpu")
        pairs = [[*pair] for pair in CANDIDATES]
        blocks = [pick(block, pairs, f"blocks: each one of {pairs}")
                  for block in get("blocks", len(BACKBONES[backbone][0]))]
        return {"space": "mobile", "backbone": backbone, "blocks": blocks}
    checked = {"space": "cell", "normal": [], "reduce": []}
    for cell in ("normal", "reduce"):
        for i, node in enumerate(get(cell, NUM_NODES)):
            edges = [[name, source] for name in PRIMITIVES[1:] for source in range(2 + i)]
            pairs = [[a, b] for a in edges for b in edges]
            checked[cell].append(pick(node, pairs, f"{cell}, node {i}: 2 pairs of an operation "
                                      f"({', '.join(PRIMITIVES[1:])}) and a source (0 to {1 + i})"))
    return checked

# ==== shared: operations ==========================================================================
NUM_NODES = 4              # intermediate nodes of a cell; node i has 2 + i incoming edges
NUM_EDGES = 2 + 3 + 4 + 5  # of a cell, in node order, then source order

class Zero(nn.AvgPool2d):  # with a kernel of 1: zeros of the size that the stride leaves
    def forward(self, x):
        return torch.zeros_like(super().forward(x))

class FactorizedReduce(nn.Module):
    """Two 1x1 convs of stride 2, the second shifted by one pixel in x and in y."""
    def __init__(self, c_in, c_out, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(c_in, c_out - c_out // 2, 1, bias=False)
        self.bn = norm(c_out)

    def forward(self, x):
        x = F.relu(x)
        # The stride is a slice: a strided 1x1 conv may crash torch 2.14's backward pass on a CPU.
        halves = self.conv1(x[:, :, ::2, ::2]), self.conv2(x[:, :, 1::2, 1::2])
        return self.bn(torch.cat(halves, 1))

def relu_conv_bn(c_in, c_out, norm):
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), norm(c_out))

def depthwise_separable(c, kernel, stride, dilation, norm):
    padding = dilation * (kernel - 1) // 2
    depthwise = nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False)
    return nn.Sequential(nn.ReLU(), depthwise, nn.Conv2d(c, c, 1, bias=False), norm(c))

def sep_conv(c, kernel, stride, norm):
    return nn.Sequential(depthwise_separable(c, kernel, stride, 1, norm),
                         depthwise_separable(c, kernel, 1, 1, norm))

OPS = {  # the space of cells: the candidates of an edge, `none` first
    "none": lambda c, stride, norm: Zero(1, stride),
    "max_pool_3x3": lambda c, stride, norm: nn.Sequential(nn.MaxPool2d(3, stride, 1), norm(c)),
    "avg_pool_3x3": lambda c, stride, norm: nn.Sequential(
        nn.AvgPool2d(3, stride, 1, count_include_pad=False), norm(c)),
    "skip_connect": lambda c, stride, norm: (
        nn.Identity() if stride == 1 else FactorizedReduce(c, c, norm)),
    "sep_conv_3x3": lambda c, stride, norm: sep_conv(c, 3, stride, norm),
    "sep_conv_5x5": lambda c, stride, norm: sep_conv(c, 5, stride, norm),
    "dil_conv_3x3": lambda c, stride, norm: depthwise_separable(c, 3, stride, 2, norm),
    "dil_conv_5x5": lambda c, stride, norm: depthwise_separable(c, 5, stride, 2, norm),
}
PRIMITIVES = list(OPS)

# The MobileNet space: the candidates of a block, (kernel, expansion), and two backbones: (output
# channels, stride) of every block, and the width of the head.
CANDIDATES = [(kernel, expansion) for kernel in (3, 5, 7) for expansion in (1, 3, 6)]
BACKBONES = {
    "gpu": ([(24, 1), (32, 2), (56, 2), (56, 1), (112, 2), (112, 1), (128, 1), (128, 1), (128, 1),
             (256, 2), (256, 1), (256, 1), (256, 1), (432, 1)], 1728),
    "cpu": ([(24, 1), (32, 2), (32, 1), (32, 1), (32, 1), (48, 2), (48, 1), (48, 1), (48, 1),
             (88, 2), (88, 1), (104, 1), (104, 1), (104, 1), (104, 1), (216, 2), (216, 1),
             (216, 1), (216, 1), (360, 1)], 1432),
}

conv_bn_relu6 = functools.partial(torchvision.ops.Conv2dNormActivation, activation_layer=nn.ReLU6)

class MBConv(nn.Sequential):
    """Inverted residual block: 1x1 expand (not where the ratio is 1), depthwise, 1x1 project."""
    def __init__(self, c_in, c_out, stride, kernel, expansion, norm):
        c = c_in * expansion
        expand = [conv_bn_relu6(c_in, c, 1, norm_layer=norm)] if expansion > 1 else []
        super().__init__(*expand, conv_bn_relu6(c, c, kernel, stride, groups=c, norm_layer=norm),
                         nn.Conv2d(c, c_out, 1, bias=False), norm(c_out))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):
        out = super().forward(x)
        return x + out if self.residual else out

# ==== the networks ================================================================================
# Modules are registered in the order of the authors' networks: their weights fit by position.

def drop_path(x, probability):
    """Zero the whole output x (B, C, H, W) for some images, rescale the others: the mean stays."""
    keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= probability
    return x * (keep / (1 - probability)).to(x.dtype)

class Cell(nn.Module):
    def __init__(self, nodes, c_prev_prev, c_prev, c, reduction, reduction_prev, norm):
        super().__init__()
        older = FactorizedReduce if reduction_prev else relu_conv_bn
        self.preprocess0 = older(c_prev_prev, c, norm)
        self.preprocess1 = relu_conv_bn(c_prev, c, norm)
        self.edges, self.sources = nn.ModuleList(), []  # two a node
        for name, source in itertools.chain(*nodes):
            stride = 2 if reduction and source < 2 else 1
            self.edges.append(OPS[name](c, stride, norm))
            self.sources.append(source)

    def forward(self, s0, s1, drop):
        """s0, s1: outputs of the last two cells, older first; drop: a probability or None."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(0, 2 * NUM_NODES, 2):
            pair = []
            for source, op in zip(self.sources[i:i + 2], self.edges[i:i + 2]):
                out = op(states[source])
                if drop is not None and not isinstance(op, nn.Identity):
                    out = drop_path(out, drop)
                pair.append(out)
            states.append(pair[0] + pair[1])
        return torch.cat(states[2:], 1)

def auxiliary_head(c_in, num_classes, imagenet, norm):
    """A classifier on an inner cell, for training: (B, c_in, 7 or 8, ...) -> (B, num_classes)."""
    return nn.Sequential(
        nn.ReLU(), nn.AvgPool2d(5, 2 if imagenet else 3, count_include_pad=False),
        nn.Conv2d(c_in, 128, 1, bias=False), norm(128), nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False), nn.Identity() if imagenet else norm(768), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, num_classes))

class CellNetwork(nn.Module):
    def __init__(self, genotype, channels, num_cells, num_classes, imagenet, auxiliary):
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, eps=1e-3 if imagenet else 1e-5)
        c, conv = channels, functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        if imagenet:  # 1/4 and 1/8 of the side, as if a reduction cell stood between the two
            self.stem0 = nn.Sequential(conv(3, c // 2, stride=2), norm(c // 2), nn.ReLU(),
                                       conv(c // 2, c, stride=2), norm(c))
            self.stem1 = nn.Sequential(nn.ReLU(), conv(c, c, stride=2), norm(c))
            c_prev_prev = c_prev = c
        else:
            self.stem0 = nn.Sequential(conv(3, 3 * c), norm(3 * c))
            self.stem1 = nn.Identity()
            c_prev_prev = c_prev = 3 * c
        self.cells, reduction_prev = nn.ModuleList(), imagenet
        for i in range(num_cells):
            reduction = i in (num_cells // 3, 2 * num_cells // 3)
            c = 2 * c if reduction else c
            nodes = genotype["reduce" if reduction else "normal"]
            self.cells.append(Cell(nodes, c_prev_prev, c_prev, c, reduction, reduction_prev, norm))
            c_prev_prev, c_prev, reduction_prev = c_prev, NUM_NODES * c, reduction
        self.auxiliary = None
        if auxiliary:  # on the second reduction cell, which has the width of the last
            self.auxiliary = auxiliary_head(c_prev, num_classes, imagenet, norm)
        self.linear = nn.Linear(c_prev, num_classes)
        self.drop_path = None  # or a tensor: for new floats, torch.compile starts again

    def forward(self, images):
        """images (B, 3, S, S) -> logits (B, num_classes); in training, those of the head, too."""
        s0 = self.stem0(images)
        s1 = self.stem1(s0)
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path if self.training else None)
            if i == 2 * len(self.cells) // 3:
                inner = s1
        logits = self.linear(s1.mean((2, 3)))
        return (logits, self.auxiliary(inner)) if self.training and self.auxiliary else logits

def mobile_network(genotype, num_classes):
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
    blocks, head = BACKBONES[genotype["backbone"]]
    c_in, layers = 40, [conv_bn_relu6(3, 40, 3, 2, norm_layer=norm)]
    for (c, stride), block in zip(blocks, genotype["blocks"]):
        layers.append(MBConv(c_in, c, stride, *block, norm))
        c_in = c
    return nn.Sequential(  # no dropout before the last layer: its rate is not given
        *layers, conv_bn_relu6(c_in, head, 1, norm_layer=norm), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(head, num_classes))

def build_network(genotype, dataset="cifar10", num_classes=10, channels=None, cells=None,
                  auxiliary=False):
    """The final network of a genotype. dataset: "imagenet" has stems of its own.

    channels and cells are those of a network of cells, by default 36 and 20 (ImageNet: 48 and 14).
    """
    if genotype["space"] == "mobile":
        return mobile_network(genotype, num_classes)
    imagenet = dataset == "imagenet"
    size = DEFAULTS["imagenet" if imagenet else "cifar10"]
    return CellNetwork(genotype, channels or size["channels"], cells or size["cells"], num_classes,
                       imagenet, auxiliary)

def count_parameters(network):
    """Weights of the network that is used in the end, without the auxiliary head."""
    return sum(weight.numel() for name, weight in network.named_parameters()
               if not name.startswith("auxiliary."))

def load_weights(network, weights, path):
    """Load a state dict by position: of the authors' names, only the last part is as here.

    Raises InputError for the first entry that does not fit, and leaves the network as it was.
    """
    ours = network.state_dict()
    for (name, tensor), (other, value) in zip(ours.items(), weights.items()):
        shape, other_shape = [*tensor.shape], [*getattr(value, "shape", "")]
        if str(other).split(".")[-1] != name.split(".")[-1] or other_shape != shape:
            raise InputError(f"{path}: {other} {other_shape} does not fit {name} {shape}")
    if len(weights) != len(ours):
        raise InputError(f"{path} has {len(weights)} entries, and the network {len(ours)}")
    network.load_state_dict(dict(zip(ours, weights.values())))

# ==== training and test ===========================================================================
def cutout(images, length):
    """Set a square of length pixels to 0 in each of images (B, 3, S, S); it may cross the edge."""
    along = torch.arange(images.shape[-1], device=images.device)                 # (S,)
    y, x = torch.randint(len(along), (2, len(images), 1), device=images.device)  # (B, 1), centres
    rows = (along >= y - length // 2) & (along < y + length // 2)                # (B, S)
    columns = (along >= x - length // 2) & (along < x + length // 2)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)

def train_epoch(network, optimizer, batches, args):
    """One pass over the batches -> mean loss, that of the auxiliary head included."""
    network.train()
    auto_augment = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.recipe["smoothing"])
    total, weights = torch.zeros((), device=batches.device), [*network.parameters()]
    for images, labels in batches:
        if args.large:
            images = torch.stack([auto_augment(image) for image in images])
        images = batches.normalise(images)
        if args.recipe["cutout"]:
            images = cutout(images, round(args.recipe["cutout"] * args.image_size))
        with autocast(batches.device):
            outputs = network(images)
            if isinstance(outputs, tuple):
                logits, auxiliary_logits = outputs
                loss = criterion(logits, labels)
                loss = loss + args.recipe["auxiliary"] * criterion(auxiliary_logits, labels)
            else:
                loss = criterion(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        average_over_ranks([weight.grad for weight in weights if weight.grad is not None])
        nn.utils.clip_grad_norm_(weights, args.recipe["clip"])
        optimizer.step()
        total += loss.detach()  # stays on the device: to read it would wait for the step
    # Of BatchNorm's running statistics, each rank has seen its share.
    average_over_ranks([buffer for buffer in network.buffers() if buffer.is_floating_point()])
    return finite_mean(total, batches, weights)

@torch.no_grad()
def evaluate(network, batches):
    """Top-1 and top-5 error, in [0, 1]; in float32, on a GPU too."""
    network.eval()
    wrong = torch.zeros(2, device=batches.device)
    for images, labels in batches:
        logits = network(batches.normalise(images))
        hit = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5), best first
        wrong += torch.stack([(~hit[:, 0]).sum(), (~hit.any(1)).sum()])
    average_over_ranks([wrong])
    return [count * WORLD_SIZE / batches.count for count in wrong.tolist()]

def open_network(args, num_classes, auxiliary):
    network = build_network(args.genotype, args.dataset, num_classes, args.channels, args.cells,
                            auxiliary)
    return network.to(args.device, memory_format=torch.channels_last)

def train(args):
    images, test_images = open_images(args, train=True), open_images(args, train=False)
    if images.classes != test_images.classes:
        differ = ", ".join(sorted({*images.classes} ^ {*test_images.classes}))
        raise InputError(f"--data-dir {args.data_dir}: train and val have other classes: {differ}")
    check_batch_size(args.batch_size, len(images.labels))
    batches = Batches(images, torch.arange(len(images.labels)), args.batch_size, True, args)
    test_batches = Batches(test_images, torch.arange(len(test_images.labels)), args.batch_size,
                           False, args)
    auxiliary = args.recipe["auxiliary"] > 0
    torch.manual_seed(args.seed)
    network = open_network(args, len(images.classes), auxiliary)
    norms = {weight for module in network.modules() if isinstance(module, nn.BatchNorm2d)
             for weight in module.parameters()}
    groups = [{"params": [weight for weight in network.parameters() if weight not in norms]},
              {"params": [weight for weight in network.parameters() if weight in norms],
               "weight_decay": args.recipe["norm_decay"]}]
    optimizer = torch.optim.SGD(groups, args.lr, MOMENTUM, weight_decay=args.recipe["weight_decay"])
    if args.recipe["decay"] == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    else:
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, args.recipe["decay"])
    run = Run(args, images, network=network, optimizer=optimizer, schedule=schedule)
    parameters = count_parameters(network)
    print0(f"{args.origin}: {parameters:,} parameters, auxiliary head: {auxiliary}")
    drop = args.recipe["drop_path"]
    if drop:
        network.drop_path = torch.zeros((), device=args.device)
    if args.compile:
        network.compile()

    for epoch in range(len(run.log), args.epochs):
        start = time.perf_counter()
        # For cutout, drop-path and AutoAugment; other seeds than those of the shuffle.
        torch.manual_seed(1_000_003 * args.seed + 500_000 + WORLD_SIZE * epoch + RANK)
        batches.epoch = epoch
        if drop:
            network.drop_path.fill_(drop * epoch / args.epochs)
        loss = train_epoch(network, optimizer, batches, args)
        top1, top5 = evaluate(network, test_batches)
        schedule.step()
        seconds = time.perf_counter() - start
        run.log.append({"epoch": epoch + 1, "loss": loss, "top1_error": top1, "top5_error": top5,
                        "seconds": seconds})
        best = min(run.log, key=lambda row: row["top1_error"])
        is_best = best is run.log[-1]  # on the test images: an optimistic choice
        run.save(["best.pt", CHECKPOINT] if is_best else [CHECKPOINT])
        mean = sum(row["seconds"] for row in run.log) / len(run.log)
        print0(f"epoch {epoch + 1:3}/{args.epochs}  loss {loss:.3f}  top-1 error {top1:.2%}  top-5 "
               f"error {top5:.2%}  {(batches.count + test_batches.count) / seconds:.0f} images/s  "
               f"{timedelta(seconds=round(mean * (args.epochs - len(run.log))))} left")

    best, last = min(run.log, key=lambda row: row["top1_error"]), run.log[-1]
    print0(f"top-1 error {last['top1_error']:.2%}, top-5 error {last['top5_error']:.2%} (best.pt: "
           f"{best['top1_error']:.2%}, epoch {best['epoch']}), {parameters:,} parameters")

def test(args):
    """--evaluate: print the errors of the weights in a file on the test images."""
    images = open_images(args, train=False)
    if args.classes and args.classes != images.classes:
        differ = ", ".join(sorted({*args.classes} ^ {*images.classes}))
        raise InputError(f"{args.evaluate} and {args.data_dir} differ in the classes {differ}")
    auxiliary = any("aux" in str(name) for name in args.weights)
    network = open_network(args, len(images.classes), auxiliary)
    load_weights(network, args.weights, args.evaluate)
    index = torch.arange(len(images.labels))
    top1, top5 = evaluate(network, Batches(images, index, args.batch_size, False, args))
    print0(f"{args.evaluate}: top-1 error {top1:.2%}, top-5 error {top5:.2%} of {len(index)} "
           f"images, {count_parameters(network):,} parameters")

def summarise(args):
    """--summary: print parameters, multiply-adds and latency."""
    num_classes = 1000 if args.dataset == "imagenet" else 10
    if args.dataset == "imagefolder":
        num_classes = len(Folder(args.data_dir / "train", args).classes)
    network, times = open_network(args, num_classes, False).eval(), []
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), autocast(args.device):
        with FlopCounterMode(display=False) as counter:
            network(images[:1])
        for _ in range(120):
            start = time.perf_counter()
            network(images)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - start)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print0(f"{args.origin} on {args.dataset}, {num_classes} classes, {args.image_size} pixels: "
           f"{count_parameters(network):,} parameters, {counter.get_total_flops() / 2e6:,.1f} M "
           f"multiply-adds, latency {1000 * np.median(times[20:]):.2f} ms (median of 100 forward "
           f"passes, batch {args.batch_size}, {device})")

# ==================================================================================================
# Nothing of the papers stands below: images, ranks, files, what the user sees, arguments, main

# ==== shared: images, ranks, files ================================================================
class InputError(Exception):
    """What the user can fix: one line. An error of the program keeps its traceback."""

MEAN_STD = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}  # and any other
SMALL = 64  # pixels: up to this size all the images live on the device, as one tensor

def make_gratings(count, size, seed):
    """Images of two gratings under noise -> (count, size, size, 3) uint8, labels (count,), names.

    The class is the pair of their angles, the same for a mirror image: training flips images.
    """
    g = torch.Generator().manual_seed(seed)
    pairs = torch.combinations(torch.arange(5))                      # (10, 2)
    labels = torch.randint(len(pairs), (count,), generator=g)
    mirror = 2 * torch.randint(2, (count, 2), generator=g) - 1
    angle = pairs[labels] * mirror * math.pi / 8                     # (count, 2), -90 to 90 degrees
    frequency = 0.08 + 0.12 * torch.rand(count, 2, generator=g)      # cycles per pixel
    phase = 2 * math.pi * torch.rand(count, 2, generator=g)
    colour = F.normalize(torch.randn(count, 2, 3, generator=g), dim=2)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    angle, frequency, phase = (t[:, :, None, None] for t in (angle, frequency, phase))
    distance = x * angle.cos() + y * angle.sin()                     # (count, 2, size, size)
    waves = torch.sin(2 * math.pi * frequency * distance + phase)
    images = torch.einsum("nwyx,nwc->nyxc", waves, colour)
    images = images + 0.8 * torch.randn(count, size, size, 3, generator=g)
    names = [f"angles {a} and {b}" for a, b in pairs.tolist()]
    return (128 + 50 * images).clamp(0, 255).to(torch.uint8), labels, names

class ImageTensor:
    """Small images, all on the device. images (N, S, S, 3) uint8, labels (N,)."""
    def __init__(self, images, labels, classes, device):
        size, self.labels, self.classes = images.shape[1], labels.to(device), classes
        pad = size // 8  # 4 pixels for images of 32
        padded = F.pad(images.to(device), (0, 0, pad, pad, pad, pad))
        self.crops = padded.unfold(1, size, 1).unfold(2, size, 1)  # (N, shifts, shifts, 3, S, S)

    def read(self, batches):
        """Yield images (B, 3, S, S), labels (B,) for each batch of keys (B, 2), see Batches."""
        shifts = self.crops.shape[1]  # a seed holds the shift in y, in x and the flip, as digits
        for keys in batches:
            index, seeds = keys.to(self.labels.device, non_blocking=True).T
            seeds = torch.where(seeds < 0, shifts**2 // 2, seeds)  # -1: the centre, not flipped
            images = self.crops[index, seeds % shifts, seeds // shifts % shifts]
            flip = (seeds // shifts**2 % 2 == 1)[:, None, None, None]
            yield torch.where(flip, images.flip(3), images), self.labels[index]

class Folder(torchvision.datasets.ImageFolder):
    """Large images, <folder>/<class>/*, each read when a batch needs it."""
    def __init__(self, folder, args):
        super().__init__(folder)
        folders = {os.path.dirname(path) for path, _ in self.samples}
        if len({os.path.realpath(path) for path in folders}) < len(folders):
            raise InputError(f"{folder}: a symbolic link leads to images that are there already")
        if len(self.classes) < 2:
            raise InputError(f"{folder} holds one class only, {self.classes[0]}: two are needed")
        size, self.args, self.labels = args.image_size, args, torch.tensor(self.targets)
        self.augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(),
                                     v2.ColorJitter(0.4, 0.4, 0.4, 0.2), v2.PILToTensor()])
        resized = size if size <= SMALL else size * 256 // 224
        self.plain = v2.Compose([v2.Resize(resized), v2.CenterCrop(size), v2.PILToTensor()])

    def __getitem__(self, key):
        (path, label), seed = self.samples[key[0]], key[1]
        try:
            image = Image.open(path)
            if image.mode[0] in "IF":  # 16 bits or floats, of which PIL would make black and white
                raise ValueError(f"pixels of 8 bits are needed, not {image.mode}")
            image = image.convert("RGB")
        except Exception as error:  # PIL raises many kinds
            raise InputError(f"{path} cannot be read as an image: {error}") from None
        if seed < 0:
            return self.plain(image), label
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
            return self.augmented(image), label

    def read(self, batches):
        return torch.utils.data.DataLoader(
            self, batch_sampler=[keys.tolist() for keys in batches], num_workers=self.args.workers,
            pin_memory=self.args.device == "cuda", generator=torch.Generator())

def open_images(args, train):
    """The images for training, or for the test -> ImageTensor, or Folder above SMALL pixels."""
    if args.dataset == "synthetic":
        images = make_gratings(768 if train else 1000, args.image_size, 2 * args.seed + train)
    elif args.dataset == "cifar10":
        try:
            if RANK == 0:
                torchvision.datasets.CIFAR10(args.data_dir, train, download=True)
            barrier()
            data = torchvision.datasets.CIFAR10(args.data_dir, train)
        except (OSError, RuntimeError) as error:
            raise InputError(f"--data-dir: {args.data_dir} has no CIFAR-10, or a damaged one, and "
                             f"there is no network to download it ({error})") from None
        images = torch.from_numpy(data.data), torch.tensor(data.targets), data.classes
    else:
        folder = Folder(args.data_dir / ("train" if train else "val"), args)
        if args.image_size > SMALL:
            return folder
        pixels = [folder[i, -1][0].permute(1, 2, 0) for i in range(len(folder))]
        images = torch.stack(pixels), folder.labels, folder.classes
    return ImageTensor(*images, args.device)

class Batches:
    """Batches of images (B, 3, S, S) uint8 and labels (B,) on the device; a rank gets its share.

    They are read by keys: (index of an image, seed of its augmentation, -1: none). Training batches
    are shuffled, augmented and all full, as follows from the seed and `epoch` alone.
    """
    def __init__(self, images, index, batch_size, train, args):
        self.images, self.index, self.batch_size, self.train = images, index, batch_size, train
        self.device, self.seed, self.epoch = args.device, args.seed, 0
        self.count = len(index) // batch_size * batch_size if train else len(index)
        mean_std = torch.tensor(MEAN_STD.get(args.dataset, MEAN_STD["imagenet"]))
        self.mean, self.std = 255 * mean_std.view(2, 3, 1, 1).to(args.device)

    def __len__(self):
        return math.ceil(self.count / self.batch_size)

    def __iter__(self):
        index, seeds = self.index, torch.full_like(self.index, -1)
        if self.train:
            g = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
            index = index[torch.randperm(len(index), generator=g)]
            seeds = torch.randint(2**31, seeds.shape, generator=g)
        keys = torch.stack([index, seeds], 1)[:self.count].split(self.batch_size)
        shares = [batch[RANK::WORLD_SIZE] for batch in keys if len(batch) > RANK]  # none is empty
        for images, labels in self.images.read(shares):
            yield (images.to(self.device, non_blocking=True, memory_format=torch.channels_last),
                   labels.to(self.device, non_blocking=True))

    def normalise(self, images):
        return (images - self.mean) / self.std

RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1
if dist.is_torchelastic_launched():  # by torchrun, a process for each device
    RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ[name]) for name in
                                    ("RANK", "LOCAL_RANK", "WORLD_SIZE"))

def start_ranks(args):
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.benchmark = True
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")

def barrier():
    if WORLD_SIZE > 1:
        dist.barrier()

def average_over_ranks(tensors):
    """Replace each tensor by its mean over the ranks, all in one message."""
    if WORLD_SIZE > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor) / WORLD_SIZE)

def autocast(device):
    """bfloat16 on a GPU that has it: older ones only emulate it, slowly."""
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device, torch.bfloat16, enabled=native)

def finite_mean(total, batches, weights):
    """The mean loss over batches and ranks. InputError if it or a weight is not finite."""
    average_over_ranks([total])
    mean = total.item() / len(batches)
    if not math.isfinite(mean) or not all(w.isfinite().all() for w in weights):
        raise InputError(f"epoch {batches.epoch + 1}: loss {mean}, or a weight, is not finite: "
                         "start again with a smaller --lr (the last checkpoint is kept)")
    return mean

def print0(text):
    """Print on rank 0. A closed pipe, or a character the terminal lacks, does not stop a run."""
    if RANK == 0 and sys.stdout:
        encoding = sys.stdout.encoding or "utf-8"
        try:
            print(text.encode(encoding, "replace").decode(encoding), flush=True)
        except OSError:  # the reader has closed the pipe
            sys.stdout = None

CHECKPOINT = "checkpoint.pt"

def write_file(path, data):
    """Write bytes to a temporary name, then rename: the file is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if RANK == 0:
            temporary.write_bytes(data)
            os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None

def read_checkpoint(path):
    """The dict that torch.save() wrote to path. Raises InputError if it is damaged."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")  # torch.load does not look at them
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # torch.load has many ways to fail
        raise InputError(f"{path} is damaged, or not a checkpoint") from None

class Run:
    """A run in --out: checkpoint.pt, for --resume, and log.jsonl, a JSON object an epoch.

    settings: what --resume must not change. parts: objects to save and restore.
    """
    def __init__(self, args, images, **parts):
        self.folder, self.parts, self.log = args.out, parts, []
        self.settings = {k: v for k, v in vars(args).items() if k not in MAY_DIFFER}
        self.settings.update(method=METHOD, processes=WORLD_SIZE, images=len(images.labels),
                             classes=images.classes)
        if args.resume and (self.folder / CHECKPOINT).exists():
            saved = read_checkpoint(self.folder / CHECKPOINT)
            before = saved.get("settings", {})
            for name, value in self.settings.items():
                if before.get(name) != value:
                    raise InputError(f"{self.folder / CHECKPOINT} was made with {name} "
                                     f"{before.get(name)}, not {value}")
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            self.log = saved["log"]
        self.save()  # a folder that cannot be written ends the run here
        print0(", ".join(f"{k} {v}" for k, v in self.settings.items() if k != "classes"))

    def save(self, names=(CHECKPOINT,)):
        """Write the state under each name, in this order, then log.jsonl."""
        if RANK == 0:
            buffer, state = io.BytesIO(), {k: part.state_dict() for k, part in self.parts.items()}
            torch.save({"settings": self.settings, "log": self.log, **state}, buffer)
            for name in names:
                write_file(self.folder / name, buffer.getvalue())
            lines = [json.dumps(row) + "\n" for row in self.log]
            write_file(self.folder / "log.jsonl", "".join(lines).encode())

@contextlib.contextmanager
def open_out(args):
    """Make the folder --out and lock it. InputError unless it is empty, or a run to resume."""
    lock = args.out / "lock.tmp"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        found = [path for path in args.out.iterdir() if path.suffix != ".tmp"]
        if found and not (args.resume and args.out / CHECKPOINT in found):
            raise InputError(f"--out {args.out} is not empty: name another folder, or go on with "
                             f"the run of its {CHECKPOINT} by --resume")
        file = open(lock, "w")
        if RANK == 0:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
    except BlockingIOError:
        raise InputError(f"--out {args.out} is in use by another run") from None
    except OSError as error:
        raise InputError(f"--out {args.out}: {error.strerror}") from None
    barrier()  # all have looked before one writes
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("--resume goes on from the last whole epoch") from None
    finally:
        file.close()
        lock.unlink(missing_ok=True)

def interrupt(*_):
    """Of Ctrl-C, the first interrupts, and the next are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt

def number(kind, least, most):
    """An argparse type: an int or a float from least to most."""
    def number(text):
        if not least <= kind(text) <= most:  # NaN fails this, too
            raise argparse.ArgumentTypeError(f"{text} does not lie between {least} and {most}")
        return kind(text)
    return number

def check_batch_size(size, num_images):
    least = 2 * WORLD_SIZE  # two images a process, for BatchNorm
    if size % WORLD_SIZE or not least <= size <= num_images:
        raise InputError(f"--batch-size {size} must lie between {least} and {num_images}, the "
                         f"images there are, and be a multiple of {WORLD_SIZE}, the processes")

# ==== end =========================================================================================

MAY_DIFFER = ["data_dir", "device", "workers", "out", "resume",  # between a run and its --resume
              "origin", "weights", "classes", "compile", "summary", "evaluate"]

def read_weights(path):
    """A checkpoint of ours, or a file of the authors -> state dict, settings ({} for theirs)."""
    if not path.is_file():
        raise InputError(f"--evaluate {path}: no such file")
    state = read_checkpoint(path)
    if "distribution" in state:
        raise InputError(f"--evaluate {path} is the checkpoint of a search")
    if "network" in state and "settings" in state:
        return state["network"], state["settings"]
    return state.get("state_dict", state), {}

def fill(args, values):
    """Set what the command line leaves open."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)

def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--genotype", help="of a search, a published name, or random:SEED[:gpu or :cpu]")
    add("--dataset", choices=DEFAULTS, help="by default that of the genotype")
    # ==== shared: arguments =======================================================================
    add("--data-dir", type=Path, default=Path("data"), help="of CIFAR-10, or of train/<class>/*")
    add("--image-size", type=number(int, 4, 1024), help="pixels; up to 64: kept on the device")
    add("--channels", type=number(int, 2, 4096), help="C, channels of the first cell")
    add("--cells", type=number(int, 3, 1000), help="number of cells")
    add("--batch-size", type=number(int, 1, 10**6), help="images a step, all processes together")
    add("--lr", type=number(float, 1e-8, 1e3), help="learning rate of the first epoch")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="random seed")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=number(int, 0, 1000), default=min(8, os.cpu_count() or 1),
        help="processes that read large images")
    add("--out", type=Path, default=Path("runs") / METHOD, help="folder for the results")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if any")
    # ==== end =====================================================================================
    add("--epochs", type=number(int, 1, 10**5), help="of training")
    add("--large", action="store_true", help="44 channels, 1,800 epochs and AutoAugment")
    add("--compile", action="store_true", help="use torch.compile")
    add("--summary", action="store_true", help="print parameters, multiply-adds and latency")
    add("--evaluate", type=Path, metavar="FILE", help="test a checkpoint, of ours or the authors")
    args = parser.parse_args(argv)
    args.weights, saved = read_weights(args.evaluate) if args.evaluate else (None, {})
    args.classes, args.seed = saved.get("classes"), saved.get("seed", args.seed)
    if saved and args.genotype is None:  # a checkpoint of ours says itself what network it holds
        genotype, args.origin = saved.get("genotype"), args.evaluate
        inherited = ("dataset", "image_size", "channels", "cells")
        fill(args, {name: saved.get(name) for name in inherited})
    elif args.evaluate and args.genotype is None:
        raise InputError(f"--evaluate {args.evaluate} does not say what it holds: add --genotype")
    else:
        args.origin = args.genotype or "runs/ddp_nas/genotype.json"
        genotype = load_genotype(args.origin)
    args.genotype = check_genotype(genotype, args.origin)
    args.space, searched = args.genotype["space"], genotype.get("settings")
    if isinstance(searched, dict) and searched.get("dataset") in [*DEFAULTS]:
        fill(args, {"dataset": searched["dataset"]})
        size = searched.get("image_size")
        if args.dataset == searched["dataset"] and isinstance(size, int) and 4 <= size <= 1024:
            fill(args, {"image_size": size})
    fill(args, {"dataset": "synthetic"})
    if args.space == "mobile" and (args.channels or args.cells or args.large):
        parser.error("--channels, --cells and --large are for cells; this is a chain of blocks")
    if args.dataset == "imagenet" and args.large:
        parser.error("--large is for small images, not for --dataset imagenet")
    args.recipe = {"synthetic": SYNTHETIC, "imagenet": IMAGENET_CELL}.get(args.dataset, CIFAR10)
    if args.dataset == "imagenet" and args.space == "mobile":
        args.recipe = IMAGENET_MOBILE
        if args.batch_size:  # the learning rate goes with the batch
            fill(args, {"lr": args.recipe["lr"] * args.batch_size / args.recipe["batch_size"]})
    if args.summary:
        fill(args, {"batch_size": 1})
    fill(args, LARGE if args.large else {})
    fill(args, {name: args.recipe[name] for name in ("epochs", "batch_size", "lr")})
    fill(args, DEFAULTS[args.dataset])
    args.recipe = dict(args.recipe)
    if args.space == "mobile" or args.image_size < (224 if args.dataset == "imagenet" else 32):
        args.recipe["auxiliary"] = 0.0  # there is no map of 7 or 8 pixels that its head could pool
    if args.space == "mobile":
        args.recipe["drop_path"] = 0.0
    # ==== shared: checks ==========================================================================
    if args.device == "cuda" and torch.cuda.device_count() <= LOCAL_RANK:
        parser.error(f"--device cuda: torch finds {torch.cuda.device_count()} CUDA devices here")
    if args.dataset == "cifar10" and args.image_size != 32:
        parser.error("--image-size: CIFAR-10 has 32 pixels; other sizes with --dataset imagefolder")
    if args.space == "cell" and args.image_size % 4:
        parser.error(f"--image-size {args.image_size} must be a multiple of 4, for two reductions")
    # ==== end =====================================================================================
    if args.space == "mobile":
        args.channels = args.cells = None
    elif args.dataset == "imagenet" and args.image_size % 32:
        parser.error(f"--image-size {args.image_size} must be a multiple of 32, halved 5 times")
    return args

def main(argv=None):
    """Train, test or summarise -> exit code; a fault of the input is one line, and code 2."""
    signal.signal(signal.SIGINT, interrupt)
    try:
        args = parse_args(argv)
        start_ranks(args)
        torch.backends.cudnn.allow_tf32 = False  # errors are measured in full float32
        if args.summary:
            summarise(args)
        elif args.evaluate:
            test(args)
        else:
            with open_out(args):
                train(args)
    # ==== shared: how it ends =====================================================================
    except KeyboardInterrupt as error:
        print(f"\ninterrupted. {error}", file=sys.stderr)
        return 130
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        out_of_memory = re.search("(out of|allocate) memory", str(error))
        if isinstance(error, RuntimeError) and not out_of_memory:
            raise
        lines = str(error).strip().splitlines() or ["out of memory"]  # the last ends a worker's
        print(f"{METHOD}.py: error: {lines[-1].rpartition('InputError: ')[2]}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
    # ==== end =====================================================================================

if __name__ == "__main__":
    sys.exit(main())
