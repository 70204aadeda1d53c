"""MdeNAS: Multinomial Distribution Learning for Effective Neural Architecture Search (arXiv:1905.07529).

    python mdenas.py                                       # made-up pictures, under 2 minutes on 2 CPU cores
    python mdenas.py --dataset cifar10                     # the paper's search on CIFAR-10
    python mdenas.py --dataset imagefolder --data-dir DIR  # your own pictures, DIR/train/<class>/*
    torchrun --nproc_per_node=8 mdenas.py --dataset imagenet --data-dir DIR  # the MobileNet space, 8 GPUs

One epoch of search samples one operation for every edge, trains the shared weights along that single path on one
half of the training pictures, and measures the accuracy of the path on the other half. Then, on every edge,
each operation that was trained less and yet is better takes a little probability from the one that it beats.
In the end the most probable operation of each edge is the architecture.
"""
import argparse, functools, io, json, math, os, sys, time, zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F, torchvision
from torchvision.transforms import v2

METHOD = "mdenas"
DEFAULTS = {  # per data set, what the command line leaves open; cifar10 has the settings of the paper
    "synthetic": dict(space="cell", channels=8, cells=3, image_size=16, batch_size=64, lr=0.1),
    "cifar10": dict(space="cell", channels=16, cells=6, image_size=32, batch_size=512, lr=0.025),
    "imagefolder": dict(space="cell", channels=16, cells=6, image_size=32, batch_size=512, lr=0.025),
    "imagenet": dict(space="mobile", channels=16, cells=6, image_size=224, batch_size=512, lr=0.025),
}
LR_MIN = 0.0    # where the cosine ends
MOMENTUM, WEIGHT_DECAY = 0.9, 3e-4
CLIP = 5.0      # the largest norm of a step's gradient

