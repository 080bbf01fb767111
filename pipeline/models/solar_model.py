"""Run a Hugging Face decoder and the SOLAR loss in one forward pass.

Shape letters: B rows, N tokens of a row, T supervised positions, V vocabulary, d hidden size.
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
    """Decoder and loss in one forward pass, as DeepSpeed needs it; the vocabulary comes in as shards."""

    def __init__(self, model: PreTrainedModel, settings: LossSettings, padded_size: int, languages: int) -> None:
        super().__init__()
        self.model, self.settings, self.padded_size, self.languages = model, settings, padded_size, languages
        self.embed_scale = head_config(model).embed_scale
        self.parts: SolarLoss | None = None

    def forward(
        self,
        batch: MicroBatch,
        vocabulary: Vocabulary,
        alignment_weight: float,
        normalizers: LossNormalizers,
        running_means: RunningMeans | None,
        group: dist.ProcessGroup | None,
        grad_factor: float,
    ) -> Tensor:
        """The global loss of this micro-step; its parts stay in `self.parts`. grad_factor: see embedding_lookup."""
        embeddings = embedding_lookup(batch.input_ids, vocabulary.embedding, self.padded_size, group, grad_factor)
        if self.embed_scale != 1:
            embeddings = embeddings * torch.tensor(self.embed_scale, dtype=embeddings.dtype)
        hidden = decode(self.model, embeddings, batch.position_ids)
        selected = hidden.flatten(0, 1).index_select(0, batch.positions)
        self.parts = solar_loss(
            selected,
            batch.loss_batch,
            vocabulary,
            self.settings,
            alignment_weight,
            normalizers,
            self.languages,
            running_means,
            group,
        )
        return self.parts.loss


def decode(model: PreTrainedModel, embeddings: Tensor, position_ids: Tensor) -> Tensor:
    """[B, N, d] embeddings to [B, N, d] final hidden states; sequences of a row are told apart by their positions."""
    # With a cache, transformers takes no notice of restarting positions and sequences would see each other.
    options = {"use_cache": False}
    if model.config._attn_implementation == "flash_attention_2":
        # Its variable-length kernel takes one long row.
        shape = embeddings.shape
        embeddings, position_ids = embeddings.reshape(1, -1, shape[-1]), position_ids.reshape(1, -1)
        return model.get_decoder()(inputs_embeds=embeddings, position_ids=position_ids, **options)[0].view(shape)
    return model.get_decoder()(inputs_embeds=embeddings, position_ids=position_ids, **options)[0]
