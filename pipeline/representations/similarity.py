"""How alike two languages' representations of the same problems are, each figure beside its shuffled-pairs floor.

Shape letters: P problems, d size of a representation. Row i of both languages' matrices [P, d] is the same problem.

The floor of a figure is its mean over all P! ways to pair one language's rows with the other's. It has a closed form
for each, so nothing is drawn at random: what a figure shows about the pairs is what it has above its floor.
"""

from typing import NamedTuple

import numpy as np

NEIGHBOURS = 4  # k of the margin, as xSIM has it


class Figure(NamedTuple):
    """A measured value and its mean over all shufflings of the pairs."""

    value: float
    floor: float


def compare(x: np.ndarray, y: np.ndarray) -> dict[str, Figure]:
    """All figures of two languages, [P, d] each, P > 1, computed in float64.

    `cosine` and `centred_cosine`: mean cosine of the pairs, the latter after each language's mean was subtracted.
    `cka`: linear centred kernel alignment. `retrieval`: see there. `xsim_error`: see there.
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
    """Rows scaled to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(lengths > 0, lengths, 1.0)


def cosine_matrix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[P, P] cosines of every row of x with every row of y."""
    return unit_rows(x) @ unit_rows(y).T


def _mean_of_pairs(cosines: np.ndarray) -> Figure:
    return Figure(float(np.diagonal(cosines).mean()), float(cosines.mean()))


def linear_cka(x: np.ndarray, y: np.ndarray) -> Figure:
    """Linear CKA (Kornblith et al. 2019, arXiv 1905.00414, section 3); the floor is E over permutations of tr(K PLP').

    With few problems and a large d the floor is high, since K and L then both come near the centring matrix.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    k, el = x @ x.T, y @ y.T
    scale = np.linalg.norm(k) * np.linalg.norm(el)
    if scale == 0:
        return Figure(0.0, 0.0)
    # The centred K and L sum to 0: off the diagonal to -tr. Hence tr K tr L (1/P + 1/(P (P-1))).
    floor = np.trace(k) * np.trace(el) / (len(x) - 1)
    return Figure(float((k * el).sum() / scale), float(floor / scale))


def retrieval(cosines: np.ndarray) -> Figure:
    """P@1: share of problems whose translation is the most similar of all P, mean of both directions."""
    places = np.arange(len(cosines))
    forth, back = cosines.argmax(1) == places, cosines.argmax(0) == places
    return Figure(float((forth.mean() + back.mean()) / 2), 1 / len(cosines))


def xsim_error(cosines: np.ndarray) -> Figure:
    """xSIM: error rate of retrieval by ratio margin (Artetxe and Schwenk 2019, arXiv 1811.01136), both directions.

    The margin is a cosine over the mean cosine of both sides' k nearest neighbours; candidates are the k nearest. It
    forgives hubs, which are near to everything, where plain retrieval does not. Its ratio wants positive cosines.
    """
    k = min(NEIGHBOURS, len(cosines))
    errors = [_margin_errors(matrix, k) for matrix in (cosines, cosines.T)]
    return Figure(float(np.mean(errors)), 1 - 1 / len(cosines))


def _margin_errors(cosines: np.ndarray, k: int) -> float:
    nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    near_x = np.take_along_axis(cosines, nearest, 1).mean(1)
    near_y = np.partition(cosines, len(cosines) - k, axis=0)[-k:].mean(0)
    scale = (near_x[:, None] + near_y[nearest]) / 2
    margins = np.take_along_axis(cosines, nearest, 1) / np.where(scale == 0, 1.0, scale)
    best = np.take_along_axis(nearest, margins.argmax(1)[:, None], 1)[:, 0]
    return float((best != np.arange(len(cosines))).mean())
