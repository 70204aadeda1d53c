"""Dynamic Distribution Pruning for Efficient Network Architecture Search (arXiv:1905.13543).

    python ddp_nas.py                      # synthetic images, one or two minutes on a CPU core
    python ddp_nas.py --dataset cifar10    # the paper's search on CIFAR-10
    python ddp_nas.py --dataset imagefolder --data-dir DIR    # your images, DIR/train/<class>/*
    torchrun --nproc_per_node=8 ddp_nas.py --dataset imagenet --data-dir DIR    # on 8 GPUs

An architecture picks one of K operations for each of E edges. An edge is a connection inside a
cell, or a block of a chain. One epoch of search samples an architecture, trains the shared weights
along that single path on one half of the training images, and measures the accuracy of the path on
the other half. Once every remaining operation was sampled T times, each edge loses the operation
with the lowest score. The survivors are the result.

Blocks marked `shared` are the same, to the character, in mdenas.py, and some in retrain.py.
"""
import argparse, functools, hashlib, io, json, math, os, shlex, sys, time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F, torchvision
from PIL import Image, ImageOps
from torchvision.transforms import v2

METHOD = "ddp_nas"
OPTIONS = {  # of the distribution: its default, what it means
    "passes": (3, "T: how often each operation is sampled before one is pruned")}
PAPER = dict(space="cell", channels=16, cells=8, image_size=32, batch_size=512, lr=0.025)
DEFAULTS = {  # by data set
    "synthetic": dict(space="cell", channels=8, cells=3, image_size=16, batch_size=32, lr=0.1),
    "cifar10": PAPER, "cifar100": PAPER, "imagefolder": PAPER,
    "imagenet": {**PAPER, "space": "mobile", "image_size": 224},
}
LR_MIN = 0.001                        # learning rate at the end of the cosine
MOMENTUM, WEIGHT_DECAY = 0.9, 3e-4
CLIP = 5.0                            # the largest norm of a gradient

