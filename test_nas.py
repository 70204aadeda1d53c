"""Tests, on made-up data: against loops, brute force and known counts, never the scripts' output.

    python -m pytest -q test_nas.py                    # everything, about two minutes
    python -m pytest -q test_nas.py -k distribution    # `sample` and `record`, in 5 seconds
    python -m pytest -q test_nas.py -k "not run"       # all but whole searches and trainings
"""
import ast, contextlib, copy, errno, functools, io, itertools, json, math, multiprocessing
import os, pickle, re, shlex, shutil, signal, socket, subprocess, sys, threading, time
import types, urllib.request, zlib
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch, torch.nn as nn, torch.nn.functional as F
from PIL import Image

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

class ListOfBatches(list):
    """What train_epoch and evaluate take for Batches: a list of (images, labels)."""
    device, epoch = "cpu", 0

    @property
    def num_images(self):
        return sum(len(labels) for _, labels in self)

    def normalise(self, images):
        return images

    def sign_of_life(self, total_loss=None):
        pass

@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """runs(script) -> the folders of a tiny run to the end, and of one stopped in its 3rd epoch."""
    @functools.cache
    def runs(script):
        done, begun = (tmp_path_factory.mktemp(script.METHOD) / name for name in ("a run", "begun"))
        code, text, err = run(script, tiny(script, images, done))
        assert code == 0 and err == "", err
        (done.parent / "stdout.txt").write_text(text, encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "train_epoch", failing(3, script.train_epoch, Killed()))
            with pytest.raises(Killed):
                run(script, tiny(script, images, begun))
        assert len(read_log(begun)) == 2
        return done, begun
    return runs

def first_output(runs, script):
    return (runs(script)[0].parent / "stdout.txt").read_text(encoding="utf-8")

# ==== the scripts as texts ========================================================================
TEXTS = {script: (HERE / f"{script.METHOD}.py").read_text(encoding="utf-8") for script in SCRIPTS}

def test_shared_blocks_are_the_same_to_the_character():
    pattern = re.compile(r"^ *# ==== shared: (.+?) =+\n(.*?)(?=^ *# ====)", re.S | re.M)
    blocks = {script: dict(pattern.findall(text)) for script, text in TEXTS.items()}
    assert blocks[ddp_nas].keys() == blocks[mdenas].keys() >= blocks[retrain].keys()
    assert all(TEXTS[script].count("# ==== shared: ") == len(blocks[script]) for script in SCRIPTS)
    assert len(blocks[retrain]) >= 5
    for script, (name, block) in itertools.product((mdenas, retrain), blocks[ddp_nas].items()):
        other = blocks[script].get(name, block)
        lines = itertools.zip_longest(block.splitlines(), other.splitlines())
        for number, (a, b) in enumerate(lines, 1):
            assert a == b, f"{script.METHOD}.py, block {name!r}, line {number}: {b!r}, not {a!r}"

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
                history.append((sample, draw.uniform(0.4, 0.45)))  # every softmax is in play
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

def test_distribution_stays_one_over_5000_updates():
    draw, emptied = np.random.default_rng(4), 0
    distribution = mdenas.MultinomialDistribution(10, 6, epochs=5000, alpha=0.3, seed=4)
    for epoch in range(5000):
        if epoch % 50 == 0:
            randomise(distribution, draw)
        before = distribution.probabilities.clone()
        distribution.record(distribution.sample(), float(draw.random()))
        p = distribution.probabilities
        assert (p >= 0).all() and ((p.sum(1) - 1).abs() < 1e-9).all()
        emptied += ((p == 0) & (before > 0)).any().item()
    assert emptied > 25

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

# ==== the space of cells ==========================================================================
@pytest.mark.parametrize("name, stride", [*itertools.product(ddp_nas.OPS, (1, 2))])
def test_every_operation_gives_the_right_shape(name, stride):
    op = ddp_nas.OPS[name](6, stride, nn.BatchNorm2d)
    assert op(torch.randn(2, 6, 8, 12)).shape == (2, 6, 8 // stride, 12 // stride)
    strides = [m.stride[0] for m in op.modules() if isinstance(m, nn.Conv2d)]
    assert not name.startswith("sep") or strides == [stride, 1, 1, 1]

@pytest.mark.parametrize("name, offsets", [
    ("sep_conv_3x3", range(-2, 3)), ("sep_conv_5x5", range(-4, 5)),
    ("dil_conv_3x3", (-2, 0, 2)), ("dil_conv_5x5", (-4, -2, 0, 2, 4))])
def test_what_a_convolution_sees(name, offsets):
    op, x = ddp_nas.OPS[name](2, 1, nn.Identity), torch.zeros(1, 2, 11, 11)
    for weight in op.parameters():
        nn.init.ones_(weight)
    x[0, 0, 5, 5] = 1
    for image in op(x)[0]:
        seen = {(y - 5, x - 5) for y, x in image.nonzero().tolist()}
        assert seen == set(itertools.product(offsets, offsets))
    assert (op(-x) == 0).all()  # ReLU comes first

@pytest.mark.parametrize("stride", [1, 2])
def test_pools_and_factorised_reduction_against_their_definition(stride):
    x = torch.randn(2, 6, 8, 8) - 2  # padding of 0 would win a maximum
    windows = F.pad(x, (1, 1, 1, 1), value=math.nan).unfold(2, 3, stride).unfold(3, 3, stride)
    windows, pools = windows.flatten(4), {}
    pools["avg"], pools["max"] = windows.nanmean(4), windows.nan_to_num(-math.inf).amax(4)
    for name, expected in pools.items():
        op = ddp_nas.OPS[name + "_pool_3x3"](6, stride, nn.Identity)
        torch.testing.assert_close(op(x), expected)
    skip = ddp_nas.OPS["skip_connect"](6, stride, nn.Identity)
    halves = [torch.einsum("oc,ncyx->noyx", weight[:, :, 0, 0], x.relu()[:, :, shift::2, shift::2])
              for shift, weight in enumerate(skip.parameters())]
    torch.testing.assert_close(skip(x), x if stride == 1 else torch.cat(halves, 1))

def test_nodes_add_up_the_edges_in_node_order_then_source_order():
    torch.manual_seed(0)
    cell = ddp_nas.CellSupernet(4, 3, 10).cells[0]  # a normal one
    inputs, draw = [torch.randn(2, 12, 8, 8), torch.randn(2, 12, 8, 8)], np.random.default_rng(0)
    for _ in range(20):
        skips = draw.integers(2, size=14)  # 1 for `skip_connect`, 0 for `none`
        nodes, edge = [cell.preprocess0(inputs[0]), cell.preprocess1(inputs[1])], iter(skips)
        for _ in range(4):
            nodes.append(sum([next(edge) * state for state in nodes]))
        out = cell(*inputs, (3 * skips).tolist())
        torch.testing.assert_close(out, torch.cat(nodes[2:], 1))

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

# ==== the MobileNet space =========================================================================
WIDTHS = {"gpu": [40, 24, 32, 56, 56, 112, 112, 128, 128, 128, 256, 256, 256, 256, 432, 1728],
          "cpu": [40, 24, 32, 32, 32, 32, 48, 48, 48, 48, 88, 88, 104, 104, 104, 104, 216, 216, 216,
                  216, 360, 1432]}
HALVING = {"gpu": [1, 2, 4, 9], "cpu": [1, 5, 9, 15]}  # blocks of stride 2

def count_weights(module):
    return sum(weight.numel() for weight in module.parameters())

def count_by_hand(blocks, widths, classes=None):
    """Weights of (kernel, expansion) blocks, two a channel in BatchNorms; for classes, of all."""
    c, head = widths[-2:]
    total = 29 * 40 + (c + 2) * head + (head + 1) * classes if classes else 0
    for (kernel, expansion), c_in, c_out in zip(blocks, widths, widths[1:]):
        c = c_in * expansion
        total += (c_in + 2) * c * (expansion > 1) + (kernel**2 + 2) * c + (c + 2) * c_out
    return total

@pytest.mark.parametrize("backbone", WIDTHS)
def test_every_candidate_of_every_block(backbone):
    network, widths = ddp_nas.MobileSupernet(backbone, 5), WIDTHS[backbone]
    pairs = [*itertools.product((3, 5, 7), (1, 3, 6))]
    assert len(network.blocks) == len(widths) - 2
    for i, (candidates, c_in, c_out) in enumerate(zip(network.blocks, widths, widths[1:])):
        x, size = torch.randn(2, c_in, 4, 4), 2 if i in HALVING[backbone] else 4
        for block, pair in zip(candidates, pairs, strict=True):
            assert count_weights(block) == count_by_hand([pair], [c_in, c_out])
            assert block(x).shape == (2, c_out, size, size)
            last = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)][-1]
            nn.init.zeros_(last.weight)  # leaves the residual alone, if there is one
            residual = size == 4 and c_in == c_out
            assert torch.equal(block(x), x if residual else torch.zeros(2, c_out, size, size))

CHAINS = ["DDPNAS_GPU", "MDENAS_GPU", "MDENAS_CPU"]

