"""Train what DDP-NAS (arXiv:1905.13543) and MdeNAS (arXiv:1905.07529) found, and test it.

    python retrain.py                                         # what `python ddp_nas.py` found
    python retrain.py --genotype runs/mdenas/genotype.json    # another search, on its data set
    python retrain.py --genotype DDPNAS_2 --large             # a published cell, largest setting
    python retrain.py --genotype "Genotype(normal=[...], ...)"    # a cell in DARTS's notation
    python retrain.py --genotype random:0 --dataset cifar10   # a random cell: the baseline
    python retrain.py --genotype MDENAS --summary             # parameters, multiply-adds, latency
    python retrain.py --genotype MDENAS --evaluate FILE       # weights of the authors, or of ours
    torchrun --nproc_per_node=8 retrain.py --genotype DDPNAS_GPU --data-dir DIR    # ImageNet

The network holds the found architecture alone, and its BatchNorms have weights and keep running
statistics. In a program of your own:

    network, classes, preprocess = retrain.load_network("runs/retrain/checkpoint.pt")

The operations, and all from the images on, are those of ddp_nas.py to the character, except for
MAY_DIFFER, parse_args() and main().
"""
import argparse, ast, io, json, math, os, re, sys, textwrap, time
from collections import namedtuple
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F, torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

METHOD = "retrain"
# The recipes. lr_decay: "cosine" to 0, or a factor per epoch; norm_decay: the weight decay of
# BatchNorms; clip: the largest norm of a gradient; smoothing: of the labels; auxiliary: the weight
# of the auxiliary head's loss; drop_path: its probability in the end; cutout: the side of its
# square / the side of the image. image_size, channels and cells: the size of the images, and of a
# network of cells.
CIFAR = dict(image_size=32, channels=36, cells=20, epochs=600, batch_size=96, lr=0.025,
             lr_decay="cosine", weight_decay=3e-4, norm_decay=3e-4, clip=5.0, smoothing=0.0,
             auxiliary=0.4, drop_path=0.2, cutout=0.5)
LARGE = dict(channels=44, epochs=1800)  # with AutoAugment: DDP-NAS's large setting
IMAGENET = dict(image_size=224, channels=48, cells=14, epochs=250, batch_size=512, lr=0.1,
                lr_decay=0.97, weight_decay=3e-5, norm_decay=3e-5, clip=5.0, smoothing=0.1,
                auxiliary=0.4, drop_path=0.0, cutout=0.0)
IMAGENET_MOBILE = dict(epochs=120, batch_size=1024, lr=None, lr_decay="cosine", weight_decay=4e-5,
                       norm_decay=0.0, clip=math.inf, smoothing=0.1, auxiliary=0.0)
LR_MOBILE = 0.4 / 1024  # learning rate of IMAGENET_MOBILE for each image of a batch
DEFAULTS = {  # by data set
    "synthetic": {**CIFAR, "image_size": 16, "channels": 8, "cells": 5, "epochs": 15,
                  "batch_size": 32, "lr": 0.1, "drop_path": 0.0, "cutout": 0.0},
    "cifar10": CIFAR, "cifar100": CIFAR, "imagefolder": CIFAR, "imagenet": IMAGENET,
}
MOMENTUM = 0.9
MAY_DIFFER = (  # between a run and its --resume
    "data_dir", "device", "workers", "out", "resume", "compile", "summary", "evaluate", "name")

# ==== operations ==================================================================================
NODES = range(2, 6)      # of a cell, each with an edge from every lower number; 0 and 1: its inputs

class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return torch.zeros_like(x[:, :, ::self.stride, ::self.stride])

class FactorizedReduce(nn.Module):
    """Two 1x1 convs of every second pixel, the second shifted by one pixel in x and in y."""
    def __init__(self, c_in, c_out, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(c_in, c_out - c_out // 2, 1, bias=False)
        self.bn = norm(c_out)

    def forward(self, x):
        # Slices in place of a stride: the ReLU has half as much to do, and on a CPU the backward
        # pass of a strided 1x1 conv can crash in torch 2.14.
        even, odd = x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]
        return self.bn(torch.cat([self.conv1(F.relu(even)), self.conv2(F.relu(odd))], 1))

def relu_conv_bn(c_in, c_out, norm):
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), norm(c_out))

def depthwise_separable(c, kernel, stride, dilation, norm):
    first = nn.ReLU()
    if stride == dilation == 2:  # would read even rows and columns only: the pool takes these
        first = nn.Sequential(nn.AvgPool2d(1, 2), first)
        stride = dilation = 1
    padding = dilation * (kernel - 1) // 2
    depthwise = nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False)
    return nn.Sequential(first, depthwise, nn.Conv2d(c, c, 1, bias=False), norm(c))

def sep_conv(c, kernel, stride, norm):
    return nn.Sequential(depthwise_separable(c, kernel, stride, 1, norm),
                         depthwise_separable(c, kernel, 1, 1, norm))