# ==== the distribution ============================================================================
class DynamicDistribution:
    """E independent categorical distributions over K operations, pruned as they learn.

    A round is T passes of k epochs. A pass samples each of the k operations left on an edge once.
    At the end of the round, theta (E, K), the score of every operation, becomes

        theta <- mean over passes of softmax over operations of (100 accuracy) + decay theta

    and the operation with the smallest is pruned from every edge. The softmax takes the accuracy
    in percent: that is the 100.
    """
    def __init__(self, num_edges, num_ops, passes=3, decay=0.5, seed=0):
        self.passes, self.decay = passes, decay  # T, and how much of the old theta stays
        self.total_epochs = passes * (num_ops * (num_ops + 1) // 2 - 1)  # T (K + ... + 3 + 2)
        self.num_alive = num_ops                 # k
        self.alive = torch.ones(num_edges, num_ops, dtype=torch.bool)
        self.theta = torch.full((num_edges, num_ops), 1 / num_ops, dtype=torch.float64)
        self.accuracies = torch.zeros(passes, num_edges, num_ops, dtype=torch.float64)  # this round
        self.order = torch.zeros(num_edges, num_ops, dtype=torch.int64)  # (E, k), of this pass
        self.epoch = 0                           # in this round, of T k
        self.rng = torch.Generator().manual_seed(seed)

    @property
    def probabilities(self):
        """(E, K): theta over the alive operations only; rows sum to 1."""
        theta = self.theta * self.alive
        return theta / theta.sum(1, keepdim=True)

    @property
    def scores(self):
        """(E, K): theta. In the found cell, the 2 edges of the highest scores enter a node."""
        return self.theta

    def best(self):
        """The alive operation of the highest score on every edge, a list of E indices."""
        return self.probabilities.argmax(1).tolist()

    def sample(self):
        """The architecture of the next epoch: an operation for every edge, a list of E indices."""
        step = self.epoch % self.num_alive
        if step == 0:  # a new pass: on each edge its own permutation of the alive operations
            keys = torch.rand(self.alive.shape, generator=self.rng).masked_fill(~self.alive, 2)
            self.order = keys.argsort(1)[:, :self.num_alive]  # the pruned ones would come last
        return self.order[:, step].tolist()

    def record(self, sample, accuracy):
        """Take in the accuracy, in [0, 1], of the last sample; at the end of a round, prune."""
        check_accuracy(accuracy)
        edges, this_pass = torch.arange(len(sample)), self.epoch // self.num_alive
        self.accuracies[this_pass, edges, sample] = accuracy
        self.epoch += 1
        if self.epoch == self.passes * self.num_alive:  # the round is over
            percent = (100 * self.accuracies).masked_fill(~self.alive, -math.inf)  # (T, E, K)
            self.theta = percent.softmax(2).mean(0) + self.decay * self.theta
            weakest = self.theta.masked_fill(~self.alive, math.inf).argmin(1)      # (E,)
            self.alive[edges, weakest] = False  # pruned, for good
            self.num_alive -= 1
            self.epoch = 0

    # ==== shared: state ===========================================================================
    def state_dict(self):
        """Every attribute, the state of the random generator included; a checkpoint holds it.

        A subclass keeps its own attributes to tensors, numbers, strings, lists and dicts.
        """
        return {**vars(self), "rng": self.rng.get_state()}

    def load_state_dict(self, state):
        """Go on from a state_dict()."""
        self.rng.set_state(state["rng"])
        vars(self).update({**state, "rng": self.rng})

def check_accuracy(accuracy):
    if not 0 <= accuracy <= 1:  # NaN fails this, too
        raise ValueError(f"an accuracy lies between 0 and 1, not at {accuracy}")

# ==== shared: one epoch ===========================================================================
def train_epoch(network, optimizer, batches, sample):
    """One pass over the batches along the path of the sample (E,) -> mean loss."""
    weights = list(network.parameters())
    total_loss = torch.zeros((), device=batches.device)
    for images, labels in batches:
        with autocast(batches.device):
            logits = network(batches.normalise(images), sample)
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()  # to None: SGD leaves the weights off the path alone
        loss.backward()
        average_gradients(weights)
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        total_loss += loss.detach()  # not .item(): that would wait for the device
        batches.sign_of_life(total_loss)
    return finite_mean(total_loss, batches, weights)

@torch.no_grad()
def evaluate(network, batches, sample):
    """Top-1 accuracy of the path of the sample (E,), in [0, 1]."""
    num_correct = torch.zeros((), device=batches.device)
    for images, labels in batches:
        with autocast(batches.device):
            logits = network(batches.normalise(images), sample)
        num_correct += (logits.argmax(1) == labels).sum()
        batches.sign_of_life()
    return sum_over_ranks(num_correct).item() / batches.num_images

# ==== the search ==================================================================================
def search(args, distribution, method=METHOD):
    """Run the distribution to its end, a sample an epoch, and write the architecture to --out."""
    checkpoint = from_process_0(open_out, args)  # machines need not share the folder
    train_half, validation_half = split_training_images(args)
    torch.manual_seed(args.seed)  # of the weights; here, for reading a folder draws numbers, too
    network = build_supernet(args, num_classes=len(train_half.dataset.classes))
    optimizer = torch.optim.SGD(network.parameters(), args.lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, distribution.total_epochs, min(LR_MIN, args.lr))
    run = Run(args, method, train_half.dataset, checkpoint, network=network, optimizer=optimizer,
              schedule=schedule, distribution=distribution)

    for epoch in range(len(run.log), distribution.total_epochs):  # --resume: from the log's end
        start = time.perf_counter()
        num_alive = count_alive(distribution)
        sample = distribution.sample()
        train_half.set_epoch(epoch)
        loss = train_epoch(network, optimizer, train_half, sample)
        accuracy = evaluate(network, validation_half, sample)
        distribution.record(sample, accuracy)
        schedule.step()
        run.log.append({"epoch": epoch + 1, "alive": num_alive, "sample": sample, "loss": loss,
                        "accuracy": accuracy, "seconds": time.perf_counter() - start})
        run.save()
        print_epoch(run.log, distribution.total_epochs,
                    train_half.num_images + validation_half.num_images)
        if count_alive(distribution) < num_alive:  # a round has ended
            print_distribution(distribution.probabilities, args)

    rounds = {}  # number of alive operations -> the accuracies of that round
    for row in run.log:
        rounds.setdefault(row["alive"], []).append(row["accuracy"])
    means = [sum(accuracies) / len(accuracies) for accuracies in rounds.values()]
    accuracy = evaluate(network, validation_half, distribution.best())
    write_results(args, run, distribution, accuracy, "round", means)

def count_alive(distribution):
    """k, the largest number of operations that an edge can still choose from."""
    return (distribution.probabilities > 0).sum(1).max().item()

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

# ==== shared: supernets ===========================================================================
# BatchNorms keep no running statistics: a mean shared by many paths would describe none of them.
SupernetNorm = functools.partial(nn.BatchNorm2d, track_running_stats=False)

class SupernetCell(nn.Module):
    def __init__(self, c_prev_prev, c_prev, c, reduction, reduction_prev):
        super().__init__()
        norm = functools.partial(SupernetNorm, affine=False)
        self.reduction = reduction
        preprocess = FactorizedReduce if reduction_prev else relu_conv_bn
        self.preprocess0 = preprocess(c_prev_prev, c, norm)
        self.preprocess1 = relu_conv_bn(c_prev, c, norm)
        self.edges = nn.ModuleList()  # (14, 8)
        for node in range(NUM_NODES):
            for source in range(2 + node):
                stride = 2 if reduction and source < 2 else 1
                self.edges.append(nn.ModuleList(op(c, stride, norm) for op in OPS.values()))

    def forward(self, s0, s1, sample):
        """s0, s1: outputs of the last two cells, older first; sample (14,) -> (B, 4 C, H, W)."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edge = 0
        for _ in range(NUM_NODES):
            values = []
            for state in states:
                operation = self.edges[edge][sample[edge]]
                values.append(operation(state))
                edge += 1
            states.append(sum(values))
        return torch.cat(states[2:], 1)

class CellSupernet(nn.Module):
    """A stack of cells. sample (28,): 14 edges of the normal, 14 of the reduction cells."""
    def __init__(self, channels, num_cells, num_classes):
        super().__init__()
        c, c_prev, c_prev_prev = channels, 3 * channels, 3 * channels
        reduction_prev = False
        stem = nn.Conv2d(3, c_prev, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, SupernetNorm(c_prev))
        self.cells = nn.ModuleList()
        for i in range(num_cells):
            reduction = i in (num_cells // 3, 2 * num_cells // 3)
            c = 2 * c if reduction else c
            self.cells.append(SupernetCell(c_prev_prev, c_prev, c, reduction, reduction_prev))
            c_prev_prev, c_prev, reduction_prev = c_prev, NUM_NODES * c, reduction
        self.linear = nn.Linear(c_prev, num_classes)

    def forward(self, images, sample):
        """images (B, 3, S, S), S a multiple of 4; sample (28,) -> logits (B, num_classes)."""
        normal, reduce = sample[:NUM_EDGES], sample[NUM_EDGES:]
        s0 = s1 = self.stem(images)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, reduce if cell.reduction else normal)
        return self.linear(s1.mean((2, 3)))

class MobileSupernet(nn.Module):
    """A chain of MBConv blocks. sample (14 or 20,): the candidate of every block."""
    def __init__(self, backbone, num_classes):
        super().__init__()
        norm = functools.partial(SupernetNorm, eps=1e-3)  # and 40 channels, as the authors have
        blocks, head = BACKBONES[backbone]
        c_in = 40
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

def derive_cells(best, scores):
    """best: an operation for each of 28 edges, scores (28, 8) -> Genotype.

    A node keeps its 2 edges of the highest scores. Where the best operation is `none`, the other
    operation of the highest score, pruned or not, takes its place.
    """
    names, cells, edge = list(OPS), [], 0
    for _ in ("normal", "reduce"):
        pairs = []
        for num_sources in range(2, 2 + NUM_NODES):
            edges = []
            for source in range(num_sources):
                op = best[edge]
                if names[op] == "none":
                    op = 1 + scores[edge, 1:].argmax().item()
                edges.append((scores[edge, op].item(), source, names[op]))
                edge += 1
            strongest = sorted(edges)[-2:]
            strongest.sort(key=lambda item: item[1])  # by source
            pairs += [(name, source) for _, source, name in strongest]
        cells.append(pairs)
    normal, reduce = cells
    return Genotype(normal, range(2, 2 + NUM_NODES), reduce, range(2, 2 + NUM_NODES))

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

# ==== shared: the user ============================================================================
def split_training_images(args):
    """Split the training images by the seed -> batches to train a path on, batches to validate."""
    dataset = open_images(args, train=True)
    g = torch.Generator().manual_seed(args.seed)
    training, validation = torch.randperm(len(dataset.labels), generator=g).tensor_split(2)
    check_batch_size(args.batch_size, len(validation))
    # BatchNorm takes its statistics from the batch, so all validation batches have one size, at
    # least --batch-size and below twice as much. The few images that are left over are not used.
    num_batches = len(validation) // args.batch_size
    size = len(validation) // num_batches // WORLD_SIZE * WORLD_SIZE
    return (Batches(dataset, training, args.batch_size, True, args),
            Batches(dataset, validation[:num_batches * size], size, False, args))

def print_epoch(log, total_epochs, num_images):
    row = log[-1]
    mean = sum(row["seconds"] for row in log) / len(log)
    left = timedelta(seconds=round(mean * (total_epochs - len(log))))
    print0(f"epoch {len(log):3}/{total_epochs}  loss {row['loss']:.3f}  accuracy "
           f"{row['accuracy']:.2%}  {num_images / row['seconds']:.0f} images/s  {left} left")

SHORT = {"max_pool_3x3": "max3", "avg_pool_3x3": "avg3", "skip_connect": "skip",
         "sep_conv_3x3": "sep3", "sep_conv_5x5": "sep5", "dil_conv_3x3": "dil3",
         "dil_conv_5x5": "dil5"}

def print_distribution(probabilities, args):
    """A row per edge of probabilities (E, K), the darker the nearer to the row's best; x: 0."""
    columns = [SHORT.get(name, name[:5]) for name in OPS]
    rows = [f"{cell} {2 + node} <- {source}" for cell in ("normal", "reduce")
            for node in range(NUM_NODES) for source in range(2 + node)]
    if args.space == "mobile":
        columns = [f"{kernel}x{kernel},{expansion}" for kernel, expansion in CANDIDATES]
        rows = [f"block {i}" for i in range(len(probabilities))]
    shades = "░▒▓█" if "utf" in str(sys.stdout.encoding).lower() else ".:*#"
    print0(" " * 14 + "".join(f"{column:>6}" for column in columns))
    for row, values in zip(rows, probabilities.tolist()):
        cells = ["x" if p == 0 else 3 * shades[min(3, int(4 * p / max(values)))] for p in values]
        print0(f"{row:14}" + "".join(f"{cell:>6}" for cell in cells))

def to_markdown(found, unit, accuracies):
    """Mermaid graphs of the accuracy of each round or epoch, and of the cells that were found."""
    line = ", ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
    graphs = {"search": ["xychart-beta", f'x-axis "{unit}" 1 --> {len(accuracies)}',
                         'y-axis "accuracy of the sampled paths, %"', f"line [{line}]"]}
    if isinstance(found, Genotype):
        for title, pairs in (("normal", found.normal), ("reduce", found.reduce)):
            lines = ["graph LR", "0([input 0])", "1([input 1])"]
            lines += [f"{source} -->|{operation}| {2 + i // 2}"
                      for i, (operation, source) in enumerate(pairs)]
            graphs[title] = lines + [f"{node} --> output([output])" for node in found.normal_concat]
    return "\n".join(f"## {title}\n\n```mermaid\n" + "\n    ".join(lines) + "\n```\n"
                     for title, lines in graphs.items())

def write_results(args, run, distribution, accuracy, unit, accuracies):
    """Write and print the architecture; accuracy: of the best path in the supernet."""
    best = distribution.best()
    found = (derive_cells(best, distribution.scores) if args.space == "cell" else
             [CANDIDATES[choice] for choice in best])
    results = {"genotype": str(found), "validation_accuracy": accuracy, "settings": run.settings}
    path = args.out / "genotype.json"
    if RANK == 0:
        write_file(args.out / "cell.md", to_markdown(found, unit, accuracies).encode())
        write_file(path, (json.dumps(results, indent=1) + "\n").encode())
    command = f"python retrain.py --genotype {shlex.quote(str(path))}"
    if args.dataset != "synthetic":
        command += f" --data-dir {shlex.quote(str(args.data_dir))}"
    print0(f"{found}\nvalidation accuracy of the best path in the supernet: {accuracy:.2%}\n"
           f"train it from scratch with: {command}")
# ==== end =========================================================================================

# ==== shared: options of a search =================================================================
def parse_args(argv, options, method):
    table = "\n".join(f"  {name:12}" + ", ".join(f"{k} {v}" for k, v in values.items())
                      for name, values in DEFAULTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"defaults by --dataset:\n{table}")
    add = parser.add_argument
    for name, (default, text) in options.items():
        add(f"--{name.replace('_', '-')}", type=type(default), default=default,
            help=f"{text} (default: {default})")
    add("--dataset", choices=DEFAULTS, default="synthetic", help="default: synthetic")
    add("--space", choices=("cell", "mobile"), help="search space")
    add("--backbone", choices=BACKBONES, default="gpu",
        help="only with --space mobile (default: gpu)")
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
    given = {name: value for name, value in vars(parser.parse_args(argv)).items()
             if value is not None}
    args = argparse.Namespace(**{"seed": 0, **DEFAULTS[given["dataset"]], **given})
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

def main(argv=None, distribution_class=DynamicDistribution, options=OPTIONS, method=METHOD):
    """Search -> exit code.

    options: name -> (default, help) of what the constructor of distribution_class takes, besides
    num_edges, num_ops and seed. method: the name of the results' folder.
    """
    # ==== shared: main ============================================================================
    threads = torch.get_num_threads()
    try:
        args = parse_args(argv, options, method)
        start_processes(args)
        num_edges, num_ops = ((2 * NUM_EDGES, len(OPS)) if args.space == "cell" else
                              (len(BACKBONES[args.backbone][0]), len(CANDIDATES)))
        chosen = {name: getattr(args, name) for name in options}
        distribution = distribution_class(num_edges, num_ops, seed=args.seed, **chosen)
        search(args, distribution, method)
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
