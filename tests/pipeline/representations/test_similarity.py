"""Similarity metrics: values against explicit computations, floors against all permutations, and planted data."""

import math
from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from pipeline.representations.similarity import (
    Metric,
    cosine_matrix,
    debiased_cka,
    linear_cka,
    retrieval,
    similarity_metrics,
    standardize,
    unit_rows,
    xsim_error,
)


def gaussian(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns))


def rotation(size, seed=1):
    return np.linalg.qr(gaussian(size, size, seed))[0]


def cka_by_hand(x, y):
    """Compute tr(KHLH) / sqrt(tr(KHKH) tr(LHLH)) with an explicit centering matrix."""
    centering = np.eye(len(x)) - np.ones((len(x), len(x))) / len(x)
    k, el = (centering @ (z @ z.T) @ centering for z in (x, y))
    return np.trace(k @ el) / np.sqrt(np.trace(k @ k) * np.trace(el @ el))


def hsic_by_hand(k, el):
    """The unbiased estimate of HSIC as a sum over all quadruples of different examples (Song et al. 2012)."""
    total = 0.0
    for i, j, q, r in permutations(range(len(k)), 4):
        total += k[i, j] * el[i, j] + k[i, j] * el[q, r] - 2 * k[i, j] * el[i, q]
    return total / math.perm(len(k), 4)


def debiased_cka_by_hand(x, y):
    k, el = x @ x.T, y @ y.T
    return hsic_by_hand(k, el) / math.sqrt(hsic_by_hand(k, k) * hsic_by_hand(el, el))


def xsim_by_hand(x, y, k):
    """Compute the error rate from x to y, every margin in a loop, over x's k nearest candidates."""
    cosines, wrong = cosine_similarity(x, y), 0
    for i in range(len(x)):
        nearest = sorted(range(len(y)), key=lambda j: -cosines[i, j])[:k]
        margins = {}
        for j in nearest:
            back = sorted(cosines[:, j])[-k:]
            margins[j] = cosines[i, j] / (sum(cosines[i, n] for n in nearest) / (2 * k) + sum(back) / (2 * k))
        wrong += max(margins, key=margins.__getitem__) != i
    return wrong / len(x)


def test_similarity_metrics_equal_explicit_computations():
    x = gaussian(30, 12, 2) + 1.5
    y = x + 1.5 * gaussian(30, 12, 3) - 0.7
    metrics = similarity_metrics(x, y)
    cosines = cosine_similarity(x, y)
    assert metrics["cosine"].value == pytest.approx(np.diagonal(cosines).mean(), rel=1e-12)
    centred = cosine_similarity(x - x.mean(0), y - y.mean(0))
    assert metrics["centred_cosine"].value == pytest.approx(np.diagonal(centred).mean(), rel=1e-12)
    assert metrics["cka"].value == pytest.approx(cka_by_hand(x, y), rel=1e-12)
    hits = [int(cosines[i].argmax() == i) + int(cosines[:, i].argmax() == i) for i in range(30)]
    assert metrics["retrieval"].value == pytest.approx(sum(hits) / 60)
    assert metrics["xsim_error"].value == pytest.approx((xsim_by_hand(x, y, 4) + xsim_by_hand(y, x, 4)) / 2)
    assert 0 < metrics["retrieval"].value < 1 and 0 < metrics["xsim_error"].value < 1


def test_debiased_cka_equals_sum_over_quadruples():
    x = gaussian(8, 4, 2) + 1
    y = x[:, :3] + 0.7 * gaussian(8, 3, 3) - 2
    metric = debiased_cka(x, y)
    assert metric.value == pytest.approx(debiased_cka_by_hand(x, y), rel=1e-9)
    without = [debiased_cka_by_hand(np.delete(x, i, 0), np.delete(y, i, 0)) for i in range(8)]
    # The per-example values are those of the jackknife, with a smaller spread.
    influences = metric.examples - metric.value
    jackknife = np.mean(without) - np.array(without)
    assert np.corrcoef(influences, jackknife)[0, 1] == pytest.approx(1)
    assert 0 < influences.std() <= 7 * jackknife.std() * (1 + 1e-9)