@pytest.mark.parametrize("name", CHAINS)
def test_published_mobile_architecture_is_a_point_of_the_space(name):
    blocks, backbone = retrain.PUBLISHED[name], name[-3:].lower()
    network = ddp_nas.MobileSupernet(backbone, 5)
    sample = [ddp_nas.CANDIDATES.index(block) for block in blocks]
    logits = network(torch.randn(2, 3, 32, 32), sample)
    logits.sum().backward()
    used = sum(weight.numel() for weight in network.parameters() if weight.grad is not None)
    assert len(blocks) == len(network.blocks) and logits.shape == (2, 5)
    assert used == count_by_hand(blocks, WIDTHS[backbone], 5)
    assert used == count_weights(retrain.build_network(blocks, "imagenet", 5))

# ==== one path at a time ==========================================================================
SPACES = {"cell": (lambda: ddp_nas.CellSupernet(2, 3, 4), 28, 8),
          "mobile": (lambda: ddp_nas.MobileSupernet("gpu", 4), 14, 9)}

def is_on_path(name, sample):
    cell = re.match(r"cells\.(\d+)\.edges\.(\d+)\.(\d+)\.", name)  # of 3, the last two reduce
    block = re.match(r"blocks\.(\d+)\.(\d+)\.", name)
    return (sample[int(cell[2]) + 14 * (cell[1] != "0")] == int(cell[3]) if cell else
            sample[int(block[1])] == int(block[2]) if block else True)

@pytest.mark.parametrize("space", SPACES)
def test_a_step_leaves_everything_off_the_path_alone(space):
    torch.manual_seed(0)
    make_network, num_edges, num_ops = SPACES[space]
    network, on, off = make_network(), 0, 0
    batches = ListOfBatches([(torch.randn(4, 3, 16, 16), torch.arange(4))])
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
def test_a_step_pays_for_the_sampled_path_only(space, monkeypatch):
    make_network, num_edges, num_ops = SPACES[space]
    network, images, draw = make_network(), torch.randn(4, 3, 32, 32), np.random.default_rng(0)
    weights = {weight.data_ptr() for weight in network.parameters()}
    def saved_bytes():
        kept = {}  # keeps the tensors alive, or an address would be used again
        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(images, draw.integers(num_ops, size=num_edges).tolist())
        return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items()
                   if address not in weights)
    one_path = np.mean([saved_bytes() for _ in range(5)])
    get = nn.ModuleList.__getitem__
    all_ops = lambda self, choice: (get(self, choice) if isinstance(get(self, 0), nn.ModuleList)
                                    else lambda x: sum([op(x) for op in self]))
    monkeypatch.setattr(nn.ModuleList, "__getitem__", all_ops)
    assert 0 < one_path < saved_bytes() / 3

# ==== images ======================================================================================
def settings(seed=0, dataset="synthetic", **more):
    return Namespace(**{"device": "cpu", "batch_size": 16, "workers": 0, "image_size": 8,
                        "seed": seed, "dataset": dataset, **more})

def indexed_images(count):
    """Images of noise, and their numbers as labels."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 8, 8), generator=g, dtype=torch.uint8)
    return ddp_nas.SmallImages(pixels, torch.arange(count), [], {})

def test_training_batches_are_crops_of_the_padded_images_flipped_or_not(images):
    args = settings(dataset="imagefolder", data_dir=images)
    opened, paths = ddp_nas.open_images(args, train=True), sorted((images / "train").rglob("*.png"))
    padded = [np.pad(Image.open(path), ((1, 1), (1, 1), (0, 0))) for path in paths]
    assert opened.classes == ["cats", "dogs"] and opened.labels.tolist() == 18 * [0] + 18 * [1]
    opened = opened._replace(labels=torch.arange(36))
    index = torch.arange(3, 36, 2)
    seen, places = [], set()
    turns = {*itertools.product(range(3), range(3), (1, -1))}
    batches = ddp_nas.Batches(opened, index, 8, True, args)
    for epoch in range(10):
        batches.set_epoch(epoch)
        seen.append([])
        for crops, labels in batches:
            assert crops.shape == (8, 3, 8, 8) and crops.dtype == torch.uint8
            assert crops.is_contiguous(memory_format=torch.channels_last) and labels.shape == (8,)
            for crop, i in zip(crops.permute(0, 2, 3, 1).numpy(), labels.tolist()):
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
            batches = ddp_nas.Batches(dataset, torch.arange(count), 6, train, args)
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

@each_search
def test_halves_are_halves_and_validated_in_batches_of_one_size(script, monkeypatch):
    images = indexed_images(101)
    monkeypatch.setattr(script, "open_images", lambda args, train: images)
    halves = [script.split_training_images(settings(seed)) for seed in (0, 0, 1)]
    one, again, other = (set(train.index.tolist()) for train, _ in halves)
    validation = halves[0][1]
    validated = torch.cat([labels for _, labels in validation]).tolist()
    assert one == again != other and not one & set(validated)
    assert len(one) == 51 and len(set(validated)) == validation.num_images == 48
    assert {len(labels) for _, labels in validation} == {16}
    for crops, labels in validation:
        assert torch.equal(crops, images.images[labels])  # as they are
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    assert script.split_training_images(settings(batch_size=18))[1].batch_size == 24  # 8 each

def test_synthetic_images_are_beyond_a_linear_classifier():
    images, labels, classes, _ = ddp_nas.make_gratings(4000, 16, seed=0)
    assert images.shape == (4000, 3, 16, 16) and images.dtype == torch.uint8
    assert len(set(classes)) == 10
    assert as_expected(torch.bincount(labels, minlength=10), 10 * [400])
    x = torch.cat([images.flatten(1).double() / 128 - 1, torch.ones(4000, 1).double()], 1)
    ridge = x[:3000].T @ x[:3000] + 30 * torch.eye(x.shape[1]).double()
    weights = torch.linalg.solve(ridge, x[:3000].T @ F.one_hot(labels[:3000], 10).double())
    assert ((x[3000:] @ weights).argmax(1) == labels[3000:]).double().mean() < 0.3

def test_augmentation_depends_on_its_seed_alone_and_touches_no_other_generator(
        large_images, monkeypatch):
    folder = ddp_nas.ImageFolder(large_images / "train", 72)
    for generator in (torch, torch.cuda):  # torch.manual_seed would wait for a GPU
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(generator, name, lambda *seed: fail(AssertionError), raising=False)
    items = []
    for seed in (1, 2):
        torch.default_generator.manual_seed(seed)
        before = torch.get_rng_state()
        items.append([folder[key][0] for key in ((3, 5), (3, 6), (4, 5), (3, None))])
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*items) and all(item.shape == (3, 72, 72) for item in items[0])
    assert not any(same(a, b) for a, b in itertools.combinations(items[0], 2))

def test_workers_stay_from_epoch_to_epoch_and_change_nothing(large_images):
    seen, workers = [], []
    for number in (0, 2):
        args = settings(image_size=72, workers=number, dataset="imagefolder", data_dir=large_images)
        opened = ddp_nas.open_images(args, train=True)
        batches = ddp_nas.Batches(opened, torch.arange(len(opened.labels)), 4, True, args)
        for epoch in (0, 1, 5):
            batches.set_epoch(epoch)
            seen.append(list(batches))
            workers.append({process.pid for process in multiprocessing.active_children()})
    assert same(seen[:3], seen[3:]) and not same(seen[0], seen[1])
    assert workers[:3] == 3 * [set()] and len(workers[3]) == 2 and workers[3] == workers[5]

SPAWN = """
import multiprocessing, sys, torch, ddp_nas
from argparse import Namespace

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    folder = ddp_nas.ImageFolder(sys.argv[1], 72)
    args = Namespace(device="cpu", seed=0, dataset="imagefolder", workers=1)
    batches = ddp_nas.Batches(folder, torch.arange(len(folder)), 4, True, args)
    torch.save(list(batches), sys.argv[2])
"""

def test_spawned_workers_read_the_same(large_images, tmp_path):
    """As on macOS and Windows, where a script of one's own needs the guard."""
    (tmp_path / "own.py").write_text(SPAWN)
    command = [sys.executable, "own.py", large_images / "train", "batches.pt"]
    subprocess.run(command, cwd=tmp_path, env=ENV, check=True)
    args = settings(dataset="imagefolder", data_dir=large_images, image_size=72)
    opened = ddp_nas.open_images(args, train=True)
    batches = ddp_nas.Batches(opened, torch.arange(len(opened.labels)), 4, True, args)
    assert same(load(tmp_path / "batches.pt"), list(batches))

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
    assert folder.classes == ["cats", "dogs"] and folder.labels.tolist() == [0] * 2 + [1] * 7
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

@each_script
def test_a_start_shows_the_images_and_signs_of_life(script, images, monkeypatch, tmp_path):
    text = "".join(f"{count} {kind} images of 2 classes: cats, dogs ...\n"
                   for count, kind in ((36, "training"), (14, "test")))
    monkeypatch.setattr(script, "silent_for_a_minute", lambda: True)
    code, out, err = run(script, tiny(script, images, tmp_path / "run"))
    assert code == 0, err
    for line in text.splitlines()[:1 if script is not retrain else 2]:
        assert line in out.splitlines()
    assert re.search(r"^    read \d+ of 36 images$", out, re.M)
    batches = 4 if script is retrain else 2
    for epoch in (1, 2):
        steps = re.findall(rf"^    epoch {epoch}, training step (\d)/{batches}  loss [\d.]+  "
                           r"\d+ images/s  0:00:\d\d left of it$", out, re.M)
        assert steps == [str(step) for step in range(1, batches + 1)]
    assert re.search(r"^    validation step 1/\d  \d+ images/s", out, re.M)

