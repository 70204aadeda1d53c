"""Train what DDP-NAS (arXiv:1905.13543) and MdeNAS (arXiv:1905.07529) found, and test it.

    python retrain.py                                         # what `python ddp_nas.py` found
    python retrain.py --genotype runs/mdenas/genotype.json    # another search, on its data set
    python retrain.py --genotype DDPNAS_2 --large             # a published cell, largest setting
    python retrain.py --genotype "Genotype(normal=[...], ...)"    # a cell in DARTS's notation
    python retrain.py --genotype random:0 --dataset cifar10   # a random cell: the baseline
    python retrain.py --genotype MDENAS --summary             # parameters, multiply-adds, latency
    python retrain.py --genotype MDENAS --evaluate FILE       # weights of the authors, or of ours
    torchrun --nproc_per_node=8 retrain.py --genotype DDPNAS_GPU --data-dir DIR    # ImageNet

The network holds the found architecture alone: its BatchNorms have weights and keep running
statistics, and cells are stacked deeper and wider than in the supernet. In one's own program:

    network, classes, preprocess = retrain.load_network("runs/retrain/best.pt")
"""
import argparse, ast, functools, hashlib, io, json, math, os, re, sys, time
from collections import ChainMap, namedtuple
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F, torchvision
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

METHOD = "retrain"
SMALL_IMAGES = dict(image_size=32, channels=36, cells=20)
DEFAULTS = {  # by data set: the size of the images, and of a network of cells
    "synthetic": dict(image_size=16, channels=8, cells=5),
    "cifar10": SMALL_IMAGES, "cifar100": SMALL_IMAGES, "imagefolder": SMALL_IMAGES,
    "imagenet": dict(image_size=224, channels=48, cells=14),
}
# The recipes. lr_decay: "cosine" to 0, or a factor an epoch; norm_decay: the weight decay of
# BatchNorms; clip: the largest norm of a gradient; smoothing: of the labels; auxiliary: the weight
# of the auxiliary head's loss; cutout: the side of its square / the side of the image.
CIFAR = dict(epochs=600, batch_size=96, lr=0.025, lr_decay="cosine", weight_decay=3e-4,
             norm_decay=3e-4, clip=5.0, smoothing=0.0, auxiliary=0.4, drop_path=0.2, cutout=0.5)
SYNTHETIC = {**CIFAR, "epochs": 15, "batch_size": 32, "lr": 0.1, "drop_path": 0.0, "cutout": 0.0}
IMAGENET_CELL = dict(epochs=250, batch_size=512, lr=0.1, lr_decay=0.97, weight_decay=3e-5,
                     norm_decay=3e-5, clip=5.0, smoothing=0.1, auxiliary=0.4, drop_path=0.0,
                     cutout=0.0)
IMAGENET_MOBILE = dict(epochs=120, batch_size=1024, lr=0.4, lr_decay="cosine", weight_decay=4e-5,
                       norm_decay=0.0, clip=math.inf, smoothing=0.1, auxiliary=0.0, drop_path=0.0,
                       cutout=0.0)
LARGE = dict(channels=44, epochs=1800)  # with AutoAugment: DDP-NAS's large setting
MOMENTUM = 0.9

# ==== shared: operations ==========================================================================
NUM_NODES = 4              # intermediate nodes of a cell; node i has 2 + i incoming edges
NUM_EDGES = 2 + 3 + 4 + 5  # of a cell, in node order, then source order

class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return torch.zeros_like(x[:, :, ::self.stride, ::self.stride])

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

