"""Train what DDP-NAS (arXiv:1905.13543) and MdeNAS (arXiv:1905.07529) found, from scratch, and test it.

    python retrain.py                                             # what `python ddp_nas.py` found, about a minute
    python retrain.py --genotype runs/mdenas/genotype.json        # what another search found, on its data set
    python retrain.py --genotype DDPNAS_2 --large                 # a published cell, the largest setting
    python retrain.py --genotype random:0 --dataset cifar10       # a random cell: the baseline
    python retrain.py --genotype MDENAS --summary                 # parameters, multiply-adds, latency
    python retrain.py --genotype MDENAS --evaluate released.pth   # weights of the authors, or a checkpoint of ours
    torchrun --nproc_per_node=8 retrain.py --genotype DDPNAS_GPU --data-dir DIR  # ImageNet, 8 GPUs

The network holds the found architecture alone: its BatchNorms have weights and keep running statistics, and cells are
stacked deeper and wider than in the supernet.
"""
import argparse, functools, io, itertools, json, math, os, re, sys, time, zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F, torchvision
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

METHOD = "retrain"
DEFAULTS = {  # per data set, the size of the pictures and of a network of cells
    "synthetic": dict(image_size=16, channels=8, cells=5),
    "cifar10": dict(image_size=32, channels=36, cells=20),
    "imagefolder": dict(image_size=32, channels=36, cells=20),
    "imagenet": dict(image_size=224, channels=48, cells=14),
}
CIFAR10 = dict(epochs=600, batch_size=96, lr=0.025, decay="cosine", weight_decay=3e-4, norm_decay=3e-4, clip=5.0,
               smoothing=0.0, auxiliary=0.4, drop_path=0.2, cutout=0.5)  # cutout: 0.5 of the side, 16 of 32 pixels
SYNTHETIC = {**CIFAR10, "epochs": 30, "batch_size": 32, "lr": 0.1, "drop_path": 0.0, "cutout": 0.0}
RECIPES = {  # per data set and space; any other pair is trained like CIFAR-10
    ("synthetic", "cell"): SYNTHETIC, ("synthetic", "mobile"): SYNTHETIC,
    ("imagenet", "cell"): dict(epochs=250, batch_size=512, lr=0.1, decay=0.97, weight_decay=3e-5, norm_decay=3e-5,
                               clip=5.0, smoothing=0.1, auxiliary=0.4, drop_path=0.0, cutout=0.0),
    ("imagenet", "mobile"): dict(epochs=120, batch_size=1024, lr=0.4, decay="cosine", weight_decay=4e-5, norm_decay=0.0,
                                 clip=math.inf, smoothing=0.1, auxiliary=0.0, drop_path=0.0, cutout=0.0),
}
LARGE = dict(channels=44, epochs=1800)  # and AutoAugment: the setting of the 1.9 %
MOMENTUM = 0.9

# ==== the architecture ======================================================================================
SHORT = {"max": "max_pool_3x3", "avg": "avg_pool_3x3", "skip": "skip_connect", "sep3": "sep_conv_3x3",
         "sep5": "sep_conv_5x5", "dil3": "dil_conv_3x3", "dil5": "dil_conv_5x5"}
