"""The SOLAR loss: cross entropy plus soft-token alignment, as a dense reference and on vocabulary shards."""

from pipeline.loss.alignment import RunningMeans
from pipeline.loss.embedding import DistinctIds, LookupRoute, embedding_lookup
from pipeline.loss.layout import LayoutExchange
from pipeline.loss.library import alignment_sft_loss, target_tokens
from pipeline.loss.loss_batch import LossBatch, LossNormalizers
from pipeline.loss.reference import solar_loss_reference
from pipeline.loss.settings import LossSettings
from pipeline.loss.vocab_parallel import SolarLoss, solar_loss
from pipeline.loss.vocabulary import Vocabulary, VocabularyShard, vocabulary_range

__all__ = [
    "DistinctIds",
    "LayoutExchange",
    "LookupRoute",
    "LossBatch",
    "LossNormalizers",
    "LossSettings",
    "RunningMeans",
    "SolarLoss",
    "Vocabulary",
    "VocabularyShard",
    "alignment_sft_loss",
    "embedding_lookup",
    "solar_loss",
    "solar_loss_reference",
    "target_tokens",
    "vocabulary_range",
]
