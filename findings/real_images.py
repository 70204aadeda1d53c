"""Do the cells that the two searches find beat random ones on real images? A small study.

    python findings/real_images.py                    # CIFAR-10, downloaded: some 7 hours of a core
    python findings/real_images.py --jobs 2           # two runs at a time, one thread each
    python findings/real_images.py --data-dir DIR     # DIR/train/<class>/* and DIR/val/<class>/*
    python findings/real_images.py --ddp 2 --mde 2 --random 6 --passes 1 --per-class 30 30 30 \\
        --out runs/real_trial                         # a try, in minutes

Twelve searches of DDP-NAS and three of MdeNAS (105 epochs each) on 10,000 images; then what they
found and 30 random cells are trained twice each on 20,000 images and tested on 5,000. To fit a CPU,
images have 16 pixels and networks 8 channels; there are 5 epochs of training, without cutout and
drop-path, which are made for hundreds.

A run that is done is skipped, and one that was interrupted goes on, so the same command continues
after Ctrl-C. To begin again, for instance with other code, remove --out.
"""
import argparse, json, shutil
from math import comb, log
from pathlib import Path
from statistics import mean, stdev

import numpy as np, torchvision
from quick_start import ROOT, run_all, standard_error

SEEDS = (0, 1)  # of the trainings
EPOCHS = 5
SIZE = ["--dataset", "imagefolder", "--image-size", "16", "--channels", "8", "--batch-size", "64",
        "--lr", "0.1", "--workers", "1"]
# retrain.py has no options for these two.
RETRAIN = """
import sys, retrain
retrain.DEFAULTS["imagefolder"].update(drop_path=0.0, cutout=0.0)
sys.exit(retrain.main())
"""

# ==== images ======================================================================================
def write_cifar10(folder):
    """CIFAR-10 as PNG files below folder/train and folder/val."""
    for split in ("train", "val"):
        images = torchvision.datasets.CIFAR10(ROOT / "data", split == "train", download=True)
        for i, (image, label) in enumerate(images):
            path = folder / split / images.classes[label] / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)

def copy_images(source, target, per_class):
    """The first images of each class, in the order of their names."""
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        (target / folder.name).mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir())[:per_class]:
            shutil.copy(path, target / folder.name)

def prepare(args, out):
    """Folders for the searches and for the trainings."""
    done = out / "images_are_there"
    if done.exists():
        return
    source = args.data_dir
    if source is None:
        source = out / "cifar10"
        write_cifar10(source)
    for_search, for_training, for_test = args.per_class
    copy_images(source / "train", out / "search_images" / "train", for_search)
    copy_images(source / "train", out / "images" / "train", for_training)
    copy_images(source / "val", out / "images" / "val", for_test)
    done.touch()

# ==== what the runs say ===========================================================================
def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

def read_errors(folder):
    """After each epoch, in percent."""
    return [100 * row["top1_error"] for row in read_log(folder)]

def read_parameters(folder):
    """Their number, which stands at the end of what retrain.py prints."""
    return int((folder / "output.txt").read_text().split()[-2].replace(",", ""))

def difference(ours, random):
    """Of two means, with its standard error; the spread is that within both kinds together."""
    m, n = len(ours), len(random)
    variance = ((m - 1) * stdev(ours) ** 2 + (n - 1) * stdev(random) ** 2) / (m + n - 2)
    return f"{mean(ours) - mean(random):.2f} ± {(variance / m + variance / n) ** 0.5:.2f}"

def at_equal_size(ours, random):
    """The difference beside a linear effect of the logarithm of the parameters (least squares).

    ours, random: pairs (parameters, error).
    """
    pairs = ours + random
    X = np.array([[1, i < len(ours), log(parameters)] for i, (parameters, _) in enumerate(pairs)])
    y = np.array([error for _, error in pairs])
    coefficients, (squares,), _, _ = np.linalg.lstsq(X, y, rcond=None)
    covariance = np.linalg.inv(X.T @ X) * squares / (len(y) - 3)
    return f"{coefficients[1]:.2f} ± {covariance[1, 1] ** 0.5:.2f}"

def kendall_tau(a, b):
    pairs = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
    return pairs.sum() / (len(a) * (len(a) - 1))

def best_of(count, chosen_by, judged_by):
    """Mean error, by one seed, of the best by the other seed among count networks."""
    judged, n = judged_by[chosen_by.argsort()], len(judged_by)
    chances = [comb(n - 1 - i, count - 1) / comb(n, count) for i in range(n)]
    return np.dot(chances, judged)