PUBLISHED_CELLS = {  # normal, then reduction: two operations a node, each with its source; 0 and 1: the inputs
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
        blocks = [[int(kernel), int(expansion)] for kernel, _, expansion in PUBLISHED_BLOCKS[name].split()]
        return {"space": "mobile", "backbone": name[-3:].lower(), "blocks": blocks, "settings": {"dataset": "imagenet"}}
    edges = [[SHORT[op], int(source)] for op, source in re.findall(r"(\w+) (\d)", PUBLISHED_CELLS[name])]
    nodes = [edges[i:i + 2] for i in range(0, 4 * NUM_NODES, 2)]
    return {"space": "cell", "normal": nodes[:NUM_NODES], "reduce": nodes[NUM_NODES:],
            "settings": {"dataset": "imagenet" if "IMAGENET" in name else "cifar10"}}

def random_genotype(seed, backbone=None):
    """Draw uniformly from the mobile space of the backbone; from the cell space without one."""
    g = np.random.default_rng(seed)
    if backbone:
        blocks = g.choice(CANDIDATES, len(BACKBONES[backbone][0])).tolist()
        return {"space": "mobile", "backbone": backbone, "blocks": blocks}
    normal, reduce = ([[[str(g.choice(PRIMITIVES[1:])), source]  # `none` is not an operation of a final cell
                        for source in sorted(g.choice(2 + node, 2, replace=False).tolist())]
                       for node in range(NUM_NODES)] for _ in range(2))
    return {"space": "cell", "normal": normal, "reduce": reduce}

def load_genotype(text):
    """--genotype, a published name, random:SEED or a file -> genotype as it stands there. Raises ValueError."""
    names, (kind, *rest) = [*PUBLISHED_CELLS, *PUBLISHED_BLOCKS], text.split(":")
    if text in names:
        return published_genotype(text)
    if kind == "random" and rest and rest[0].isdecimal() and rest[1:] in ([], ["gpu"], ["cpu"]):
        return random_genotype(int(rest[0]), *rest[1:])
    if not Path(text).is_file():
        raise ValueError(f"--genotype {text}: no such file: run `python ddp_nas.py` first, or name the genotype.json "
                         f"of another search, random:SEED, random:SEED:gpu or :cpu, or one of {', '.join(names)}")
    try:
        return json.loads(Path(text).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--genotype {text}: the file is not JSON, or damaged ({error})") from None

def check_genotype(genotype, origin):
    """Keep what makes the architecture. Raises ValueError, naming the place, for what is no point of its space."""
    def need(fits, place, meaning):
        if not fits:
            raise ValueError(f"--genotype {origin}: {place} must be {meaning}")

    genotype = genotype if isinstance(genotype, dict) else {}
    if genotype.get("space") == "mobile":
        backbone, blocks = genotype.get("backbone"), genotype.get("blocks")
        need(backbone in [*BACKBONES], '"backbone"', "gpu or cpu")
        count, pairs = len(BACKBONES[backbone][0]), [list(pair) for pair in CANDIDATES]
        need(isinstance(blocks, list) and len(blocks) == count, '"blocks"', f"{count} pairs of kernel and expansion")
        for i, block in enumerate(blocks):
            need(block in pairs and {*map(type, block)} == {int}, f'entry {i} of "blocks", {block},', f"one of {pairs}")
        return {"space": "mobile", "backbone": backbone, "blocks": blocks}
    need(genotype.get("space") == "cell", '"space"', "cell or mobile")
    for cell in ("normal", "reduce"):
        nodes = genotype.get(cell)
        need(isinstance(nodes, list) and len(nodes) == NUM_NODES, f'"{cell}"', f"a list of {NUM_NODES} nodes")
        for i, node in enumerate(nodes):
            edges = [[op, source] for op in PRIMITIVES[1:] for source in range(2 + i)]
            need(isinstance(node, list) and len(node) == 2 and all(e in edges and type(e[1]) is int for e in node),
                 f'node {i} of "{cell}", now {node},', f"2 pairs of operation ({', '.join(PRIMITIVES[1:])}) and source "
                 f"(0 to {1 + i})")
    return {"space": "cell", "normal": genotype["normal"], "reduce": genotype["reduce"]}

# ==== shared: operations ====================================================================================
NUM_NODES = 4              # intermediate nodes of a cell; node i has 2 + i incoming edges
NUM_EDGES = 2 + 3 + 4 + 5  # of a cell, in node order, then source order

class Zero(nn.AvgPool2d):  # with a kernel of 1, a pool that only applies the stride
    def forward(self, x):
        return torch.zeros_like(super().forward(x))

class FactorizedReduce(nn.Module):
    """Halve height and width by two 1x1 stride-2 convs, the second on the picture shifted by one pixel."""
    def __init__(self, c_in, c_out, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(c_in, c_out - c_out // 2, 1, bias=False)
        self.bn = norm(c_out)

    def forward(self, x):
        x = F.relu(x)  # strides by slicing: in the convs, their backward pass crashes torch 2.14 on a CPU at some sizes
        return self.bn(torch.cat([self.conv1(x[:, :, ::2, ::2]), self.conv2(x[:, :, 1::2, 1::2])], 1))

def relu_conv_bn(c_in, c_out, norm, *depthwise):
    return nn.Sequential(nn.ReLU(), *depthwise, nn.Conv2d(c_in, c_out, 1, bias=False), norm(c_out))

def depthwise_separable(c, kernel, stride, dilation, norm):
    padding = dilation * (kernel - 1) // 2
    return relu_conv_bn(c, c, norm, nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False))

def sep_conv(c, kernel, stride, norm):
    return nn.Sequential(depthwise_separable(c, kernel, stride, 1, norm), depthwise_separable(c, kernel, 1, 1, norm))

OPS = {  # search space 1: the candidates of an edge; the average does not count the padding
    "none": lambda c, stride, norm: Zero(1, stride),
    "max_pool_3x3": lambda c, stride, norm: nn.Sequential(nn.MaxPool2d(3, stride, 1), norm(c)),
    "avg_pool_3x3": lambda c, stride, norm: nn.Sequential(nn.AvgPool2d(3, stride, 1, False, False), norm(c)),
    "skip_connect": lambda c, stride, norm: nn.Identity() if stride == 1 else FactorizedReduce(c, c, norm),
    "sep_conv_3x3": lambda c, stride, norm: sep_conv(c, 3, stride, norm),
    "sep_conv_5x5": lambda c, stride, norm: sep_conv(c, 5, stride, norm),
    "dil_conv_3x3": lambda c, stride, norm: depthwise_separable(c, 3, stride, 2, norm),
    "dil_conv_5x5": lambda c, stride, norm: depthwise_separable(c, 5, stride, 2, norm),
}
PRIMITIVES = list(OPS)

CANDIDATES = [(kernel, expansion) for kernel in (3, 5, 7) for expansion in (1, 3, 6)]  # search space 2: of a block
BACKBONES = {  # (output channels, stride) of every block, and the width of the head
    "gpu": ([(24, 1), (32, 2), (56, 2), (56, 1), (112, 2), (112, 1), (128, 1), (128, 1), (128, 1), (256, 2),
             (256, 1), (256, 1), (256, 1), (432, 1)], 1728),
    "cpu": ([(24, 1), (32, 2), (32, 1), (32, 1), (32, 1), (48, 2), (48, 1), (48, 1), (48, 1), (88, 2), (88, 1),
             (104, 1), (104, 1), (104, 1), (104, 1), (216, 2), (216, 1), (216, 1), (216, 1), (360, 1)], 1432),
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
# ==== end ===================================================================================================

# ==== networks ==============================================================================================
# Modules are registered in the order of the authors' networks, so that their weights fit by position.

def drop_path(x, probability):
    """Zero the whole output x (B, C, H, W) for some pictures, and rescale the others to keep the mean."""
    keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= probability
    return x * (keep / (1 - probability)).to(x.dtype)

class Cell(nn.Module):
    def __init__(self, nodes, c_prev_prev, c_prev, c, reduction, reduction_prev, norm):
        super().__init__()
        self.preprocess0 = (FactorizedReduce if reduction_prev else relu_conv_bn)(c_prev_prev, c, norm)
        self.preprocess1 = relu_conv_bn(c_prev, c, norm)
        self.sources = [source for node in nodes for _, source in node]  # two a node
        self.edges = nn.ModuleList(OPS[name](c, 2 if reduction and source < 2 else 1, norm)
                                   for node in nodes for name, source in node)

    def forward(self, s0, s1, drop):
        """s0, s1: outputs of the last cell but one and of the last cell; drop: see drop_path -> (B, 4 C, H, W)."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(0, 2 * NUM_NODES, 2):
            pair = []
            for source, op in zip(self.sources[i:i + 2], self.edges[i:i + 2]):
                out = op(states[source])
                pair.append(out if drop is None or isinstance(op, nn.Identity) else drop_path(out, drop))
            states.append(pair[0] + pair[1])
        return torch.cat(states[2:], 1)

def auxiliary_head(c_in, num_classes, imagenet, norm):
    """A classifier on an inner cell for training: (B, c_in, 8, 8), on ImageNet (B, c_in, 7, 7) -> (B, num_classes)."""
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
        if imagenet:  # stems to a quarter and an eighth of the side, as if a reduction cell had come between
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
            if i == 2 * num_cells // 3:
                c_auxiliary = c_prev
        self.auxiliary = auxiliary_head(c_auxiliary, num_classes, imagenet, norm) if auxiliary else None
        self.linear = nn.Linear(c_prev, num_classes)
        self.drop_path = None  # or the probability, as a tensor: a new number would make torch.compile start again

    def forward(self, images):
        """images (B, 3, S, S) -> logits (B, num_classes); while training with an auxiliary head, its logits too."""
        s0 = self.stem0(images)
        s1 = self.stem1(s0)
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path if self.training else None)
            if i == 2 * len(self.cells) // 3 and self.training and self.auxiliary:
                auxiliary_logits = self.auxiliary(s1)
        logits = self.linear(s1.mean((2, 3)))
        return (logits, auxiliary_logits) if self.training and self.auxiliary else logits

def mobile_network(genotype, num_classes):
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
    blocks, head = BACKBONES[genotype["backbone"]]
    channels = [40] + [c for c, _ in blocks]
    chain = [MBConv(c_in, c_out, stride, *block, norm)
             for c_in, (c_out, stride), block in zip(channels, blocks, genotype["blocks"])]
    return nn.Sequential(  # the rate of the dropout before the last layer is not given: there is none
        conv_bn_relu6(3, 40, 3, 2, norm_layer=norm), *chain, conv_bn_relu6(channels[-1], head, 1, norm_layer=norm),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, num_classes))

def build_network(genotype, dataset="cifar10", num_classes=10, channels=None, cells=None, auxiliary=False):
    """The final network of a genotype, as load_genotype() gives it. "imagenet" has the stems of ImageNet.

    channels and cells are those of a network of cells, by default 36 and 20 (ImageNet: 48 and 14).
    """
    if genotype["space"] == "mobile":
        return mobile_network(genotype, num_classes)
    size = DEFAULTS["imagenet" if dataset == "imagenet" else "cifar10"]
    return CellNetwork(genotype, channels or size["channels"], cells or size["cells"], num_classes,
                       dataset == "imagenet", auxiliary)

def read_weights(path):
    """A checkpoint of ours, or a file released by the authors -> state dict, settings ({} for theirs)."""
    known = ("genotype", "dataset", "image_size", "channels", "cells", "seed")
    try:
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()  # older files are no zip archives
        state = {} if damaged else torch.load(path, map_location="cpu", weights_only=True)
        if "network" in state:
            return state["network"], {name: state["settings"][name] for name in known}
        return dict(state["state_dict"]), {}
    except FileNotFoundError:
        raise ValueError(f"--evaluate {path}: no such file") from None
    except Exception:  # torch.load has many ways to fail
        raise ValueError(f"--evaluate {path}: the file is damaged, or holds no trained network") from None

def load_weights(network, weights, path):
    """Load a state dict by position: ours, or the authors', whose names differ but for the last part.

    Raises ValueError naming the first entry that does not fit, and leaves the network as it was.
    """
    ours = network.state_dict()
    pairs = itertools.zip_longest(ours.items(), weights.items(), fillvalue=("nothing", None))
    for (name, tensor), (other, value) in pairs:
        shape, other_shape = (tuple(t.shape) if isinstance(t, torch.Tensor) else "" for t in (tensor, value))
        if str(name).split(".")[-1] != str(other).split(".")[-1] or shape != other_shape:
            raise ValueError(f"{path} does not fit the network: it has {other} {other_shape} for {name} {shape}")
    network.load_state_dict(dict(zip(ours, weights.values())))

# ==== shared: data ==========================================================================================
SMALL = 64  # pixels: up to this size a whole data set lives on the device, as one tensor
MEAN_STD = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}  # and every other data set

def make_gratings(count, size, seed):
    """Draw pictures of two gratings under noise -> images (count, size, size, 3) uint8, labels (count,), class names.

    The class is the pair of their angles, out of 5. Mirror images have the same angle, since pictures are flipped.
    """
    g = torch.Generator().manual_seed(seed)
    pairs = torch.combinations(torch.arange(5))                                   # (10, 2)
    labels = torch.randint(len(pairs), (count,), generator=g)
    mirror = 2 * torch.randint(2, (count, 2), generator=g) - 1
    angle = pairs[labels] * mirror * math.pi / 8                                  # (count, 2), -90 to 90 degrees
    frequency = 0.08 + 0.12 * torch.rand(count, 2, generator=g)                   # cycles per pixel
    phase = 2 * math.pi * torch.rand(count, 2, generator=g)
    colour = F.normalize(torch.randn(count, 2, 3, generator=g), dim=2)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    angle, frequency, phase = (t[:, :, None, None] for t in (angle, frequency, phase))
    waves = torch.sin(2 * math.pi * frequency * (x * angle.cos() + y * angle.sin()) + phase)  # (count, 2, size, size)
    images = torch.einsum("nwyx,nwc->nyxc", waves, colour) + 0.8 * torch.randn(count, size, size, 3, generator=g)
    return (128 + 50 * images).clamp(0, 255).to(torch.uint8), labels, [f"angles {a} and {b}" for a, b in pairs.tolist()]

class Folder(torchvision.datasets.ImageFolder):
    """Picture files, <folder>/<class>/*. A key is (index, seed): the seed alone draws the augmentation; -1: none."""
    def __init__(self, folder, size):
        try:
            super().__init__(folder)
        except OSError as error:  # no such folder, no class in it, or a class without pictures
            raise ValueError(f"--data-dir: {folder} must hold a folder of pictures for each class ({error})") from None
        if len(self.classes) < 2:
            raise ValueError(f"--data-dir: {folder} holds only one class, {self.classes[0]}: two or more are needed")
        self.augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(),
                                     v2.ColorJitter(0.4, 0.4, 0.4, 0.2), v2.PILToTensor()])
        self.plain = v2.Compose([v2.Resize(size if size <= SMALL else size * 256 // 224), v2.CenterCrop(size),
                                 v2.PILToTensor()])

    def __getitem__(self, key):
        path, label = self.samples[key[0]]
        try:
            picture = self.loader(path)
        except Exception as error:  # damage has many names
            raise ValueError(f"{path} cannot be read as a picture: replace or remove it ({error})") from None
        if key[1] < 0:
            return self.plain(picture), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key[1])
            return self.augmented(picture), label

def open_pictures(args, train):
    """Open the pictures for training, or for the test -> pictures, labels (N,), class names. ValueError if damaged.

    Pictures: uint8 (N, S + 2 pad, S + 2 pad, 3) on the device, padded for the crops, or a Folder where S > SMALL.
    """
    if args.dataset == "synthetic":
        images, labels, classes = make_gratings(768 if train else 1000, args.image_size, seed=2 * args.seed + train)
    elif args.dataset == "cifar10":
        for turn in range(WORLD_SIZE):  # one after the other, so that the first one downloads for all
            try:
                if turn == RANK:
                    found = torchvision.datasets.CIFAR10(args.data_dir, train, download=True)
            except (OSError, RuntimeError) as error:
                raise ValueError(f"--data-dir: CIFAR-10 is missing or damaged in {args.data_dir}, and not downloadable "
                                 f"({error}): connect to the network, or put cifar-10-python.tar.gz there") from None
            sum_over_ranks(torch.zeros(1, device=args.device)).item()
        images, labels, classes = torch.from_numpy(found.data), torch.tensor(found.targets), found.classes
    else:
        folder = Folder(args.data_dir / ("train" if train else "val"), args.image_size)
        labels, classes = torch.tensor(folder.targets), folder.classes
        if args.image_size > SMALL:
            return folder, labels, classes
        images = torch.stack([folder[i, -1][0].permute(1, 2, 0) for i in range(len(labels))])
    pad = args.image_size // 8  # 4 pixels for pictures of 32
    return F.pad(images.to(args.device), (0, 0, pad, pad, pad, pad)), labels.to(args.device), classes

class Batches:
    """Batches of images (B, 3, S, S) uint8 and labels (B,) on the device; each rank gets its share of every batch.

    Training batches are shuffled, augmented and all full. Order and augmentation follow from seed and `epoch` alone.
    """
    def __init__(self, pictures, labels, index, batch_size, train, args):
        self.index, self.batch_size, self.train, self.seed, self.epoch = index, batch_size, train, args.seed, 0
        self.device, self.keys, self.size = args.device, [], args.image_size
        self.images, self.labels, self.loader = pictures, labels, None
        mean_std = torch.tensor(MEAN_STD.get(args.dataset, MEAN_STD["imagenet"]), device=args.device)
        self.mean, self.std = 255 * mean_std[:, :, None, None]  # (3, 1, 1) each, in units of a pixel's 0 to 255
        if isinstance(pictures, Folder):
            self.loader = torch.utils.data.DataLoader(pictures, batch_sampler=self.keys, num_workers=args.workers,
                persistent_workers=args.workers > 0, pin_memory=args.device == "cuda")

    def __len__(self):
        return len(self.index) // self.batch_size if self.train else math.ceil(len(self.index) / self.batch_size)

    def __iter__(self):
        start, g = time.perf_counter(), torch.Generator().manual_seed((1_000_003 * self.seed + self.epoch) % 2**63)
        order = torch.randperm(len(self.index), generator=g) if self.train else torch.arange(len(self.index))
        seeds = torch.randint(2**31, order.shape, generator=g) if self.train else torch.full_like(order, -1)
        # (N, 2): a picture, and the seed of its augmentation; moved to the device at once, since that waits for it
        keys = torch.stack([self.index[order], seeds], 1).to(self.device if self.loader is None else "cpu")
        shares = [batch[RANK::WORLD_SIZE] for batch in keys.split(self.batch_size)[:len(self)] if len(batch) > RANK]
        self.keys[:] = [share.tolist() for share in shares] if self.loader is not None else []  # what the loader reads
        for i, (images, labels) in enumerate((self.crop(*s.T) for s in shares) if self.loader is None else self.loader):
            if i < 2:  # the clock starts anew after the first batch, which warms up
                torch.zeros(1, device=self.device).item()  # waits for the device
                start = time.perf_counter()
            yield (images.to(self.device, non_blocking=True, memory_format=torch.channels_last),
                   labels.to(self.device, non_blocking=True))
        torch.zeros(1, device=self.device).item()
        self.seconds = (time.perf_counter() - start) * len(shares) / max(1, len(shares) - 1)  # scaled to all

    def crop(self, index, seeds):
        """index, seeds (B,) -> images (B, 3, S, S), cropped and flipped as the seeds say, and labels (B,)."""
        size, shifts = self.size, 2 * (self.size // 8) + 1
        if not self.train:
            seeds = torch.full_like(seeds, shifts**2 // 2)  # the centre, not flipped
        top, left, flip = seeds % shifts, seeds // shifts % shifts, seeds // shifts**2 % 2 == 1
        along = torch.arange(size, device=self.device)
        rows = top[:, None] + along                                                         # (B, S)
        columns = left[:, None] + torch.where(flip[:, None], size - 1 - along, along)       # (B, S)
        images = self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]   # (B, S, S, 3)
        return images.permute(0, 3, 1, 2), self.labels[index]  # this view is in channels_last order

    def normalise(self, images):
        return (images - self.mean) / self.std

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun: one per device

def say(*text, **options):
    if RANK == 0:
        print(*text, **options, flush=True)

def progress(text):
    if sys.stdout.isatty():  # a line that rewrites itself; nothing in a file
        say(f"{text}\033[K", end="\r")

def start_ranks(device):
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        sum_over_ranks(torch.zeros(1, device=device)).item()  # all ranks have looked at --out before one writes there

def sum_over_ranks(tensor):
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor

def step(network, optimizer, loss, clip):
    """One step down the gradient averaged over the ranks. What is not on the path keeps its weight and momentum."""
    optimizer.zero_grad()
    loss.backward()
    weights = [weight for weight in network.parameters() if weight.grad is not None]  # one walk: it takes milliseconds
    for weight in weights if WORLD_SIZE > 1 else []:
        sum_over_ranks(weight.grad).div_(WORLD_SIZE)  # in the same order on every rank, since all train the same path
    nn.utils.clip_grad_norm_(weights, clip)
    optimizer.step()

def write_file(path, data):
    """Write text or bytes so that the file is there whole or not at all, whenever the power goes."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data if isinstance(data, bytes) else data.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}); what was there is kept") from None
    finally:
        temporary.unlink(missing_ok=True)

def save_checkpoint(path, settings, parts, log):
    """Write settings, the state of every part and the log to path, and the log beside it as log.jsonl."""
    if RANK == 0:
        buffer = io.BytesIO()
        torch.save({"settings": settings, "log": log, **{k: part.state_dict() for k, part in parts.items()}}, buffer)
        write_file(path, buffer.getvalue())
        write_file(path.with_name("log.jsonl"), "".join(json.dumps(row) + "\n" for row in log))

def load_checkpoint(path, settings, parts, device):
    """Give every part its state from path -> log. Raises ValueError for a damaged file or one of other settings."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        state = None if damaged else torch.load(path, map_location=device, weights_only=True)
        saved, log, states = state["settings"], state["log"], {name: state[name] for name in parts}
    except Exception:  # torch.load has many ways to fail
        raise ValueError(f"{path} is damaged, or not a checkpoint of this script: nothing was changed") from None
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(f"{path} was made with {name} {saved.get(name)}, not {value}: resume with the same")
    for name, part in parts.items():
        part.load_state_dict(states[name])
    return log
# ==== end ===================================================================================================

# ==== training and test =====================================================================================
def cutout(images, length):
    """Set a square of length pixels to 0 in each of images (B, 3, S, S); it may hang over the edge."""
    along = torch.arange(images.shape[-1], device=images.device)                         # (S,)
    y, x = torch.randint(len(along), (2, len(images), 1), device=images.device)          # (B, 1) each, the centres
    rows, columns = ((along >= c - length // 2) & (along < c + length // 2) for c in (y, x))  # (B, S)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)

def train_epoch(network, optimizer, batches, args, title):
    """One pass over the batches -> mean loss, the auxiliary one included. Raises ValueError if it is not finite."""
    network.train()
    auto_augment = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.recipe["smoothing"])
    total = 0
    for i, (images, labels) in enumerate(batches):
        progress(f"{title}  training, batch {i + 1} of {len(batches)}")
        if args.large:
            images = torch.stack([auto_augment(image) for image in images])
        images = batches.normalise(images)
        if args.recipe["cutout"]:
            images = cutout(images, round(args.recipe["cutout"] * args.image_size))
        with torch.autocast(batches.device, torch.bfloat16, enabled=batches.device == "cuda"):
            outputs = network(images)
            logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = criterion(logits, labels)
            for auxiliary_logits in auxiliary:
                loss = loss + args.recipe["auxiliary"] * criterion(auxiliary_logits, labels)
        step(network, optimizer, loss, args.recipe["clip"])
        total = total + loss.detach()  # stays on the device: reading it would wait for the step
    mean = sum_over_ranks(total).item() / len(batches) / WORLD_SIZE
    if not math.isfinite(mean + nn.utils.get_total_norm(network.parameters()).item()):
        raise ValueError(f"{title}: loss or weights are not finite (loss {mean}): start again with a smaller --lr; "
                         "the last checkpoint is that of the epoch before")
    for buffer in network.buffers():
        if WORLD_SIZE > 1 and buffer.is_floating_point():  # running statistics of each rank's share
            sum_over_ranks(buffer).div_(WORLD_SIZE)
    return mean

@torch.no_grad()
def evaluate(network, batches, title):
    """Top-1 and top-5 error, in [0, 1], the same on every rank."""
    network.eval()
    wrong = torch.zeros(2, device=batches.device)
    for i, (images, labels) in enumerate(batches):
        progress(f"{title}  test, batch {i + 1} of {len(batches)}")
        with torch.autocast(batches.device, torch.bfloat16, enabled=batches.device == "cuda"):
            logits = network(batches.normalise(images))
        hit = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5), the most likely first
        wrong += torch.stack([(~hit[:, 0]).sum(), (~hit.any(1)).sum()])
    return [count / len(batches.index) for count in sum_over_ranks(wrong).tolist()]

def count_parameters(network):
    """Weights of the network that is used in the end, without the auxiliary head."""
    return sum(w.numel() for name, w in network.named_parameters() if not name.startswith("auxiliary."))

def open_network(args, num_classes, auxiliary):
    network = build_network(args.genotype, args.dataset, num_classes, args.channels, args.cells, auxiliary)
    return network.to(args.device, memory_format=torch.channels_last)

def summarise(args):
    """--summary: print parameters, multiply-adds and latency."""
    num_classes = (len(Folder(args.data_dir / "train", args.image_size).classes) if args.dataset == "imagefolder" else
                   1000 if args.dataset == "imagenet" else 10)
    network, cuda, times = open_network(args, num_classes, False).eval(), args.device == "cuda", []
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=cuda):
        with FlopCounterMode(display=False) as counter:
            network(images[:1])
        for _ in range(120):
            start = time.perf_counter()
            network(images)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - start)
    say(f"{args.origin} on {args.dataset}, {num_classes} classes, {args.image_size} x {args.image_size} pixels: "
        f"{count_parameters(network):,} parameters, {counter.get_total_flops() / 2e6:,.1f} M multiply-adds, latency "
        f"{1000 * np.median(times[20:]):.2f} ms (median of 100 forward passes, batch {args.batch_size}, "
        f"{torch.cuda.get_device_name() if cuda else 'cpu'}, {'bfloat16' if cuda else 'float32'})")

def test(args):
    """--evaluate: print the errors of the weights in a file on the test pictures."""
    start_ranks(args.device)
    pictures, labels, classes = open_pictures(args, train=False)
    network = open_network(args, len(classes), any("aux" in str(name) for name in args.weights))
    load_weights(network, args.weights, args.evaluate)
    batches = Batches(pictures, labels, torch.arange(len(labels)), args.batch_size, False, args)
    top1, top5 = evaluate(network, batches, str(args.evaluate))
    say(f"{args.evaluate}: top-1 error {top1:.2%}, top-5 error {top5:.2%} of {len(labels)} pictures, "
        f"{count_parameters(network):,} parameters")

def train(args):
    args.out.mkdir(parents=True, exist_ok=True)
    last = args.out / "last.pt"
    if last.exists() and not args.resume:
        raise ValueError(f"{args.out} holds a run: add --resume to go on with it, or name another --out")
    start_ranks(args.device)
    pictures, labels, classes = open_pictures(args, train=True)
    test_pictures, test_labels, test_classes = open_pictures(args, train=False)
    if classes != test_classes:
        raise ValueError(f"--data-dir: the classes in {args.data_dir}/train and val differ: only one of them has "
                         + ", ".join(sorted({*classes} ^ {*test_classes})))
    if len(labels) < args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(labels)} training pictures")
    batches = Batches(pictures, labels, torch.arange(len(labels)), args.batch_size, True, args)
    test_batches = Batches(test_pictures, test_labels, torch.arange(len(test_labels)), args.batch_size, False, args)
    torch.manual_seed(args.seed)
    # The auxiliary head needs a map of 7 or 8 pixels: on smaller pictures there is none.
    least = 224 if args.dataset == "imagenet" else 32
    auxiliary = args.space == "cell" and args.recipe["auxiliary"] and args.image_size >= least
    network = open_network(args, len(classes), auxiliary)
    norms = {w for module in network.modules() if isinstance(module, nn.BatchNorm2d) for w in module.parameters()}
    groups = [{"params": [w for w in network.parameters() if w not in norms]},
              {"params": [w for w in network.parameters() if w in norms], "weight_decay": args.recipe["norm_decay"]}]
    optimizer = torch.optim.SGD(groups, args.lr, MOMENTUM, weight_decay=args.recipe["weight_decay"])
    schedule = (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs) if args.recipe["decay"] == "cosine"
                else torch.optim.lr_scheduler.ExponentialLR(optimizer, args.recipe["decay"]))
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    may_change = "origin weights data_dir device workers out resume compile summary evaluate".split()
    settings = {k: v for k, v in vars(args).items() if k not in may_change} | {"pictures": len(labels)}
    log = load_checkpoint(last, settings, parts, args.device) if last.exists() else []
    save_checkpoint(last, settings, parts, log)  # a folder that cannot be written ends the run here
    say(*(f"{name} {value}" for name, value in settings.items() if name != "genotype"), sep=", ")
    parameters = count_parameters(network)
    say(f"{args.origin}: {parameters:,} parameters{'' if auxiliary else ', no auxiliary head'}; {len(log)} epochs "
        f"done, {args.epochs - len(log)} ahead on {args.device}; results in {args.out}")
    drop = args.recipe["drop_path"] if args.space == "cell" else 0
    if drop:
        network.drop_path = torch.zeros((), device=args.device)
    if args.compile:
        network.compile()

    while len(log) < args.epochs:
        epoch, title = len(log), f"epoch {len(log) + 1:3}/{args.epochs}"
        torch.manual_seed((1_000_003 * args.seed + WORLD_SIZE * epoch + RANK) % 2**63)  # of cutout and drop-path
        batches.epoch = epoch
        if drop:
            network.drop_path.fill_(drop * epoch / args.epochs)
        loss = train_epoch(network, optimizer, batches, args, title)
        top1, top5 = evaluate(network, test_batches, title)
        schedule.step()
        seconds = batches.seconds + test_batches.seconds
        log.append({"epoch": epoch + 1, "loss": loss, "top1_error": top1, "top5_error": top5, "seconds": seconds})
        best = min(log, key=lambda row: row["top1_error"])
        if best is log[-1]:
            save_checkpoint(args.out / "best.pt", settings, {"network": network}, log)
        save_checkpoint(last, settings, parts, log)
        ahead = (args.epochs - len(log)) * sum(row["seconds"] for row in log) / len(log)
        say(f"{title}  loss {loss:.3f}  top-1 error {top1:.2%}  top-5 error {top5:.2%}  "
            f"{(len(batches) * args.batch_size + len(test_labels)) / seconds:.0f} pictures/s  "
            f"{timedelta(seconds=round(ahead))} left")

    best = min(log, key=lambda row: row["top1_error"])
    say(f"top-1 error {log[-1]['top1_error']:.2%}, top-5 error {log[-1]['top5_error']:.2%} (best.pt: "
        f"{best['top1_error']:.2%}, epoch {best['epoch']}), {parameters:,} parameters, "
        f"{timedelta(seconds=round(sum(row['seconds'] for row in log)))}")

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--genotype", default="runs/ddp_nas/genotype.json", help="of a search, a published name, or random:SEED")
    add("--dataset", choices=DEFAULTS, help="by default that of the genotype")
    # ==== shared: arguments =================================================================================
    add("--data-dir", type=Path, default=Path("data"), help="with or for CIFAR-10, or with train/<class>/*")
    add("--image-size", type=int, help="pixels; pictures up to 64 live on the device")
    add("--channels", type=int, help="C, of the first cell")
    add("--cells", type=int, help="how many")
    add("--batch-size", type=int, help="over all the processes")
    add("--lr", type=float, help="learning rate of the first epoch")
    add("--seed", type=int, default=0, help="of all that is drawn at random")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="processes that read large pictures")
    add("--out", type=Path, default=Path("runs") / METHOD, help="folder for the results")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    # ==== end ===============================================================================================
    add("--epochs", type=int, help="of training")
    add("--large", action="store_true", help="44 channels, 1,800 epochs and AutoAugment")
    add("--compile", action="store_true", help="use torch.compile")
    add("--summary", action="store_true", help="print parameters, multiply-adds and latency")
    add("--evaluate", type=Path, metavar="FILE", help="test a checkpoint, of ours or of the authors")
    args = parser.parse_args(argv)
    args.origin, args.weights = args.genotype, None
    if args.evaluate:  # a checkpoint of ours says itself what network it holds
        weights, settings = read_weights(args.evaluate)
        parser.set_defaults(origin=args.evaluate, weights=weights, **settings)
        args = parser.parse_args(argv)  # again, so that the command line still wins
    genotype = load_genotype(args.genotype) if isinstance(args.genotype, str) else args.genotype
    args.genotype = check_genotype(genotype, args.origin)
    args.space, made_with = args.genotype["space"], genotype.get("settings")
    if args.dataset is None:
        made_with = made_with if isinstance(made_with, dict) else {}
        args.dataset = made_with["dataset"] if made_with.get("dataset") in [*DEFAULTS] else "synthetic"
        if args.image_size is None and type(made_with.get("image_size")) is int:
            args.image_size = made_with["image_size"]
    if args.space == "mobile" and (args.channels or args.cells or args.large):
        parser.error("--channels, --cells and --large are for cells, and this architecture is a chain of blocks")
    if args.dataset == "imagenet" and args.large:
        parser.error("--large is for small pictures, not for --dataset imagenet")
    args.recipe = RECIPES.get((args.dataset, args.space), CIFAR10)
    if args.summary and args.batch_size is None:
        args.batch_size = 1
    if args.lr is None and args.batch_size and args.space == "mobile":
        args.lr = args.recipe["lr"] * args.batch_size / args.recipe["batch_size"]
    for name, value in {**args.recipe, **(LARGE if args.large else {})}.items():
        if vars(args).get(name, 0) is None:
            setattr(args, name, value)
    # ==== shared: defaults and checks =======================================================================
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, value in vars(args).items():
        least = {"seed": 0, "workers": 0, "cells": 3}.get(name, 1)
        if type(value) is int and value < least or type(value) is float and not 0 < value < math.inf:
            allowed = "a number above 0" if type(value) is float else f"{least} or more"
            parser.error(f"--{name.replace('_', '-')} {value}: it must be {allowed}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here, use --device cpu")
    if args.dataset == "cifar10" and args.image_size != 32:
        parser.error("--image-size: the pictures of CIFAR-10 have 32 pixels; other sizes go with --dataset imagefolder")
    if args.space == "cell" and args.image_size % 4:
        parser.error(f"--image-size {args.image_size} is not a multiple of 4: two reduction cells halve it twice")
    if args.batch_size % WORLD_SIZE:
        parser.error(f"--batch-size {args.batch_size} does not divide among {WORLD_SIZE} processes")
    # ==== end ===============================================================================================
    if args.space == "mobile":
        args.channels = args.cells = None
    elif args.dataset == "imagenet" and args.image_size % 32:
        parser.error(f"--image-size {args.image_size} is not a multiple of 32: stems and cells halve it five times")
    return args

def main(argv=None):
    """Train, test or summarise, and return the exit code; what a user can mend becomes one line on stderr."""
    try:
        args = parse_args(argv)
        (summarise if args.summary else test if args.evaluate else train)(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume goes on from the last whole epoch", file=sys.stderr)
        return 130
    except (OSError, ValueError, torch.OutOfMemoryError) as error:  # the last line: above it may stand a traceback
        print(f"{METHOD}.py: error: {str(error).splitlines()[-1]}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
