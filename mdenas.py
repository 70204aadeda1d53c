"""Multinomial Distribution Learning for Effective Neural Architecture Search (arXiv:1905.07529).

    python mdenas.py                      # made-up images, about 2 minutes on 2 CPU cores
    python mdenas.py --dataset cifar10    # the paper's search on CIFAR-10
    python mdenas.py --dataset imagefolder --data-dir DIR    # your images, DIR/train/<class>/*
    torchrun --nproc_per_node=8 mdenas.py --dataset imagenet --data-dir DIR    # on 8 GPUs

An architecture says which of K operations stands on each edge, a place in the network. One epoch of
search samples an architecture, trains the shared weights along that single path on one half of the
training images, and measures the accuracy of the path on the other half. Then, on every edge, each
operation that was trained less and yet is better takes a little probability from the one that it
beats. In the end the most probable operation of each edge stays.

Blocks marked `shared` are the same, to the character, in ddp_nas.py, and some in retrain.py.
"""
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from Ctrl-C while torch is imported
import argparse, contextlib, fcntl, functools, io, json, math, os, re, shlex, sys, time, zipfile
from datetime import timedelta
from pathlib import Path

import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F, torchvision
from PIL import Image
from torchvision.transforms import v2

METHOD = "mdenas"
PAPER = dict(space="cell", channels=16, cells=6, image_size=32, batch_size=512, lr=0.025)
DEFAULTS = {  # by data set
    "synthetic": dict(space="cell", channels=8, cells=3, image_size=16, batch_size=32, lr=0.1),
    "cifar10": PAPER, "imagefolder": PAPER,
    "imagenet": {**PAPER, "space": "mobile", "image_size": 224},
}
LR_MIN = 0.0                          # learning rate at the end of the cosine
MOMENTUM, WEIGHT_DECAY = 0.9, 3e-4
CLIP = 5.0                            # the largest norm of a gradient

# ==== the distribution ============================================================================
class MultinomialDistribution:
    """E independent categorical distributions over K operations that learn from comparisons.

    probabilities (E, K): 1 / K at the start; rows sum to 1. epochs (E, K): in how many epochs each
    operation was sampled. accuracies (E, K): the last one measured with it, 0 before the first.
    """
    def __init__(self, num_edges, num_ops, epochs=100, alpha=0.01, seed=0):
        self.total_epochs, self.alpha = epochs, alpha  # alpha: the size of an update
        self.probabilities = torch.full((num_edges, num_ops), 1 / num_ops, dtype=torch.float64)
        self.epochs = torch.zeros(num_edges, num_ops, dtype=torch.int64)
        self.accuracies = torch.zeros(num_edges, num_ops, dtype=torch.float64)
        self.rng = torch.Generator().manual_seed(seed)

    def best(self):
        """The most probable operation of every edge, a list of E indices."""
        return self.probabilities.argmax(1).tolist()

    def sample(self):
        """The architecture of the next epoch: an operation for every edge, a list of E indices."""
        return torch.multinomial(self.probabilities, 1, generator=self.rng)[:, 0].tolist()

    def record(self, sample, accuracy):
        """Take in the accuracy, in [0, 1], of the last sample, and learn from it."""
        check_accuracy(accuracy)
        edges = torch.arange(len(sample))
        self.epochs[edges, sample] += 1
        self.accuracies[edges, sample] = accuracy
        # p[i] <- p[i] + alpha (#{j: dE[i,j] < 0, dA[i,j] > 0} - #{j: dE[i,j] > 0, dA[i,j] < 0})
        dE = self.epochs[:, :, None] - self.epochs[:, None, :]          # (E, K, K)
        dA = self.accuracies[:, :, None] - self.accuracies[:, None, :]  # (E, K, K)
        wins = (dE < 0) & (dA > 0)  # [e, i, j]: i was trained less and yet is better than j
        losses = wins.double().sum(1)  # (E, K), of every j
        # All at once; an operation that would fall below 0 gives what it has, in equal shares.
        given = torch.minimum(self.alpha * losses, self.probabilities)   # (E, K)
        share = given / losses.clamp(min=1)
        self.probabilities = self.probabilities - given + (wins * share[:, None, :]).sum(2)

    # ==== shared: state ===========================================================================
    def state_dict(self):
        """Everything the distribution holds, its random generator included."""
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
    total, weights = torch.zeros((), device=batches.device), []
    for images, labels in batches:
        with autocast(batches.device):
            loss = F.cross_entropy(network(batches.normalise(images), sample), labels)
        optimizer.zero_grad()
        loss.backward()
        if not weights:  # those off the path have no gradient: SGD leaves them as they are
            weights = [weight for weight in network.parameters() if weight.grad is not None]
        average_over_ranks([weight.grad for weight in weights])
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        total += loss.detach()  # not .item(): that would wait for the device
    return finite_mean(total, batches, weights)

