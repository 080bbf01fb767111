"""Similarity between the representations of the same questions in two languages, with the chance level of each metric.

Shape letters: G example groups (questions), d size of a representation. Row i of the [G, d] matrices of both languages
belongs to the same question.

The chance level of a metric (its floor) is the mean over random pairings, that is, over all G! ways to pair the rows of
one language with those of the other. It has a closed form for each metric, so nothing is sampled. Only the difference
from the chance level is evidence that translations are similar.
"""

from typing import NamedTuple

import numpy as np

from pipeline.representations.intervals import influence_values

NEIGHBORS = 4  # number of neighbors k in the margin, as in xSIM


class Metric(NamedTuple):
    """A similarity metric with its chance level.

    Attributes:
        value: value for the true pairs.
        floor: chance level (mean over random pairings).
        examples: [G] per-example values for intervals, see `intervals`; None for metrics without an interval.
    """

    value: float
    floor: float
    examples: np.ndarray | None = None


def similarity_metrics(x: np.ndarray, y: np.ndarray) -> dict[str, Metric]:
    """Compute all similarity metrics of two languages in float64.

    Args:
        x: [G, d] representations in one language, G > 1.
        y: [G, d] representations of the same questions in the other language.

    Returns:
        `cosine`: mean cosine of the pairs. `centred_cosine`: the same after subtracting each language's mean. `cka`,
        `debiased_cka`, `retrieval` and `xsim_error`: see `linear_cka`, `debiased_cka`, `retrieval` and `xsim_error`.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    cosines = cosine_matrix(x, y)
    return {
        "cosine": _mean_of_pairs(cosines),
        "centred_cosine": _mean_of_pairs(cosine_matrix(x - x.mean(0), y - y.mean(0))),
        "cka": linear_cka(x, y),
        "debiased_cka": debiased_cka(x, y),
        "retrieval": retrieval(cosines),
        "xsim_error": xsim_error(cosines),
    }


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Scale rows to unit length. Zero rows stay zero."""
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(lengths > 0, lengths, 1.0)


