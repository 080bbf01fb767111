"""Similarity figures: against hand computations in float64, floors against all shufflings, and planted data."""

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from pipeline.representations.similarity import (
    Figure,
    compare,
    cosine_matrix,
    linear_cka,
    retrieval,
    unit_rows,
    xsim_error,
)


def gaussian(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns))


def rotation(size, seed=1):
    return np.linalg.qr(gaussian(size, size, seed))[0]


def cka_by_hand(x, y):
    """tr(KHLH) over the roots of tr(KHKH) tr(LHLH), with the centring matrix written out."""
    centring = np.eye(len(x)) - np.ones((len(x), len(x))) / len(x)
    k, el = (centring @ (z @ z.T) @ centring for z in (x, y))
    return np.trace(k @ el) / np.sqrt(np.trace(k @ k) * np.trace(el @ el))


def xsim_by_hand(x, y, k):
    """Errors of x to y, every margin in a loop, over candidates that are among x's k nearest."""
    cosines, wrong = cosine_similarity(x, y), 0
    for i in range(len(x)):
        nearest = sorted(range(len(y)), key=lambda j: -cosines[i, j])[:k]
        margins = {}
        for j in nearest:
            back = sorted(cosines[:, j])[-k:]
            margins[j] = cosines[i, j] / (sum(cosines[i, n] for n in nearest) / (2 * k) + sum(back) / (2 * k))
        wrong += max(margins, key=margins.__getitem__) != i
    return wrong / len(x)


def test_figures_equal_hand_computations():
    x = gaussian(30, 12, 2) + 1.5
    y = x + 1.5 * gaussian(30, 12, 3) - 0.7
    found = compare(x, y)
    cosines = cosine_similarity(x, y)
    assert found["cosine"].value == pytest.approx(np.diagonal(cosines).mean(), rel=1e-12)
    centred = cosine_similarity(x - x.mean(0), y - y.mean(0))
    assert found["centred_cosine"].value == pytest.approx(np.diagonal(centred).mean(), rel=1e-12)
    assert found["cka"].value == pytest.approx(cka_by_hand(x, y), rel=1e-12)
    hits = [int(cosines[i].argmax() == i) + int(cosines[:, i].argmax() == i) for i in range(30)]
    assert found["retrieval"].value == pytest.approx(sum(hits) / 60)
    assert found["xsim_error"].value == pytest.approx((xsim_by_hand(x, y, 4) + xsim_by_hand(y, x, 4)) / 2)
    assert 0 < found["retrieval"].value < 1 and 0 < found["xsim_error"].value < 1  # the case decides something


@pytest.mark.parametrize("metric", ["cosine", "centred_cosine", "cka", "retrieval"])
def test_floors_are_means_over_all_shufflings(metric):
    x, y = gaussian(5, 3, 4) + 1, gaussian(5, 3, 5) - 0.5
    shuffled = [compare(x, y[list(order)])[metric].value for order in permutations(range(5))]
    assert compare(x, y)[metric].floor == pytest.approx(np.mean(shuffled), rel=1e-10)


def test_the_floor_of_xsim_is_the_mean_over_all_shufflings():
    cosines = cosine_matrix(gaussian(5, 3, 4) + 2, gaussian(5, 3, 5) + 2)
    shuffled = [xsim_error(cosines[:, list(order)]).value for order in permutations(range(5))]
    assert xsim_error(cosines).floor == pytest.approx(np.mean(shuffled), rel=1e-10)


def test_equal_representations_are_alike_in_every_way():
    x = gaussian(40, 16) + 2.0
    found = compare(x, x)
    assert {name: round(figure.value, 12) for name, figure in found.items()} == {
        "cosine": 1,
        "centred_cosine": 1,
        "cka": 1,
        "retrieval": 1,
        "xsim_error": 0,
    }


def test_a_rotated_language_is_seen_by_cka_alone():
    x = gaussian(200, 16)
    found = compare(x, x @ rotation(16))
    assert found["cka"].value == pytest.approx(1, abs=1e-12)
    assert abs(found["centred_cosine"].value) < 0.2
    assert found["retrieval"].value < 0.1 and found["xsim_error"].value > 0.9


def test_a_shifted_language_lowers_the_raw_cosine_alone():
    x = gaussian(60, 16)
    found = compare(x, x + 20 * unit_rows(gaussian(1, 16, 7)))
    assert found["cosine"].value < 0.5
    assert found["centred_cosine"].value == pytest.approx(1, abs=1e-12)
    assert found["cka"].value == pytest.approx(1, abs=1e-12)


def test_a_common_direction_raises_the_raw_cosine_and_its_floor_alike():
    common = 20 * unit_rows(gaussian(1, 16, 7))
    found = compare(gaussian(300, 16, 8) + common, gaussian(300, 16, 9) + common)  # unrelated problems
    assert found["cosine"].value > 0.9
    assert found["cosine"].value - found["cosine"].floor < 0.01
    assert abs(found["centred_cosine"].value) < 0.05
    assert found["cka"].value - found["cka"].floor < 0.05


def test_the_margin_forgives_hubs():
    """One target is near to every source: plain retrieval takes it, the margin does not."""
    x = np.eye(12) + 0.3
    y = np.eye(12) + 0.3
    y[0] = x.mean(0) * 10  # the hub, for all sources but its own
    cosines = cosine_matrix(x, y)
    assert retrieval(cosines).value < 1
    assert xsim_error(cosines).value <= 1 - retrieval(cosines).value


def test_degenerate_states_have_figures():
    constant = np.ones((6, 4))
    assert linear_cka(constant, gaussian(6, 4)) == Figure(0.0, 0.0)
    found = compare(np.zeros((6, 4)), gaussian(6, 4))
    assert all(np.isfinite(figure).all() for figure in found.values())
