"""Dynamic Distribution Pruning for Efficient Network Architecture Search (arXiv:1905.13543).

    python ddp_nas.py                      # synthetic images, about a minute on a CPU core
    python ddp_nas.py --dataset cifar10    # the paper's search on CIFAR-10
    python ddp_nas.py --dataset imagefolder --data-dir DIR    # DIR/train/<class>/*, at 32 pixels
    torchrun --nproc_per_node=8 ddp_nas.py --dataset imagenet --data-dir DIR    # on 8 GPUs

A cell is a small graph: an edge applies an operation to the output of an earlier node, and a node
adds up its edges. The network is a stack of copies of two cells; one of them halves the image. For
ImageNet it is a chain of blocks, each of which counts as an edge. A path is one of K operations for
each of the E edges.

An epoch of the search samples a path, trains its weights on one half of the training images, and
measures its accuracy on the other half. Once every operation that is left was sampled T times, each
edge loses the one with the lowest score. The last operation on each edge is the result.

mdenas.py differs in its settings, its distribution, a few lines of the search and main's default.
"""
import argparse, io, json, math, operator, os, random, sys, time
from collections import Counter, namedtuple
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F, torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

# ==== settings ====================================================================================
METHOD = "ddp_nas"
OPTIONS = {  # of the distribution: name -> (default, help)
    "passes": (3, "T: how often each operation is sampled before one is pruned")}
PAPER = dict(space="cell", channels=16, cells=8, image_size=32, batch_size=512, lr=0.025)
DEFAULTS = {  # by data set; the paper searched on cifar10 and imagenet
    "synthetic": dict(space="cell", channels=8, cells=3, image_size=16, batch_size=32, lr=0.1),
    "cifar10": PAPER, "cifar100": PAPER, "imagefolder": PAPER,
    "imagenet": {**PAPER, "space": "mobile", "image_size": 224},
}
LR_MIN = 0.001                        # learning rate at the end of the paper's search
MOMENTUM, WEIGHT_DECAY = 0.9, 3e-4
CLIP = 5.0                            # the largest norm of a gradient

# ==== the distribution ============================================================================
class DynamicDistribution:
    """The operations that are left on each of E edges, and theta, a score of every operation.

    A round, with k operations left on every edge, is T passes of k epochs. In a pass each edge goes
    through its k operations once, in random order. Let a_t(o) be the accuracy of the path that had
    operation o on an edge in pass t. After the round each edge updates theta, with a softmax over
    its k operations, of accuracies in percent,

        theta(o) <- 1/T sum_t softmax_o(100 a_t(o)) + decay * theta(o)

    and prunes the operation with the smallest theta, for good. From then on that theta only decays;
    derive_cells() uses it where `none` is what is left. The paper speaks of sampling from a
    distribution: here it is uniform over what is left, without replacement in a pass. So it is in
    the first author's search code, as are T = 3, decay = 1/2 and the factor 100.

    scores (E, K): theta, 1 / K at the start.
    """
    def __init__(self, num_edges, num_ops, passes=3, decay=0.5, seed=0):
        self.passes, self.decay = passes, decay  # T, and how much of the old theta stays
        self.total_epochs = passes * sum(range(2, num_ops + 1))  # T (K + ... + 3 + 2)
        self.scores = torch.full((num_edges, num_ops), 1 / num_ops, dtype=torch.float64)
        self.rng = torch.Generator().manual_seed(seed)
        # What is left on each edge, shuffled: of equal scores the first one is pruned.
        self.alive = [torch.randperm(num_ops, generator=self.rng).tolist()
                      for _ in range(num_edges)]
        self.queue = []    # the samples of this pass that are not recorded yet
        self.history = []  # of this round: (sample, accuracy)

    @property
    def probabilities(self):
        """(E, K): theta, 0 where pruned, in rows that sum to 1. For search() to print and count."""
        left = torch.zeros_like(self.scores)
        for edge, alive in enumerate(self.alive):
            left[edge, alive] = self.scores[edge, alive]
        return left / left.sum(1, keepdim=True)

    def best(self):
        """The operation of the highest theta of what is left on every edge, E indices."""
        return [max(alive, key=lambda op: theta[op])
                for alive, theta in zip(self.alive, self.scores.tolist())]

    def sample(self):
        """The path of the next epoch, an operation for every edge: a list of E indices."""
        if len(self.alive[0]) == 1:
            raise ValueError("the search is over: each edge has one operation left, see best()")
        if not self.queue:  # a new pass
            orders = [[alive[i] for i in torch.randperm(len(alive), generator=self.rng).tolist()]
                      for alive in self.alive]
            self.queue = list(zip(*orders))
        return list(self.queue[0])

    def record(self, sample, accuracy):
        """Take in the accuracy, in [0, 1], of the last sample; at the end of a round, prune."""
        if not 0 <= accuracy <= 1:  # NaN fails this, too
            raise ValueError(f"an accuracy must be between 0 and 1, not {accuracy}")
        if not self.queue or tuple(sample) != self.queue[0]:
            raise ValueError("record() takes the sample that sample() gave last")
        self.history.append((self.queue.pop(0), float(accuracy)))
        if len(self.history) == self.passes * len(self.alive[0]):
            self.prune()
            self.history = []

    def prune(self):
        """Update theta from the history of a round, and prune an operation on every edge."""
        k, T = len(self.alive[0]), self.passes
        theta = self.scores.tolist()
        for edge, alive in enumerate(self.alive):
            theta[edge] = [self.decay * old for old in theta[edge]]
            for t in range(T):
                one_pass = self.history[t * k:(t + 1) * k]  # k samples, each with another operation
                total = sum(math.exp(100 * accuracy) for _, accuracy in one_pass)
                for sample, accuracy in one_pass:
                    theta[edge][sample[edge]] += math.exp(100 * accuracy) / total / T
            alive.remove(min(alive, key=lambda op: theta[edge][op]))
        self.scores = torch.tensor(theta, dtype=torch.float64)

    def state_dict(self):
        """Every attribute. torch.load takes tensors, numbers, strings, lists, tuples and dicts."""
        return {**vars(self), "rng": self.rng.get_state()}

    def load_state_dict(self, state):
        """Go on from a state_dict()."""
        self.rng.set_state(state["rng"])
        vars(self).update({**state, "rng": self.rng})

