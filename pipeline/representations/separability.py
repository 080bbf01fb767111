"""Measure the separability of languages: clustering by language, and a linear probe that predicts the language.

Shape letters: N points (each is a question in one language), d size of a representation.

Requires scikit-learn (extra `evaluation`).
"""

import warnings

import numpy as np

from pipeline.common.optional_imports import import_optional
from pipeline.representations.similarity import unit_rows

FOLDS = 5


def separability(points: np.ndarray, languages: np.ndarray, groups: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Compute how well the points of different languages are separated.

    Silhouette, Davies-Bouldin and k-means are computed on rows of unit length, so only directions matter.

    Args:
        points: [N, d] representations.
        languages: [N] language of each point.
        groups: [N] example group of each point.
        seed: random seed of k-means.

    Returns:
        `silhouette`: cosine silhouette by language (Rousseeuw 1987), -1 to 1. `davies_bouldin`: index by language
        (Davies and Bouldin 1979), 0 if separated, large if mixed. `kmeans_nmi`: normalized mutual information of the
        languages and as many k-means clusters, 0 to 1. `probe` and `probe_chance`: accuracy of a linear probe, see
        `probe_accuracy`, and of always predicting the most frequent language.

    Raises:
        UserError: scikit-learn is not installed.
    """
    metrics, cluster = import_optional("sklearn.metrics"), import_optional("sklearn.cluster")
    names, labels = np.unique(languages, return_inverse=True)
    rows = unit_rows(points.astype(np.float64))
    with warnings.catch_warnings():  # there may be fewer distinct points than clusters
        warnings.simplefilter("ignore", import_optional("sklearn.exceptions").ConvergenceWarning)
        clusters = cluster.KMeans(len(names), n_init=10, random_state=seed).fit_predict(rows)
    return {
        "silhouette": float(metrics.silhouette_score(rows, labels, metric="cosine")),
        "davies_bouldin": float(metrics.davies_bouldin_score(rows, labels)),
        "kmeans_nmi": float(metrics.normalized_mutual_info_score(labels, clusters)),
        "probe": probe_accuracy(points, labels, groups),
        "probe_chance": float(np.bincount(labels).max() / len(labels)),
    }


def probe_accuracy(points: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """Cross-validate logistic regression on standardized features.

    All translations of a question are in the same fold, so the probe is only tested on questions that it was not
    trained on in any language.

    Args:
        points: [N, d] features.
        labels: [N] language of each point.
        groups: [N] example group of each point.

    Returns:
        The mean accuracy over folds.
    """
    selection, pipeline = import_optional("sklearn.model_selection"), import_optional("sklearn.pipeline")
    logistic = import_optional("sklearn.linear_model").LogisticRegression(max_iter=1000)
    probe = pipeline.make_pipeline(import_optional("sklearn.preprocessing").StandardScaler(), logistic)
    folds = selection.GroupKFold(min(FOLDS, len(np.unique(groups))))
    scores = selection.cross_val_score(probe, points.astype(np.float64), labels, groups=groups, cv=folds)
    return float(scores.mean())


def principal_components(points: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Project [N, d] points onto their first two principal components.

    Returns:
        The [N, 2] coordinates, and the fraction of the variance that each component explains.
    """
    pca = import_optional("sklearn.decomposition").PCA(
        2, svd_solver="full" if min(points.shape) < 500 else "randomized"
    )
    pca.set_params(random_state=0)
    coordinates = pca.fit_transform(points.astype(np.float64))
    return coordinates, [float(fraction) for fraction in pca.explained_variance_ratio_]
