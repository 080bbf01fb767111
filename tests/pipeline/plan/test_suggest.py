"""The search for settings that fit."""

from dataclasses import replace

import pytest

from pipeline.plan.suggest import nearest_fit, suggest
from tests.pipeline.plan.cases import prediction_of


def test_nearest_fit_fits() -> None:
    prediction = prediction_of("Qwen2.5-32B", 2)
    assert not prediction.fits
    nearest = nearest_fit(prediction)
    assert nearest is not None and nearest[1].fits
    assert "model.activation_checkpointing true" in nearest[0]


@pytest.mark.parametrize(
    ("loss", "is_kept"), [({}, False), ({"distance": "infonce"}, True), ({"centring": True}, True)]
)
def test_suggest_keeps_the_micro_batch_size_that_the_loss_depends_on(loss: dict[str, object], is_kept: bool) -> None:
    prediction = prediction_of("Qwen2.5-0.5B", **loss)
    suggested = suggest(prediction)
    assert suggested is not None
    assert (suggested[0].micro_batch_size == prediction.run.micro_batch_size) is is_kept


@pytest.mark.parametrize(
    ("parts", "hpz", "nodes"), [(1, 1, 3), (16, 1, 4), (1, 16, 4)], ids=["plain", "shared rows", "hpZ"]
)
def test_more_nodes_are_a_number_of_ranks_that_can_be_divided(parts: int, hpz: int, nodes: int) -> None:
    prediction = prediction_of("Llama-3.1-70B", 2, "a100")
    run, cluster = prediction.run, prediction.cluster
    training = replace(run.config.training, train_batch_size=1536, sequence_parallel_size=parts)
    run = replace(run, config=replace(run.config, training=training), zero=replace(run.zero, hpz=hpz))
    small = replace(cluster.device, memory_gib=40.0, host_memory_gib=580)
    nearest = nearest_fit(replace(prediction, run=run, cluster=replace(cluster, device=small)))
    assert nearest is not None and nearest[0].startswith(f"--nodes {nodes},")
