"""Split of the variance of representations by language, by example, and the rest.

Shape letters: L languages, G example groups, d size of a representation.
"""

from typing import NamedTuple

import numpy as np

from pipeline.representations.intervals import influence_values

PARTS = ("language", "example", "rest")


class VariancePart(NamedTuple):
    """A fraction of the variance.

    Attributes:
        value: the fraction.
        examples: [G] per-example values, see `intervals`.
    """

    value: float
    examples: np.ndarray


def variance_split(states: np.ndarray) -> dict[str, VariancePart]:
    """Estimate the variance components of a two-way layout with one observation per cell.

    The model is x[l, g] = mean + language[l] + example[g] + rest[l, g] with independent effects. The components are
    the ANOVA estimates (Searle, Casella and McCulloch 1992, section 4.3), summed over the dimensions; negative ones
    count as 0. Unlike fractions of the sums of squares, they do not depend on L and G: unrelated examples give 0.

    Args:
        states: [L, G, d], L > 1 and G > 2.

    Returns:
        The fractions `language`, `example` and `rest`, which sum to 1. If all states are equal, the rest is 1.
    """
    states = states.astype(np.float64)
    states = states - states.mean((0, 1))
    languages, groups = states.shape[:2]
    squares = (states**2).sum((0, 2))  # [G]
    by_example = (states.sum(0) ** 2).sum(-1)  # [G]
    totals = states.sum(1)  # [L, d]
    # The squared sums of each language without each example.
    removed = (totals**2).sum(-1)[:, None] - 2 * np.einsum("lgd,ld->lg", states, totals) + (states**2).sum(-1)  # [L, G]
    grand = ((totals.sum(0) - states.sum(0)) ** 2).sum(-1)  # [G]
    whole = _fractions(
        squares.sum(), (totals**2).sum(), by_example.sum(), (totals.sum(0) ** 2).sum(), languages, groups
    )
    without = _fractions(
        squares.sum() - squares, removed.sum(0), by_example.sum() - by_example, grand, languages, groups - 1
    )
    return {
        part: VariancePart(float(value), influence_values(float(value), values))
        for part, value, values in zip(PARTS, whole, without, strict=True)
    }


def _fractions(
    squares: np.ndarray,
    language_squares: np.ndarray,
    example_squares: np.ndarray,
    grand_square: np.ndarray,
    languages: int,
    groups: int,
) -> np.ndarray:
    """Return [3, ...] fractions from sums of squares.

    Args:
        squares: sum of all squared entries.
        language_squares: squared norms of the sums over examples, summed over languages.
        example_squares: squared norms of the sums over languages, summed over examples.
        grand_square: squared norm of the sum of all.
        languages, groups: L and G.
    """
    correction = grand_square / (languages * groups)
    by_language = language_squares / groups - correction
    by_example = example_squares / languages - correction
    rest = (squares - correction - by_language - by_example) / ((languages - 1) * (groups - 1))
    language = (by_language / (languages - 1) - rest) / groups
    example = (by_example / (groups - 1) - rest) / languages
    components = np.maximum(np.stack([language, example, rest]), 0)
    total = components.sum(0)
    components[2] = np.where(total > 0, components[2], 1)
    return components / np.where(total > 0, total, 1)
