"""Tests, on made-up data: against loops, brute force and known counts, never against the scripts' own output.

    python -m pytest -q test_nas.py
    python test_nas.py               # the two distributions alone against random search: a table, 3 minutes
"""
import ast, contextlib, errno, functools, io, itertools, json, math, os, pickle, re, resource, shutil, signal
import subprocess, sys, time, urllib.request, zipfile, zlib
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch, torch.nn as nn, torch.nn.functional as F
from PIL import Image

import ddp_nas, mdenas, retrain

HERE, SCRIPTS = Path(__file__).parent, [ddp_nas, mdenas, retrain]
LENGTH = {ddp_nas: ["--passes", 1], mdenas: ["--epochs", 12], retrain: ["--genotype", "random:0", "--epochs", 6]}
EPOCHS = {ddp_nas: 35, mdenas: 12, retrain: 6}
CHECKPOINT = {ddp_nas: "checkpoint.pt", mdenas: "checkpoint.pt", retrain: "last.pt"}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
each_script, each_search = (pytest.mark.parametrize("script", scripts, ids=lambda script: script.METHOD)
                            for scripts in (SCRIPTS, SCRIPTS[:2]))
torch.set_num_threads(1)  # as in the processes started below: sums of floats depend on it

# ==== helpers ===============================================================================================
def write_pictures(folder, classes=("cats", "dogs"), count=18, size=8):
    """Fill folder/<class>/*.png with noise, brighter in the later classes."""
    noise = np.random.default_rng(0)
    for (i, name), j in itertools.product(enumerate(classes), range(count)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(30 * i, 30 * i + 100, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{j:02}.png")

def tiny(script, pictures, out, *more):
    """The command line of a run that takes a second or two; what comes later in it wins."""
    return [*LENGTH[script], "--device", "cpu", "--dataset", "imagefolder", "--data-dir", pictures, "--out", out,
            "--image-size", 8, "--channels", 2, "--cells", 3, "--batch-size", 8, "--lr", 0.1, "--workers", 0, *more]

def run(script, argv):
    """main() in this process -> exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = script.main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()

def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def assert_refused(script, argv, folder, *words):
    """Exit code 2, one line on stderr (below argparse's usage) with these words in it, no file touched."""
    before, (code, out, err) = files(folder), run(script, argv)
    *usage, line = err.splitlines()
    assert code == 2 and out == "" and files(folder) == before, (out, err)
    assert not usage or usage[0].startswith("usage:") and all(text.startswith(" ") for text in usage[1:]), err
    assert "error: " in line and all(str(word) in line for word in words), err

load = functools.partial(torch.load, weights_only=True)

def read_genotype(out):
    return json.loads((out / "genotype.json").read_text())

def read_log(out):
    """log.jsonl without the times; nothing where it is not there yet."""
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]

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
    assert all(path.read_text() == (b / path.name).read_text() for path in [*a.glob("*.json"), *a.glob("*.md")])

def chi_square_is_usual(counts, expected):
    """Are the counts as near to the expected ones as all but one in about 30,000 draws? (Wilson and Hilferty)"""
    counts = np.asarray(counts)
    degrees, distance = counts.size - 1, ((counts - expected) ** 2 / expected).sum()
    return distance < degrees * (1 - 2 / (9 * degrees) + 4 * math.sqrt(2 / (9 * degrees))) ** 3

def drive(distribution, judge):
    """Run a distribution to its end on judge(sample, epoch) -> accuracy; returns [(sample, accuracy), ...]."""
    history = []
    while not distribution.finished:
        sample = distribution.sample()
        history.append((sample.tolist(), judge(sample, len(history) + 1)))
        distribution.record(sample, history[-1][1])
    return history

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder / "train")
    write_pictures(folder / "val", count=7)
    return folder

def at_call(number, function, action):
    """The function, but that action() comes before its call of this number."""
    calls = itertools.count(1)
    return lambda *args: (next(calls) == number and action(), function(*args))[1]

def fail(error):
    raise error

@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory):
    """runs(script) -> the folders of a tiny run from beginning to end, and of one interrupted in its third epoch."""
    @functools.cache
    def runs(script):
        done, begun = (tmp_path_factory.mktemp(script.METHOD) / name for name in ("done", "begun"))
        code, text, err = run(script, tiny(script, pictures, done))
        assert code == 0 and err == "", err
        (done.parent / "stdout.txt").write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "train_epoch", at_call(3, script.train_epoch, lambda: fail(KeyboardInterrupt)))
            code, _, err = run(script, tiny(script, pictures, begun))
        assert code == 130 and len(err.strip().splitlines()) == 1 and "--resume" in err and len(read_log(begun)) == 2
        return done, begun
    return runs

# ==== the scripts as texts ==================================================================================
TEXTS = {script: (HERE / f"{script.METHOD}.py").read_text() for script in SCRIPTS}

def test_shared_blocks_are_the_same_to_the_character():
    blocks = {script: dict(re.findall(r"^ *# ==== shared: (.+?) =+\n(.*?)^ *# ==== end =+$", text, re.S | re.M))
              for script, text in TEXTS.items()}
    assert blocks[ddp_nas].keys() == blocks[mdenas].keys() >= blocks[retrain].keys() and len(blocks[retrain]) >= 3
    for script, (name, block) in itertools.product((mdenas, retrain), blocks[ddp_nas].items()):
        assert TEXTS[script].count("# ==== shared: ") == TEXTS[script].count("# ==== end =") == len(blocks[script])
        lines = itertools.zip_longest(block.splitlines(), blocks[script].get(name, block).splitlines())
        for number, (a, b) in enumerate(lines, 1):
            assert a == b, f"block {name!r}, line {number} in ddp_nas.py {a!r}, in {script.METHOD}.py {b!r}"

def test_the_searches_are_short_and_differ_little():
    diff = subprocess.run(["diff", "ddp_nas.py", "mdenas.py"], cwd=HERE, capture_output=True, text=True).stdout
    assert 0 < len(re.findall("^[<>]", diff, re.M)) < 200
    assert all(len(TEXTS[script].splitlines()) <= 650 for script in SCRIPTS[:2])

@each_script
def test_a_script_stands_alone_and_runs_no_text(script):
    nodes = list(ast.walk(ast.parse(TEXTS[script])))
    names = {name for node in nodes for name in [getattr(node, "id", None), getattr(node, "module", None)]}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not names & {"ddp_nas", "mdenas", "retrain", "eval", "exec"} and {"torch", "parse_args"} <= names
    loads = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert loads and all("weights_only=True" in map(ast.unparse, load.keywords) for load in loads)

# ==== the distribution of DDP-NAS ===========================================================================
def prune_by_hand(history, num_edges, num_ops, passes):
    """theta and the alive operations after every round, from (sample, accuracy) pairs -> [(lists, sets)]."""
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
def test_a_pass_visits_every_alive_operation_once_and_a_round_prunes_by_theta(num_edges, num_ops, passes, epochs):
    distribution, draw = ddp_nas.DynamicDistribution(num_edges, num_ops, passes, seed=1), np.random.default_rng(1)
    history, rounds, edges = [], [], np.arange(num_edges)
    while not distribution.finished:
        alive = distribution.alive.copy()
        for _ in range(passes):
            visits = np.zeros((num_edges, num_ops), int)
            for _ in range(alive[0].sum()):
                history.append((distribution.sample().tolist(), draw.uniform(0.4, 0.45)))  # every softmax is in play
                visits[edges, history[-1][0]] += 1
                distribution.record(*history[-1])
            assert (visits == alive).all()
        probabilities, best = distribution.probabilities, distribution.best()
        rounds.append((distribution.theta, distribution.alive.copy(), probabilities, best))
    by_hand = prune_by_hand(history, num_edges, num_ops, passes)
    for (theta, alive, probabilities, best), (theirs, sets) in zip(rounds, by_hand, strict=True):
        np.testing.assert_allclose(theta, theirs, rtol=1e-10)
        assert [set(row.nonzero()[0].tolist()) for row in alive] == sets
        kept = [[row[op] if op in ops else 0 for op in range(num_ops)] for row, ops in zip(theirs, sets)]
        np.testing.assert_allclose(probabilities, [np.divide(row, sum(row)) for row in kept], rtol=1e-10)
        assert best.tolist() == [row.index(max(row)) for row in kept]
    assert len(history) == distribution.total_epochs == epochs

# ==== the distribution of MdeNAS ============================================================================
def transfer_by_hand(p, seen, accuracy, alpha):
    """One update of one edge, pair by pair."""
    new = list(p)
    for j in range(len(p)):
        winners = [i for i in range(len(p)) if seen[i] - seen[j] < 0 and accuracy[i] - accuracy[j] > 0]
        for i in winners:
            paid = min(alpha, p[j] / len(winners))  # who owes more than it has pays everyone a part
            new[i], new[j] = new[i] + paid, new[j] - paid
    return new

