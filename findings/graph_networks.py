"""DDP-NAS against random search on the 72 tables of NAS-Bench-Graph.

    pip install nas-bench-graph    # the tables are in the package, as pickles
    python findings/graph_networks.py

The package lists validation and test accuracies of graph networks: four layers, each one of nine
operations, wired in one of nine ways, on eight data sets (a ninth has fewer operations and is left
out). Each wiring of each data set is a table for a search. It takes some 10 minutes of one core.
"""
import sys
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from nas_bench_graph import Arch, light_read
from nas_bench_graph.architecture import gnn_list, link_list
from tables import RandomSearch, Table, ddp_nas, mean_and_error, measure

DATA_SETS = ("cora", "citeseer", "pubmed", "cs", "physics", "photo", "computers", "arxiv")
SEEDS, PASSES = 1000, 3

def open_table(bench, link):
    """Accuracies in percent (9, 9, 9, 9), the validation's and the test's."""
    values = np.full((2, 9, 9, 9, 9), np.nan)
    for sample in product(range(9), repeat=4):
        key = Arch(link[:], [gnn_list[op] for op in sample]).valid_hash()
        if key in bench:  # the network of four skips is not
            values[:, *sample] = 100 * bench[key]["valid_perf"], 100 * bench[key]["perf"]
    worst = np.nanmin(values, axis=(1, 2, 3, 4), keepdims=True)
    return np.where(np.isnan(values), worst, values)

def compare(table):
    """-> n, and the standard errors by which DDP-NAS's answers are ahead of random search."""
    evaluations = table.num_evaluations(PASSES)
    random = RandomSearch(table, noise=True)
    judged = measure(table, ddp_nas, evaluations, SEEDS, noise=True)
    ours, error = mean_and_error(judged[:, 0, 0])
    expected = np.interp(evaluations, random.n, random.found)
    return random.worth(ours), (ours - expected) / max(error, 1e-9)

def main():
    found = {"validation": [], "test": []}  # by what is judged; the search sees the validation
    for name in DATA_SETS:
        bench = light_read(name)
        for link in link_list:
            validation, test = open_table(bench, link)
            table = Table(f"{name} {link}", validation[..., None])
            for judge, table.mean in (("validation", validation), ("test", test)):
                n, ahead = compare(table)
                found[judge].append((n, ahead))
                print(f"{table.name}, {judge}: n {n:.0f}, {ahead:+.1f} se", flush=True)
    print(f"\nT = {PASSES}, {SEEDS} seeds: tables where DDP-NAS is behind random search or ahead "
          "of it by two standard errors\n\n"
          "| judged by | behind | ahead | neither | median of n |\n|---|--:|--:|--:|--:|")
    for judge, rows in found.items():
        behind, ahead = sum(z < -2 for _, z in rows), sum(z > 2 for _, z in rows)
        print(f"| {judge} | {behind} | {ahead} | {len(rows) - behind - ahead} | "
              f"{median(n for n, _ in rows):.0f} |")

if __name__ == "__main__":
    main()
