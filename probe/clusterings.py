"""Do the clusters of an embedding agree with the classes, or with slides and scanners?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def k_means(embeddings: NDArray[np.float32], n_clusters: int, *, seed: int) -> NDArray[np.intp]:
    """Cluster (n, d) embeddings by k-means, the best of five starts (scikit-learn): (n,) the number of the cluster."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    means = KMeans(n_clusters, n_init=5, random_state=seed)
    with threadpool_limits(1):  # its steps are short: on a busy machine threads would mostly wait for each other
        return np.asarray(means.fit_predict(embeddings), np.intp)


def agreement(table: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
    """Compute how far two groupings agree, of tables (b, r, c) of counts: adjusted Rand index and mutual information.

    `ari` is that of Hubert and Arabie, Journal of Classification 2, 1985: 0 by chance, 1 for the same groups. `nmi` is
    the mutual information over the mean of the two entropies: 0 for independent groupings, 1 for the same. They equal
    scikit-learn's; each is (b,), NaN where both groupings are a single group.
    """
    n = table.sum(axis=(1, 2))
    rows, columns = table.sum(axis=2), table.sum(axis=1)

    def pairs(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = counts.reshape(len(counts), -1)
        return np.asarray((flat * (flat - 1)).sum(axis=1) / 2)

    def entropy(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        share = counts.reshape(len(counts), -1) / n[:, None]
        return np.asarray(-(share * np.log(np.where(share > 0, share, 1))).sum(axis=1))

    with np.errstate(divide="ignore", invalid="ignore"):
        together, in_rows, in_columns = pairs(table), pairs(rows), pairs(columns)
        expected = in_rows * in_columns / (n * (n - 1) / 2)
        of_rows, of_columns = entropy(rows), entropy(columns)
        shared = np.maximum(of_rows + of_columns - entropy(table), 0)  # rounding may take it below
        return {
            "ari": (together - expected) / ((in_rows + in_columns) / 2 - expected),
            "nmi": shared / ((of_rows + of_columns) / 2),
        }