def randomise(distribution, draw):
    """Give it rows of probabilities with many zeros, and histories with many ties."""
    p = draw.random(distribution.probabilities.shape) * draw.integers(2, size=distribution.probabilities.shape)
    p[np.arange(len(p)), draw.integers(p.shape[1], size=len(p))] += 0.01
    distribution.probabilities, distribution.epochs_seen = p / p.sum(1, keepdims=True), draw.integers(5, size=p.shape)
    distribution.accuracies = draw.integers(6, size=p.shape) / 6

@pytest.mark.parametrize("num_ops, alpha", [(2, 0.01), (8, 0.01), (9, 0.2)])
def test_update_is_what_a_double_loop_makes_it(num_ops, alpha):
    distribution = mdenas.MultinomialDistribution(500, num_ops, alpha=alpha, seed=3)
    randomise(distribution, np.random.default_rng(3))
    p, seen, accuracies = (getattr(distribution, x).copy() for x in ("probabilities", "epochs_seen", "accuracies"))
    sample = distribution.sample()
    distribution.record(sample, 0.5)
    seen[np.arange(500), sample] += 1
    accuracies[np.arange(500), sample] = 0.5
    expected = [transfer_by_hand(*edge, alpha) for edge in zip(p, seen, accuracies)]
    np.testing.assert_allclose(distribution.probabilities, expected, atol=1e-12)
    assert (distribution.epochs_seen == seen).all() and (distribution.accuracies == accuracies).all()

def test_rows_stay_probabilities_over_10_000_updates():
    draw, emptied = np.random.default_rng(4), 0
    distribution = mdenas.MultinomialDistribution(10, 6, epochs=10_000, alpha=0.3, seed=4)
    for epoch in range(10_000):
        if epoch % 50 == 0:
            randomise(distribution, draw)
        before = distribution.probabilities
        distribution.record(distribution.sample(), float(draw.random()))
        p = distribution.probabilities
        assert (p >= 0).all() and (abs(p.sum(1) - 1) < 1e-9).all()
        emptied += ((p == 0) & (before > 0)).any()
    assert emptied > 50 and distribution.finished

def test_resampling_honours_the_probabilities():
    p = np.array([[0.5, 0, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4, 0]])
    distribution, counts = mdenas.MultinomialDistribution(2, 5, epochs=20_000, seed=6), np.zeros((5, 5))
    distribution.probabilities = p.copy()
    for sample, _ in drive(distribution, lambda sample, epoch: 0):  # no accuracy beats another, so they stay
        counts[tuple(sample)] += 1
    expected = 20_000 * np.outer(*p)  # the edges are independent
    assert (distribution.probabilities == p).all() and counts[expected == 0].sum() == 0
    assert chi_square_is_usual(counts[expected > 0], expected[expected > 0])

# ==== both distributions ====================================================================================
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
        others = np.delete(distribution.probabilities[edge], planted)
        assert distribution.best()[edge] == planted and distribution.probabilities[edge, planted] > max(0.15, *others)

@each_search
def test_a_distribution_refuses_what_it_did_not_hand_out_and_what_is_no_accuracy(script):
    distribution = make(script)
    pytest.raises(ValueError, distribution.record, np.zeros(6, int), 0.5)
    distribution.sample()[:] = 99  # the caller's copy
    sample, before = distribution.sample(), json.dumps(distribution.state_dict())
    for accuracy in (-0.001, 1.001, 93, math.nan, math.inf, -math.inf):
        pytest.raises(ValueError, distribution.record, sample, accuracy)
    for other in ((sample + 1) % 4, sample[:5], [*sample[:5], 4]):
        pytest.raises(ValueError, distribution.record, other, 0.5)
    assert json.dumps(distribution.state_dict()) == before and (distribution.sample() == sample).all()
    distribution.record(sample, 1)
    pytest.raises(ValueError, distribution.record, sample, 1)
    drive(distribution, lambda sample, epoch: 0.5)
    pytest.raises(ValueError, distribution.sample)
    other = mdenas if script is ddp_nas else ddp_nas
    for state in (make(other).state_dict(), make(script, num_edges=5).state_dict()):
        pytest.raises(ValueError, make(script).load_state_dict, state)

@each_search
@pytest.mark.parametrize("stop", [0, 1, 11, 26])
def test_state_goes_on_where_it_was_and_the_seed_decides(script, stop):
    judge = lambda sample, epoch: sum((e + 1) * int(choice) for e, choice in enumerate(sample)) / 63
    whole, first, second = make(script, 7), make(script, 7), make(script, 8)
    history = drive(whole, judge)
    assert len(history) == whole.total_epochs == 27 and history != drive(make(script, 8), judge)
    for sample, accuracy in history[:stop]:
        first.record(first.sample(), accuracy)
    for handed_out in (False, True):
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert drive(second, judge) == history[stop:] and (second.probabilities == whole.probabilities).all()
        first.sample()

# ==== the space of cells ====================================================================================
@pytest.mark.parametrize("name, stride", [*itertools.product(ddp_nas.PRIMITIVES, (1, 2))])
def test_every_operation_gives_the_right_shape(name, stride):
    op = ddp_nas.OPS[name](6, stride, nn.BatchNorm2d)
    assert op(torch.randn(2, 6, 8, 12)).shape == (2, 6, 8 // stride, 12 // stride)
    strides = [m.stride[0] for m in op.modules() if isinstance(m, nn.Conv2d)]
    assert not name.startswith("sep") or strides == [stride, 1, 1, 1]

@pytest.mark.parametrize("name, offsets", [("sep_conv_3x3", range(-2, 3)), ("sep_conv_5x5", range(-4, 5)),
                                           ("dil_conv_3x3", (-2, 0, 2)), ("dil_conv_5x5", (-4, -2, 0, 2, 4))])
def test_what_a_convolution_sees(name, offsets):
    op, x = ddp_nas.OPS[name](2, 1, nn.Identity), torch.zeros(1, 2, 11, 11)
    for weight in op.parameters():
        nn.init.ones_(weight)
    x[0, 0, 5, 5] = 1
    for picture in op(x)[0]:
        assert {(y - 5, x - 5) for y, x in picture.nonzero().tolist()} == set(itertools.product(offsets, offsets))
    assert (op(-x) == 0).all()  # ReLU comes first

@pytest.mark.parametrize("stride", [1, 2])
def test_pools_and_factorised_reduction_against_their_definition(stride):
    x = torch.randn(2, 6, 8, 8) - 2  # padding of 0 would win a maximum
    windows = F.pad(x, (1, 1, 1, 1), value=math.nan).unfold(2, 3, stride).unfold(3, 3, stride).flatten(4)
    for name, expected in (("avg", windows.nanmean(4)), ("max", windows.nan_to_num(-math.inf).amax(4))):
        torch.testing.assert_close(ddp_nas.OPS[name + "_pool_3x3"](6, stride, nn.Identity)(x), expected)
    skip = ddp_nas.OPS["skip_connect"](6, stride, nn.Identity)
    halves = [torch.einsum("oc,ncyx->noyx", weight[:, :, 0, 0], x.clamp(min=0)[:, :, shift::2, shift::2])
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
        torch.testing.assert_close(cell(*inputs, 3 * skips), torch.cat(nodes[2:], 1))

def assert_derived(strength, cells):
    """The cells as brute force would have them; among equals, whichever."""
    edge = 0
    for cell, i in itertools.product(("normal", "reduce"), range(4)):
        others = [[strength[edge + source][op] for op in range(1, 8)] for source in range(2 + i)]  # without `none`
        (_, one), (_, other) = cells[cell][i]
        assert one != other and {one, other} <= set(range(2 + i)) and len(cells[cell]) == 4
        for name, source in cells[cell][i]:
            assert name != "none" and math.isclose(
                others[source][ddp_nas.PRIMITIVES.index(name) - 1], max(others[source]))
        left_out = [max(others[source]) for source in range(2 + i) if source not in (one, other)]
        assert min(max(others[one]), max(others[other])) >= max(left_out, default=0) - 1e-12
        edge += 2 + i

def test_derived_cells_hold_the_strongest_edges_and_never_none():
    for strength in np.random.default_rng(0).random((50, 28, 8)):
        strength[::2, 0] = 2  # `none` the strongest by far
        assert_derived(strength, ddp_nas.derive_cells(strength))

# ==== the MobileNet space ===================================================================================
WIDTHS = {"gpu": [40, 24, 32, 56, 56, 112, 112, 128, 128, 128, 256, 256, 256, 256, 432, 1728],
          "cpu": [40, 24, 32, 32, 32, 32, 48, 48, 48, 48, 88, 88, 104, 104, 104, 104, 216, 216, 216, 216, 360, 1432]}
HALVING = {"gpu": [1, 2, 4, 9], "cpu": [1, 5, 9, 15]}  # blocks of stride 2

def count_weights(module):
    return sum(weight.numel() for weight in module.parameters())

def count_by_hand(blocks, widths, classes=None):
    """Weights of blocks of (kernel, expansion), with two for a channel in each BatchNorm; for classes, of all."""
    total = 29 * 40 + (widths[-2] + 2) * widths[-1] + (widths[-1] + 1) * classes if classes else 0
    for (kernel, expansion), c_in, c_out in zip(blocks, widths, widths[1:]):
        c = c_in * expansion
        total += (c_in + 2) * c * (expansion > 1) + (kernel**2 + 2) * c + (c + 2) * c_out
    return total

@pytest.mark.parametrize("backbone", WIDTHS)
def test_every_candidate_of_every_block(backbone):
    network, widths = ddp_nas.MobileSupernet(backbone, 5), WIDTHS[backbone]
    assert len(network.blocks) == len(widths) - 2
    for i, (candidates, c_in, c_out) in enumerate(zip(network.blocks, widths, widths[1:])):
        x, size = torch.randn(2, c_in, 4, 4), 2 if i in HALVING[backbone] else 4
        for block, pair in zip(candidates, itertools.product((3, 5, 7), (1, 3, 6)), strict=True):
            assert count_weights(block) == count_by_hand([pair], [c_in, c_out])
            assert block(x).shape == (2, c_out, size, size)
            last = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)][-1]
            nn.init.zeros_(last.weight)  # leaves the residual alone, if there is one
            assert torch.equal(block(x), x if size == 4 and c_in == c_out else torch.zeros(2, c_out, size, size))