OPS = {  # the space of cells: the candidates of an edge
    "none": lambda c, stride, norm: Zero(stride),
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

# As in DARTS: normal and reduce are lists of 8 pairs (operation, source), two for each node. The
# sources 0 and 1 are the inputs of the cell, 2 to 5 its nodes, of which the output is made.
Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")

# The space of chains: the candidates of a block, (kernel, expansion), and the authors' backbones
# for a GPU and for a CPU: (output channels, stride) of every block, and the width of the head.
CANDIDATES = [(kernel, expansion) for kernel in (3, 5, 7) for expansion in (1, 3, 6)]
BACKBONES = {
    "gpu": ([(24, 1), (32, 2), (56, 2), (56, 1), (112, 2), (112, 1), (128, 1), (128, 1), (128, 1),
             (256, 2), (256, 1), (256, 1), (256, 1), (432, 1)], 1728),
    "cpu": ([(24, 1), (32, 2), (32, 1), (32, 1), (32, 1), (48, 2), (48, 1), (48, 1), (48, 1),
             (88, 2), (88, 1), (104, 1), (104, 1), (104, 1), (104, 1), (216, 2), (216, 1),
             (216, 1), (216, 1), (360, 1)], 1432),
}

conv_bn_relu6 = partial(torchvision.ops.Conv2dNormActivation, activation_layer=nn.ReLU6)

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

# ==== the architecture ============================================================================
def make_genotype(normal, reduce):
    """8 pairs for each cell -> Genotype; the output of a cell is made of all its nodes."""
    return Genotype(normal, NODES, reduce, NODES)

PUBLISHED = {
    "MDENAS": make_genotype(
        [("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("skip_connect", 0), ("sep_conv_5x5", 1),
         ("sep_conv_5x5", 3), ("sep_conv_3x3", 1), ("dil_conv_5x5", 3), ("max_pool_3x3", 4)],
        [("max_pool_3x3", 0), ("sep_conv_5x5", 1), ("skip_connect", 0), ("skip_connect", 1),
         ("sep_conv_3x3", 3), ("skip_connect", 2), ("dil_conv_3x3", 3), ("sep_conv_5x5", 0)]),
    "DDPNAS_IMAGENET": make_genotype(
        [("sep_conv_5x5", 1), ("max_pool_3x3", 0), ("dil_conv_3x3", 0), ("sep_conv_3x3", 1),
         ("sep_conv_3x3", 0), ("max_pool_3x3", 3), ("dil_conv_3x3", 2), ("avg_pool_3x3", 0)],
        [("sep_conv_5x5", 1), ("avg_pool_3x3", 0), ("avg_pool_3x3", 1), ("skip_connect", 0),
         ("skip_connect", 2), ("sep_conv_3x3", 1), ("dil_conv_5x5", 0), ("dil_conv_5x5", 4)]),
    "DDPNAS_1": make_genotype(
        [("sep_conv_5x5", 0), ("max_pool_3x3", 1), ("sep_conv_3x3", 2), ("max_pool_3x3", 0),
         ("dil_conv_5x5", 0), ("sep_conv_3x3", 1), ("avg_pool_3x3", 2), ("max_pool_3x3", 4)],
        [("sep_conv_3x3", 1), ("dil_conv_5x5", 0), ("dil_conv_5x5", 1), ("sep_conv_5x5", 0),
         ("sep_conv_3x3", 0), ("avg_pool_3x3", 3), ("max_pool_3x3", 1), ("sep_conv_3x3", 0)]),
    "DDPNAS_2": make_genotype(
        [("sep_conv_5x5", 0), ("skip_connect", 1), ("dil_conv_5x5", 2), ("max_pool_3x3", 0),
         ("sep_conv_5x5", 1), ("skip_connect", 2), ("skip_connect", 1), ("sep_conv_3x3", 3)],
        [("max_pool_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 2), ("avg_pool_3x3", 0),
         ("avg_pool_3x3", 0), ("dil_conv_3x3", 1), ("sep_conv_3x3", 0), ("max_pool_3x3", 4)]),
    "DARTS_V2": make_genotype(
        [("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
         ("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)],
        [("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1),
         ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)]),
    "DDPNAS_GPU": [(7, 6), (7, 3), (5, 6), (7, 1), (3, 6), (7, 6), (5, 1), (5, 3), (5, 6), (7, 6),
                   (7, 6), (5, 3), (7, 6), (5, 6)],
    "MDENAS_GPU": [(7, 6), (5, 6), (7, 3), (3, 6), (5, 6), (3, 1), (7, 3), (7, 6), (3, 3), (3, 6),
                   (7, 3), (3, 3), (3, 3), (5, 6)],
    "MDENAS_CPU": [(5, 3), (7, 1), (3, 6), (5, 3), (5, 3), (5, 3), (5, 1), (5, 6), (5, 1), (5, 6),
                   (7, 3), (5, 3), (7, 3), (7, 6), (3, 6), (5, 3), (7, 6), (7, 1), (3, 3), (3, 3)],
}

def random_genotype(seed, backbone=None):
    """Draw uniformly from the mobile space of the backbone; from the cell space without one."""
    g = np.random.default_rng(seed)
    if backbone:
        num_blocks = len(BACKBONES[backbone][0])
        return [tuple(block) for block in g.choice(CANDIDATES, num_blocks).tolist()]
    names, cells = [name for name in OPS if name != "none"], []
    for _ in range(2):  # the normal cell, the reduction cell
        pairs = []
        for node in NODES:
            sources = sorted(g.choice(node, 2, replace=False).tolist())
            pairs += [(str(g.choice(names)), source) for source in sources]
        cells.append(pairs)
    return make_genotype(*cells)

def parse_genotype(text):
    """A text -> Genotype, or a chain of blocks [(kernel, expansion), ...]. Nothing is evaluated.

    Genotype(...) is flat, as in DARTS, or nested, two pairs a node; a name and = may precede it.
    Raises a UserError that says what the search space does not hold.
    """
    try:
        (statement,) = ast.parse(text.strip()).body
        tree = statement.value
        if isinstance(tree, ast.Call) and ast.unparse(tree.func) == "Genotype":
            fields = Genotype(*map(ast.unparse, tree.args),
                              **{field.arg: ast.unparse(field.value) for field in tree.keywords})
            concats = {fields.normal_concat, fields.reduce_concat}
            if not concats <= {"range(2, 6)", "[2, 3, 4, 5]"}:
                raise UserError("a cell's output is made of all its nodes: concat is range(2, 6)")
            return make_genotype(check_cell(ast.literal_eval(fields.normal)),
                                 check_cell(ast.literal_eval(fields.reduce)))
        return check_blocks(ast.literal_eval(tree))
    except UserError as error:
        raise UserError(f"--genotype {textwrap.shorten(text, 80)}: {error}") from None
    except Exception:  # there are many ways not to be a genotype
        raise UserError(f"--genotype {textwrap.shorten(text, 80)} is neither Genotype(normal=[("
                        "operation, source), ...], normal_concat=range(2, 6), reduce=[...], reduce"
                        "_concat=range(2, 6)) nor a list [(kernel, expansion), ...]") from None

def check_cell(nodes):
    """8 pairs (operation, source), or 4 nodes of two -> 8 pairs."""
    pairs = nodes
    if len(nodes) == len(NODES):
        pairs = [pair for first, second in nodes for pair in (first, second)]
    if len(pairs) != 2 * len(NODES):
        raise UserError(f"a cell has 8 edges, 2 for each of 4 nodes, not {len(pairs)}")
    names = [name for name in OPS if name != "none"]
    for i, (operation, source) in enumerate(pairs):
        if operation not in names or source not in range(2 + i // 2):
            raise UserError(f"({operation}, {source}) is not a valid edge of node {2 + i // 2}: "
                            f"operations are {', '.join(names)}, sources 0 to {1 + i // 2}")
    return [(operation, int(source)) for operation, source in pairs]

def check_blocks(blocks):
    """A list of pairs (kernel, expansion) -> the same, as tuples."""
    lengths = [len(backbone) for backbone, _ in BACKBONES.values()]
    unknown = [block for block in blocks if tuple(block) not in CANDIDATES]
    if unknown or len(blocks) not in lengths:
        raise UserError(f"a chain has {' or '.join(map(str, lengths))} blocks, not {len(blocks)}, "
                        f"each (kernel, expansion) of {CANDIDATES}; unknown: {unknown}")
    return [(int(kernel), int(expansion)) for kernel, expansion in blocks]

def load_genotype(name):
    """What --genotype names -> Genotype or blocks, and its origin: a data set, as settings."""
    drawn = re.fullmatch(r"random:(\d+)(?::(gpu|cpu))?", name)
    if drawn:
        return random_genotype(int(drawn[1]), drawn[2]), {}
    text, origin = name, {}
    if name in PUBLISHED:
        text = str(PUBLISHED[name])
    elif os.path.isfile(name) or not re.match(r"\s*(\w+\s*=\s*)?(Genotype\s*\(|\[)", name):
        text, origin = read_genotype(name)
    genotype = parse_genotype(text)
    imagenet = name == "DDPNAS_IMAGENET" or not isinstance(genotype, Genotype)
    return genotype, origin or {"dataset": "imagenet" if imagenet else "cifar10"}

def read_genotype(path):
    """A genotype.json of a search, or any other file -> its genotype as text, and its origin."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("{"):
            return text, {}
        found = json.loads(text)
        origin = {name: found["settings"][name] for name in ("dataset", "image_size")}
        if origin["dataset"] not in DEFAULTS:
            raise ValueError(f"unknown data set {origin['dataset']}")
        return str(found["genotype"]), origin
    except Exception as error:  # a missing file, or one with any other content
        raise UserError(f"--genotype {path!r:.200} cannot be read ({error!r:.200}): run `python "
                        "ddp_nas.py` first, or name another genotype.json, a genotype in the "
                        "notation of DARTS, random:SEED, random:SEED:gpu or :cpu, or one of "
                        f"{', '.join(PUBLISHED)}") from None

# ==== the networks ================================================================================
# Modules are registered in the order of the authors' networks: their weights fit by position.

def drop_path(x, probability):
    """Zero the whole output x (B, C, H, W) for some images, rescale the others: the mean stays."""
    keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= probability
    return x * (keep / (1 - probability)).to(x.dtype)

def dense_gradient(x):
    """Return x. torch.cat gives gradients that are slices, slow in BatchNorm: copy that of x."""
    if x.requires_grad and not torch.compiler.is_compiling():  # torch 2.4 cannot compile hooks
        x.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return x

class Cell(nn.Module):
    def __init__(self, pairs, c_prev_prev, c_prev, c, reduction, reduction_prev, norm):
        super().__init__()
        preprocess = FactorizedReduce if reduction_prev else relu_conv_bn
        self.preprocess0 = preprocess(c_prev_prev, c, norm)
        self.preprocess1 = relu_conv_bn(c_prev, c, norm)
        self.edges = nn.ModuleList()  # two for each node
        self.sources = []
        for name, source in pairs:
            stride = 2 if reduction and source < 2 else 1
            self.edges.append(OPS[name](c, stride, norm))
            self.sources.append(source)

    def forward(self, s0, s1, drop):
        """s0, s1: outputs of the last two cells, older first; drop: a probability or None."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(len(NODES)):
            values = []
            for edge in (2 * i, 2 * i + 1):
                operation = self.edges[edge]
                value = operation(states[self.sources[edge]])
                if drop is not None and not isinstance(operation, nn.Identity):
                    value = drop_path(value, drop)
                values.append(value)
            states.append(dense_gradient(sum(values)))
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
        norm = partial(nn.BatchNorm2d, eps=1e-3 if imagenet else 1e-5)
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        c = channels
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
            pairs = genotype.reduce if reduction else genotype.normal
            self.cells.append(Cell(pairs, c_prev_prev, c_prev, c, reduction, reduction_prev, norm))
            c_prev_prev, c_prev, reduction_prev = c_prev, len(NODES) * c, reduction
        self.auxiliary = None
        if auxiliary:  # on the second reduction cell, which has the width of the last
            self.auxiliary = auxiliary_head(c_prev, num_classes, imagenet, norm)
        self.linear = nn.Linear(c_prev, num_classes)
        self.drop_probability = None  # or a tensor: for a float, torch.compile compiles once more

    def forward(self, images):
        """images (B, 3, S, S) -> logits (B, num_classes); in training, those of the head, too."""
        s0 = self.stem0(images)
        s1 = self.stem1(s0)
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_probability if self.training else None)
            if i == 2 * len(self.cells) // 3:
                inner = s1
        logits = self.linear(s1.mean((2, 3)))
        return (logits, self.auxiliary(inner)) if self.training and self.auxiliary else logits

def mobile_network(genotype, num_classes):
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    backbones = {len(blocks): (blocks, head) for blocks, head in BACKBONES.values()}
    blocks, head = backbones[len(genotype)]
    c_in, layers = 40, [conv_bn_relu6(3, 40, 3, 2, norm_layer=norm)]
    for (c, stride), (kernel, expansion) in zip(blocks, genotype):
        layers.append(MBConv(c_in, c, stride, kernel, expansion, norm))
        c_in = c
    return nn.Sequential(  # no dropout before the last layer: the papers give no rate
        *layers, conv_bn_relu6(c_in, head, 1, norm_layer=norm), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(head, num_classes))

def build_network(genotype, dataset="cifar10", num_classes=10, channels=None, cells=None,
                  auxiliary=False):
    """The final network of a genotype. dataset: "imagenet" has stems of its own.

    channels and cells are those of a network of cells, by default 36 and 20 (ImageNet: 48 and 14).
    """
    if not isinstance(genotype, Genotype):
        return mobile_network(genotype, num_classes)
    imagenet = dataset == "imagenet"
    size = IMAGENET if imagenet else CIFAR
    return CellNetwork(genotype, channels or size["channels"], cells or size["cells"], num_classes,
                       imagenet, auxiliary)

def load_network(path, device="cpu"):
    """The checkpoint.pt of a run -> the network to use, its classes, its preprocessing.

    The network is in eval mode, on the device, without its auxiliary head. preprocess turns a PIL
    image into the float tensor (3, S, S) that it takes, as in its test. Raises a UserError.
    """
    weights, settings = read_weights(Path(path))
    if not settings:
        raise UserError(f"{path} is not a checkpoint of retrain.py")
    weights = {name: value for name, value in weights.items() if not name.startswith("auxiliary.")}
    network = build_network(parse_genotype(settings["genotype"]), settings["dataset"],
                            len(settings["classes"]), settings["channels"], settings["cells"])
    network.load_state_dict(weights)
    preprocess = v2.Compose([
        to_rgb, plain_transform(settings["image_size"]), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*MEAN_STD.get(settings["dataset"], MEAN_STD["imagenet"]))])
    return network.to(device).eval(), settings["classes"], preprocess

def read_weights(path):
    """A checkpoint of ours -> its state dict and settings; of others -> its state dict, {}."""
    checkpoint = read_checkpoint(path)
    if "distribution" in checkpoint:
        raise UserError(f"{path} is the checkpoint of a search, not of a network to use")
    settings = checkpoint.get("settings")
    if isinstance(settings, dict) and settings.get("method") == METHOD:
        return checkpoint["network"], settings
    for name in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(checkpoint.get(name), dict):
            return checkpoint[name], {}
    return checkpoint, {}

def count_parameters(network):
    """Weights of the network that is used in the end, without the auxiliary head."""
    return sum(weight.numel() for name, weight in network.named_parameters()
               if not name.startswith("auxiliary."))

def load_by_position(network, weights, path):
    """Load a state dict whose entries stand in the order of the network's own.

    The names of the authors' entries agree with ours in the last part only (weight, bias, ...).
    Raises a UserError for the first entry that does not fit, and leaves the network as it was.
    """
    ours = network.state_dict()
    for (name, tensor), (other, value) in zip(ours.items(), weights.items()):
        shape, other_shape = [*tensor.shape], [*getattr(value, "shape", "")]
        if str(other).split(".")[-1] != name.split(".")[-1] or other_shape != shape:
            raise UserError(f"{path}: {other} {other_shape} does not fit {name} {shape}")
    if len(weights) != len(ours):
        raise UserError(f"{path} has {len(weights)} entries, and the network {len(ours)}")
    network.load_state_dict(dict(zip(ours, weights.values())))

# ==== training and test ===========================================================================
def augmentation(args, dataset):
    """What changes a batch of training images (B, 3, S, S) uint8, a function for Batches."""
    auto_augment = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    def augment(images, g):
        if isinstance(dataset, RandomCrops):
            return images
        images = shift_and_flip(images, g)
        if args.large:
            images = torch.stack([auto_augment(image) for image in images])
        return images
    return augment

class RandomCrops(Dataset):
    """The images of an ImageFolder with ImageNet's random crops, flips and colours.

    What is random depends on `seed`, which is set for every epoch, and the index of an image.
    """
    def __init__(self, folder, size):
        self.folder, self.classes, self.seed = folder, folder.classes, 0
        self.transform = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(),
                                     v2.ColorJitter(0.4, 0.4, 0.4, 0.2), v2.PILToTensor()])

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, index):
        path, label = self.folder.samples[index]
        with torch.random.fork_rng(devices=[]):  # transforms draw from the global generator
            torch.default_generator.manual_seed((self.seed * len(self) + index) % 2**63)
            return self.transform(open_rgb(path)), label

def cutout(images, length):
    """Set a square of an even length to 0 in each of images (B, 3, S, S); it may cross the edge."""
    along = torch.arange(images.shape[-1], device=images.device)                 # (S,)
    y, x = torch.randint(len(along), (2, len(images), 1), device=images.device)  # (B, 1), centres
    rows = (along >= y - length // 2) & (along < y + length // 2)                # (B, S)
    columns = (along >= x - length // 2) & (along < x + length // 2)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)

def train_epoch(network, optimizer, batches, args):
    """Train the network on every batch once -> mean loss, that of the auxiliary head included."""
    network.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    weights = list(network.parameters())
    device = weights[0].device
    sum_losses, sum_norms = torch.zeros(2, device=device)
    for images, labels in batches:
        if args.cutout:
            images = cutout(images, round(args.cutout * args.image_size))
        with autocast(device):
            outputs = network(images)
            if isinstance(outputs, tuple):
                logits, auxiliary_logits = outputs
                loss = criterion(logits, labels)
                loss = loss + args.auxiliary * criterion(auxiliary_logits, labels)
            else:
                loss = criterion(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(weights)
        norm = nn.utils.clip_grad_norm_(weights, args.clip)
        optimizer.step()
        sum_losses += loss.detach()  # not .item(), which would wait for the device
        sum_norms += norm
    # Each process has updated BatchNorm's running statistics with its own share.
    average_over_processes([buffer for buffer in network.buffers() if buffer.is_floating_point()])
    return finite_mean(sum_losses, sum_norms, len(batches))  # or an error

@torch.no_grad()
def evaluate(network, batches):
    """The errors, in [0, 1]: top-1 and, where there are more than 5 classes, top-5.

    In float32, on a GPU too.
    """
    network.eval()
    *_, bias = network.parameters()  # of the last layer, an entry for each class
    totals = torch.zeros(3, device=bias.device)  # wrong, not among the best 5, all
    for images, labels in batches:
        logits = network(images)
        hit = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5), best first
        totals[0] += (~hit[:, 0]).sum()
        totals[1] += (~hit.any(1)).sum()
        totals[2] += len(labels)
    average_over_processes([totals])
    wrong1, wrong5, num_images = totals.tolist()
    if len(bias) <= 5:
        return {"top1_error": wrong1 / num_images}
    return {"top1_error": wrong1 / num_images, "top5_error": wrong5 / num_images}

def describe(errors):
    """{"top1_error": 0.025} -> "top-1 error 2.50%"."""
    return "  ".join(f"{name} error {errors[key]:.2%}" for name, key in
                     (("top-1", "top1_error"), ("top-5", "top5_error")) if key in errors)

def open_network(args, num_classes, auxiliary):
    network = build_network(parse_genotype(args.genotype), args.dataset, num_classes,
                            args.channels, args.cells, auxiliary)
    return network.to(args.device, memory_format=torch.channels_last)

def train(args):
    dataset, test_dataset = open_images(args, "train"), open_images(args, "val")
    check_same({"classes": dataset.classes}, {"classes": test_dataset.classes}, "in train",
               "in val")
    check_batch_size(args.batch_size, len(dataset))
    if isinstance(dataset, ImageFolder):
        dataset = RandomCrops(dataset, args.image_size)
    batches = Batches(dataset, torch.arange(len(dataset)), args.batch_size, args, train=True,
                      augment=augmentation(args, dataset))
    test_batches = Batches(test_dataset, torch.arange(len(test_dataset)), args.batch_size, args,
                           train=False)
    torch.manual_seed(args.seed)  # of the initial weights, the same in every process
    network = open_network(args, len(dataset.classes), auxiliary=args.auxiliary > 0)
    norms = {weight for module in network.modules() if isinstance(module, nn.BatchNorm2d)
             for weight in module.parameters()}
    groups = [{"params": [weight for weight in network.parameters() if weight not in norms]},
              {"params": [weight for weight in network.parameters() if weight in norms],
               "weight_decay": args.norm_decay}]
    optimizer = torch.optim.SGD(groups, args.lr, MOMENTUM, weight_decay=args.weight_decay)
    if args.lr_decay == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    else:
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, args.lr_decay)
    settings = {**run_settings(args), "images": len(dataset), "test_images": len(test_dataset),
                "classes": dataset.classes, "operations": list(OPS)}
    parts = dict(network=network, optimizer=optimizer, schedule=schedule)
    log = load_checkpoint(args, settings, parts)
    parameters = count_parameters(network)
    print0(f"{args.name}: {parameters:,} parameters, auxiliary head: {args.auxiliary > 0}")
    if args.drop_path:
        network.drop_probability = torch.zeros((), device=args.device)
    if args.compile:
        network.compile()

    for epoch in range(len(log), args.epochs):
        start = time.perf_counter()
        # For cutout, drop-path and AutoAugment; never the seed of a shuffle.
        torch.manual_seed(1_000_003 * args.seed + 500_000 + WORLD_SIZE * epoch + RANK)
        batches.epoch = epoch
        if isinstance(dataset, RandomCrops):
            dataset.seed = 1_000_003 * args.seed + epoch
        if args.drop_path:
            network.drop_probability.fill_(args.drop_path * epoch / args.epochs)
        loss = train_epoch(network, optimizer, batches, args)
        errors = evaluate(network, test_batches)
        schedule.step()
        log.append({"epoch": epoch + 1, "loss": loss, **errors,
                    "seconds": time.perf_counter() - start})
        save_checkpoint(args, settings, parts, log)
        print_epoch(log, args.epochs, describe(errors),
                    batches.num_images + test_batches.num_images)

    print0(f"{args.out / 'checkpoint.pt'}: {describe(log[-1])}, {parameters:,} parameters")

def test(args):
    """--evaluate: print the errors of the weights in a file on the test images."""
    weights, settings = read_weights(args.evaluate)
    dataset = open_images(args, "val")
    if settings:
        check_same({"genotype": args.genotype, "classes": dataset.classes}, settings,
                   "in this command", f"in {args.evaluate}")
    auxiliary = any("aux" in str(name) for name in weights)
    network = open_network(args, len(dataset.classes), auxiliary)
    load_by_position(network, weights, args.evaluate)
    index = torch.arange(len(dataset))
    errors = evaluate(network, Batches(dataset, index, args.batch_size, args, train=False))
    print0(f"{args.evaluate}: {describe(errors)} of {len(index)} images, "
           f"{count_parameters(network):,} parameters")

def summarise(args):
    """--summary: print parameters, multiply-adds and latency."""
    num_classes = {"cifar100": 100, "imagenet": 1000}.get(args.dataset, 10)
    folder = args.data_dir / "train"
    if args.dataset == "imagefolder" or (args.dataset == "imagenet" and folder.is_dir()):
        num_classes = len(ImageFolder(folder, args.image_size).classes)
    network, times = open_network(args, num_classes, auxiliary=False).eval(), []
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), autocast(images.device):
        with FlopCounterMode(display=False) as counter:
            network(images[:1])
        for _ in range(120):
            start = time.perf_counter()
            logits = network(images)
            logits[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - start)
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print0(f"{args.name} on {args.dataset}, {num_classes} classes, {args.image_size} pixels: "
           f"{count_parameters(network):,} parameters, {counter.get_total_flops() / 2e6:,.1f} M "
           f"multiply-adds, latency {1000 * np.median(times[20:]):.2f} ms (median of 100 forward "
           f"passes, batch {args.batch_size}, {logits.dtype}, {device}, {torch.get_num_threads()} "
           "CPU threads)")

# ==================================================================================================
# Nothing of the papers stands below, but for shift_and_flip, their augmentation.

# ==== images ======================================================================================
class UserError(Exception):
    """What the user can fix, reported in one line. Any other exception keeps its traceback."""

MEAN_STD = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
            "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}  # and any other data set
SMALL = 64  # pixels: images up to this size stay in the memory of the device

class ImageFolder(torchvision.datasets.ImageFolder):
    """The images below <folder>/<class>, read when needed: (3, size, size) uint8, label."""
    def __init__(self, folder, size):
        suffixes = tuple(Image.registered_extensions())
        below = len(str(folder))  # where in a path the part below the folder begins
        def is_image(path):  # no hidden file, and none in a hidden folder
            return path.lower().endswith(suffixes) and f"{os.sep}." not in path[below:]
        try:
            super().__init__(folder, plain_transform(size), None, open_rgb, is_image)
        except OSError as error:  # no such folder, or a class without images
            raise UserError(f"--data-dir: {folder}: {error.strerror or error}") from None

    def find_classes(self, directory):
        names = sorted(entry.name for entry in os.scandir(directory)
                       if entry.is_dir() and not entry.name.startswith("."))
        if len(names) < 2:
            raise UserError(f"--data-dir: {directory} must hold a folder for each of two or more "
                            f"classes; it holds {', '.join(names) or 'none'}")
        return names, {name: label for label, name in enumerate(names)}

def open_rgb(path):
    try:
        return to_rgb(Image.open(path))
    except Exception as error:  # PIL raises many kinds
        raise UserError(f"{path} cannot be read as an image: {error}") from None

def to_rgb(image):
    """PIL image, upright or not -> upright, RGB. ValueError if a pixel has more than 8 bits."""
    if image.mode[0] in "IF":  # PIL would clip 16 bits or floats at 255
        raise ValueError(f"its pixels must have 8 bits, not the mode {image.mode}")
    rgb = image.convert("RGB")  # a copy. It keeps the rotation, which phones store in the EXIF, and
    rgb.info.clear()  # no more: PIL would write the EXIF again, and fails at numbers such as -5.
    rgb.getexif()[0x112] = image.getexif().get(0x112, 1)
    return ImageOps.exif_transpose(rgb)

def plain_transform(size):
    """PIL image -> (3, size, size) uint8, without augmentation."""
    resized = size if size <= SMALL else size * 256 // 224  # ImageNet: 256, then the central 224
    return v2.Compose([v2.Resize(resized), v2.CenterCrop(size), v2.PILToTensor()])

def make_gratings(count, size, seed):
    """Synthetic images, gratings under noise -> images (count, 3, size, size), labels, classes."""
    g = torch.Generator().manual_seed(seed)
    pairs = torch.combinations(torch.arange(5))                      # (10, 2)
    labels = torch.randint(len(pairs), (count,), generator=g)
    each = (count, 2, 1, 1)                                          # a number for each grating
    # The class is the pair of their angles, the same for a mirror image: training flips images.
    mirror = 2 * torch.randint(2, each, generator=g) - 1
    angle = pairs[labels].view(each) * mirror * math.pi / 8          # -90 to 90 degrees
    frequency = 0.08 + 0.12 * torch.rand(each, generator=g)          # cycles per pixel
    phase = 2 * math.pi * torch.rand(each, generator=g)
    colour = F.normalize(torch.randn(count, 2, 3, generator=g), dim=2)
    x = torch.arange(size)                                           # y is x[:, None]
    distance = x * angle.cos() + x[:, None] * angle.sin()            # (count, 2, size, size)
    waves = torch.sin(2 * math.pi * frequency * distance + phase)
    images = torch.einsum("nwyx,nwc->ncyx", waves, colour)
    images = images + 0.8 * torch.randn(count, 3, size, size, generator=g)
    classes = [f"angles {a} and {b}" for a, b in pairs.tolist()]
    return (128 + 50 * images).clamp(0, 255).to(torch.uint8), labels, classes

def read_cifar(args, train):
    """-> images (N, 3, S, S), labels, classes."""
    name = args.dataset.upper()
    for rank in range(WORLD_SIZE):  # one after the other: process 0 downloads, the others find it
        try:
            if rank == RANK:
                data = getattr(torchvision.datasets, name)(args.data_dir, train, download=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a checksum is wrong
            raise UserError(f"--data-dir {args.data_dir}: {name} cannot be read from there, nor "
                            f"downloaded: {error}") from None
        if WORLD_SIZE > 1:
            dist.barrier()
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    images = v2.functional.resize(images, [args.image_size])
    return images, torch.tensor(data.targets), data.classes

def open_images(args, split):
    """The images of "train" or "val", (3, S, S) uint8, with labels and the names of the classes."""
    if args.dataset == "synthetic":
        count, seed = {"train": (768, 2 * args.seed + 1), "val": (1000, 2 * args.seed)}[split]
        images, labels, classes = make_gratings(count, args.image_size, seed)
    elif args.dataset in ("cifar10", "cifar100"):
        images, labels, classes = read_cifar(args, train=split == "train")
    else:
        folder = args.data_dir / split
        dataset = ImageFolder(folder, args.image_size)
        print0(f"{folder}: {len(dataset):,} images of {len(dataset.classes)} classes")
        names = [path.removeprefix(str(folder)) for path, _ in dataset.samples]
        same_everywhere({"number of images": len(names),
                         **{f"image {i}": name for i, name in enumerate(names)}})
        if args.dataset == "imagenet":
            return dataset  # read anew for every batch; all others stay on the device
        # Cloned, since every tensor of a worker keeps a file open.
        loader = DataLoader(dataset, batch_size=100, num_workers=args.workers)
        images = torch.cat([images.clone() for images, _ in loader])
        labels, classes = torch.tensor(dataset.targets), dataset.classes
    dataset = TensorDataset(images.to(args.device), labels.to(args.device))
    dataset.classes = classes
    return dataset

# ==== batches =====================================================================================
def shift_and_flip(images, g):
    """Shift each of images (B, 3, S, S) by up to S / 8 in x and in y, and mirror half of them."""
    count, _, _, size = images.shape
    pad = size // 8  # 4 pixels for images of 32
    # Numbers for the whole batch, the same in every process, which uses those of its share.
    shifts = torch.randint(2 * pad + 1, (2, count * WORLD_SIZE), generator=g)
    mirrored = torch.randint(2, (count * WORLD_SIZE, 1, 1, 1), generator=g).bool()
    # A copy that blocks would wait until a GPU has done all that it was given so far.
    y, x = shifts[:, RANK::WORLD_SIZE].to(images.device, non_blocking=True)
    mirrored = mirrored[RANK::WORLD_SIZE].to(images.device, non_blocking=True)
    padded = F.pad(images, (pad, pad, pad, pad))
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # all, by y and x: (B, 3, Y, X, S, S)
    crops = windows[torch.arange(count, device=y.device), :, y, x]  # one an image: (B, 3, S, S)
    return torch.where(mirrored, crops.flip(3), crops)

class Batches:
    """Batches for a network: images (B, 3, S, S), normalised, and labels (B,), on the device.

    dataset: of open_images; index (N,): which of its images; batch_size: of all processes, each of
    which gets its share. train: the images are shuffled and changed by augment(images, generator),
    and all batches are full. The caller sets `epoch`, which with the seed decides what is random.
    """
    def __init__(self, dataset, index, batch_size, args, train, augment=shift_and_flip):
        self.dataset, self.index, self.batch_size, self.args = dataset, index, batch_size, args
        self.train, self.augment, self.epoch = train, augment, 0
        self.num_images = len(index) - (len(index) % batch_size if train else 0)
        mean_std = torch.tensor(MEAN_STD.get(args.dataset, MEAN_STD["imagenet"]))
        self.mean, self.std = 255 * mean_std.view(2, 3, 1, 1).to(args.device)

    def __len__(self):
        return math.ceil(self.num_images / self.batch_size)

    def __iter__(self):
        g = torch.Generator().manual_seed(1_000_003 * self.args.seed + self.epoch)
        index = self.index
        if self.train:
            index = index[torch.randperm(len(index), generator=g)]
        batches = index[:self.num_images].split(self.batch_size)
        shares = [batch[RANK::WORLD_SIZE] for batch in batches if len(batch) > RANK]
        device, on_gpu = self.args.device, self.args.device == "cuda"
        if isinstance(self.dataset, TensorDataset):  # a whole share is taken at once
            how = dict(sampler=[share.to(device) for share in shares], batch_size=None)
        else:  # workers read the images of a share one by one
            how = dict(batch_sampler=[share.tolist() for share in shares],
                       num_workers=self.args.workers, pin_memory=on_gpu)
        for batch in DataLoader(self.dataset, **how):
            images, labels = (part.to(device, non_blocking=on_gpu) for part in batch)
            if self.train:
                images = self.augment(images, g)
            images = images.contiguous(memory_format=torch.channels_last)
            yield (images - self.mean) / self.std, labels

def check_batch_size(size, num_images):
    if not 2 * WORLD_SIZE <= size <= num_images or size % WORLD_SIZE:  # BatchNorm needs two
        raise UserError(f"--batch-size {size} must be a multiple of {WORLD_SIZE}, the number of "
                        f"processes, from {2 * WORLD_SIZE} to {num_images}, the number of images "
                        "(of which a search splits the training images into halves)")

# ==== processes ===================================================================================
RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1
if dist.is_available() and dist.is_torchelastic_launched():  # by torchrun, one for each device
    RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ[name]) for name in
                                    ("RANK", "LOCAL_RANK", "WORLD_SIZE"))

def start_processes(args):
    """Set up the device, connect the processes, and compare their settings."""
    if args.dataset == "synthetic" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # images this small leave a second thread waiting
    is_there = {"cpu": True, "cuda": torch.cuda.device_count() > LOCAL_RANK,
                "mps": torch.backends.mps.is_available()}
    if not is_there[args.device]:
        raise UserError(f"--device {args.device}: torch finds none for process {RANK}")
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.benchmark = True
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    settings = run_settings(args)
    print0(", ".join(f"{name} {value}" for name, value in settings.items()))
    same_everywhere(settings)

def same_everywhere(facts):
    """Raise a UserError on a machine that has other facts, a dict, than that of process 0."""
    first = [facts]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(first)
    check_same(facts, first[0], f"in process {RANK}", "in process 0")

def check_same(ours, theirs, here, there):
    """Raise a UserError that names the first entry of ours that theirs lacks or differs in."""
    for name, value in ours.items():
        other = theirs.get(name)
        if other and other != value and name == "classes":  # which may be thousands
            a, b = sorted(set(value) - set(other)), sorted(set(other) - set(value))
            raise UserError(f"classes: {len(a)} ({', '.join(a[:3])}) only {here}, and {len(b)} "
                            f"({', '.join(b[:3])}) only {there}")
        if other != value:
            raise UserError(f"{name} is {value} {here}, but {other} {there}")

def average_over_processes(tensors):
    """Replace each tensor by its mean over the processes, all in one message."""
    if WORLD_SIZE > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / WORLD_SIZE).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means):
            tensor.copy_(mean.view_as(tensor))