def bootstrap(function, rows, draws=2000):
    """function(rows), and its standard error over the rows."""
    rng = np.random.default_rng(0)
    values = [function(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(draws)]
    return f"{function(rows):.2f} ± {np.std(values):.2f}"

def both_ways(function):
    """function(one seed, the other) -> a function of rows (genotypes, seeds, ...), the
    mean over both orders of the seeds."""
    return lambda rows: (function(rows[:, 0], rows[:, 1]) + function(rows[:, 1], rows[:, 0])) / 2

def report(errors, parameters, seconds):
    """errors: kind -> (genotypes, seeds, epochs) in percent; parameters: kind -> (genotypes,)."""
    final = {kind: rows[:, :, -1] for kind, rows in errors.items()}
    means = {kind: rows.mean(1).tolist() for kind, rows in final.items()}
    print("\n| | genotypes | test error, mean of both seeds | difference from random | with seed 0 "
          "alone | at equal parameters |\n|---|--:|--:|--:|--:|--:|")
    for kind, values in means.items():
        row = [kind, f"{len(values)}", f"{mean(values):.2f} ± {standard_error(values):.2f} %"]
        if kind != "random":
            sized = [list(zip(parameters[k], means[k])) for k in (kind, "random")]
            row += [difference(values, means["random"]),
                    difference(*(final[k][:, 0].tolist() for k in (kind, "random"))),
                    at_equal_size(*sized)]
        print(f"| {' | '.join(row)} |")

    rows = errors["random"]
    # Half of the mean squared difference of two trainings is the variance of one.
    of_a_seed = np.mean((rows[:, 0, -1] - rows[:, 1, -1]) ** 2 / 2) ** 0.5
    print(f"\nrandom genotypes differ by a standard deviation of {stdev(rows[:, 0, -1]):.2f} "
          f"points (seed 0), the seeds of one by {of_a_seed:.2f}")
    searching, training = mean(seconds["search"]), mean(seconds["training"])
    count = min(max(1, round(searching / training)), len(rows))
    best = both_ways(lambda one, other: best_of(count, one[:, -1], other[:, -1]))
    print(f"a search takes {searching:.0f} s, a training {training:.0f} s; best of {count} random "
          f"genotypes by one seed, judged by the other: {bootstrap(best, rows)} %")
    for epoch in range(rows.shape[2]):
        tau = both_ways(lambda one, other: kendall_tau(one[:, epoch], other[:, -1]))
        print(f"Kendall's tau of the random genotypes, ranked after epoch {epoch + 1} by one seed "
              f"and in the end by the other: {bootstrap(tau, rows)}")

def report_order(logs):
    """Does the accuracy rise within a pass, and does that decide what DDP-NAS prunes?"""
    slopes, positions = [], []
    for rows in logs:
        first = [row for row in rows if row["alive"] == rows[0]["alive"]]
        second = [row["sample"] for row in rows if row["alive"] == rows[0]["alive"] - 1]
        K = first[0]["alive"]
        accuracies = np.array([row["accuracy"] for row in first]).reshape(-1, K)  # (T, K)
        slopes.append(mean(100 * np.polyfit(range(K), passed, 1)[0] for passed in accuracies))
        samples = np.array([row["sample"] for row in first]).reshape(-1, K, len(second[0]))
        left = np.array(second[:K - 1])                                  # (K - 1, E), one pass
        pruned = K * (K - 1) // 2 - left.sum(0)      # (E,), what is missing among 0, 1, ..., K - 1
        positions.append((samples == pruned).argmax(1).mean())           # of (T, E)
    for what, values in (("accuracy rises within a pass, points an epoch", slopes),
                         ("position in the pass of what is pruned after it", positions)):
        error = f" ± {standard_error(values):.2f}" if len(values) > 1 else ""
        print(f"first round of DDP-NAS: {what}: {mean(values):.2f}{error}")

# ==== main ========================================================================================
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="with train/<class>/* and val/<class>/* (default: CIFAR-10)")
    add("--ddp", type=int, default=12, help="searches of DDP-NAS (12), 2 or more")
    add("--mde", type=int, default=3, help="searches of MdeNAS (3), 2 or more")
    add("--random", type=int, default=30, help="random cells (30), 3 or more")
    add("--passes", type=int, default=3, help="DDP-NAS's T (3); MdeNAS has as many epochs")
    add("--per-class", type=int, nargs=3, default=(1000, 2000, 500),
        metavar=("SEARCH", "TRAIN", "VAL"), help="images of each class (1000 2000 500)")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--out", type=Path, default=ROOT / "runs" / "real_images")
    args = parser.parse_args()
    out = args.out.resolve()
    prepare(args, out)

    searches = [("ddp_nas", seed, ["--passes", str(args.passes)]) for seed in range(args.ddp)]
    searches += [("mdenas", seed, ["--epochs", str(35 * args.passes)]) for seed in range(args.mde)]
    run_all([([f"{method}.py", *SIZE, "--cells", "3", "--data-dir", str(out / "search_images"),
               "--seed", str(seed), *options], out / f"{method}_{seed}")
             for method, seed, options in searches], args.jobs)

    genotypes = {"DDP-NAS": [str(out / f"ddp_nas_{i}" / "genotype.json") for i in range(args.ddp)],
                 "MdeNAS": [str(out / f"mdenas_{i}" / "genotype.json") for i in range(args.mde)],
                 "random": [f"random:{i}" for i in range(args.random)]}
    folders = {(kind, i, seed): out / f"train_{kind}_{i}_seed_{seed}"
               for kind, names in genotypes.items() for i in range(len(names)) for seed in SEEDS}
    run_all([(["-c", RETRAIN, *SIZE, "--cells", "5", "--epochs", str(EPOCHS),
               "--data-dir", str(out / "images"), "--genotype", genotypes[kind][i],
               "--seed", str(seed)], folder)
             for (kind, i, seed), folder in folders.items()], args.jobs)

    errors, parameters = {}, {}
    for kind, names in genotypes.items():
        errors[kind] = np.array([[read_errors(folders[kind, i, seed]) for seed in SEEDS]
                                 for i in range(len(names))])
        parameters[kind] = [read_parameters(folders[kind, i, 0]) for i in range(len(names))]
    seconds = {"search": [sum(row["seconds"] for row in read_log(out / f"{method}_{seed}"))
                          for method, seed, _ in searches],
               "training": [sum(row["seconds"] for row in read_log(folder))
                            for folder in folders.values()]}
    report(errors, parameters, seconds)
    report_order([read_log(out / f"ddp_nas_{i}") for i in range(args.ddp)])

if __name__ == "__main__":
    main()