def test_debiased_cka_of_wide_unrelated_states_is_zero():
    x, y = gaussian(40, 400, 8), gaussian(40, 400, 9)
    assert linear_cka(x, y).value > 0.8
    assert abs(debiased_cka(x, y).value) < 0.1


def test_standardize_gives_each_dimension_mean_0_and_deviation_1():
    points = gaussian(30, 3) * [1, 50, 0] + [0, 4, 2]
    scores = standardize(points)
    assert scores.mean(0) == pytest.approx(0, abs=1e-12) and scores.std(0) == pytest.approx([1, 1, 0])


@pytest.mark.parametrize("metric", ["cosine", "centred_cosine", "cka", "retrieval"])
def test_floor_is_mean_over_all_permutations(metric):
    x, y = gaussian(5, 3, 4) + 1, gaussian(5, 3, 5) - 0.5
    shuffled = [similarity_metrics(x, y[list(order)])[metric].value for order in permutations(range(5))]
    assert similarity_metrics(x, y)[metric].floor == pytest.approx(np.mean(shuffled), rel=1e-10)


def test_xsim_floor_is_mean_over_all_permutations():
    cosines = cosine_matrix(gaussian(5, 3, 4) + 2, gaussian(5, 3, 5) + 2)
    shuffled = [xsim_error(cosines[:, list(order)]).value for order in permutations(range(5))]
    assert xsim_error(cosines).floor == pytest.approx(np.mean(shuffled), rel=1e-10)


def test_similarity_metrics_of_equal_representations():
    x = gaussian(40, 16) + 2.0
    metrics = similarity_metrics(x, x)
    assert {name: round(metric.value, 12) for name, metric in metrics.items()} == {
        "cosine": 1,
        "centred_cosine": 1,
        "cka": 1,
        "debiased_cka": 1,
        "retrieval": 1,
        "xsim_error": 0,
    }


def test_rotation_leaves_only_cka_high():
    x = gaussian(200, 16)
    metrics = similarity_metrics(x, x @ rotation(16))
    assert metrics["cka"].value == pytest.approx(1, abs=1e-12)
    assert abs(metrics["centred_cosine"].value) < 0.2
    assert metrics["retrieval"].value < 0.1 and metrics["xsim_error"].value > 0.9


def test_shift_lowers_only_raw_cosine():
    x = gaussian(60, 16)
    metrics = similarity_metrics(x, x + 20 * unit_rows(gaussian(1, 16, 7)))
    assert metrics["cosine"].value < 0.5
    assert metrics["centred_cosine"].value == pytest.approx(1, abs=1e-12)
    assert metrics["cka"].value == pytest.approx(1, abs=1e-12)


def test_common_direction_raises_raw_cosine_and_floor():
    common = 20 * unit_rows(gaussian(1, 16, 7))
    metrics = similarity_metrics(gaussian(300, 16, 8) + common, gaussian(300, 16, 9) + common)  # unrelated questions
    assert metrics["cosine"].value > 0.9
    assert metrics["cosine"].value - metrics["cosine"].floor < 0.01
    assert abs(metrics["centred_cosine"].value) < 0.05
    assert metrics["cka"].value - metrics["cka"].floor < 0.05


def test_xsim_is_robust_to_hubs():
    """One target is close to every source: plain retrieval picks it, the margin does not."""
    x = np.eye(12) + 0.3
    y = np.eye(12) + 0.3
    y[0] = x.mean(0) * 10  # the hub, for all sources but its own
    cosines = cosine_matrix(x, y)
    assert retrieval(cosines).value < 1
    assert xsim_error(cosines).value <= 1 - retrieval(cosines).value + 1e-12


def test_similarity_metrics_of_degenerate_states_are_finite():
    constant = np.ones((6, 4))
    assert linear_cka(constant, gaussian(6, 4)) == Metric(0.0, 0.0)
    metrics = similarity_metrics(np.zeros((6, 4)), gaussian(6, 4))
    assert all(np.isfinite(metric[:2]).all() for metric in metrics.values())