@pytest.mark.parametrize("name", retrain.PUBLISHED_BLOCKS)
def test_published_mobile_architecture_is_a_point_of_the_space(name):
    genotype, backbone = retrain.load_genotype(name), name[-3:].lower()
    network, blocks = ddp_nas.MobileSupernet(backbone, 5), genotype["blocks"]
    logits = network(torch.randn(2, 3, 32, 32), [ddp_nas.CANDIDATES.index(tuple(block)) for block in blocks])
    logits.sum().backward()
    used = sum(weight.numel() for weight in network.parameters() if weight.grad is not None)
    assert len(blocks) == len(network.blocks) and logits.shape == (2, 5)
    assert used == count_by_hand(blocks, WIDTHS[backbone], 5)
    assert used == count_weights(retrain.build_network(genotype, "imagenet", 5))

# ==== one path at a time ====================================================================================
SPACES = {"cell": (lambda: ddp_nas.CellSupernet(2, 3, 4), 28, 8),
          "mobile": (lambda: ddp_nas.MobileSupernet("gpu", 4), 14, 9)}

def is_on_path(name, sample):
    cell = re.match(r"cells\.(\d+)\.edges\.(\d+)\.(\d+)\.", name)  # of 3, the last two are reductions
    block = re.match(r"blocks\.(\d+)\.(\d+)\.", name)
    return (sample[int(cell[2]) + 14 * (cell[1] != "0")] == int(cell[3]) if cell else
            sample[int(block[1])] == int(block[2]) if block else True)

@pytest.mark.parametrize("space", SPACES)
def test_a_step_leaves_everything_off_the_path_alone(space):
    torch.manual_seed(0)
    make_network, num_edges, num_ops = SPACES[space]
    network, images, labels, on, off = make_network(), torch.randn(4, 3, 16, 16), torch.arange(4), 0, 0
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=0.1)
    state = lambda weight: [weight.clone(), optimizer.state[weight].get("momentum_buffer", torch.zeros(1)).clone()]
    paths = [1 + (np.arange(num_edges) + i) % (num_ops - 1) for i in range(num_ops - 1)]  # all but operation 0
    for path in [*paths, np.random.default_rng(0).integers(1, num_ops, num_edges)]:  # gives the weights a momentum
        before = {name: state(weight) for name, weight in network.named_parameters()}
        ddp_nas.step(network, optimizer, F.cross_entropy(network(images, path), labels), 5)
    for name, weight in network.named_parameters():
        unmoved = [torch.equal(a, b) for a, b in zip(state(weight), before[name])]
        assert unmoved == 2 * [not is_on_path(name, path)], name
        on, off = on + is_on_path(name, path), off + (not is_on_path(name, path) and bool(before[name][1].any()))
    assert on > 20 and off > 100

@pytest.mark.parametrize("space", SPACES)
def test_a_step_pays_for_the_sampled_path_only(space, monkeypatch):
    make_network, num_edges, num_ops = SPACES[space]
    network, images, draw = make_network(), torch.randn(4, 3, 32, 32), np.random.default_rng(0)
    weights = {weight.data_ptr() for weight in network.parameters()}
    def saved_bytes():
        kept = {}  # keeps the tensors alive, or an address would be used again
        keep = lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor) is None or tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(images, draw.integers(num_ops, size=num_edges))
        return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)
    one_path = np.mean([saved_bytes() for _ in range(5)])
    monkeypatch.setattr(nn.ModuleList, "__getitem__", lambda self, choice: lambda x: sum([op(x) for op in self]))
    assert 0 < one_path < saved_bytes() / 3  # of all paths

# ==== pictures ==============================================================================================
def settings(seed=0, dataset="synthetic", **more):
    return Namespace(device="cpu", batch_size=16, workers=0, image_size=8, seed=seed, dataset=dataset, **more)

