"""Linear Thompson sampling: a method of one's own, better than both papers on tables of networks.

    python findings/linear_thompson.py --out runs/linear_thompson
    python retrain.py --genotype runs/linear_thompson/genotype.json --out runs/thompson_net

It believes that the accuracy of a path is a sum: a weight for each operation on each edge, plus a
curve in the number of the epoch, since all paths get better while the shared weights are trained.
After each epoch it fits the sum to all accuracies so far. Many weights fit about equally well; it
draws some of them at random and tries the path that is the best if they are right. So it tries what
is good, and what it knows little about. findings/results.md says what it reaches.

It needs nothing but the scripts, and takes about as long as mdenas.py. The options are those of
that script, with --degree in place of --alpha.
"""
import sys
from pathlib import Path

import numpy as np, torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mdenas

class LinearThompson:
    """degree: of the curve in the number of the epoch; 0 where paths do not get better by waiting.

    E edges with K operations; a sample is E indices of operations.
    """
    def __init__(self, num_edges, num_ops, epochs=100, degree=3, seed=0):
        self.shape, self.total_epochs = [num_edges, num_ops], epochs
        self.degree, self.seed = degree, seed
        self.samples, self.accuracies = [], []

    def weights(self, draw):
        """(E, K): what fits best; or, if draw is true, a random one of those that fit."""
        (E, K), n = self.shape, len(self.samples)
        paths = np.eye(K)[np.array(self.samples, int)].reshape(n, E * K)  # 1 where on the path
        curve = np.vander(np.arange(n) / max(n, 1), self.degree + 1)      # (n, degree + 1)
        X = np.hstack([paths, curve])
        # Before it has seen anything, it expects paths to differ by twice the noise (variance 4),
        # which E weights share; of the curve it expects nothing.
        prior = np.diag(E * K * [E / 4] + (self.degree + 1) * [1e-6])
        covariance = np.linalg.inv(X.T @ X + prior)  # in units of the noise
        w = covariance @ X.T @ np.array(self.accuracies)
        if draw:
            rng = np.random.default_rng([self.seed, n])  # --resume draws the same numbers
            noise = np.std(self.accuracies - X @ w)
            w += noise * np.linalg.cholesky(covariance) @ rng.standard_normal(len(w))
        return w[:E * K].reshape(E, K)

    def sample(self):
        (E, K), n = self.shape, len(self.samples)
        if n < 2 * K:  # too few to know the noise
            return np.random.default_rng([self.seed, n]).integers(K, size=E).tolist()
        return self.weights(draw=True).argmax(1).tolist()

    def record(self, sample, accuracy):
        self.samples.append(sample)
        self.accuracies.append(accuracy)

    def best(self):
        return self.weights(draw=False).argmax(1).tolist()

    @property
    def scores(self):  # (E, K)
        return torch.from_numpy(self.weights(draw=False))

    @property
    def probabilities(self):  # (E, K), to be printed only
        return (self.scores / self.scores.std().clamp(min=1e-9)).softmax(1)

    def state_dict(self):
        return vars(self)

    def load_state_dict(self, state):
        vars(self).update(state)

if __name__ == "__main__":
    options = {"epochs": (100, "number of search epochs"),
               "degree": (3, "of the curve by which the accuracy rises with the epochs")}
    sys.exit(mdenas.main(distribution_class=LinearThompson, options=options,
                         method="linear_thompson"))
