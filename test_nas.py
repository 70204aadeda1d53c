"""Tests of the searches: python -m pytest -q test_nas.py"""
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ddp_nas
import mdenas

HERE = Path(__file__).parent
SCRIPTS = {"ddp_nas": ddp_nas, "mdenas": mdenas}
TINY = ["--channels", "2", "--cells", "3", "--image-size", "8", "--batch-size", "96", "--device", "cpu"]
SHORT = {"ddp_nas": ["--passes", "1"], "mdenas": ["--epochs", "6"]}


def rows(out):
    """log.jsonl without what a clock wrote."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in open(out / "log.jsonl")]


def drive(distribution, judge):
    """Run a distribution to its end on judge(sample, epoch) -> accuracy; returns the samples."""
    samples = []
    while not distribution.finished:
        samples.append(distribution.sample())
        distribution.record(samples[-1], judge(samples[-1], len(samples)))
    return samples


# ---- layout ----------------------------------------------------------------------------------------------------


def shared_blocks(name):
    pattern = r"^ *# ==== shared: (.+?) =+\n(.*?)^ *# ==== end =+$"
    return {m[1]: m[2] for m in re.finditer(pattern, (HERE / name).read_text(), re.S | re.M)}


def test_shared_blocks_are_the_same_to_the_byte():
    ours, theirs = shared_blocks("ddp_nas.py"), shared_blocks("mdenas.py")
    assert len(ours) >= 7 and ours.keys() == theirs.keys()
    for name, block in ours.items():
        for i, (a, b) in enumerate(itertools.zip_longest(block, theirs[name])):
            assert a == b, f"block {name!r} differs at character {i}: {block[i:i + 40]!r} is {theirs[name][i:i + 40]!r}"


def test_the_diff_is_short_and_no_script_imports_another():
    diff = subprocess.run(["diff", "ddp_nas.py", "mdenas.py"], cwd=HERE, capture_output=True, text=True).stdout
    assert 0 < sum(line[:1] in "<>" for line in diff.splitlines()) < 200
    for name in ("ddp_nas.py", "mdenas.py"):
        assert not re.search(r"^\s*(from|import) +(ddp_nas|mdenas|retrain)\b", (HERE / name).read_text(), re.M)


# ---- the distribution of DDP-NAS -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ops, passes, epochs", [(8, 3, 105), (9, 3, 132), (8, 1, 35), (2, 2, 4), (5, 4, 56)])
def test_number_of_epochs(num_ops, passes, epochs):
    distribution = ddp_nas.DynamicDistribution(4, num_ops, passes)
    assert distribution.total_epochs == epochs
    assert len(drive(distribution, lambda sample, epoch: 0.5)) == epochs


@pytest.mark.parametrize("seed", range(5))
def test_a_pass_visits_every_alive_operation_once_and_a_round_prunes_one(seed):
    noise = np.random.default_rng(seed)
    distribution = ddp_nas.DynamicDistribution(6, 5, passes=2, seed=seed)
    pruned_before = np.zeros((6, 5), bool)
    for k in (5, 4, 3, 2):
        alive = distribution.alive.copy()
        assert (alive.sum(1) == k).all() and not (alive & pruned_before).any()
        for _ in range(2):
            visits = np.zeros((6, 5), int)
            for _ in range(k):
                sample = distribution.sample()
                visits[np.arange(6), sample] += 1
                distribution.record(sample, noise.random())
            assert (visits == alive).all()
        pruned_before |= ~distribution.alive
        np.testing.assert_allclose(distribution.probabilities.sum(1), 1)
        assert (distribution.probabilities[~distribution.alive] == 0).all()
    assert distribution.finished and (distribution.best() == distribution.alive.argmax(1)).all()


def test_theta_against_plain_python():
    noise, num_edges, num_ops, passes = np.random.default_rng(3), 3, 4, 2
    distribution = ddp_nas.DynamicDistribution(num_edges, num_ops, passes, seed=3)
    theta = [[1 / num_ops] * num_ops for _ in range(num_edges)]
    alive = [set(range(num_ops)) for _ in range(num_edges)]
    for k in range(num_ops, 1, -1):
        measured = [[{} for _ in range(num_edges)] for _ in range(passes)]
        for one_pass in measured:
            for _ in range(k):
                sample, accuracy = distribution.sample(), float(noise.random())
                distribution.record(sample, accuracy)
                for edge in range(num_edges):
                    one_pass[edge][int(sample[edge])] = accuracy
        for edge in range(num_edges):
            for op in range(num_ops):
                mean = 0
                if op in alive[edge]:
                    for one_pass in measured:
                        mean += (np.exp(100 * one_pass[edge][op])
                                 / sum(np.exp(100 * a) for a in one_pass[edge].values()) / passes)
                theta[edge][op] = mean + 0.5 * theta[edge][op]
            alive[edge].remove(min(alive[edge], key=lambda op: theta[edge][op]))
        np.testing.assert_allclose(distribution.theta, theta, rtol=1e-9)
        assert [set(row.nonzero()[0]) for row in distribution.alive] == alive


def test_planted_optimum_is_found_from_any_seed_and_under_noise():
    """One edge at a time: with the rest held equal, a pass ranks the operations exactly."""
    g = np.random.default_rng(0)
    clean, noisy = 0, 0
    for seed in range(100):
        worth = g.permutation(np.linspace(0.2, 0.9, 8))
        for noise in (0, 0.03):
            distribution = ddp_nas.DynamicDistribution(1, 8, seed=seed)
            drive(distribution, lambda s, e: float(np.clip(worth[s[0]] + noise * g.standard_normal(), 0, 1)))
            clean += noise == 0 and distribution.best()[0] == worth.argmax()
            noisy += noise > 0 and distribution.best()[0] == worth.argmax()
    assert clean == 100 and noisy > 80


def test_many_edges_together_move_towards_the_optimum():
    """A separable objective: every edge adds what its operation is worth, 1 for all the best together."""
    for seed in range(5):
        worth = np.random.default_rng(seed).permuted(np.tile(np.linspace(0, 1, 8), (28, 1)), axis=1)
        judge = lambda sample, epoch: float(worth[np.arange(28), sample].mean())  # noqa: E731
        distribution = ddp_nas.DynamicDistribution(28, 8, passes=20, seed=seed)
        drive(distribution, judge)
        assert judge(distribution.best(), 0) > 0.7  # a random architecture is worth 0.5 on average, within 0.06


# ---- the distribution of MdeNAS --------------------------------------------------------------------------------


def test_update_against_a_double_loop():
    g = np.random.default_rng(1)
    for _ in range(2000):
        num_edges, num_ops = int(g.integers(1, 4)), int(g.integers(2, 7))
        alpha = float(g.choice([0.01, 0.2]))
        distribution = mdenas.MultinomialDistribution(num_edges, num_ops, alpha=alpha, seed=int(g.integers(1000)))
        p = g.random((num_edges, num_ops)) * g.integers(0, 2, (num_edges, num_ops))
        p[:, 0] += 0.01
        p /= p.sum(1, keepdims=True)
        distribution.probabilities = p.copy()
        distribution.epochs_seen = g.integers(0, 4, (num_edges, num_ops))
        distribution.accuracies = g.integers(0, 4, (num_edges, num_ops)) / 4
        seen, accuracy = distribution.epochs_seen.copy(), distribution.accuracies.copy()
        sample, measured = distribution.sample(), float(g.integers(0, 5) / 4)
        distribution.record(sample, measured)
        expected = p.copy()
        for e in range(num_edges):
            seen[e, sample[e]] += 1
            accuracy[e, sample[e]] = measured
            for j in range(num_ops):
                winners = [i for i in range(num_ops) if seen[e, i] < seen[e, j] and accuracy[e, i] > accuracy[e, j]]
                for i in winners:
                    amount = min(alpha, p[e, j] / len(winners))
                    expected[e, i] += amount
                    expected[e, j] -= amount
        np.testing.assert_allclose(distribution.probabilities, expected, atol=1e-12)


def test_rows_stay_probabilities_and_the_unseen_stay_untouched():
    g = np.random.default_rng(2)
    distribution = mdenas.MultinomialDistribution(5, 6, epochs=10_000, alpha=0.05, seed=2)
    distribution.probabilities[:] = [0.4, 0.3, 0.3, 0, 0, 0]
    for _ in range(10_000):
        distribution.record(distribution.sample(), g.random())
        assert (distribution.probabilities >= 0).all()
        np.testing.assert_allclose(distribution.probabilities.sum(1), 1, atol=1e-9)
    assert (distribution.epochs_seen[:, 3:] == 0).all() and (distribution.probabilities[:, 3:] == 0).all()
    assert (distribution.epochs_seen.sum(1) == 10_000).all()


def test_resampling_honours_the_probabilities():
    distribution = mdenas.MultinomialDistribution(1, 5, epochs=20_000, seed=4)
    p = np.array([[0.5, 0, 0.3, 0.15, 0.05]])
    counts = np.zeros(5)
    for _ in range(20_000):
        distribution.probabilities = p.copy()
        sample = distribution.sample()
        counts[sample] += 1
        distribution.record(sample, 0.5)
    assert counts[1] == 0
    expected = 20_000 * p[0, [0, 2, 3, 4]]
    assert ((counts[[0, 2, 3, 4]] - expected) ** 2 / expected).sum() < 16.27  # chi-square, 3 degrees, 0.1 %


def test_planted_optimum_becomes_the_most_probable():
    found = 0
    for seed in range(20):
        worth = np.random.default_rng(seed).permutation(np.linspace(0.2, 0.9, 6))
        distribution = mdenas.MultinomialDistribution(1, 6, epochs=1000, seed=seed)
        drive(distribution, lambda s, e: float(worth[s[0]]))
        found += distribution.best()[0] == worth.argmax()
    assert found >= 18


# ---- both distributions ----------------------------------------------------------------------------------------


MAKE = [lambda seed=0: ddp_nas.DynamicDistribution(6, 4, seed=seed),
        lambda seed=0: mdenas.MultinomialDistribution(6, 4, epochs=27, seed=seed)]


@pytest.mark.parametrize("make", MAKE)
def test_refusals(make):
    distribution = make()
    with pytest.raises(ValueError):
        distribution.record(np.zeros(6, int), 0.5)  # nothing was handed out
    sample = distribution.sample()
    assert (distribution.sample() == sample).all()
    for wrong in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(ValueError):
            distribution.record(sample, wrong)
    with pytest.raises(ValueError):
        distribution.record((sample + 1) % 4, 0.5)
    distribution.record(sample, 0.5)
    with pytest.raises(ValueError):
        distribution.record(sample, 0.5)
    drive(distribution, lambda s, e: 0.5)
    with pytest.raises(ValueError):
        distribution.sample()


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("stop", [0, 1, 5, 13])
def test_state_goes_on_where_it_was(make, stop):
    judge = lambda sample, epoch: float(sample.sum() / 24)  # noqa: E731
    whole, first, second = make(seed=7), make(seed=7), make(seed=99)
    expected = drive(whole, judge)
    for _ in range(stop):
        first.record(first.sample(), judge(first.sample(), 0))
    first.sample()  # handed out, not yet recorded
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    np.testing.assert_array_equal(drive(second, judge), expected[stop:])
    np.testing.assert_array_equal(second.probabilities, whole.probabilities)
    with pytest.raises(ValueError):
        MAKE[make is MAKE[0]]().load_state_dict(first.state_dict())


# ---- supernets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ddp_nas.PRIMITIVES)
def test_every_operation_gives_the_right_shape(name, stride):
    op = ddp_nas.OPS[name](6, stride, torch.nn.BatchNorm2d)
    out = op(torch.randn(2, 6, 8, 8))
    assert out.shape == (2, 6, 8 // stride, 8 // stride)
    assert (out == 0).all() == (name == "none")


@pytest.mark.parametrize("backbone", ["gpu", "cpu"])
def test_every_mobile_candidate_gives_the_right_shape(backbone):
    network = ddp_nas.MobileSupernet(backbone, 3)
    c_in = 40
    for candidates, (c_out, stride) in zip(network.blocks, ddp_nas.BACKBONES[backbone][0], strict=True):
        assert len(candidates) == 9
        for block, (kernel, expansion) in zip(candidates, ddp_nas.CANDIDATES):
            assert block(torch.randn(2, c_in, 4, 4)).shape == (2, c_out, 4 // stride, 4 // stride)
            convs = [m for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
            assert len(convs) == (3 if expansion > 1 else 2) and convs[-2].kernel_size == (kernel, kernel)
            assert convs[-2].groups == c_in * expansion
        c_in = c_out
    assert network(torch.randn(2, 3, 32, 32), np.zeros(len(network.blocks), int)).shape == (2, 3)


def test_a_step_leaves_everything_off_the_path_alone():
    torch.manual_seed(0)
    network = ddp_nas.CellSupernet(2, 3, 10)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=0.1)
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
    for op in range(8):  # gives every weight a momentum
        ddp_nas.step(network, optimizer, F.cross_entropy(network(images, np.full(28, op)), labels), 5)
    before = {name: (weight.clone(), optimizer.state[weight]["momentum_buffer"].clone())
              for name, weight in network.named_parameters() if weight in optimizer.state}
    ddp_nas.step(network, optimizer, F.cross_entropy(network(images, np.full(28, 4)), labels), 5)
    moved = 0
    for name, weight in network.named_parameters():
        if name not in before:
            continue
        same = torch.equal(weight, before[name][0]) and torch.equal(
            optimizer.state[weight]["momentum_buffer"], before[name][1])
        match = re.match(r"cells\.\d+\.edges\.\d+\.(\d)\.", name)
        assert same == bool(match and match[1] != "4"), name
        moved += not same
    assert moved > 50


def test_a_step_pays_for_the_sampled_path_only():
    network, images = ddp_nas.CellSupernet(4, 3, 10), torch.randn(4, 3, 8, 8)

    def saved_bytes(sample):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            network(images, sample)
        return sum(sizes)
    one_path = [saved_bytes(np.full(28, op)) for op in range(8)]
    nothing = one_path[0]  # `none` everywhere: stem, preprocessing and linear
    assert max(one_path) - nothing < 0.5 * sum(size - nothing for size in one_path)


def test_derived_cells_hold_the_strongest_edges_and_never_none():
    g = np.random.default_rng(5)
    for _ in range(200):
        strength = g.random((28, 8))
        strength[:, 0] += g.integers(0, 2)  # `none` the strongest of all, or not
        cells = ddp_nas.derive_cells(strength)
        edge = 0
        for cell in ("normal", "reduce"):
            assert len(cells[cell]) == 4
            for i, node in enumerate(cells[cell]):
                best = sorted(((max(strength[edge + s][1:]), s) for s in range(2 + i)), reverse=True)[:2]
                assert sorted(s for _, s in best) == [s for _, s in node]
                for name, source in node:
                    assert name == ddp_nas.PRIMITIVES[1 + list(strength[edge + source][1:]).index(
                        max(strength[edge + source][1:]))]
                edge += 2 + i


# ---- data ------------------------------------------------------------------------------------------------------


def test_crops_are_windows_of_the_padded_picture_flipped_or_not():
    args = ddp_nas.parse_args(["--image-size", "16", "--device", "cpu"])
    images, labels, _ = ddp_nas.make_gratings(768, 16, seed=1)
    padded = F.pad(images, (0, 0, 2, 2, 2, 2))
    pictures, _, _ = ddp_nas.open_pictures(args, train=True)
    batches = ddp_nas.Batches(pictures, labels, torch.arange(64), 32, True, args)
    assert len(batches) == 2
    seen = []
    for crops, targets in batches:
        for crop, target in zip(crops.permute(0, 2, 3, 1), targets):
            matches = [(i, flip) for i in range(64) for y in range(5) for x in range(5) for flip in (False, True)
                       if torch.equal(padded[i, y:y + 16, x:x + 16].flip(1) if flip else padded[i, y:y + 16, x:x + 16],
                                      crop)]
            assert len(matches) == 1 and labels[matches[0][0]] == target
            seen += matches
    assert sorted(i for i, _ in seen) == list(range(64)) and 10 < sum(flip for _, flip in seen) < 54
    plain = ddp_nas.Batches(pictures, labels, torch.arange(40), 20, False, args)
    assert torch.equal(torch.cat([crops for crops, _ in plain]).permute(0, 2, 3, 1), images[:40])


def test_halves_share_no_picture():
    args = ddp_nas.parse_args(["--device", "cpu"])
    images, labels, _ = ddp_nas.open_pictures(args, train=True)
    train, judge = ddp_nas.split_halves(images, labels, args)
    assert not set(train.index.tolist()) & set(judge.index.tolist())
    assert len(train.index) == len(judge.index) == len(images) // 2


def test_a_linear_classifier_stays_under_30_percent_on_the_made_up_pictures():
    images, labels, names = ddp_nas.make_gratings(4000, 16, 0)
    assert len(names) == 10
    x = (images.flatten(1).double() - 128) / 50
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    ridge = x[:3000].T @ x[:3000] + 100 * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(ridge, x[:3000].T @ F.one_hot(labels[:3000], 10).double())
    assert ((x[3000:] @ weights).argmax(1) == labels[3000:]).double().mean() < 0.3


# ---- whole searches --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    assert SCRIPTS[request.param].main([*TINY, *SHORT[request.param], "--out", str(out)]) == 0
    return request.param, out


def test_search_end_to_end(finished):
    name, out = finished
    genotype = json.loads((out / "genotype.json").read_text())
    assert genotype["method"] == name and genotype["space"] == "cell"
    assert 0 <= genotype["validation_accuracy"] <= 1 and genotype["settings"]["channels"] == 2
    for cell in ("normal", "reduce"):
        for i, node in enumerate(genotype[cell]):
            assert len(node) == 2 and len({source for _, source in node}) == 2
            assert all(op in ddp_nas.PRIMITIVES[1:] and 0 <= source < 2 + i for op, source in node)
    log = rows(out)
    assert [row["epoch"] for row in log] == list(range(1, 1 + {"ddp_nas": 35, "mdenas": 6}[name]))
    assert all(len(row["sample"]) == 28 and 0 <= row["accuracy"] <= 1 for row in log)
    assert (out / "cell.md").read_text().count("```mermaid") == 2


def test_same_seed_same_result_and_a_finished_run_is_kept(finished, tmp_path, capsys):
    name, out = finished
    before = (out / "genotype.json").read_bytes()
    assert SCRIPTS[name].main([*TINY, *SHORT[name], "--out", str(out)]) == 2
    assert "finished" in capsys.readouterr().err and (out / "genotype.json").read_bytes() == before
    assert SCRIPTS[name].main([*TINY, *SHORT[name], "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "genotype.json").read_bytes() == before and rows(tmp_path / "again") == rows(out)


def test_a_killed_search_resumes_to_the_same_result(finished, tmp_path):
    name, out = finished
    command = [sys.executable, str(HERE / f"{name}.py"), *TINY, *SHORT[name], "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "2"})
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(rows(tmp_path / "run")) < len(rows(out))
    assert SCRIPTS[name].main([*command[2:], "--resume"]) == 0
    assert rows(tmp_path / "run") == rows(out)
    assert (tmp_path / "run" / "genotype.json").read_bytes() == (out / "genotype.json").read_bytes()


@pytest.mark.parametrize("fault, words", [
    (["--dataset", "imagefolder", "--data-dir", "nowhere"], "nowhere"),
    (["--batch-size", "999"], "999"), (["--batch-size", "0"], "--batch-size"), (["--lr", "nan"], "--lr"),
    (["--seed", "-1"], "--seed"), (["--cells", "2"], "--cells"), (["--image-size", "10"], "--image-size"),
    (["--dataset", "cifar10", "--image-size", "16"], "CIFAR-10")])
def test_bad_input_ends_with_one_line(fault, words, tmp_path, capsys):
    try:
        code = ddp_nas.main([*TINY, *fault, "--out", str(tmp_path / "run")])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_weights_spoilt_by_the_last_step_of_an_epoch_are_not_kept(name, tmp_path, monkeypatch, capsys):
    script, steps = SCRIPTS[name], itertools.count(1)
    step = script.step

    def spoil(network, optimizer, loss, clip):
        step(network, optimizer, loss, clip)
        if next(steps) == 8:  # 384 pictures to train on are 4 batches: the last step of the second epoch
            network.linear.bias.data[0] = float("nan")
    monkeypatch.setattr(script, "step", spoil)
    command = [*TINY, *SHORT[name], "--out", str(tmp_path)]
    assert script.main(command) == 2
    assert "not finite" in capsys.readouterr().err and len(rows(tmp_path)) == 1
    monkeypatch.setattr(script, "step", step)
    assert script.main([*command, "--resume"]) == 0
