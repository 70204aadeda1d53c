"""Tests, on made-up data: against loops, brute force and known counts, never the scripts' output.

    python -m pytest -q test_nas.py
"""
import ast, contextlib, copy, errno, functools, io, itertools, json, math, multiprocessing
import os, pickle, re, resource, shlex, shutil, signal, subprocess, sys, time, urllib.request
import zipfile, zlib
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
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
each_script, each_search = (
    pytest.mark.parametrize("script", scripts, ids=lambda script: script.METHOD)
    for scripts in (SCRIPTS, SCRIPTS[:2]))
torch.set_num_threads(1)  # as in the processes started below: sums of floats depend on it

# ==== helpers =====================================================================================
def write_images(folder, classes=("cats", "dogs"), count=18, size=8):
    """Fill folder/<class>/*.png with noise, brighter in the later classes."""
    noise = np.random.default_rng(0)
    for (i, name), j in itertools.product(enumerate(classes), range(count)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(30 * i, 30 * i + 100, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{j:02}.png")

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
        except SystemExit as stop:
            code = stop.code
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return code, out.getvalue(), err.getvalue()

def files(folder):
    """All but those that are to be renamed, or that a killed run left before it could."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".tmp"}

def assert_refused(script, argv, folder, *words):
    """Exit code 2, one line of stderr (below argparse's usage) has these words, no file touched."""
    before, (code, out, err) = files(folder), run(script, argv)
    *usage, line = err.splitlines()
    assert code == 2 and out == "" and files(folder) == before, (out, err)
    assert not usage or usage[0].startswith("usage:"), err
    assert all(text.startswith(" ") for text in usage[1:]), err
    assert "error: " in line and all(str(word) in line for word in words), err

load = functools.partial(torch.load, weights_only=True)

def read_genotype(out):
    return json.loads((out / "genotype.json").read_text())

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
    assert files(a).keys() == {a / path.name for path in files(b)} and read_log(a) == read_log(b)
    for path in a.glob("*.pt"):
        one, other = load(path), load(b / path.name)
        assert len(one.pop("log")) == len(other.pop("log")) and same(one, other), path
    for path in [*a.glob("*.json"), *a.glob("*.md")]:
        assert path.read_text() == (b / path.name).read_text()

def chi_square_is_usual(counts, expected):
    """Are the counts as near to the expected as in all but one of about 30,000 draws? (Wilson)"""
    counts = np.asarray(counts)
    degrees, distance = counts.size - 1, ((counts - expected) ** 2 / expected).sum()
    return distance < degrees * (1 - 2 / (9 * degrees) + 4 * math.sqrt(2 / (9 * degrees))) ** 3

def drive(distribution, measure, epochs=None):
    """So many epochs, or all, of accuracy = measure(sample, epoch) -> [(sample, accuracy), ...]."""
    history = []
    for epoch in range(1, 1 + (epochs or distribution.total_epochs)):
        sample = distribution.sample()
        history.append((sample, measure(sample, epoch)))
        distribution.record(*history[-1])
    return history

class Given(list):
    """Batches that are a list of (images, labels)."""
    device, epoch = "cpu", 0

    @property
    def count(self):
        return sum(len(labels) for _, labels in self)

    def normalise(self, images):
        return images

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made-up images")
    write_images(folder / "train")
    write_images(folder / "val", count=7)
    return folder

def at_call(number, function, action):
    """The function, but that action() comes before its call of this number."""
    calls = itertools.count(1)
    return lambda *args: (next(calls) == number and action(), function(*args))[1]

def fail(error):
    raise error

@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """runs(script) -> the folders of a tiny run to the end, and of one stopped in its 3rd epoch."""
    @functools.cache
    def runs(script):
        done, begun = (tmp_path_factory.mktemp(script.METHOD) / name for name in ("a run", "begun"))
        code, text, err = run(script, tiny(script, images, done))
        assert code == 0 and err == "", err
        (done.parent / "stdout.txt").write_text(text)
        stop = lambda: fail(KeyboardInterrupt)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "train_epoch", at_call(3, script.train_epoch, stop))
            code, _, err = run(script, tiny(script, images, begun))
        assert code == 130 and len(err.strip().splitlines()) == 1 and "--resume" in err
        assert len(read_log(begun)) == 2
        return done, begun
    return runs

# ==== the scripts as texts ========================================================================
TEXTS = {script: (HERE / f"{script.METHOD}.py").read_text() for script in SCRIPTS}

def test_shared_blocks_are_the_same_to_the_character():
    pattern = re.compile(r"^ *# ==== shared: (.+?) =+\n(.*?)(?=^ *# ====)", re.S | re.M)
    blocks = {script: dict(pattern.findall(text)) for script, text in TEXTS.items()}
    assert blocks[ddp_nas].keys() == blocks[mdenas].keys() >= blocks[retrain].keys()
    assert all(TEXTS[script].count("# ==== shared: ") == len(blocks[script]) for script in SCRIPTS)
    assert len(blocks[retrain]) >= 3
    for script, (name, block) in itertools.product((mdenas, retrain), blocks[ddp_nas].items()):
        other = blocks[script].get(name, block)
        lines = itertools.zip_longest(block.splitlines(), other.splitlines())
        for number, (a, b) in enumerate(lines, 1):
            assert a == b, f"{script.METHOD}.py, block {name!r}, line {number}: {b!r}, not {a!r}"

def test_the_scripts_are_short_and_the_searches_differ_little():
    for path in HERE.glob("*.py"):
        assert [line for line in path.read_text().splitlines() if len(line) > 100] == [], path
    lines = {script: TEXTS[script].splitlines() for script in SCRIPTS}
    for script in SCRIPTS[:2]:
        ruler = [line.startswith("# Nothing of the papers stands below") for line in lines[script]]
        assert 0 <= ruler.index(True) < 345 and len(lines[script]) <= 760
    assert len(lines[retrain]) <= 900
    command = ["diff", "ddp_nas.py", "mdenas.py"]
    diff = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout
    assert 0 < len(re.findall("^[<>]", diff, re.M)) < 120

@each_script
def test_a_script_stands_alone_and_runs_no_text(script):
    nodes = list(ast.walk(ast.parse(TEXTS[script])))
    names = {getattr(node, key, None) for node in nodes for key in ("id", "module")}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not names & {"ddp_nas", "mdenas", "retrain", "eval", "exec"}
    assert {"torch", "parse_args"} <= names
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
def test_a_pass_visits_every_alive_operation_and_a_round_prunes_by_theta(
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
def test_update_is_what_a_double_loop_makes_it(num_ops, alpha):
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

def test_rows_stay_probabilities_over_10_000_updates():
    draw, emptied = np.random.default_rng(4), 0
    distribution = mdenas.MultinomialDistribution(10, 6, epochs=10_000, alpha=0.3, seed=4)
    for epoch in range(10_000):
        if epoch % 50 == 0:
            randomise(distribution, draw)
        before = distribution.probabilities.clone()
        distribution.record(distribution.sample(), float(draw.random()))
        p = distribution.probabilities
        assert (p >= 0).all() and ((p.sum(1) - 1).abs() < 1e-9).all()
        emptied += ((p == 0) & (before > 0)).any().item()
    assert emptied > 50

def test_sampling_honours_the_probabilities():
    p = np.array([[0.5, 0, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4, 0]])
    distribution = mdenas.MultinomialDistribution(2, 5, epochs=20_000, seed=6)
    distribution.probabilities, counts = torch.from_numpy(p.copy()), np.zeros((5, 5))
    for sample, _ in drive(distribution, lambda sample, epoch: 0):  # none beats another: they stay
        counts[tuple(sample)] += 1
    expected = 20_000 * np.outer(*p)  # the edges are independent
    assert (distribution.probabilities.numpy() == p).all() and counts[expected == 0].sum() == 0
    assert chi_square_is_usual(counts[expected > 0], expected[expected > 0])

# ==== both distributions ==========================================================================
def make(script, seed=0, num_edges=6):
    return (ddp_nas.DynamicDistribution(num_edges, 4, seed=seed) if script is ddp_nas else
            mdenas.MultinomialDistribution(num_edges, 4, epochs=27, seed=seed))

@each_search
def test_planted_optimum_is_found_from_any_seed_and_under_noise(script):
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
def test_samples_are_lists_of_numbers_and_what_is_no_accuracy_is_refused(script):
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
    assert distribution.probabilities.dtype == torch.float64

@each_search
@pytest.mark.parametrize("stop", [0, 1, 11, 26])
def test_state_goes_on_where_it_was_and_the_seed_decides(script, stop):
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
@pytest.mark.parametrize("name, stride", [*itertools.product(ddp_nas.PRIMITIVES, (1, 2))])
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

def assert_derived(strength, cells, best=None):
    """The cells as brute force would have them; among equals whichever, but best where given."""
    edge, names = 0, ddp_nas.PRIMITIVES
    for cell, i in itertools.product(("normal", "reduce"), range(4)):
        values = []  # of the edges of this node: how strong is what stands on it
        for source in range(2 + i):
            row = [-1, *map(float, strength[edge + source][1:])]  # without `none`
            op = best[edge + source] if best else 0
            values.append(row[op] if op else max(row))
            for name, other in cells[cell][i]:
                right = [op] if op else [j for j in range(8) if math.isclose(row[j], max(row))]
                assert other != source or names.index(name) in right
        (_, one), (_, other) = cells[cell][i]
        assert one != other and {one, other} <= set(range(2 + i)) and len(cells[cell]) == 4
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

@pytest.mark.parametrize("name", retrain.PUBLISHED_BLOCKS)
def test_published_mobile_architecture_is_a_point_of_the_space(name):
    genotype, backbone = retrain.load_genotype(name), name[-3:].lower()
    network, blocks = ddp_nas.MobileSupernet(backbone, 5), genotype["blocks"]
    sample = [ddp_nas.CANDIDATES.index(tuple(block)) for block in blocks]
    logits = network(torch.randn(2, 3, 32, 32), sample)
    logits.sum().backward()
    used = sum(weight.numel() for weight in network.parameters() if weight.grad is not None)
    assert len(blocks) == len(network.blocks) and logits.shape == (2, 5)
    assert used == count_by_hand(blocks, WIDTHS[backbone], 5)
    assert used == count_weights(retrain.build_network(genotype, "imagenet", 5))

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
    batches = Given([(torch.randn(4, 3, 16, 16), torch.arange(4))])
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
    pixels = torch.randint(256, (count, 8, 8, 3), generator=g, dtype=torch.uint8)
    return ddp_nas.ImageTensor(pixels, torch.arange(count), [], "cpu")

def test_training_batches_are_crops_of_the_padded_images_flipped_or_not(images):
    args = settings(dataset="imagefolder", data_dir=images)
    opened, paths = ddp_nas.open_images(args, train=True), sorted((images / "train").rglob("*.png"))
    padded = [np.pad(Image.open(path), ((1, 1), (1, 1), (0, 0))) for path in paths]
    assert opened.classes == ["cats", "dogs"] and opened.labels.tolist() == 18 * [0] + 18 * [1]
    opened.labels, index = torch.arange(36), torch.arange(3, 36, 2)
    seen, places = [], set()
    turns = {*itertools.product(range(3), range(3), (1, -1))}
    batches = ddp_nas.Batches(opened, index, 8, True, args)
    for batches.epoch in range(10):
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
        assert len(set(seen[-1])) == len(seen[-1]) == batches.count == 16
        assert set(seen[-1]) <= set(index.tolist())
    assert len(set(map(tuple, seen))) == 10 and places == turns  # the order is new every epoch

def test_ranks_share_every_batch_and_need_no_image_each(monkeypatch):
    monkeypatch.setattr(ddp_nas, "WORLD_SIZE", 3)
    for count, train in ((24, True), (24, False), (2, False)):
        seen = []
        for rank in range(3):
            monkeypatch.setattr(ddp_nas, "RANK", rank)
            index = torch.arange(count)
            batches = ddp_nas.Batches(indexed_images(count), index, 12, train, settings())
            seen += [(len(labels), label) for _, labels in batches for label in labels.tolist()]
        size = 4 if count == 24 else 1
        assert sorted(seen) == [(size, label) for label in range(count)]

@each_search
def test_halves_are_halves_and_validated_in_batches_of_one_size(script, monkeypatch):
    images = indexed_images(101)
    monkeypatch.setattr(script, "open_images", lambda args, train: images)
    halves = [script.open_halves(settings(seed)) for seed in (0, 0, 1)]
    one, again, other = (set(train.index.tolist()) for train, _ in halves)
    validation = halves[0][1]
    validated = torch.cat([labels for _, labels in validation]).tolist()
    assert one == again != other and not one & set(validated)
    assert len(one) == 51 and len(set(validated)) == validation.count == 48
    assert {len(labels) for _, labels in validation} == {12}
    for crops, labels in validation:
        assert torch.equal(crops, images.crops[labels, 1, 1])  # as they are
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    assert script.open_halves(settings(batch_size=18))[1].batch_size == 15  # 5 a process

def test_made_up_images_are_beyond_a_linear_classifier():
    images, labels, names = ddp_nas.make_gratings(4000, 16, seed=0)
    assert images.shape == (4000, 16, 16, 3) and images.dtype == torch.uint8
    assert len(set(names)) == 10
    assert chi_square_is_usual(torch.bincount(labels, minlength=10), 400)
    x = torch.cat([images.flatten(1).double() / 128 - 1, torch.ones(4000, 1).double()], 1)
    ridge = x[:3000].T @ x[:3000] + 30 * torch.eye(x.shape[1]).double()
    weights = torch.linalg.solve(ridge, x[:3000].T @ F.one_hot(labels[:3000], 10).double())
    assert ((x[3000:] @ weights).argmax(1) == labels[3000:]).double().mean() < 0.3

@pytest.fixture(scope="module")
def large_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    write_images(folder / "train", count=6, size=90)
    write_images(folder / "val", count=3, size=90)
    return folder

def test_augmentation_depends_on_its_key_alone_and_touches_no_other_generator(
        large_images, monkeypatch):
    folder = ddp_nas.Folder(large_images / "train", settings(image_size=72))
    for generator in (torch, torch.cuda):  # torch.manual_seed would wait for a GPU
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(generator, name, lambda *seed: fail(AssertionError), raising=False)
    items = []
    for seed in (1, 2):
        torch.default_generator.manual_seed(seed)
        before = torch.get_rng_state()
        items.append([folder[key][0] for key in ((3, 5), (3, 6), (4, 5), (3, -1))])
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*items) and all(item.shape == (3, 72, 72) for item in items[0])
    assert not any(same(a, b) for a, b in itertools.combinations(items[0], 2))

def test_no_worker_outlives_an_epoch(large_images):
    args = settings(image_size=72, workers=2, dataset="imagefolder", data_dir=large_images)
    for train in (True, False):
        opened = ddp_nas.open_images(args, train)
        index = torch.arange(len(opened.labels))
        for _ in range(2):
            batches = ddp_nas.Batches(opened, index, 4, train, args)
            assert sum(len(labels) for _, labels in batches) == batches.count
            assert multiprocessing.active_children() == []

# ==== whole searches ==============================================================================
def strength_by_hand(script, log, num_edges, num_ops):
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
def test_search_end_to_end(script, runs, images):
    out, epochs = runs(script)[0], EPOCHS[script]
    log, genotype, text = read_log(out), read_genotype(out), (out.parent / "stdout.txt").read_text()
    names = {"cell.md", "checkpoint.pt", "genotype.json", "log.jsonl"}
    assert {path.name for path in files(out)} == names
    assert [row["epoch"] for row in log] == list(range(1, epochs + 1))
    assert all(row["accuracy"] in [right / 18 for right in range(19)] for row in log)
    assert all(0 < row["loss"] < 9 for row in log)
    assert (genotype["method"], genotype["space"]) == (script.METHOD, "cell")
    strength, best = strength_by_hand(script, log, 28, 8)
    assert_derived(strength, genotype, best)
    chart, *cells = graphs_of(out)
    for graph, cell in zip(cells, ("normal", "reduce"), strict=True):
        drawn = re.findall(r"^ *(\d) -->\|(\w+)\| (\d)$", graph, re.M)
        assert drawn == [(str(source), op, str(2 + i)) for i, node in enumerate(genotype[cell])
                         for op, source in node]
    means = [row["accuracy"] for row in log]
    if script is ddp_nas:
        rounds = [[row["accuracy"] for row in log if row["alive"] == k] for k in range(8, 1, -1)]
        means = [sum(accuracies) / len(accuracies) for accuracies in rounds]
    (line,) = re.findall(r"line \[(.*)\]", chart)
    assert "xychart" in chart
    np.testing.assert_allclose([*map(float, line.split(","))], np.multiply(100, means), atol=0.06)
    shown = re.findall(r"^epoch +(\d+)/(\d+) ", text, re.M)
    assert shown == [(str(i + 1), str(epochs)) for i in range(epochs)]
    assert "\r" not in text and "\033" not in text  # a file, not a terminal
    if script is ddp_nas:  # a pruned operation more per edge and table
        assert [row["alive"] for row in log] == [k for k in range(8, 1, -1) for _ in range(k)]
        pattern = r"^ +none +max3 +avg3 .*\n((?:(?:normal|reduce) .{,72}\n){28})"
        tables = re.findall(pattern, text, re.M)
        assert [table.count(" x") for table in tables] == [28 * k for k in range(1, 8)]
    command = shlex.split(text.split("to train it alone: ")[1])  # of paths with spaces
    assert command == ["python", "retrain.py", "--genotype", str(out / "genotype.json"),
                       "--data-dir", str(images)] and " " in command[3] and " " in command[5]

@each_script
def test_same_seed_same_result_and_the_rate_falls_by_a_cosine(script, runs, images, tmp_path):
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

@each_search
def test_a_learning_rate_below_the_least_never_rises(script, images, tmp_path, monkeypatch):
    rates = []
    def train_epoch(network, optimizer, batches, sample):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        return 1.0
    monkeypatch.setattr(script, "train_epoch", train_epoch)
    monkeypatch.setattr(script, "evaluate", lambda *args: 0.5)
    assert run(script, tiny(script, images, tmp_path / "run", "--lr", 0.0005))[0] == 0
    assert rates[0] == 0.0005 and rates == sorted(rates, reverse=True)

@pytest.fixture
def short_backbone(monkeypatch):
    for script in SCRIPTS:
        monkeypatch.setitem(script.BACKBONES, "cpu", ([(8, 1), (8, 2), (12, 1)], 16))

@each_search
def test_mobile_search_and_summary_of_what_it_found(script, short_backbone, images, tmp_path):
    out = tmp_path / "run"
    argv = tiny(script, images, out, "--space", "mobile", "--backbone", "cpu")
    assert run(script, argv)[0] == 0
    genotype, log = read_genotype(out), read_log(out)
    blocks = [tuple(block) for block in genotype["blocks"]]
    assert (genotype["space"], genotype["backbone"], len(blocks)) == ("mobile", "cpu", 3)
    assert len(log) == (44 if script is ddp_nas else 12)
    assert all(len(row["sample"]) == 3 for row in log) and len(graphs_of(out)) == 1
    strength, best = strength_by_hand(script, log, 3, 9)
    for i, (row, block) in enumerate(zip(strength, blocks)):
        op = ddp_nas.CANDIDATES.index(block)
        assert op == best[i] if best else math.isclose(row[op], max(row))
    code, text, err = run(retrain, ["--genotype", out / "genotype.json", "--data-dir", images,
                                    "--device", "cpu", "--image-size", 8, "--summary"])
    count = count_by_hand(blocks, [40, 8, 8, 12, 16], 2)
    assert code == 0 and f" {count:,} parameters" in text, err

@pytest.mark.parametrize("workers", [0, 1])
def test_large_images_are_read_when_they_are_needed(short_backbone, tmp_path, workers):
    write_images(tmp_path / "train", count=4, size=90)
    argv = tiny(mdenas, tmp_path, tmp_path / "run", "--space", "mobile", "--backbone", "cpu",
                "--batch-size", 4, "--image-size", 72, "--epochs", 1, "--workers", workers)
    code, _, err = run(mdenas, argv)
    assert code == 0 and len(read_genotype(tmp_path / "run")["blocks"]) == 3, err
    for culprit in (tmp_path / "train").rglob("*.png"):
        culprit.write_bytes(b"no image")
    code, _, err = run(mdenas, [*argv, "--out", tmp_path / "other"])
    assert code == 2 and re.fullmatch(rf".*{tmp_path}/train/\w+/\d+\.png.*\n", err)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("script", [mdenas, retrain], ids=lambda script: script.METHOD)
def test_run_on_cuda(script, images, tmp_path):
    argv = tiny(script, images, tmp_path / "run", "--device", "cuda", "--epochs", 3)
    code, _, err = run(script, argv)
    assert code == 0 and len(read_log(tmp_path / "run")) == 3, err

# ==== the devices =================================================================================
@each_script
def test_bfloat16_only_where_the_gpu_computes_in_it(script, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: seen.append((*args, more)))
    for native, device in itertools.product((False, True), ("cpu", "cuda")):
        def is_supported(including_emulation=True):
            return native or including_emulation
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
        script.autocast(device)
        enabled = native and device == "cuda"
        assert seen.pop() == (device, torch.bfloat16, {"enabled": enabled}) and not seen

def test_the_device_is_set_up_before_it_is_used(runs, images, tmp_path, monkeypatch):
    order, checkpoint = [], runs(retrain)[0] / "checkpoint.pt"
    for name in ("start_ranks", "summarise", "test", "train"):
        monkeypatch.setattr(retrain, name, lambda args, name=name: order.append(name))
    for more in (["--summary"], ["--evaluate", checkpoint], []):
        assert run(retrain, tiny(retrain, images, tmp_path / "run", *more))[0] == 0
    assert order == ["start_ranks", "summarise", "start_ranks", "test", "start_ranks", "train"]

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
    batches = Given([(torch.randn(4, 3, 32, 32), torch.arange(4))] * 3)
    messages, counts = pretend_two_ranks(script, monkeypatch), []
    recipe = {"smoothing": 0, "auxiliary": 0.4, "cutout": 0, "clip": 5}
    args = Namespace(large=False, compile=False, recipe=recipe, image_size=32)
    sample = args if script is retrain else [1] * 28
    for cells in (3, 5):
        network = (script.CellNetwork(script.random_genotype(0), 2, cells, 4, False, False)
                   if script is retrain else script.CellSupernet(2, cells, 4))
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        script.train_epoch(network, optimizer, batches, sample)
        sizes = Counter(len(message) for message in messages)
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
    genotype, num_classes = retrain.load_genotype(name), 1000 if dataset == "imagenet" else 10
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
    (count, checksum, some), genotype = LAYOUTS[name], retrain.load_genotype(name)
    dataset, num_classes = genotype["settings"]["dataset"], 10 if name == "MDENAS" else 1000
    with torch.device("meta"):
        network = retrain.build_network(genotype, dataset, num_classes, auxiliary=name == "MDENAS")
    entries = [(key.split(".")[-1], tuple(value.shape))
               for key, value in network.state_dict().items()]
    assert len(entries) == count
    assert all(entries[i] == ("weight", shape) for i, shape in some.items())
    text = "\n".join(f"{last} {'x'.join(map(str, shape))}" for last, shape in entries)
    assert zlib.crc32(text.encode()) == checksum

@pytest.mark.parametrize("name", [*retrain.PUBLISHED_CELLS, *retrain.PUBLISHED_BLOCKS])
def test_every_published_network_runs(name):
    args = retrain.parse_args(["--genotype", name, "--device", "cpu"])
    imagenet = name in ("DDPNAS_IMAGENET", *retrain.PUBLISHED_BLOCKS)
    expected = ("imagenet", 224) if imagenet else ("cifar10", 32)
    assert (args.dataset, args.image_size) == expected
    network = retrain.build_network(args.genotype, args.dataset, 5, 4, 3).eval()
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    if name == "DDPNAS_1":  # the others are known by their counts
        cells = str([args.genotype["normal"], args.genotype["reduce"]])
        text = re.sub("_conv|_pool|x[35]|[^a-z0-9]", "", cells)
        assert text == ("sep50max31sep32max30dil50sep31avg32max34"
                        "sep31dil50dil51sep50sep30avg33max31sep30")

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
    genotype = retrain.load_genotype("DDPNAS_IMAGENET")
    network = retrain.build_network(genotype, "imagenet", 3, 8, 3)
    network.to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    network(images).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters())

def test_drop_path_zeroes_whole_images_but_no_identity_and_nothing_in_evaluation():
    torch.manual_seed(0)
    skip, seen = ["skip_connect", 1], []
    nodes = [[["skip_connect", 0], skip], [["avg_pool_3x3", 0], skip]] * 2
    genotype = {"space": "cell", "normal": nodes, "reduce": nodes}
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
        assert chi_square_is_usual(counts, np.array([600, 1400])) if training else counts[0] == 0

def test_drop_path_grows_with_the_epochs_and_the_large_setting_trains(
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
    assert chi_square_is_usual(centres, 20)

def test_cutout_and_drop_path_share_no_seed_with_the_shuffle(images, tmp_path, monkeypatch):
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
    monkeypatch.setattr(retrain, "evaluate", lambda *args: [0.5, 0.5])
    monkeypatch.setattr(retrain, "WORLD_SIZE", 2)
    for name in ("start_ranks", "barrier", "average_over_ranks"):
        monkeypatch.setattr(retrain, name, lambda *args: None)
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
        genotype, mobile = (retrain.load_genotype(f"random:{seed}{more}") for more in ("", ":gpu"))
        assert genotype == retrain.load_genotype(f"random:{seed}")
        assert genotype == retrain.check_genotype(genotype, "")
        assert mobile == retrain.check_genotype(mobile, "")
        blocks.update((i, *block) for i, block in enumerate(mobile["blocks"]))
        for cell, i in itertools.product(("normal", "reduce"), range(4)):
            sources[cell, i, tuple(source for _, source in genotype[cell][i])] += 1
            operations.update((cell, i, op) for op, _ in genotype[cell][i])
    pairs = [1, 3, 6, 10]  # of the sources of each node
    counts = len(operations), len(sources), len(blocks)
    assert counts == (8 * 7, 2 * sum(pairs), 14 * 9)
    assert chi_square_is_usual(list(operations.values()), 2000 / 7)
    expected = np.array([1000 / pairs[i] for _, i, _ in sources])
    assert chi_square_is_usual(list(sources.values()), expected)
    assert chi_square_is_usual(list(blocks.values()), 1000 / 9)

# ==== training and testing them ===================================================================
@pytest.mark.parametrize("argv, size, expected", [
    ("MDENAS", (36, 20), (600, 96, 0.025, "cosine", 3e-4, 3e-4, 5, 0, 0.4, 0.2, 0.5)),
    ("MDENAS --large", (44, 20), (1800, 96, 0.025, "cosine", 3e-4, 3e-4, 5, 0, 0.4, 0.2, 0.5)),
    ("MDENAS --dataset imagenet", (48, 14), (250, 512, 0.1, 0.97, 3e-5, 3e-5, 5, 0.1, 0.4, 0, 0)),
    ("MDENAS_CPU", (None, None), (120, 1024, 0.4, "cosine", 4e-5, 0, math.inf, 0.1, 0, 0, 0)),
    ("MDENAS_CPU --batch-size 256", (None, None),
     (120, 256, 0.1, "cosine", 4e-5, 0, math.inf, 0.1, 0, 0, 0))])
def test_recipes_are_those_of_the_papers(argv, size, expected):
    args = retrain.parse_args(["--device", "cpu", "--genotype", *argv.split()])
    names = "decay weight_decay norm_decay clip smoothing auxiliary drop_path cutout".split()
    recipe = [args.recipe[name] for name in names]
    assert (args.epochs, args.batch_size, args.lr, *recipe) == expected
    assert (args.channels, args.cells) == size

class FakeNetwork(nn.Linear):
    def forward(self, images):
        """Logits of 7 classes from the first pixels, others from the next ones while training."""
        pixels = 0.01 * images.flatten(1) + 0 * self.bias
        return (pixels[:, :7], pixels[:, 7:14]) if self.training else pixels[:, :7]

def fake_batches(train):
    pixels = np.tile(np.arange(256, dtype=np.uint8), (50, 1))
    pixels = torch.from_numpy(np.random.default_rng(0).permuted(pixels, axis=1)[:, :192])
    labels = torch.arange(50) % 7
    images = retrain.ImageTensor(pixels.view(50, 8, 8, 3), labels, [], "cpu")
    batches = retrain.Batches(images, torch.arange(50), 16, train, settings())
    batches.mean, batches.std = 0, 1
    return batches

def test_errors_are_those_of_plain_python_and_of_float32(monkeypatch):
    batches, wrong, network = fake_batches(False), [0, 0], FakeNetwork(1, 1).eval()
    for i, image in enumerate(batches.images.crops[:, 1, 1].flatten(1).tolist()):
        ranking = sorted(range(7), key=lambda c: -image[c])
        wrong = [count + (i % 7 not in ranking[:n]) for count, n in zip(wrong, (1, 5))]
    for script in (ddp_nas, mdenas):
        accuracy = script.evaluate(lambda images, sample: network(images), batches, None)
        assert accuracy == pytest.approx(1 - wrong[0] / 50) and 0 < wrong[1] < wrong[0] < 50
    for where in (torch, retrain):
        monkeypatch.setattr(where, "autocast", lambda *args, **more: fail(AssertionError))
    errors = retrain.evaluate(network, batches)
    assert errors == pytest.approx([wrong[0] / 50, wrong[1] / 50])

def test_training_loss_is_smoothed_and_takes_in_the_auxiliary_head():
    network, batches, losses = FakeNetwork(1, 1), fake_batches(True), []
    for images, labels in batches:
        for image, label in zip(images.flatten(1).tolist(), labels.tolist()):
            for part, weight in ((image[:7], 1), (image[7:14], 0.4)):
                total = math.log(sum(math.exp(0.01 * x) for x in part))
                losses += [weight * (0.1 / 7 + 0.9 * (c == label)) * (total - 0.01 * part[c])
                           for c in range(7)]
    recipe = {"smoothing": 0.1, "auxiliary": 0.4, "cutout": 0, "clip": 5}
    args = Namespace(compile=False, large=False, image_size=8, recipe=recipe)
    optimizer = torch.optim.SGD(network.parameters(), 0)
    loss = retrain.train_epoch(network, optimizer, batches, args)
    assert math.isclose(loss, sum(losses) / 48, rel_tol=1e-5)

def test_imagenet_decay_spares_mobile_norms_and_rates_follow_batch_and_epoch(
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

def test_training_end_to_end_and_its_checkpoints_tested_alone(runs, images):
    out, pixels, logits = runs(retrain)[0], torch.randn(4, 3, 8, 8), []
    log = read_log(out)
    assert [row["epoch"] for row in log] == list(range(1, 7))
    assert all(row["top5_error"] == 0 for row in log)
    best = min(log, key=lambda row: row["top1_error"])
    for name, row in (("best.pt", best), ("checkpoint.pt", log[-1])):
        argv = ["--evaluate", out / name, "--data-dir", images, "--device", "cpu"]
        code, text, err = run(retrain, argv)
        expected = f"top-1 error {row['top1_error']:.2%}, top-5 error 0.00% of 14 images"
        assert code == 0 and expected in text, err
    for _ in range(2):
        weights, made_with = retrain.read_weights(out / "best.pt")
        network = retrain.build_network(made_with["genotype"], "imagefolder", 2, 2, 3).eval()
        retrain.load_weights(network, weights, "best.pt")
        logits.append(network(pixels))
    assert torch.equal(*logits)
    assert same(dict(network.state_dict()), load(out / "best.pt")["network"])

def test_weights_of_the_authors_load_by_position(runs, images, tmp_path):
    ours, path = load(runs(retrain)[0] / "checkpoint.pt")["network"], tmp_path / "theirs.pth"
    theirs = {f"module.part{i}.{name.split('.')[-1]}": value
              for i, (name, value) in enumerate(ours.items())}
    argv, names = tiny(retrain, images, tmp_path, "--evaluate", path), list(theirs)
    error = read_log(runs(retrain)[0])[-1]["top1_error"]
    for saved in ({"state_dict": theirs}, theirs, ours):  # the last two are bare state dicts
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
    node = [[["dil_conv_3x3", 0], ["dil_conv_3x3", 1]]] * 4
    genotype = {"space": "cell", "normal": node, "reduce": node}
    (tmp_path / "found.json").write_text(json.dumps(genotype))
    argv = ["--genotype", tmp_path / "found.json", "--channels", 32, "--cells", 3, "--device",
            "cpu", "--summary"]  # of 16 x 16 made-up images of 10 classes
    code, text, err = run(retrain, argv)
    edges = lambda c: 8 * (9 * c + c * c)  # depthwise and 1x1
    parts = [(256, 27 * 96 + 2 * 96 * 32 + edges(32)),  # stem, normal cell; then two reductions
             (256, 96 * 64 + 128 * 64), (64, edges(64)), (64, 128 * 128 + 256 * 128),
             (16, edges(128)), (1, 512 * 10)]
    norms = 96 + 10 * (32 + 64 + 128)  # two of preprocessing and 8 of edges a cell
    count = sum(weights for _, weights in parts) + 2 * norms + 10
    operations = sum(pixels * weights for pixels, weights in parts)
    assert code == 0 and f" {count:,} parameters, {operations / 1e6:.1f} M" in text, (text, err)

# ==== two processes ===============================================================================
TWO_RANKS = """
import sys
from argparse import Namespace
from pathlib import Path
import torch, torch.distributed as dist
import ddp_nas, mdenas, retrain
from test_nas import Given, make_linear

here, images, rank = Path(sys.argv[1]), sys.argv[2], ddp_nas.RANK
common = ["--device", "cpu", "--dataset", "imagefolder", "--data-dir", images, "--workers", "0",
          "--image-size", "8", "--batch-size", "18", "--lr", "0.1"]
cells, ddp_nas.BACKBONES["gpu"] = ["--channels", "2", "--cells", "3"], ([(8, 1), (8, 2)], 16)
ddp_nas.start_ranks(Namespace(device="cpu"))  # one group for all that follows
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
ddp_nas.train_epoch(network, optimizer, Given(batches), None)
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

def test_failure_of_one_rank_ends_the_job_with_its_message(two_ranks):
    folder, _, done = two_ranks
    assert done.returncode != 0 and "ValueError: " in done.stderr
    assert "this rank has had enough" in done.stderr and read_log(folder / "failed") == []

@pytest.mark.parametrize("script, epochs", [(ddp_nas, 44), (mdenas, 4), (retrain, 3)])
def test_two_ranks_hold_the_same_and_tell_it_once(script, epochs, two_ranks, images):
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
        assert [list(ddp_nas.CANDIDATES[choice]) for choice in best] == genotype["blocks"]

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

# ==== nothing lost ================================================================================
def fork(script, argv, before=lambda: None):
    """A run in another process -> its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before()
            code = run(script, argv)[0]
        finally:
            os._exit(code)
    return child

def wait_until(condition, child):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.001)

def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

def die_at(call, name):
    """Have os.replace kill the process before it puts a file of this name in place."""
    replace, calls = os.replace, itertools.count(1)
    def replace_or_die(source, target):
        if Path(target).name == name and next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = replace_or_die

def assert_it_goes_on(script, argv, monkeypatch):
    """The run gets as far as to an epoch."""
    monkeypatch.setattr(script, "train_epoch", lambda *args: fail(RuntimeError("it goes on")))
    with pytest.raises(RuntimeError, match="it goes on"):
        print(run(script, argv))

@each_script
def test_a_killed_run_resumes_to_the_same_result(script, runs, images, tmp_path):
    """After two epochs that Ctrl-C ended, killed at several moments."""
    finished, out = runs(script)[0], shutil.copytree(runs(script)[1], tmp_path / "run")
    argv = tiny(script, images, out, "--resume")
    for call, name in ((1, "checkpoint.pt"), (2, "checkpoint.pt"), (1, "log.jsonl"),
                       (2, "log.jsonl")):
        child = fork(script, argv, lambda: die_at(call, name))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    pause = at_call(2, script.train_epoch, lambda: time.sleep(60))
    child = fork(script, argv, lambda: setattr(script, "train_epoch", pause))
    wait_until(lambda: len(read_log(out)) == 4, child)
    kill(child)
    assert read_log(out) == read_log(finished)[:4]
    if script is not retrain:
        child = fork(script, argv, lambda: die_at(1, "genotype.json"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = EPOCHS[script] - len(load(out / "checkpoint.pt")["log"])
    code, text, err = run(script, argv)
    assert code == 0 and len(re.findall("^epoch ", text, re.M)) == left
    assert_same_run(out, finished)

@each_script
def test_a_run_killed_before_its_first_checkpoint_resumes(
        script, images, tmp_path, monkeypatch):
    argv = tiny(script, images, tmp_path / "run", "--resume")
    child = fork(script, argv, lambda: die_at(1, "checkpoint.pt"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert_it_goes_on(script, argv, monkeypatch)

@each_script
def test_a_finished_run_resumes_to_what_it_was(script, runs, images, tmp_path):
    finished, out = runs(script)[0], shutil.copytree(runs(script)[0], tmp_path / "a run")
    code, text, err = run(script, tiny(script, images, out, "--resume"))
    assert code == 0 and err == "" and "epoch  " not in text, err
    assert_same_run(out, finished)
    last = (finished.parent / "stdout.txt").read_text().splitlines()[-1]
    assert text.splitlines()[-1] == last.replace(str(finished), str(out))

def test_resume_is_exact_with_workers_drop_path_and_cutout(large_images, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    argv = lambda out: tiny(retrain, large_images, out, "--image-size", 72, "--workers", 1,
                            "--batch-size", 4, "--epochs", 4)
    assert run(retrain, argv(whole))[0] == 0
    stop = lambda: fail(KeyboardInterrupt)
    with monkeypatch.context() as patch:
        patch.setattr(retrain, "train_epoch", at_call(3, retrain.train_epoch, stop))
        assert run(retrain, argv(stopped))[0] == 130
    assert len(read_log(stopped)) == 2 and run(retrain, [*argv(stopped), "--resume"])[0] == 0
    assert_same_run(stopped, whole)

@pytest.mark.parametrize("script, workers", [
    (ddp_nas, 0), (mdenas, 2), (retrain, 0)], ids=["ddp_nas", "mdenas with workers", "retrain"])
def test_a_folder_in_use_is_refused_until_the_run_is_killed(
        script, workers, large_images, tmp_path, monkeypatch):
    out, started = tmp_path / "run", tmp_path / "started"
    argv = tiny(script, large_images, out, "--image-size", 72, "--workers", workers,
                "--batch-size", 2, "--epochs" if script is not ddp_nas else "--passes", 1)
    def pause():
        """In the first step, when the workers are there."""
        started.touch()
        time.sleep(60)
    child = fork(script, argv, lambda: setattr(script, "average_over_ranks", lambda _: pause()))
    wait_until(started.exists, child)
    try:
        assert_refused(script, [*argv, "--resume"], tmp_path, out, "in use")
    finally:
        kill(child)
    assert_it_goes_on(script, [*argv, "--resume"], monkeypatch)

@each_script
@pytest.mark.parametrize("fault", ["first step", "last step", "full disk"])
def test_a_fault_in_the_third_epoch_keeps_the_last_checkpoint(
        script, runs, images, tmp_path, monkeypatch, fault):
    """Weights become not-a-number; or files of more than 2,000 bytes find the disk full."""
    out, step, limits = tmp_path / "run", torch.optim.SGD.step, resource.RLIMIT_FSIZE
    calls, batches = itertools.count(1), 4 if script is retrain else 2
    def spoiling(optimizer, *args):
        step(optimizer, *args)
        if next(calls) == 2 * batches + (batches if fault == "last step" else 1):
            nn.init.constant_(optimizer.param_groups[0]["params"][-1], math.nan)
    before = resource.getrlimit(limits)
    fill = lambda: resource.setrlimit(limits, (2000, before[1]))
    if fault == "full disk":
        monkeypatch.setattr(script, "train_epoch", at_call(3, script.train_epoch, fill))
    else:
        monkeypatch.setattr(torch.optim.SGD, "step", spoiling)
    code, _, err = run(script, tiny(script, images, out))
    resource.setrlimit(limits, before)
    words = [os.strerror(errno.EFBIG)] if fault == "full disk" else ["epoch 3:", "--lr"]
    assert code == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), err
    assert_same_run(out, runs(script)[1])

OUT_OF_MEMORY = ("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 4 bytes. Error code 12")

@each_script
@pytest.mark.parametrize("error", [
    MemoryError(), MemoryError("Unable to allocate 9 GiB"), RuntimeError(OUT_OF_MEMORY),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")])
def test_memory_that_is_not_there_is_one_line(script, error, images, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train_epoch", lambda *args: fail(error))
    code, _, err = run(script, tiny(script, images, tmp_path / "run"))
    assert code == 2 and len(err.splitlines()) == 1 and str(error) in err
    assert err.startswith(f"{script.METHOD}.py: error: ") and len(err.split()) > 2

@each_search
@pytest.mark.parametrize("error", [RuntimeError("shape '[2, 3]' is invalid"), IndexError("5"),
                                   ValueError("of a student"), AttributeError("theta")])
def test_an_error_of_the_code_keeps_its_traceback(script, error, images, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train_epoch", lambda *args: 1.0)
    monkeypatch.setattr(type(make(script)), "record", lambda *args: fail(error))
    with pytest.raises(type(error)) as raised:
        run(script, tiny(script, images, tmp_path / "run"))
    assert raised.value is error

def test_ctrl_c_advises_to_resume_what_can_be_resumed_only(monkeypatch):
    monkeypatch.setattr(retrain, "summarise", lambda args: fail(KeyboardInterrupt))
    argv = ["--genotype", "MDENAS", "--device", "cpu", "--summary"]
    code, _, err = run(retrain, argv)
    assert code == 130 and re.fullmatch(r"\s*interrupted\W*", err)

# ==== as commands =================================================================================
def start(command, folder, **env):
    """A command in a shell, which becomes it."""
    return subprocess.Popen("exec " + command, shell=True, env={**ENV, **env}, cwd=folder,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def test_commands_without_a_reader_or_utf_8_and_with_half_an_environment(images, tmp_path):
    """Closed, cut or ASCII output; RANK and WORLD_SIZE that are not torchrun's."""
    command = lambda out: shlex.join(map(str, [
        sys.executable, HERE / "mdenas.py", *tiny(mdenas, images, tmp_path / out)]))
    head = f"set -o pipefail; {command('head')} | head -1 >&2"
    processes = [start(command("closed") + " >&-", tmp_path, RANK="1"),
                 start(f"bash -c {shlex.quote(head)}", tmp_path, RANK="", WORLD_SIZE="0"),
                 start(command("s_größe"), tmp_path, PYTHONIOENCODING="ascii")]
    for process, out in zip(processes, ("closed", "head", "s_größe")):
        text, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert len(err.splitlines()) == (out == "head") and "rror" not in err, err
        assert read_genotype(tmp_path / out)["space"] == "cell"
        assert len(read_log(tmp_path / out)) == 12
    assert "epoch  12/12" in text and text.isascii()

def test_ctrl_c_leaves_no_traceback(images, tmp_path):
    """While torch is imported; and again and again in a run."""
    commands = [shlex.join(map(str, [sys.executable, HERE / f"{script.METHOD}.py",
                                     *tiny(script, images, tmp_path / script.METHOD, *more)]))
                for script, more in ((ddp_nas, []), (ddp_nas, []), (retrain, ["--epochs", 900]))]
    early, *late = (start(command, tmp_path) for command in commands)
    while "libtorch" not in Path(f"/proc/{early.pid}/maps").read_text():
        time.sleep(0.01)
    early.send_signal(signal.SIGINT)
    _, err = early.communicate(timeout=60)
    assert err == "" and early.returncode == -signal.SIGINT
    for process, script in zip(late, (ddp_nas, retrain)):
        while not read_log(tmp_path / script.METHOD) and process.poll() is None:
            time.sleep(0.01)
        for _ in range(50):
            process.send_signal(signal.SIGINT)
            time.sleep(0.005)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and re.fullmatch(r"\s*interrupted.*\s*", err), err

# ==== resuming what cannot be resumed =============================================================
@each_script
@pytest.mark.parametrize("name, value", [
    ("lr", 0.05), ("seed", 1), ("batch_size", 4), ("channels", 4), ("cells", 4),
    ("image_size", 12), ("dataset", "synthetic"), ("of its own", None)])
def test_resume_under_other_settings_is_refused(script, runs, images, name, value):
    if value is None:
        name, value = {ddp_nas: ("passes", 2), mdenas: ("alpha", 0.02),
                       retrain: ("genotype", "random:1")}[script]
    begun = runs(script)[1]
    argv = tiny(script, images, begun, "--resume", "--" + name.replace("_", "-"), value)
    assert_refused(script, argv, begun, f" {name} ", begun / "checkpoint.pt")

@each_script
def test_resume_on_another_number_of_processes_is_refused(script, runs, images, monkeypatch):
    for name in ("start_ranks", "barrier"):
        monkeypatch.setattr(script, name, lambda *args: None)
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    begun = runs(script)[1]
    assert_refused(script, tiny(script, images, begun, "--resume"), begun, " processes 1, not 2")

@each_script
def test_resume_with_other_classes_is_refused(script, runs, images, tmp_path):
    begun, other = runs(script)[1], shutil.copytree(images, tmp_path / "other")
    for half in ("train", "val"):
        (other / half / "cats").rename(other / half / "wolves")
    argv = tiny(script, other, begun, "--resume")
    assert_refused(script, argv, begun, "classes", "cats", "wolves", begun / "checkpoint.pt")
    if script is retrain:
        argv = ["--evaluate", begun / "checkpoint.pt", "--data-dir", other, "--device", "cpu"]
        assert_refused(retrain, argv, begun, "classes", "cats", "wolves")

def trap(path):
    """Unpickled, it makes a folder."""
    return type("Trap", (), {"__reduce__": lambda self: (os.mkdir, (str(path),))})()

def flip_a_bit(path, sprung):
    """In the middle of a weight; a part of the file is padding, where it would do no harm."""
    data, archive = path.read_bytes(), zipfile.ZipFile(path)
    weights = [info for info in archive.infolist() if "/data/" in info.filename]
    weight = max(weights, key=lambda info: info.file_size)
    place = data.index(archive.read(weight)) + weight.file_size // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])

DAMAGES = {
    "cut": lambda path, sprung: os.truncate(path, path.stat().st_size // 2),
    "flipped bit": flip_a_bit, "empty": lambda path, sprung: os.truncate(path, 0),
    "other script": lambda path, sprung: torch.save(
        {**load(path), "settings": {"method": "another"}}, path),
    "code": lambda path, sprung: torch.save({**load(path), "network": trap(sprung)}, path),
    "bare pickle": lambda path, sprung: path.write_bytes(
        pickle.dumps({"settings": {}, "network": trap(sprung)}, 2)),
}

@each_script
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_and_code_in_it_does_not_run(
        script, runs, images, tmp_path, damage):
    out, sprung = shutil.copytree(runs(script)[1], tmp_path / "stopped"), tmp_path / "sprung"
    checkpoint = out / "checkpoint.pt"
    DAMAGES[damage](checkpoint, sprung)
    assert_refused(script, tiny(script, images, out, "--resume"), out, checkpoint)
    if script is retrain and damage != "other script":
        argv = ["--evaluate", checkpoint, "--data-dir", images, "--device", "cpu"]
        assert_refused(script, argv, out, checkpoint)
    assert not sprung.exists()
    if damage == "code":  # the trap is a real one
        torch.load(checkpoint, weights_only=False)
    elif damage == "bare pickle":
        pickle.loads(checkpoint.read_bytes())
    assert sprung.exists() == (damage in ("code", "bare pickle"))

# ==== bad input ===================================================================================
@each_script
def test_what_is_in_a_folder_is_not_written_over(script, runs, images, tmp_path):
    for out in runs(script):
        assert_refused(script, tiny(script, images, out), out, out, "--resume")
    (tmp_path / "run").mkdir()
    for name in ("notes.txt", ".hidden", "log.jsonl"):
        (tmp_path / "run" / name).write_text("mine")
        for more in ([], ["--resume"]):
            argv = tiny(script, images, tmp_path / "run", *more)
            assert_refused(script, argv, tmp_path, tmp_path / "run", "not empty")
        (tmp_path / "run" / name).unlink()
    for other in SCRIPTS:
        if other is not script:
            out = runs(other)[1]
            assert_refused(script, tiny(script, images, out), out, out)
            argv = tiny(script, images, out, "--resume")
            assert_refused(script, argv, out, out / "checkpoint.pt")

COMMON = {"batch-size": [0, -8, "many", 37, 1], "channels": [0, -1, 1], "cells": [0, 2],
          "image-size": [0, -8, 10], "lr": [0, -0.1, "nan", "inf", "fast", "1e300"],
          "seed": [-1, 99999999999999999999], "workers": [-1], "dataset": ["mnist"]}
OPTIONS = {ddp_nas: {"passes": [0, -3, 10**15], "space": ["outer"], "batch-size": [19]},
           retrain: {"epochs": [0, -1, 10**15]},
           mdenas: {"epochs": [0, -1, 10**15], "alpha": [0, 1.5, -0.1, "nan"], "backbone": ["tpu"],
                    "batch-size": [19]}}

@each_script
def test_options_out_of_range(script, images, tmp_path, monkeypatch):
    argv = tiny(script, images, tmp_path / "run")
    for name, values in [*COMMON.items(), *OPTIONS[script].items()]:
        for value in values:
            assert_refused(script, [*argv, "--" + name, value], tmp_path, "--" + name)
    small = [*argv, "--image-size", 4, "--batch-size", 1]  # BatchNorm would have one pixel
    assert_refused(script, small, tmp_path, "--batch-size 1")
    cifar10 = [*argv, "--dataset", "cifar10", "--image-size", 16]
    assert_refused(script, cifar10, tmp_path, "--image-size")
    if not torch.cuda.is_available():
        assert_refused(script, [*argv, "--device", "cuda"], tmp_path, "--device cuda")
    (tmp_path / "file").write_text("something else")
    for out in ("file", "file/run"):
        words = "--out", tmp_path / "file"
        assert_refused(script, [*argv, "--out", tmp_path / out], tmp_path, *words)
    for name in ("start_ranks", "barrier"):
        monkeypatch.setattr(script, name, lambda *args: None)
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    assert_refused(script, argv, tmp_path, "--batch-size 8", 3)

@each_script
def test_bad_folders_of_images(script, tmp_path):
    argv, train = tiny(script, tmp_path, tmp_path / "run"), tmp_path / "train"
    nowhere = tiny(script, tmp_path / "nowhere", tmp_path / "run")
    assert_refused(script, nowhere, tmp_path, tmp_path / "nowhere")
    write_images(train, classes=["cats"])
    assert_refused(script, argv, tmp_path, train, "cats")
    write_images(train, classes=["dogs"])
    (train / "birds").mkdir()
    assert_refused(script, argv, tmp_path, "birds")
    (train / "birds").rmdir()
    write_images(tmp_path / "val", classes=["cats", "wolves"])
    if script is retrain:
        assert_refused(script, argv, tmp_path, tmp_path, "val", "dogs", "wolves")
    for link, target in (("dogs/loop", "."), ("wolves", "dogs")):
        (train / link).symlink_to(target)
        code, _, err = run(script, argv)
        assert code == 2 and len(err.splitlines()) == 1 and "link" in err and str(train) in err
        (train / link).unlink()

@each_script
def test_bad_images_are_named(script, tmp_path):
    argv, train = tiny(script, tmp_path, tmp_path / "run"), tmp_path / "train"
    write_images(train, count=10)
    culprit = train / "dogs" / "07.png"
    contents = [b"no image", b"", culprit.read_bytes()[:100]]
    grey = np.arange(64).reshape(8, 8) * 1000
    for pixels, kind in ((grey.astype(np.uint16), "png"), (grey.astype(np.float32), "tiff")):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        contents.append(buffer.getvalue())
    for content in contents:
        culprit.write_bytes(content)
        assert_refused(script, argv, tmp_path, culprit)

def test_class_names_reach_no_graph_and_no_path(tmp_path):
    names = ['"] --> click', "```", "<script>", "..%2f..%2fup", "$(touch up)", "a\nb"]
    write_images(tmp_path / "data" / "train", classes=names, count=6)
    before, out = files(tmp_path), tmp_path / "run"
    assert run(mdenas, tiny(mdenas, tmp_path / "data", out, "--epochs", 1))[0] == 0
    assert {path.parent for path in files(tmp_path).keys() - before.keys()} == {out}
    text = (out / "cell.md").read_text()
    assert text.count("```") == 6 and not any(name in text for name in names if name != "```")

@each_script
@pytest.mark.parametrize("name", ["nothing", "cifar-10-python.tar.gz",
                                  "cifar-10-batches-py/data_batch_1"])
def test_cifar10_missing_or_damaged_and_no_network(script, tmp_path, monkeypatch, name):
    path, data = tmp_path / "data" / name, tmp_path / "data"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    before, no_route = files(tmp_path), lambda *args, **more: fail(OSError("no route"))
    monkeypatch.setattr(urllib.request, "urlopen", no_route)
    code, _, err = run(script, [*LENGTH[script], "--dataset", "cifar10", "--device", "cpu",
                                "--data-dir", data, "--out", tmp_path / "run"])
    line = err.splitlines()[-1]
    assert code == 2 and "Traceback" not in err
    assert line.startswith(f"{script.METHOD}.py: error: ") and files(tmp_path) == before
    assert str(data) in line and "network" in line

CELL = retrain.load_genotype("MDENAS")
MOBILE = {"space": "mobile", "backbone": "gpu", "blocks": [[3, 1]] * 14}

def with_node(*node):
    return {**CELL, "normal": [list(node), *CELL["normal"][1:]]}

@pytest.mark.parametrize("content, words", [
    ("{", ["JSON"]), ([1], ["space"]), ({}, ["space"]), ({**CELL, "space": "outer"}, ["space"]),
    ({**CELL, "normal": CELL["normal"][:3]}, ["normal", 4]), ({**CELL, "reduce": 5}, ["reduce"]),
    (with_node(["sep_conv_9x9", 0], ["skip_connect", 1]), ["normal", "sep_conv_9x9"]),
    (with_node(["none", 0], ["skip_connect", 1]), ["normal", "none"]),
    (with_node(["none", 0]), ["normal", 2]),
    (with_node(["skip_connect", 0], ["skip_connect", 2]), ["normal", "0 to 1"]),
    (with_node(["skip_connect", 0], ["skip_connect", -1]), ["normal", -1]),
    ({**MOBILE, "blocks": [[3, 1]] * 13}, ["blocks", 14]),
    ({**MOBILE, "blocks": [[3, 2]] * 14}, ["blocks", [3, 2]]),
    ({**MOBILE, "backbone": "tpu"}, ["backbone"]), ({**MOBILE, "space": "cell"}, ["normal"]),
    ({**CELL, "space": "mobile", "backbone": "cpu"}, ["blocks"])])
def test_file_that_is_no_genotype(content, words, tmp_path):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "found.json").write_text(text)
    argv = ["--genotype", tmp_path / "found.json", "--device", "cpu", "--out", tmp_path / "run"]
    assert_refused(retrain, argv, tmp_path, tmp_path / "found.json", *words)

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
def test_own_method_and_table_of_the_readme(tmp_path):
    """Its first two Python blocks, as they stand; the third with fewer seeds."""
    text = (HERE / "README.md").read_text()
    own_method, table, exercises = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[:3]
    assert len(own_method.splitlines()) <= 20 and "range(200)" in exercises
    (tmp_path / "table.py").write_text(table + exercises.replace("range(200)", "range(3)"))
    (tmp_path / "own.py").write_text(own_method)
    options = "--epochs 8 --channels 2 --image-size 8 --batch-size 96 --device cpu".split()
    processes = [subprocess.Popen(
        [sys.executable, *command], cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE)
        for command in (["table.py"], ["own.py", *options])]
    (printed, _), _ = (process.communicate(timeout=100) for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    best, found, largest, *regrets = re.findall(r"\[.*\]|[\d.]+", printed)
    assert len(json.loads(best)) == 6 and 0 < float(found) <= float(largest) <= 1
    assert 0 < float(regrets[0]) < float(regrets[2]) < 1.5  # DDP-NAS is nearer to the best
    out = tmp_path / "runs" / "random_search"
    log, genotype = read_log(out), read_genotype(out)
    winner = max(log, key=lambda row: row["accuracy"])["sample"]
    on_edges = {(cell, i, source): winner[edge] for edge, (cell, i, source) in enumerate(
        (cell, i, source) for cell in ("normal", "reduce") for i in range(4)
        for source in range(2 + i))}
    for cell, i in itertools.product(("normal", "reduce"), range(4)):
        for name, source in genotype[cell][i]:
            others = [on_edges[cell, i, other] for other in range(2 + i)]
            if sum(op > 0 for op in others) >= 2:  # enough edges that are not `none`
                assert ddp_nas.PRIMITIVES[on_edges[cell, i, source]] == name
    assert len(log) == 8 and len({tuple(row["sample"]) for row in log}) == 8
