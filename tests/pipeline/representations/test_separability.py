"""Separability figures: against definitions written out, and on planted clusters whose answer is known."""

import sys

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.representations.separability import principal_components, probe_accuracy, separability
from pipeline.representations.similarity import unit_rows


def planted(apart, problems=30, languages=3, size=8, seed=0):
    """Points of all problems in all languages; a language's points are shifted by `apart` along its own axis."""
    rng = np.random.default_rng(seed)
    content = rng.normal(size=(problems, size))
    shifts = apart * np.eye(size)[:languages]
    points = np.concatenate([content + 0.3 * rng.normal(size=content.shape) + shift for shift in shifts])
    names = np.repeat([f"l{i}" for i in range(languages)], problems)
    return points, names, np.tile(np.arange(problems), languages)


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
    centres = [rows[labels == name].mean(0) for name in names]
    spread = [
        np.linalg.norm(rows[labels == name] - centre, axis=1).mean()
        for name, centre in zip(names, centres, strict=True)
    ]
    worst = [
        max((spread[i] + spread[j]) / np.linalg.norm(centres[i] - centres[j]) for j in range(len(names)) if j != i)
        for i in range(len(names))
    ]
    return np.mean(worst)


def test_silhouette_and_davies_bouldin_equal_their_definitions():
    points, names, problems = planted(apart=1.5)
    found = separability(points, names, problems)
    assert found["silhouette"] == pytest.approx(silhouette_by_hand(points, names), rel=1e-10)
    assert found["davies_bouldin"] == pytest.approx(davies_bouldin_by_hand(points, names), rel=1e-10)
    assert found["probe_chance"] == pytest.approx(1 / 3)


def test_clustered_languages_are_told_apart():
    found = separability(*planted(apart=50.0))
    assert found["silhouette"] > 0.8 and found["davies_bouldin"] < 0.3
    assert found["kmeans_nmi"] == pytest.approx(1) and found["probe"] == 1


def test_aligned_languages_are_not_told_apart():
    found = separability(*planted(apart=0.0, problems=60))
    assert found["silhouette"] < 0.05 and found["davies_bouldin"] > 3
    assert found["kmeans_nmi"] < 0.1
    assert abs(found["probe"] - found["probe_chance"]) < 0.12


def test_a_probe_does_not_profit_from_having_seen_the_problem():
    """Each problem is there twice, its language a coin toss: only its twin in a training fold could tell."""
    rng = np.random.default_rng(5)
    points = np.tile(rng.normal(size=(40, 200)), (2, 1))
    labels = np.tile(np.arange(40) % 2, 2)
    grouped = probe_accuracy(points, labels, np.tile(np.arange(40), 2))
    leaking = probe_accuracy(points, labels, rng.permutation(80))
    assert leaking > 0.75 and grouped < 0.65


def test_principal_components_find_the_plane_of_the_data():
    rng = np.random.default_rng(1)
    plane = rng.normal(size=(50, 2)) * [5, 2]
    basis = np.linalg.qr(rng.normal(size=(10, 10)))[0][:2]
    coordinates, shares = principal_components(plane @ basis + 3)
    assert sum(shares) == pytest.approx(1)
    centred = plane - plane.mean(0)
    assert coordinates @ coordinates.T == pytest.approx(centred @ centred.T, abs=1e-8)


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    """A `None` in sys.modules is how Python itself is told that a module is not there."""
    for name in ("sklearn", "sklearn.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"scikit-learn is not installed; .*`evaluation`: pip install scikit-learn"):
        separability(*planted(apart=1.0))
