"""A module that combines a Hugging Face decoder with the SOLAR loss.

Shape letters: B rows, N tokens of a row, T target tokens, d hidden size.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.data.micro_batch import MicroBatch
from pipeline.loss import (
    BYTES_ONLY,
    ClusterSpeeds,
    LossNormalizers,
    LossSettings,
    RunningMeans,
    SolarLoss,
    Vocabulary,
    add_hidden_state_alignment,
    embedding_lookup,
    solar_loss,
)
from pipeline.models.families import head_config
from pipeline.models.middle_layer import aligned_layer, record_output
from pipeline.models.packed_attention import MASKED, sequence_arguments
from pipeline.models.sequence_parallel import HeadExchange


class SolarModel(nn.Module):
    """Module that runs embedding lookup, decoder and loss in one forward pass.

    DeepSpeed requires that the forward of the wrapped module computes the loss. Head and input embedding are not used
    as modules. Instead, `forward` receives their local rows as a `Vocabulary`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: LossSettings,
        padded_vocab_size: int,
        num_languages: int,
        speeds: ClusterSpeeds = BYTES_ONLY,
        head_exchange: HeadExchange | None = None,
    ) -> None:
        super().__init__()
        self.head_exchange = head_exchange
        self.model, self.settings, self.speeds = model, settings, speeds
        self.padded_vocab_size, self.num_languages = padded_vocab_size, num_languages
        self.embed_scale = head_config(model).embed_scale
        self.layer = aligned_layer(settings, len(model.get_decoder().layers))

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
        """Compute the loss of one micro-step over all ranks. Collective: all ranks must call it.

        Args:
            batch: this rank's micro-batch.
            vocabulary: this rank's rows of head and input embedding, with their gradient accumulators.
            alignment_weight: weight of the alignment loss.
            normalizers: divisors of the two loss terms, counted over the global batch.
            running_means: means to subtract from the pooled representations, or None to disable centering.
            group: process group that shards the vocabulary, or None for a single process without one (not the default
                group, as in torch.distributed).
            grad_factor: factor of the embedding gradient, see `embedding_lookup`.

        Returns:
            The scalar loss to call `backward()` on (DeepSpeed attaches its hooks to it), and the `SolarLoss` with its
            parts.
        """
        embeddings = embedding_lookup(
            batch.input_ids, vocabulary.embedding, self.padded_vocab_size, group, grad_factor, batch.route
        )
        if self.embed_scale != 1:
            embeddings = embeddings * torch.tensor(self.embed_scale, dtype=embeddings.dtype)
        hidden_Td, layer_Td = self._hidden_states(embeddings, batch)
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
            self.speeds,
        )
        if layer_Td is not None:
            add_hidden_state_alignment(
                result,
                layer_Td,
                batch.loss_batch,
                self.settings,
                alignment_weight,
                normalizers,
                running_means,
                group,
            )
        return result.loss, result

    def _hidden_states(self, embeddings: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Return the [T, d] hidden states of the last layer and, if they are aligned, those of a middle layer."""
        if self.layer is None:
            states, outputs = decoder_hidden_states(self.model, embeddings, batch, self.head_exchange), []
        else:
            with record_output(self.model.get_decoder().layers[self.layer - 1]) as outputs:
                states = decoder_hidden_states(self.model, embeddings, batch, self.head_exchange)
        last, *middle = (x.flatten(0, 1).index_select(0, batch.positions) for x in (states, *outputs))
        return last, middle[0] if middle else None


def decoder_hidden_states(
    model: PreTrainedModel, embeddings: Tensor, batch: MicroBatch, head_exchange: HeadExchange | None = None
) -> Tensor:
    """Run the decoder on packed rows.

    Args:
        model: a causal language model.
        embeddings: [B, N, d] input embeddings.
        batch: the micro-batch of the embeddings.
        head_exchange: exchange of the ranks that share the rows, or None if this rank holds whole rows.

    Returns:
        [B, N, d] final hidden states.
    """
    # With a cache, transformers ignores restarting positions, and sequences would attend to each other.
    decoder, implementation = model.get_decoder(), model.config._attn_implementation
    if implementation in MASKED:
        return decoder(inputs_embeds=embeddings, position_ids=batch.position_ids, use_cache=False)[0]
    arguments = sequence_arguments(batch, implementation)
    if head_exchange is not None:
        arguments["head_exchange"] = head_exchange
    # Implementations without a mask require all rows concatenated into one.
    hidden = decoder(
        inputs_embeds=embeddings.flatten(0, 1)[None],
        position_ids=batch.position_ids.flatten()[None],
        use_cache=False,
        **arguments,
    )[0]
    return hidden.view(embeddings.shape)