def test_silence_is_a_minute_since_the_last_line(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(ddp_nas.time, "perf_counter", lambda: now[0])
    ddp_nas.print0("a line")
    for seconds, silent in ((59, False), (61, True)):
        now[0] = 1000 + seconds
        assert ddp_nas.silent_for_a_minute() == silent
    ddp_nas.print0("another")
    assert not ddp_nas.silent_for_a_minute() and capsys.readouterr().out == "a line\nanother\n"

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

def graphs_of(out):
    return re.findall(r"```mermaid\n(.*?)```", (out / "cell.md").read_text(), re.S)

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
    assert results["settings"]["the method"] == script.METHOD
    scores, best = scores_by_hand(script, log, 28, 8)
    assert_derived(scores, genotype, best)
    chart, *cells = graphs_of(out)
    for graph, cell in zip(cells, (genotype.normal, genotype.reduce), strict=True):
        drawn = re.findall(r"^ *(\d) -->\|(\w+)\| (\d)$", graph, re.M)
        assert drawn == [(str(source), op, str(2 + i)) for i, node in enumerate(nodes_of(cell))
                         for op, source in node]
    means = [row["accuracy"] for row in log]
    if script is ddp_nas:
        rounds = [[row["accuracy"] for row in log if row["alive"] == k] for k in range(8, 1, -1)]
        means = [sum(accuracies) / len(accuracies) for accuracies in rounds]
    (line,) = re.findall(r"line \[(.*)\]", chart)
    assert "xychart" in chart
    np.testing.assert_allclose([*map(float, line.split(","))], np.multiply(100, means), atol=0.06)

@each_search
def test_what_a_search_run_prints(script, runs, images):
    out, epochs, text = runs(script)[0], EPOCHS[script], first_output(runs, script)
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
    assert re.fullmatch(r"validation accuracy of the best path in the supernet: [\d.]+%", accuracy)
    command = shlex.split(last.split("train it from scratch with: ")[1])  # of paths with spaces
    assert command == ["python", "retrain.py", "--genotype", str(out / "genotype.json"),
                       "--data-dir", str(images)] and " " in command[3] and " " in command[5]

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

@each_search
def test_a_learning_rate_below_the_least_never_rises_in_a_run(
        script, images, tmp_path, monkeypatch):
    rates = []
    skip_training(script, monkeypatch, rates)
    assert run(script, tiny(script, images, tmp_path / "run", "--lr", 0.0005))[0] == 0
    assert rates[0] == 0.0005 and rates == sorted(rates, reverse=True)

@pytest.fixture
def short_backbone(monkeypatch):
    for script in SCRIPTS:
        monkeypatch.setitem(script.BACKBONES, "cpu", ([(8, 1), (8, 2), (12, 1)], 16))

@each_search
def test_mobile_search_run_and_summary_of_what_it_found(script, short_backbone, images, tmp_path):
    out = tmp_path / "run"
    argv = tiny(script, images, out, "--space", "mobile", "--backbone", "cpu")
    assert run(script, argv)[0] == 0
    blocks, log = read_genotype(out), read_log(out)
    assert len(log) == (44 if script is ddp_nas else 12)
    assert all(len(row["sample"]) == 3 for row in log) and len(graphs_of(out)) == 1
    scores, best = scores_by_hand(script, log, 3, 9)
    for i, (row, block) in enumerate(zip(scores, blocks, strict=True)):
        op = ddp_nas.CANDIDATES.index(block)
        assert op == best[i] if best else math.isclose(row[op], max(row))
    code, text, err = run(retrain, ["--genotype", out / "genotype.json", "--data-dir", images,
                                    "--device", "cpu", "--image-size", 8, "--summary"])
    count = count_by_hand(blocks, [40, 8, 8, 12, 16], 2)
    assert code == 0 and f" {count:,} parameters" in text, err

@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_names_the_large_image_that_it_cannot_read(short_backbone, tmp_path, workers):
    write_images(tmp_path / "train", count=4, size=90)
    argv = tiny(mdenas, tmp_path, tmp_path / "run", "--space", "mobile", "--backbone", "cpu",
                "--batch-size", 4, "--image-size", 72, "--epochs", 1, "--workers", workers)
    code, _, err = run(mdenas, argv)
    assert code == 0 and len(read_genotype(tmp_path / "run")) == 3, err
    for culprit in (tmp_path / "train").rglob("*.png"):
        culprit.write_bytes(b"no image")
    code, _, err = run(mdenas, [*argv, "--out", tmp_path / "other"])
    train = re.escape(str(tmp_path / "train"))
    assert code == 2 and re.fullmatch(rf"error: {train}.\w+.\d+\.png cannot be read.*\n", err), err

class Uniform:
    """A method of one's own with what README's table asks for, and no more."""
    def __init__(self, num_edges, num_ops, seed, epochs, temperature):
        self.total_epochs, self.temperature, self.recorded = epochs, temperature, 0
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
def test_both_scripts_run_a_distribution_of_ones_own_with_its_own_options(
        script, images, tmp_path, monkeypatch):
    skip_training(script, monkeypatch, [])
    made = []
    def make_uniform(*args, **more):
        made.append(Uniform(*args, **more))
        return made[-1]
    options = {"epochs": (10, "how long"), "temperature": (0.5, "how warm")}
    argv = ["--device", "cpu", "--channels", "2", "--image-size", "8", "--batch-size", "96",
            "--temperature", "0"]  # no limit of ours
    monkeypatch.chdir(tmp_path)
    assert script.main(argv, make_uniform, options, "uniform") == 0
    assert (made[0].temperature, made[0].total_epochs, made[0].recorded) == (0, 10, 10)
    genotype = read_genotype(tmp_path / "runs" / "uniform")
    assert {op for op, _ in genotype.normal} == {"sep_conv_3x3"}
    with pytest.raises(TypeError):  # an error of the method keeps its traceback
        script.main([*argv, "--out", "other"], lambda **more: None, options, "uniform")

# ==== the devices =================================================================================
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_script
def test_run_on_cuda(script, images, tmp_path):
    argv = tiny(script, images, tmp_path / "run", "--device", "cuda", *LENGTH[script])
    code, _, err = run(script, argv)
    assert code == 0 and len(read_log(tmp_path / "run")) == EPOCHS[script], err

@each_script
def test_bfloat16_only_where_the_gpu_computes_in_it(script, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: seen.append((*args, more)))
    for native, device in itertools.product((False, True), ("cpu", "cuda", "mps")):
        def is_supported(including_emulation=True):
            return native or including_emulation
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
        script.autocast(device)
        enabled = native and device == "cuda"
        assert seen.pop() == ("cuda", torch.bfloat16, {"enabled": enabled}) and not seen

@each_script
def test_gpus_that_are_not_there_are_refused(script, images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(script, "LOCAL_RANK", 1)
    argv = tiny(script, images, tmp_path / "run")
    for device in ("cuda", "mps"):
        assert_refused(script, [*argv, "--device", device], tmp_path, f"--device {device}")

@each_script
def test_a_run_on_synthetic_images_takes_one_thread_unless_told_otherwise(
        script, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "train_epoch",
                        lambda *args: seen.append(torch.get_num_threads()) or fail(Killed()))
    torch.set_num_threads(2)
    try:
        for number, told in enumerate((False, True)):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if told:
                monkeypatch.setenv("OMP_NUM_THREADS", "2")
            argv = [*LENGTH[script], "--device", "cpu", "--out", tmp_path / str(number)]
            with pytest.raises(Killed):
                run(script, argv)
            assert torch.get_num_threads() == 2  # as it was before
    finally:
        torch.set_num_threads(1)
    assert seen == [1, 2]

@each_search
def test_a_run_in_a_thread_of_a_notebook_leaves_nothing_behind(script, images, tmp_path):
    before, codes, out = signal.getsignal(signal.SIGINT), [], io.StringIO()
    argv = [str(arg) for arg in tiny(script, images, tmp_path / "run")]
    thread = threading.Thread(target=lambda: codes.append(script.main(argv)))
    with contextlib.redirect_stdout(out):
        thread.start()
        thread.join()
    assert codes == [0] and signal.getsignal(signal.SIGINT) is before
    assert len(re.findall("^epoch ", out.getvalue(), re.M)) == EPOCHS[script]

@each_script
def test_the_device_is_set_up_before_the_run(script, images, tmp_path, monkeypatch):
    order = []
    names = ("start_processes", "summarise", "test", "train", "search")
    for name in set(names) & set(vars(script)):
        monkeypatch.setattr(script, name, lambda *args, name=name: order.append(name))
    assert run(script, tiny(script, images, tmp_path / "run"))[0] == 0
    assert order == ["start_processes", "train" if script is retrain else "search"]

# ==== several processes ===========================================================================
def pretend_two_ranks(script, monkeypatch, others=lambda flat: flat):
    """WORLD_SIZE 2, where the other rank has others(...) of each message -> list of messages."""
    messages = []
    def all_reduce(flat):
        messages.append(flat.clone())
        flat += others(flat)
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    monkeypatch.setattr(script.dist, "all_reduce", all_reduce)
    return messages

@each_script
def test_a_mean_over_the_ranks_is_one_message_and_right(script, monkeypatch):
    shapes = [(4, 3, 5, 2), (7,), (), (2, 6)]
    ours, theirs = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    ours[0] = ours[0].to(memory_format=torch.channels_last)
    expected = [(a + b) / 2 for a, b in zip(ours, theirs)]
    flat = torch.cat([tensor.reshape(-1) for tensor in theirs])
    messages = pretend_two_ranks(script, monkeypatch, lambda _: flat)
    script.average_over_ranks(ours)
    assert len(messages) == 1 and ours[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b)

@each_script
def test_a_step_sends_one_message_whatever_the_number_of_weights(script, monkeypatch):
    batches = ListOfBatches([(torch.randn(4, 3, 32, 32), torch.arange(4))] * 3)
    messages, counts = pretend_two_ranks(script, monkeypatch), []
    args = Namespace(large=False, smoothing=0, auxiliary=0.4, cutout=0, clip=5, image_size=32)
    sample = args if script is retrain else [1] * 28
    for cells in (3, 5):
        network = (script.CellNetwork(script.random_genotype(0), 2, cells, 4, False, False)
                   if script is retrain else script.CellSupernet(2, cells, 4))
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        script.train_epoch(network, optimizer, batches, sample)
        sizes = Counter(message.numel() for message in messages)
        counts.append(len(messages))
        used = sum(w.numel() for w in network.parameters() if w.grad is not None)
        assert sizes[used] == 3
        messages.clear()
    assert counts[0] == counts[1] == (5 if script is retrain else 4)  # the loss; the BatchNorms

# ==== the networks that are trained alone =========================================================
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

@pytest.mark.parametrize("name", retrain.PUBLISHED)
def test_every_published_network_computes_at_its_defaults(name):
    args = parse(retrain, ["--genotype", name, "--device", "cpu"])
    expected = ("imagenet", 224) if name in ("DDPNAS_IMAGENET", *CHAINS) else ("cifar10", 32)
    assert (args.dataset, args.image_size) == expected
    network = retrain.build_network(retrain.PUBLISHED[name], args.dataset, 5, 4, 3).eval()
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    if name == "DDPNAS_1":  # the others are known by their counts
        text = str(retrain.PUBLISHED[name].normal + retrain.PUBLISHED[name].reduce)
        assert re.sub("_conv|_pool|x[35]|[^a-z0-9]", "", text) == (
            "sep50max31sep32max30dil50sep31avg32max34sep31dil50dil51sep50sep30avg33max31sep30")

@pytest.mark.parametrize("dataset, size, norms", [("cifar10", 32, 2), ("imagenet", 224, 1)])
def test_auxiliary_head_gives_logits_only_while_training(dataset, size, norms):
    network = retrain.build_network(retrain.random_genotype(1), dataset, 5, 2, 3, True)
    images = torch.randn(2, 3, size, size)
    logits, auxiliary = network(images)
    assert logits.shape == auxiliary.shape == network.eval()(images).shape == (2, 5)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.auxiliary) == norms
    eps = network.cells[0].preprocess1[-1].eps
    assert eps == (1e-3 if dataset == "imagenet" else 1e-5)

def test_the_imagenet_network_takes_a_step_at_its_own_size():
    """With strided 1x1 convs in the factorised reduction, torch 2.14 on a CPU dies here."""
    network = retrain.build_network(retrain.PUBLISHED["DDPNAS_IMAGENET"], "imagenet", 3, 8, 3)
    network.to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    network(images).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters())

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

