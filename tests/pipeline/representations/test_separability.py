"""Separability metrics: against their definitions written out, and on planted clusters."""

import sys

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.representations.separability import principal_components, probe_accuracy, separability
from pipeline.representations.similarity import unit_rows


def planted(apart, groups=30, languages=3, size=8, seed=0):
    """Return points of all questions in all languages, each language shifted by `apart` along its own axis."""
    rng = np.random.default_rng(seed)
    content = rng.normal(size=(groups, size))
    shifts = apart * np.eye(size)[:languages]
    points = np.concatenate([content + 0.3 * rng.normal(size=content.shape) + shift for shift in shifts])
    names = np.repeat([f"l{i}" for i in range(languages)], groups)
    return points, names, np.tile(np.arange(groups), languages)


def silhouette_by_hand(points, labels):
    """Rousseeuw 1987, with cosine distances: mean of (b - a) / max(a, b)."""
    rows = unit_rows(points)
    distances = 1 - rows @ rows.T
    scores = []
    for i, label in enumerate(labels):
        own = (labels == label) & (np.arange(len(labels)) != i)
        a = distances[i, own].mean()
        b = min(distances[i, labels == other].mean() for other in set(labels) - {label})
        scores.append((b - a) / max(a, b))
    return np.mean(scores)


def davies_bouldin_by_hand(points, labels):
    """Davies and Bouldin 1979 on unit rows: mean over clusters of the worst (s_i + s_j) / d_ij."""
    rows, names = unit_rows(points), sorted(set(labels))
    centers = [rows[labels == name].mean(0) for name in names]
    spread = [
        np.linalg.norm(rows[labels == name] - center, axis=1).mean()
        for name, center in zip(names, centers, strict=True)
    ]
    worst = [
        max((spread[i] + spread[j]) / np.linalg.norm(centers[i] - centers[j]) for j in range(len(names)) if j != i)
        for i in range(len(names))
    ]
    return np.mean(worst)


def test_separability_equals_definitions():
    points, names, groups = planted(apart=1.5)
    metrics = separability(points, names, groups)
    assert metrics["silhouette"] == pytest.approx(silhouette_by_hand(points, names), rel=1e-10)
    assert metrics["davies_bouldin"] == pytest.approx(davies_bouldin_by_hand(points, names), rel=1e-10)
    assert metrics["probe_chance"] == pytest.approx(1 / 3)


def test_separability_of_clustered_languages():
    metrics = separability(*planted(apart=50.0))
    assert metrics["silhouette"] > 0.8 and metrics["davies_bouldin"] < 0.3
    assert metrics["kmeans_nmi"] == pytest.approx(1) and metrics["probe"] == 1


def test_separability_of_aligned_languages():
    metrics = separability(*planted(apart=0.0, groups=60))
    assert metrics["silhouette"] < 0.05 and metrics["davies_bouldin"] > 3
    assert metrics["kmeans_nmi"] < 0.1
    assert abs(metrics["probe"] - metrics["probe_chance"]) < 0.12


def test_probe_accuracy_folds_keep_groups_together():
    """Each question occurs twice with the same random language: only its copy in a training fold could reveal it."""
    rng = np.random.default_rng(5)
    points = np.tile(rng.normal(size=(40, 200)), (2, 1))
    labels = np.tile(np.arange(40) % 2, 2)
    grouped = probe_accuracy(points, labels, np.tile(np.arange(40), 2))
    leaking = probe_accuracy(points, labels, rng.permutation(80))
    assert leaking > 0.75 and grouped < 0.65


def test_principal_components_of_planar_data():
    rng = np.random.default_rng(1)
    plane = rng.normal(size=(50, 2)) * [5, 2]
    basis = np.linalg.qr(rng.normal(size=(10, 10)))[0][:2]
    coordinates, variance = principal_components(plane @ basis + 3)
    assert sum(variance) == pytest.approx(1)
    centered = plane - plane.mean(0)
    assert coordinates @ coordinates.T == pytest.approx(centered @ centered.T, abs=1e-8)


def test_separability_without_scikit_learn_names_the_package(monkeypatch):
    """With None in sys.modules, Python treats a module as not installed."""
    for name in ("sklearn", "sklearn.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"scikit-learn is not installed; .*`pip install scikit-learn`"):
        separability(*planted(apart=1.0))