# ==== one epoch ===================================================================================
def train_epoch(network, optimizer, batches, sample):
    """Train the path of the sample (E,) on every batch once -> mean loss.

    batches: images (B, 3, S, S), normalised, and labels (B,), on the device of the network.
    """
    network.train()
    weights = list(network.parameters())
    device = weights[0].device
    sum_losses, sum_norms = torch.zeros(2, device=device)
    for images, labels in batches:
        with autocast(device):
            logits = network(images, sample)
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()  # to None, so the optimizer leaves the weights off the path alone
        loss.backward()
        average_gradients(weights)
        norm = nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        sum_losses += loss.detach()  # not .item(), which would wait for the device
        sum_norms += norm
    return finite_mean(sum_losses, sum_norms, len(batches))  # a UserError for NaN or infinity

@torch.no_grad()
def evaluate(network, batches, sample):
    """Top-1 accuracy of the path of the sample (E,), in [0, 1]."""
    network.eval()  # the BatchNorms go on with the statistics of the batch, see SupernetNorm
    device = next(network.parameters()).device
    num_images, num_correct = 0, torch.zeros((), device=device)
    for images, labels in batches:
        with autocast(device):
            logits = network(images, sample)
        num_images += len(labels)
        num_correct += (logits.argmax(1) == labels).sum()
    average_over_processes([num_correct])  # in place; all have the same number of images
    return num_correct.item() / num_images

# ==== the search ==================================================================================
def split_training_images(args):
    """The training images, and the batches of two halves of them: to train, and to validate."""
    dataset = open_images(args, "train")
    g = torch.Generator().manual_seed(args.seed)
    training, validation = torch.randperm(len(dataset), generator=g).tensor_split(2)
    check_batch_size(args.batch_size, len(validation))
    # BatchNorm takes its statistics from the batch, so all validation batches have one size: 25,000
    # images and --batch-size 512 make 48 batches of 520; the 40 images left over are not used.
    num_batches = len(validation) // args.batch_size
    even_size = len(validation) // num_batches // WORLD_SIZE * WORLD_SIZE  # over all processes
    return (dataset, Batches(dataset, training, args.batch_size, args, train=True),
            Batches(dataset, validation[:num_batches * even_size], even_size, args, train=False))

