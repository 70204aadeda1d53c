"""Tests, on made-up data: against loops, brute force and known counts, never the scripts' output.

    python -m pytest -q test_nas.py                    # everything
    python -m pytest -q test_nas.py -k distribution    # `sample` and `record`, in 5 seconds
    python -m pytest -q test_nas.py -k "not run"       # all but whole searches and trainings

What the scripts share is the same to the character, so it is tested in one of them.
"""
import ast, contextlib, copy, errno, functools, io, itertools, json, math, multiprocessing
import os, pickle, re, shutil, signal, socket, subprocess, sys, threading, time
import types, urllib.request, zlib
from argparse import Namespace
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
import torch, torch.nn as nn, torch.nn.functional as F
from PIL import Image
from torch.utils.data import TensorDataset

import ddp_nas, mdenas, retrain

HERE, SCRIPTS = Path(__file__).parent, [ddp_nas, mdenas, retrain]
LENGTH = {ddp_nas: ["--passes", 1], mdenas: ["--epochs", 12],
          retrain: ["--genotype", "random:0", "--epochs", 6]}
EPOCHS = {ddp_nas: 35, mdenas: 12, retrain: 6}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PYTHONUTF8": "1"}
torch.set_num_threads(1)  # as in the processes started below: sums of floats depend on it

def of_each(scripts):
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.METHOD)

each_script, each_search = of_each(SCRIPTS), of_each(SCRIPTS[:2])