def indexed_pictures(count):
    """Pictures of noise, 8 pixels and a border of 1, and their numbers as labels."""
    pixels = torch.randint(256, (count, 10, 10, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return pixels, torch.arange(count)

def test_training_batches_are_crops_of_the_padded_pictures_flipped_or_not(pictures):
    args, paths = settings(dataset="imagefolder", data_dir=pictures), sorted((pictures / "train").rglob("*.png"))
    images, labels, names = ddp_nas.open_pictures(args, train=True)
    padded = [np.pad(Image.open(path), ((1, 1), (1, 1), (0, 0))) for path in paths]
    assert names == ["cats", "dogs"] and labels.tolist() == 18 * [0] + 18 * [1]
    index, seen, places, turns = torch.arange(3, 36, 2), [], set(), {*itertools.product(range(3), range(3), (1, -1))}
    batches = ddp_nas.Batches(images, torch.arange(36), index, 8, True, args)
    for batches.epoch in range(6):
        seen.append([])
        for crops, targets in batches:
            assert crops.shape == (8, 3, 8, 8) and crops.dtype == torch.uint8 and targets.shape == (8,)
            for crop, i in zip(crops.permute(0, 2, 3, 1).numpy(), targets.tolist()):
                found = {(top, left, flip) for top, left, flip in turns
                         if (padded[i][top:top + 8, left:left + 8][:, ::flip] == crop).all()}
                assert len(found) == 1, "not the picture that the label says"
                places |= found
                seen[-1].append(i)
        assert len(set(seen[-1])) == len(seen[-1]) == 16 and set(seen[-1]) <= set(index.tolist())
    assert len(set(map(tuple, seen))) == 6 and places == turns  # the order is new every epoch

def test_ranks_share_every_batch_and_need_no_picture_each(monkeypatch):
    monkeypatch.setattr(ddp_nas, "WORLD_SIZE", 3)
    for count, train in ((24, True), (24, False), (2, False)):
        seen = []
        for rank in range(3):
            monkeypatch.setattr(ddp_nas, "RANK", rank)
            batches = ddp_nas.Batches(*indexed_pictures(count), torch.arange(count), 12, train, settings())
            seen += [(len(labels), label) for _, labels in batches for label in labels.tolist()]
        assert sorted(seen) == [(4 if count == 24 else 1, label) for label in range(count)]

@each_search
def test_halves_are_halves_and_judged_in_batches_of_one_size(script):
    images, labels = indexed_pictures(101)
    halves = [script.split_halves(images, labels, settings(seed)) for seed in (0, 0, 1)]
    one, again, other = (set(train.index.tolist()) for train, _ in halves)
    judge = halves[0][1]
    judged = torch.cat([targets for _, targets in judge]).tolist()
    assert one == again != other and not one & set(judged) and (len(one), len(set(judged))) in [(50, 48), (51, 48)]
    assert {len(targets) for _, targets in judge} == {12}
    for crops, targets in judge:
        assert torch.equal(crops.permute(0, 2, 3, 1), images[targets, 1:-1, 1:-1])  # as they are

def test_made_up_pictures_are_beyond_a_linear_classifier():
    images, labels, names = ddp_nas.make_gratings(4000, 16, seed=0)
    assert images.shape == (4000, 16, 16, 3) and images.dtype == torch.uint8
    assert len(set(names)) == 10 and chi_square_is_usual(torch.bincount(labels, minlength=10), 400)
    x = torch.cat([images.flatten(1).double() / 128 - 1, torch.ones(4000, 1).double()], 1)
    ridge = x[:3000].T @ x[:3000] + 30 * torch.eye(x.shape[1]).double()
    weights = torch.linalg.solve(ridge, x[:3000].T @ F.one_hot(labels[:3000], 10).double())
    assert ((x[3000:] @ weights).argmax(1) == labels[3000:]).double().mean() < 0.3

# ==== whole searches ========================================================================================
def strength_by_hand(script, log, num_edges, num_ops):
    """What the distribution must have come to believe from the samples and accuracies of log.jsonl."""
    if script is ddp_nas:
        return prune_by_hand([(row["sample"], row["accuracy"]) for row in log], num_edges, num_ops, 1)[-1][0]
    p, seen, accuracies = ([[value] * num_ops for _ in range(num_edges)] for value in (1 / num_ops, 0, 0))
    for row, (edge, choice) in ((row, pair) for row in log for pair in enumerate(row["sample"])):
        seen[edge][choice] += 1
        accuracies[edge][choice] = row["accuracy"]
        p[edge] = transfer_by_hand(p[edge], seen[edge], accuracies[edge], 0.01)
    return p

@each_search
def test_search_end_to_end(script, runs):
    out, epochs = runs(script)[0], EPOCHS[script]
    log, genotype, text = read_log(out), read_genotype(out), (out.parent / "stdout.txt").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["cell.md", "checkpoint.pt", "genotype.json", "log.jsonl"]
    assert [row["epoch"] for row in log] == list(range(1, epochs + 1))
    assert all(row["accuracy"] in [right / 18 for right in range(19)] and 0 < row["loss"] < 9 for row in log)
    assert (genotype["method"], genotype["space"]) == (script.METHOD, "cell")
    assert_derived(strength_by_hand(script, log, 28, 8), genotype)
    graphs = re.findall(r"```mermaid\n(.*?)```", (out / "cell.md").read_text(), re.S)
    for graph, cell in zip(graphs, ("normal", "reduce"), strict=True):
        drawn = re.findall(r"^ *(\d) -->\|(\w+)\| (\d)$", graph, re.M)
        assert drawn == [(str(s), op, str(2 + i)) for i, node in enumerate(genotype[cell]) for op, s in node]
    assert re.findall(r"^epoch +(\d+)/(\d+) ", text, re.M) == [(str(i + 1), str(epochs)) for i in range(epochs)]
    assert "\r" not in text and "\033" not in text  # a file, not a terminal
    if script is ddp_nas:  # a pruned operation more per edge and table
        assert [row["round"] for row in log] == [9 - k for k in range(8, 1, -1) for _ in range(k)]
        tables = re.findall(r"^ +none .*\n((?:(?:normal|reduce) .{,72}\n){28})", text, re.M)
        assert [table.count(" x") for table in tables] == [28 * k for k in range(1, 8)]

@each_script
def test_same_seed_same_result_and_the_learning_rate_falls_by_a_cosine(script, runs, pictures, tmp_path):
    log, low = read_log(runs(script)[0]), 0.001 if script is ddp_nas else 0
    assert read_log(runs(script)[1]) == log[:2]
    for out, epochs in zip(runs(script), (len(log), 2)):
        for group in load(out / CHECKPOINT[script])["optimizer"]["param_groups"]:
            lr = low + (0.1 - low) * (1 + math.cos(math.pi * epochs / EPOCHS[script])) / 2
            assert math.isclose(group["lr"], lr, abs_tol=1e-9)
            assert (group["momentum"], group["weight_decay"]) == (0.9, 3e-4)
    if script is not ddp_nas:
        assert run(script, tiny(script, pictures, tmp_path / "run", "--epochs", 1, "--seed", 1))[0] == 0
        assert read_log(tmp_path / "run")[0] != log[0]

@pytest.fixture
def short_backbone(monkeypatch):
    for script in SCRIPTS:
        monkeypatch.setitem(script.BACKBONES, "cpu", ([(8, 1), (8, 2), (12, 1)], 16))

@each_search
def test_mobile_search_and_summary_of_what_it_found(script, short_backbone, pictures, tmp_path):
    out = tmp_path / "run"
    assert run(script, tiny(script, pictures, out, "--space", "mobile", "--backbone", "cpu"))[0] == 0
    genotype, log = read_genotype(out), read_log(out)
    blocks = [tuple(block) for block in genotype["blocks"]]
    assert (genotype["space"], genotype["backbone"], len(blocks)) == ("mobile", "cpu", 3)
    assert len(log) == (44 if script is ddp_nas else 12) and all(len(row["sample"]) == 3 for row in log)
    for row, block in zip(strength_by_hand(script, log, 3, 9), blocks):
        assert math.isclose(row[ddp_nas.CANDIDATES.index(block)], max(row))
    drawn = re.findall(r"(\d)x\1, expansion (\d)", (out / "cell.md").read_text())
    assert [(int(kernel), int(expansion)) for kernel, expansion in drawn] == blocks
    code, text, err = run(retrain, ["--genotype", out / "genotype.json", "--data-dir", pictures, "--device", "cpu",
                                    "--image-size", 8, "--summary"])
    assert code == 0 and f" {count_by_hand(blocks, [40, 8, 8, 12, 16], 2):,} parameters" in text, err

@pytest.mark.parametrize("workers", [0, 1])
def test_large_pictures_are_read_when_they_are_needed(short_backbone, tmp_path, workers):
    write_pictures(tmp_path / "train", count=4, size=90)
    argv = tiny(mdenas, tmp_path, tmp_path / "run", "--space", "mobile", "--backbone", "cpu", "--batch-size", 4,
                "--image-size", 72, "--epochs", 1, "--workers", workers)
    code, _, err = run(mdenas, argv)
    assert code == 0 and len(read_genotype(tmp_path / "run")["blocks"]) == 3, err
    for culprit in (tmp_path / "train").rglob("*.png"):
        culprit.write_bytes(b"no picture")
    code, _, err = run(mdenas, [*argv, "--out", tmp_path / "other"])
    assert code == 2 and re.fullmatch(rf".*{tmp_path}/train/\w+/\d+\.png.*\n", err)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("script", [mdenas, retrain], ids=lambda script: script.METHOD)
def test_run_on_cuda(script, pictures, tmp_path):
    code, text, err = run(script, tiny(script, pictures, tmp_path / "run", "--device", "cuda", "--epochs", 3))
    assert code == 0 and "on cuda" in text and len(read_log(tmp_path / "run")) == 3, err

# ==== the networks that are trained alone ===================================================================
@pytest.mark.parametrize("name, dataset, channels, auxiliary, count", [
    ("MDENAS", "cifar10", 36, False, 3_786_742), ("MDENAS", "cifar10", 36, True, 4_263_168),
    ("DDPNAS_IMAGENET", "imagenet", 48, False, 4_506_592), ("MDENAS", "imagenet", 48, False, 5_329_024),
    ("MDENAS", "imagenet", 48, True, 6_589_800), ("DDPNAS_2", "cifar10", 36, True, 3_429_840),
    ("DDPNAS_2", "cifar10", 44, True, 4_830_120), ("DARTS_V2", "cifar10", 36, False, 3_349_342 + 2 * 5 * (72 + 144))])
def test_parameters_are_those_of_the_published_networks(name, dataset, channels, auxiliary, count):
    """DARTS has 3,349,342; here a BatchNorm follows each of the 5 pools of its two reduction cells."""
    with torch.device("meta"):
        network = retrain.build_network(retrain.load_genotype(name), dataset, 1000 if dataset == "imagenet" else 10,
                                        channels, None, auxiliary)
    assert count_weights(network) == count and (retrain.count_parameters(network) < count) == auxiliary

# The state dicts of the authors' weight files: number of entries, a checksum of all of them, and weights by position:
# stems, preprocessing, edges, factorised reductions, auxiliary head, last layer.
LAYOUTS = {
    "MDENAS": (1876, 1679529187, {0: (108, 3, 3, 3), 6: (36, 108, 1, 1), 18: (36, 1, 5, 5), 601: (36, 72, 1, 1),
        602: (36, 72, 1, 1), 650: (36, 144, 1, 1), 1860: (128, 576, 1, 1), 1866: (768, 128, 2, 2), 1874: (10, 576)}),
    "DDPNAS_IMAGENET": (1161, 2913415794, {0: (24, 3, 3, 3), 6: (48, 24, 3, 3), 12: (48, 48, 3, 3),
        18: (24, 48, 1, 1), 19: (24, 48, 1, 1), 25: (48, 48, 1, 1), 90: (48, 1, 3, 3), 1159: (1000, 768)}),
    "DDPNAS_GPU": (254, 3405535748, {0: (40, 3, 3, 3), 6: (240, 40, 1, 1), 12: (240, 1, 7, 7), 252: (1000, 1728)}),
    "MDENAS_CPU": (350, 3071067060, {0: (40, 3, 3, 3), 12: (120, 1, 5, 5), 24: (24, 1, 7, 7), 348: (1000, 1432)}),
}

@pytest.mark.parametrize("name", LAYOUTS)
def test_networks_are_laid_out_as_the_released_weights(name):
    (count, checksum, some), genotype = LAYOUTS[name], retrain.load_genotype(name)
    with torch.device("meta"):
        network = retrain.build_network(genotype, genotype["settings"]["dataset"], 10 if name == "MDENAS" else 1000,
                                        auxiliary=name == "MDENAS")
    entries = [(key.split(".")[-1], tuple(value.shape)) for key, value in network.state_dict().items()]
    assert len(entries) == count and all(entries[i] == ("weight", shape) for i, shape in some.items())
    text = "\n".join(f"{last} {'x'.join(map(str, shape))}" for last, shape in entries)
    assert zlib.crc32(text.encode()) == checksum

@pytest.mark.parametrize("name", [*retrain.PUBLISHED_CELLS, *retrain.PUBLISHED_BLOCKS])
def test_every_published_network_runs(name):
    args = retrain.parse_args(["--genotype", name, "--device", "cpu"])
    imagenet = name in ("DDPNAS_IMAGENET", *retrain.PUBLISHED_BLOCKS)
    assert (args.dataset, args.image_size) == (("imagenet", 224) if imagenet else ("cifar10", 32))
    network = retrain.build_network(args.genotype, args.dataset, 5, 4, 3).eval()
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    if name == "DDPNAS_1":  # the others are known by their counts
        text = re.sub("_conv|_pool|x[35]|[^a-z0-9]", "", str([args.genotype["normal"], args.genotype["reduce"]]))
        assert text == "sep50max31sep32max30dil50sep31avg32max34sep31dil50dil51sep50sep30avg33max31sep30"

@pytest.mark.parametrize("dataset, size, norms", [("cifar10", 32, 2), ("imagenet", 224, 1)])
def test_auxiliary_head_gives_logits_only_while_training(dataset, size, norms):
    network = retrain.build_network(retrain.random_genotype(1), dataset, 5, 2, 3, True)
    images = torch.randn(2, 3, size, size)
    logits, auxiliary = network(images)
    assert logits.shape == auxiliary.shape == network.eval()(images).shape == (2, 5)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.auxiliary.modules()) == norms
    assert network.cells[0].preprocess1[-1].eps == (1e-3 if dataset == "imagenet" else 1e-5)

def test_the_imagenet_network_takes_a_step_at_its_own_size():
    """With strided 1x1 convs in the factorised reduction, torch 2.14 on a CPU dies here."""
    network = retrain.build_network(retrain.load_genotype("DDPNAS_IMAGENET"), "imagenet", 3, 8, 3)
    network.to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    network(images).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters())

