"""Similarity between the representations of the same questions in two languages, with the chance level of each metric.

Shape letters: G example groups (questions), d size of a representation. Row i of the [G, d] matrices of both languages
belongs to the same question.

The chance level of a metric (its floor) is the mean over random pairings, that is, over all G! ways to pair the rows of
one language with those of the other. It has a closed form for each metric, so nothing is sampled. Only the difference
from the chance level is evidence that translations are similar.
"""

from typing import NamedTuple

import numpy as np

NEIGHBORS = 4  # number of neighbors k in the margin, as in xSIM


class Metric(NamedTuple):
    """A similarity metric with its chance level.

    Attributes:
        value: value for the true pairs.
        floor: chance level (mean over random pairings).
    """

    value: float
    floor: float


def similarity_metrics(x: np.ndarray, y: np.ndarray) -> dict[str, Metric]:
    """Compute all similarity metrics of two languages in float64.

    Args:
        x: [G, d] representations in one language, G > 1.
        y: [G, d] representations of the same questions in the other language.

    Returns:
        `cosine`: mean cosine of the pairs. `centred_cosine`: the same after subtracting each language's mean. `cka`,
        `retrieval` and `xsim_error`: see `linear_cka`, `retrieval` and `xsim_error`.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    cosines = cosine_matrix(x, y)
    return {
        "cosine": _mean_of_pairs(cosines),
        "centred_cosine": _mean_of_pairs(cosine_matrix(x - x.mean(0), y - y.mean(0))),
        "cka": linear_cka(x, y),
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
    return Metric(float(np.diagonal(cosines).mean()), float(cosines.mean()))


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


def retrieval(cosines: np.ndarray) -> Metric:
    """Compute P@1: the fraction of rows whose translation is the most similar of all G rows, averaged over directions.

    Args:
        cosines: [G, G] cosines of x (rows) and y (columns).
    """
    indices = np.arange(len(cosines))
    forward, backward = cosines.argmax(1) == indices, cosines.argmax(0) == indices
    return Metric(float((forward.mean() + backward.mean()) / 2), 1 / len(cosines))


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
    return Metric(float(np.mean(errors)), 1 - 1 / len(cosines))


def _margin_errors(cosines: np.ndarray, k: int) -> float:
    nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    near_x = np.take_along_axis(cosines, nearest, 1).mean(1)
    near_y = np.partition(cosines, len(cosines) - k, axis=0)[-k:].mean(0)
    scale = (near_x[:, None] + near_y[nearest]) / 2
    margins = np.take_along_axis(cosines, nearest, 1) / np.where(scale == 0, 1.0, scale)
    best = np.take_along_axis(nearest, margins.argmax(1)[:, None], 1)[:, 0]
    return float((best != np.arange(len(cosines))).mean())
