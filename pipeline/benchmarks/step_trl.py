"""Baseline of `pipeline.benchmarks.step`: TRL's SFTTrainer under ZeRO-3, plain fine-tuning on the same packed rows.

On a GPU it runs with Liger's kernels and torch's variable-length attention, by the sequence boundaries that TRL's
collator provides; on CPU ranks with transformers' attention with a mask, which is what TRL offers there.
"""

import os
import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from pipeline.benchmarks.common import memory_in_use_gb, random_batch
from pipeline.common.optional_imports import import_optional
from pipeline.models.loading import DTYPES


def variable_length_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each sequence of a padding-free batch, as flash_attention_2 does."""
    assert cu_seq_lens_q is not None
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.unsqueeze(0), None  # type: ignore[union-attr]


AttentionInterface.register("variable_length", variable_length_attention)


class StepTimes(TrainerCallback):
    """Times of the optimizer steps of a trainer.

    Attributes:
        times, processor_times: seconds of each step.
        memory_before_gb: memory in use before the first step.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.processor_times: list[float] = []
        self.memory_before_gb = 0.0
        self._started = (0.0, 0.0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        if not self.times:
            self.memory_before_gb = memory_in_use_gb()
        self._started = (time.perf_counter(), time.process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self._started[0])
        self.processor_times.append(time.process_time() - self._started[1])


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the right number of entries; the trainer requires one, but the rows have ids already."""
    vocabulary = {"<end>": 0} | {str(i): i for i in range(1, vocab_size)}
    model = models.WordLevel(vocabulary, unk_token="<end>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<end>", pad_token="<end>")


def _sequences(vocab_size: int, rows: int, tokens: int, sequence: int, steps: int) -> Dataset:
    """Return the sequences of all ranks' micro-batches, unpacked, as input_ids and labels."""
    examples: list[dict[str, list[int]]] = []
    for step in range(steps):
        batch = random_batch(vocab_size, rows, tokens, sequence, step)
        for ids in batch.input_ids.flatten().split(sequence):
            labels = ids.clone()
            labels[: sequence // 3] = -100
            examples.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return Dataset.from_list(examples)


def train_with_trl(
    fields: dict[str, Any],
    ds: dict[str, Any],
    *,
    rows: int,
    tokens: int,
    sequence: int,
    micro_batches: int,
    steps: int,
    precision: str,
    checkpointing: bool,
    learning_rate: float,
) -> StepTimes:
    """Train a randomly initialized model for `steps` optimizer steps.

    Args:
        fields: configuration fields of the model.
        ds: DeepSpeed configuration, the same as for the other variants.
        rows: packed rows per rank and micro-batch. tokens: tokens of a row. sequence: tokens of a sequence.
        micro_batches: micro-batches of an optimizer step.
    """
    trl = import_optional("trl")
    warnings.filterwarnings("ignore", category=FutureWarning)
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as output:
        args = trl.SFTConfig(
            output_dir=output,
            deepspeed=ds,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro_batches,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            max_length=tokens,
            packing=True,
            shuffle_dataset=False,
            bf16=precision == "bf16",
            gradient_checkpointing=checkpointing,
            use_liger_kernel=gpu,
            use_cpu=not gpu,
            optim="adamw_torch_fused" if gpu else "adamw_torch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        config = AutoConfig.for_model(**fields)
        attention = "variable_length" if gpu else "sdpa"
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision], attn_implementation=attention)
        count = steps * micro_batches * int(os.environ.get("WORLD_SIZE", "1"))
        dataset = _sequences(fields["vocab_size"], rows, tokens, sequence, count)
        times = StepTimes()
        trl.SFTTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=_tokenizer(fields["vocab_size"]),
            callbacks=[times],
        ).train()
    return times
