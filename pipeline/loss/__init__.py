"""The SOLAR loss: cross entropy plus soft-token alignment, as a dense reference and on vocabulary shards."""

from .alignment import RunningMeans
from .embedding import DistinctIds, LookupRoute, embedding_lookup
from .head_time import BYTES_ONLY, ClusterSpeeds
from .hidden_states import add_hidden_state_alignment
from .layout import LayoutExchange
from .library import alignment_sft_loss, target_tokens
from .loss_batch import LossBatch, LossNormalizers
from .reference import solar_loss_reference
from .settings import LossSettings
from .vocab_parallel import SolarLoss, solar_loss
from .vocabulary import Vocabulary, VocabularyShard, vocabulary_range

__all__ = [
    "BYTES_ONLY",
    "ClusterSpeeds",
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
    "add_hidden_state_alignment",
    "alignment_sft_loss",
    "embedding_lookup",
    "solar_loss",
    "solar_loss_reference",
    "target_tokens",
    "vocabulary_range",
]