def cosine_matrix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the [G, G] cosines of every row of x with every row of y."""
    return unit_rows(x) @ unit_rows(y).T


def _mean_of_pairs(cosines: np.ndarray) -> Metric:
    pairs = np.diagonal(cosines).copy()
    return Metric(float(pairs.mean()), float(cosines.mean()), pairs)


def standardize(points: np.ndarray) -> np.ndarray:
    """Subtract the mean of each dimension of [N, d] points and divide by its standard deviation, in float64.

    A few dimensions of large values determine raw cosines and CKA (Timkey and van Schijndel 2021, arXiv 2109.04404).
    Constant dimensions become 0.
    """
    points = points.astype(np.float64)
    constant = np.ptp(points, 0) == 0  # its computed deviation may be a rounding error instead of 0
    return np.where(constant, 0.0, points - points.mean(0)) / np.where(constant, 1.0, points.std(0))


def linear_cka(x: np.ndarray, y: np.ndarray) -> Metric:
    """Compute linear centered kernel alignment (Kornblith et al. 2019, arXiv 1905.00414, section 3).

    K and L are the [G, G] Gram matrices of the centered x and y, where G is the number of example groups. The chance
    level is the mean of tr(K P L P') over all permutations P, with the same denominator. It is high if G is small and
    d is large, because K and L are then both close to the centering matrix.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    k, el = x @ x.T, y @ y.T
    scale = np.linalg.norm(k) * np.linalg.norm(el)
    if scale == 0:
        return Metric(0.0, 0.0)
    # The entries of centered K and L sum to 0, so the off-diagonal entries of K sum to -tr K (likewise L). Hence the
    # mean over permutations is tr K tr L (1/G + 1/(G (G-1))) = tr K tr L / (G-1).
    floor = np.trace(k) * np.trace(el) / (len(x) - 1)
    return Metric(float((k * el).sum() / scale), float(floor / scale))


def debiased_cka(x: np.ndarray, y: np.ndarray) -> Metric:
    """Compute linear CKA with unbiased estimates of HSIC (Song et al. 2012; Nguyen et al. 2021, arXiv 2010.15327).

    Linear CKA grows with d / G even for unrelated representations. Here the mean over all pairings is 0 for any G and
    d. Returns 0 if an estimate in the denominator is not positive, or G < 5.
    """
    groups = len(x)
    if groups < 5:
        return Metric(0.0, 0.0, np.zeros(groups))
    x, y = x - x.mean(0), y - y.mean(0)
    k, el = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(el, 0)
    (cross, cross_without), (own_x, x_without), (own_y, y_without) = (
        _hsic(*pair) for pair in ((k, el), (k, k), (el, el))
    )
    value, without = (
        np.where((a > 0) & (b > 0), c / np.sqrt(np.where((a > 0) & (b > 0), a * b, 1)), 0)
        for c, a, b in ((cross, own_x, own_y), (cross_without, x_without, y_without))
    )
    examples = influence_values(float(value), without)
    if value:
        scale = _variance_ratio(k * el / np.sqrt(own_x * own_y) - value / 2 * (k * k / own_x + el * el / own_y))
        examples = value + np.sqrt(scale) * (examples - value)
    return Metric(float(value), 0.0, examples)


def _variance_ratio(terms: np.ndarray) -> float:
    """Return the variance of a sum over pairs of examples, as a fraction of its jackknife estimate.

    The jackknife counts the part of the variance that is due to pairs, and not to single examples, twice (Efron and
    Stein 1981), which matters if there are few examples and the states are wide.

    Args:
        terms: [G, G] terms of the sum (first-order terms of CKA); the diagonal is ignored.
    """
    groups = len(terms)
    off_diagonal = ~np.eye(groups, dtype=bool)
    rows = terms[off_diagonal].reshape(groups, groups - 1)
    jackknife = rows.mean(1).var(ddof=1)
    noise = rows.var(1, ddof=1).mean() / (groups - 1)  # of the mean of a row, due to its partners
    single = max(0.0, jackknife - noise)
    pairs = max(0.0, (groups - 1) * noise - single)
    return min(1.0, (4 * single / groups + 2 * pairs / groups**2) / (4 * jackknife / groups)) if jackknife > 0 else 1.0


def _hsic(k: np.ndarray, el: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the unbiased estimate of HSIC, and the [G] estimates without each example group.

    The constant factors 1 / (G (G - 3)), which cancel in CKA, are left out.

    Args:
        k, el: [G, G] Gram matrices with zero diagonals.
    """
    groups, rows_k, rows_el, products = len(k), k.sum(1), el.sum(1), (k * el).sum(1)

    def estimate(trace: np.ndarray, sum_k: np.ndarray, sum_el: np.ndarray, cross: np.ndarray, n: int) -> np.ndarray:
        return trace + sum_k * sum_el / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)

    trace, sum_k, sum_el, cross = products.sum(), rows_k.sum(), rows_el.sum(), rows_k @ rows_el
    cross_without = cross - k @ rows_el - el @ rows_k + products - rows_k * rows_el
    without = estimate(trace - 2 * products, sum_k - 2 * rows_k, sum_el - 2 * rows_el, cross_without, groups - 1)
    return estimate(trace, sum_k, sum_el, cross, groups), without


def retrieval(cosines: np.ndarray) -> Metric:
    """Compute P@1: the fraction of rows whose translation is the most similar of all G rows, averaged over directions.

    Args:
        cosines: [G, G] cosines of x (rows) and y (columns).
    """
    indices = np.arange(len(cosines))
    hits = ((cosines.argmax(1) == indices) + (cosines.argmax(0) == indices).astype(float)) / 2
    return Metric(float(hits.mean()), 1 / len(cosines), hits)


def xsim_error(cosines: np.ndarray) -> Metric:
    """Compute xSIM: the error rate of ratio-margin retrieval (Artetxe and Schwenk 2019, arXiv 1811.01136).

    The margin is the cosine divided by the mean cosine to the k nearest neighbors of both sides. The candidates are the
    k nearest neighbors. Unlike plain retrieval, it is robust to hubs (points close to all others). The ratio requires
    positive cosines.

    Args:
        cosines: [G, G] cosines of x (rows) and y (columns).

    Returns:
        The error rate averaged over both directions, with its chance level.
    """
    k = min(NEIGHBORS, len(cosines))
    errors = [_margin_errors(matrix, k) for matrix in (cosines, cosines.T)]
    examples = np.mean(errors, axis=0)
    return Metric(float(examples.mean()), 1 - 1 / len(cosines), examples)


def _margin_errors(cosines: np.ndarray, k: int) -> np.ndarray:
    """Return [G] whether each row of x is matched with another than its translation."""
    nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    near_x = np.take_along_axis(cosines, nearest, 1).mean(1)
    near_y = np.partition(cosines, len(cosines) - k, axis=0)[-k:].mean(0)
    scale = (near_x[:, None] + near_y[nearest]) / 2
    margins = np.take_along_axis(cosines, nearest, 1) / np.where(scale == 0, 1.0, scale)
    best = np.take_along_axis(nearest, margins.argmax(1)[:, None], 1)[:, 0]
    return best != np.arange(len(cosines))
