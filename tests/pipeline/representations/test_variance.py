"""Variance components against loops over the definition, and against planted variances."""

import numpy as np
import pytest

from pipeline.representations.variance import PARTS, variance_split


def split_by_hand(x):
    """The ANOVA estimates of a two-way layout, from mean squares summed in loops."""
    languages, groups, size = x.shape
    components = np.zeros(3)
    for column in range(size):
        table = x[:, :, column]
        grand = table.mean()
        by_language = sum(groups * (row.mean() - grand) ** 2 for row in table) / (languages - 1)
        by_example = sum(languages * (row.mean() - grand) ** 2 for row in table.T) / (groups - 1)
        rest = sum(
            (table[i, j] - table[i].mean() - table[:, j].mean() + grand) ** 2
            for i in range(languages)
            for j in range(groups)
        ) / ((languages - 1) * (groups - 1))
        components += [(by_language - rest) / groups, (by_example - rest) / languages, rest]
    components = np.maximum(components, 0)
    return components / components.sum()


def planted(deviations, languages=4, groups=40, size=30, seed=0):
    """Return [L, G, d] with independent effects of the language, the example, and both."""
    rng = np.random.default_rng(seed)
    shapes = ((languages, 1, size), (1, groups, size), (languages, groups, size))
    return 3 + sum(scale * rng.normal(size=shape) for scale, shape in zip(deviations, shapes, strict=True))


def test_variance_split_equals_loops_over_definition():
    x = planted((1.0, 0.7, 0.5), 3, 7, 4)
    split = variance_split(x)
    assert [split[part].value for part in PARTS] == pytest.approx(split_by_hand(x), rel=1e-10)


def test_variance_examples_are_the_jackknife():
    x = planted((1.0, 0.7, 0.5), 3, 7, 4)
    without = np.array([split_by_hand(np.delete(x, group, axis=1)) for group in range(7)])
    for index, part in enumerate(PARTS):
        value = split_by_hand(x)[index]
        influences = 6 * (value - without[:, index])
        np.testing.assert_allclose(variance_split(x)[part].examples, value + influences - influences.mean(), rtol=1e-8)


@pytest.mark.parametrize("deviations", [(1.0, 2.0, 1.0), (0.0, 0.0, 1.0), (2.0, 0.0, 1.0)])
def test_variance_split_finds_planted_variances(deviations):
    variances = np.square(deviations)
    values = [
        [part.value for part in variance_split(planted(deviations, size=200, seed=seed)).values()] for seed in range(3)
    ]
    assert np.mean(values, axis=0) == pytest.approx(variances / variances.sum(), abs=0.02)


def test_variance_split_of_equal_states_is_rest():
    assert [part.value for part in variance_split(np.ones((2, 6, 3))).values()] == [0, 0, 1]