@torch.no_grad()
def evaluate(network, batches, sample):
    """Top-1 accuracy of the path of the sample (E,), in [0, 1]."""
    correct = torch.zeros((), device=batches.device)
    for images, labels in batches:
        with autocast(batches.device):
            logits = network(batches.normalise(images), sample)
        correct += (logits.argmax(1) == labels).sum()
    average_over_ranks([correct])
    return correct.item() * WORLD_SIZE / batches.count  # mean over ranks x ranks: the sum

# ==== the search ==================================================================================
def search(args, distribution):
    """Run the distribution to its end, a sample an epoch, and write the architecture to --out."""
    train_half, validation_half = open_halves(args)
    torch.manual_seed(args.seed)
    num_classes = len(train_half.images.classes)
    network = (CellSupernet(args.channels, args.cells, num_classes) if args.space == "cell" else
               MobileSupernet(args.backbone, num_classes))
    network.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), args.lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, distribution.total_epochs, min(LR_MIN, args.lr))
    run = Run(args, train_half.images, network=network, optimizer=optimizer, schedule=schedule,
              distribution=distribution)

    for epoch in range(len(run.log), distribution.total_epochs):  # --resume: from the log's end
        start = time.perf_counter()
        sample = distribution.sample()
        train_half.epoch = epoch  # the seed of shuffle and augmentation
        loss = train_epoch(network, optimizer, train_half, sample)
        accuracy = evaluate(network, validation_half, sample)
        distribution.record(sample, accuracy)
        schedule.step()
        run.log.append({"epoch": epoch + 1, "sample": sample,
                        "loss": loss, "accuracy": accuracy, "seconds": time.perf_counter() - start})
        run.save()
        print_epoch(run.log, distribution.total_epochs, train_half.count + validation_half.count)
        if (epoch + 1) % 10 == 0:
            show(distribution.probabilities, args)

    accuracy = evaluate(network, validation_half, distribution.best())
    finish(args, run, distribution.best(), distribution.probabilities, accuracy,
           "epoch", [row["accuracy"] for row in run.log])

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

# ==== shared: supernets ===========================================================================
# BatchNorms keep no running statistics: a mean shared by many paths would describe none of them.
SupernetNorm = functools.partial(nn.BatchNorm2d, track_running_stats=False)

class SupernetCell(nn.Module):
    def __init__(self, c_prev_prev, c_prev, c, reduction, reduction_prev):
        super().__init__()
        norm = functools.partial(SupernetNorm, affine=False)
        self.reduction = reduction
        older = FactorizedReduce if reduction_prev else relu_conv_bn
        self.preprocess0 = older(c_prev_prev, c, norm)
        self.preprocess1 = relu_conv_bn(c_prev, c, norm)
        self.edges = nn.ModuleList()  # (14, 8)
        for node in range(NUM_NODES):
            for source in range(2 + node):
                stride = 2 if reduction and source < 2 else 1
                self.edges.append(nn.ModuleList(OPS[name](c, stride, norm) for name in PRIMITIVES))

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
            states.append(functools.reduce(torch.add, values))
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
        norm = functools.partial(SupernetNorm, eps=1e-3)
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

def derive_cells(best, strength):
    """best: an operation for each of 28 edges, strength (28, 8) -> {"normal": ..., "reduce": ...}.

    A cell is a list of 4 nodes; a node keeps its 2 strongest edges, each as [operation, source].
    Where the best operation is `none`, the strongest other one, pruned or not, takes its place.
    """
    cells, edge = {"normal": [], "reduce": []}, 0
    for nodes in cells.values():
        for num_sources in range(2, 2 + NUM_NODES):
            edges = []
            for source in range(num_sources):
                op = best[edge]
                if PRIMITIVES[op] == "none":
                    op = 1 + strength[edge, 1:].argmax().item()
                edges.append((strength[edge, op].item(), source, PRIMITIVES[op]))
                edge += 1
            strongest = sorted(edges)[-2:]
            strongest.sort(key=lambda item: item[1])  # by source
            nodes.append([[name, source] for _, source, name in strongest])
    return cells

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

