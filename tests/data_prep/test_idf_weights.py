"""Inverse document frequencies, compared with values computed by hand, and the command that writes them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_prep.idf_weights import count_documents, inverse_document_frequency
from data_prep.shards.format import IGNORE, PackedRow, ShardSet
from pipeline.common.errors import UserError
from tests.runs import python, refuses


def row(*responses):
    """Return a packed row with one sequence per response, after a prompt of one token."""
    labels = np.concatenate([[IGNORE, *response] for response in responses]).astype(np.int32)
    lengths = np.array([len(response) + 1 for response in responses], np.int32)
    return PackedRow(labels.clip(0), labels, lengths, [], [], [])


def test_idf_weights_match_manual_computation():
    counts, responses = count_documents([row([1, 2, 2], [1, 3]), row([1, 2]), row([1])], 6)
    assert counts.tolist() == [0, 4, 2, 1, 0, 0] and responses == 4
    weights = inverse_document_frequency(counts, responses)
    assert weights.dtype == np.float32
    expected = [0, 0, math.log(4 / 2) / math.log(4), 1, 0, 0]  # entries in no response: 0
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_copies_of_a_pivot_count_once():
    """Split a group of a pivot and three translations into three rows, each with a copy of the pivot."""
    whole = [row([1, 2], [1, 3], [4], [4, 5])]
    split = [row([1, 2], translation) for translation in ([1, 3], [4], [4, 5])]
    split = [replace(part, copies=np.array([3, 1], np.int32)) for part in split]
    for actual, expected in zip(count_documents(split, 6), count_documents(whole, 6), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_idf_weights_reject_few_responses_and_large_ids():
    with pytest.raises(UserError, match="1 responses are too few"):
        count_documents([row([1])], 4)
    with pytest.raises(UserError, match="token id 9 is out of range for a vocabulary of 9"):
        count_documents([row([1], [9])], 9)


@pytest.mark.slow
def test_weights_command_writes_weights_of_model_size(prepared, tmp_path):
    output = tmp_path / "w.safetensors"
    command = ["-m", "data_prep", "weights", prepared.shards, "--output", output]
    result = python(*command, "--model", prepared.tokenizer)
    assert result.returncode == 0, result.stderr
    weights = load_file(output)["weights"]
    counts, responses = count_documents(ShardSet.open(prepared.shards), len(weights))
    np.testing.assert_array_equal(weights, inverse_document_frequency(counts, responses))
    absent = int((counts == 0).sum())
    assert len(weights) == 600 and absent > 0 and f"{absent} in none (weight 0)" in result.stdout
    model = tmp_path / "model"
    model.mkdir()
    for size in (640, 5):  # a model's vocabulary may be larger than its tokenizer's
        (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": size}))
        if size > 600:
            assert python(*command, "--model", model).returncode == 0
            assert len(load_file(output)["weights"]) == size
        else:
            refuses(python(*command, "--model", model), str(prepared.shards), "is out of range for a vocabulary of 5")
    refuses(python(*command, "--model", tmp_path / "no"), "no")
    refuses(
        python("-m", "data_prep", "weights", tmp_path, "--output", output, "--model", prepared.tokenizer), str(tmp_path)
    )
