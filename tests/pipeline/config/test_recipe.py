"""Loading of recipes, and mistakes reported in one line."""

import re
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import recipe_yaml
from pipeline.common.errors import UserError
from pipeline.config.fields import Interval, check_ranges, leaf_fields
from pipeline.config.other_names import OTHER_NAMES
from pipeline.config.recipe import DEMO_RECIPE, load_config
from pipeline.config.settings import Config

MODEL = "model: {config: {model_type: qwen2}}\ndata: {tokenizer: here}\n"


def load(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_config(path, list(overrides))


def test_load_config_all_recipes() -> None:
    paths = sorted(DEMO_RECIPE.parent.glob("*.yaml"))
    assert DEMO_RECIPE in paths and len(paths) > 1
    for path in paths:
        load_config(path, [])


def test_other_names() -> None:
    names = {name for name, _ in leaf_fields(Config)}
    assert set(OTHER_NAMES.values()) <= names
    assert not {name.rpartition(".")[2] for name in names} & set(OTHER_NAMES)


def test_load_config_overrides(tmp_path: Path) -> None:
    text = MODEL + "training: {learning_rate: 1e-3, max_steps: 7}\nloss: {detach: [pivot, embeddings]}"
    config = load(tmp_path, text, "--training.max_steps", "9", "--loss.alignment_weight=0", "--loss.centring", "true")
    assert config.training.learning_rate == 1e-3
    assert config.training.max_steps == 9
    assert config.loss.detach == ("pivot", "embeddings")
    assert config.loss.alignment_weight == 0.0 and config.loss.centring is True
    assert load(tmp_path, MODEL).loss.detach == ("pivot",)
    assert load(tmp_path, MODEL + "training:\n  # max_steps: 7\n").training.max_steps is None


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("traning: {max_steps: 1}", [], "unknown key 'traning'; did you mean 'training'?"),
        ("training: {max_step: 1}", [], "unknown key 'training.max_step'; did you mean 'training.max_steps'?"),
        (
            "",
            ["--model.config.rope_parameters.factor", "8"],
            "rope_parameters.factor' is part of a mapping",
        ),
        ("", ["--los.distance", "mse"], "command line: unknown key 'los.distance'; did you mean 'loss.distance'?"),
        ("training: {seed: 1}", [], "unknown key 'training.seed'; did you mean 'seed'?"),
        (
            "training: {per_device_train_batch_size: 1}",
            [],
            "'training.per_device_train_batch_size'; did you mean 'training.train_micro_batch_size_per_gpu'?",
        ),
        ("", ["--training.gradient_accumulation_steps", "4"], "did you mean 'training.train_batch_size'?"),
        ("", ["--training.bf16", "true"], "unknown key 'training.bf16'; did you mean 'training.precision'?"),
        ("", ["--gradient_checkpointing", "true"], "did you mean 'model.activation_checkpointing'?"),
        ("training: {max_steps: 1.5}", [], "training.max_steps"),
        ("training: {max_steps: 1}\ntraining: {seed: 1}", [], "the key 'training' occurs twice"),
        ("training: {max_steps: 1, max_steps: 2}", [], "the key 'max_steps' occurs twice"),
        ("training: 5", [], "training must be a mapping of keys to values, not 5"),
        ("model: {adapter: 8}", [], "model.adapter must be a mapping of keys to values, not 8"),
        ("training.max_steps: 7", [], "training.max_steps must be nested: write max_steps below training"),
        ("model: {adapter.r: 8}", [], "model.adapter.r must be nested: write r below model.adapter"),
        ("training: {learning_rate: fast}", [], "training.learning_rate"),
        ("", ["--training.learning_rate", "fast"], "training.learning_rate"),
        ("loss: {distance: cos}", [], "loss.distance"),
        ("loss: {detach: [pivots]}", [], "loss.detach"),
        ("model: {adapter: {use_dora: true}}", [], "model.adapter requires model.adapter.r, the rank; peft's"),
        ("model: {path: null, config: {model_type: qwen2}, adapter: {r: 8}}", [], "model.adapter requires model.path"),
        ("model: {adapter: {r: 8, lora_r: 1}}", [], "unknown key 'model.adapter.lora_r'"),
        (
            "model: {adapter: {r: 8}}",
            ["--model.adapter.lora_dropout", "1"],
            "lora_dropout is 1.0; it must be at least 0",
        ),
        (
            "model: {path: here, adapter: {r: 8}}",
            ["--training.embedding_learning_rate", "1e-5"],
            "training.embedding_learning_rate is set, but the adapter freezes the embeddings",
        ),
        (
            "model: {path: here, adapter: {r: 8}}",
            ["--loss.detach", "[probabilities]"],
            "the adapter freezes the embeddings (see model.adapter.train_embeddings) and loss.detach has probabilities",
        ),
        (
            "model: {path: here, adapter: {r: 8}}",
            ["--loss.pooling_tokens", "hard"],
            "freezes the embeddings (see model.adapter.train_embeddings) and loss.pooling_tokens is hard, so nothing",
        ),
        (
            "loss: {pooling_tokens: hard, detach: [pivot, embeddings]}",
            [],
            "loss.detach has embeddings and loss.pooling_tokens is hard, so nothing is aligned",
        ),
        (
            "loss: {detach: [embeddings, probabilities]}",
            [],
            "loss.detach has embeddings and loss.detach has probabilities, so nothing is aligned; change one of them",
        ),
        (
            "loss: {detach: [embeddings], top_k: 1}",
            [],
            "loss.detach has embeddings and loss.top_k is 1, with which the only probability is always 1, so nothing",
        ),
        (
            "model: {path: here, adapter: {r: 8}}",
            ["--loss.top_k", "1"],
            "freezes the embeddings (see model.adapter.train_embeddings) and loss.top_k is 1, with which the only prob",
        ),
        ("training: {max_steps: 0}", [], "training.max_steps is 0; it must be greater than 0"),
        ("training: {embedding_learning_rate: 0}", [], "training.embedding_learning_rate is 0.0; it must be greater"),
        ("training: {log_gradients_steps: 0}", [], "training.log_gradients_steps is 0; it must be greater than 0"),
        ("training: {log_gradients_steps: 1.5}", [], "training.log_gradients_steps"),
        ("training: {warmup_ratio: 2}", [], "training.warmup_ratio is 2.0; it must be between 0 and 1"),
        ("loss: {alignment_weight: -1}", [], "loss.alignment_weight is -1.0"),
        ("training: {weight_decay: -0.1}", [], "training.weight_decay is -0.1; it must be at least 0 and finite"),
        ("training: {max_grad_norm: -1}", [], "training.max_grad_norm is -1.0"),
        ("training: {learning_rate: .inf}", [], "training.learning_rate is inf; it must be greater than 0 and finite"),
        ("training: {learning_rate: .nan}", [], "training.learning_rate is nan"),
        ("loss: {alignment_weight: .nan}", [], "loss.alignment_weight is nan"),
        ("", ["--loss.alignment_weight", ".inf"], "loss.alignment_weight is inf"),
        ("training: {adam_beta1: 1}", [], "training.adam_beta1 is 1.0; it must be at least 0 and less than 1"),
        ("training: {adam_beta2: -0.1}", [], "training.adam_beta2 is -0.1"),
        ("training: {adam_epsilon: 0}", [], "training.adam_epsilon is 0.0; it must be greater than 0 and finite"),
        ("seed: -1", [], "seed is -1; it must be between 0 and 4294967295"),
        ("seed: 123456789012345678901234567890", [], "it must be between 0 and 4294967295"),
        ("", ["--data.language_weights.sw", "-2"], "data.language_weights.sw is -2.0; it must be greater than 0"),
        ("loss: {pooling: weights}", [], "loss.token_weights"),
        ("loss: {top_k: 0}", [], "loss.top_k is 0; it must be greater than 0"),
        ("loss: {top_k: 2.5}", [], "loss.top_k"),
        ("loss: {softmax_temperature: 0}", [], "loss.softmax_temperature is 0.0; it must be greater than 0"),
        ("loss: {soft_token_embeddings: middle}", [], "loss.soft_token_embeddings"),
        ("loss: {layer: 3}", [], "loss.layer requires loss.pooling_tokens hidden_states"),
        (
            "loss: {pooling_tokens: hidden_states}",
            ["--loss.detach", "[pivot,embeddings]"],
            "loss.detach has pivot, embeddings, but with loss.pooling_tokens hidden_states only pivot can be detached",
        ),
        ("model: {path: x, config: {model_type: qwen2}}", [], "model.path"),
        ("data: {tokenizer: null}", [], "data.tokenizer"),
        ("training: {eval_steps: 5}", [], "training.eval_steps requires data.eval_shards"),
        ("training: {metric_for_best_model: eval_ce}", [], "metric_for_best_model requires data.eval_shards"),
        ("training: {early_stopping_patience: 2}", [], "requires training.metric_for_best_model"),
        ("training: {greater_is_better: true}", [], "requires training.metric_for_best_model"),
        ("a: [", [], "not valid YAML"),
        ("- a\n- b", [], "mapping"),
        ("!!python/object/apply:os.system ['true']", [], "not valid YAML"),
        ("training: {train_batch_size: null}", [], "training.train_batch_size is null; give it a value"),
        ("data: {tokenizer: here, shards: null}", [], "data.shards is null"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_load_config_refuses(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    if text.startswith(("a: [", "- a", "!!")):
        MODEL_TEXT = ""
    else:
        MODEL_TEXT = "" if text.startswith(("model", "data")) else MODEL
        if text.startswith("data"):
            MODEL_TEXT = "model: {config: {model_type: qwen2}}\n"
    with pytest.raises(UserError) as caught:
        load(tmp_path, MODEL_TEXT + text, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_number_has_a_range() -> None:
    config = Config()
    check_ranges(config, "defaults")
    for key, field in leaf_fields():
        numbers = [t for t in (int, float) if re.search(rf"\b{t.__name__}\b", str(field.type))]
        assert not numbers or "range" in field.metadata, f"{key} has no range"
        for value in ("inf", "nan", "-1"):
            assert not numbers or float(value) not in Interval.parse(field.metadata["range"])
        assert field.metadata.get("on_resume") in (None, "may change", "same content"), key
        assert not field.metadata.keys() - {"range", "on_resume"}, key


@pytest.mark.parametrize("weights", ["{no: 2, on: 3}", "{'no': 2, 'on': 3}"])
def test_load_config_keeps_norwegian(tmp_path: Path, weights: str) -> None:
    text = f"model: {{config: {{model_type: qwen2}}}}\ndata: {{tokenizer: here, language_weights: {weights}}}"
    expected = {"no": 2.0, "on": 3.0}
    config = load(tmp_path, text)
    assert config.data.language_weights == expected
    assert load(tmp_path, MODEL, "--data.language_weights", weights).data.language_weights == expected
    assert load(tmp_path, recipe_yaml(config)) == config


def test_load_config_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot read the recipe"):
        load_config(tmp_path / "none.yaml", [])