def test_drop_path_zeroes_whole_pictures_but_no_identity_and_nothing_in_evaluation():
    torch.manual_seed(0)
    nodes, seen = [[["skip_connect", 0], ["skip_connect", 1]], [["avg_pool_3x3", 0], ["skip_connect", 1]]] * 2, []
    network = retrain.build_network({"space": "cell", "normal": nodes, "reduce": nodes}, "cifar10", 5, 2, 3)
    cell, network.drop_path = network.cells[0], 0.3
    cell.register_forward_hook(lambda module, inputs, output: seen.append((*inputs[:2], output)))
    for training in (True, False):
        network.train(training)(torch.randn(2000, 3, 4, 4))
        first, second = seen[-1][2].split(2, 1)[:2]
        s0, s1 = cell.preprocess0(seen[-1][0]), cell.preprocess1(seen[-1][1])
        dropped = (second - s1).abs().flatten(1).amax(1) < 1e-6
        keep = (~dropped / 0.7 if training else torch.ones(2000)).view(-1, 1, 1, 1)
        torch.testing.assert_close((first, second), (s0 + s1, s1 + keep * cell.edges[2](s0)))
        count = dropped.sum().item()
        assert chi_square_is_usual([count, 2000 - count], np.array([600, 1400])) if training else count == 0

def test_drop_path_grows_with_the_epochs_and_the_large_setting_trains(pictures, tmp_path, monkeypatch):
    seen, train_epoch = [], retrain.train_epoch
    monkeypatch.setattr(retrain, "train_epoch",
                        lambda network, *args: seen.append(float(network.drop_path)) or train_epoch(network, *args))
    code, _, err = run(retrain, tiny(retrain, pictures, tmp_path / "run", "--large", "--epochs", 4))
    assert code == 0 and np.allclose(seen, [0, 0.05, 0.1, 0.15]), err

def test_cutout_zeroes_a_square_clipped_at_the_borders():
    torch.manual_seed(0)
    centres = np.zeros((20, 20))
    for image in retrain.cutout(torch.ones(8000, 2, 20, 20), 8).numpy():
        hole = np.argwhere(image[0] == 0)
        low, high = hole.min(0), hole.max(0) + 1
        centre = np.where(low > 0, low + 4, high - 4)
        assert (image[0] == image[1]).all() and len(hole) == (high - low).prod()
        assert (low == np.maximum(centre - 4, 0)).all() and (high == np.minimum(centre + 4, 20)).all()
        centres[tuple(centre)] += 1
    assert chi_square_is_usual(centres, 20)

def test_random_genotypes_are_repeatable_and_uniform():
    operations, sources, blocks = Counter(), Counter(), Counter()
    for seed in range(1000):
        genotype, mobile = (retrain.load_genotype(f"random:{seed}{more}") for more in ("", ":gpu"))
        assert genotype == retrain.load_genotype(f"random:{seed}") == retrain.check_genotype(genotype, "")
        assert mobile == retrain.check_genotype(mobile, "")
        blocks.update((i, *block) for i, block in enumerate(mobile["blocks"]))
        for cell, i in itertools.product(("normal", "reduce"), range(4)):
            sources[cell, i, tuple(source for _, source in genotype[cell][i])] += 1
            operations.update((cell, i, op) for op, _ in genotype[cell][i])
    pairs = [1, 3, 6, 10]  # of the sources of each node
    assert (len(operations), len(sources), len(blocks)) == (8 * 7, 2 * sum(pairs), 14 * 9)
    assert chi_square_is_usual(list(operations.values()), 2000 / 7)
    assert chi_square_is_usual(list(sources.values()), np.array([1000 / pairs[i] for _, i, _ in sources]))
    assert chi_square_is_usual(list(blocks.values()), 1000 / 9)

# ==== training and testing them =============================================================================
@pytest.mark.parametrize("argv, size, expected", [
    ("MDENAS", (36, 20), (600, 96, 0.025, "cosine", 3e-4, 3e-4, 5, 0, 0.4, 0.2, 0.5)),
    ("MDENAS --large", (44, 20), (1800, 96, 0.025, "cosine", 3e-4, 3e-4, 5, 0, 0.4, 0.2, 0.5)),
    ("MDENAS --dataset imagenet", (48, 14), (250, 512, 0.1, 0.97, 3e-5, 3e-5, 5, 0.1, 0.4, 0, 0)),
    ("MDENAS_CPU", (None, None), (120, 1024, 0.4, "cosine", 4e-5, 0, math.inf, 0.1, 0, 0, 0)),
    ("MDENAS_CPU --batch-size 256", (None, None), (120, 256, 0.1, "cosine", 4e-5, 0, math.inf, 0.1, 0, 0, 0))])
def test_recipes_are_those_of_the_papers(argv, size, expected):
    args = retrain.parse_args(["--device", "cpu", "--genotype", *argv.split()])
    names = "decay weight_decay norm_decay clip smoothing auxiliary drop_path cutout".split()
    assert (args.epochs, args.batch_size, args.lr, *(args.recipe[name] for name in names)) == expected
    assert (args.channels, args.cells) == size

class FakeNetwork(nn.Linear):
    def forward(self, images):
        """Logits of 7 classes from the first pixels, others from the next ones while training."""
        pixels = 0.01 * images.flatten(1) + 0 * self.bias
        return (pixels[:, :7], pixels[:, 7:14]) if self.training else pixels[:, :7]

def fake_batches(train):
    pixels = np.random.default_rng(0).permuted(np.tile(np.arange(256, dtype=np.uint8), (50, 1)), axis=1)[:, :192]
    pictures = F.pad(torch.from_numpy(pixels).view(50, 8, 8, 3), (0, 0, 1, 1, 1, 1))
    batches = retrain.Batches(pictures, torch.arange(50) % 7, torch.arange(50), 16, train, settings())
    batches.mean, batches.std = 0, 1
    return batches

def test_errors_are_those_of_plain_python():
    batches, wrong = fake_batches(False), [0, 0]
    for i, picture in enumerate(batches.images[:, 1:-1, 1:-1].permute(0, 3, 1, 2).flatten(1).tolist()):
        ranking = sorted(range(7), key=lambda c: -picture[c])
        wrong = [count + (i % 7 not in ranking[:n]) for count, n in zip(wrong, (1, 5))]
    assert retrain.evaluate(FakeNetwork(1, 1), batches, "") == pytest.approx([wrong[0] / 50, wrong[1] / 50])
    network = FakeNetwork(1, 1).eval()
    for script in (ddp_nas, mdenas):
        accuracy = script.evaluate(lambda images, sample: network(images), batches, None, "")
        assert accuracy == pytest.approx(1 - wrong[0] / 50) and 0 < wrong[1] < wrong[0] < 50

def test_training_loss_is_smoothed_and_takes_in_the_auxiliary_head():
    network, batches, losses = FakeNetwork(1, 1), fake_batches(True), []
    for images, labels in batches:
        for picture, label in zip(images.flatten(1).tolist(), labels.tolist()):
            for part, weight in ((picture[:7], 1), (picture[7:14], 0.4)):
                total = math.log(sum(math.exp(0.01 * x) for x in part))
                losses += [weight * (0.1 / 7 + 0.9 * (c == label)) * (total - 0.01 * part[c]) for c in range(7)]
    recipe = {"smoothing": 0.1, "auxiliary": 0.4, "cutout": 0, "clip": 5}
    loss = retrain.train_epoch(network, torch.optim.SGD(network.parameters(), 0), batches,
                               Namespace(compile=False, large=False, image_size=8, recipe=recipe), "")
    assert math.isclose(loss, sum(losses) / 48, rel_tol=1e-5)