def test_cutout_and_drop_path_share_no_seed_with_the_shuffle_of_a_run(
        images, tmp_path, monkeypatch):
    opened = {train: retrain.open_images(settings(dataset="imagefolder", data_dir=images), train)
              for train in (True, False)}
    kept, shuffled, manual_seed = [], [], torch.manual_seed  # modulo 2**32, as torch takes them
    class Generator(torch.Generator):
        def manual_seed(self, seed):
            shuffled.append(seed % 2**32)
            return super().manual_seed(seed)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "manual_seed",
                        lambda seed: kept.append(seed % 2**32) or manual_seed(seed))
    def train_epoch(network, optimizer, batches, args):
        optimizer.step()
        return float(len([*batches]))
    monkeypatch.setattr(retrain, "train_epoch", train_epoch)
    monkeypatch.setattr(retrain, "evaluate", lambda *args: {"top1_error": 0.5})
    monkeypatch.setattr(retrain, "WORLD_SIZE", 2)
    for name in ("start_processes", "compare_processes"):
        monkeypatch.setattr(retrain, name, lambda *args: None)
    monkeypatch.setattr(retrain, "from_process_0", lambda function, args: function(args))
    monkeypatch.setattr(retrain, "open_images", lambda args, train: opened[train])
    for rank in (0, 1):
        monkeypatch.setattr(retrain, "RANK", rank)
        argv = tiny(retrain, images, tmp_path / f"{rank}", "--seed", 3, "--epochs", 20)
        code, _, err = run(retrain, argv)
        assert code == 0, err
    assert len(set(shuffled)) == 20 and len(kept) == 42  # one each for the weights
    assert len(set(kept)) == 41 and not set(kept) & set(shuffled)

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

# ==== genotypes in the notation of the field ======================================================
# The texts of three families as their repositories print them, and one nested.
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
P_DARTS = ("Genotype(normal=[('skip_connect', 0), ('dil_conv_3x3', 1), ('skip_connect', 0),"
           "('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('sep_conv_3x3', 3), ('sep_conv_3x3',0), "
           "('dil_conv_5x5', 4)], normal_concat=range(2, 6), reduce=[('avg_pool_3x3', 0), "
           "('sep_conv_5x5', 1), ('sep_conv_3x3', 0), ('dil_conv_5x5', 2), ('max_pool_3x3', 0), "
           "('dil_conv_3x3', 1), ('dil_conv_3x3', 1), ('dil_conv_5x5', 3)], "
           "reduce_concat=range(2, 6))")
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

@pytest.mark.parametrize("text", [DARTS, PC_DARTS, P_DARTS, NESTED])
@pytest.mark.parametrize("as_file", [False, True])
def test_the_fields_texts_are_read(text, as_file, tmp_path):
    source = text
    if as_file:
        source = str(tmp_path / "found (1).txt")
        Path(source).write_text(text)
    genotype, searched = retrain.load_genotype(source)
    assert genotype.normal + genotype.reduce == flat_pairs(text) and len(genotype.normal) == 8
    assert searched == {"dataset": "cifar10"}
    network = retrain.build_network(genotype, "cifar10", 10, 2, 3).eval()
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 10)

@pytest.mark.parametrize("name, text", [("DARTS_V2", DARTS), ("MDENAS", NESTED),
                                        ("MDENAS_GPU", CHAIN)])
def test_published_names_are_their_texts(name, text):
    assert retrain.load_genotype(text) == retrain.load_genotype(name)

def test_parameters_of_pc_darts_and_p_darts_are_those_of_their_papers():
    """3.6 M and 3.4 M, as their authors print them; here pools have a BatchNorm."""
    for text, millions in ((PC_DARTS, 3.6), (P_DARTS, 3.4)):
        with torch.device("meta"):
            network = retrain.build_network(retrain.parse_genotype(text))
        assert abs(count_weights(network) / 1e6 - millions) < 0.06

@each_search
def test_what_a_search_run_found_comes_back_as_the_same_network(script, runs, tmp_path):
    out = runs(script)[0]
    text = json.loads((out / "genotype.json").read_text())["genotype"]
    found, searched = retrain.load_genotype(str(out / "genotype.json"))
    assert "\n" not in text and str(found) == text
    assert searched == {"dataset": "imagefolder", "image_size": 8}
    names = [name for name, _ in retrain.build_network(found, channels=2).named_parameters()]
    again = retrain.build_network(retrain.load_genotype(f"FOUND = {text}")[0], channels=2)
    assert names == [name for name, _ in again.named_parameters()]

CELL = str(retrain.PUBLISHED["MDENAS"])