def average_gradients(weights):
    """Over the processes; a gradient that only some of them have counts as 0 in the others."""
    if WORLD_SIZE > 1:
        used = torch.tensor([float(w.grad is not None) for w in weights]).to(weights[0].device)
        average_over_processes([used])
        for weight, share in zip(weights, used.tolist()):
            if weight.grad is None and share > 0:  # an operation may draw which weights it uses
                weight.grad = torch.zeros_like(weight)
        average_over_processes([weight.grad for weight in weights if weight.grad is not None])

def finite_mean(sum_losses, sum_norms, num_steps):
    """The mean loss, if it and the norms of the gradients are finite. Else a UserError."""
    average_over_processes([sum_losses, sum_norms])
    loss = sum_losses.item() / num_steps
    if not math.isfinite(loss + sum_norms.item()):
        raise UserError(f"the loss, {loss}, or a gradient is not finite: start again in another "
                        "--out with a smaller --lr")
    return loss

def autocast(device):
    """bfloat16 on a GPU that has it: older ones only emulate it, slowly."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, enabled=native)

# ==== files =======================================================================================
def run_settings(args):
    """What a run, its --resume and all their processes have in common, the method first."""
    settings = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
    return {**settings, "processes": WORLD_SIZE}

def write_file(path, data):
    """Write bytes, in process 0. By a rename: the file is the old or the new one, whole."""
    if RANK > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None

def save_checkpoint(args, settings, parts, log):
    """Write log.jsonl, an object per epoch, and checkpoint.pt, from which --resume continues."""
    buffer = io.BytesIO()
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"settings": settings, "log": log, **state}, buffer)
    if len(log) == 1:  # what cannot be loaded fails now, and not at --resume after hours
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    lines = [json.dumps(row) + "\n" for row in log]
    write_file(args.out / "log.jsonl", "".join(lines).encode())  # after a kill here, it is ahead
    write_file(args.out / "checkpoint.pt", buffer.getvalue())

def read_checkpoint(path):
    """The dict that torch.save() wrote to path; code in it does not run."""
    try:
        data = io.BytesIO(path.read_bytes())
        return dict(torch.load(data, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception:  # torch.load has many ways to fail
        raise UserError(f"{path} is damaged, or holds more than tensors, numbers and strings, "
                        "which could run code (save network.state_dict() alone)") from None

def load_checkpoint(args, settings, parts):
    """Bring the parts to the state in --out, if --resume finds one -> the log of its epochs."""
    path, log = args.out / "checkpoint.pt", []
    if args.resume and path.exists():
        checkpoint = read_checkpoint(path)
        check_same(settings, checkpoint.get("settings", {}), "in this command",
                   f"in {path}: --resume needs the same")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        log = checkpoint["log"]
    elif RANK == 0:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "log.jsonl").touch(exist_ok=args.resume)  # fails if --out holds a run
        except OSError as error:
            raise UserError(f"--out: {error.filename}: {error.strerror}. Name another folder, or "
                            "add --resume to go on with the run in this one") from None
    same_everywhere({"number of epochs in --out": len(log)})
    return log

# ==== what the user sees ==========================================================================
def print0(text):
    if RANK == 0:
        print(text, flush=True)

def print_epoch(log, total_epochs, measured, num_images):
    """A line for the last epoch; num_images: how many it trained on and measured with."""
    row = log[-1]
    mean = sum(row["seconds"] for row in log) / len(log)
    left = timedelta(seconds=round(mean * (total_epochs - len(log))))
    print0(f"epoch {len(log):3}/{total_epochs}  loss {row['loss']:.3f}  {measured}  "
           f"{num_images / row['seconds']:.0f} images/s  {left} left")

# ==== arguments and main ==========================================================================
class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is, and every default."""