def search(args, distribution):
    """Run the distribution to its end, a path an epoch, and write the architecture to --out."""
    dataset, train_half, validation_half = split_training_images(args)
    torch.manual_seed(args.seed)  # the same initial weights in every process
    network = build_supernet(args, num_classes=len(dataset.classes))
    optimizer = torch.optim.SGD(network.parameters(), args.lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, distribution.total_epochs, min(LR_MIN, args.lr))
    settings = {**run_settings(args), "images": len(dataset), "classes": dataset.classes,
                "operations": list(OPS if args.space == "cell" else CANDIDATES)}
    parts = dict(network=network, optimizer=optimizer, schedule=schedule,
                 distribution=distribution)
    log = load_checkpoint(args, settings, parts)  # empty, unless --resume finds a checkpoint

    for epoch in range(len(log), distribution.total_epochs):
        start = time.perf_counter()
        num_alive = count_alive(distribution)
        sample = draw_sample(args, epoch, distribution)  # distribution.sample(), checked
        train_half.epoch = epoch  # the seed of its order, shifts and flips
        loss = train_epoch(network, optimizer, train_half, sample)
        accuracy = evaluate(network, validation_half, sample)
        distribution.record(sample, accuracy)
        schedule.step()
        log.append({"epoch": epoch + 1, "alive": num_alive, "sample": sample, "loss": loss,
                    "accuracy": accuracy, "seconds": time.perf_counter() - start})
        save_checkpoint(args, settings, parts, log)
        print_epoch(log, distribution.total_epochs, f"accuracy {accuracy:.2%}",
                    num_images=train_half.num_images + validation_half.num_images)
        is_last = len(log) == distribution.total_epochs  # a method of your own may never prune
        if count_alive(distribution) < num_alive or is_last:
            print_distribution(distribution.probabilities, args)

    best = check_sample(distribution.best(), *distribution.probabilities.shape)
    accuracy = evaluate(network, validation_half, best)  # of the path, not of the cells below
    if args.space == "cell":
        found = derive_cells(best, distribution.scores, args.seed)
    else:
        found = [CANDIDATES[choice] for choice in best]
    write_results(args, settings, log, found, accuracy)

def count_alive(distribution):
    """k; for a method of your own, whose edges may differ, the largest."""
    return (distribution.probabilities > 0).sum(1).max().item()

# ==== operations ==================================================================================
NODES = range(2, 6)      # of a cell, each with an edge from every lower number; 0 and 1: its inputs
CELL_EDGES = sum(NODES)  # 2 + 3 + 4 + 5, sorted by node, then by source

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

# As in DARTS: normal and reduce are lists of 8 pairs (operation, source), two for each node; the
# output of a cell is made of the nodes in concat.
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

# ==== supernets ===================================================================================
# BatchNorms keep no running statistics: a mean shared by many paths would describe none of them.
SupernetNorm = partial(nn.BatchNorm2d, track_running_stats=False)

def dense_gradient(x):
    """Return x. torch.cat gives gradients that are slices, slow in BatchNorm: copy that of x."""
    if x.requires_grad and not torch.compiler.is_compiling():  # torch 2.4 cannot compile hooks
        x.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return x