@pytest.mark.parametrize("text, words", [
    (CELL.replace("sep_conv_3x3', 0", "sep_conv_7x7', 0", 1), ["sep_conv_7x7", "sep_conv_5x5"]),
    (CELL.replace("sep_conv_3x3', 0", "none', 0", 1), ["none", "skip_connect"]),
    (CELL.replace("('sep_conv_5x5', 1), ", "", 1), ["normal", "8 edges", "not 7"]),
    (CELL.replace("reduce=[", "reduce=[('skip_connect', 0), ('skip_connect', 1), "),
     ["reduce", "8 edges", "not 10"]),
    (CELL.replace("normal_concat=range(2, 6)", "normal_concat=[3, 4, 5]"),
     ["normal_concat", "2 to 5", "[3, 4, 5]"]),
    (CELL.replace("reduce_concat=range(2, 6)", "reduce_concat=range(10**12)"), ["reduce_concat"]),
    (CELL.replace("('sep_conv_5x5', 1)", "('sep_conv_5x5', 2)", 1), ["node 2", "0 to 1"]),
    (CELL.replace("('sep_conv_5x5', 1)", "('sep_conv_5x5', -1)", 1), ["normal", "-1"]),
    (CELL.replace("('sep_conv_5x5', 1)", "('sep_conv_5x5', 1.0)", 1), ["normal", "1.0"]),
    (CELL.replace("('sep_conv_5x5', 1)", "('sep_conv_5x5', 1, 2)", 1), ["not a genotype"]),
    (CELL.replace("normal=", "normal_bottleneck='', normal="), ["not a genotype"]),
    (CELL[:-1], ["not a genotype"]), ("Genotype()", ["not a genotype"]),
    ("Genotype(normal=5, normal_concat=5, reduce=5, reduce_concat=5)", ["not a genotype"]),
    ("Genotype(normal=[], normal_concat=[2,3,4,5], reduce=[], reduce_concat=[])", ["genotype"]),
    ("Genotype(normal=open('x'), normal_concat=1, reduce=1, reduce_concat=1)", ["not a genotype"]),
    ("[" * 5000, ["not a genotype"]), ("[(7, 6)]", ["14 (gpu)", "20 (cpu)", "not 1"]),
    (CHAIN.replace("(7, 6)", "(7, 2)"), ["(7, 2)", "(7, 3)"]), ("[5] * 14", ["not a genotype"])])
def test_text_that_is_no_genotype_of_the_space(text, words, tmp_path):
    argv = ["--device", "cpu", "--out", tmp_path / "run", "--genotype"]
    assert_refused(retrain, [*argv, text], tmp_path, *words)
    (tmp_path / "found.txt").write_text(text)
    if text.strip()[0] != "{":
        assert_refused(retrain, [*argv, tmp_path / "found.txt"], tmp_path, *words)

@pytest.mark.parametrize("content", [
    "{", "{}", '{"genotype": 5, "settings": {}}', json.dumps({"genotype": CELL}),
    json.dumps({"genotype": CELL, "settings": {"dataset": "mnist", "image_size": 8}}),
    json.dumps({"genotype": CELL, "settings": {"dataset": "cifar10", "image_size": "big"}})])
def test_file_that_is_no_result_of_a_search(content, tmp_path):
    (tmp_path / "found.json").write_text(content)
    argv = ["--genotype", tmp_path / "found.json", "--device", "cpu", "--out", tmp_path / "run"]
    assert_refused(retrain, argv, tmp_path, tmp_path / "found.json", "genotype.json")

# ==== training and testing them ===================================================================
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

class FakeNetwork(nn.Linear):
    def forward(self, images):
        """Logits of 7 classes from the first pixels, others from the next ones while training."""
        pixels = 0.01 * images.flatten(1) + 0 * self.bias
        return (pixels[:, :7], pixels[:, 7:14]) if self.training else pixels[:, :7]

def fake_batches(num_classes):
    pixels = np.tile(np.arange(256, dtype=np.uint8), (50, 1))
    pixels = torch.from_numpy(np.random.default_rng(0).permuted(pixels, axis=1)[:, :192])
    images, labels = pixels.view(50, 3, 8, 8), torch.arange(50) % 7
    dataset = retrain.SmallImages(images, labels, range(num_classes), {})
    batches = retrain.Batches(dataset, torch.arange(50), 16, False, settings())
    batches.mean, batches.std = 0, 1
    return batches

def test_errors_are_those_of_plain_python_and_of_float32(monkeypatch):
    batches, wrong, network = fake_batches(7), [0, 0], FakeNetwork(1, 1).eval()
    for i, image in enumerate(batches.dataset.images.flatten(1).tolist()):
        ranking = sorted(range(7), key=lambda c: -image[c])
        wrong = [count + (i % 7 not in ranking[:n]) for count, n in zip(wrong, (1, 5))]
    for script in (ddp_nas, mdenas):
        accuracy = script.evaluate(lambda images, sample: network(images), batches, None)
        assert accuracy == pytest.approx(1 - wrong[0] / 50) and 0 < wrong[1] < wrong[0] < 50
    for where in (torch, retrain):
        monkeypatch.setattr(where, "autocast", lambda *args, **more: fail(AssertionError))
    errors = {"top1_error": pytest.approx(wrong[0] / 50),
              "top5_error": pytest.approx(wrong[1] / 50)}
    assert retrain.evaluate(network, batches) == errors
    del errors["top5_error"]  # says nothing of 5 classes
    assert retrain.evaluate(network, fake_batches(5)) == errors

def test_training_loss_is_smoothed_and_takes_in_the_auxiliary_head():
    network, batches, losses = FakeNetwork(1, 1), fake_batches(7), []
    for images, labels in batches:
        for image, label in zip(images.flatten(1).tolist(), labels.tolist()):
            for part, weight in ((image[:7], 1), (image[7:14], 0.4)):
                total = math.log(sum(math.exp(0.01 * x) for x in part))
                losses.append(weight * sum((0.1 / 7 + 0.9 * (c == label)) * (total - 0.01 * part[c])
                                           for c in range(7)))
    sizes = [16, 16, 16, 2]
    means = [sum(losses[2 * i:2 * (i + size)]) / size
             for i, size in zip(itertools.accumulate([0, *sizes]), sizes)]
    args = Namespace(large=False, image_size=8, smoothing=0.1, auxiliary=0.4, cutout=0, clip=5)
    optimizer = torch.optim.SGD(network.parameters(), 0)
    loss = retrain.train_epoch(network, optimizer, batches, args)
    assert math.isclose(loss, sum(means) / 4, rel_tol=1e-5)

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

def test_training_run_end_to_end_and_its_checkpoints_tested_alone(runs, images):
    out = runs(retrain)[0]
    log = read_log(out)
    assert [row["epoch"] for row in log] == list(range(1, 7))
    assert all("top5_error" not in row for row in log)
    best = min(log, key=lambda row: row["top1_error"])
    for name, row in (("best.pt", best), ("checkpoint.pt", log[-1])):
        argv = ["--evaluate", out / name, "--data-dir", images, "--device", "cpu"]
        code, text, err = run(retrain, argv)
        assert code == 0 and f"top-1 error {row['top1_error']:.2%} of 14 images" in text, err

def test_evaluation_takes_the_seed_of_the_run_unless_told_otherwise(tmp_path):
    """The seed draws the synthetic images, those of the test included."""
    argv = ["--genotype", "random:0", "--channels", 2, "--cells", 3, "--epochs", 1, "--seed", 5,
            "--device", "cpu", "--out", tmp_path / "run"]
    assert run(retrain, argv)[0] == 0
    error, errors = read_log(tmp_path / "run")[0]["top1_error"], []
    for more in ([], ["--seed", 5], ["--seed", 6]):
        argv = ["--evaluate", tmp_path / "run" / "best.pt", "--device", "cpu", *more]
        errors.append(re.search("top-1 error ([^ ]+)%", run(retrain, argv)[1])[1])
    assert errors[0] == errors[1] == f"{100 * error:.2f}" != errors[2]

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

@pytest.mark.parametrize("content", [
    {"net": torch.ones(2), "acc": np.float64(0.9)}, nn.Linear(2, 2)], ids=["numpy", "module"])
def test_a_file_of_more_than_tensors_is_not_called_damaged(content, images, tmp_path):
    path = tmp_path / "theirs.pth"
    torch.save(content, path)
    argv = tiny(retrain, images, tmp_path / "run", "--evaluate", path)
    assert_refused(retrain, argv, tmp_path, path, "state dict", "torch.save")
    assert "damaged" not in run(retrain, argv)[2]

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
    assert "float32" in text

# ==== the network in one's own program ============================================================
EXPORTED = """
import sys, torch
images = torch.load(sys.argv[2], weights_only=True)
network = torch.export.load(sys.argv[1]).module()
torch.save([network(images[:count]) for count in (1, 2, 5)], sys.argv[3])
assert "retrain" not in sys.modules
"""