def test_imagenet_decay_spares_mobile_norms_and_rates_follow_batch_and_epoch(short_backbone, pictures, tmp_path):
    argv = ["--dataset", "imagenet", "--data-dir", pictures, "--device", "cpu", "--workers", 0, "--batch-size", 8,
            "--image-size", 32, "--epochs", 2, "--out"]
    assert run(retrain, [*argv, tmp_path / "mobile", "--genotype", "random:0:cpu"])[0] == 0
    state = load(tmp_path / "mobile" / "last.pt")
    decayed, norms = state["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], norms["weight_decay"]) == (4e-5, 0) and norms["initial_lr"] == 0.4 * 8 / 1024
    weights = {name: value for name, value in state["network"].items() if name.endswith(("weight", "bias"))}
    for group, chosen in ((decayed, False), (norms, True)):
        shapes = [state["optimizer"]["state"][i]["momentum_buffer"].shape for i in group["params"]]
        assert shapes == [value.shape for name, value in weights.items()
                          if (name.rsplit(".", 1)[0] + ".running_mean" in state["network"]) == chosen]
    assert run(retrain, [*argv, tmp_path / "cells", "--genotype", "MDENAS", "--channels", 2, "--cells", 3])[0] == 0
    for group in load(tmp_path / "cells" / "last.pt")["optimizer"]["param_groups"]:
        assert math.isclose(group["lr"], 0.1 * 0.97**2) and group["weight_decay"] == 3e-5

def test_training_end_to_end_and_its_checkpoints_tested_alone(runs, pictures):
    out, images, logits = runs(retrain)[0], torch.randn(4, 3, 8, 8), []
    log = read_log(out)
    assert [row["epoch"] for row in log] == list(range(1, 7)) and all(row["top5_error"] == 0 for row in log)
    for name, row in (("best.pt", min(log, key=lambda row: row["top1_error"])), ("last.pt", log[-1])):
        code, text, err = run(retrain, ["--evaluate", out / name, "--data-dir", pictures, "--device", "cpu"])
        assert code == 0 and f"top-1 error {row['top1_error']:.2%}, top-5 error 0.00% of 14 pictures" in text, err
    for _ in range(2):
        weights, made_with = retrain.read_weights(out / "best.pt")
        network = retrain.build_network(made_with["genotype"], "imagefolder", 2, 2, 3).eval()
        retrain.load_weights(network, weights, "best.pt")
        logits.append(network(images))
    assert torch.equal(*logits) and same(dict(network.state_dict()), load(out / "best.pt")["network"])

def test_weights_of_the_authors_load_by_position(runs, pictures, tmp_path):
    ours, path = load(runs(retrain)[0] / "last.pt")["network"], tmp_path / "theirs.pth"
    theirs = {f"module.part{i}.{name.split('.')[-1]}": value for i, (name, value) in enumerate(ours.items())}
    argv = [*tiny(retrain, pictures, tmp_path)[:-4], "--evaluate", path]
    torch.save({"state_dict": theirs}, path)
    code, text, err = run(retrain, argv)
    assert code == 0 and f"top-1 error {read_log(runs(retrain)[0])[-1]['top1_error']:.2%}" in text, err
    names = list(theirs)
    for damaged, words in [({name: theirs[name] for name in names if name != names[8]}, [names[9], list(ours)[8]]),
                           ({**theirs, names[6]: torch.ones(5, 6, 1, 1)}, [names[6], (5, 6, 1, 1)]),
                           ({name: theirs[name] for name in names[:-1]}, ["linear.bias"])]:
        torch.save({"state_dict": damaged}, path)
        assert_refused(retrain, argv, tmp_path, path, *words)

def test_summary_against_arithmetic(tmp_path):
    node = [[["dil_conv_3x3", 0], ["dil_conv_3x3", 1]]] * 4
    (tmp_path / "found.json").write_text(json.dumps({"space": "cell", "normal": node, "reduce": node}))
    code, text, err = run(retrain, ["--genotype", tmp_path / "found.json", "--channels", 32, "--cells", 3,
                                    "--device", "cpu", "--summary"])  # of 16 x 16 made-up pictures of 10 classes
    edges = lambda c: 8 * (9 * c + c * c)  # depthwise and 1x1
    parts = [(256, 27 * 96 + 2 * 96 * 32 + edges(32)),  # stem and the normal cell, then two reduction cells
             (256, 96 * 64 + 128 * 64), (64, edges(64)), (64, 128 * 128 + 256 * 128), (16, edges(128)), (1, 512 * 10)]
    norms = 96 + 10 * (32 + 64 + 128)  # two of preprocessing and 8 of edges a cell
    weights = sum(weights for _, weights in parts) + 2 * norms + 10
    assert code == 0 and f" {weights:,} parameters, {sum(a * b for a, b in parts) / 1e6:.1f} M" in text, (text, err)

# ==== two processes =========================================================================================
TWO_RANKS = """
import sys
from pathlib import Path
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
import ddp_nas, mdenas, retrain

here, pictures, rank = Path(sys.argv[1]), sys.argv[2], ddp_nas.RANK
common = ["--device", "cpu", "--dataset", "imagefolder", "--data-dir", pictures, "--image-size", "8",
          "--batch-size", "18", "--lr", "0.1", "--workers", "0"]
cells, ddp_nas.BACKBONES["gpu"] = ["--channels", "2", "--cells", "3"], ([(8, 1), (8, 2)], 16)
ddp_nas.start_ranks("cpu")  # one group for all that follows
dist.init_process_group = dist.destroy_process_group = lambda *args: None
for script, more in ((ddp_nas, ["--passes", "1", "--space", "mobile"]), (mdenas, ["--epochs", "4", *cells]),
                     (retrain, ["--epochs", "3", "--genotype", "random:0", *cells])):
    def save_and_tell(path, settings, parts, log, save=script.save_checkpoint):
        if "optimizer" in parts:
            states = {"log": log, **{key: part.state_dict() for key, part in parts.items()}}
            torch.save(states, here / f"{path.parent.name}_{rank}.pt")
        save(path, settings, parts, log)
    script.save_checkpoint = save_and_tell
    assert script.main([*common, *more, "--out", str(here / script.METHOD)]) == 0

# Three steps without BatchNorm, each rank on its own half of a batch.
data = torch.load(here / "batch.pt", weights_only=True)
network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))
network.load_state_dict(data["weights"])
optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
for scale in (1, 30, 1):
    loss = scale * F.cross_entropy(network(data["images"][rank::2]), data["labels"][rank::2])
    ddp_nas.step(network, optimizer, loss, 5)
torch.save(network.state_dict(), here / f"steps_{rank}.pt")

if rank == 1:  # fails at last, while the other waits for it
    mdenas.evaluate = lambda *args: int("this rank has had enough")
sys.exit(mdenas.main([*common, *cells, "--out", str(here / "failed")]))
"""

@pytest.fixture(scope="module")
def two_ranks(pictures, tmp_path_factory):
    """All of the above -> its folder, the network at first, and what was printed."""
    folder = tmp_path_factory.mktemp("two_ranks")
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))
    torch.save({"weights": network.state_dict(), "images": torch.randn(10, 3, 2, 2),
                "labels": torch.randint(3, (10,))}, folder / "batch.pt")
    (folder / "two_ranks.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "two_ranks.py"]
    command += [folder, pictures]
    return folder, network, subprocess.run(command, env=ENV, cwd=folder, capture_output=True, text=True, timeout=100)

def test_failure_of_one_rank_ends_the_job_with_its_message(two_ranks):
    folder, _, done = two_ranks
    assert done.returncode != 0 and re.search("mdenas.py: error: .*this rank has had enough", done.stderr)
    assert read_log(folder / "failed") == []

@pytest.mark.parametrize("script, epochs", [(ddp_nas, 44), (mdenas, 4), (retrain, 3)])
def test_two_ranks_hold_the_same_and_tell_it_once(script, epochs, two_ranks, pictures):
    out = two_ranks[0] / script.METHOD
    log, (one, other) = read_log(out), (load(f"{out}_{rank}.pt") for rank in (0, 1))
    for state in (one, other):
        assert [{k: v for k, v in row.items() if k != "seconds"} for row in state.pop("log")] == log
    assert same(one, other) and len(log) == epochs
    assert len(re.findall(rf"^epoch +\d+/{epochs} ", two_ranks[2].stdout, re.M)) == epochs
    if script is retrain:  # the same errors as one process finds
        assert sum(value.any() for name, value in one["network"].items() if name.endswith("running_mean")) > 20
        code, text, err = run(retrain, ["--evaluate", out / "last.pt", "--data-dir", pictures, "--device", "cpu"])
        assert f"top-1 error {log[-1]['top1_error']:.2%}" in text, err
        return
    right = [row["accuracy"] * 18 for row in log]
    assert np.allclose(right, np.round(right)) and 9 < max(right) <= 18, "counted on one rank only?"
    genotype, distribution = read_genotype(out), one["distribution"]
    if script is mdenas:
        assert_derived(distribution["probabilities"], genotype)
        assert log[0]["sample"] == mdenas.MultinomialDistribution(28, 8).sample().tolist()  # as one process
    else:
        best = [row.index(True) for row in distribution["alive"]]
        assert [list(ddp_nas.CANDIDATES[choice]) for choice in best] == genotype["blocks"]

def test_steps_of_two_ranks_are_those_of_one_process_on_the_whole_batch(two_ranks):
    (folder, network, _), data, clipped = two_ranks, load(two_ranks[0] / "batch.pt"), []
    weights, momenta = list(network.parameters()), [0, 0, 0, 0]
    for scale in (1, 30, 1):
        grads = torch.autograd.grad(scale * F.cross_entropy(network(data["images"]), data["labels"]), weights)
        norm = math.sqrt(sum((grad**2).sum().item() for grad in grads))
        momenta = [0.9 * momentum + grad * min(1, 5 / norm) for momentum, grad in zip(momenta, grads)]
        for weight, momentum in zip(weights, momenta):
            weight.data.sub_(0.1 * momentum)
        clipped.append(norm > 5)
    assert clipped[:2] == [False, True]
    for rank in (0, 1):
        torch.testing.assert_close(load(folder / f"steps_{rank}.pt"), network.state_dict())

# ==== nothing lost ==========================================================================================
def kill(script, argv, out, file=None, delay=0.0):
    """Go on in another process, killed before it puts this file in place, or else some seconds after an epoch."""
    child, done, replace = os.fork(), len(read_log(out)), os.replace
    if child == 0:
        die = lambda target: Path(target).name == file and os.kill(os.getpid(), signal.SIGKILL)
        os.replace = lambda source, target: (die(target), replace(source, target))
        os._exit(run(script, [*argv, "--resume"])[0])
    if not file:
        deadline = time.monotonic() + 60
        while len(read_log(out)) == done and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

@each_script
def test_a_killed_run_resumes_to_the_same_result(script, runs, pictures, tmp_path):
    """After two epochs that Ctrl-C ended, killed at several moments."""
    finished, out = runs(script)[0], shutil.copytree(runs(script)[1], tmp_path / "run")
    last, argv, anew = CHECKPOINT[script], tiny(script, pictures, out), tiny(script, pictures, tmp_path / "anew")
    kill(script, anew, tmp_path / "anew", last)
    assert run(script, [*anew, "--resume"])[0] == 0 if script is retrain else not (tmp_path / "anew" / last).exists()
    for moment in ({"file": last}, {"file": "log.jsonl"}, {"delay": 0.01}, {"delay": 0.03}):
        kill(script, argv, out, **moment)
    done = len(read_log(out))
    assert 4 <= done < EPOCHS[script] and read_log(out) == read_log(finished)[:done]
    if script is not retrain:
        kill(script, argv, out, "genotype.json")
    code, text, err = run(script, [*argv, "--resume"])
    assert code == 0 and len(re.findall("^epoch ", text, re.M)) == (EPOCHS[script] - done if script is retrain else 0)
    assert_same_run(out, finished)

def test_ctrl_c_ends_with_one_line(pictures, tmp_path):
    command = [sys.executable, HERE / "ddp_nas.py", *map(str, tiny(ddp_nas, pictures, tmp_path / "run"))]
    with subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not read_log(tmp_path / "run") and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and len(err.strip().splitlines()) == 1 and "--resume" in err

@each_script
@pytest.mark.parametrize("fault", ["first step", "last step", "full disk"])
def test_a_fault_in_the_third_epoch_keeps_the_last_checkpoint(script, runs, pictures, tmp_path, monkeypatch, fault):
    """Weights become not-a-number; or the disk is full, for which a limit on the size of files stands in."""
    out, step, limits = tmp_path / "run", script.step, resource.getrlimit(resource.RLIMIT_FSIZE)
    calls, batches = itertools.count(1), 4 if script is retrain else 2
    def spoiling(network, *args):
        step(network, *args)
        if next(calls) == 2 * batches + (batches if fault == "last step" else 1):
            nn.init.constant_(network.linear.bias, math.nan)
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    if fault == "full disk":
        monkeypatch.setattr(script, "train_epoch", at_call(3, script.train_epoch, fill))
    else:
        monkeypatch.setattr(script, "step", spoiling)
    code, _, err = run(script, tiny(script, pictures, out))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sample = "" if script is retrain else str(read_log(runs(script)[0])[2]["sample"])
    words = [str(out), os.strerror(errno.EFBIG)] if fault == "full disk" else ["epoch   3/", "--lr", sample]
    assert code == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), err
    assert_same_run(out, runs(script)[1])