# ==== the distribution ======================================================================================
class MultinomialDistribution:
    """E independent categorical distributions over K operations that learn by comparing operations.

    probabilities (E, K): 1 / K at the start; rows sum to 1.
    epochs_seen (E, K) int: in how many epochs each operation was sampled.
    accuracies (E, K): the last accuracy measured with it, 0 before the first.
    """
    def __init__(self, num_edges, num_ops, epochs=100, alpha=0.01, seed=0):
        if not 0 < alpha < 1:
            raise ValueError(f"alpha lies between 0 and 1, not at {alpha}")
        self.epochs, self.alpha = epochs, alpha                   # alpha: what a comparison won is worth
        self.probabilities = np.full((num_edges, num_ops), 1 / num_ops)
        self.epochs_seen = np.zeros((num_edges, num_ops), int)
        self.accuracies = np.zeros((num_edges, num_ops))
        self.epoch = 0
        self.pending = None                                       # (E,), handed out and not yet recorded
        self.rng = np.random.default_rng(seed)

    @property
    def total_epochs(self):
        return self.epochs

    @property
    def finished(self):
        return self.epoch == self.epochs

    def best(self):
        """(E,): the most probable operation of every edge."""
        return self.probabilities.argmax(1)

    def sample(self):
        """Hand out an architecture (E,), the same one until it is recorded. ValueError once finished."""
        if self.finished:
            raise ValueError("the search is finished: there is nothing left to sample")
        if self.pending is None:
            cumulative = self.probabilities.cumsum(1)
            cumulative /= cumulative[:, -1:]  # exactly 1 at the end, whatever the rounding
            draw = self.rng.random((len(cumulative), 1))
            self.pending = (cumulative <= draw).sum(1)
        return self.pending.copy()

    def record(self, sample, accuracy):
        """Take in the accuracy, in [0, 1], of the sample just handed out, or raise ValueError; learn from it."""
        self.check(sample, accuracy)
        edges = np.arange(len(sample))
        self.epochs_seen[edges, sample] += 1
        self.accuracies[edges, sample] = accuracy
        self.pending, self.epoch = None, self.epoch + 1
        # p[i] <- p[i] + alpha (#{j: dE[i,j] < 0 and dA[i,j] > 0} - #{j: dE[i,j] > 0 and dA[i,j] < 0})
        dE = self.epochs_seen[:, :, None] - self.epochs_seen[:, None, :]  # (E, K, K)
        dA = self.accuracies[:, :, None] - self.accuracies[:, None, :]    # (E, K, K)
        wins = (dE < 0) & (dA > 0)  # [e, i, j]: i was trained less and yet is better, so j owes it alpha
        creditors = wins.sum(1)     # (E, K), of every j
        # All pay at once. Who owes more than it has pays each an equal share of that, so no p falls below 0.
        paid = np.minimum(self.alpha * creditors, self.probabilities)
        share = paid / np.maximum(creditors, 1)
        self.probabilities = self.probabilities - paid + (wins * share[:, None, :]).sum(2)

    # ==== shared: checks and state ==========================================================================
    def check(self, sample, accuracy):
        if self.pending is None or not np.array_equal(sample, self.pending):
            raise ValueError("record() takes the sample that sample() has just handed out, and takes it once")
        if not 0 <= accuracy <= 1:  # not-a-number fails this, too
            raise ValueError(f"an accuracy lies between 0 and 1, not at {accuracy}")

    def state_dict(self):
        """Everything the distribution holds, its random generator included, as plain Python values."""
        state = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        return {**state, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        """Go on from a state_dict(). Raises ValueError for one of another method or size."""
        if state.keys() != vars(self).keys() or np.shape(state["accuracies"]) != self.accuracies.shape:
            raise ValueError("this is the state of another method, or of other edges, operations or passes")
        self.rng.bit_generator.state = state["rng"]
        arrays = {name: np.array(value) if isinstance(value, list) else value for name, value in state.items()}
        vars(self).update(arrays, rng=self.rng)
    # ==== end ===============================================================================================

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

# ==== shared: supernets =====================================================================================
# The BatchNorms keep no running statistics: a running mean shared by many paths would describe none of them.
SupernetNorm = functools.partial(nn.BatchNorm2d, track_running_stats=False)

class SupernetCell(nn.Module):
    def __init__(self, c_prev_prev, c_prev, c, reduction, reduction_prev):
        super().__init__()
        norm = functools.partial(SupernetNorm, affine=False)
        self.reduction = reduction
        self.preprocess0 = (FactorizedReduce if reduction_prev else relu_conv_bn)(c_prev_prev, c, norm)
        self.preprocess1 = relu_conv_bn(c_prev, c, norm)
        self.edges = nn.ModuleList(  # (14, 8)
            nn.ModuleList(OPS[name](c, 2 if reduction and source < 2 else 1, norm) for name in PRIMITIVES)
            for node in range(NUM_NODES) for source in range(2 + node))

    def forward(self, s0, s1, sample):
        """s0, s1: outputs of the last cell but one and of the last cell; sample (14,) -> (B, 4 C, H, W)."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        path = iter([ops[choice] for ops, choice in zip(self.edges, sample)])
        for _ in range(NUM_NODES):
            values = [next(path)(state) for state in states]
            states.append(sum(values[1:], values[0]))
        return torch.cat(states[2:], 1)

class CellSupernet(nn.Module):
    """Search space 1: a stack of cells. A sample (28,) is the edges of the normal cell, then of the reduction cell."""
    def __init__(self, channels, num_cells, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * channels, 3, padding=1, bias=False), SupernetNorm(3 * channels))
        self.cells = nn.ModuleList()
        c_prev_prev, c_prev, c, reduction_prev = 3 * channels, 3 * channels, channels, False
        for i in range(num_cells):
            reduction = i in (num_cells // 3, 2 * num_cells // 3)
            c = 2 * c if reduction else c
            self.cells.append(SupernetCell(c_prev_prev, c_prev, c, reduction, reduction_prev))
            c_prev_prev, c_prev, reduction_prev = c_prev, NUM_NODES * c, reduction
        self.linear = nn.Linear(c_prev, num_classes)

    def forward(self, images, sample):
        """images (B, 3, S, S) with S a multiple of 4, sample (28,) -> logits (B, num_classes)."""
        s0 = s1 = self.stem(images)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, sample[NUM_EDGES:] if cell.reduction else sample[:NUM_EDGES])
        return self.linear(s1.mean((2, 3)))

class MobileSupernet(nn.Module):
    """Search space 2: a chain of MBConv blocks. A sample is the candidate of every block."""
    def __init__(self, backbone, num_classes):
        super().__init__()
        norm = functools.partial(SupernetNorm, eps=1e-3)
        blocks, head = BACKBONES[backbone]
        channels = [40] + [c for c, _ in blocks]
        self.first_conv = conv_bn_relu6(3, 40, 3, 2, norm_layer=norm)
        self.blocks = nn.ModuleList(  # (14 or 20, 9)
            nn.ModuleList(MBConv(c_in, c_out, stride, *candidate, norm) for candidate in CANDIDATES)
            for c_in, (c_out, stride) in zip(channels, blocks))
        self.head = nn.Sequential(conv_bn_relu6(channels[-1], head, 1, norm_layer=norm), nn.AdaptiveAvgPool2d(1),
                                  nn.Flatten(), nn.Linear(head, num_classes))

    def forward(self, images, sample):
        """images (B, 3, S, S), sample (number of blocks,) -> logits (B, num_classes)."""
        x = self.first_conv(images)
        for candidates, choice in zip(self.blocks, sample):
            x = candidates[choice](x)
        return self.head(x)

def derive_cells(strength):
    """strength (28, 8) of every operation on every edge -> {"normal": 4 nodes, "reduce": 4 nodes}.

    A node keeps its 2 strongest edges, and an edge its strongest operation other than `none`, as [operation, source].
    """
    cells = {"normal": [], "reduce": []}
    for nodes, rows in zip(cells.values(), strength.reshape(2, NUM_EDGES, len(PRIMITIVES))):
        for edges in np.split(rows[:, 1:], [2, 5, 9]):  # (2 + i, 7), those of node i without `none`
            strongest = sorted(edges.max(1).argsort(kind="stable")[-2:].tolist())
            nodes.append([[PRIMITIVES[1 + edges[source].argmax()], source] for source in strongest])
    return cells
# ==== end ===================================================================================================

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

# ==== shared: one epoch, and what the user sees =============================================================
def train_epoch(network, optimizer, batches, sample, title):
    """One pass over the batches along the path of the sample -> mean loss. Raises ValueError if it is not finite."""
    total = 0
    for i, (images, labels) in enumerate(batches):
        progress(f"{title}  training, batch {i + 1} of {len(batches)}")
        with torch.autocast(batches.device, torch.bfloat16, enabled=batches.device == "cuda"):
            loss = F.cross_entropy(network(batches.normalise(images), sample), labels)
        step(network, optimizer, loss, CLIP)
        total = total + loss.detach()  # stays on the device: reading it would wait for the step
    mean = sum_over_ranks(total).item() / len(batches) / WORLD_SIZE
    norm = nn.utils.get_total_norm([weight for weight in network.parameters() if weight.grad is not None])
    if not math.isfinite(mean + norm.item()):  # no loss has seen the last step's weights
        raise ValueError(f"{title}: loss or weights are not finite (loss {mean}) along the path {sample.tolist()}: "
                         "start again with a smaller --lr; the last checkpoint is that of the epoch before")
    return mean

@torch.no_grad()
def evaluate(network, batches, sample, title):
    """Top-1 accuracy of the path, in [0, 1], the same on every rank."""
    correct = torch.zeros((), device=batches.device)
    for i, (images, labels) in enumerate(batches):
        progress(f"{title}  judging, batch {i + 1} of {len(batches)}")
        with torch.autocast(batches.device, torch.bfloat16, enabled=batches.device == "cuda"):
            correct += (network(batches.normalise(images), sample).argmax(1) == labels).sum()
    return sum_over_ranks(correct).item() / len(batches.index)

def split_halves(pictures, labels, args):
    """Split the training pictures by the seed -> batches that train the weights, batches that judge a path."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))
    train, judge = order.tensor_split(2)
    if len(judge) < args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} is more than half of the {len(labels)} training pictures")
    # Judged by the BatchNorm statistics of a batch, a path needs batches of one size: of --batch-size or just under.
    count = math.ceil(len(judge) / args.batch_size)
    size = max(1, len(judge) // count // WORLD_SIZE) * WORLD_SIZE
    return (Batches(pictures, labels, train, args.batch_size, True, args),
            Batches(pictures, labels, judge[:len(judge) // size * size], size, False, args))

def show(probabilities, args):
    """Print the distribution (E, K): edges down, operations across, the darker the more probable, x where 0."""
    if args.space == "cell":
        columns = ["none", "max3", "avg3", "skip", "sep3", "sep5", "dil3", "dil5"]
        rows = [f"{cell} {2 + node} <- {source}" for cell in ("normal", "reduce")
                for node in range(NUM_NODES) for source in range(2 + node)]
    else:
        columns = [f"{kernel}x{kernel},{expansion}" for kernel, expansion in CANDIDATES]
        rows = [f"block {i}" for i in range(len(probabilities))]
    ramp = "░▒▓█" if (sys.stdout.encoding or "utf-8").lower().startswith("utf") else ".:*#"
    say(" " * 14 + "".join(f"{column:>6}" for column in columns))
    for row, values in zip(rows, probabilities):
        shades = ["x" if p == 0 else 3 * ramp[min(3, int(4 * p / max(values)))] for p in values]
        say(f"{row:14}" + "".join(f"{shade:>6}" for shade in shades))

def draw(genotype):
    """The architecture as Markdown with Mermaid graphs."""
    graphs = {}
    if genotype["space"] == "mobile":
        names = ["image", "3x3 conv", *(f"{k}x{k}, expansion {e}" for k, e in genotype["blocks"]), "1x1 conv", "linear"]
        graphs["blocks"] = " --> ".join(f'{i}["{name}"]' for i, name in enumerate(names))
    else:
        for cell in ("normal", "reduce"):
            edges = [f"{source} -->|{name}| {2 + i}" for i, node in enumerate(genotype[cell]) for name, source in node]
            ends = [f"{2 + i} --> output([output])" for i in range(NUM_NODES)]
            graphs[cell] = "\n    ".join(["0([input 0])", "1([input 1])", *edges, *ends])
    text = [f"## {title}\n\n```mermaid\ngraph LR\n    {graph}\n```\n" for title, graph in graphs.items()]
    return "\n".join([f"# {genotype['method']}\n", *text])
# ==== end ===================================================================================================

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=100, help="of the search")
    add("--alpha", type=float, default=0.01, help="probability that an operation wins from another")
    add("--dataset", choices=DEFAULTS, default="synthetic", help="made-up pictures, or real ones")
    add("--space", choices=("cell", "mobile"), help="search space")
    add("--backbone", choices=BACKBONES, default="gpu", help="of the mobile space")
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
    args = parser.parse_args(argv)
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
    return args

# ==== the search ============================================================================================
def search(args):
    num_edges, num_ops = ((2 * NUM_EDGES, len(PRIMITIVES)) if args.space == "cell" else
                          (len(BACKBONES[args.backbone][0]), len(CANDIDATES)))
    distribution = MultinomialDistribution(num_edges, num_ops, args.epochs, args.alpha, seed=args.seed)
    # ==== shared: set up ====================================================================================
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, result = args.out / "checkpoint.pt", args.out / "genotype.json"
    if result.exists() or checkpoint.exists() and not args.resume:
        raise ValueError(f"{args.out} holds a search that is " + ("finished: name another --out" if result.exists() else
                         "not finished: go on with --resume, or name another --out"))
    start_ranks(args.device)
    pictures, labels, classes = open_pictures(args, train=True)
    train_half, judge_half = split_halves(pictures, labels, args)
    torch.manual_seed(args.seed)
    network = (CellSupernet(args.channels, args.cells, len(classes)) if args.space == "cell" else
               MobileSupernet(args.backbone, len(classes))).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), args.lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, distribution.total_epochs, LR_MIN)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "distribution": distribution}
    may_change = ("data_dir", "device", "workers", "out", "resume")
    settings = {k: v for k, v in vars(args).items() if k not in may_change} | {"pictures": len(labels)}
    log = load_checkpoint(checkpoint, settings, parts, args.device) if checkpoint.exists() else []
    save_checkpoint(checkpoint, settings, parts, log)  # a folder that cannot be written ends the run here
    say(*(f"{name} {value}" for name, value in settings.items()), sep=", ")
    say(f"{len(log)} epochs done, {distribution.total_epochs - len(log)} ahead on {args.device}; results in {args.out}")
    pictures_an_epoch = len(train_half) * args.batch_size + len(judge_half.index)
    # ==== end ===============================================================================================

    while not distribution.finished:
        title = f"epoch {len(log) + 1:3}/{distribution.total_epochs}"
        sample = distribution.sample()
        train_half.epoch = len(log)
        loss = train_epoch(network, optimizer, train_half, sample, title)
        accuracy = evaluate(network, judge_half, sample, title)
        distribution.record(sample, accuracy)
        schedule.step()
        log.append({"epoch": len(log) + 1, "sample": sample.tolist(), "loss": loss,
                    "accuracy": accuracy, "seconds": train_half.seconds + judge_half.seconds})
        save_checkpoint(checkpoint, settings, parts, log)
        ahead = (distribution.total_epochs - len(log)) * sum(row["seconds"] for row in log) / len(log)
        say(f"{title}  loss {loss:.3f}  accuracy {accuracy:.2%}  {pictures_an_epoch / log[-1]['seconds']:.0f} "
            f"pictures/s  {timedelta(seconds=round(ahead))} left")
        if len(log) % 10 == 0 or distribution.finished:
            show(distribution.probabilities, args)

    found = (derive_cells(distribution.probabilities) if args.space == "cell" else
             {"backbone": args.backbone, "blocks": [CANDIDATES[choice] for choice in distribution.best()]})
    # ==== shared: finish ====================================================================================
    accuracy = evaluate(network, judge_half, distribution.best(), "the most probable path")
    genotype = {"method": METHOD, "space": args.space, **found, "settings": settings, "validation_accuracy": accuracy}
    if RANK == 0:
        write_file(args.out / "cell.md", draw(genotype))
        write_file(result, json.dumps(genotype) + "\n")
    progress("")
    for name, part in found.items():
        say(name, *(part if isinstance(part, list) else [part]), sep="\n    ")
    say(f"accuracy in the supernet {accuracy:.2%}; to train it alone: python retrain.py --genotype {result}"
        + (f" --data-dir {args.data_dir}" if args.dataset != "synthetic" else ""))
    if WORLD_SIZE > 1:
        dist.destroy_process_group()

def main(argv=None):
    """Search, and return the exit code; what a user can mend becomes one line on stderr."""
    try:
        search(parse_args(argv))
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume goes on from the last whole epoch", file=sys.stderr)
        return 130
    except (OSError, ValueError, torch.OutOfMemoryError) as error:  # the last line: above it may stand a traceback
        print(f"{METHOD}.py: error: {str(error).splitlines()[-1]}", file=sys.stderr)
        return 2
    # ==== end ===============================================================================================

if __name__ == "__main__":
    sys.exit(main())
