"""Seeded sampling against the exact distribution, and independent of the batch."""

import dataclasses
import itertools
import json
from collections import Counter
from statistics import fmean

import pytest
import torch

from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from pipeline.evaluation.dataset import read_examples
from pipeline.evaluation.generation import encode_prompts, generate_batches, load_for_generation, plan_batches
from pipeline.evaluation.runner import evaluate
from pipeline.evaluation.sampling import Sampling, response_seed, sampling_processors
from pipeline.evaluation.sampling_statistics import sampling_metrics
from pipeline.evaluation.settings import EvaluationSettings
from tests.pipeline.evaluation.test_runner import StopAfterOneBatch
from tests.pipeline.evaluation.tiny_model import make_records, write_records


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The distribution that nucleus sampling draws from, token by token in the order of probability."""
    probabilities = (logits.double() / temperature).softmax(-1)
    kept, total = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept[token] = probabilities[token]
        total += float(probabilities[token])
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.9), (3.0, 0.5)])
def test_sampling_processors_follow_the_distribution(temperature: float, top_p: float) -> None:
    """Both over seeds at one position and over the positions of one sequence."""
    logits = torch.randn(11, generator=torch.Generator().manual_seed(3)) * 2
    expected = nucleus(logits, temperature, top_p)
    n = 10_000
    over_seeds = sampling_processors(temperature, top_p, range(n), 5, 1)
    scores = over_seeds(torch.zeros(n, 5, dtype=torch.long), logits.expand(n, -1).clone())
    assert (scores.isfinite().sum(-1) == 1).all()
    over_positions = sampling_processors(temperature, top_p, [7], 5, n)[-1]
    warped = sampling_processors(temperature, top_p, [7], 5, 1)[:-1]
    row = logits[None].clone()
    for processor in warped:
        row = processor(torch.zeros(1, 5, dtype=torch.long), row)
    tokens = [int(over_positions(torch.zeros(1, 5 + i, dtype=torch.long), row).argmax()) for i in range(1000)]
    for drawn, size in ((scores.argmax(-1), n), (torch.tensor(tokens), len(tokens))):
        counts = torch.bincount(drawn, minlength=11).double()
        assert (counts[expected == 0] == 0).all()
        possible = expected > 0
        wanted = expected[possible] * size
        chi2 = float(((counts[possible] - wanted) ** 2 / wanted).sum())
        degrees = int(possible.sum()) - 1
        assert chi2 < degrees + 5 * (2 * degrees) ** 0.5 + 1  # five standard deviations above its mean


def test_generate_batches_samples_independently_of_the_batch(tmp_path, random_model_dir) -> None:
    """A response depends on its seed, whatever batch it is in; another seed gives another response."""
    examples = read_examples(write_records(tmp_path / "x.jsonl", make_records()[:6]))
    model, tokenizer = load_for_generation(random_model_dir, "float32")
    prompts = [prompt for prompt in encode_prompts(tokenizer, examples) for _ in range(3)]
    seeds = [response_seed(1, e.pair_id, e.lang, sample) for e in examples for sample in range(3)]
    outputs = []
    for size in (1, 4, 18):
        batches = plan_batches(prompts, size)
        finished = generate_batches(model, tokenizer, prompts, batches, 12, Sampling(2.0, 0.95, seeds))
        outputs.append({i: generation for batch in finished for i, generation in batch.items()})
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({generation.text for generation in outputs[0].values()}) == 18
    assert all(generation.tokens == 12 for generation in outputs[0].values() if not generation.finished)


def test_evaluate_samples(tmp_path, random_model_dir) -> None:
    """The statistics are those of the written samples, and an interrupted evaluation gives the same result."""
    data = write_records(tmp_path / "x.jsonl", make_records()[:6])
    settings = EvaluationSettings(
        str(random_model_dir), str(data), str(tmp_path / "whole"), batch_size=4, max_new_tokens=12
    )
    settings = dataclasses.replace(settings, temperature=2.0, top_p=0.95, num_samples=3, seed=1)
    assert evaluate(settings) == 0
    text = (tmp_path / "whole" / "generations.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    assert [(row["pair_id"], row["lang"]) for row in rows] == [(f"p{i}", x) for i in (0, 1) for x in ("en", "de", "bn")]
    for row in rows:
        assert len({sample["output"] for sample in row["samples"]}) == 3
        assert row["correct"] == fmean(sample["correct"] for sample in row["samples"])
        assert row["finished"] == all(sample["finished"] for sample in row["samples"])
        assert row["output"] in [sample["output"] for sample in row["samples"]]
    result = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    assert result["sampling"] == sampling_metrics(rows, 3)
    assert result["languages"]["de"]["accuracy"] == result["sampling"]["languages"]["de"]["mean_accuracy"]
    # Every sample is a response, so of 18 responses to 6 questions some are unfinished.
    assert result["unfinished"] == sum(not sample["finished"] for row in rows for sample in row["samples"])
    table = (tmp_path / "whole" / "evaluation.md").read_text()
    assert "| language | responses | unfinished | mean accuracy % |" in table
    assert f"{result['unfinished']} of 18 responses are unfinished" in table

    interrupted = dataclasses.replace(settings, output=str(tmp_path / "interrupted"))
    assert evaluate(interrupted, StopAfterOneBatch()) == STOPPED_BY_SIGNAL
    assert evaluate(interrupted) == 0
    assert (tmp_path / "interrupted" / "generations.jsonl").read_text("utf-8") == text
    assert evaluate(dataclasses.replace(settings, seed=2)) == 0
    assert (tmp_path / "whole" / "generations.jsonl").read_text("utf-8") != text


def test_response_seed_differs_for_every_response() -> None:
    names = itertools.product((0, 1, 2), ("p1", "p11"), ("en", "de"), range(50))
    counts = Counter(response_seed(*name) for name in names)
    assert len(counts) == 600 and all(0 <= seed < 2**31 for seed in counts)
    assert response_seed(0, "p1", "en", 0) == 1012904144