class SupernetCell(nn.Module):
    def __init__(self, c_prev_prev, c_prev, c, reduction, reduction_prev):
        super().__init__()
        norm = partial(SupernetNorm, affine=False)  # the authors' choice, as in DARTS
        self.reduction = reduction
        preprocess = FactorizedReduce if reduction_prev else relu_conv_bn
        self.preprocess0 = preprocess(c_prev_prev, c, norm)
        self.preprocess1 = relu_conv_bn(c_prev, c, norm)
        self.edges = nn.ModuleList()  # (14, 8)
        for node in NODES:
            for source in range(node):
                stride = 2 if reduction and source < 2 else 1
                self.edges.append(nn.ModuleList(op(c, stride, norm) for op in OPS.values()))

    def forward(self, s0, s1, sample):
        """s0, s1: outputs of the last two cells, older first; sample (14,) -> (B, 4 C, H, W)."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edge = 0
        for node in NODES:
            values = []
            for source in range(node):
                operation = self.edges[edge][sample[edge]]
                values.append(operation(states[source]))
                edge += 1
            states.append(dense_gradient(sum(values)))
        return torch.cat(states[2:], 1)

class CellSupernet(nn.Module):
    """A stack of cells. sample (28,): 14 edges of the normal, 14 of the reduction cells."""
    def __init__(self, channels, num_cells, num_classes):
        super().__init__()
        # Channels of the nodes of a cell, and of the outputs of the last cell and the one before.
        c, c_prev, c_prev_prev = channels, 3 * channels, 3 * channels
        reduction_prev = False
        stem = nn.Conv2d(3, c_prev, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, SupernetNorm(c_prev))
        self.cells = nn.ModuleList()
        for i in range(num_cells):
            reduction = i in (num_cells // 3, 2 * num_cells // 3)
            c = 2 * c if reduction else c
            self.cells.append(SupernetCell(c_prev_prev, c_prev, c, reduction, reduction_prev))
            c_prev_prev, c_prev, reduction_prev = c_prev, len(NODES) * c, reduction
        self.linear = nn.Linear(c_prev, num_classes)

    def forward(self, images, sample):
        """images (B, 3, S, S), S a multiple of 4; sample (28,) -> logits (B, num_classes)."""
        normal, reduce = sample[:CELL_EDGES], sample[CELL_EDGES:]
        s0 = s1 = self.stem(images)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, reduce if cell.reduction else normal)
        return self.linear(s1.mean((2, 3)))

class MobileSupernet(nn.Module):
    """A chain of MBConv blocks. sample (14 or 20,): the candidate of every block."""
    def __init__(self, backbone, num_classes):
        super().__init__()
        norm = partial(SupernetNorm, eps=1e-3)
        blocks, head = BACKBONES[backbone]
        c_in = 40  # as in the authors' code
        self.first_conv = conv_bn_relu6(3, c_in, 3, 2, norm_layer=norm)
        self.blocks = nn.ModuleList()  # (14 or 20, 9)
        for c, stride in blocks:
            candidates = [MBConv(c_in, c, stride, *pair, norm) for pair in CANDIDATES]
            self.blocks.append(nn.ModuleList(candidates))
            c_in = c
        self.head_conv = conv_bn_relu6(c_in, head, 1, norm_layer=norm)
        self.linear = nn.Linear(head, num_classes)

    def forward(self, images, sample):
        """images (B, 3, S, S), sample (number of blocks,) -> logits (B, num_classes)."""
        x = self.first_conv(images)
        for candidates, choice in zip(self.blocks, sample):
            x = candidates[choice](x)
        return self.linear(self.head_conv(x).mean((2, 3)))

def build_supernet(args, num_classes):
    if args.space == "cell":
        network = CellSupernet(args.channels, args.cells, num_classes)
    else:
        network = MobileSupernet(args.backbone, num_classes)
    return network.to(args.device, memory_format=torch.channels_last)

def derive_cells(best, scores, seed=0):
    """best: an operation for each of 28 edges, scores (28, 8) -> Genotype.

    A node keeps the 2 edges whose operations have the highest scores. Where the best operation is
    `none`, the one with the highest score of all others takes its place. Chance decides
    between operations, and between edges, of equal scores.
    """
    if not (scores < math.inf).all():  # NaN fails this, too; a method may use -inf for "never"
        raise ValueError("scores hold NaN or +infinity")
    draw = random.Random(seed).random
    names, scores = list(OPS), scores.tolist()
    edge, cells = 0, []
    for _ in range(2):  # the normal cell, the reduction cell
        pairs = []
        for node in NODES:
            edges = []  # (score, draw, operation, source): sorted by score, then by chance
            for source in range(node):
                op = best[edge]
                if names[op] == "none":
                    others = [other for other, name in enumerate(names) if name != "none"]
                    op = max(others, key=lambda other: (scores[edge][other], draw()))
                edges.append((scores[edge][op], draw(), names[op], source))
                edge += 1
            strongest = [(name, source) for _, _, name, source in sorted(edges)[-2:]]
            pairs += sorted(strongest, key=lambda pair: pair[1])
        cells.append(pairs)
    normal, reduce = cells
    return Genotype(normal, NODES, reduce, NODES)

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

def draw_sample(args, epoch, distribution):
    """The sample of an epoch, the same in every process; seeds dropout, which is not the same.

    Both follow from --seed and the epoch, so that --resume repeats them. A method may draw from
    torch's generator in sample(), but not in record() or best().
    """
    torch.manual_seed(1_000_003 * args.seed + 250_000 + epoch)
    sample = check_sample(distribution.sample(), *distribution.probabilities.shape)
    same_everywhere({"the sample": sample})
    torch.manual_seed(1_000_003 * args.seed + 500_000 + WORLD_SIZE * epoch + RANK)
    return sample

def check_sample(sample, num_edges, num_ops):
    """E indices of any integer type -> a list of E ints; an error for anything else."""
    sample = [operator.index(choice) for choice in sample]  # a TypeError for 0.9
    if len(sample) != num_edges or not set(sample) <= set(range(num_ops)):
        raise ValueError(f"a sample is {num_edges} indices from 0 to {num_ops - 1}, not {sample}")
    return sample

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
MAY_DIFFER = ("data_dir", "device", "workers", "out", "resume")  # between a run and its --resume

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

def print_distribution(probabilities, args):
    """A row for each edge of probabilities (E, K): denser is closer to the row's best, x is 0."""
    columns = [name[:3] + name[-1] if name[-1].isdigit() else name[:4] for name in OPS]
    rows = [f"{cell} {node} <- {source}" for cell in ("normal", "reduce")
            for node in NODES for source in range(node)]
    if args.space == "mobile":
        columns = [f"{kernel}x{kernel},{expansion}" for kernel, expansion in CANDIDATES]
        rows = [f"block {i}" for i in range(len(probabilities))]
    if not (abs(probabilities) < math.inf).all():  # NaN fails this, too
        raise ValueError("probabilities hold NaN or infinity")
    shades = "░▒▓█" if "utf" in str(sys.stdout.encoding).lower() else ".:*#"
    print0(" " * 14 + "".join(f"{column:>6}" for column in columns))
    for row, values in zip(rows, probabilities.tolist()):
        marks = ["x" if p == 0 else 3 * shades[min(3, int(4 * p / max(values)))] for p in values]
        print0(f"{row:14}" + "".join(f"{mark:>6}" for mark in marks))

