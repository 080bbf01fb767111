"""How far languages lie apart: clusters by language, and whether a linear probe can tell languages.

Shape letters: N points (a problem in a language each), d their size. Needs scikit-learn, of the extra `evaluation`.
"""

import warnings

import numpy as np

from pipeline.common.optional_imports import import_optional
from pipeline.representations.similarity import unit_rows

FOLDS = 5


def separability(points: np.ndarray, languages: np.ndarray, problems: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Figures of [N, d] points with [N] languages and [N] problems.

    `silhouette`: cosine silhouette by language, -1 to 1. `davies_bouldin`: 0 is apart, large is mixed. `kmeans_nmi`:
    normalised mutual information of k-means clusters (k the number of languages) with languages, 0 to 1. `probe` and
    `probe_chance`: accuracy of a linear probe, see `probe_accuracy`, and of the most frequent language. Silhouette,
    Davies-Bouldin and k-means see unit rows, that is directions, as the cosine does.

    Raises UserError where scikit-learn is missing.
    """
    metrics, cluster = import_optional("sklearn.metrics"), import_optional("sklearn.cluster")
    names, labels = np.unique(languages, return_inverse=True)
    rows = unit_rows(points.astype(np.float64))
    with warnings.catch_warnings():  # fewer distinct points than clusters: representations may coincide
        warnings.simplefilter("ignore", import_optional("sklearn.exceptions").ConvergenceWarning)
        clusters = cluster.KMeans(len(names), n_init=10, random_state=seed).fit_predict(rows)
    return {
        "silhouette": float(metrics.silhouette_score(rows, labels, metric="cosine")),
        "davies_bouldin": float(metrics.davies_bouldin_score(rows, labels)),
        "kmeans_nmi": float(metrics.normalized_mutual_info_score(labels, clusters)),
        "probe": probe_accuracy(points, labels, problems),
        "probe_chance": float(np.bincount(labels).max() / len(labels)),
    }


def probe_accuracy(points: np.ndarray, labels: np.ndarray, problems: np.ndarray) -> float:
    """Cross-validated accuracy of logistic regression on standardised features [N, d].

    Folds are grouped by problem: a probe must tell the language of problems it has seen in no language.
    """
    selection, pipeline = import_optional("sklearn.model_selection"), import_optional("sklearn.pipeline")
    logistic = import_optional("sklearn.linear_model").LogisticRegression(max_iter=1000)
    probe = pipeline.make_pipeline(import_optional("sklearn.preprocessing").StandardScaler(), logistic)
    folds = selection.GroupKFold(min(FOLDS, len(np.unique(problems))))
    scores = selection.cross_val_score(probe, points.astype(np.float64), labels, groups=problems, cv=folds)
    return float(scores.mean())


def principal_components(points: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """[N, 2] coordinates on the first two principal components, and their shares of the variance."""
    pca = import_optional("sklearn.decomposition").PCA(
        2, svd_solver="full" if min(points.shape) < 500 else "randomized"
    )
    pca.set_params(random_state=0)
    coordinates = pca.fit_transform(points.astype(np.float64))
    return coordinates, [float(share) for share in pca.explained_variance_ratio_]