# ==== helpers =====================================================================================
def write_images(folder, classes=("cats", "dogs"), count=18, size=8):
    """Fill folder/<class>/*.png with noise, brighter in the later classes."""
    noise = np.random.default_rng(0)
    for (i, name), j in itertools.product(enumerate(classes), range(count)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(30 * i, 30 * i + 100, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{j:02}.png")

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made-up images")
    write_images(folder / "train")
    write_images(folder / "val", count=7)
    return folder

@pytest.fixture(scope="module")
def large_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    write_images(folder / "train", count=6, size=90)
    write_images(folder / "val", count=3, size=90)
    return folder

def tiny(script, images, out, *more):
    """The command line of a run that takes a second or two; what comes later in it wins."""
    return [*LENGTH[script], "--device", "cpu", "--dataset", "imagefolder", "--data-dir", images,
            "--out", out, "--image-size", 8, "--channels", 2, "--cells", 3, "--batch-size", 8,
            "--lr", 0.1, "--workers", 0, *more]

def tiny_chain(script, images, out, *more):
    """The same in the MobileNet space, where no cells are."""
    argv = tiny(script, images, out)
    for name in ("--channels", "--cells"):
        at = argv.index(name)
        del argv[at:at + 2]
    return [*argv, "--space", "mobile", "--backbone", "cpu", *more]

def run(script, argv):
    """main() in this process -> exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = script.main([str(arg) for arg in argv])
        except SystemExit as stop:  # argparse
            code = stop.code
    return code, out.getvalue(), err.getvalue()

def parse(script, argv):
    more = () if script is retrain else (script.OPTIONS, script.METHOD)
    return script.parse_args([str(arg) for arg in argv], *more)

def files(folder):
    """All files but those that are still to be renamed."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".tmp"}

def assert_refused(script, argv, folder, *words):
    """Exit code 2, one line of stderr (below argparse's usage) has these words, no file touched."""
    before = files(folder)
    code, _, err = run(script, argv)
    *usage, line = err.splitlines()
    assert code == 2, err
    assert files(folder) == before
    assert not usage or usage[0].startswith("usage:"), err
    assert all(text.startswith(" ") for text in usage[1:]), err
    assert "error: " in line, err
    for word in words:
        assert str(word) in line, err

load = functools.partial(torch.load, weights_only=True)

def read_genotype(out):
    """The genotype that a search found, read by Python itself: Genotype or a list of blocks."""
    text = json.loads((out / "genotype.json").read_text())["genotype"]
    return eval(text, {"Genotype": ddp_nas.Genotype, "range": range, "__builtins__": {}})

def nodes_of(cell):
    """8 pairs -> 4 nodes of 2 pairs."""
    return [cell[i:i + 2] for i in range(0, 8, 2)]

def read_log(out):
    """log.jsonl without the times; nothing where it is not there yet."""
    path = out / "log.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

def same(a, b):
    if isinstance(a, (dict, list, tuple)):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(same(a[key], b[key]) for key in keys)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def assert_same_run(a, b):
    """Every file of two runs, the times aside."""
    assert files(a).keys() == {a / path.name for path in files(b)}
    assert read_log(a) == read_log(b)
    for path in a.glob("*.pt"):
        one, other = load(path), load(b / path.name)
        assert len(one.pop("log")) == len(other.pop("log"))
        assert same(one, other), path
    for path in [*a.glob("*.json"), *a.glob("*.md")]:
        assert path.read_text() == (b / path.name).read_text()

def as_expected(counts, expected):
    """Is each count within 5 standard deviations of what a fair draw gives?"""
    counts, expected = np.asarray(counts), np.asarray(expected)
    return (abs(counts - expected) < 5 * np.sqrt(expected)).all()

def drive(distribution, measure, epochs=None):
    """So many epochs, or all, of accuracy = measure(sample, epoch) -> [(sample, accuracy), ...]."""
    history = []
    for epoch in range(1, 1 + (epochs or distribution.total_epochs)):
        sample = distribution.sample()
        history.append((sample, measure(sample, epoch)))
        distribution.record(*history[-1])
    return history

def fail(error):
    raise error

def failing(number, function, error):
    """The function, but its call of this number raises the error."""
    calls = itertools.count(1)
    def called(*args, **more):
        if next(calls) == number:
            raise error
        return function(*args, **more)
    return called

class Killed(BaseException):
    """Stands for the end of the process: no `except Exception` catches it."""

@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """runs(script) -> the folders of a tiny run to the end, and of one stopped in its 3rd epoch."""
    @functools.cache
    def runs(script):
        done, begun = (tmp_path_factory.mktemp(script.METHOD) / name for name in ("a run", "begun"))
        code, text, err = run(script, tiny(script, images, done))
        assert code == 0 and err == "", err
        (done.parent / "printed").write_text(text, encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "train_epoch", failing(3, script.train_epoch, Killed()))
            with pytest.raises(Killed):
                run(script, tiny(script, images, begun))
        assert len(read_log(begun)) == 2
        return done, begun
    return runs

# ==== the scripts as texts ========================================================================
TEXTS = {script: (HERE / f"{script.METHOD}.py").read_text(encoding="utf-8") for script in SCRIPTS}

def definitions(script):
    """name -> its lines, with decorators, for every class, function and constant of the script."""
    lines, found = TEXTS[script].splitlines(), {}
    for node in ast.parse(TEXTS[script]).body:
        names = [node.name] if hasattr(node, "name") else []
        if isinstance(node, ast.Assign):
            names = [item.id for item in ast.walk(node.targets[0]) if isinstance(item, ast.Name)]
        decorators = [item.lineno for item in getattr(node, "decorator_list", [])]
        for name in names:
            found[name] = lines[min([node.lineno, *decorators]) - 1:node.end_lineno]
    return found

OWN = {  # what two scripts define, each in its own way
    (ddp_nas, mdenas): {"METHOD", "OPTIONS", "PAPER", "LR_MIN", "search", "main"},
    (ddp_nas, retrain): {"METHOD", "DEFAULTS", "MOMENTUM", "MAY_DIFFER", "train_epoch", "evaluate",
                         "parse_args", "main"}}

@pytest.mark.parametrize("scripts", OWN, ids=str)
def test_what_two_scripts_define_is_the_same_to_the_character(scripts):
    one, other = map(definitions, scripts)
    shared = (one.keys() & other.keys()) - OWN[scripts]
    assert OWN[scripts] <= one.keys() & other.keys() and len(shared) > 45
    for name in shared:
        assert one[name] == other[name], name
    state = [text.split("    def state_dict(self)")[1].split("\ndef ")[0]
             for text in (TEXTS[ddp_nas], TEXTS[mdenas])]
    assert state[0] == state[1] and "def load_state_dict" in state[0]

def test_no_line_is_long_and_the_searches_differ_little():
    for path in HERE.glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if len(line) > 100] == [], path
    differing = Counter(TEXTS[ddp_nas].splitlines())
    differing.subtract(Counter(TEXTS[mdenas].splitlines()))
    assert 0 < sum(map(abs, differing.values())) <= 120

@each_script
def test_a_script_stands_alone_and_runs_no_text(script):
    nodes = list(ast.walk(ast.parse(TEXTS[script])))
    names = {getattr(node, key, None) for node in nodes for key in ("id", "module")}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not names & {"ddp_nas", "mdenas", "retrain", "eval", "exec"}
    assert not names & {"fcntl", "resource", "pwd", "signal"}  # not everywhere, or not ours
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    loads = [node.keywords for node in calls if ast.unparse(node.func) == "torch.load"]
    assert loads and all("weights_only=True" in map(ast.unparse, words) for words in loads)

# ==== the distribution of DDP-NAS =================================================================
def prune_by_hand(history, num_edges, num_ops, passes):
    """theta and the alive operations after every round of (sample, accuracy) -> [(lists, sets)]."""
    history, rounds = iter(history), []
    theta = [[1 / num_ops] * num_ops for _ in range(num_edges)]
    alive = [set(range(num_ops)) for _ in range(num_edges)]
    for k in range(num_ops, 1, -1):
        measured = [[next(history) for _ in range(k)] for _ in range(passes)]
        for edge in range(num_edges):
            expectation = [0.0] * num_ops
            for one_pass in measured:
                total = sum(math.exp(100 * accuracy) for _, accuracy in one_pass)
                for sample, accuracy in one_pass:
                    expectation[sample[edge]] += math.exp(100 * accuracy) / total / passes
            theta[edge] = [new + 0.5 * old for new, old in zip(expectation, theta[edge])]
            alive[edge] = alive[edge] - {min(alive[edge], key=lambda op: theta[edge][op])}
        rounds.append((theta[:], alive[:]))
    return rounds

@pytest.mark.parametrize("num_edges, num_ops, passes, epochs", [
    (1, 2, 1, 2), (6, 5, 2, 28), (28, 8, 1, 35), (28, 8, 3, 105), (14, 9, 3, 132)])
def test_distribution_visits_every_alive_operation_and_prunes_by_theta(
        num_edges, num_ops, passes, epochs):
    distribution = ddp_nas.DynamicDistribution(num_edges, num_ops, passes, seed=1)
    draw, history, rounds = np.random.default_rng(1), [], []
    while len(history) < epochs:
        alive = distribution.alive.numpy().copy()
        for _ in range(passes):
            visits = np.zeros((num_edges, num_ops), int)
            for _ in range(alive[0].sum()):
                for _ in range(draw.integers(1, 3)):  # the last sample counts
                    sample = distribution.sample()
                history.append((sample, draw.uniform(0, 0.05)))  # every softmax is in play
                visits[np.arange(num_edges), sample] += 1
                distribution.record(*history[-1])
            assert (visits == alive).all()
        rounds.append((distribution.theta.clone(), distribution.alive.clone(),
                       distribution.probabilities, distribution.best()))
    by_hand = prune_by_hand(history, num_edges, num_ops, passes)
    for (theta, alive, probabilities, best), (theirs, sets) in zip(rounds, by_hand, strict=True):
        np.testing.assert_allclose(theta, theirs, rtol=1e-10)
        assert [set(row.nonzero()[:, 0].tolist()) for row in alive] == sets
        kept = [[row[op] * (op in ops) for op in range(num_ops)] for row, ops in zip(theirs, sets)]
        shares = [np.divide(row, sum(row)) for row in kept]
        np.testing.assert_allclose(probabilities, shares, rtol=1e-10)
        assert best == [row.index(max(row)) for row in kept]
    assert len(history) == distribution.total_epochs == epochs

# ==== the distribution of MdeNAS ==================================================================
def transfer_by_hand(p, epochs, accuracies, alpha):
    """One update of one edge, pair by pair."""
    new, all_ops = list(p), range(len(p))
    for j in all_ops:
        winners = [i for i in all_ops
                   if epochs[i] - epochs[j] < 0 and accuracies[i] - accuracies[j] > 0]
        for i in winners:
            paid = min(alpha, p[j] / len(winners))  # who owes more than it has pays all a part
            new[i], new[j] = new[i] + paid, new[j] - paid
    return new

def randomise(distribution, draw):
    """Give it rows of probabilities with many zeros, and histories with many ties."""
    shape = distribution.probabilities.shape
    p = draw.random(shape) * draw.integers(2, size=shape)
    p[np.arange(shape[0]), draw.integers(shape[1], size=shape[0])] += 0.01
    distribution.probabilities = torch.from_numpy(p / p.sum(1, keepdims=True))
    distribution.epochs = torch.from_numpy(draw.integers(5, size=shape))
    distribution.accuracies = torch.from_numpy(draw.integers(6, size=shape) / 6)

@pytest.mark.parametrize("num_ops, alpha", [(2, 0.01), (8, 0.01), (9, 0.2)])
def test_distribution_updates_as_a_double_loop_does(num_ops, alpha):
    distribution = mdenas.MultinomialDistribution(500, num_ops, alpha=alpha, seed=3)
    randomise(distribution, np.random.default_rng(3))
    names = "probabilities", "epochs", "accuracies"
    p, epochs, accuracies = (getattr(distribution, name).clone() for name in names)
    sample = distribution.sample()
    distribution.record(sample, 0.5)
    epochs[torch.arange(500), sample] += 1
    accuracies[torch.arange(500), sample] = 0.5
    edges = zip(p.tolist(), epochs.tolist(), accuracies.tolist())
    expected = [transfer_by_hand(*edge, alpha) for edge in edges]
    np.testing.assert_allclose(distribution.probabilities, expected, atol=1e-12)
    assert torch.equal(distribution.epochs, epochs)
    assert torch.equal(distribution.accuracies, accuracies)

def test_distribution_is_what_samples_follow():
    p = np.array([[0.5, 0, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4, 0]])
    distribution = mdenas.MultinomialDistribution(2, 5, epochs=10_000, seed=6)
    distribution.probabilities, counts = torch.from_numpy(p.copy()), np.zeros((5, 5))
    for sample, _ in drive(distribution, lambda sample, epoch: 0):  # none beats another: they stay
        counts[tuple(sample)] += 1
    expected = 10_000 * np.outer(*p)  # the edges are independent
    assert (distribution.probabilities.numpy() == p).all() and counts[expected == 0].sum() == 0
    assert as_expected(counts[expected > 0], expected[expected > 0])

# ==== both distributions ==========================================================================
def make(script, seed=0, num_edges=6):
    return (ddp_nas.DynamicDistribution(num_edges, 4, seed=seed) if script is ddp_nas else
            mdenas.MultinomialDistribution(num_edges, 4, epochs=27, seed=seed))

@each_search
def test_distribution_finds_a_planted_optimum_from_any_seed_and_under_noise(script):
    for seed, noise in itertools.product(range(15), (0, 0.05) if script is ddp_nas else (0,)):
        draw = np.random.default_rng(seed)
        edge, planted = draw.integers([6, 8])  # the one that matters
        distribution = (ddp_nas.DynamicDistribution(6, 8, 9, seed=seed) if script is ddp_nas else
                        mdenas.MultinomialDistribution(6, 8, epochs=300, seed=seed))
        drive(distribution, lambda sample, epoch: np.clip(
            0.1 + 0.8 * (sample[edge] == planted) + noise * draw.standard_normal(), 0, 1))
        p = distribution.probabilities[edge].tolist()
        assert distribution.best()[edge] == planted
        assert p[planted] > max(0.15, *np.delete(p, planted))

@each_search
def test_distribution_samples_lists_of_numbers_and_refuses_what_is_no_accuracy(script):
    distribution = make(script)
    sample = distribution.sample()
    before = copy.deepcopy(distribution.state_dict())
    for numbers in (sample, distribution.best()):
        assert type(numbers) is list and len(numbers) == 6
        assert all(type(op) is int and op in range(4) for op in numbers)
    for accuracy in (-0.001, 1.001, 93, math.nan, math.inf, -math.inf):
        pytest.raises(ValueError, distribution.record, sample, accuracy)
    assert same(distribution.state_dict(), before)
    for accuracy in (0, 1):
        distribution.record(distribution.sample(), accuracy)
    assert distribution.probabilities.dtype == distribution.scores.dtype == torch.float64

@each_search
@pytest.mark.parametrize("stop", [0, 1, 11, 26])
def test_distribution_goes_on_from_its_state_and_the_seed_decides(script, stop):
    measure = lambda sample, epoch: sum((e + 1) * choice for e, choice in enumerate(sample)) / 63
    whole, first, second = make(script, 7), make(script, 7), make(script, 8)
    history = drive(whole, measure)
    assert len(history) == whole.total_epochs == 27 and history != drive(make(script, 8), measure)
    if stop:
        assert drive(first, measure, stop) == history[:stop]
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(load(buffer))
    assert drive(second, measure, 27 - stop) == history[stop:]
    assert torch.equal(second.probabilities, whole.probabilities)

# ==== what the networks compute ===================================================================
# Plain functions of images and weights, as the papers have them, against the modules.
OPS = ["none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5",
       "dil_conv_3x3", "dil_conv_5x5"]
PAIRS = [(3, 1), (3, 3), (3, 6), (5, 1), (5, 3), (5, 6), (7, 1), (7, 3), (7, 6)]
BACKBONES = {  # (output channels, stride) of every block, width of the head
    "gpu": ([(24, 1), (32, 2), (56, 2), (56, 1), (112, 2), (112, 1), *3 * [(128, 1)], (256, 2),
             *3 * [(256, 1)], (432, 1)], 1728),
    "cpu": ([(24, 1), (32, 2), *3 * [(32, 1)], (48, 2), *3 * [(48, 1)], (88, 2), (88, 1),
             *4 * [(104, 1)], (216, 2), *3 * [(216, 1)], (360, 1)], 1432)}
CHANNELS, CELLS, CLASSES = 4, 5, 10  # of the networks here

class Weights:
    """The tensors of a network, handed out one by one: they stand in the order of their use."""
    def __init__(self, tensors, supernet, training, eps):
        self.tensors = iter(tensors)
        self.supernet, self.training, self.eps = supernet, training, eps

    def take(self, *shape):
        tensor = next(self.tensors)
        assert tensor.shape == shape
        return tensor

def conv(x, w, c_out, kernel, stride=1, dilation=1, groups=1):
    weight = w.take(c_out, x.shape[1] // groups, kernel, kernel)
    return F.conv2d(x, weight, None, stride, dilation * (kernel - 1) // 2, dilation, groups)

def norm(x, w, affine=True):
    """BatchNorm: by this batch in training and in supernets, which keep no running statistics."""
    c, mean, var = x.shape[1], None, None
    weight, bias = (w.take(c), w.take(c)) if affine else (None, None)
    if not w.supernet:
        mean, var, _ = w.take(c), w.take(c), w.take()  # in training the next line updates them
    return F.batch_norm(x, mean, var, weight, bias, w.supernet or w.training, 0.1, w.eps)

def classify(x, w):
    """(B, C, H, W) -> logits (B, CLASSES)."""
    return F.linear(x.mean((2, 3)), w.take(CLASSES, x.shape[1]), w.take(CLASSES))

def cell_norm(x, w):
    return norm(x, w, affine=not w.supernet)

def relu_conv_norm(x, w, c):
    return cell_norm(conv(x.relu(), w, c, 1), w)

def factorised_reduction(x, w, c):
    x = x.relu()
    halves = [conv(x, w, c // 2, 1, stride=2), conv(x[:, :, 1:, 1:], w, c // 2, 1, stride=2)]
    return cell_norm(torch.cat(halves, 1), w)

def separable(x, w, kernel, stride=1, dilation=1):
    c = x.shape[1]
    x = conv(x.relu(), w, c, kernel, stride, dilation, groups=c)
    return cell_norm(conv(x, w, c, 1), w)

def operation(name, x, w, stride):
    if name == "none":
        return torch.zeros_like(x[:, :, ::stride, ::stride])
    if name == "max_pool_3x3":
        return cell_norm(F.max_pool2d(x, 3, stride, padding=1), w)
    if name == "avg_pool_3x3":
        return cell_norm(F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False), w)
    if name == "skip_connect":
        return x if stride == 1 else factorised_reduction(x, w, x.shape[1])
    kernel = int(name[-1])
    if name.startswith("dil"):
        return separable(x, w, kernel, stride, dilation=2)
    return separable(separable(x, w, kernel, stride), w, kernel)

def cell(s0, s1, w, c, nodes, reduction, reduction_before):
    """nodes: for each of 4 its edges (operation, source) -> (B, 4 c, H, W)."""
    s0 = factorised_reduction(s0, w, c) if reduction_before else relu_conv_norm(s0, w, c)
    states = [s0, relu_conv_norm(s1, w, c)]
    for edges in nodes:
        values = [operation(name, states[source], w, 2 if reduction and source < 2 else 1)
                  for name, source in edges]
        states.append(sum(values))
    return torch.cat(states[2:], 1)

def network_of_cells(x, w, normal, reduce, imagenet=False, auxiliary=False):
    """Images (B, 3, S, S) -> logits (B, CLASSES); in training those of an auxiliary head, too."""
    c, reduction_before = CHANNELS, imagenet
    if imagenet:
        x = norm(conv(x, w, c // 2, 3, stride=2), w).relu()
        s0 = norm(conv(x, w, c, 3, stride=2), w)
        s1 = norm(conv(s0.relu(), w, c, 3, stride=2), w)
    else:
        s0 = s1 = norm(conv(x, w, 3 * c, 3), w)
    for i in range(CELLS):
        reduction = i in (1, 3)  # of 5 cells: floor(5 / 3) and floor(2 x 5 / 3)
        c = 2 * c if reduction else c
        nodes = reduce if reduction else normal
        s0, s1 = s1, cell(s0, s1, w, c, nodes, reduction, reduction_before)
        reduction_before = reduction
        if i == 3:
            inner = s1                                                  # (B, 4 c, 7 or 8, same)
    if auxiliary:
        x = F.avg_pool2d(inner.relu(), 5, stride=2 if imagenet else 3)  # (B, 4 c, 2, 2)
        x = norm(conv(x, w, 128, 1), w).relu()
        x = conv(x, w, 768, 2)                                          # (B, 768, 1, 1)
        x = x if imagenet else norm(x, w)
        inner_logits = classify(x.relu(), w)
    logits = classify(s1, w)
    return (logits, inner_logits) if auxiliary and w.training else logits

def block(x, w, c_out, stride, kernel, expansion):
    c, y = expansion * x.shape[1], x
    if expansion > 1:
        y = norm(conv(y, w, c, 1), w).clamp(0, 6)
    y = norm(conv(y, w, c, kernel, stride, groups=c), w).clamp(0, 6)
    y = norm(conv(y, w, c_out, 1), w)
    return x + y if stride == 1 and c_out == x.shape[1] else y

def network_of_blocks(x, w, backbone, pairs):
    """Images (B, 3, S, S) -> logits (B, CLASSES). pairs: (kernel, expansion) of every block."""
    blocks, width = BACKBONES[backbone]
    x = norm(conv(x, w, 40, 3, stride=2), w).clamp(0, 6)
    for (c, stride), (kernel, expansion) in zip(blocks, pairs, strict=True):
        x = block(x, w, c, stride, kernel, expansion)
    return classify(norm(conv(x, w, width, 1), w).clamp(0, 6), w)

def is_on_path(name, sample):
    """Whether the sample uses this weight of a supernet."""
    match = re.match(r"(?:cells\.(\d)\.edges|blocks)\.(\d+)\.(\d+)", name)
    first = 14 if match and match[1] in ("1", "3") else 0  # of a reduction cell's edges
    return not match or sample[first + int(match[2])] == int(match[3])

@torch.no_grad()
def compare(network, function, arguments, size, eps, sample=None):
    """One pass in training, then one in evaluation, which uses what the first left behind."""
    for name, tensor in network.double().state_dict().items():
        if tensor.dim() == 1 and name.endswith(("weight", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1:   # so that half of the values are below 0, and some above 6
            tensor.normal_(0, 3)
    tensors = [tensor.clone() for name, tensor in network.state_dict().items()
               if sample is None or is_on_path(name, sample)]
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    for training in (True, False):
        network.train(training)
        logits = network(images) if sample is None else network(images, sample)
        w = Weights(tensors, sample is not None, training, eps)
        torch.testing.assert_close(logits, function(images, w, *arguments))
        assert not list(w.tensors)

def nodes_of_supernet(sample):
    """14 operations, in node order, then source order -> for each node its edges."""
    names = iter(OPS[choice] for choice in sample)
    return [[(next(names), source) for source in range(2 + node)] for node in range(4)]

def test_supernet_of_cells_computes_its_definition():
    torch.manual_seed(0)
    network = ddp_nas.CellSupernet(CHANNELS, CELLS, CLASSES)
    for sample in torch.rand(8, 28).argsort(0).tolist():  # every edge takes every operation
        cells = nodes_of_supernet(sample[:14]), nodes_of_supernet(sample[14:])
        compare(network, network_of_cells, cells, 16, 1e-5, sample)

NORMAL = [[("sep_conv_3x3", 1), ("max_pool_3x3", 0)], [("skip_connect", 2), ("dil_conv_5x5", 1)],
          [("avg_pool_3x3", 3), ("dil_conv_3x3", 0)], [("sep_conv_5x5", 4), ("skip_connect", 1)]]
REDUCE = [[("skip_connect", 0), ("sep_conv_5x5", 1)], [("dil_conv_3x3", 1), ("max_pool_3x3", 0)],
          [("avg_pool_3x3", 1), ("sep_conv_3x3", 2)], [("dil_conv_5x5", 0), ("skip_connect", 4)]]

@pytest.mark.parametrize("dataset, size, eps", [("cifar10", 32, 1e-5), ("imagenet", 224, 1e-3)])
def test_final_network_of_cells_computes_its_definition(dataset, size, eps):
    torch.manual_seed(0)
    genotype = retrain.Genotype(sum(NORMAL, []), range(2, 6), sum(REDUCE, []), range(2, 6))
    network = retrain.build_network(genotype, dataset, CLASSES, CHANNELS, CELLS, auxiliary=True)
    compare(network, network_of_cells, (NORMAL, REDUCE, dataset == "imagenet", True), size, eps)

@pytest.mark.parametrize("backbone", BACKBONES)
def test_networks_of_blocks_compute_their_definition(backbone):
    torch.manual_seed(0)
    sample = torch.randint(9, (len(BACKBONES[backbone][0]),)).tolist()
    pairs = [PAIRS[choice] for choice in sample]
    supernet = ddp_nas.MobileSupernet(backbone, CLASSES)
    network = retrain.build_network(pairs, "imagenet", CLASSES)
    compare(supernet, network_of_blocks, (backbone, pairs), 64, 1e-3, sample)
    compare(network, network_of_blocks, (backbone, pairs), 64, 1e-3)

# ==== from scores to cells ========================================================================
def assert_derived(scores, genotype, best=None):
    """The cells as brute force would have them; among equals whichever, but best where given."""
    names, edge = list(ddp_nas.OPS), 0
    assert list(genotype.normal_concat) == list(genotype.reduce_concat) == [2, 3, 4, 5]
    assert len(genotype.normal) == len(genotype.reduce) == 8
    for cell in (genotype.normal, genotype.reduce):
        for i, node in enumerate(nodes_of(cell)):
            values = []  # of the edges of this node: the score of what stands on it
            for source in range(2 + i):
                row = [-1, *map(float, scores[edge + source][1:])]  # without `none`
                op = best[edge + source] if best else 0
                values.append(row[op] if op else max(row))
                right = [op] if op else [j for j in range(8) if math.isclose(row[j], max(row))]
                assert all(names.index(name) in right for name, other in node if other == source)
            (_, one), (_, other) = node
            assert one != other and {one, other} <= set(range(2 + i))
            left_out = [values[source] for source in range(2 + i) if source not in (one, other)]
            assert min(values[one], values[other]) >= max(left_out, default=0) - 1e-12
            edge += 2 + i

def test_derived_cells_hold_the_strongest_edges_and_never_none():
    for strength in torch.rand(50, 28, 8, generator=torch.Generator().manual_seed(0)):
        strength[::2, 0] = 2  # `none` the strongest by far
        cells = ddp_nas.derive_cells(strength.argmax(1).tolist(), strength)
        assert_derived(strength, cells)

@pytest.mark.parametrize("seed", range(5))
def test_the_survivor_stands_on_its_edge_though_others_are_as_strong(seed):
    distribution = ddp_nas.DynamicDistribution(28, 8, 1, seed=seed)
    favour = lambda sample, epoch: 0.5 if seed else 0.5 + 0.001 * sum(op == 0 for op in sample)
    drive(distribution, favour)
    survivors = [row.index(True) for row in distribution.alive.tolist()]
    assert survivors == distribution.best() and (seed or 0 in survivors)
    assert_derived(distribution.theta, ddp_nas.derive_cells(survivors, distribution.theta),
                   survivors)

# ==== the sizes of the networks ===================================================================
def count_weights(module):
    return sum(weight.numel() for weight in module.parameters())

def count_block(c_in, c_out, kernel, expansion):
    """Weights of a block: convolutions without bias, two a channel in BatchNorms."""
    c = c_in * expansion
    return (c_in + 2) * c * (expansion > 1) + (kernel**2 + 2) * c + (c + 2) * c_out

def count_chain(backbone, pairs, classes):
    """Weights of a chain of (kernel, expansion) blocks, with first conv, head and last layer."""
    blocks, head = backbone
    widths = [40, *(c for c, _ in blocks)]
    total = 29 * 40 + (widths[-1] + 2) * head + (head + 1) * classes
    return total + sum(map(count_block, widths, widths[1:], *zip(*pairs)))

CHAINS = ["DDPNAS_GPU", "MDENAS_GPU", "MDENAS_CPU"]

@pytest.mark.parametrize("name", CHAINS)
def test_published_chain_is_a_path_of_its_supernet(name):
    pairs, backbone = retrain.PUBLISHED[name], name[-3:].lower()
    network = ddp_nas.MobileSupernet(backbone, 5)
    sample = [PAIRS.index(pair) for pair in pairs]
    network(torch.randn(2, 3, 32, 32), sample).sum().backward()
    used = sum(weight.numel() for weight in network.parameters() if weight.grad is not None)
    assert used == count_chain(BACKBONES[backbone], pairs, 5)
    assert used == count_weights(retrain.build_network(pairs, "imagenet", 5))

@pytest.mark.parametrize("name, dataset, channels, auxiliary, count", [
    ("MDENAS", "cifar10", 36, False, 3_786_742), ("MDENAS", "cifar10", 36, True, 4_263_168),
    ("DDPNAS_IMAGENET", "imagenet", 48, False, 4_506_592),
    ("MDENAS", "imagenet", 48, False, 5_329_024), ("MDENAS", "imagenet", 48, True, 6_589_800),
    ("DDPNAS_2", "cifar10", 36, True, 3_429_840), ("DDPNAS_2", "cifar10", 44, True, 4_830_120),
    ("DARTS_V2", "cifar10", 36, False, 3_349_342 + 2 * 5 * (72 + 144))])
def test_parameters_are_those_of_the_published_networks(name, dataset, channels, auxiliary, count):
    """DARTS has 3,349,342; here the 5 pools of its two reduction cells each have a BatchNorm."""
    genotype, num_classes = retrain.PUBLISHED[name], 1000 if dataset == "imagenet" else 10
    with torch.device("meta"):
        network = retrain.build_network(genotype, dataset, num_classes, channels, None, auxiliary)
    assert count_weights(network) == count
    assert (retrain.count_parameters(network) < count) == auxiliary

# The state dicts of the authors' weight files: number of entries, a checksum of all of them, and
# weights by position: stems, preprocessing, edges, factorised reductions, auxiliary head, last
# layer.
LAYOUTS = {
    "MDENAS": (1876, 1679529187, {
        0: (108, 3, 3, 3), 6: (36, 108, 1, 1), 18: (36, 1, 5, 5), 601: (36, 72, 1, 1),
        602: (36, 72, 1, 1), 650: (36, 144, 1, 1), 1860: (128, 576, 1, 1), 1866: (768, 128, 2, 2),
        1874: (10, 576)}),
    "DDPNAS_IMAGENET": (1161, 2913415794, {
        0: (24, 3, 3, 3), 6: (48, 24, 3, 3), 12: (48, 48, 3, 3), 18: (24, 48, 1, 1),
        19: (24, 48, 1, 1), 25: (48, 48, 1, 1), 90: (48, 1, 3, 3), 1159: (1000, 768)}),
    "DDPNAS_GPU": (254, 3405535748, {
        0: (40, 3, 3, 3), 6: (240, 40, 1, 1), 12: (240, 1, 7, 7), 252: (1000, 1728)}),
    "MDENAS_CPU": (350, 3071067060, {
        0: (40, 3, 3, 3), 12: (120, 1, 5, 5), 24: (24, 1, 7, 7), 348: (1000, 1432)}),
}

@pytest.mark.parametrize("name", LAYOUTS)
def test_networks_are_laid_out_as_the_released_weights(name):
    (count, checksum, some), genotype = LAYOUTS[name], retrain.PUBLISHED[name]
    dataset, num_classes = ("cifar10", 10) if name == "MDENAS" else ("imagenet", 1000)
    with torch.device("meta"):
        network = retrain.build_network(genotype, dataset, num_classes, auxiliary=name == "MDENAS")
    entries = [(key.split(".")[-1], tuple(value.shape))
               for key, value in network.state_dict().items()]
    assert len(entries) == count
    assert all(entries[i] == ("weight", shape) for i, shape in some.items())
    text = "\n".join(f"{last} {'x'.join(map(str, shape))}" for last, shape in entries)
    assert zlib.crc32(text.encode()) == checksum

def test_published_cells_are_those_of_the_papers():
    """DDPNAS_1, of which no count is known; the others are known by their counts."""
    text = str(retrain.PUBLISHED["DDPNAS_1"].normal + retrain.PUBLISHED["DDPNAS_1"].reduce)
    assert re.sub("_conv|_pool|x[35]|[^a-z0-9]", "", text) == (
        "sep50max31sep32max30dil50sep31avg32max34sep31dil50dil51sep50sep30avg33max31sep30")

def test_the_imagenet_network_takes_a_step_at_its_own_size():
    """With strided 1x1 convs in the factorised reduction, torch 2.14 on a CPU dies here."""
    network = retrain.build_network(retrain.PUBLISHED["DDPNAS_IMAGENET"], "imagenet", 3, 8, 3)
    network.to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    network(images).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters())

def test_random_genotypes_are_repeatable_and_uniform():
    operations, sources, blocks = Counter(), Counter(), Counter()
    for seed in range(1000):
        genotype, mobile = (retrain.load_genotype(f"random:{seed}{more}")[0]
                            for more in ("", ":gpu"))
        assert genotype == retrain.load_genotype(f"random:{seed}")[0]
        assert genotype == retrain.parse_genotype(str(genotype))
        assert mobile == retrain.parse_genotype(str(mobile))
        blocks.update((i, *block) for i, block in enumerate(mobile))
        for cell, pairs in (("normal", genotype.normal), ("reduce", genotype.reduce)):
            for i, node in enumerate(nodes_of(pairs)):
                sources[cell, i, tuple(source for _, source in node)] += 1
                operations.update((cell, i, op) for op, _ in node)
    pairs = [1, 3, 6, 10]  # of the sources of each node
    counts = len(operations), len(sources), len(blocks)
    assert counts == (8 * 7, 2 * sum(pairs), 14 * 9)
    assert as_expected(list(operations.values()), 56 * [2000 / 7])
    assert as_expected(list(sources.values()), [1000 / pairs[i] for _, i, _ in sources])
    assert as_expected(list(blocks.values()), 126 * [1000 / 9])

@pytest.mark.parametrize("script", [ddp_nas, retrain])
def test_without_none_is_a_name_and_not_a_position(script, monkeypatch):
    """With `none` removed, or moved to the end, the first operation is one like the others."""
    moved = {**{name: op for name, op in script.OPS.items() if name != "none"}, "none": None}
    for operations in (dict(list(moved.items())[:-1]), moved):
        monkeypatch.setattr(script, "OPS", operations)
        if script is retrain:
            cells = [retrain.random_genotype(seed) for seed in range(20)]
        else:
            scores = torch.rand(20, 28, len(operations), generator=torch.Generator().manual_seed(0))
            cells = [ddp_nas.derive_cells(rows.argmax(1).tolist(), rows) for rows in scores]
        found = {name for cell in cells for name, _ in cell.normal + cell.reduce}
        assert found == moved.keys() - {"none"}

# ==== one path at a time ==========================================================================
SPACES = {"cell": (lambda: ddp_nas.CellSupernet(2, CELLS, 4), 28, 8),
          "mobile": (lambda: ddp_nas.MobileSupernet("gpu", 4), 14, 9)}

@pytest.mark.parametrize("space", SPACES)
def test_a_step_leaves_everything_off_the_path_alone(space):
    torch.manual_seed(0)
    make_network, num_edges, num_ops = SPACES[space]
    network, on, off = make_network(), 0, 0
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=0.1)
    def state(weight):
        momentum = optimizer.state[weight].get("momentum_buffer", torch.zeros(1))
        return weight.clone(), momentum.clone()
    paths = [1 + (np.arange(num_edges) + i) % (num_ops - 1) for i in range(num_ops - 1)]
    paths.append(np.random.default_rng(0).integers(1, num_ops, num_edges))
    for path in paths:  # all but operation 0: gives the weights a momentum
        before = {name: state(weight) for name, weight in network.named_parameters()}
        ddp_nas.train_epoch(network, optimizer, batches, path.tolist())
    for name, weight in network.named_parameters():
        unmoved = [torch.equal(a, b) for a, b in zip(state(weight), before[name])]
        assert unmoved == 2 * [not is_on_path(name, path)], name
        on += is_on_path(name, path)
        off += not is_on_path(name, path) and bool(before[name][1].any())
    assert on > 20 and off > 100

@pytest.mark.parametrize("space", SPACES)
def test_a_step_computes_the_operations_of_the_path_and_no_others(space):
    make_network, num_edges, num_ops = SPACES[space]
    network, computed = make_network(), set()
    sample = np.random.default_rng(0).integers(num_ops, size=num_edges).tolist()
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, name=name: computed.add(name + "."))
    network(torch.randn(4, 3, 32, 32), sample)
    candidates = {name + "." for name, _ in network.named_modules()
                  if re.fullmatch(r"(cells\.\d\.edges|blocks)\.\d+\.\d+", name)}
    assert computed & candidates == {name for name in candidates if is_on_path(name, sample)}
    assert len(computed & candidates) == (CELLS * 14 if space == "cell" else 14)

# ==== training one path, and one network ==========================================================
class FakeNetwork(nn.Linear):
    """Logits of so many classes from the first pixels; while training others from the next."""
    def __init__(self, num_classes=7):
        super().__init__(1, num_classes)

    def forward(self, images, sample=None):
        count = len(self.bias)
        pixels = images.flatten(1) + 0 * self.bias.sum()
        both = pixels[:, :count], pixels[:, count:2 * count]
        return both if self.training else both[0]

def fake_batches(num_classes=7):
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(count, 3, 8, 8, generator=g), torch.arange(count) % num_classes)
            for count in (16, 16, 16, 2)]

def test_errors_are_those_of_plain_python_and_of_float32(monkeypatch):
    wrong, count, network = [0, 0], 0, FakeNetwork().eval()
    for images, labels in fake_batches():
        for image, label in zip(images.flatten(1).tolist(), labels.tolist()):
            ranking = sorted(range(7), key=lambda c: -image[c])
            wrong = [total + (label not in ranking[:n]) for total, n in zip(wrong, (1, 5))]
            count += 1
    for script in (ddp_nas, mdenas):
        assert script.evaluate(network, fake_batches(), None) == pytest.approx(1 - wrong[0] / count)
    for where in (torch, retrain):
        monkeypatch.setattr(where, "autocast", lambda *args, **more: fail(AssertionError))
    errors = {"top1_error": wrong[0] / count, "top5_error": wrong[1] / count}
    assert 0 < wrong[1] < wrong[0] < count == 50
    assert retrain.evaluate(network, fake_batches()) == pytest.approx(errors)
    assert retrain.evaluate(FakeNetwork(5), fake_batches(5)).keys() == {"top1_error"}

def test_training_loss_is_smoothed_and_takes_in_the_auxiliary_head():
    network, means = FakeNetwork(), []
    for images, labels in fake_batches():
        losses = []
        for image, label in zip(images.flatten(1).tolist(), labels.tolist()):
            for part, weight in ((image[:7], 1), (image[7:14], 0.4)):
                total = math.log(sum(map(math.exp, part)))
                losses.append(weight * sum((0.1 / 7 + 0.9 * (c == label)) * (total - part[c])
                                           for c in range(7)))
        means.append(sum(losses) / len(labels))
    args = Namespace(smoothing=0.1, auxiliary=0.4, cutout=0, clip=5)
    optimizer = torch.optim.SGD(network.parameters(), 0)
    loss = retrain.train_epoch(network, optimizer, fake_batches(), args)
    assert math.isclose(loss, sum(means) / 4, rel_tol=1e-5)

def test_drop_path_zeroes_whole_images_but_no_identity_and_nothing_in_evaluation():
    torch.manual_seed(0)
    skip, seen = ("skip_connect", 1), []
    pairs = [("skip_connect", 0), skip, ("avg_pool_3x3", 0), skip] * 2
    genotype = retrain.Genotype(pairs, range(2, 6), pairs, range(2, 6))
    network = retrain.build_network(genotype, "cifar10", 5, 2, 3)
    cell, network.drop_path = network.cells[0], 0.3
    cell.register_forward_hook(lambda module, inputs, out: seen.append((*inputs[:2], out)))
    for training in (True, False):
        network.train(training)(torch.randn(2000, 3, 4, 4))
        first, second = seen[-1][2].split(2, 1)[:2]
        s0, s1 = cell.preprocess0(seen[-1][0]), cell.preprocess1(seen[-1][1])
        dropped = (second - s1).abs().flatten(1).amax(1) < 1e-6
        keep = (~dropped / 0.7 if training else torch.ones(2000)).view(-1, 1, 1, 1)
        expected = s0 + s1, s1 + keep * cell.edges[2](s0)
        torch.testing.assert_close((first, second), expected)
        counts = [dropped.sum().item(), (~dropped).sum().item()]
        assert as_expected(counts, [600, 1400]) if training else counts[0] == 0

def test_cutout_zeroes_a_square_clipped_at_the_borders():
    torch.manual_seed(0)
    centres = np.zeros((20, 20))
    for image in retrain.cutout(torch.ones(8000, 2, 20, 20), 8).numpy():
        hole = np.argwhere(image[0] == 0)
        low, high = hole.min(0), hole.max(0) + 1
        centre = np.where(low > 0, low + 4, high - 4)
        assert (image[0] == image[1]).all() and len(hole) == (high - low).prod()
        assert (low == np.maximum(centre - 4, 0)).all()
        assert (high == np.minimum(centre + 4, 20)).all()
        centres[tuple(centre)] += 1
    assert as_expected(centres, np.full((20, 20), 20))

# ==== images and batches ==========================================================================
def settings(seed=0, dataset="synthetic", **more):
    return Namespace(**{"device": "cpu", "batch_size": 16, "workers": 0, "image_size": 8,
                        "seed": seed, "dataset": dataset, **more})

def indexed_images(count):
    """Images of noise, and their numbers as labels."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 8, 8), generator=g, dtype=torch.uint8)
    dataset = TensorDataset(pixels, torch.arange(count))
    dataset.classes = []
    return dataset

def pixels_of(batches, images):
    """Undo the normalisation -> uint8."""
    return (images * batches.std + batches.mean).round().to(torch.uint8)

def test_training_batches_are_crops_of_the_padded_images_flipped_or_not(images):
    args = settings(dataset="imagefolder", data_dir=images)
    opened, paths = ddp_nas.open_images(args, train=True), sorted((images / "train").rglob("*.png"))
    padded = [np.pad(Image.open(path), ((1, 1), (1, 1), (0, 0))) for path in paths]
    assert opened.classes == ["cats", "dogs"] and opened.tensors[1].tolist() == 18 * [0] + 18 * [1]
    opened = TensorDataset(opened.tensors[0], torch.arange(36))
    index, seen, places = torch.arange(3, 36, 2), [], set()
    turns = {*itertools.product(range(3), range(3), (1, -1))}
    batches = ddp_nas.Batches(opened, index, 8, args, train=True)
    for batches.epoch in range(10):
        seen.append([])
        for crops, labels in batches:
            assert crops.shape == (8, 3, 8, 8) and labels.shape == (8,)
            assert crops.is_contiguous(memory_format=torch.channels_last)
            crops = pixels_of(batches, crops).permute(0, 2, 3, 1).numpy()
            for crop, i in zip(crops, labels.tolist()):
                found = {(top, left, flip) for top, left, flip in turns if
                         (padded[i][top:top + 8, left:left + 8][:, ::flip] == crop).all()}
                assert len(found) == 1, "not the image that the label says"
                places |= found
                seen[-1].append(i)
        assert len(set(seen[-1])) == len(seen[-1]) == batches.num_images == 16
        assert set(seen[-1]) <= set(index.tolist())
    assert len(set(map(tuple, seen))) == 10 and places == turns  # the order is new every epoch

@pytest.mark.parametrize("large", [False, True])
def test_batches_do_not_depend_on_the_number_of_processes(large, large_images, monkeypatch):
    """The shares of 3 processes, put together, are the batches of one; images, labels and all."""
    args = settings(image_size=72, dataset="imagefolder", data_dir=large_images)
    dataset = ddp_nas.open_images(args, True) if large else indexed_images(24)
    for count, train in ((12, True), (12, False), (2, False)):
        def read():
            batches = ddp_nas.Batches(dataset, torch.arange(count), 6, args, train)
            return [[*zip(images, labels.tolist())] for images, labels in batches]
        (whole, *_), shares = read(), []
        monkeypatch.setattr(ddp_nas, "WORLD_SIZE", 3)
        for rank in range(3):
            monkeypatch.setattr(ddp_nas, "RANK", rank)
            shares.append(read())
        assert [len(share[0]) if share else 0 for share in shares] == (
            [2, 2, 2] if count == 12 else [1, 1, 0])
        for rank, share in enumerate(shares):
            assert not share or same(share[0], whole[rank::3])
        monkeypatch.undo()

def test_halves_are_halves_and_validated_in_batches_of_one_size(monkeypatch):
    images = indexed_images(101)
    monkeypatch.setattr(ddp_nas, "open_images", lambda args, train: images)
    halves = [ddp_nas.split_training_images(settings(seed)) for seed in (0, 0, 1)]
    one, again, other = (set(train.index.tolist()) for _, train, _ in halves)
    validation = halves[0][2]
    validated = torch.cat([labels for _, labels in validation]).tolist()
    assert one == again != other and not one & set(validated)
    assert len(one) == 51 and len(set(validated)) == validation.num_images == 48
    assert {len(labels) for _, labels in validation} == {16}
    for pixels, labels in validation:  # as they are
        assert torch.equal(pixels_of(validation, pixels), images.tensors[0][labels])
    monkeypatch.setattr(ddp_nas, "WORLD_SIZE", 3)
    assert ddp_nas.split_training_images(settings(batch_size=18))[2].batch_size == 24  # 8 each

def read_crops(folder, workers, epochs):
    """The batches of random crops in each of the epochs."""
    dataset = retrain.RandomCrops(retrain.ImageFolder(folder / "train", 72), 72)
    batches = retrain.Batches(dataset, torch.arange(len(dataset)), 4, settings(workers=workers),
                              train=True, augment=lambda crops, g: crops)
    seen = []
    for batches.epoch in epochs:
        dataset.seed = batches.epoch
        seen.append(list(batches))
    return seen

def test_random_crops_follow_from_the_epoch_alone_whoever_reads(large_images):
    """No worker, 2 workers, a later epoch alone, and spawned workers (macOS, Windows)."""
    whole = read_crops(large_images, 0, [0, 1, 5])
    assert same(whole, read_crops(large_images, 2, [0, 1, 5]))
    assert same(whole[2:], read_crops(large_images, 0, [5]))
    crops = [image for epoch in whole[:2] for images, _ in epoch for image in images]
    assert not any(same(a, b) for a, b in itertools.combinations(crops, 2))
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert same(whole[:1], read_crops(large_images, 1, [0]))
    finally:
        multiprocessing.set_start_method(usual, force=True)
    dataset = retrain.RandomCrops(retrain.ImageFolder(large_images / "train", 72), 72)
    dataset.seed = 20241231 * 1_000_003  # of a seed that is a date
    before = torch.get_rng_state()
    assert same(dataset[3], dataset[3]) and not same(dataset[3], dataset[4])
    assert torch.equal(torch.get_rng_state(), before)  # whence cutout and drop-path draw

def test_small_folders_are_read_in_batches_that_leave_no_file_open(tmp_path, monkeypatch):
    """A tensor in memory that a worker shares keeps a file open, as long as it is kept."""
    write_images(tmp_path / "train", count=130)
    args = settings(dataset="imagefolder", data_dir=tmp_path, workers=2)
    cat, batches = torch.cat, []
    monkeypatch.setattr(torch, "cat", lambda tensors: batches.extend(tensors) or cat(tensors))
    opened = ddp_nas.open_images(args, train=True)
    assert [len(batch) for batch in batches] == [100, 100, 60]
    assert not any(batch.is_shared() for batch in batches)
    args.workers = 0
    assert same(opened.tensors, ddp_nas.open_images(args, train=True).tensors)

def test_folders_as_people_have_them(tmp_path):
    """Hidden folders and files are no images; every suffix that PIL opens is one."""
    write_images(tmp_path, count=2)
    write_images(tmp_path, classes=[".ipynb_checkpoints"])
    write_images(tmp_path / "cats", classes=[".ipynb_checkpoints"])
    (tmp_path / "dogs" / "._00.png").write_bytes(b"what macOS leaves behind")
    (tmp_path / "dogs" / "notes.txt").write_text("no image")
    image = Image.open(tmp_path / "cats" / "00.png")
    for name in ("a.jfif", "b.WEBP", "c.tiff", "d.Bmp", "e.gif"):
        image.save(tmp_path / "dogs" / name, {"jfif": "jpeg"}.get(name[2:].lower()))
    folder = ddp_nas.ImageFolder(tmp_path, 8)
    names = [Path(path).name for path, _ in folder.samples]
    assert folder.classes == ["cats", "dogs"] and folder.targets == [0] * 2 + [1] * 7
    assert names == ["00.png", "01.png", "00.png", "01.png", "a.jfif", "b.WEBP", "c.tiff", "d.Bmp",
                     "e.gif"]

def test_photographs_are_turned_upright(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30] = 255  # bright at the upper left
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[274] = 6  # the camera was held upright: to be turned clockwise
    image.save(tmp_path / "photo.jpg", exif=exif)
    upright = np.asarray(ddp_nas.open_rgb(tmp_path / "photo.jpg"))
    assert upright.shape == (60, 40, 3)
    assert upright[:20, 30:].min() > 200 and upright[40:].max() < 50 and upright[:, :10].max() < 50

def test_a_sign_of_life_once_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(ddp_nas.time, "perf_counter", lambda: now[0])
    for _ in ddp_nas.with_progress(range(1500), "training"):
        now[0] += 0.125
    assert capsys.readouterr().out == (
        "    training, step 481 of 1,500\n    training, step 962 of 1,500\n"
        "    training, step 1,443 of 1,500\n")

# ==== whole searches ==============================================================================
def scores_by_hand(script, log, num_edges, num_ops):
    """What the distribution must have come to believe from the rows of log.jsonl; what is alive."""
    if script is ddp_nas:
        history = [(row["sample"], row["accuracy"]) for row in log]
        theta, alive = prune_by_hand(history, num_edges, num_ops, 1)[-1]
        return theta, [max(ops) for ops in alive]
    p = [[1 / num_ops] * num_ops for _ in range(num_edges)]
    epochs, accuracies = ([[0] * num_ops for _ in range(num_edges)] for _ in range(2))
    for row, (edge, choice) in ((row, pair) for row in log for pair in enumerate(row["sample"])):
        epochs[edge][choice] += 1
        accuracies[edge][choice] = row["accuracy"]
        p[edge] = transfer_by_hand(p[edge], epochs[edge], accuracies[edge], 0.01)
    return p, None

@each_search
def test_search_run_end_to_end(script, runs):
    out, epochs = runs(script)[0], EPOCHS[script]
    log, genotype = read_log(out), read_genotype(out)
    names = {"cell.md", "checkpoint.pt", "genotype.json", "log.jsonl"}
    assert {path.name for path in files(out)} == names
    assert [row["epoch"] for row in log] == list(range(1, epochs + 1))
    assert all(row["accuracy"] in [right / 18 for right in range(19)] for row in log)
    assert all(0 <= row["loss"] < 99 for row in log)
    results = json.loads((out / "genotype.json").read_text())
    assert results["settings"]["method"] == script.METHOD
    scores, best = scores_by_hand(script, log, 28, 8)
    assert_derived(scores, genotype, best)
    graphs = re.findall(r"```mermaid\n(.*?)```", (out / "cell.md").read_text(), re.S)
    for graph, cell in zip(graphs, (genotype.normal, genotype.reduce), strict=True):
        drawn = re.findall(r"^ *(\d) -->\|(\w+)\| (\d)$", graph, re.M)
        assert drawn == [(str(source), op, str(2 + i)) for i, node in enumerate(nodes_of(cell))
                         for op, source in node]

@each_search
def test_what_a_search_run_prints(script, runs, images):
    out, epochs = runs(script)[0], EPOCHS[script]
    text = (out.parent / "printed").read_text(encoding="utf-8")
    assert f"{images / 'train'}: 36 images of 2 classes: cats, dogs" in text
    assert f"method {script.METHOD}, " in text and ", lr 0.1, " in text
    shown = re.findall(r"^epoch +(\d+)/(\d+) ", text, re.M)
    assert shown == [(str(i + 1), str(epochs)) for i in range(epochs)]
    assert "\r" not in text and "\033" not in text  # a file, not a terminal
    if script is ddp_nas:  # a pruned operation more per edge and table
        assert [row["alive"] for row in read_log(out)] == [k for k in range(8, 1, -1)
                                                           for _ in range(k)]
        pattern = r"^ +none +max3 +avg3 .*\n((?:(?:normal|reduce) .{,72}\n){28})"
        tables = re.findall(pattern, text, re.M)
        assert [table.count(" x") for table in tables] == [28 * k for k in range(1, 8)]
    found, accuracy, last = text.splitlines()[-3:]
    assert found == json.loads((out / "genotype.json").read_text())["genotype"]
    assert re.fullmatch(r"validation accuracy of all 28 edges, of which the cells keep 16, in the "
                        r"supernet: [\d.]+%", accuracy)
    assert str(out / "genotype.json") in last

@each_script
def test_same_seed_same_run_and_the_rate_falls_by_a_cosine(script, runs, images, tmp_path):
    log, low = read_log(runs(script)[0]), 0.001 if script is ddp_nas else 0
    assert read_log(runs(script)[1]) == log[:2]
    for out, epochs in zip(runs(script), (len(log), 2)):
        for group in load(out / "checkpoint.pt")["optimizer"]["param_groups"]:
            lr = low + (0.1 - low) * (1 + math.cos(math.pi * epochs / EPOCHS[script])) / 2
            assert math.isclose(group["lr"], lr, abs_tol=1e-9)
            assert (group["momentum"], group["weight_decay"]) == (0.9, 3e-4)
    if script is not ddp_nas:
        argv = tiny(script, images, tmp_path / "run", "--epochs", 1, "--seed", 1)
        assert run(script, argv)[0] == 0 and read_log(tmp_path / "run")[0] != log[0]

def skip_training(script, monkeypatch, rates):
    """Epochs that train nothing, and append the learning rate to rates."""
    def train_epoch(network, optimizer, batches, sample):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        return 1.0
    accuracies = itertools.cycle([0.25, 0.5, 0.75])
    monkeypatch.setattr(script, "train_epoch", train_epoch)
    monkeypatch.setattr(script, "evaluate", lambda *args: next(accuracies))

@pytest.fixture
def short_backbone(monkeypatch):
    for script in SCRIPTS:
        monkeypatch.setitem(script.BACKBONES, "cpu", ([(8, 1), (8, 2), (12, 1)], 16))

@each_search
def test_mobile_search_run_and_summary_of_what_it_found(script, short_backbone, images, tmp_path):
    out = tmp_path / "run"
    argv = tiny_chain(script, images, out)
    assert run(script, argv)[0] == 0
    blocks, log = read_genotype(out), read_log(out)
    assert len(log) == (44 if script is ddp_nas else 12)
    assert all(len(row["sample"]) == 3 for row in log)
    scores, best = scores_by_hand(script, log, 3, 9)
    for i, (row, block) in enumerate(zip(scores, blocks, strict=True)):
        op = ddp_nas.CANDIDATES.index(block)
        assert op == best[i] if best else math.isclose(row[op], max(row))
    code, text, err = run(retrain, ["--genotype", out / "genotype.json", "--data-dir", images,
                                    "--device", "cpu", "--image-size", 8, "--summary"])
    count = count_chain(ddp_nas.BACKBONES["cpu"], blocks, 2)
    assert code == 0 and f" {count:,} parameters" in text, err

class Uniform:
    """A method of your own with what README's table asks for, and no more."""
    def __init__(self, num_edges, num_ops, seed, epochs, temperature, greedy):
        self.total_epochs, self.temperature, self.greedy = epochs, temperature, greedy
        self.recorded = 0
        self.probabilities = torch.full((num_edges, num_ops), 1 / num_ops)
        self.scores = self.probabilities

    def sample(self):
        return [3] * len(self.probabilities)

    def record(self, sample, accuracy):
        self.recorded += 1

    def best(self):
        return [4] * len(self.probabilities)

    def state_dict(self):
        return {"recorded": self.recorded}

    def load_state_dict(self, state):
        self.recorded = state["recorded"]

@each_search
def test_both_scripts_run_a_distribution_of_your_own_with_its_own_options(
        script, images, tmp_path, monkeypatch):
    skip_training(script, monkeypatch, [])
    made = []
    def make_uniform(*args, **more):
        made.append(Uniform(*args, **more))
        return made[-1]
    options = {"epochs": (10, "how long"), "temperature": (0.5, "100 % warm"),
               "greedy": (True, "or not")}
    argv = ["--device", "cpu", "--channels", "2", "--image-size", "8", "--batch-size", "96",
            "--temperature", "0", "--no-greedy"]
    monkeypatch.chdir(tmp_path)
    assert script.main(argv, make_uniform, options, "uniform") == 0
    assert (made[0].temperature, made[0].greedy, made[0].recorded) == (0, False, 10)
    genotype = read_genotype(tmp_path / "runs" / "uniform")
    assert {op for op, _ in genotype.normal} == {"sep_conv_3x3"}
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"], make_uniform, options, "uniform")
    assert stop.value.code == 0

@pytest.mark.parametrize("state", [np.mean([0.5]), deque([1])])
def test_a_state_that_resume_cannot_read_ends_the_run_at_its_first_checkpoint(
        state, images, tmp_path, monkeypatch):
    monkeypatch.setattr(mdenas.MultinomialDistribution, "state_dict", lambda self: {"own": state})
    with pytest.raises(TypeError, match="tensors, numbers, strings, lists and dicts"):
        run(mdenas, tiny(mdenas, images, tmp_path / "run"))
    assert read_log(tmp_path / "run") == []

# ==== the devices =================================================================================
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_script
def test_run_on_cuda(script, images, tmp_path):
    argv = tiny(script, images, tmp_path / "run", "--device", "cuda", *LENGTH[script])
    code, _, err = run(script, argv)
    assert code == 0 and len(read_log(tmp_path / "run")) == EPOCHS[script], err

def test_bfloat16_only_where_the_gpu_computes_in_it(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: seen.append((*args, more)))
    for native, device in itertools.product((False, True), ("cpu", "cuda", "mps")):
        def is_supported(including_emulation=True):
            return native or including_emulation
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
        ddp_nas.autocast(torch.device(device))
        enabled = native and device == "cuda"
        assert seen.pop() == ("cuda", torch.bfloat16, {"enabled": enabled}) and not seen

def test_gpus_that_are_not_there_are_refused(images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(mdenas, "LOCAL_RANK", 1)
    for device in ("cuda", "mps"):
        argv = tiny(mdenas, images, tmp_path / "run", "--device", device)
        assert_refused(mdenas, argv, tmp_path, f"--device {device}")

@pytest.mark.parametrize("told", [False, True])
def test_a_run_on_synthetic_images_takes_one_thread_unless_told_otherwise(
        told, tmp_path, monkeypatch):
    """In a thread, as a notebook may have it; main leaves everything as it was."""
    seen, codes, before = [], [], signal.getsignal(signal.SIGINT)
    skip_training(mdenas, monkeypatch, [])
    monkeypatch.setattr(mdenas, "evaluate", lambda *args: seen.append(torch.get_num_threads()) or 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    argv = ["--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    def target():
        torch.set_num_threads(2)  # of this thread
        codes.append(mdenas.main(argv))
        seen.append(torch.get_num_threads())
    thread = threading.Thread(target=target)
    with contextlib.redirect_stdout(io.StringIO()):  # which has no reconfigure()
        thread.start()
        thread.join()
    torch.set_num_threads(1)
    assert codes == [0] and seen == [*2 * [2 if told else 1], 2]
    assert signal.getsignal(signal.SIGINT) is before

# ==== several processes ===========================================================================
def test_a_step_sends_one_message_whatever_the_number_of_weights(monkeypatch):
    messages = []
    monkeypatch.setattr(retrain, "WORLD_SIZE", 2)
    monkeypatch.setattr(retrain.dist, "all_reduce", lambda flat: messages.append(flat.numel()))
    batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))] * 3
    args = Namespace(smoothing=0, auxiliary=0.4, cutout=0, clip=5)
    network = retrain.CellNetwork(retrain.random_genotype(0), 2, 3, 4, False, False)
    retrain.train_epoch(network, torch.optim.SGD(network.parameters(), 0.1), batches, args)
    norms = sum(buffer.numel() for buffer in network.buffers() if buffer.dim())
    assert messages == [*3 * [count_weights(network)], norms, 2]  # the loss and the norm come last

# ==== genotypes in the notation of the field ======================================================
# Two families as their repositories print them, and one nested.
DARTS = """DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
    ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0),
    ('skip_connect', 0),
    ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0),
    ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
    ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"""
PC_DARTS = """
  Genotype(
    normal=[
        ("sep_conv_3x3", 1), ("skip_connect", 0),  # the first node
        ("sep_conv_3x3", 0), ("dil_conv_3x3", 1),
        ("sep_conv_5x5", 0), ("sep_conv_3x3", 1), ("avg_pool_3x3", 0), ("dil_conv_3x3", 1),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("sep_conv_5x5", 1), ("max_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_5x5", 2),
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 3), ("sep_conv_3x3", 1), ("sep_conv_3x3", 2),
    ],
    reduce_concat=range(2, 6),
  )
"""
NESTED = """Genotype(normal=[[('sep_conv_5x5', 1), ('sep_conv_3x3', 0)], [('skip_connect', 0),
    ('sep_conv_5x5', 1)], [('sep_conv_5x5', 3), ('sep_conv_3x3', 1)], [('dil_conv_5x5', 3),
    ('max_pool_3x3', 4)]], normal_concat=range(2, 6), reduce=[[('max_pool_3x3', 0),
    ('sep_conv_5x5', 1)], [('skip_connect', 0), ('skip_connect', 1)], [('sep_conv_3x3', 3),
    ('skip_connect', 2)], [('dil_conv_3x3', 3), ('sep_conv_5x5', 0)]], reduce_concat=range(2, 6))"""
CHAIN = """[(7, 6), (5, 6), (7, 3), (3, 6), (5, 6), (3, 1), (7, 3), (7, 6), (3, 3), (3, 6),
    (7, 3), (3, 3), (3, 3), (5, 6)]"""

def flat_pairs(text):
    """All ('operation', source) of a text, in their order."""
    return [(name, int(source)) for name, source in
            re.findall(r"\(\s*['\"](\w+)['\"]\s*,\s*(\d)\s*\)", text)]

@pytest.mark.parametrize("text", [DARTS, PC_DARTS, NESTED])
def test_the_fields_texts_are_read(text, tmp_path):
    (tmp_path / "found (1).txt").write_text(text)
    for source in (text, str(tmp_path / "found (1).txt")):
        genotype, searched = retrain.load_genotype(source)
        assert genotype.normal + genotype.reduce == flat_pairs(text) and len(genotype.normal) == 8
        assert searched == {"dataset": "cifar10"}

@pytest.mark.parametrize("name, text", [("DARTS_V2", DARTS), ("MDENAS", NESTED),
                                        ("MDENAS_GPU", CHAIN)])
def test_published_names_are_their_texts(name, text):
    assert retrain.load_genotype(text) == retrain.load_genotype(name)

@each_search
def test_what_a_search_run_found_comes_back_as_the_same_network(script, runs):
    text = json.loads((runs(script)[0] / "genotype.json").read_text())["genotype"]
    found, searched = retrain.load_genotype(str(runs(script)[0] / "genotype.json"))
    assert "\n" not in text and str(found) == text == str(retrain.load_genotype(f"A = {text}")[0])
    assert searched == {"dataset": "imagefolder", "image_size": 8}

CELL = str(retrain.PUBLISHED["MDENAS"])
NORMAL_CELL = retrain.PUBLISHED["MDENAS"].normal
RAGGED = CELL.replace(str(NORMAL_CELL), str([NORMAL_CELL[:3], NORMAL_CELL[3:4], *nodes_of(
    NORMAL_CELL)[2:]]))  # 3, 1, 2 and 2 pairs

@pytest.mark.parametrize("text, words", [
    (CELL.replace("sep_conv_3x3', 0", "sep_conv_7x7', 0", 1), ["sep_conv_7x7", "sep_conv_5x5"]),
    (CELL.replace("sep_conv_3x3', 0", "none', 0", 1), ["none", "skip_connect"]),
    (CELL.replace("('sep_conv_5x5', 1), ", "", 1), ["8 edges", "not 7"]),
    (CELL.replace("reduce=[", "reduce=[('skip_connect', 0), ('skip_connect', 1), "), ["not 10"]),
    (CELL.replace("normal_concat=range(2, 6)", "normal_concat=[3, 4, 5]"), ["concat"]),
    (CELL.replace("reduce_concat=range(2, 6)", "reduce_concat=range(10**12)"), ["concat"]),
    (CELL.replace("('sep_conv_5x5', 1)", "('sep_conv_5x5', 2)", 1), ["node 2", "0 to 1"]),
    (CELL.replace("('sep_conv_5x5', 1)", "('sep_conv_5x5', -1)", 1), ["-1"]),
    (CELL.replace("('sep_conv_5x5', 1)", "('sep_conv_5x5', 1, 2)", 1), ["neither"]),
    (CELL.replace("normal=", "normal_bottleneck='', normal="), ["neither"]),
    (CELL[:-1], ["neither"]), ("Genotype()", ["neither"]),
    ("Genotype(normal=5, normal_concat=range(2, 6), reduce=5, reduce_concat=range(2, 6))",
     ["neither"]),
    ("Genotype(normal=open('x'), normal_concat=[2, 3, 4, 5], reduce=1, reduce_concat=[2, 3, 4, 5])",
     ["neither"]),
    (f"A = {CELL}\nB = {CELL}", ["neither"]), (RAGGED, ["neither"]),
    ("[" * 5000, ["neither"]), ("[(7, 6)]", ["14", "20", "not 1"]),
    (CHAIN.replace("(7, 6)", "(7, 2)"), ["(7, 2)", "(7, 3)"]), ("[5] * 14", ["neither"])])
def test_text_that_is_no_genotype_of_the_space(text, words, tmp_path):
    argv = ["--device", "cpu", "--out", tmp_path / "run", "--genotype"]
    (tmp_path / "found.txt").write_text(text)
    for source in (text, tmp_path / "found.txt"):
        assert_refused(retrain, [*argv, source], tmp_path, *words)

@pytest.mark.parametrize("content", [
    "{", "{}", '{"genotype": 5, "settings": {}}', json.dumps({"genotype": CELL, "settings": {
        "dataset": "mnist", "image_size": 8}})])
def test_file_that_is_no_result_of_a_search(content, tmp_path):
    (tmp_path / "found.json").write_text(content)
    argv = ["--genotype", tmp_path / "found.json", "--device", "cpu", "--out", tmp_path / "run"]
    assert_refused(retrain, argv, tmp_path, tmp_path / "found.json")

# ==== training and testing a network ==============================================================
@pytest.mark.parametrize("argv, size, expected", [
    ("MDENAS", (36, 20), (600, 96, 0.025, "cosine", 3e-4, 3e-4, 5, 0, 0.4, 0.2, 0.5)),
    ("MDENAS --dataset cifar100", (36, 20),
     (600, 96, 0.025, "cosine", 3e-4, 3e-4, 5, 0, 0.4, 0.2, 0.5)),
    ("MDENAS --large", (44, 20), (1800, 96, 0.025, "cosine", 3e-4, 3e-4, 5, 0, 0.4, 0.2, 0.5)),
    ("MDENAS --large --channels 8 --epochs 2 --lr 1", (8, 20),
     (2, 96, 1, "cosine", 3e-4, 3e-4, 5, 0, 0.4, 0.2, 0.5)),
    ("MDENAS --dataset imagenet", (48, 14), (250, 512, 0.1, 0.97, 3e-5, 3e-5, 5, 0.1, 0.4, 0, 0)),
    ("MDENAS --image-size 28 --dataset imagefolder --summary", (36, 20),
     (600, 1, 0.025, "cosine", 3e-4, 3e-4, 5, 0, 0, 0.2, 0.5)),
    ("MDENAS_CPU", (None, None), (120, 1024, 0.4, "cosine", 4e-5, 0, math.inf, 0.1, 0, 0, 0)),
    ("MDENAS_CPU --batch-size 256", (None, None),
     (120, 256, 0.1, "cosine", 4e-5, 0, math.inf, 0.1, 0, 0, 0)),
    ("MDENAS_CPU --batch-size 256 --lr 0.3", (None, None),
     (120, 256, 0.3, "cosine", 4e-5, 0, math.inf, 0.1, 0, 0, 0))])
def test_recipes_are_those_of_the_papers(argv, size, expected):
    args = parse(retrain, ["--device", "cpu", "--genotype", *argv.split()])
    names = ("epochs batch_size lr lr_decay weight_decay norm_decay clip smoothing auxiliary "
             "drop_path cutout").split()
    assert tuple(getattr(args, name) for name in names) == expected
    assert (args.channels, args.cells) == size

def test_a_genotype_brings_its_data_set_unless_told_otherwise(runs):
    path = runs(mdenas)[0] / "genotype.json"
    for more, expected in (([], ("imagefolder", 8)), (["--image-size", 12], ("imagefolder", 12)),
                           (["--dataset", "cifar100"], ("cifar100", 32)),
                           (["--dataset", "synthetic"], ("synthetic", 16))):
        args = parse(retrain, ["--genotype", path, "--device", "cpu", *more])
        assert (args.dataset, args.image_size) == expected

def test_drop_path_grows_with_the_epochs_in_a_run_of_the_large_setting(
        images, tmp_path, monkeypatch):
    seen, train_epoch = [], retrain.train_epoch
    def train_and_tell(network, *args):
        seen.append(float(network.drop_path))
        return train_epoch(network, *args)
    monkeypatch.setattr(retrain, "train_epoch", train_and_tell)
    argv = tiny(retrain, images, tmp_path / "run", "--large", "--epochs", 4)
    code, _, err = run(retrain, argv)
    assert code == 0 and np.allclose(seen, [0, 0.05, 0.1, 0.15]), err

def test_imagenet_decay_spares_mobile_norms_and_rates_follow_batch_and_epoch_of_a_run(
        short_backbone, images, tmp_path):
    argv = ["--dataset", "imagenet", "--data-dir", images, "--device", "cpu", "--workers", 0,
            "--batch-size", 8, "--image-size", 32, "--epochs", 2, "--out"]
    assert run(retrain, [*argv, tmp_path / "mobile", "--genotype", "random:0:cpu"])[0] == 0
    state = load(tmp_path / "mobile" / "checkpoint.pt")
    network, optimizer = state["network"], state["optimizer"]
    decayed, norms = optimizer["param_groups"]
    assert (decayed["weight_decay"], norms["weight_decay"]) == (4e-5, 0)
    assert norms["initial_lr"] == 0.4 * 8 / 1024
    weights = [name for name in network if name.endswith(("weight", "bias"))]
    is_norm = lambda name: name.rsplit(".", 1)[0] + ".running_mean" in network
    for group, chosen in ((decayed, False), (norms, True)):
        momenta = [optimizer["state"][i]["momentum_buffer"] for i in group["params"]]
        assert [momentum.shape for momentum in momenta] == [
            network[name].shape for name in weights if is_norm(name) == chosen]
    argv += [tmp_path / "cells", "--genotype", "MDENAS", "--channels", 2, "--cells", 3]
    assert run(retrain, argv)[0] == 0
    for group in load(tmp_path / "cells" / "checkpoint.pt")["optimizer"]["param_groups"]:
        assert math.isclose(group["lr"], 0.1 * 0.97**2) and group["weight_decay"] == 3e-5

def test_training_run_and_its_checkpoint_tested_alone(runs, images):
    out = runs(retrain)[0]
    log = read_log(out)
    assert [row["epoch"] for row in log] == list(range(1, 7))
    assert all("top5_error" not in row for row in log)
    assert {path.name for path in files(out)} == {"checkpoint.pt", "log.jsonl"}
    argv = ["--evaluate", out / "checkpoint.pt", "--data-dir", images, "--device", "cpu"]
    for text in (run(retrain, argv)[1], (out.parent / "printed").read_text(encoding="utf-8")):
        assert f"top-1 error {log[-1]['top1_error']:.2%}" in text.splitlines()[-1]

def test_weights_of_others_load_by_position(runs, images, tmp_path):
    ours, path = load(runs(retrain)[0] / "checkpoint.pt")["network"], tmp_path / "theirs.pth"
    theirs = {f"module.part{i}.{name.split('.')[-1]}": value
              for i, (name, value) in enumerate(ours.items())}
    argv, names = tiny(retrain, images, tmp_path, "--evaluate", path), list(theirs)
    error = read_log(runs(retrain)[0])[-1]["top1_error"]
    for saved in (theirs, ours, *({"epoch": 3, name: theirs} for name in
                                  ("state_dict", "model", "model_state_dict", "net"))):
        torch.save(saved, path)
        code, text, err = run(retrain, argv)
        assert code == 0 and f"top-1 error {error:.2%}" in text, err
    for damaged, words in [
            ({name: theirs[name] for name in names if name != names[8]}, [names[9], list(ours)[8]]),
            ({**theirs, names[6]: torch.ones(5, 6, 1, 1)}, [names[6], [5, 6, 1, 1]]),
            ({name: theirs[name] for name in names[:-1]}, [len(ours) - 1, len(ours)])]:
        torch.save({"state_dict": damaged}, path)
        assert_refused(retrain, argv, tmp_path, path, *words)
    assert_refused(retrain, ["--evaluate", path, "--device", "cpu"], tmp_path, path, "--genotype")

def test_summary_against_arithmetic(tmp_path):
    pairs = 4 * [("dil_conv_3x3", 0), ("dil_conv_3x3", 1)]
    genotype = str(retrain.Genotype(pairs, range(2, 6), pairs, range(2, 6)))
    argv = ["--genotype", genotype, "--dataset", "synthetic", "--channels", 32, "--cells", 3,
            "--device", "cpu", "--summary"]  # 16 x 16 images of 10 classes
    code, text, err = run(retrain, argv)
    edges = lambda c: 8 * (9 * c + c * c)  # depthwise and 1x1
    parts = [(256, 27 * 96 + 2 * 96 * 32 + edges(32)),  # stem, normal cell; then two reductions
             (256, 96 * 64 + 128 * 64), (64, edges(64)), (64, 128 * 128 + 256 * 128),
             (16, edges(128)), (1, 512 * 10)]
    norms = 96 + 10 * (32 + 64 + 128)  # two of preprocessing and 8 of edges a cell
    count = sum(weights for _, weights in parts) + 2 * norms + 10
    operations = sum(pixels * weights for pixels, weights in parts)
    assert code == 0 and f" {count:,} parameters, {operations / 1e6:.1f} M" in text, (text, err)
    assert "float32, cpu, 1 CPU threads" in text

# ==== the network in a program of your own ========================================================
@pytest.mark.parametrize("name", ["random:0", "random:0:cpu"])
def test_readme_classifies_with_the_network_of_a_run_and_exports_it(
        name, short_backbone, images, tmp_path, monkeypatch, capsys):
    size = ["--image-size", 32] + (["--channels", 2, "--cells", 3] if name == "random:0" else [])
    argv = ["--genotype", name, "--dataset", "imagefolder", "--data-dir", images, "--epochs", 1,
            "--batch-size", 8, "--workers", 0, "--device", "cpu", "--out", tmp_path / "run", *size]
    assert run(retrain, argv)[0] == 0  # images of 32 pixels: with an auxiliary head
    path = tmp_path / "run" / "checkpoint.pt"
    assert any(key.startswith("auxiliary") for key in load(path)["network"]) == (name == "random:0")
    network, classes, preprocess = retrain.load_network(path)
    assert classes == ["cats", "dogs"] and not network.training
    paths = sorted((images / "val").rglob("*.png"))
    inputs = torch.stack([preprocess(Image.open(path)) for path in paths])
    logits = network(inputs)
    error = (logits.argmax(1) != torch.arange(14) // 7).double().mean().item()
    assert error == pytest.approx(read_log(tmp_path / "run")[-1]["top1_error"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["classify.py", str(path), str(paths[0])])
    exec(USE, {})
    shown = re.fullmatch(r"(cats|dogs): (\d+\.\d)%\n", capsys.readouterr().out)
    assert shown[1] == classes[logits[0].argmax()]
    if name == "random:0:cpu" and torch.__version__.startswith("2.4."):
        pytest.skip("this torch cannot load what it has exported of a chain of blocks")
    exported = torch.export.load("network.pt2").module()
    for count in (1, 2, 5):
        torch.testing.assert_close(exported(inputs[:count]), logits[:count], rtol=1e-4, atol=1e-5)

def test_preprocessing_is_that_of_the_test(images, large_images, tmp_path):
    for dataset, folder, size in (("imagefolder", images, 8), ("imagefolder", large_images, 72)):
        args = settings(dataset=dataset, data_dir=folder, image_size=size)
        opened = retrain.open_images(args, train=False)
        batches = retrain.Batches(opened, torch.arange(len(opened)), 4, args, train=False)
        tested = torch.cat([images for images, _ in batches])
        genotype = str(retrain.random_genotype(0))
        network = retrain.build_network(retrain.random_genotype(0), dataset, 2, 2, 3)
        torch.save({"network": network.state_dict(), "settings": {"method": "retrain",
            "genotype": genotype, "dataset": dataset, "image_size": size, "channels": 2,
            "cells": 3, "classes": ["cats", "dogs"]}}, tmp_path / "checkpoint.pt")
        _, _, preprocess = retrain.load_network(tmp_path / "checkpoint.pt")
        paths = sorted((folder / "val").rglob("*.png"))
        ours = torch.stack([preprocess(Image.open(path)) for path in paths])
        torch.testing.assert_close(ours, tested)
    resized = Image.open(paths[0]).resize((82, 82), Image.Resampling.BILINEAR)  # 256 for 224
    pixels = np.asarray(resized.crop((5, 5, 77, 77))) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(ours[0].permute(1, 2, 0), expected, atol=1e-5)
    with pytest.raises(ValueError, match="8 bits"):
        preprocess(Image.fromarray(np.full((90, 90), 1000, np.uint16)))

def test_no_network_is_loaded_from_a_search_run(runs):
    with pytest.raises(retrain.UserError, match="search"):
        retrain.load_network(runs(ddp_nas)[0] / "checkpoint.pt")

# ==== two processes ===============================================================================
TWO_RANKS = """
import sys
from argparse import Namespace
from pathlib import Path
import torch, torch.distributed as dist
import ddp_nas, mdenas, retrain
from test_nas import make_linear

here, images, rank = Path(sys.argv[1]), sys.argv[2], ddp_nas.RANK
common = ["--device", "cpu", "--dataset", "imagefolder", "--data-dir", images, "--workers", "0",
          "--image-size", "8", "--batch-size", "18", "--lr", "0.1"]
cells, ddp_nas.BACKBONES["gpu"] = ["--channels", "2", "--cells", "3"], ([(8, 1), (8, 2)], 16)
ddp_nas.start_processes(Namespace(device="cpu", dataset="", method=""))  # one for all runs
dist.init_process_group = dist.destroy_process_group = lambda *args: None
for script, more in ((ddp_nas, ["--passes", "1", "--space", "mobile"]),
                     (mdenas, ["--epochs", "4", *cells]),
                     (retrain, ["--epochs", "3", "--genotype", "random:0", *cells])):
    def save_and_tell(args, settings, parts, log, save=script.save_checkpoint):
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"log": log, **states}, here / f"{args.out.name}_{rank}.pt")
        save(args, settings, parts, log)
    script.save_checkpoint = save_and_tell
    assert script.main([*common, *more, "--out", str(here / script.METHOD)]) == 0

# Three steps without BatchNorm, each rank on its own half of a batch.
data, network = torch.load(here / "batch.pt", weights_only=True), make_linear()
network.load_state_dict(data["weights"])
optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
batches = [(scale * data["images"][rank::2], data["labels"][rank::2]) for scale in (1, 30, 1)]
ddp_nas.train_epoch(network, optimizer, batches, None)
torch.save(network.state_dict(), here / f"steps_{rank}.pt")

sys.exit(mdenas.main([*common, *cells, "--seed", str(rank), "--out", str(here / "differ")]))
"""

class Linear(nn.Linear):
    def forward(self, images, sample):
        return super().forward(images.flatten(1))

def make_linear():
    return Linear(12, 3)

@pytest.fixture(scope="module")
def two_ranks(images, tmp_path_factory):
    """All of the above -> its folder, the network at first, and what was printed."""
    folder, network = tmp_path_factory.mktemp("two_ranks"), make_linear()
    torch.save({"weights": network.state_dict(), "images": torch.randn(10, 3, 2, 2),
                "labels": torch.randint(3, (10,))}, folder / "batch.pt")
    (folder / "two_ranks.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "two_ranks.py", folder, images]
    done = subprocess.run(command, env=ENV, cwd=folder, capture_output=True, text=True, timeout=100)
    return folder, network, done

def test_a_run_with_other_options_is_ended_by_the_process_that_has_them(two_ranks):
    folder, _, done = two_ranks
    assert done.returncode != 0 and not (folder / "differ" / "log.jsonl").exists()
    assert "error: seed is 1 in process 1, but 0 in process 0\n" in done.stderr

@pytest.mark.parametrize("script, epochs", [(ddp_nas, 44), (mdenas, 4), (retrain, 3)])
def test_two_ranks_of_a_run_hold_the_same_and_tell_it_once(script, epochs, two_ranks, images):
    out = two_ranks[0] / script.METHOD
    log, states = read_log(out), [load(f"{out}_{rank}.pt") for rank in (0, 1)]
    for state in states:
        for row in state["log"]:
            del row["seconds"]
        assert state.pop("log") == log
    assert same(*states) and len(log) == epochs
    shown = re.findall(rf"^epoch +\d+/{epochs} ", two_ranks[2].stdout, re.M)
    assert len(shown) == epochs
    if script is retrain:  # the same errors as one process finds
        argv = ["--evaluate", out / "checkpoint.pt", "--data-dir", images, "--device", "cpu"]
        assert f"top-1 error {log[-1]['top1_error']:.2%}" in run(retrain, argv)[1]
    else:
        right = [row["accuracy"] * 18 for row in log]
        assert np.allclose(right, np.round(right)) and 9 < max(right) <= 18  # counted on both

def test_steps_of_two_ranks_are_those_of_one_process_on_the_whole_batch(two_ranks):
    (folder, network, _), data, clipped = two_ranks, load(two_ranks[0] / "batch.pt"), []
    weights, momenta = list(network.parameters()), [0, 0]
    for scale in (1, 30, 1):
        loss = F.cross_entropy(network(scale * data["images"], None), data["labels"])
        grads = torch.autograd.grad(loss, weights)
        norm = math.sqrt(sum((grad**2).sum().item() for grad in grads))
        momenta = [0.9 * momentum + grad * min(1, 5 / norm)
                   for momentum, grad in zip(momenta, grads)]
        for weight, momentum in zip(weights, momenta):
            weight.data.sub_(0.1 * momentum)
        clipped.append(norm > 5)
    assert clipped[:2] == [False, True]
    for rank in (0, 1):
        torch.testing.assert_close(load(folder / f"steps_{rank}.pt"), network.state_dict())

# ==== two machines ================================================================================
def start_two_machines(folder, argv_of_rank):
    """mdenas.py twice in a folder that both see, with the environment of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        env = {**ENV, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
        command = [sys.executable, HERE / "mdenas.py", *map(str, argv_of_rank(rank))]
        processes.append(subprocess.Popen(command, cwd=folder, env=env, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes

def test_a_run_on_two_machines_is_killed_and_resumed(two_ranks, images, tmp_path):
    """The result is that of two processes on one machine."""
    argv = tiny(mdenas, images, "run", "--batch-size", 18, "--epochs", 4, "--resume")
    machines = start_two_machines(tmp_path, lambda rank: argv)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert machines[0].poll() is None, machines[0].communicate()
        time.sleep(0.01)
    for machine in machines:
        machine.kill()
        machine.communicate()
    assert 0 < len(read_log(tmp_path / "run")) < 4
    for machine in start_two_machines(tmp_path, lambda rank: argv):
        _, err = machine.communicate(timeout=100)
        assert machine.returncode == 0, err
    assert_same_run(tmp_path / "run", two_ranks[0] / "mdenas")

def test_what_differs_between_processes_is_named(runs, images, tmp_path, monkeypatch):
    """Image files, and the epochs in the checkpoint; process 0 has what it was before."""
    def pretend_process_0_has(facts):
        monkeypatch.setattr(mdenas, "WORLD_SIZE", 2)
        monkeypatch.setattr(mdenas.dist, "broadcast_object_list",
                            lambda objects: objects.__setitem__(0, facts))
    args = settings(dataset="imagefolder", data_dir=images)
    names = {f"image {18 * label + i}": f"{os.sep}{name}{os.sep}{i:02}.png"
             for label, name in enumerate(("cats", "dogs")) for i in range(18)}
    names["image 18"] = "other.png"
    pretend_process_0_has({"number of images": 36, **names})
    with pytest.raises(mdenas.UserError, match="^image 18 is .dogs.00.png in .*, but other"):
        mdenas.open_images(args, train=True)
    pretend_process_0_has({"number of images": 37, **names})
    with pytest.raises(mdenas.UserError, match="^number of images is 36 in process 0, but 37"):
        mdenas.open_images(args, train=True)
    pretend_process_0_has({"number of epochs in --out": 3})
    args = parse(mdenas, tiny(mdenas, images, tmp_path))
    with pytest.raises(mdenas.UserError, match="^number of epochs in --out is 0 in .*, but 3"):
        mdenas.load_checkpoint(args, {}, {})

# ==== nothing lost ================================================================================
@each_script
def test_a_run_killed_at_any_moment_resumes_to_the_same_result(
        script, runs, images, tmp_path, monkeypatch):
    """After two epochs; in an epoch, before and after each file is put in place."""
    finished, out = runs(script)[0], shutil.copytree(runs(script)[1], tmp_path / "run")
    argv, replace = tiny(script, images, out, "--resume"), os.replace
    for number in range(1, 5) if script is not ddp_nas else [2]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing(number, replace, Killed()))
            with pytest.raises(Killed):
                run(script, argv)
        before = len(load(out / "checkpoint.pt")["log"])
        assert len(read_log(out)) in (before, before + 1)  # the log is written first
    if script is mdenas:
        with monkeypatch.context() as patch:
            patch.setattr(script, "draw_cells", lambda *args: fail(Killed()))
            with pytest.raises(Killed):
                run(script, argv)
    left = EPOCHS[script] - len(load(out / "checkpoint.pt")["log"])
    code, text, err = run(script, argv)
    assert code == 0 and len(re.findall("^epoch ", text, re.M)) == left, err
    assert_same_run(out, finished)
    assert run(script, argv)[0] == 0  # there is nothing left to do
    assert_same_run(out, finished)

def test_resume_starts_a_run_where_there_is_none(images, tmp_path, monkeypatch):
    """Also where one was killed before its first checkpoint; files of others are left alone."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "slurm-17.out").write_text("of the scheduler")
    monkeypatch.setattr(mdenas, "train_epoch", lambda *args: fail(Killed()))
    for more in ([], ["--resume"]):
        with pytest.raises(Killed):
            run(mdenas, tiny(mdenas, images, out, *more))
        assert {path.name for path in files(out)} == {"slurm-17.out", "log.jsonl"}
    monkeypatch.undo()
    assert run(mdenas, tiny(mdenas, images, out, "--resume"))[0] == 0 and len(read_log(out)) == 12

@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_of_two_runs_that_begin_at_once_one_is_refused(more, images, tmp_path, monkeypatch):
    argv, open_images = tiny(mdenas, images, tmp_path / "run", *more), mdenas.open_images
    def and_meanwhile_another(*args, **options):
        monkeypatch.undo()
        assert run(mdenas, argv)[0] == 0
        return open_images(*args, **options)
    monkeypatch.setattr(mdenas, "open_images", and_meanwhile_another)
    code, _, err = run(mdenas, argv)
    rows = read_log(tmp_path / "run")
    assert (code == 2 and "log.jsonl" in err) if not more else code == 0, err
    assert len(rows) == 12 and len(load(tmp_path / "run" / "checkpoint.pt")["log"]) == 12

def test_resume_of_a_run_is_exact_with_workers_drop_path_and_cutout(
        large_images, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    argv = lambda out, workers: tiny(retrain, large_images, out, "--image-size", 72, "--epochs", 4,
                                     "--batch-size", 4, "--workers", workers)
    assert run(retrain, argv(whole, 1))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(retrain, "train_epoch", failing(3, retrain.train_epoch, Killed()))
        with pytest.raises(Killed):
            run(retrain, argv(stopped, 0))
    assert len(read_log(stopped)) == 2 and run(retrain, [*argv(stopped, 1), "--resume"])[0] == 0
    assert_same_run(stopped, whole)

@each_script
@pytest.mark.parametrize("fault", ["first step", "full disk"])
def test_a_fault_in_the_third_epoch_of_a_run_keeps_the_last_checkpoint(
        script, runs, images, tmp_path, monkeypatch, fault):
    """Weights become not-a-number; or the disk is full."""
    out, step, calls = tmp_path / "run", torch.optim.SGD.step, itertools.count(1)
    batches = 4 if script is retrain else 2
    def spoiling(optimizer, *args):
        step(optimizer, *args)
        if next(calls) == 2 * batches + 1:
            nn.init.constant_(optimizer.param_groups[0]["params"][-1], math.nan)
    def write_bytes(path, data, write=Path.write_bytes):
        if path.name == "log.jsonl.tmp" and len(read_log(out)) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)
    if fault == "full disk":
        monkeypatch.setattr(Path, "write_bytes", write_bytes)
    else:
        monkeypatch.setattr(torch.optim.SGD, "step", spoiling)
    code, _, err = run(script, tiny(script, images, out))
    words = [out, "No space left"] if fault == "full disk" else ["not finite", "--lr"]
    assert code == 2 and len(err.splitlines()) == 1, err
    assert all(str(word) in err for word in words), err
    assert_same_run(out, runs(script)[1])

@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, "interrupted: .* --resume"),
    (torch.OutOfMemoryError("CUDA: 2 GiB"), 2, "error: lower .*-size: CUDA: 2 GiB"),
    (RuntimeError("bad shape"), None, ""), (FileNotFoundError("table.npy"), None, "")], ids=repr)
def test_how_an_error_ends_a_run(error, code, words, images, tmp_path, monkeypatch):
    """Ctrl-C and a full GPU with a line; an error of the code with its traceback."""
    monkeypatch.setattr(mdenas.MultinomialDistribution, "record", lambda *args: fail(error))
    argv = tiny(mdenas, images, tmp_path / "run")
    if code is None:
        with pytest.raises(type(error)) as raised:
            run(mdenas, argv)
        assert raised.value is error
    else:
        ended, _, err = run(mdenas, argv)
        assert ended == code and re.fullmatch(words + ".*\n", err), err

def test_a_terminal_that_lacks_a_character_stops_no_run(images, tmp_path):
    argv = [str(arg) for arg in tiny(mdenas, images, tmp_path / "s_größe")]
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(terminal):
        assert mdenas.main(argv) == 0
    terminal.seek(0)
    assert "###" in terminal.read() and read_genotype(tmp_path / "s_größe")

# ==== resuming what cannot be resumed =============================================================
@each_script
@pytest.mark.parametrize("name, before, now", [
    ("lr", 0.1, 0.05), ("channels", 2, 4), ("image-size", 8, 12), ("of its own", None, None)])
def test_resume_of_a_run_under_other_settings_is_refused(script, runs, images, name, before, now):
    if before is None:
        name, before, now = {ddp_nas: ("passes", 1, 2), mdenas: ("alpha", 0.01, 0.02),
                             retrain: ("genotype", "Genotype", "random:1")}[script]
    begun = runs(script)[1]
    argv = tiny(script, images, begun, "--resume", "--" + name, now)
    words = [f"{name.replace('-', '_')} is {now} in this command, but {before} in {begun}"]
    if name == "genotype":
        words = ["genotype is Genotype(", "in this command, but Genotype("]
    assert_refused(script, argv, begun, *words)

@each_script
def test_resume_of_the_run_of_another_script_is_refused(script, runs, images):
    for other in set(SCRIPTS) - {script}:
        argv = tiny(script, images, runs(other)[1], "--resume")
        assert_refused(script, argv, runs(other)[1], f"method is {script.METHOD}", other.METHOD)

def test_resume_of_a_run_with_other_images_or_processes_is_refused(
        runs, images, tmp_path, monkeypatch):
    begun, other = runs(retrain)[1], Path(shutil.copytree(images, tmp_path / "other"))
    argv = tiny(retrain, other, begun, "--resume")
    (other / "train" / "cats" / "00.png").unlink()
    assert_refused(retrain, argv, begun, "images is 35 in this command, but 36 in")
    shutil.copy(other / "train" / "cats" / "01.png", other / "train" / "cats" / "00.png")
    for half in ("train", "val"):
        (other / half / "cats").rename(other / half / "wolves")
    assert_refused(retrain, argv, begun, "classes", "cats", "wolves", begun / "checkpoint.pt")
    argv = ["--evaluate", begun / "checkpoint.pt", "--data-dir", other, "--device", "cpu"]
    assert_refused(retrain, argv, begun, "classes", "cats", "wolves")
    assert_refused(retrain, [*argv, "--genotype", "random:1"], begun, "genotype is Genotype(")
    monkeypatch.setattr(retrain, "WORLD_SIZE", 2)
    for name in ("start_processes", "same_everywhere"):
        monkeypatch.setattr(retrain, name, lambda *args: None)
    assert_refused(retrain, tiny(retrain, images, begun, "--resume"), begun,
                   "processes is 2 in this command, but 1 in ")

def trap(path):
    """Unpickled, it makes a folder."""
    return type("Trap", (), {"__reduce__": lambda self: (os.mkdir, (str(path),))})()

DAMAGES = {
    "cut": lambda path, sprung: os.truncate(path, path.stat().st_size // 2),
    "text": lambda path, sprung: path.write_text("no checkpoint"),
    "list": lambda path, sprung: torch.save([1, 2], path),
    "module": lambda path, sprung: torch.save(nn.Linear(2, 2), path),
    "code": lambda path, sprung: torch.save({**load(path), "network": trap(sprung)}, path),
    "bare pickle": lambda path, sprung: path.write_bytes(
        pickle.dumps({"settings": {}, "network": trap(sprung)}, 2)),
}

@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_of_a_run_is_refused_and_code_in_it_does_not_run(
        runs, images, tmp_path, damage):
    out, sprung = Path(shutil.copytree(runs(retrain)[1], tmp_path / "run")), tmp_path / "sprung"
    checkpoint = out / "checkpoint.pt"
    DAMAGES[damage](checkpoint, sprung)
    for argv in (tiny(retrain, images, out, "--resume"),
                 ["--evaluate", checkpoint, "--data-dir", images, "--device", "cpu"]):
        assert_refused(retrain, argv, out, checkpoint, "damaged", "state_dict")
    assert not sprung.exists()
    if damage == "code":  # the trap is a real one
        torch.load(checkpoint, weights_only=False)
        assert sprung.exists()

# ==== bad input ===================================================================================
@each_script
def test_a_folder_that_holds_a_run_is_refused(script, runs, images, tmp_path):
    for out in runs(script):
        assert_refused(script, tiny(script, images, out), out, out, "log.jsonl", "--resume")
    (tmp_path / "file").write_text("something else")
    for out in ("file", "file/run"):
        assert_refused(script, tiny(script, images, tmp_path / out), tmp_path, tmp_path / "file")

COMMON = {"batch-size": [0, -8, "many", 37, 1], "image-size": [0, 10], "lr": [-0.1, "nan", "inf"],
          "seed": [-1, 2**32], "workers": [-1], "dataset": ["mnist"], "channels": [0, 1],
          "cells": [2], "chan": [4], "device": ["tpu"]}
OPTIONS = {ddp_nas: {"space": ["outer"], "batch-size": [19], "passes": [0, -3, 1.5]},
           mdenas: {"epochs": [0], "alpha": [-0.1, "nan"]}, retrain: {"epochs": [0]}}

@each_script
def test_options_out_of_range(script, images, tmp_path, monkeypatch):
    argv = tiny(script, images, tmp_path / "run")
    for name, values in [*COMMON.items(), *OPTIONS[script].items()]:
        for value in values:
            code, _, err = run(script, [*argv, "--" + name, value])
            line = err.splitlines()[-1]
            assert code == 2 and (f"--{name}" in line or "epochs finds nothing" in line), err
    assert_refused(script, [*argv, "--dataset", "cifar10", "--image-size", 16], tmp_path, "CIFAR")
    chain = ["--genotype", "random:0:gpu"] if script is retrain else ["--space", "mobile"]
    assert_refused(script, [*argv, *chain], tmp_path, "--channels 2 --cells 3")
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    with pytest.raises(script.UserError, match="--batch-size 8 must be a multiple of 3"):
        script.check_batch_size(8, 100)
    with pytest.raises(script.UserError, match="--batch-size 3 .* 2 images"):
        script.check_batch_size(3, 100)
    script.check_batch_size(6, 6)

@each_script
def test_help_shows_the_defaults_of_the_data_set_and_needs_no_file(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    papers = {ddp_nas: (16, 8, 32, 512, 0.025), mdenas: (16, 6, 32, 512, 0.025),
              retrain: (36, 20, 32, 96, 0.025)}[script]
    synthetic = (8, 5 if script is retrain else 3, 16, 32, 0.1)
    for argv, expected in (([], synthetic), (["--dataset", "cifar10"], papers)):
        code, text, _ = run(script, [*argv, "--help"])
        text = " ".join(text.split("options:")[1].split())
        assert code == 0 and "default: runs/" in text and "default: data)" in text
        shown = [re.search(rf"--{name}.*?\(default: (.*?)\)", text)[1] for name in
                 ("channels CH", "cells CE", "image-size PI", "batch-size BA", "lr LR")]
        assert [float(value) for value in shown] == [*expected]

@each_script
def test_bad_folders_of_images(script, tmp_path):
    argv, train = tiny(script, tmp_path, tmp_path / "run"), tmp_path / "train"
    assert_refused(script, argv, tmp_path, "--data-dir", train)
    train.mkdir()
    assert_refused(script, argv, tmp_path, train, "none")
    write_images(train, classes=["cats"])
    assert_refused(script, argv, tmp_path, train, "two or more", "cats")
    write_images(train, classes=["dogs"])
    (train / "birds").mkdir()
    assert_refused(script, argv, tmp_path, "birds")
    (train / "birds").rmdir()
    write_images(tmp_path / "val", classes=["cats", "wolves"])
    if script is retrain:
        assert_refused(script, argv, tmp_path, "in val", "dogs", "wolves")

@pytest.mark.parametrize("size, workers", [(8, 0), (72, 1)])
def test_bad_images_are_named(size, workers, short_backbone, tmp_path):
    write_images(tmp_path / "train", count=4, size=90)
    argv = tiny_chain(mdenas, tmp_path, tmp_path / "run", "--image-size", size, "--batch-size", 4,
                      "--epochs", 1, "--workers", workers)
    assert run(mdenas, argv)[0] == 0
    buffer = io.BytesIO()
    Image.fromarray(np.full((90, 90), 1000, np.uint16)).save(buffer, "png")  # 16 bits
    for content in (b"no image", buffer.getvalue()):
        for culprit in (tmp_path / "train").rglob("*.png"):
            culprit.write_bytes(content)
        code, _, err = run(mdenas, [*argv, "--resume", "--epochs", 2, "--out", tmp_path / "new"])
        train = re.escape(str(tmp_path / "train"))
        assert code == 2
        assert re.fullmatch(rf"error: {train}.\w+.\d+\.png cannot be read .*\n", err), err

@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   OSError("no route to host"), None])
def test_cifar_that_cannot_be_downloaded_says_why(error, tmp_path, monkeypatch):
    """None: it is downloaded, and is not what it should be."""
    data = tmp_path / "data"
    download = "torchvision.datasets.cifar.download_and_extract_archive"
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **more: fail(error))
    if not error:
        monkeypatch.setattr(download, lambda *args, **more: None)
    code, _, err = run(mdenas, ["--dataset", "cifar100", "--device", "cpu", "--data-dir", data,
                                "--out", tmp_path / "run"])
    line = err.splitlines()[-1]
    assert code == 2 and "Traceback" not in err
    assert line.startswith(f"error: --data-dir {data}: CIFAR100 cannot be read")
    assert (error.strerror or "no route to host" if error else "corrupted") in line

@pytest.mark.parametrize("dataset, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_as_its_files_have_it(dataset, classes, tmp_path, monkeypatch):
    """Files of 20 images a batch, in the layout of the data set."""
    name = dataset.upper()
    folder = tmp_path / getattr(retrain.torchvision.datasets, name).base_folder
    folder.mkdir()
    draw, expected = np.random.default_rng(0), {True: [], False: []}
    key, meta, parts = (("labels", "batches.meta", [f"data_batch_{i}" for i in range(1, 6)])
                        if classes == 10 else ("fine_labels", "meta", ["train"]))
    for part in (*parts, "test_batch" if classes == 10 else "test"):
        pixels = draw.integers(256, size=(20, 3072), dtype=np.uint8)
        labels = draw.integers(classes, size=20).tolist()
        (folder / part).write_bytes(pickle.dumps({"data": pixels, key: labels}))
        expected[not part.startswith("test")] += list(zip(pixels, labels))
    names = [f"class {i}" for i in range(classes)]
    meta_key = "label_names" if classes == 10 else "fine_label_names"
    (folder / meta).write_bytes(pickle.dumps({meta_key: names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    for train, rows in expected.items():
        args = settings(dataset=dataset, data_dir=tmp_path, image_size=32)
        opened = retrain.open_images(args, train)
        pixels, labels = opened.tensors
        assert opened.classes == names and labels.tolist() == [label for _, label in rows]
        assert (pixels.flatten(1).numpy() == np.stack([row for row, _ in rows])).all()
    (x, _), = retrain.Batches(opened, torch.arange(20), 20, args, train=False)
    mean, std = {"cifar10": (0.4914, 0.2470), "cifar100": (0.5071, 0.2673)}[dataset]
    first = (expected[False][0][0][0] / 255 - mean) / std
    assert x[0, 0, 0, 0].item() == pytest.approx(first, abs=1e-5)

@pytest.mark.parametrize("argv, words", [
    ("", ["runs/ddp_nas/genotype.json", "python ddp_nas.py"]),
    ("--genotype=", ["--genotype ''"]), ("--genotype random:x", ["random:x"]),
    ("--genotype DDPNAS_9", ["DDPNAS_9", "DDPNAS_2"]),
    ("--genotype random:0:tpu", ["random:0:tpu"]), ("--evaluate nowhere.pt", ["nowhere.pt"]),
    ("--genotype MDENAS_CPU --cells 5", ["--cells"]),
    ("--genotype MDENAS_CPU --large", ["--large"]),
    ("--genotype DDPNAS_IMAGENET --image-size 40", ["--image-size"]),
    ("--genotype DDPNAS_IMAGENET --channels 1", ["--channels"])])
def test_missing_genotype_and_options_that_do_not_fit_it(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(retrain, [*argv.split(), "--device", "cpu"], tmp_path, *words)

# ==== the README ==================================================================================
README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
BENCHMARK, COURSEWORK, USE, RANDOM_SEARCH, OPERATION = BLOCKS

def test_readme_runs_random_search(tmp_path, monkeypatch):
    skip_training(mdenas, monkeypatch, [])
    monkeypatch.chdir(tmp_path)
    options = "--epochs 8 --channels 2 --image-size 8 --batch-size 96 --device cpu".split()
    monkeypatch.setattr(sys, "argv", ["random_search.py", *options])
    with pytest.raises(SystemExit) as stop:
        exec(RANDOM_SEARCH, {"__name__": "__main__"})
    log = read_log(tmp_path / "runs" / "random_search")
    assert stop.value.code == 0 and len({tuple(row["sample"]) for row in log}) == len(log) == 8

def test_readme_random_search_keeps_random_edges_of_the_best_path():
    """Among those whose operation is not `none`; over seeds, every pair of sources is as likely."""
    block, kept = {"__name__": "block"}, Counter()
    exec(RANDOM_SEARCH, block)
    for seed in range(600):
        search = block["RandomSearch"](28, 8, epochs=2, seed=seed)
        history = drive(search, lambda sample, epoch: 0.3 + 0.1 * (epoch == 1))
        (winner, _), _ = history
        assert search.best() == winner and len({tuple(sample) for sample, _ in history}) == 2
        cells, edge = mdenas.derive_cells(search.best(), search.scores), 0
        for cell in (cells.normal, cells.reduce):
            for i, node in enumerate(nodes_of(cell)):
                there = [list(mdenas.OPS)[op] for op in winner[edge:edge + 2 + i]]
                kept[i, tuple(source for _, source in node)] += 1
                if there.count("none") <= i:  # two others are left
                    assert all(there[source] == name for name, source in node)
                edge += 2 + i
    pairs = [1, 3, 6, 10]
    assert len(kept) == 20 and as_expected(list(kept.values()), [1200 / pairs[i] for i, _ in kept])

def test_readme_searches_and_trains_with_an_operation_of_your_own(
        images, tmp_path, monkeypatch, capsys):
    for script in SCRIPTS:
        monkeypatch.setattr(script, "OPS", dict(script.OPS))
    skip_training(ddp_nas, monkeypatch, [])
    search = tiny(ddp_nas, images, tmp_path / "search")
    alone = tiny(retrain, images, tmp_path / "alone", "--genotype", tmp_path / "search" /
                 "genotype.json", "--epochs", 1)
    assert_refused(retrain, alone, tmp_path, "cannot be read")  # as there is none yet
    for script, argv in ((ddp_nas, search), (retrain, alone)):
        monkeypatch.setattr(sys, "argv", ["own.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            exec(OPERATION.replace("ddp_nas", script.METHOD), {"__name__": "__main__"})
        assert stop.value.code == 0, capsys.readouterr()
    assert len(read_log(tmp_path / "search")) == 44  # of 9 operations
    assert re.search("none .* con3$", capsys.readouterr().out, re.M)
    genotype = read_genotype(tmp_path / "search")
    assert "conv_3x3" in {op for op, _ in genotype.normal + genotype.reduce}
    del ddp_nas.OPS["conv_3x3"]
    assert_refused(ddp_nas, [*search, "--resume"], tmp_path, "operations is", "conv_3x3")

def test_readme_finds_better_than_random_search_where_accuracies_add_up(
        tmp_path, monkeypatch, capsys):
    """The benchmark's format, with made-up accuracies."""
    draw, table = np.random.default_rng(0), {}
    worth = draw.random((8, 3))
    for sample in itertools.product(range(3), repeat=8):
        mean = 80 + 10 * worth[range(8), sample].mean()
        trainings = (mean + 0.1 * draw.standard_normal(3)).tolist()
        table["".join(map(str, sample))] = {"test_acc": trainings, "mean_acc": mean}
    (tmp_path / "nas-bench-macro_cifar10.json").write_text(json.dumps(table))
    monkeypatch.chdir(tmp_path)
    assert BENCHMARK.count("200") == 1
    exec(BENCHMARK.replace("200", "40"), {})
    pruned, random = map(float, re.findall(r": ([\d.]+) %", capsys.readouterr().out))
    assert random < pruned <= 80 + 10 * worth.max(1).mean()

def import_changed(script, changes):
    """The script as a module, with the changes to its text."""
    text = TEXTS[script]
    for old, new in changes:
        text = text.replace(old, new)
    module = types.ModuleType(script.METHOD)
    exec(compile(text, script.METHOD, "exec"), vars(module))
    return module

@pytest.mark.parametrize("changes, pruning, multinomial", [
    ([], 0.449, 0.898),
    ([("passes=3", "passes=1")], 0.634, None), ([("passes=3", "passes=9")], 0.241, None),
    ([("decay=0.5", "decay=0")], 0.554, None), ([("decay=0.5", "decay=1")], 0.392, None),
    ([("(100 * self", "(10 * self")], 0.384, None),
    ([("(100 * self", "(1000 * self")], 0.510, None),
    ([("wins = (dE < 0) & (dA > 0)", "wins = (dA > 0)")], None, 0.519)])
def test_readme_coursework_and_its_answers(changes, pruning, multinomial, monkeypatch, capsys):
    """Each change as the exercise has it; 20 of its 200 seeds, so within 5 standard errors."""
    for old, _ in changes:
        assert old in TEXTS[ddp_nas] + TEXTS[mdenas]
    for script in SCRIPTS[:2]:
        monkeypatch.setitem(sys.modules, script.METHOD, import_changed(script, changes))
    assert COURSEWORK.count("200") == 2
    exec(COURSEWORK.replace("200", "20"), {})
    found = [float(value) for value in re.findall(r"([\d.]+) ±", capsys.readouterr().out)]
    for value, answer in zip(found, (pruning, multinomial), strict=True):
        if answer:
            assert f"{answer:.3f}" in README
            assert abs(value - answer) < (0.08 if answer == pruning else 0.15)

