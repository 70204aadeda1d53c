"""Do the cells that `python ddp_nas.py` finds beat random ones on its synthetic images?

    python findings/quick_start.py             # 20 cells of each kind: some 70 minutes of one core
    python findings/quick_start.py --jobs 2    # two runs at a time, one thread each
    python findings/quick_start.py --genotypes 2 --out runs/quick_trial    # a try, in minutes

It searches with the seeds 0 to 19 and trains the 20 cells that it finds, and the cells random:0 to
random:19, with the training seeds 0 and 1, all at the defaults of the two scripts. It needs what
they need, and no data. A run that is done is skipped, and one that was interrupted goes on, so the
same command continues after Ctrl-C. To begin again, for instance with other code, remove --out.

A training seed decides the images, the initial weights and the order of the batches. So with one
training seed all 40 networks are trained on the same 768 images and tested on the same 1,000; the
table says what the images of the two seeds make out. No search has seen a test image: training
images come from odd seeds, test images from even ones.
"""
import argparse, json, os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1)  # of the trainings

def run(command, folder):
    """Run a script, with the options in command, to its end in a folder, unless it is done."""
    output = folder / "output.txt"  # there is one once the run has ended well
    if output.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "output.part"
    command = [sys.executable, *command, "--out", str(folder), "--resume"]
    with part.open("w") as file:
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                       stdout=file, stderr=subprocess.STDOUT, check=True)
    part.rename(output)
    print(f"{folder.name}: {output.read_text().splitlines()[-1]}", flush=True)

def run_all(runs, jobs):
    """Run pairs (command, folder), as many as jobs at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, *zip(*runs)))

def test_error(folder):
    """Of the last epoch, in percent."""
    last = (folder / "log.jsonl").read_text().splitlines()[-1]
    return 100 * json.loads(last)["top1_error"]

def standard_error(values):
    return stdev(values) / len(values) ** 0.5

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genotypes", type=int, default=20, help="of each kind, 2 or more")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quick_start")
    args = parser.parse_args()
    out, numbers = args.out.resolve(), range(args.genotypes)

    run_all([(["ddp_nas.py", "--seed", str(i)], out / f"search_{i}") for i in numbers], args.jobs)
    genotypes = {"found": [str(out / f"search_{i}" / "genotype.json") for i in numbers],
                 "random": [f"random:{i}" for i in numbers]}
    runs = []
    for i in numbers:  # the two kinds in turn: an interrupted study has as many of both
        for kind, names in genotypes.items():
            for seed in SEEDS:
                # The data set is that of the search, too; named, so that it is the same for both.
                command = ["retrain.py", "--genotype", names[i], "--dataset", "synthetic",
                           "--seed", str(seed)]
                runs.append((command, out / f"{kind}_{i}_seed_{seed}"))
    run_all(runs, args.jobs)

    errors = {kind: [[test_error(out / f"{kind}_{i}_seed_{seed}") for seed in SEEDS]
                     for i in numbers] for kind in genotypes}  # [genotype][seed]
    print("\ntest error in percent, with the training seeds 0 and 1\n"
          "| genotype | found | random |\n|--:|--:|--:|")
    for i in numbers:
        cells = [" and ".join(f"{error:.1f}" for error in errors[kind][i]) for kind in genotypes]
        print(f"| {i} | {cells[0]} | {cells[1]} |")

    print("\n± is a standard error over genotypes\n"
          "| | genotypes | seed 0 | seed 1 | mean of both | from, to | spread of a seed |\n"
          "|---|--:|--:|--:|--:|--:|--:|")
    means = {}
    for kind, rows in errors.items():
        means[kind] = [mean(row) for row in rows]
        # Half of the mean squared difference of two trainings is the variance of one. What the two
        # seeds differ by on average is left out: their test images are not equally hard.
        differences = [row[0] - row[1] for row in rows]
        spread = stdev(differences) / 2 ** 0.5
        by_seed = [f"{mean(column):.2f} ± {standard_error(column):.2f}" for column in zip(*rows)]
        print(f"| {kind} | {len(rows)} | {by_seed[0]} | {by_seed[1]} | {mean(means[kind]):.2f} ± "
              f"{standard_error(means[kind]):.2f} | {min(means[kind]):.1f}, {max(means[kind]):.1f} "
              f"| {spread:.1f} |")
    difference = mean(means["found"]) - mean(means["random"])
    error = (standard_error(means["found"]) ** 2 + standard_error(means["random"]) ** 2) ** 0.5
    print(f"\nfound minus random: {difference:.2f} ± {error:.2f} points")

if __name__ == "__main__":
    main()