def at_least(least, kind=int):
    """An argparse type: a number from the least to a billion."""
    def number(text):
        if not least <= kind(text) <= 1e9:  # NaN fails this, too
            raise argparse.ArgumentTypeError(f"must be from {least} to a billion")
        return kind(text)
    return number

def add_arguments(parser, defaults, method):
    """Add the options that every script has."""
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR",
        help="CIFAR's, or one with train/<class>/* and, for retrain.py, val/<class>/*")
    add("--image-size", type=at_least(1), default=defaults["image_size"], metavar="PIXELS",
        help="side of the square to which images are cropped; more than 64 with imagenet only")
    add("--batch-size", type=at_least(1), default=defaults["batch_size"],
        help="images per step, of all processes together")
    add("--lr", type=at_least(0, float), default=defaults["lr"], help="initial learning rate")
    add("--seed", type=at_least(0), default=0, help="random seed")
    add("--device", choices=("cpu", "cuda", "mps"), help="where to train",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=at_least(0), default=min(8, os.cpu_count()),
        help="worker processes that read images, for each training process")
    add("--out", type=Path, default=Path("runs") / method, help="folder for the results")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("-h", "--help", action="help", help="show this help")

def check_image_size(args):
    if args.dataset not in ("synthetic", "imagenet") and args.image_size > SMALL:
        raise UserError(f"--image-size: {args.dataset} is for up to {SMALL} pixels; larger images "
                        "with --dataset imagenet, whose folders need not be ImageNet's")
    if args.space == "cell" and args.image_size % 4:
        raise UserError("--image-size must be a multiple of 4 for cells, two of which halve it")

