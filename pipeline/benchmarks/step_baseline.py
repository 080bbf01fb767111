"""Baseline of `pipeline.benchmarks.step`: SOLAR with full logits and plain DeepSpeed ZeRO-3.

Shape letters: T target tokens, V vocabulary, d hidden size, S sequences.
"""

from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.config.settings import Config
from pipeline.data.micro_batch import MicroBatch
from pipeline.loss.soft_tokens import soft_tokens
from pipeline.models.families import vocabulary_parameter
from pipeline.models.loading import DTYPES, load_model
from pipeline.zero3.initialize import build_partitioned


class PlainSolar(nn.Module):
    """Model, cross entropy and alignment by autograd over [T, V] logits and [T, d] soft tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.embedding = vocabulary_parameter(model.get_input_embeddings())
        # The parameter is used outside the module that owns it, so ZeRO-3 must gather it for this module too.
        deepspeed.zero.register_external_parameter(self, self.embedding)

    def forward(self, batch: MicroBatch, weight: float) -> Tensor:
        output = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        logits_TV = output.logits.flatten(0, 1)[batch.positions].float()
        s = batch.loss_batch
        sequence = s.sequence_of_token().to(logits_TV.device)
        loss = cross_entropy(logits_TV, s.targets.to(logits_TV.device))
        if weight:
            soft_Td = soft_tokens(logits_TV, self.embedding)
            sums_Sd = soft_Td.new_zeros(len(s.lengths), soft_Td.shape[1]).index_add(0, sequence, soft_Td)
            u_Sd = sums_Sd / s.lengths.to(sums_Sd.device)[:, None]
            pairs, pivots = s.paired().nonzero().squeeze(1).tolist(), s.pivot[s.paired()].tolist()
            loss = loss + weight * (1 - cosine_similarity(u_Sd[pairs], u_Sd[pivots].detach())).mean()
        return loss


class PlainEngine:
    """DeepSpeed engine of `PlainSolar` with torch's AdamW."""

    def __init__(
        self, config: Config, ds: dict[str, Any], model_config: PreTrainedConfig, learning_rate: float
    ) -> None:
        dtype = DTYPES[config.training.precision]
        module = PlainSolar(build_partitioned(ds, lambda: load_model(config.model, model_config, dtype)))
        optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds)

    def step(self, batch: MicroBatch, weight: float) -> float:
        """Train on one micro-batch and return the loss of this rank."""
        loss = self.engine(batch.to(self.engine.device), weight)
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.detach())