# ==== resuming what cannot be resumed =======================================================================
@each_script
@pytest.mark.parametrize("name, value", [("lr", 0.05), ("seed", 1), ("batch_size", 4), ("channels", 4), ("cells", 4),
                                         ("image_size", 12), ("dataset", "synthetic"), ("of its own", None)])
def test_resume_under_other_settings_is_refused(script, runs, pictures, name, value):
    if value is None:
        name, value = {ddp_nas: ("passes", 2), mdenas: ("alpha", 0.02), retrain: ("genotype", "random:1")}[script]
    argv = tiny(script, pictures, runs(script)[1], "--resume", "--" + name.replace("_", "-"), value)
    assert_refused(script, argv, runs(script)[1], name, runs(script)[1] / CHECKPOINT[script])

def trap(path):
    """Unpickled, it makes a folder."""
    return type("Trap", (), {"__reduce__": lambda self: (os.mkdir, (str(path),))})()

def flip_a_bit(path, sprung):
    """In the middle of a weight; a part of the file is padding, where it would do no harm."""
    data, archive = path.read_bytes(), zipfile.ZipFile(path)
    weight = max((info for info in archive.infolist() if "/data/" in info.filename), key=lambda info: info.file_size)
    place = data.index(archive.read(weight)) + weight.file_size // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])

