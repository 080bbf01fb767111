"""Everything DeepSpeed: its configuration, the ZeRO-3 engine, the vocabulary shards in it and their gradients home.

ZeRO-3 cuts a [P, d] parameter into R equal flat pieces, so rank r's piece is rows [r*P/R, (r+1)*P/R) of it. The
loss and the embedding lookup work on these rows in place; what they add up is handed to DeepSpeed between backward
and step, so that clipping, offload and overflow checks see it like any other gradient.

Shape letters: P padded vocabulary, R ranks, d hidden size.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import safe_set_local_grad
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from pipeline.common.distributed import local_device, rank, world_size
from pipeline.config.settings import Config
from pipeline.data.micro_batch import MicroBatch
from pipeline.data.token_table import load_token_table
from pipeline.loss import LossNormalizers, RunningMeans, SolarLoss, Vocabulary, VocabularyShard, vocabulary_range
from pipeline.models.families import head_config, vocabulary_parameter
from pipeline.models.param_groups import adamw_arguments
from pipeline.models.solar_model import SolarModel
from pipeline.zero3.persistent_parameters import gather_together_after_steps


def start_process_group(timeout: float = 1800) -> None:
    """Join the ranks that the launcher (deepspeed, srun with torchrun's variables, mpirun) has started.

    `timeout`: seconds that a collective may take; a minute is added, so that the watchdog speaks first.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(seconds=timeout + 60))