def choose_genotype(name, weights, asks_help):
    """--genotype and --evaluate, each may be None -> a name, its genotype, and its origin.

    The origin is the settings that become defaults: the data set of a search, and more of a
    checkpoint of ours, which brings its genotype, too.
    """
    saved = read_weights(weights)[1] if weights else {}  # {} if it is not a checkpoint of ours
    if name is None and weights is None:
        name = "random:0" if asks_help else "runs/ddp_nas/genotype.json"  # --help needs no file
    if name is not None:
        genotype, origin = load_genotype(name)
    elif saved:
        name, genotype = str(weights), parse_genotype(saved["genotype"])
    else:
        raise UserError(f"--evaluate {weights}: of which network? Add --genotype")
    if saved:
        keys = ("dataset", "image_size", "channels", "cells", "seed")
        origin = {key: saved[key] for key in keys}
    return name, genotype, origin

def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, add_help=False, allow_abbrev=False,
        epilog="The default --lr of a chain of blocks on ImageNet is 0.4 for 1,024 images; "
               "--batch-size scales it.")
    add = parser.add_argument
    add("--genotype", default=argparse.SUPPRESS,
        help="a file of a search, a published name, random:SEED[:gpu or :cpu], or a genotype as "
             "text (default: runs/ddp_nas/genotype.json)")
    add("--dataset", choices=DEFAULTS, default=argparse.SUPPRESS,
        help="default: that of the genotype, or synthetic")
    add("--large", action="store_true", help="44 channels, 1,800 epochs and AutoAugment")
    instead = parser.add_mutually_exclusive_group()  # of training
    instead.add_argument("--summary", action="store_true",
                         help="print parameters, multiply-adds and latency")
    instead.add_argument("--evaluate", type=Path, metavar="FILE",
                         help="test a checkpoint of ours, or weights of others")
    given, rest = parser.parse_known_args(argv)  # the other defaults depend on these

    asks_help = "-h" in rest or "--help" in rest
    name, genotype, origin = choose_genotype(getattr(given, "genotype", None), given.evaluate,
                                             asks_help)
    space = "cell" if isinstance(genotype, Genotype) else "mobile"
    dataset = getattr(given, "dataset", origin.get("dataset", "synthetic"))

    defaults = dict(DEFAULTS[dataset])
    if space == "mobile":
        defaults.update(channels=None, cells=None, drop_path=0.0)
        if dataset == "imagenet":
            defaults.update(IMAGENET_MOBILE)
    if given.large:
        defaults.update(LARGE)
    if given.summary:
        defaults.update(batch_size=1)
    if dataset == origin.get("dataset"):  # on other images, only the genotype is kept
        defaults.update(origin)

    if space == "cell":
        add("--channels", type=at_least(2), help="C, the channels of the first cell")
        add("--cells", type=at_least(3), help="number of cells")
    add("--epochs", type=at_least(1), help="number of training epochs")
    add("--compile", action="store_true",
        help="use torch.compile: the first epoch takes minutes longer")
    add_arguments(parser, defaults, METHOD)
    parser.set_defaults(**defaults)  # the rest of the recipe, too, which has no options
    args = parser.parse_args(argv, argparse.Namespace(method=METHOD))

    args.genotype, args.name, args.dataset, args.space = str(genotype), name, dataset, space
    if args.lr is None:
        args.lr = LR_MOBILE * args.batch_size
    if args.large and (space == "mobile" or args.image_size > SMALL):
        raise UserError(f"--large is for cells on images of up to {SMALL} pixels")
    if space == "cell" and dataset == "imagenet" and args.image_size % 32:
        raise UserError(f"--image-size {args.image_size} must be a multiple of 32, halved 5 times")
    if space == "mobile" or args.image_size < (224 if dataset == "imagenet" else 32):
        args.auxiliary = 0.0  # its head needs a map of 7 or 8 pixels
    check_image_size(args)
    return args

def exit_code(run):
    """Call run() -> the exit code. What the user can fix becomes one line on stderr."""
    threads = torch.get_num_threads()
    if hasattr(sys.stdout, "reconfigure"):  # not in every notebook
        sys.stdout.reconfigure(errors="replace")  # for a terminal that lacks a character
    try:
        run()
        return 0
    except UserError as error:
        # A DataLoader's worker sends its traceback, which ends with the message.
        print(f"error: {str(error).rpartition('UserError: ')[2].strip()}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: lower --batch-size, or --image-size: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: a run goes on from its last whole epoch with --resume", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

def main(argv=None):
    """Train, test or summarise -> exit code."""
    def run():
        args = parse_args(argv)
        start_processes(args)
        torch.backends.cudnn.allow_tf32 = False  # errors are measured in full float32
        if args.summary:
            summarise(args)
        elif args.evaluate:
            test(args)
        else:
            train(args)
    return exit_code(run)

if __name__ == "__main__":
    sys.exit(main())