DAMAGES = {
    "cut": lambda path, sprung: os.truncate(path, path.stat().st_size // 2), "flipped bit": flip_a_bit,
    "empty": lambda path, sprung: os.truncate(path, 0),
    "other script": lambda path, sprung: torch.save({**load(path), "settings": {"method": "another"}}, path),
    "code": lambda path, sprung: torch.save({**load(path), "network": trap(sprung)}, path),
    "bare pickle": lambda path, sprung: path.write_bytes(pickle.dumps({"settings": {}, "network": trap(sprung)}, 2)),
}

@each_script
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_and_code_in_it_does_not_run(script, runs, pictures, tmp_path, damage):
    out, sprung = shutil.copytree(runs(script)[1], tmp_path / "stopped"), tmp_path / "sprung"
    checkpoint = out / CHECKPOINT[script]
    DAMAGES[damage](checkpoint, sprung)
    assert_refused(script, tiny(script, pictures, out, "--resume"), out, checkpoint)
    if script is retrain and damage != "other script":
        assert_refused(script, ["--evaluate", checkpoint, "--data-dir", pictures, "--device", "cpu"], out, checkpoint)
    assert not sprung.exists()
    if damage in ("code", "bare pickle"):  # the trap is a real one
        torch.load(checkpoint, weights_only=False) if damage == "code" else pickle.loads(checkpoint.read_bytes())
        assert sprung.exists()

# ==== bad input =============================================================================================
@each_script
def test_a_run_is_not_written_over(script, runs, pictures):
    for out, words in zip(runs(script), ([], ["--resume"])):
        assert_refused(script, tiny(script, pictures, out), out, out, *words)
    if script is not retrain:
        assert_refused(script, tiny(script, pictures, runs(script)[0], "--resume"), runs(script)[0], runs(script)[0])

COMMON = {"batch-size": [0, -8, "many", 37], "channels": [0, -1], "cells": [0, 2], "image-size": [0, -8, 10],
          "lr": [0, -0.1, "nan", "inf", "fast"], "seed": [-1], "workers": [-1], "dataset": ["mnist"]}
OPTIONS = {ddp_nas: {"passes": [0, -3], "space": ["outer"], "batch-size": [19]}, retrain: {"epochs": [0, -1]},
           mdenas: {"epochs": [0, -1], "alpha": [0, 1, 1.5, -0.1, "nan"], "backbone": ["tpu"], "batch-size": [19]}}

@each_script
def test_options_out_of_range(script, pictures, tmp_path, monkeypatch):
    argv = tiny(script, pictures, tmp_path / "run")
    for name, values in [*COMMON.items(), *OPTIONS[script].items()]:
        for value in values:
            assert_refused(script, [*argv, "--" + name, value], tmp_path, name)
    assert_refused(script, [*argv, "--dataset", "cifar10", "--image-size", 16], tmp_path, "--image-size")
    if not torch.cuda.is_available():
        assert_refused(script, [*argv, "--device", "cuda"], tmp_path, "--device cuda")
    (tmp_path / "file").write_text("something else")
    for out in ("file", "file/run"):
        assert_refused(script, [*argv, "--out", tmp_path / out], tmp_path, tmp_path / "file")
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    assert_refused(script, argv, tmp_path, "--batch-size 8", 3)

@each_script
def test_bad_folders_of_pictures(script, tmp_path):
    argv, train = tiny(script, tmp_path, tmp_path / "run"), tmp_path / "train"
    assert_refused(script, tiny(script, tmp_path / "nowhere", tmp_path / "run"), tmp_path, tmp_path / "nowhere")
    write_pictures(train, classes=["cats"])
    assert_refused(script, argv, tmp_path, train, "cats")
    write_pictures(train, classes=["dogs"])
    (train / "birds").mkdir()
    assert_refused(script, argv, tmp_path, train, "birds")
    (train / "birds").rmdir()
    write_pictures(tmp_path / "val", classes=["cats", "wolves"])
    if script is retrain:
        assert_refused(script, argv, tmp_path, tmp_path, "val", "dogs", "wolves")
    culprit = train / "dogs" / "07.png"
    for content in (b"no picture", b"", culprit.read_bytes()[:100]):
        culprit.write_bytes(content)
        assert_refused(script, argv, tmp_path, culprit)

def test_class_names_reach_no_file(tmp_path):
    names = ['"] --> click', "```", "<script>", "..%2f..%2fup", "$(touch up)", "a\nb"]
    write_pictures(tmp_path / "data" / "train", classes=names, count=6)
    before = files(tmp_path)
    assert run(mdenas, tiny(mdenas, tmp_path / "data", tmp_path / "run", "--epochs", 1))[0] == 0
    assert {path.parent for path in files(tmp_path).keys() - before.keys()} == {tmp_path / "run"}
    text = (tmp_path / "run" / "cell.md").read_text()
    assert text.count("```") == 4 and not any(name in text for name in names if name != "```")

@each_script
@pytest.mark.parametrize("name", ["nothing", "cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_1"])
def test_cifar10_missing_or_damaged_and_no_network(script, tmp_path, monkeypatch, name):
    path, data = tmp_path / "data" / name, tmp_path / "data"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    before = files(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **more: fail(OSError("no route")))
    code, _, err = run(script, [*LENGTH[script], "--dataset", "cifar10", "--device", "cpu", "--data-dir", data,
                                "--out", tmp_path / "run"])
    line = err.splitlines()[-1]
    assert code == 2 and "Traceback" not in err and line.startswith(f"{script.METHOD}.py: error: ")
    assert str(data) in line and "network" in line and files(tmp_path) == before

CELL, MOBILE = retrain.load_genotype("MDENAS"), {"space": "mobile", "backbone": "gpu", "blocks": [[3, 1]] * 14}

def with_node(*node):
    return {**CELL, "normal": [list(node), *CELL["normal"][1:]]}

@pytest.mark.parametrize("content, words", [
    ("{", ["JSON"]), ([1], ["space"]), ({}, ["space"]), ({**CELL, "space": "outer"}, ["space"]),
    ({**CELL, "normal": CELL["normal"][:3]}, ["normal", 4]), ({**CELL, "reduce": 5}, ["reduce"]),
    (with_node(["sep_conv_9x9", 0], ["skip_connect", 1]), ["normal", "sep_conv_9x9"]),
    (with_node(["none", 0], ["skip_connect", 1]), ["normal", "none"]), (with_node(["none", 0]), ["normal", 2]),
    (with_node(["skip_connect", 0], ["skip_connect", 2]), ["normal", "0 to 1"]),
    (with_node(["skip_connect", 0], ["skip_connect", -1]), ["normal", -1]),
    ({**MOBILE, "blocks": [[3, 1]] * 13}, ["blocks", 14]), ({**MOBILE, "blocks": [[3, 2]] * 14}, ["blocks", [3, 2]]),
    ({**MOBILE, "backbone": "tpu"}, ["backbone"]), ({**MOBILE, "space": "cell"}, ["normal"]),
    ({**CELL, "space": "mobile", "backbone": "cpu"}, ["blocks"])])
def test_file_that_is_no_genotype(content, words, tmp_path):
    (tmp_path / "found.json").write_text(content if isinstance(content, str) else json.dumps(content))
    argv = ["--genotype", tmp_path / "found.json", "--device", "cpu", "--out", tmp_path / "run"]
    assert_refused(retrain, argv, tmp_path, tmp_path / "found.json", *words)

@pytest.mark.parametrize("argv, words", [
    ("", ["runs/ddp_nas/genotype.json", "python ddp_nas.py"]), ("--genotype DDPNAS_9", ["DDPNAS_9", "DDPNAS_2"]),
    ("--genotype random:x", ["random:x"]), ("--genotype random:0:tpu", ["random:0:tpu"]),
    ("--evaluate nowhere.pt", ["nowhere.pt"]), ("--genotype MDENAS_CPU --cells 5", ["--cells"]),
    ("--genotype MDENAS_CPU --large", ["--large"]), ("--genotype DDPNAS_IMAGENET --image-size 40", ["--image-size"])])
def test_missing_genotype_and_options_that_do_not_fit_it(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(retrain, [*argv.split(), "--device", "cpu"], tmp_path, *words)

# ==== evidence: the distributions without a network, against random search ==================================
def made_up_task(kind, num_edges, num_ops, seed):
    """-> true(samples (..., E)), from 0.2 to 0.9; measured(samples, epochs); the best (E,); the mean of true()."""
    rng, edges = np.random.default_rng(seed), np.arange(num_edges)
    worth = rng.random((num_edges, num_ops))  # of an operation on an edge; next, of it with that on the next edge
    pair = rng.random((num_edges - 1, num_ops, num_ops)) * (kind == "neighbours matter")
    scale = 0.7 / (num_edges + (num_edges - 1) * (kind == "neighbours matter"))
    def true(samples):
        with_next = pair[edges[:-1], samples[..., :-1], samples[..., 1:]]
        return 0.2 + scale * (worth[edges, samples].sum(-1) + with_next.sum(-1))
    def measured(samples, epochs):
        noise = rng.normal(0, 0.02, np.shape(epochs)) if kind == "noise of 0.02" else 0
        growth = 1 - np.exp(-epochs / 30) if kind == "grows with the epoch" else 1
        return np.clip(growth * true(samples) + noise, 0, 1)
    rest, following = np.zeros(num_ops), []  # from the last edge to the first: the most that the later edges can add
    for e in reversed(range(num_edges - 1)):
        later = pair[e] + worth[e + 1] + rest  # (K of edge e, K of edge e + 1)
        rest, following = later.max(1), [later.argmax(1), *following]
    best = [*itertools.accumulate(following, lambda last, choice: choice[last], initial=(worth[0] + rest).argmax())]
    return true, measured, np.array(best), 0.2 + scale * (worth.mean(1).sum() + pair.mean((1, 2)).sum())

def search_without_network(method, epochs, kind, num_edges, seed, num_ops=8):
    """-> was the best architecture found, share of edges that have its operation, regret, regret if chance has 1."""
    true, measured, best, mean = made_up_task(kind, num_edges, num_ops, seed)
    if method == "random search":
        samples = np.random.default_rng([seed, 1]).integers(num_ops, size=(epochs, num_edges))
        found = samples[measured(samples, np.arange(1, epochs + 1)).argmax()]
    else:
        make, length = ((mdenas.MultinomialDistribution, epochs) if method == "MdeNAS" else
                        (ddp_nas.DynamicDistribution, epochs // 35))
        distribution = make(num_edges, num_ops, length, seed=[seed, 1])
        drive(distribution, measured)
        found = distribution.best()
    regret = true(best) - true(found)
    return (found == best).all(), (found == best).mean(), regret, regret / (true(best) - mean)

def evidence(seeds=200):
    """Print a table of means over the seeds, with standard errors; 3 minutes."""
    print("| accuracy | edges | epochs | method | best found, % | edges right, % | regret | regret, chance = 1 |",
          "|---|--:|--:|---|--:|--:|--:|--:|", sep="\n")
    budgets = [(method, epochs) for epochs in (105, 1050) for method in ("DDP-NAS", "MdeNAS", "random search")]
    budgets[1] = ("MdeNAS", 100)
    kinds = "adds up", "noise of 0.02", "neighbours matter", "grows with the epoch"
    for kind, num_edges, (method, epochs) in itertools.product(kinds, (4, 28), budgets):
        runs = [search_without_network(method, epochs, kind, num_edges, seed) for seed in range(seeds)]
        runs = np.array(runs) * [100, 100, 1, 1]
        cells = [f"{mean:.{digits}f} ± {error:.{digits}f}" for mean, error, digits in
                 zip(runs.mean(0), runs.std(0, ddof=1) / seeds ** 0.5, (1, 1, 4, 3))]
        print(f"| {kind} | {num_edges} | {epochs} | {method} |", " | ".join(cells), "|", flush=True)

if __name__ == "__main__":
    evidence()