# ==== the architecture ============================================================================
NODES = range(2, 2 + NUM_NODES)
PUBLISHED = {
    "MDENAS": Genotype(
        normal=[("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("skip_connect", 0), ("sep_conv_5x5", 1),
                ("sep_conv_5x5", 3), ("sep_conv_3x3", 1), ("dil_conv_5x5", 3), ("max_pool_3x3", 4)],
        normal_concat=NODES,
        reduce=[("max_pool_3x3", 0), ("sep_conv_5x5", 1), ("skip_connect", 0), ("skip_connect", 1),
                ("sep_conv_3x3", 3), ("skip_connect", 2), ("dil_conv_3x3", 3), ("sep_conv_5x5", 0)],
        reduce_concat=NODES),
    "DDPNAS_IMAGENET": Genotype(
        normal=[("sep_conv_5x5", 1), ("max_pool_3x3", 0), ("dil_conv_3x3", 0), ("sep_conv_3x3", 1),
                ("sep_conv_3x3", 0), ("max_pool_3x3", 3), ("dil_conv_3x3", 2), ("avg_pool_3x3", 0)],
        normal_concat=NODES,
        reduce=[("sep_conv_5x5", 1), ("avg_pool_3x3", 0), ("avg_pool_3x3", 1), ("skip_connect", 0),
                ("skip_connect", 2), ("sep_conv_3x3", 1), ("dil_conv_5x5", 0), ("dil_conv_5x5", 4)],
        reduce_concat=NODES),
    "DDPNAS_1": Genotype(
        normal=[("sep_conv_5x5", 0), ("max_pool_3x3", 1), ("sep_conv_3x3", 2), ("max_pool_3x3", 0),
                ("dil_conv_5x5", 0), ("sep_conv_3x3", 1), ("avg_pool_3x3", 2), ("max_pool_3x3", 4)],
        normal_concat=NODES,
        reduce=[("sep_conv_3x3", 1), ("dil_conv_5x5", 0), ("dil_conv_5x5", 1), ("sep_conv_5x5", 0),
                ("sep_conv_3x3", 0), ("avg_pool_3x3", 3), ("max_pool_3x3", 1), ("sep_conv_3x3", 0)],
        reduce_concat=NODES),
    "DDPNAS_2": Genotype(
        normal=[("sep_conv_5x5", 0), ("skip_connect", 1), ("dil_conv_5x5", 2), ("max_pool_3x3", 0),
                ("sep_conv_5x5", 1), ("skip_connect", 2), ("skip_connect", 1), ("sep_conv_3x3", 3)],
        normal_concat=NODES,
        reduce=[("max_pool_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 2), ("avg_pool_3x3", 0),
                ("avg_pool_3x3", 0), ("dil_conv_3x3", 1), ("sep_conv_3x3", 0), ("max_pool_3x3", 4)],
        reduce_concat=NODES),
    "DARTS_V2": Genotype(
        normal=[("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
                ("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)],
        normal_concat=NODES,
        reduce=[("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1),
                ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)],
        reduce_concat=NODES),
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
    names, cells = list(OPS)[1:], []  # without `none`
    for _ in ("normal", "reduce"):
        pairs = []
        for node in range(NUM_NODES):
            sources = sorted(g.choice(2 + node, 2, replace=False).tolist())
            pairs += [(str(g.choice(names)), source) for source in sources]
        cells.append(pairs)
    return Genotype(cells[0], NODES, cells[1], NODES)

def parse_genotype(text):
    """A text -> Genotype, or a chain of blocks [(kernel, expansion), ...]. Nothing is evaluated.

    Genotype(...) is flat, as in DARTS, or nested, two pairs a node. Raises an InputError that says
    what the search space does not hold.
    """
    def literal(node):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "range":
            return range(*map(ast.literal_eval, node.args))
        return ast.literal_eval(node)

    expression = re.sub(r"^\s*\w+\s*=", "", text).strip()  # without the name that it is given
    try:
        tree = ast.parse(expression, mode="eval").body
        if isinstance(tree, ast.Call) and ast.unparse(tree.func) == "Genotype":
            fields = {keyword.arg: literal(keyword.value) for keyword in tree.keywords}
            return check_cells(**fields)
        return check_blocks(ast.literal_eval(tree))
    except InputError as error:
        raise InputError(f"the genotype {shorten(text)}: {error}") from None
    except (SyntaxError, LookupError, ValueError, TypeError, RecursionError, MemoryError):
        raise InputError(f"{shorten(text)} is not a genotype: neither Genotype(normal=[(operation, "
                         "source), ...], normal_concat=range(2, 6), reduce=[...], reduce_concat="
                         "range(2, 6)) nor a list of blocks [(kernel, expansion), ...]") from None

def shorten(text):
    line = " ".join(text.split())
    return line if len(line) < 80 else line[:60] + " ... " + line[-15:]

def check_cells(normal, normal_concat, reduce, reduce_concat):
    """The fields of a Genotype -> Genotype, flat."""
    cells = []
    fields = ("normal", normal, normal_concat), ("reduce", reduce, reduce_concat)
    for cell, nodes, concat in fields:
        if len(concat) != NUM_NODES or list(concat) != list(NODES):  # a range may be huge
            raise InputError(f"{cell}_concat must be all the nodes, 2 to 5, not {concat}")
        nested = not isinstance(nodes[0][0], str)
        pairs = [pair for node in nodes for pair in node] if nested else nodes
        if len(pairs) != 2 * NUM_NODES:
            raise InputError(f"{cell} must have 8 edges, 2 for each of 4 nodes, not {len(pairs)}")
        for i, (operation, source) in enumerate(pairs):
            if operation not in OPS or operation == "none":
                raise InputError(f"{cell} has {operation}, and the operations are "
                                 f"{', '.join(list(OPS)[1:])}")
            if type(source) is not int or source not in range(2 + i // 2):
                raise InputError(f"{cell}: the sources of node {2 + i // 2} are 0 to {1 + i // 2}, "
                                 f"not {source}")
        cells.append([(operation, source) for operation, source in pairs])
    return Genotype(cells[0], NODES, cells[1], NODES)

def check_blocks(blocks):
    """A list of pairs -> the same, as tuples."""
    lengths = {len(backbone): name for name, (backbone, _) in BACKBONES.items()}
    if len(blocks) not in lengths:
        allowed = " or ".join(f"{length} ({name})" for length, name in lengths.items())
        raise InputError(f"a chain has {allowed} blocks, not {len(blocks)}")
    for block in blocks:
        if tuple(block) not in CANDIDATES:
            raise InputError(f"a block is (kernel, expansion), one of {CANDIDATES}, not {block}")
    return [(int(kernel), int(expansion)) for kernel, expansion in blocks]

def load_genotype(text):
    """What --genotype names -> Genotype or blocks, and the data set of the search, as a dict."""
    drawn = re.fullmatch(r"random:(\d+)(?::(gpu|cpu))?", text)
    if drawn:
        return random_genotype(int(drawn[1]), drawn[2]), {}
    if text in PUBLISHED:
        genotype, searched = PUBLISHED[text], {}
    elif re.search(r"Genotype\s*\(|^\s*(\w+\s*=\s*)?\[", text):
        genotype, searched = parse_genotype(text), {}
    else:
        genotype, searched = read_genotype(text)
    imagenet = text == "DDPNAS_IMAGENET" or not isinstance(genotype, Genotype)
    return genotype, searched or {"dataset": "imagenet" if imagenet else "cifar10"}

def read_genotype(path):
    """A genotype.json, or a file of a genotype as text -> see load_genotype."""
    try:
        text = Path(path).read_text()
    except (OSError, ValueError) as error:
        raise InputError(f"--genotype {path} cannot be read ({error}): run `python ddp_nas.py` "
                         "first, or name the genotype.json of another search, a genotype in the "
                         "notation of DARTS, random:SEED, random:SEED:gpu or :cpu, or one of "
                         f"{', '.join(PUBLISHED)}") from None
    if not text.lstrip().startswith("{"):
        return parse_genotype(text), {}
    try:
        found = json.loads(text)
        dataset, size = found["settings"]["dataset"], int(found["settings"]["image_size"])
        DEFAULTS[dataset]
        return parse_genotype(found["genotype"]), {"dataset": dataset, "image_size": size}
    except (LookupError, ValueError, TypeError, RecursionError):
        raise InputError(f"--genotype {path} is not the genotype.json of a search") from None

# ==== the networks ================================================================================
# Modules are registered in the order of the authors' networks: their weights fit by position.

def drop_path(x, probability):
    """Zero the whole output x (B, C, H, W) for some images, rescale the others: the mean stays."""
    keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= probability
    return x * (keep / (1 - probability)).to(x.dtype)

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
        for node in range(NUM_NODES):
            values = []
            for edge in (2 * node, 2 * node + 1):
                operation = self.edges[edge]
                value = operation(states[self.sources[edge]])
                if drop is not None and not isinstance(operation, nn.Identity):
                    value = drop_path(value, drop)
                values.append(value)
            states.append(sum(values))
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
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
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
            c_prev_prev, c_prev, reduction_prev = c_prev, NUM_NODES * c, reduction
        self.auxiliary = None
        if auxiliary:  # on the second reduction cell, which has the width of the last
            self.auxiliary = auxiliary_head(c_prev, num_classes, imagenet, norm)
        self.linear = nn.Linear(c_prev, num_classes)
        self.drop_path = None  # or a tensor: for each new float, torch.compile would start again

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
    backbones = {len(blocks): (blocks, head) for blocks, head in BACKBONES.values()}
    blocks, head = backbones[len(genotype)]
    c_in, layers = 40, [conv_bn_relu6(3, 40, 3, 2, norm_layer=norm)]
    for (c, stride), (kernel, expansion) in zip(blocks, genotype):
        layers.append(MBConv(c_in, c, stride, kernel, expansion, norm))
        c_in = c
    return nn.Sequential(  # no dropout before the last layer: its rate is not given
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
    size = DEFAULTS["imagenet"] if imagenet else SMALL_IMAGES
    return CellNetwork(genotype, channels or size["channels"], cells or size["cells"], num_classes,
                       imagenet, auxiliary)

def load_network(path, device="cpu"):
    """best.pt or checkpoint.pt of a run -> the network to use, its classes, its preprocessing.

    The network is in eval mode, on the device, without its auxiliary head. preprocess turns a PIL
    image into the float tensor (3, S, S) that it takes, as in its test. Raises an InputError.
    """
    weights, settings, classes = read_weights(Path(path))
    if not settings:
        raise InputError(f"{path} is not a checkpoint of retrain.py")
    weights = {name: value for name, value in weights.items() if not name.startswith("auxiliary.")}
    network = build_network(parse_genotype(settings["genotype"]), settings["dataset"], len(classes),
                            settings["channels"], settings["cells"])
    network.load_state_dict(weights)
    preprocess = v2.Compose([
        upright_rgb, plain_transform(settings["image_size"]), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*MEAN_STD.get(settings["dataset"], MEAN_STD["imagenet"]))])
    return network.to(device).eval(), classes, preprocess

def count_parameters(network):
    """Weights of the network that is used in the end, without the auxiliary head."""
    return sum(weight.numel() for name, weight in network.named_parameters()
               if not name.startswith("auxiliary."))

def load_by_position(network, weights, path):
    """Load a state dict whose entries stand in the order of the network's own.

    The names of the authors' entries agree with ours in the last part only (weight, bias, ...).
    Raises an InputError for the first entry that does not fit, and leaves the network as it was.
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
    criterion = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    weights = list(network.parameters())
    total_loss = torch.zeros((), device=batches.device)
    for images, labels in batches:
        if args.large:
            images = torch.stack([auto_augment(image) for image in images])
        images = batches.normalise(images)
        if args.cutout:
            images = cutout(images, round(args.cutout * args.image_size))
        with autocast(batches.device):
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
        nn.utils.clip_grad_norm_(weights, args.clip)
        optimizer.step()
        total_loss += loss.detach()  # stays on the device: to read it would wait for the step
        batches.sign_of_life(total_loss)
    # Of BatchNorm's running statistics, each process has seen its share.
    average_over_ranks([buffer for buffer in network.buffers() if buffer.is_floating_point()])
    return finite_mean(total_loss, batches, weights)

@torch.no_grad()
def evaluate(network, batches):
    """The errors, in [0, 1]: top-1 and, where there are more than 5 classes, top-5.

    In float32, on a GPU too.
    """
    network.eval()
    num_wrong = torch.zeros(2, device=batches.device)
    for images, labels in batches:
        logits = network(batches.normalise(images))
        hit = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5), best first
        num_wrong += torch.stack([(~hit[:, 0]).sum(), (~hit.any(1)).sum()])
        batches.sign_of_life()
    top1, top5 = (sum_over_ranks(num_wrong) / batches.num_images).tolist()
    if len(batches.dataset.classes) > 5:
        return {"top1_error": top1, "top5_error": top5}
    return {"top1_error": top1}

def describe(errors):
    """{"top1_error": 0.025} -> "top-1 error 2.50%"."""
    return "  ".join(f"{name} error {errors[key]:.2%}" for name, key in
                     (("top-1", "top1_error"), ("top-5", "top5_error")) if key in errors)

def open_network(args, num_classes, auxiliary):
    network = build_network(parse_genotype(args.genotype), args.dataset, num_classes,
                            args.channels, args.cells, auxiliary)
    return network.to(args.device, memory_format=torch.channels_last)

def check_classes(ours, theirs, where):
    if list(ours) != list(theirs):
        differ = ", ".join(sorted({*ours} ^ {*theirs}))
        raise InputError(f"{where} differ in their classes: {differ}")

def train(args):
    checkpoint = from_process_0(open_out, args)  # machines need not share the folder
    dataset, test_dataset = open_images(args, train=True), open_images(args, train=False)
    check_classes(dataset.classes, test_dataset.classes, f"--data-dir {args.data_dir}: train, val")
    check_batch_size(args.batch_size, len(dataset.labels))
    batches = Batches(dataset, torch.arange(len(dataset.labels)), args.batch_size, True, args)
    test_batches = Batches(test_dataset, torch.arange(len(test_dataset.labels)), args.batch_size,
                           False, args)
    torch.manual_seed(args.seed)  # of the weights
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
    run = Run(args, METHOD, dataset, checkpoint, network=network, optimizer=optimizer,
              schedule=schedule)
    parameters = count_parameters(network)
    print0(f"{args.name}: {parameters:,} parameters, auxiliary head: {args.auxiliary > 0}")
    if args.drop_path:
        network.drop_path = torch.zeros((), device=args.device)
    if args.compile:
        network.compile()

    for epoch in range(len(run.log), args.epochs):
        start = time.perf_counter()
        # For cutout, drop-path and AutoAugment; other seeds than those of the shuffle.
        torch.manual_seed(1_000_003 * args.seed + 500_000 + WORLD_SIZE * epoch + RANK)
        batches.set_epoch(epoch)
        if args.drop_path:
            network.drop_path.fill_(args.drop_path * epoch / args.epochs)
        loss = train_epoch(network, optimizer, batches, args)
        errors = evaluate(network, test_batches)
        schedule.step()
        seconds = time.perf_counter() - start
        run.log.append({"epoch": epoch + 1, "loss": loss, **errors, "seconds": seconds})
        best = min(run.log, key=lambda row: row["top1_error"])
        is_best = best is run.log[-1]  # on the test images: an optimistic choice
        run.save(["best.pt", CHECKPOINT] if is_best else [CHECKPOINT])
        mean = sum(row["seconds"] for row in run.log) / len(run.log)
        rate = (batches.num_images + test_batches.num_images) / seconds
        print0(f"epoch {epoch + 1:3}/{args.epochs}  loss {loss:.3f}  {describe(errors)}  "
               f"{rate:.0f} images/s  "
               f"{timedelta(seconds=round(mean * (args.epochs - len(run.log))))} left")

    best, last = min(run.log, key=lambda row: row["top1_error"]), run.log[-1]
    print0(f"{describe(last)} (best.pt: {describe(best)}, epoch {best['epoch']}), "
           f"{parameters:,} parameters")

def test(args):
    """--evaluate: print the errors of the weights in a file on the test images."""
    weights, settings, classes = read_weights(args.evaluate)
    dataset = open_images(args, train=False)
    if settings:
        check_classes(classes, dataset.classes, f"{args.evaluate} and {args.data_dir}")
    auxiliary = any("aux" in str(name) for name in weights)
    network = open_network(args, len(dataset.classes), auxiliary)
    load_by_position(network, weights, args.evaluate)
    index = torch.arange(len(dataset.labels))
    errors = evaluate(network, Batches(dataset, index, args.batch_size, False, args))
    print0(f"{args.evaluate}: {describe(errors)} of {len(index)} images, "
           f"{count_parameters(network):,} parameters")

def summarise(args):
    """--summary: print parameters, multiply-adds and latency."""
    num_classes = {"cifar100": 100, "imagenet": 1000}.get(args.dataset, 10)
    if args.dataset == "imagefolder":
        num_classes = len(ImageFolder(args.data_dir / "train", args.image_size).classes)
    network, times = open_network(args, num_classes, auxiliary=False).eval(), []
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), autocast(args.device):
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
           f"passes, batch {args.batch_size}, {logits.dtype}, {device})")

# ==================================================================================================
# Nothing of the papers stands below: images, processes, files, what the user sees, arguments, main

# ==== shared: images ==============================================================================
class InputError(Exception):
    """Invalid input, reported in one line. Any other exception keeps its traceback."""

MEAN_STD = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
            "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}  # and any other data set
SMALL = 64  # pixels: up to this size all the images are kept on the device, as one tensor

# images (N, 3, S, S) uint8 and labels (N,) on the device; classes, facts: as in ImageFolder
SmallImages = namedtuple("SmallImages", "images labels classes facts")

class ImageFolder(torchvision.datasets.ImageFolder):
    """The images <folder>/<class>/*, each read when it is needed.

    A key is (index of an image, seed of its augmentation); without augmentation, the seed is None.
    facts: what describes them; the same in all processes, and in a run and its --resume.
    """
    def __init__(self, folder, size):
        formats = Image.registered_extensions()
        suffixes = tuple(suffix for suffix in formats if formats[suffix] in Image.OPEN)
        below = len(str(folder))  # where in a path the part below the folder begins
        def is_image(path):  # no hidden file, and none in a hidden folder
            return path.lower().endswith(suffixes) and f"{os.sep}." not in path[below:]
        try:
            super().__init__(folder, is_valid_file=is_image)
        except OSError as error:  # no such folder, or a class without images
            raise InputError(f"--data-dir: {folder}: {error.strerror or error}") from None
        names = repr([path[below:] for path, _ in self.samples])
        self.facts = {f"class {label}": name for label, name in enumerate(self.classes)}
        self.facts["number of images"] = len(self.samples)
        self.facts["digest of the file names"] = hashlib.sha256(names.encode()).hexdigest()[:16]
        self.labels = torch.tensor(self.targets)
        self.plain = plain_transform(size)
        self.augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(),
                                     v2.ColorJitter(0.4, 0.4, 0.4, 0.2), v2.PILToTensor()])

    def find_classes(self, directory):
        names = sorted(entry.name for entry in os.scandir(directory)
                       if entry.is_dir() and not entry.name.startswith("."))
        if len(names) < 2:
            raise InputError(f"--data-dir: {directory} must hold a folder for each of two or more "
                             f"classes; it holds {', '.join(names) or 'none'}")
        return names, {name: label for label, name in enumerate(names)}

    def __getitem__(self, key):
        index, seed = key
        path, label = self.samples[index]
        image = open_rgb(path)
        if seed is None:
            return self.plain(image), label
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
            return self.augmented(image), label

def open_rgb(path):
    try:
        image = Image.open(path)
        if image.mode[0] in "IF":  # 16 bits or floats, of which PIL would make black and white
            raise ValueError(f"its pixels must have 8 bits, not the mode {image.mode}")
        return upright_rgb(image)
    except Exception as error:  # PIL raises many kinds
        raise InputError(f"{path} cannot be read as an image: {error}") from None

def upright_rgb(image):
    return ImageOps.exif_transpose(image).convert("RGB")  # phones store photographs lying

def plain_transform(size):
    """PIL image -> (3, size, size) uint8, without augmentation."""
    resized = size if size <= SMALL else size * 256 // 224  # ImageNet: 256, then the central 224
    return v2.Compose([v2.Resize(resized), v2.CenterCrop(size), v2.PILToTensor()])

def make_gratings(count, size, seed):
    """Synthetic images, two gratings under noise -> SmallImages of (count, 3, size, size).

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
    images = torch.einsum("nwyx,nwc->ncyx", waves, colour)
    images = images + 0.8 * torch.randn(count, 3, size, size, generator=g)
    classes = [f"angles {a} and {b}" for a, b in pairs.tolist()]
    return SmallImages((128 + 50 * images).clamp(0, 255).to(torch.uint8), labels, classes, {})

def read_cifar(args, train):
    name = args.dataset.upper()
    try:
        for rank in range(WORLD_SIZE):  # one after the other: the next finds what one downloaded
            if rank == RANK:
                data = getattr(torchvision.datasets, name)(args.data_dir, train, download=True)
            sum_over_ranks(torch.zeros(1, device=args.device)).item()  # waits for all processes
    except (OSError, RuntimeError) as error:  # RuntimeError: a checksum is wrong
        raise InputError(f"--data-dir {args.data_dir}: {name} cannot be read from there, nor "
                         f"downloaded: {error}") from None
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    return SmallImages(images, torch.tensor(data.targets), data.classes, {})

def read_whole_folder(folder, args):
    """ImageFolder -> SmallImages. Each process reads a share of the files."""
    share = range(RANK, len(folder), WORLD_SIZE)
    images = torch.zeros(len(folder), 3, args.image_size, args.image_size, dtype=torch.uint8)
    loader = torch.utils.data.DataLoader(folder, batch_size=None, num_workers=args.workers,
                                         sampler=[(index, None) for index in share])
    for index, (image, _) in zip(share, loader):
        images[index] = image
        if silent_for_a_minute():
            print0(f"    read {index:,} of {len(folder):,} images")
    images = sum_over_ranks(images.to(args.device))  # what other processes read is 0 here
    return SmallImages(images, folder.labels, folder.classes, folder.facts)

def open_images(args, train):
    """The training or the test images -> SmallImages, above SMALL pixels ImageFolder."""
    if args.dataset == "synthetic":
        count, seed = (768, 2 * args.seed + 1) if train else (1000, 2 * args.seed)
        dataset = make_gratings(count, args.image_size, seed)
    elif args.dataset in ("cifar10", "cifar100"):
        dataset = read_cifar(args, train)
    else:
        dataset = ImageFolder(args.data_dir / ("train" if train else "val"), args.image_size)
        compare_processes(dataset.facts)
    print0(f"{len(dataset.labels):,} {'training' if train else 'test'} images of "
           f"{len(dataset.classes)} classes: {', '.join(dataset.classes[:5])} ...")
    if isinstance(dataset, ImageFolder):
        if args.image_size > SMALL:
            return dataset
        dataset = read_whole_folder(dataset, args)
    return dataset._replace(images=dataset.images.to(args.device),
                            labels=dataset.labels.to(args.device))

# ==== shared: batches =============================================================================
def shift_and_flip(images, g):
    """Shift each of images (B, 3, S, S) by up to S / 8 in x and in y, and mirror half of them."""
    count, _, _, size = images.shape
    pad = size // 8  # 4 pixels for images of 32
    y, x = torch.randint(2 * pad + 1, (2, count), generator=g).to(images.device)
    mirrored = torch.randint(2, (count, 1, 1, 1), generator=g).bool().to(images.device)
    crops = F.pad(images, (pad, pad, pad, pad)).unfold(2, size, 1).unfold(3, size, 1)
    # crops: (B, 3, 2 pad + 1, 2 pad + 1, S, S)
    images = crops[torch.arange(count, device=y.device), :, y, x]
    return torch.where(mirrored, images.flip(3), images)

class Batches:
    """Batches of images (B, 3, S, S) uint8 and labels (B,) on the device; a process gets its share.

    dataset: see open_images; index (N,): which of its images. Training batches are shuffled,
    augmented and all full. What is random in them follows from the seed and the epoch alone, so
    that --resume is exact.
    """
    def __init__(self, dataset, index, batch_size, train, args):
        self.dataset, self.index, self.batch_size, self.train = dataset, index, batch_size, train
        self.num_images = len(index)
        if train:
            self.num_images -= len(index) % batch_size  # a last, smaller batch is left out
        self.device, self.seed, self.epoch = args.device, args.seed, 0
        mean, std = MEAN_STD.get(args.dataset, MEAN_STD["imagenet"])
        self.mean = 255 * torch.tensor(mean, device=args.device).view(3, 1, 1)
        self.std = 255 * torch.tensor(std, device=args.device).view(3, 1, 1)
        if isinstance(dataset, ImageFolder):
            self.keys = []  # the batches of an epoch, lists of keys: filled anew for the loader
            self.loader = torch.utils.data.DataLoader(
                dataset, batch_sampler=self.keys, num_workers=args.workers,
                persistent_workers=args.workers > 0, pin_memory=args.device == "cuda",
                generator=torch.Generator())  # or it would draw from the global one

    def __len__(self):
        return math.ceil(self.num_images / self.batch_size)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self.start = time.perf_counter()
        g = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        index = self.index
        if self.train:
            index = index[torch.randperm(len(index), generator=g)]
        batches = index[:self.num_images].split(self.batch_size)
        # In a test the last batch may have no image for this process.
        batches = [batch for batch in batches if len(batch) > RANK]
        read = self.read_files if isinstance(self.dataset, ImageFolder) else self.read_memory
        pinned = self.device == "cuda"
        self.step = 0
        for images, labels in read(batches, g):
            self.step += 1
            yield (images.to(self.device, non_blocking=pinned, memory_format=torch.channels_last),
                   labels.to(self.device, non_blocking=pinned))

    def read_memory(self, batches, g):
        for batch in batches:
            images, labels = self.dataset.images[batch], self.dataset.labels[batch]
            if self.train:
                images = shift_and_flip(images, g)  # the whole batch, alike in every process
            yield images[RANK::WORLD_SIZE], labels[RANK::WORLD_SIZE]

    def read_files(self, batches, g):
        self.keys.clear()
        for batch in batches:
            seeds = [None] * len(batch)
            if self.train:
                seeds = torch.randint(2**31, batch.shape, generator=g).tolist()
            keys = list(zip(batch.tolist(), seeds))
            self.keys.append(keys[RANK::WORLD_SIZE])
        yield from self.loader

    def normalise(self, images):
        return (images - self.mean) / self.std

    def sign_of_life(self, total_loss=None):
        """Print how far the epoch is, where nothing was printed for a minute."""
        if silent_for_a_minute():
            seconds = time.perf_counter() - self.start
            left = timedelta(seconds=round(seconds * (len(self) / self.step - 1)))
            loss = "" if total_loss is None else f"  loss {total_loss.item() / self.step:.3f}"
            name = f"epoch {self.epoch + 1}, training" if self.train else "validation"
            print0(f"    {name} step {self.step}/{len(self)}{loss}  "
                   f"{self.step * self.batch_size / seconds:.0f} images/s  {left} left of it")

def check_batch_size(size, num_images):
    if size > num_images:
        raise InputError(f"--batch-size {size} is larger than the {num_images} images for it (a "
                         "search splits the training images into halves)")
    if size % WORLD_SIZE or size < 2 * WORLD_SIZE:  # BatchNorm needs two
        raise InputError(f"--batch-size {size} must be a multiple of {WORLD_SIZE}, the number of "
                         "processes, and give each of them at least 2 images")

# ==== shared: processes ===========================================================================
RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1
if dist.is_torchelastic_launched():  # by torchrun, a process for each device
    RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ[name]) for name in
                                    ("RANK", "LOCAL_RANK", "WORLD_SIZE"))

def start_processes(args):
    """Set up the device, and connect the processes."""
    if args.dataset == "synthetic" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # images this small leave a second thread waiting
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.benchmark = True
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    compare_processes(fixed_options(args))

def compare_processes(facts):
    """Raise an InputError in every process unless all have the same facts, a dict."""
    all_facts = [facts] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(all_facts, facts)  # now each process holds those of all
    for rank in range(WORLD_SIZE):
        check_same(all_facts[rank], all_facts[0], f"in process {rank}", "in process 0")

def check_same(ours, theirs, here, there):
    """Raise an InputError that names the first entry in which two dicts differ."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            option = name if " " in name else f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is {value} {here}, but {theirs.get(name)} {there}")

def from_process_0(function, args):
    """What function(args) returns, or raises as an InputError, in process 0: in every process."""
    result = [None]
    if RANK == 0:
        try:
            result = [function(args)]
        except InputError as error:
            result = [error]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(result)
    if isinstance(result[0], InputError):
        raise result[0]
    return result[0]

def sum_over_ranks(tensor):
    """Replace the tensor by its sum over the processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor

def average_over_ranks(tensors):
    """Replace each tensor by its mean over the processes, all in one message."""
    if WORLD_SIZE > 1:
        flat = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors])) / WORLD_SIZE
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))

def average_gradients(weights):
    """Over the processes. DistributedDataParallel would send those off the path as well."""
    average_over_ranks([weight.grad for weight in weights if weight.grad is not None])

def finite_mean(total_loss, batches, weights):
    """The mean loss of an epoch. InputError if it, or a weight that was trained, is not finite."""
    average_over_ranks([total_loss])
    loss = total_loss.item() / len(batches)
    finite = torch.stack([w.isfinite().all() for w in weights if w.grad is not None]).all()
    if not (math.isfinite(loss) and finite):
        raise InputError(f"epoch {batches.epoch + 1}: the loss, {loss}, or a weight is not finite: "
                         "start again with a smaller --lr (the last checkpoint is kept)")
    return loss

def autocast(device):
    """bfloat16 on a GPU that has it: older ones only emulate it, slowly."""
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, enabled=native)

# ==== shared: files ===============================================================================
CHECKPOINT = "checkpoint.pt"
MAY_DIFFER = {  # between the processes of a run, and between a run and its --resume
    "data_dir", "device", "workers", "out", "resume", "compile", "summary", "evaluate", "name"}

def fixed_options(args):
    return {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}

def write_file(path, data):
    """Write bytes to a temporary name, then rename: the file is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None

def read_checkpoint(path):
    """The dict that torch.save() wrote to path; code in it does not run."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load has many ways to fail
        if "Unsupported global" in str(error):  # by weights_only
            raise InputError(f"{path} holds more than tensors, which could run code: save the "
                             "bare state dict, torch.save(network.state_dict(), FILE)") from None
        raise InputError(f"{path} is damaged, or not a checkpoint") from None

def open_out(args):
    """Make the folder --out -> the checkpoint from which --resume goes on, None in a new run."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in args.out.iterdir()
                 if path.suffix != ".tmp" and not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"--out {args.out}: {error.strerror}") from None
    if args.resume and CHECKPOINT in names:
        return read_checkpoint(args.out / CHECKPOINT)
    if names:
        raise InputError(f"--out {args.out} is not empty: name another folder, or go on with the "
                         f"run of its {CHECKPOINT} by --resume")

class Run:
    """A run in the folder --out: checkpoint.pt, for --resume, and log.jsonl, an object per epoch.

    checkpoint: the state to go on from, or None. parts: name -> what has a state_dict().
    """
    def __init__(self, args, method, dataset, checkpoint, **parts):
        self.folder, self.parts, self.log = args.out, parts, []
        self.settings = {"the method": method, "number of processes": WORLD_SIZE,
                         "list of operations": list(OPS), **fixed_options(args), **dataset.facts}
        self.classes = dataset.classes
        if checkpoint:
            check_same(self.settings, checkpoint.get("settings", {}), "in this command",
                       f"in {self.folder / CHECKPOINT}: --resume needs the same")
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            self.log = checkpoint["log"]
        self.save()  # now: a folder that cannot be written ends the run at its start
        print0(", ".join(f"{name} {value}" for name, value in fixed_options(args).items()))

    def save(self, names=(CHECKPOINT,)):
        """Write the state to a file of each name, then log.jsonl."""
        if RANK == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            buffer = io.BytesIO()
            torch.save({"settings": self.settings, "classes": self.classes, "log": self.log,
                        **state}, buffer)
            for name in names:
                write_file(self.folder / name, buffer.getvalue())
            lines = [json.dumps(row) + "\n" for row in self.log]
            write_file(self.folder / "log.jsonl", "".join(lines).encode())

last_line = time.perf_counter()  # when the last line was printed

def print0(text):
    """Print in process 0."""
    global last_line
    last_line = time.perf_counter()
    if RANK == 0:
        print(text, flush=True)

def silent_for_a_minute():
    return RANK == 0 and time.perf_counter() - last_line > 60

# ==== end =========================================================================================

def read_weights(path):
    """A checkpoint of ours -> its state dict, settings and classes; of others -> ..., {}, []."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    checkpoint = read_checkpoint(path)
    if "distribution" in checkpoint:
        raise InputError(f"{path} is the checkpoint of a search, not of a network to use")
    if "network" in checkpoint and "settings" in checkpoint:
        return checkpoint["network"], checkpoint["settings"], checkpoint["classes"]
    for name in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(checkpoint.get(name), dict):
            return checkpoint[name], {}, []
    return checkpoint, {}, []

def parse_args(argv, method=METHOD):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="For a chain of blocks on ImageNet, the default --lr is 0.4 for 1,024 images, and "
               "--batch-size scales it.")
    add = parser.add_argument
    add("--genotype", help="a file of a search, a published name, random:SEED[:gpu or :cpu], or a "
        "genotype as text (default: runs/ddp_nas/genotype.json)")
    add("--dataset", choices=DEFAULTS, help="default: that of the genotype, or synthetic")
    # ==== shared: arguments =======================================================================
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR",
        help="CIFAR's folder, it is downloaded if missing; or one with train/<class>/* and, for "
             "retrain.py, val/<class>/* (default: data)")
    add("--image-size", type=int, metavar="PIXELS",
        help="side of an image; up to 64, images stay in memory, shifted and flipped at random; "
             "above, they get ImageNet's random crops and colours")
    add("--channels", type=int, help="C, the channels of the first cell")
    add("--cells", type=int, help="number of cells")
    add("--batch-size", type=int, help="images per step, of all processes together")
    add("--lr", type=float, help="learning rate of the first epoch")
    add("--seed", type=int, help="of everything random (default: 0)")
    add("--device", choices=("cpu", "cuda", "mps"),
        default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, if there")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--workers", type=int, default=min(8, cores),
        help="processes that read image files, for each process that trains (default: %(default)s)")
    add("--out", type=Path, default=Path("runs") / method, help="folder for the results "
        "(default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    # ==== end =====================================================================================
    add("--epochs", type=int, help="number of training epochs")
    add("--large", action="store_true", help="44 channels, 1,800 epochs and AutoAugment")
    add("--compile", action="store_true", help="use torch.compile")
    add("--summary", action="store_true", help="print parameters, multiply-adds and latency")
    add("--evaluate", type=Path, metavar="FILE",
        help="measure the test error of a checkpoint of ours, or of weights of others")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items()
             if value is not None}

    saved = {}  # what the checkpoint under --evaluate was trained with
    if "evaluate" in given:
        _, settings, _ = read_weights(given["evaluate"])
        names = ("genotype", "dataset", "image_size", "channels", "cells", "seed")
        saved = {name: settings[name] for name in names if name in settings}
        if "genotype" not in {**saved, **given}:
            parser.error(f"--evaluate {given['evaluate']}: what does it hold? Add --genotype")
    if "genotype" in saved and "genotype" not in given:
        name, genotype, searched = given["evaluate"], parse_genotype(saved["genotype"]), {}
    else:
        name = given.get("genotype", "runs/ddp_nas/genotype.json")
        genotype, searched = load_genotype(name)
    space = "cell" if isinstance(genotype, Genotype) else "mobile"
    dataset = ChainMap(given, saved, searched, {"dataset": "synthetic"})["dataset"]
    if searched.get("dataset") != dataset:
        searched = {}

    recipe = {"synthetic": SYNTHETIC, "imagenet": IMAGENET_CELL}.get(dataset, CIFAR)
    if dataset == "imagenet" and space == "mobile":
        batch_size = given.get("batch_size", IMAGENET_MOBILE["batch_size"])
        recipe = {**IMAGENET_MOBILE, "lr": IMAGENET_MOBILE["lr"] * batch_size / 1024}
    layers = [  # the first that has a value wins
        {"genotype": str(genotype), "name": name, "space": space, "dataset": dataset},
        given, saved, searched, {"batch_size": 1} if given["summary"] else {},
        LARGE if given["large"] else {}, recipe, DEFAULTS[dataset], {"seed": 0, "evaluate": None}]
    args = argparse.Namespace(**ChainMap(*layers))
    if space == "mobile" and (given["large"] or "channels" in given or "cells" in given):
        parser.error("--channels, --cells and --large are for cells; this is a chain of blocks")
    if dataset == "imagenet" and args.large:
        parser.error("--large is for small images, not for --dataset imagenet")
    if space == "cell" and dataset == "imagenet" and args.image_size % 32:
        parser.error(f"--image-size {args.image_size} must be a multiple of 32, halved 5 times")
    if space == "mobile":
        args.channels = args.cells = None
        args.drop_path = 0.0
    if space == "mobile" or args.image_size < (224 if dataset == "imagenet" else 32):
        args.auxiliary = 0.0  # there is no map of 7 or 8 pixels that its head could pool
    # ==== shared: checks ==========================================================================
    least = {"seed": 0, "workers": 0, "channels": 2, "cells": 3, "image_size": 1, "batch_size": 1,
             "epochs": 1, "passes": 1}
    for name in least.keys() & given.keys():
        if given[name] < least[name]:
            parser.error(f"--{name.replace('_', '-')} must be at least {least[name]}, not "
                         f"{given[name]}")
    for name in {"lr", "alpha"} & given.keys():
        if not 0 < given[name] < math.inf:  # NaN fails this, too
            parser.error(f"--{name} must be a number above 0, not {given[name]}")
    if args.device == "cuda" and torch.cuda.device_count() <= LOCAL_RANK:
        parser.error(f"--device cuda: torch finds {torch.cuda.device_count()} CUDA devices here")
    if args.device == "mps" and not torch.backends.mps.is_available():
        parser.error("--device mps: torch finds no Apple GPU here")
    if args.dataset.startswith("cifar") and args.image_size != 32:
        parser.error("--image-size: CIFAR has 32 pixels; other sizes with --dataset imagefolder")
    if args.space == "cell" and args.image_size % 4:
        parser.error(f"--image-size {args.image_size} must be a multiple of 4, for two reductions")
    # ==== end =====================================================================================
    return args

def main(argv=None):
    """Train, test or summarise -> exit code."""
    threads = torch.get_num_threads()
    try:
        args = parse_args(argv)
        start_processes(args)
        torch.backends.cudnn.allow_tf32 = False  # errors are measured in full float32
        if args.summary:
            summarise(args)
        elif args.evaluate:
            test(args)
        else:
            train(args)
    # ==== shared: how it ends =====================================================================
    except InputError as error:
        # A DataLoader's worker sends its traceback, which ends with the message.
        print(f"error: {str(error).rpartition('InputError: ')[2].strip()}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: lower --batch-size: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
    # ==== end =====================================================================================

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for a terminal that lacks a character
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: a run goes on from its last whole epoch with --resume", file=sys.stderr)
        sys.exit(130)
