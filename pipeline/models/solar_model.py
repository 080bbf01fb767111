"""A Hugging Face decoder and the SOLAR loss as one module.

Shape letters: B rows, N tokens of a row, T target tokens, d hidden size.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.data.micro_batch import MicroBatch
from pipeline.loss import (
    LossNormalizers,
    LossSettings,
    RunningMeans,
    SolarLoss,
    Vocabulary,
    embedding_lookup,
    solar_loss,
)
from pipeline.models.families import head_config


class SolarModel(nn.Module):
    """Embedding lookup, decoder and loss in one forward pass.

    DeepSpeed requires that the wrapped module's forward computes the loss. Head and input embedding are not used as
    modules: `forward` receives their local rows as a `Vocabulary`.
    """

    def __init__(
        self, model: PreTrainedModel, settings: LossSettings, padded_vocab_size: int, num_languages: int
    ) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.padded_vocab_size, self.num_languages = padded_vocab_size, num_languages
        self.embed_scale = head_config(model).embed_scale

    def forward(
        self,
        batch: MicroBatch,
        vocabulary: Vocabulary,
        alignment_weight: float,
        normalizers: LossNormalizers,
        running_means: RunningMeans | None,
        group: dist.ProcessGroup | None,
        grad_factor: float,
    ) -> tuple[Tensor, SolarLoss]:
        """Compute the loss of one micro-step over all ranks. A collective.

        Args:
            batch: this rank's micro-batch.
            vocabulary: this rank's rows of head and input embedding, with their gradient accumulators.
            alignment_weight: factor of the alignment term.
            normalizers: counts over the global batch that the two terms are divided by.
            running_means: pooled representations to subtract, or None without centering.
            group: the ranks that share the vocabulary, or None for one process.
            grad_factor: factor of the embedding's gradient, see `embedding_lookup`.

        Returns:
            The scalar to call backward on, and the loss with its parts. DeepSpeed attaches its hooks to the former.
        """
        embeddings = embedding_lookup(batch.input_ids, vocabulary.embedding, self.padded_vocab_size, group, grad_factor)
        if self.embed_scale != 1:
            embeddings = embeddings * torch.tensor(self.embed_scale, dtype=embeddings.dtype)
        hidden_BNd = decode(self.model, embeddings, batch.position_ids)
        hidden_Td = hidden_BNd.flatten(0, 1).index_select(0, batch.positions)
        result = solar_loss(
            hidden_Td,
            batch.loss_batch,
            vocabulary,
            self.settings,
            alignment_weight,
            normalizers,
            self.num_languages,
            running_means,
            group,
        )
        return result.loss, result


def decode(model: PreTrainedModel, embeddings: Tensor, position_ids: Tensor) -> Tensor:
    """Run the decoder on packed rows.

    Args:
        model: a causal language model.
        embeddings: [B, N, d] input embeddings.
        position_ids: [B, N] int64; restarting positions separate the sequences of a row in attention.

    Returns:
        [B, N, d] final hidden states.
    """
    # With a cache, transformers ignores that positions restart, and sequences would attend to each other.
    options = {"use_cache": False}
    if model.config._attn_implementation == "flash_attention_2":
        # The variable-length kernel needs all rows as one long row.
        shape = embeddings.shape
        embeddings, position_ids = embeddings.reshape(1, -1, shape[-1]), position_ids.reshape(1, -1)
        return model.get_decoder()(inputs_embeds=embeddings, position_ids=position_ids, **options)[0].view(shape)
    return model.get_decoder()(inputs_embeds=embeddings, position_ids=position_ids, **options)[0]