def draw_cells(genotype):
    """A Genotype -> Mermaid graphs of its two cells, in Markdown."""
    graphs = []
    for title, pairs in (("normal", genotype.normal), ("reduce", genotype.reduce)):
        lines = ["graph LR", "0([input 0])", "1([input 1])"]
        lines += [f'{source} -->|"{operation}"| {2 + i // 2}'
                  for i, (operation, source) in enumerate(pairs)]
        lines += [f"{node} --> output([output])" for node in genotype.normal_concat]
        graphs.append(f"## {title}\n\n```mermaid\n" + "\n    ".join(lines) + "\n```\n")
    return "\n".join(graphs)

def write_results(args, settings, log, found, accuracy):
    """Write and print the architecture; accuracy: of the best path in the supernet."""
    if args.space == "cell":
        write_file(args.out / "cell.md", draw_cells(found).encode())
    results = {"genotype": str(found), "validation_accuracy": accuracy, "settings": settings}
    results = json.loads(json.dumps(results), parse_constant=str)  # JSON has no Infinity
    path = args.out / "genotype.json"
    write_file(path, (json.dumps(results, indent=1) + "\n").encode())
    ((common, count),) = Counter(row["accuracy"] for row in log).most_common(1)
    if count > len(log) / 2:
        print0(f"{count} of {len(log)} paths had an accuracy of {common:.2%}: the search could not "
               "tell them apart. More images, as many of each class, or more epochs may help.")
    print0(f"validation accuracy of the best path, on all edges of the supernet: {accuracy:.2%}\n"
           f"{found}\nto train this from scratch: python retrain.py --genotype {path}")

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

def parse_args(argv, options, method):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter,
                                     add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", choices=DEFAULTS, default="synthetic",
        help="data set; sets the defaults of other options, too")
    defaults = DEFAULTS[parser.parse_known_args(argv)[0].dataset]  # the others depend on it
    add("--space", choices=("cell", "mobile"), default=defaults["space"], help="search space")
    space = parser.parse_known_args(argv)[0].space
    if space == "cell":
        add("--channels", type=at_least(2), default=defaults["channels"],
            help="C, the channels of the first cell")
        add("--cells", type=at_least(3), default=defaults["cells"], help="number of cells")
    else:
        add("--backbone", choices=BACKBONES, default="gpu", help="widths of the blocks")
    for name, (default, text) in options.items():
        kind = type(default)
        how = {"type": at_least(0, kind) if kind in (int, float) else kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        add("--" + name.replace("_", "-"), default=default, help=text.replace("%", "%%"), **how)
    add_arguments(parser, defaults, method)
    args = parser.parse_args(argv, argparse.Namespace(method=method))
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

def main(argv=None, distribution_class=DynamicDistribution, options=OPTIONS, method=METHOD):
    """Search -> exit code.

    options: name -> (default, help) of what distribution_class takes, besides num_edges, num_ops
    and seed: bools, strings, and numbers from 0. method: its name, and that of the results' folder.
    """
    def run():
        args = parse_args(argv, options, method)
        start_processes(args)
        num_edges, num_ops = 2 * CELL_EDGES, len(OPS)
        if args.space == "mobile":
            num_edges, num_ops = len(BACKBONES[args.backbone][0]), len(CANDIDATES)
        chosen = {name: getattr(args, name) for name in options}
        distribution = distribution_class(num_edges, num_ops, seed=args.seed, **chosen)
        if distribution.total_epochs < 1:
            raise UserError(f"a search of {distribution.total_epochs} epochs finds nothing")
        search(args, distribution)
    return exit_code(run)

if __name__ == "__main__":
    sys.exit(main())