# ==== shared: the user ============================================================================
def open_halves(args):
    """Split the training images by the seed -> batches that train, batches that validate a path."""
    images = open_images(args, train=True)
    g = torch.Generator().manual_seed(args.seed)
    train, validation = torch.randperm(len(images.labels), generator=g).tensor_split(2)
    check_batch_size(args.batch_size, len(validation))
    # BatchNorm takes its statistics from the batch, so all the validation batches have one size.
    num_batches = math.ceil(len(validation) / args.batch_size)
    size = max(2, len(validation) // num_batches // WORLD_SIZE) * WORLD_SIZE
    validation = validation[:len(validation) // size * size]
    return (Batches(images, train, args.batch_size, True, args),
            Batches(images, validation, size, False, args))

def print_epoch(log, total_epochs, num_images):
    row, mean = log[-1], sum(row["seconds"] for row in log) / len(log)
    left = timedelta(seconds=round(mean * (total_epochs - len(log))))
    print0(f"epoch {len(log):3}/{total_epochs}  loss {row['loss']:.3f}  accuracy "
           f"{row['accuracy']:.2%}  {num_images / row['seconds']:.0f} images/s  {left} left")

def show(probabilities, args):
    """Print the distribution (E, K): the darker the more probable, x where 0."""
    columns = [re.sub(r"_[a-z]+|_|x\d", "", name) for name in PRIMITIVES]  # max_pool_3x3: max3
    rows = [f"{cell} {2 + node} <- {source}" for cell in ("normal", "reduce")
            for node in range(NUM_NODES) for source in range(2 + node)]
    if args.space == "mobile":
        columns = [f"{kernel}x{kernel},{expansion}" for kernel, expansion in CANDIDATES]
        rows = [f"block {i}" for i in range(len(probabilities))]
    ramp = "░▒▓█" if "utf" in str(getattr(sys.stdout, "encoding", "")).lower() else ".:*#"
    print0(" " * 14 + "".join(f"{column:>6}" for column in columns))
    for row, values in zip(rows, probabilities.tolist()):
        shades = [3 * ramp[min(3, int(4 * p / max(values)))] if p > 0 else "x" for p in values]
        print0(f"{row:14}" + "".join(f"{shade:>6}" for shade in shades))

def draw(found, unit, accuracies):
    """Markdown with Mermaid graphs: the accuracy of each round or epoch, and the cells."""
    line = ", ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
    graphs = {"search": ["xychart-beta", f'x-axis "{unit}" 1 --> {len(accuracies)}',
                         'y-axis "accuracy of the sampled paths, %"', f"line [{line}]"]}
    for cell in ("normal", "reduce") if "normal" in found else ():
        graphs[cell] = ["graph LR", "0([input 0])", "1([input 1])"]
        for node, edges in enumerate(found[cell], 2):
            graphs[cell] += [f"{source} -->|{operation}| {node}" for operation, source in edges]
            graphs[cell] += [f"{node} --> output([output])"]
    return "\n".join(f"## {title}\n\n```mermaid\n" + "\n    ".join(lines) + "\n```\n"
                     for title, lines in graphs.items())

def finish(args, run, best, strength, accuracy, unit, accuracies):
    """Write and print the architecture; accuracy: of the best path in the supernet."""
    found = (derive_cells(best, strength) if args.space == "cell" else
             {"backbone": args.backbone, "blocks": [CANDIDATES[choice] for choice in best]})
    genotype = {"method": METHOD, "space": args.space, **found, "settings": run.settings,
                "validation_accuracy": accuracy}
    path = args.out / "genotype.json"
    write_file(args.out / "cell.md", draw(found, unit, accuracies).encode())
    write_file(path, (json.dumps(genotype) + "\n").encode())
    for name, part in found.items():
        print0("\n    ".join(map(str, [name, *part])) if isinstance(part, list) else part)
    command = f"python retrain.py --genotype {shlex.quote(str(path))}"
    if args.dataset != "synthetic":
        command += f" --data-dir {shlex.quote(str(args.data_dir))}"
    print0(f"accuracy in the supernet {accuracy:.2%}; to train it alone: {command}")
# ==== end =========================================================================================

MAY_DIFFER = ["data_dir", "device", "workers", "out", "resume"]  # between a run and its --resume

def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=number(int, 1, 10**5), default=100, help="of the search")
    add("--alpha", type=number(float, 1e-6, 1), default=0.01, help="size of an update")
    add("--dataset", choices=DEFAULTS, default="synthetic", help="made-up images, or real ones")
    add("--space", choices=("cell", "mobile"), help="search space")
    add("--backbone", choices=BACKBONES, default="gpu", help="of the mobile space")
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
    parser.set_defaults(**DEFAULTS[parser.parse_known_args(argv)[0].dataset])
    args = parser.parse_args(argv)
    # ==== shared: checks ==========================================================================
    if args.device == "cuda" and torch.cuda.device_count() <= LOCAL_RANK:
        parser.error(f"--device cuda: torch finds {torch.cuda.device_count()} CUDA devices here")
    if args.dataset == "cifar10" and args.image_size != 32:
        parser.error("--image-size: CIFAR-10 has 32 pixels; other sizes with --dataset imagefolder")
    if args.space == "cell" and args.image_size % 4:
        parser.error(f"--image-size {args.image_size} must be a multiple of 4, for two reductions")
    # ==== end =====================================================================================
    return args

def main(argv=None, distribution_class=MultinomialDistribution):
    """Search -> exit code; a fault of the input is one line on stderr, and code 2."""
    signal.signal(signal.SIGINT, interrupt)
    try:
        args = parse_args(argv)
        num_edges, num_ops = ((2 * NUM_EDGES, len(PRIMITIVES)) if args.space == "cell" else
                              (len(BACKBONES[args.backbone][0]), len(CANDIDATES)))
        start_ranks(args)
        with open_out(args):
            search(args, distribution_class(num_edges, num_ops, args.epochs, args.alpha, args.seed))
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
