"""Check the number of ranks, and whether the model supports the parallelism of the recipe."""

from transformers import PreTrainedConfig

from pipeline.common import distributed
from pipeline.common.errors import AgreedError, UserError
from pipeline.config.settings import Config, TrainingSettings
from pipeline.data.loader import BatchSplit
from pipeline.models.packed_attention import PACKED, resolve_attention


def check_ranks(training: TrainingSettings, padded_size: int, world_size: int) -> None:
    """Check that the padded vocabulary and the batch size are divisible by the world size.

    The ranks that share rows (`training.sequence_parallel_size`) count as one for the batch size.

    Raises:
        UserError: The world size is incompatible; the message lists valid ones.
    """
    if padded_size % world_size:
        sizes = ", ".join(str(n) for n in range(1, 65) if padded_size % n == 0)
        raise UserError(
            f"the padded vocabulary of {padded_size} is not divisible by {world_size} ranks; use {sizes} ranks, "
            f"or set model.vocab_multiple to a multiple of {world_size}"
        )
    micro, parts = training.train_micro_batch_size_per_gpu, training.sequence_parallel_size
    if world_size % parts:
        raise UserError(
            f"training.sequence_parallel_size {parts} does not divide the number of ranks, {world_size}; use a "
            f"multiple of {parts} ranks"
        )
    if training.train_batch_size % (micro * (world_size // parts)):
        fitting = [
            n
            for n in range(parts, 1025, parts)
            if padded_size % n == 0 and training.train_batch_size % (micro * (n // parts)) == 0
        ]
        shared = f" / training.sequence_parallel_size {parts}" if parts > 1 else ""
        raise UserError(
            f"training.train_batch_size {training.train_batch_size} is not a multiple of {world_size} ranks{shared} x "
            f"training.train_micro_batch_size_per_gpu {micro}; "
            + (f"use {', '.join(map(str, fitting))} ranks" if fitting else "lower the micro-batch size")
        )


def check_process_group(split: BatchSplit) -> None:
    """Check that the loader of each rank reads that rank's rows. Collective: all ranks must call it.

    Raises:
        AgreedError: the launcher's variables differ from the process group.
    """
    splits = distributed.all_gather_object((split.rank, split.world_size))
    for rank, (loader_rank, loader_size) in enumerate(splits):
        if (loader_rank, loader_size) != (rank, len(splits)):
            raise AgreedError(
                f"rank {rank} of {len(splits)} reads data as rank {loader_rank} of {loader_size}; "
                "set RANK and WORLD_SIZE in every process, or use torchrun, deepspeed, mpirun or srun"
            )


def check_sequence_parallel(config: Config, model_config: PreTrainedConfig) -> None:
    """Check that a model supports `training.sequence_parallel_size`, as far as its configuration shows.

    Raises:
        UserError: its query heads cannot be divided, or attention does not read the sequence boundaries.
    """
    size = config.training.sequence_parallel_size
    if size == 1:
        return
    attention = resolve_attention(config.model.attn_implementation, model_config)
    if attention != PACKED:
        raise UserError(
            f"training.sequence_parallel_size {size} requires model.attn_implementation {PACKED}, but "
            f"{model_config.model_type} uses {attention} here; set training.sequence_parallel_size to 1"
        )
    heads = getattr(model_config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads % size:
        raise UserError(
            f"training.sequence_parallel_size {size} does not divide the {heads} attention heads of the model; use a "
            "size that does"
        )
