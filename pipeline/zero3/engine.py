"""The ZeRO-3 engine: passes this rank's vocabulary rows to the loss, and their gradients to DeepSpeed.

The loss and the embedding lookup accumulate the gradients of these rows in fp32 (see `vocabulary_shards`). Between
backward and step, the accumulated gradients are passed to DeepSpeed, so clipping, offload and overflow checks include
them.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_local_grad, safe_set_local_grad, set_z3_leaf_modules
from transformers import PreTrainedModel

from pipeline.common import distributed
from pipeline.common.distributed import world_size
from pipeline.common.hardware import device_called
from pipeline.config.settings import Config
from pipeline.data.micro_batch import MicroBatch
from pipeline.data.token_weights import load_token_weights
from pipeline.loss import (
    LayoutExchange,
    LookupRoute,
    LossNormalizers,
    RunningMeans,
    SolarLoss,
)
from pipeline.models.families import head_config, vocabulary_parameter
from pipeline.models.param_groups import set_learning_rates
from pipeline.models.sequence_parallel import HeadExchange
from pipeline.models.solar_model import SolarModel
from pipeline.zero3.cluster_speeds import cluster_speeds
from pipeline.zero3.ds_config import refusals
from pipeline.zero3.initialize import import_muon_uncompiled
from pipeline.zero3.model_state import StateCollector, collect_state, load_state
from pipeline.zero3.optimizer import build_optimizer
from pipeline.zero3.partitions import avoid_loops_over_ranks
from pipeline.zero3.persistent_parameters import gather_together_after_steps
from pipeline.zero3.reductions import order_after_current_stream, run_ahead_of_reductions
from pipeline.zero3.vocabulary_shards import NodeExchange, VocabularyShards


class ZeroEngine:
    """ZeRO-3 engine that keeps head and input embedding partitioned in forward and backward.

    Attributes:
        ds_engine: the DeepSpeed engine.
        device: device of this rank.
        vocab_size: number of vocabulary entries. padded_size: number of rows of the padded vocabulary.
        tied: whether head and input embedding are the same parameter.
        vocabulary_shards: rows of head and input embedding on this rank.
        running_means: running means of the pooled representations, or None if centering is disabled.
        heartbeat: called before each micro-step.
    """

    def __init__(
        self, config: Config, ds: dict[str, Any], model: PreTrainedModel, vocab_size: int, num_languages: int
    ) -> None:
        """Initialize DeepSpeed.

        Args:
            config: the recipe.
            ds: the complete DeepSpeed configuration.
            model: the partitioned model.
            vocab_size: number of vocabulary entries, without padding.
            num_languages: number of languages in the data.
        """
        embedding = vocabulary_parameter(model.get_input_embeddings())
        shape = getattr(embedding, "ds_shape", embedding.shape)
        self.padded_size, hidden_size = int(shape[0]), int(shape[1])
        self.vocab_size, self.ranks = vocab_size, world_size()
        self.heartbeat: Callable[[], None] = lambda: None
        head_exchange, precision = HeadExchange.of_ranks(config.training), config.training.precision
        gpu = device_called(torch.cuda.get_device_name()) if distributed.local_device().type == "cuda" else None
        speeds = cluster_speeds(gpu, precision, distributed.ranks_per_node())
        # Ranks with different GPUs must choose the same head.
        speeds = distributed.broadcast_from_rank0(lambda: speeds)
        module = SolarModel(model, config.loss, self.padded_size, num_languages, speeds, head_exchange)
        optimizer = build_optimizer(config, ds, module, embedding)
        # With hooks on whole layers instead of every module, DeepSpeed's host time and number of gathers are smaller.
        layers = model.get_decoder().layers
        set_z3_leaf_modules(module, list({type(layer) for layer in layers}))
        import_muon_uncompiled()
        with refusals(config.deepspeed, AssertionError):  # of keys that do not fit together
            self.ds_engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds)
        gather_together_after_steps(self.ds_engine.optimizer.persistent_parameters)
        run_ahead_of_reductions(self.ds_engine.optimizer, layers)
        avoid_loops_over_ranks(self.ds_engine.optimizer)
        self.device = self.ds_engine.device
        self.ds_engine.checkpoint_engine = StateCollector()
        self.ds_engine._copy_recovery_script = lambda path: None  # `pipeline.export` replaces that script
        head = head_config(model)
        self.tied = head.tied
        parameters = {"embedding": embedding}
        if not head.tied:
            parameters["head"] = vocabulary_parameter(model.get_output_embeddings())
        if head.bias is not None:
            parameters["bias"] = head.bias
        weights = load_token_weights(config.loss.vocabulary_weights, vocab_size, "loss.vocabulary_weights")
        hpz = ds["zero_optimization"].get("zero_hpz_partition_size", 1)
        exchange = None
        self.group = dist.group.WORLD if self.ranks > 1 else None
        if self.group is not None and config.vocabulary_ranks(self.ranks, hpz) < self.ranks:
            node = groups._get_zero_param_intra_parallel_group()
            self.group, exchange = node, NodeExchange(self.group, node)
        self.vocabulary_shards = VocabularyShards(
            parameters, head, vocab_size, self.padded_size, weights, self.group, exchange, self.device
        )
        self._layout_exchange, self._pooling = LayoutExchange(self.group), config.loss.pooling
        self.running_means = (
            RunningMeans.zeros(num_languages, hidden_size, self.device) if config.loss.centring else None
        )

    @property
    def loss_scale(self) -> float:
        """The loss scale of fp16, or 1."""
        return float(self.ds_engine.optimizer.loss_scale) if self.ds_engine.fp16_enabled() else 1.0

    def exchange_layouts(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """Return micro-batches with the layout of all ranks, exchanged in one collective unless they have it already.

        Without it, every micro-step would wait for the device. Collective: all ranks must call it.
        """
        if all(batch.loss_batch.layout is not None for batch in micro_batches):
            return micro_batches
        counts = [
            batch.distinct_ids.counts_by_owner(self.padded_size, self._layout_exchange.size) for batch in micro_batches
        ]
        layouts, requested_by = self._layout_exchange.exchange(
            [batch.loss_batch for batch in micro_batches], self._pooling, self.device, torch.stack(counts)
        )
        routes = [
            LookupRoute(batch.distinct_ids, requested_from.tolist(), by_others.tolist())
            for batch, requested_from, by_others in zip(micro_batches, counts, requested_by, strict=True)
        ]
        return [
            replace(batch, loss_batch=replace(batch.loss_batch, layout=layout), route=route)
            for batch, layout, route in zip(micro_batches, layouts, routes, strict=True)
        ]

    def forward_backward(self, batch: MicroBatch, alignment_weight: float, normalizers: LossNormalizers) -> SolarLoss:
        """Run one micro-step. Collective: all ranks must call it.

        Returns:
            The loss over all ranks and its parts. The gradients of this rank are accumulated in the engine.
        """
        self.heartbeat()
        loss, result = self.ds_engine(
            batch.to(self.device),
            self.vocabulary_shards.vocabulary(),
            alignment_weight,
            normalizers,
            self.running_means,
            self.group,
            # Cancels the factors `ranks` and loss scale, which are for DeepSpeed's gradients only.
            1.0 / (self.ranks * self.loss_scale),
        )
        self.ds_engine.backward(loss * self.ranks, scale_wrt_gas=False)
        # Without its graph, which holds a copy of the vocabulary rows if they are offloaded.
        return self.vocabulary_shards.sum_losses(replace(result, loss=result.loss.detach()))

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, normalizers: LossNormalizers) -> SolarLoss:
        """Compute the loss of a micro-batch in evaluation mode (without dropout) and without gradients.

        Weights, gradients, running means and random generators are left unchanged. Collective: all ranks must call it.

        Args:
            batch: this rank's micro-batch.
            normalizers: counts over the micro-batches of all ranks. Without pairs, the alignment terms are 0.

        Returns:
            The parts of the loss, summed over all ranks.
        """
        self.ds_engine.eval()
        (batch,), vocabulary = self.exchange_layouts([batch]), self.vocabulary_shards.vocabulary(with_grad=False)
        _, result = self.ds_engine(
            batch.to(self.device), vocabulary, 0.0, normalizers, self.running_means, self.group, 1.0
        )
        self.ds_engine.train()
        return self.vocabulary_shards.sum_losses(result)

    def end_micro_step(self) -> bool:
        """End a micro-step. At the gradient accumulation boundary, update the weights.

        Returns:
            False, on all ranks, if the gradient norm is not finite and DeepSpeed skipped the update. True if it also
            lowered the loss scale of fp16, with which training continues.
        """
        updates = self.ds_engine.is_gradient_accumulation_boundary()
        if updates:
            for name, gradient in self.vocabulary_shards.gradients().items():
                if self.loss_scale != 1:
                    gradient.mul_(self.loss_scale)
                safe_set_local_grad(self.vocabulary_shards.parameters[name], gradient.flatten())
            order_after_current_stream(self.ds_engine.optimizer)  # fp16's overflow check reads them on another stream
            self.vocabulary_shards.zero_grad()
            self.vocabulary_shards.weights_changed()
        try:
            self.ds_engine.step()
        except Exception as error:  # DeepSpeed raises no narrower type
            if "loss scale already at minimum" not in str(error):
                raise
            return False
        optimizer = self.ds_engine.optimizer
        return bool(not updates or not optimizer.overflow or optimizer.loss_scaler.dynamic)

    def measure_grad_norm(
        self, micro_batches: Sequence[MicroBatch], alignment_weight: float, normalizers: LossNormalizers
    ) -> float | None:
        """Compute the gradient norm of a global batch over all parameters, before clipping, and discard the gradients.

        Call it before the first micro-step of an optimizer step. Random generators and running means have the same
        state afterwards. Collective: all ranks must call it.

        Returns:
            The norm, or None if it is not finite.
        """
        running_means, self.running_means = self.running_means, copy.deepcopy(self.running_means)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for number, batch in enumerate(self.exchange_layouts(list(micro_batches)), 1):
                # DeepSpeed copies gradients into the buffers of an offloaded optimizer only at the boundary.
                self.ds_engine.set_gradient_accumulation_boundary(number == len(micro_batches))
                self.forward_backward(batch, alignment_weight, normalizers)
        squared_norm = distributed.all_reduce_sum([self._local_squared_norm()], self.device)[0]
        self.running_means = running_means
        self.vocabulary_shards.zero_grad()
        self.ds_engine.optimizer.zero_grad()  # the next backward overwrites the partitions instead of adding to them
        self.ds_engine.set_gradient_accumulation_boundary(None)  # count micro-steps again
        return math.sqrt(squared_norm) if math.isfinite(squared_norm) else None

    def _local_squared_norm(self) -> float:
        """Sum the squares of this rank's gradient partitions in float64, after the last micro-step of a batch.

        Collective: all ranks must call it.
        """
        accumulated = {
            id(self.vocabulary_shards.parameters[name]): grad
            for name, grad in self.vocabulary_shards.gradients().items()
        }
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for parameter in self.ds_engine.module.parameters():
            if parameter.requires_grad:
                gradient, scale = accumulated.get(id(parameter)), 1.0
                if gradient is None:
                    gradient, scale = safe_get_local_grad(parameter), self.loss_scale
                total += (torch.linalg.vector_norm(gradient, dtype=torch.float64) / scale) ** 2
        return float(total)

    def checkpoint_files(self, directory: Path, tag: str) -> dict[str, Any]:
        """Collect the files that DeepSpeed would save for this rank in directory/tag.

        Returns:
            {path relative to `directory`: state}. The states are references, not copies.
        """
        return collect_state(self.ds_engine, directory, tag)

    def load_checkpoint(self, directory: Path, tag: str) -> bool:
        """Load weights and optimizer state from directory/tag, but keep the settings of this run's parameter groups.

        The checkpoint contains the settings of the run that saved it, such as its weight decay.

        Returns:
            False if DeepSpeed finds no checkpoint.

        Raises:
            UserError: a file contains more than tensors and plain values, which could run code.
        """
        self.vocabulary_shards.weights_changed(loaded=True)
        return load_state(self.ds_engine, directory, tag)

    def vocabulary_names(self) -> list[str]:
        """Return the names of the parameters whose rows are vocabulary entries."""
        ids = {id(p) for p in self.vocabulary_shards.parameters.values()}
        return [name for name, p in self.ds_engine.module.named_parameters() if id(p) in ids]

    def flops_per_token(self) -> float:
        """Return 6 FLOPs per parameter, or 4 if it is frozen. Vocabulary padding is included."""
        return float(sum((6 if p.requires_grad else 4) * p.ds_numel for p in self.ds_engine.module.parameters()))

    def set_learning_rate(self, value: float, embedding_value: float | None = None) -> None:
        """Set the learning rate, and that of the input embedding if it has its own. See `set_learning_rates`."""
        set_learning_rates(self.ds_engine.optimizer.param_groups, value, embedding_value)

    def grad_norm(self) -> float | None:
        """Return the global gradient norm of the last step before clipping, or None if fp16 overflowed."""
        norm = self.ds_engine.get_global_grad_norm()
        return None if norm is None or not math.isfinite(norm) else float(norm)