@pytest.mark.parametrize("name", ["random:0", "random:0:cpu"])
def test_the_network_of_a_run_alone_and_exported(name, short_backbone, images, tmp_path):
    size = ["--image-size", 32] + (["--channels", 2, "--cells", 3] if name == "random:0" else [])
    argv = ["--genotype", name, "--dataset", "imagefolder", "--data-dir", images, "--epochs", 1,
            "--batch-size", 8, "--workers", 0, "--device", "cpu", "--out", tmp_path / "run", *size]
    assert run(retrain, argv)[0] == 0  # images of 32 pixels: with an auxiliary head
    saved = load(tmp_path / "run" / "best.pt")
    assert any(key.startswith("auxiliary") for key in saved["network"]) == (name == "random:0")
    network, classes, preprocess = retrain.load_network(tmp_path / "run" / "best.pt")
    assert classes == ["cats", "dogs"] and not network.training
    paths = sorted((images / "val").rglob("*.png"))
    inputs = torch.stack([preprocess(Image.open(path)) for path in paths])
    assert inputs.shape == (14, 3, 32, 32)
    logits = network(inputs)
    error = (logits.argmax(1) != torch.arange(14) // 7).double().mean().item()
    assert error == pytest.approx(read_log(tmp_path / "run")[-1]["top1_error"])
    if name == "random:0:cpu" and torch.__version__.startswith("2.4."):
        pytest.skip("this torch cannot load what it has exported of a chain of blocks")
    program = torch.export.export(network, (inputs[:2],),
                                  dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "network.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", EXPORTED, "network.pt2", "inputs.pt", "logits.pt"]
    env = {name: value for name, value in ENV.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    for count, exported in zip((1, 2, 5), load(tmp_path / "logits.pt"), strict=True):
        torch.testing.assert_close(exported, logits[:count], rtol=1e-4, atol=1e-5)

def test_preprocessing_is_that_of_the_test(images, large_images, tmp_path):
    for dataset, folder, size in (("imagefolder", images, 8), ("imagefolder", large_images, 72)):
        args = settings(dataset=dataset, data_dir=folder, image_size=size)
        opened = retrain.open_images(args, train=False)
        batches = retrain.Batches(opened, torch.arange(len(opened.labels)), 4, False, args)
        tested = torch.cat([batches.normalise(images) for images, _ in batches])
        genotype = str(retrain.random_genotype(0))
        network = retrain.build_network(retrain.random_genotype(0), dataset, 2, 2, 3)
        torch.save({"network": network.state_dict(), "classes": ["cats", "dogs"], "settings": {
            "genotype": genotype, "dataset": dataset, "image_size": size, "channels": 2,
            "cells": 3}}, tmp_path / "best.pt")
        _, _, preprocess = retrain.load_network(tmp_path / "best.pt")
        paths = sorted((folder / "val").rglob("*.png"))
        ours = torch.stack([preprocess(Image.open(path)) for path in paths])
        torch.testing.assert_close(ours, tested)

def test_no_network_is_loaded_from_a_search_run(runs):
    with pytest.raises(retrain.InputError, match="search"):
        retrain.load_network(runs(ddp_nas)[0] / "checkpoint.pt")

# ==== two processes ===============================================================================
TWO_RANKS = """
import sys
from argparse import Namespace
from pathlib import Path
import torch, torch.distributed as dist
import ddp_nas, mdenas, retrain
from test_nas import ListOfBatches, make_linear

here, images, rank = Path(sys.argv[1]), sys.argv[2], ddp_nas.RANK
common = ["--device", "cpu", "--dataset", "imagefolder", "--data-dir", images, "--workers", "0",
          "--image-size", "8", "--batch-size", "18", "--lr", "0.1"]
cells, ddp_nas.BACKBONES["gpu"] = ["--channels", "2", "--cells", "3"], ([(8, 1), (8, 2)], 16)
ddp_nas.start_processes(Namespace(device="cpu", dataset=""))  # one group for all that follows
dist.init_process_group = dist.destroy_process_group = lambda *args: None
for script, more in ((ddp_nas, ["--passes", "1", "--space", "mobile"]),
                     (mdenas, ["--epochs", "4", *cells]),
                     (retrain, ["--epochs", "3", "--genotype", "random:0", *cells])):
    def save_and_tell(run, names=("checkpoint.pt",), save=script.Run.save):
        states = {name: part.state_dict() for name, part in run.parts.items()}
        torch.save({"log": run.log, **states}, here / f"{run.folder.name}_{rank}.pt")
        save(run, names)
    script.Run.save = save_and_tell
    assert script.main([*common, *more, "--out", str(here / script.METHOD)]) == 0

# Three steps without BatchNorm, each rank on its own half of a batch.
data, network = torch.load(here / "batch.pt", weights_only=True), make_linear()
network.load_state_dict(data["weights"])
optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
batches = [(scale * data["images"][rank::2], data["labels"][rank::2]) for scale in (1, 30, 1)]
ddp_nas.train_epoch(network, optimizer, ListOfBatches(batches), None)
torch.save(network.state_dict(), here / f"steps_{rank}.pt")

if rank == 1:  # fails at last, while the other waits for it
    mdenas.evaluate = lambda *args: int("this rank has had enough")
sys.exit(mdenas.main([*common, *cells, "--out", str(here / "failed")]))
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

def test_failure_of_one_rank_ends_the_run_with_its_message(two_ranks):
    folder, _, done = two_ranks
    assert done.returncode != 0 and "ValueError: " in done.stderr
    assert "this rank has had enough" in done.stderr and read_log(folder / "failed") == []

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
        means = [value for name, value in states[0]["network"].items() if "running_mean" in name]
        assert sum(mean.any().item() for mean in means) > 20
        argv = ["--evaluate", out / "checkpoint.pt", "--data-dir", images, "--device", "cpu"]
        code, text, err = run(retrain, argv)
        assert code == 0 and f"top-1 error {log[-1]['top1_error']:.2%}" in text, err
        return
    right = [row["accuracy"] * 18 for row in log]
    assert np.allclose(right, np.round(right)) and 9 < max(right) <= 18, "counted on one rank only?"
    genotype, distribution = read_genotype(out), states[0]["distribution"]
    if script is mdenas:
        assert_derived(distribution["probabilities"], genotype)
        first = mdenas.MultinomialDistribution(28, 8).sample()
        assert log[0]["sample"] == first  # as one process
    else:
        best = [row.index(True) for row in distribution["alive"].tolist()]
        assert [ddp_nas.CANDIDATES[choice] for choice in best] == genotype

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
    """mdenas.py twice, with the environment of torchrun, each in a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        env = {**ENV, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
        home = folder / f"machine {rank}"
        home.mkdir(exist_ok=True)
        command = [sys.executable, HERE / "mdenas.py", *map(str, argv_of_rank(rank))]
        processes.append(subprocess.Popen(command, cwd=home, env=env, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes

def test_a_run_on_two_machines_is_killed_and_resumed(two_ranks, images, tmp_path):
    """The folder of rank 1 stays empty; the result is that of two processes on one machine."""
    argv = tiny(mdenas, images, "run", "--batch-size", 18, "--epochs", 4, "--resume")
    machines, log = start_two_machines(tmp_path, lambda rank: argv), tmp_path / "machine 0" / "run"
    while not read_log(log):
        assert machines[0].poll() is None, machines[0].communicate()
        time.sleep(0.01)
    for machine in machines:
        machine.kill()
        machine.communicate()
    assert 0 < len(read_log(log)) < 4
    for machine in start_two_machines(tmp_path, lambda rank: argv):
        _, err = machine.communicate(timeout=100)
        assert machine.returncode == 0, err
    assert not list((tmp_path / "machine 1").rglob("*.*"))
    assert_same_run(log, two_ranks[0] / "mdenas")

def test_machines_with_other_images_end_a_run_with_one_line_each(images, tmp_path):
    for rank in (0, 1):
        shutil.copytree(images, tmp_path / f"images {rank}")
    (tmp_path / "images 1" / "train" / "dogs").rename(tmp_path / "images 1" / "train" / "wolves")
    for machine in start_two_machines(tmp_path, lambda rank: tiny(
            mdenas, tmp_path / f"images {rank}", "run", "--batch-size", 18)):
        _, err = machine.communicate(timeout=100)
        assert machine.returncode == 2, err
        assert err == "error: class 1 is wolves in process 1, but dogs in process 0\n"

@each_script
def test_what_differs_between_processes_is_named(script, images, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path / "fewer")
    (tmp_path / "fewer" / "train" / "cats" / "00.png").unlink()
    shutil.copytree(images, tmp_path / "renamed")
    (tmp_path / "renamed" / "train" / "cats" / "00.png").rename(
        tmp_path / "renamed" / "train" / "cats" / "000.png")
    def describe(folder, *more):
        argv = tiny(script, folder, tmp_path / "run", *more)
        return (script.fixed_options(parse(script, argv)),
                script.ImageFolder(folder / "train", 8).facts)
    options, facts = describe(images)
    for folder, more, words in (
            (images, ["--lr", 0.05], "--lr is 0.05 in process 2, but 0.1 in process 0"),
            (images, ["--batch-size", 4], "--batch-size is 4 in process 2, but 8 in process 0"),
            (tmp_path / "fewer", [], "number of images is 35 in process 2, but 36 in process 0"),
            (tmp_path / "renamed", [], "digest of the file names is ")):
        others, other_facts = describe(folder, *more)
        ours, theirs = ((options, others) if more else (facts, other_facts))
        def all_gather_object(everyone, facts):
            everyone[:] = [ours, ours, theirs]
        monkeypatch.setattr(script, "WORLD_SIZE", 3)
        monkeypatch.setattr(script.dist, "all_gather_object", all_gather_object)
        with pytest.raises(script.InputError, match=f"^{words}"):
            script.compare_processes(ours)
        monkeypatch.undo()
    moved = describe(Path(shutil.copytree(images, tmp_path / "moved")), "--workers", 3)
    assert moved == (options, facts)  # may differ

# ==== nothing lost ================================================================================
@each_script
def test_a_run_killed_at_any_moment_resumes_to_the_same_result(
        script, runs, images, tmp_path, monkeypatch):
    """After two epochs; in an epoch, before and after each file is put in place."""
    finished, out = runs(script)[0], shutil.copytree(runs(script)[1], tmp_path / "run")
    argv, replace = tiny(script, images, out, "--resume"), os.replace
    for number in range(1, 5):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing(number, replace, Killed()))
            with pytest.raises(Killed):
                run(script, argv)
        before = len(load(out / "checkpoint.pt")["log"])
        assert len(read_log(out)) in (before, before - 1)
    if script is not retrain:
        with monkeypatch.context() as patch:
            patch.setattr(script, "to_markdown", lambda *args: fail(Killed()))
            with pytest.raises(Killed):
                run(script, argv)
    left = EPOCHS[script] - len(load(out / "checkpoint.pt")["log"])
    code, text, err = run(script, argv)
    assert code == 0 and len(re.findall("^epoch ", text, re.M)) == left, err
    assert_same_run(out, finished)

def test_a_run_that_the_system_kills_resumes_to_the_same_result(runs, images, tmp_path):
    command = [sys.executable, HERE / "mdenas.py",
               *map(str, tiny(mdenas, images, tmp_path / "run", "--resume"))]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL)
    while len(read_log(tmp_path / "run")) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert run(mdenas, tiny(mdenas, images, tmp_path / "run", "--resume"))[0] == 0
    assert_same_run(tmp_path / "run", runs(mdenas)[0])

@each_script
def test_resume_starts_a_run_where_there_is_none(script, images, tmp_path, monkeypatch):
    """Also where one was killed before its first checkpoint; hidden files are in nobody's way."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".DS_Store").write_text("left by a file manager")
    (tmp_path / "run" / "checkpoint.pt.tmp").write_text("half of one")
    monkeypatch.setattr(script, "train_epoch", lambda *args: fail(Killed()))
    for more in (["--resume"], []):
        with pytest.raises(Killed):
            run(script, tiny(script, images, tmp_path / "run", *more))
        (tmp_path / "run" / "checkpoint.pt").unlink()
        (tmp_path / "run" / "log.jsonl").unlink()

@each_script
def test_a_finished_run_resumes_to_what_it_was(script, runs, images, tmp_path):
    finished, out = runs(script)[0], shutil.copytree(runs(script)[0], tmp_path / "a run")
    code, text, err = run(script, tiny(script, images, out, "--resume"))
    assert code == 0 and err == "" and "epoch  " not in text, err
    assert_same_run(out, finished)
    last = first_output(runs, script).splitlines()[-1]
    assert text.splitlines()[-1] == last.replace(str(finished), str(out))

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
@pytest.mark.parametrize("fault", ["first step", "last step", "full disk"])
def test_a_fault_in_the_third_epoch_of_a_run_keeps_the_last_checkpoint(
        script, runs, images, tmp_path, monkeypatch, fault):
    """Weights become not-a-number; or the disk is full."""
    out, step, calls = tmp_path / "run", torch.optim.SGD.step, itertools.count(1)
    batches = 4 if script is retrain else 2
    def spoiling(optimizer, *args):
        step(optimizer, *args)
        if next(calls) == 2 * batches + (batches if fault == "last step" else 1):
            nn.init.constant_(optimizer.param_groups[0]["params"][-1], math.nan)
    def write_bytes(path, data, write=Path.write_bytes):
        if len(read_log(out)) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)
    if fault == "full disk":
        monkeypatch.setattr(Path, "write_bytes", write_bytes)
    else:
        monkeypatch.setattr(torch.optim.SGD, "step", spoiling)
    code, _, err = run(script, tiny(script, images, out))
    words = [out, "No space left"] if fault == "full disk" else ["epoch 3:", "--lr"]
    assert code == 2 and len(err.splitlines()) == 1, err
    assert all(str(word) in err for word in words), err
    assert_same_run(out, runs(script)[1])

@each_script
def test_a_gpu_that_is_full_ends_a_run_with_advice(script, images, tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    monkeypatch.setattr(script, "train_epoch", lambda *args: fail(error))
    code, _, err = run(script, tiny(script, images, tmp_path / "run"))
    assert code == 2 and len(err.splitlines()) == 1
    assert "--batch-size" in err and str(error) in err

@each_search
@pytest.mark.parametrize("error", [RuntimeError("shape '[2, 3]' is invalid"), IndexError("5"),
                                   ValueError("of a student"), FileNotFoundError("table.npy"),
                                   MemoryError()], ids=repr)
def test_an_error_of_the_code_keeps_its_traceback_in_a_run(
        script, error, images, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train_epoch", lambda *args: 1.0)
    monkeypatch.setattr(type(make(script)), "record", lambda *args: fail(error))
    with pytest.raises(type(error)) as raised:
        run(script, tiny(script, images, tmp_path / "run"))
    assert raised.value is error

@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_a_run_with_one_line(images, tmp_path):
    command = [sys.executable, HERE / "ddp_nas.py",
               *map(str, tiny(ddp_nas, images, tmp_path / "run"))]
    process = subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    while not read_log(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and re.fullmatch("interrupted: .*--resume.*\n", err), err

def test_a_terminal_that_lacks_a_character_stops_no_run(images, tmp_path):
    command = [sys.executable, HERE / "mdenas.py",
               *map(str, tiny(mdenas, images, tmp_path / "s_größe"))]
    env = {**ENV, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=env, capture_output=True)
    assert done.returncode == 0 and done.stdout.isascii(), done.stderr
    assert b"###" in done.stdout and read_genotype(tmp_path / "s_größe")

# ==== resuming what cannot be resumed =============================================================
@each_script
@pytest.mark.parametrize("name, before, now", [
    ("lr", 0.1, 0.05), ("seed", 0, 1), ("batch-size", 8, 4), ("channels", 2, 4),
    ("image-size", 8, 12), ("dataset", "imagefolder", "synthetic"), ("of its own", None, None)])
def test_resume_of_a_run_under_other_settings_is_refused(script, runs, images, name, before, now):
    if before is None:
        name, before, now = {ddp_nas: ("passes", 1, 2), mdenas: ("alpha", 0.01, 0.02),
                             retrain: ("genotype", "Genotype", "random:1")}[script]
    begun = runs(script)[1]
    argv = tiny(script, images, begun, "--resume", "--" + name, now)
    words = [f"--{name} is {now} in this command, but {before} in {begun / 'checkpoint.pt'}"]
    if name == "dataset" and script is retrain:  # it brings a recipe of its own
        words = ["in this command, but"]
    if name == "genotype":
        words = ["--genotype is Genotype(", "in this command, but Genotype("]
    assert_refused(script, argv, begun, *words)

@each_script
def test_resume_of_a_run_with_another_number_of_processes_is_refused(
        script, runs, images, monkeypatch):
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    for name in ("start_processes", "compare_processes", "sum_over_ranks"):
        monkeypatch.setattr(script, name, lambda first: first)
    monkeypatch.setattr(script, "from_process_0", lambda function, args: function(args))
    begun = runs(script)[1]
    assert_refused(script, tiny(script, images, begun, "--resume"), begun,
                   "number of processes is 2 in this command, but 1 in ")

@each_script
def test_resume_of_a_run_with_other_images_is_refused(script, runs, images, tmp_path):
    begun, other = runs(script)[1], Path(shutil.copytree(images, tmp_path / "other"))
    argv = tiny(script, other, begun, "--resume")
    (other / "train" / "cats" / "00.png").rename(other / "train" / "cats" / "000.png")
    assert_refused(script, argv, begun, "digest of the file names")
    (other / "train" / "cats" / "000.png").unlink()
    assert_refused(script, argv, begun, "number of images is 35 in this command, but 36")
    for half in ("train", "val"):
        (other / half / "cats").rename(other / half / "wolves")
    assert_refused(script, argv, begun, "class 0 is dogs", "cats", begun / "checkpoint.pt")
    if script is retrain:
        argv = ["--evaluate", begun / "checkpoint.pt", "--data-dir", other, "--device", "cpu"]
        assert_refused(retrain, argv, begun, "classes", "cats", "wolves")

def trap(path):
    """Unpickled, it makes a folder."""
    return type("Trap", (), {"__reduce__": lambda self: (os.mkdir, (str(path),))})()

DAMAGES = {
    "cut": lambda path, sprung: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path, sprung: os.truncate(path, 0),
    "text": lambda path, sprung: path.write_text("no checkpoint"),
    "list": lambda path, sprung: torch.save([1, 2], path),
    "other script": lambda path, sprung: torch.save({**load(path), "settings": {}}, path),
    "code": lambda path, sprung: torch.save({**load(path), "network": trap(sprung)}, path),
    "bare pickle": lambda path, sprung: path.write_bytes(
        pickle.dumps({"settings": {}, "network": trap(sprung)}, 2)),
}

@each_script
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_of_a_run_is_refused_and_code_in_it_does_not_run(
        script, runs, images, tmp_path, damage):
    out, sprung = Path(shutil.copytree(runs(script)[1], tmp_path / "run")), tmp_path / "sprung"
    checkpoint = out / "checkpoint.pt"
    DAMAGES[damage](checkpoint, sprung)
    assert_refused(script, tiny(script, images, out, "--resume"), out, checkpoint)
    if script is retrain and damage != "other script":
        argv = ["--evaluate", checkpoint, "--data-dir", images, "--device", "cpu"]
        assert_refused(script, argv, out, checkpoint)
    assert not sprung.exists()
    if damage == "code":  # the trap is a real one
        torch.load(checkpoint, weights_only=False)
        assert sprung.exists()

# ==== bad input ===================================================================================
@each_script
def test_what_is_in_a_folder_is_not_written_over_by_a_run(script, runs, images, tmp_path):
    for out in runs(script):
        assert_refused(script, tiny(script, images, out), out, out, "--resume")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    for more in ([], ["--resume"]):
        argv = tiny(script, images, tmp_path / "run", *more)
        assert_refused(script, argv, tmp_path, tmp_path / "run", "not empty")
    (tmp_path / "file").write_text("something else")
    for out in ("file", "file/run"):
        assert_refused(script, tiny(script, images, tmp_path / out), tmp_path, tmp_path / "file")
    for other in SCRIPTS:
        if other is not script:
            argv = tiny(script, images, runs(other)[1], "--resume")
            assert_refused(script, argv, runs(other)[1], runs(other)[1] / "checkpoint.pt")

COMMON = {"batch-size": [0, -8, "many", 37, 1], "channels": [0, 1], "cells": [0, 2],
          "image-size": [0, -8, 10], "lr": [0, -0.1, "nan", "inf", "fast"],
          "seed": [-1], "workers": [-1], "dataset": ["mnist"]}
OPTIONS = {ddp_nas: {"passes": [0, -3, 1.5], "space": ["outer"], "batch-size": [19]},
           retrain: {"epochs": [0]},
           mdenas: {"epochs": [0], "alpha": [0, -0.1, "nan"], "backbone": ["tpu"],
                    "batch-size": [19]}}

@each_script
def test_options_out_of_range(script, images, tmp_path, monkeypatch):
    argv = tiny(script, images, tmp_path / "run")
    for name, values in [*COMMON.items(), *OPTIONS[script].items()]:
        for value in values:
            code, _, err = run(script, [*argv, "--" + name, value])
            assert code == 2 and f"--{name}" in err.splitlines()[-1], err
    for dataset in ("cifar10", "cifar100"):
        more = ["--dataset", dataset, "--image-size", 16]
        assert_refused(script, [*argv, *more], tmp_path, "--image-size")
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    with pytest.raises(script.InputError, match="--batch-size 8 must be a multiple of 3"):
        script.check_batch_size(8, 100)
    with pytest.raises(script.InputError, match="--batch-size 3 .* 2 images"):
        script.check_batch_size(3, 100)
    script.check_batch_size(6, 6)

@each_script
def test_help_shows_the_defaults(script):
    code, text, _ = run(script, ["--help"])
    assert code == 0
    for words in ("default: 0", "default: runs", "default: data"):
        assert words in text
    if script is retrain:
        assert "--batch-size scales it" in text
    else:
        row = re.search("^  cifar10 .*$", text, re.M)[0]
        cells = 8 if script is ddp_nas else 6
        assert f"channels 16, cells {cells}, image_size 32, batch_size 512, lr 0.025" in row

@each_script
def test_bad_folders_of_images(script, tmp_path):
    argv, train = tiny(script, tmp_path, tmp_path / "run"), tmp_path / "train"
    nowhere = tiny(script, tmp_path / "nowhere", tmp_path / "run")
    assert_refused(script, nowhere, tmp_path, "--data-dir", tmp_path / "nowhere" / "train")
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
        assert_refused(script, argv, tmp_path, tmp_path, "val", "dogs", "wolves")

@each_script
def test_bad_images_are_named(script, tmp_path):
    argv, train = tiny(script, tmp_path, tmp_path / "run"), tmp_path / "train"
    write_images(train, count=10)
    write_images(tmp_path / "val", count=2)
    culprit = train / "dogs" / "07.png"
    contents = [b"no image", culprit.read_bytes()[:100]]
    buffer = io.BytesIO()
    Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)).save(buffer, "png")
    for content in (*contents, buffer.getvalue()):  # the last has pixels of 16 bits
        culprit.write_bytes(content)
        assert_refused(script, argv, tmp_path, culprit)

@each_script
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   PermissionError(errno.EACCES, "Permission denied"),
                                   OSError("no route to host"), None])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_that_cannot_be_downloaded_says_why(script, dataset, error, tmp_path, monkeypatch):
    """None: it is downloaded, and is not what it should be."""
    data = tmp_path / "data"
    download = "torchvision.datasets.cifar.download_and_extract_archive"
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **more: fail(error))
    if not error:
        monkeypatch.setattr(download, lambda *args, **more: None)
    code, _, err = run(script, [*LENGTH[script], "--dataset", dataset, "--device", "cpu",
                                "--data-dir", data, "--out", tmp_path / "run"])
    line = err.splitlines()[-1]
    assert code == 2 and "Traceback" not in err
    assert line.startswith(f"error: --data-dir {data}: {dataset.upper()} cannot be read")
    assert (error.strerror or "no route to host" if error else "corrupted") in line

@each_script
@pytest.mark.parametrize("dataset, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_as_its_files_have_it(script, dataset, classes, tmp_path, monkeypatch):
    """Files of 20 images a batch, in the layout of the data set."""
    name = dataset.upper()
    folder = tmp_path / getattr(script.torchvision.datasets, name).base_folder
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
        opened = script.open_images(args, train)
        assert opened.classes == names and opened.labels.tolist() == [label for _, label in rows]
        assert (opened.images.flatten(1).numpy() == np.stack([row for row, _ in rows])).all()
    batches = script.Batches(opened, torch.arange(20), 20, False, args)
    x = batches.normalise(opened.images[:1])
    mean, std = {"cifar10": (0.4914, 0.2470), "cifar100": (0.5071, 0.2673)}[dataset]
    first = (expected[False][0][0][0] / 255 - mean) / std
    assert x[0, 0, 0, 0].item() == pytest.approx(first, abs=1e-5)

@pytest.mark.parametrize("argv, words", [
    ("", ["runs/ddp_nas/genotype.json", "python ddp_nas.py"]),
    ("--genotype DDPNAS_9", ["DDPNAS_9", "DDPNAS_2"]), ("--genotype random:x", ["random:x"]),
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
USE, RANDOM_SEARCH, OPERATION, BENCHMARK, COURSEWORK = BLOCKS

def run_block(block, folder, *argv):
    """A block of the README as a script of its own -> what it prints."""
    (folder / "block.py").write_text(block, encoding="utf-8")
    done = subprocess.run([sys.executable, "block.py", *map(str, argv)], cwd=folder, env=ENV,
                          capture_output=True, text=True, encoding="utf-8", timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout

def test_readme_classifies_an_image_with_the_network_of_a_run(runs, images, tmp_path):
    photo = images / "val" / "dogs" / "00.png"
    text = run_block(USE, tmp_path, runs(retrain)[0] / "best.pt", photo)
    assert re.fullmatch(r"(cats|dogs): \d+\.\d%\n", text)
    exported = torch.export.load(tmp_path / "network.pt2").module()
    assert exported(torch.rand(3, 3, 8, 8)).shape == (3, 2)

def test_readme_runs_random_search(tmp_path):
    options = "--epochs 8 --channels 2 --image-size 8 --batch-size 96 --device cpu".split()
    run_block(RANDOM_SEARCH, tmp_path, *options)
    out = tmp_path / "runs" / "random_search"
    log, genotype, edge = read_log(out), read_genotype(out), 0
    winner = max(log, key=lambda row: row["accuracy"])["sample"]
    assert len(log) == 8 and len({tuple(row["sample"]) for row in log}) == 8
    for cell in (genotype.normal, genotype.reduce):
        for i, node in enumerate(nodes_of(cell)):
            on_edges = [list(ddp_nas.OPS)[op] for op in winner[edge:edge + 2 + i]]
            if sum(name != "none" for name in on_edges) >= 2:
                assert all(on_edges[source] == name for name, source in node)
            edge += 2 + i

def test_readme_searches_and_trains_with_an_operation_of_ones_own(
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
    assert re.search("none .* conv_$", capsys.readouterr().out, re.M)
    genotype = read_genotype(tmp_path / "search")
    assert "conv_3x3" in {op for op, _ in genotype.normal + genotype.reduce}
    del ddp_nas.OPS["conv_3x3"]
    assert_refused(ddp_nas, [*search, "--resume"], tmp_path, "list of operations is", "conv_3x3")

def test_readme_finds_better_than_random_search_where_accuracies_add_up(tmp_path):
    """The benchmark's format, with made-up accuracies."""
    draw, table = np.random.default_rng(0), {}
    worth = draw.random((8, 3))
    for sample in itertools.product(range(3), repeat=8):
        mean = 80 + 10 * worth[range(8), sample].mean()
        trainings = (mean + 0.1 * draw.standard_normal(3)).tolist()
        table["".join(map(str, sample))] = {"test_acc": trainings, "mean_acc": mean}
    (tmp_path / "nas-bench-macro_cifar10.json").write_text(json.dumps(table))
    pruned, random = map(float, re.findall(r": ([\d.]+) %", run_block(BENCHMARK, tmp_path)))
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
    ([], 0.449, 0.899),
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