def build_sharded(ds: dict[str, Any], build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Build or load a model so that each rank keeps only its pieces; the full model exists nowhere."""
    # transformers looks for a live object of this class, and builds under deepspeed.zero.Init while there is one.
    live = HfDeepSpeedConfig(ds)
    model = build()
    del live
    return model


class StateCollector(TorchCheckpointEngine):
    """In place of DeepSpeed's own writer: keeps what a save would write, {path: state}, for the saver."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing touches the disk here: a full one on one rank would leave the others waiting."""

    def save(self, state_dict: Any, path: str) -> None:
        self.files[path] = state_dict


class ZeroEngine:
    """A model under ZeRO-3 whose head and input embedding never leave their ranks.

    Attributes:
        engine: the DeepSpeed engine. vocab_size, padded_size: rows of the vocabulary, real and padded.
        centres: running mean summaries, where the settings centre.
    """

    def __init__(
        self,
        config: Config,
        ds: dict[str, Any],
        model: PreTrainedModel,
        vocab_size: int,
        languages: int,
        gather_together: bool = True,
    ):
        """`gather_together`: the persistent parameters after a step; False, for comparison: as DeepSpeed does it."""
        embedding = vocabulary_parameter(model.get_input_embeddings())
        shape = getattr(embedding, "ds_shape", embedding.shape)
        self.padded_size, self.hidden_size = int(shape[0]), int(shape[1])
        self.vocab_size, self.ranks, self.rank = vocab_size, world_size(), rank()
        self.group = dist.group.WORLD if self.ranks > 1 else None
        module = SolarModel(model, config.loss, self.padded_size, languages)
        optimizer = _optimizer(config, ds, module)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds)
        if gather_together:
            gather_together_after_steps(self.engine.optimizer.persistent_parameters)
        self.device = self.engine.device
        self.engine.checkpoint_engine = StateCollector()
        self.engine._copy_recovery_script = lambda path: None  # pipeline.export does what that script does
        self._facts = head_config(model)
        self._parameters = {"embedding": embedding}
        if not self._facts.tied:
            self._parameters["head"] = vocabulary_parameter(model.get_output_embeddings())
        if self._facts.bias is not None:
            self._parameters["bias"] = self._facts.bias
        self._grad_accumulators = {name: self._accumulator(p) for name, p in self._parameters.items()}
        self._weights = self._own_rows(
            load_token_table(config.loss.vocabulary_weights, vocab_size, "loss.vocabulary_weights")
        )
        self.running_means = (
            RunningMeans.zeros(languages, self.hidden_size, self.device) if config.loss.centring else None
        )

    def _accumulator(self, parameter: nn.Parameter) -> Tensor:
        """fp32 zeros in the shape of this rank's rows; checks that the piece is whole rows."""
        piece, columns = parameter.ds_tensor, parameter.ds_shape[1:].numel()  # type: ignore[attr-defined]
        rows = self.padded_size // self.ranks
        if piece.numel() != rows * columns:
            raise RuntimeError(f"ZeRO-3 piece of {piece.numel()} elements where {rows} x {columns} were expected")
        return torch.zeros(rows, *parameter.ds_shape[1:], device=self.device)  # type: ignore[attr-defined]

    def _own_rows(self, weights: Tensor | None) -> Tensor | None:
        start, end = vocabulary_range(self.vocab_size, self.padded_size, self.rank, self.ranks)
        return None if weights is None else weights[start:end].to(self.device)

    def vocabulary(self) -> Vocabulary:
        """This rank's rows as they are now, with their accumulators."""
        start, end = vocabulary_range(self.vocab_size, self.padded_size, self.rank, self.ranks)

        def rows(name: str) -> tuple[Tensor, Tensor]:
            piece, total = getattr(self._parameters[name], "ds_tensor"), self._grad_accumulators[name]  # noqa: B009
            return piece.detach().to(self.device).view(total.shape)[: end - start], total[: end - start]

        def shard(name: str) -> VocabularyShard:
            weight, total = rows(name)
            return VocabularyShard(weight, start, total)

        embedding = shard("embedding")
        head = embedding if self._facts.tied else shard("head")
        bias, bias_grad = rows("bias") if self._facts.bias is not None else (None, None)
        return Vocabulary(
            self.vocab_size,
            head,
            embedding,
            bias=bias,
            bias_grad=bias_grad,
            logit_scale=self._facts.logit_scale,
            softcap=self._facts.softcap,
            weights=self._weights,
        )

    @property
    def loss_scale(self) -> float:
        """fp16's factor on the loss; 1 otherwise."""
        return float(self.engine.optimizer.loss_scale) if self.engine.fp16_enabled() else 1.0

    def forward_backward(self, batch: MicroBatch, alignment_weight: float, normalizers: LossNormalizers) -> SolarLoss:
        """One micro-step: all ranks' loss, this rank's gradients."""
        loss = self.engine(
            batch.to(self.device),
            self.vocabulary(),
            alignment_weight,
            normalizers,
            self.running_means,
            self.group,
            # DeepSpeed averages over ranks and scales for fp16; the shards' gradients are exact as they are.
            1.0 / (self.ranks * self.loss_scale),
        )
        self.engine.backward(loss * self.ranks, scale_wrt_gas=False)
        parts = self.engine.module.parts
        assert parts is not None
        return parts

    def end_micro_step(self) -> bool:
        """Tell DeepSpeed; at the accumulation boundary hand over the vocabulary's gradients and update the weights.

        Returns False, on all ranks, where the gradients' norm is not finite: DeepSpeed has left the weights as they
        were. With fp16 that is no fault: it lowers the loss scale and goes on.
        """
        if self.engine.is_gradient_accumulation_boundary():
            for name, parameter in self._parameters.items():
                safe_set_local_grad(parameter, self._grad_accumulators[name].mul_(self.loss_scale).flatten())
                self._grad_accumulators[name].zero_()
        self.engine.step()
        return self.engine.fp16_enabled() or not self.engine.optimizer.overflow

    def gradients_finite(self, batch: MicroBatch, alignment_weight: float, normalizers: LossNormalizers) -> bool:
        """Repeat a micro-step on all ranks: are this rank's own gradients of the decoder, before their sum, finite?"""
        finite: list[Tensor] = []
        hooks = [
            p.register_hook(lambda gradient: finite.append(gradient.isfinite().all()))
            for p in self.engine.module.parameters()
            if p.requires_grad
        ]
        try:
            self.forward_backward(batch, alignment_weight, normalizers)
        finally:
            for hook in hooks:
                hook.remove()
        return all(bool(one) for one in finite)

    def state_files(self, directory: Path, tag: str) -> dict[str, Any]:
        """What DeepSpeed saves of this rank under directory/tag: {name within directory: state}; not copies."""
        collector = self.engine.checkpoint_engine
        self.engine.save_checkpoint(str(directory), tag=tag, save_latest=False)
        files, collector.files = collector.files, {}
        return {str(Path(name).relative_to(directory)): state for name, state in files.items()}

    def load(self, directory: Path, tag: str) -> bool:
        """Weights and optimizer from DeepSpeed's files in directory/tag; False where it finds none."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.engine.optimizer.param_groups]
        loaded, _ = self.engine.load_checkpoint(str(directory), tag=tag)
        if loaded is not None and self.engine.load_universal_checkpoint():
            self._mend_universal(groups)
        return loaded is not None

    def _mend_universal(self, groups: list[dict[str, Any]]) -> None:
        """DeepSpeed 0.19 gives all groups the first one's settings, and all parameters one and the same step count."""
        optimizer = self.engine.optimizer.optimizer
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group.update(own)
        fused = bool(optimizer.param_groups[0].get("fused"))
        for parameter, state in optimizer.state.items():
            step = float(state["step"])
            if isinstance(optimizer, deepspeed.ops.adam.DeepSpeedCPUAdam):
                state["step"] = int(step)
            else:
                state["step"] = torch.tensor(step, device=parameter.device if fused else "cpu")

    @property
    def tied(self) -> bool:
        return self._facts.tied

    def vocabulary_names(self) -> list[str]:
        """Names of the parameters whose rows are vocabulary entries."""
        ids = {id(p) for p in self._parameters.values()}
        return [name for name, p in self.engine.module.named_parameters() if id(p) in ids]

    def num_parameters(self) -> int:
        """Of the whole model, vocabulary padding included."""
        return sum(p.ds_numel for p in self.engine.module.parameters())

    def set_learning_rate(self, value: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = value

    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step, before clipping; None where DeepSpeed skipped it (fp16 overflow)."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)


def _optimizer(config: Config, ds: dict[str, Any], module: nn.Module) -> torch.optim.Optimizer:
    """AdamW without weight decay on vectors; DeepSpeed's own on the CPU where the optimizer is offloaded."""
    groups, options = adamw_arguments(module, config.training)
    if ds["zero_optimization"].get("offload_optimizer", {}).get("device") in ("cpu", "nvme"):
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=local_device().type == "cuda", **options)
