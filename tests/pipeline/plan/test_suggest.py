"""The search for settings that fit."""

from pipeline.plan.suggest import nearest_fit
from tests.pipeline.plan.cases import prediction_of


def test_nearest_fit_fits() -> None:
    prediction = prediction_of("Qwen2.5-32B", 2)
    assert not prediction.fits
    nearest = nearest_fit(prediction)
    assert nearest is not None and nearest[1].fits
    assert "model.activation_checkpointing true" in nearest[0]
