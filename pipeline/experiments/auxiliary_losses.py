"""Auxiliary losses and batch transforms of the variants: middle layer, target tokens, dictionary, shuffled pairs.

Shape letters: T target tokens, S sequences, d hidden size, W words, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.micro_batch import MicroBatch
from pipeline.experiments.measure import word_averages
from pipeline.experiments.plan import MiddleLayer
from pipeline.experiments.synthetic_benchmark import SYNTHETIC_LANGUAGES, SYNTHETIC_PIVOT, SyntheticBenchmark
from pipeline.models.families import vocabulary_parameter


class MiddleLayerLoss:
    """Alignment loss on the mean hidden states of a layer, with the settings of `MiddleLayer`.

    Without a temperature the loss is weight * mean over pairs of (1 - cosine), with detached pivots. With one, it is
    the contrastive loss of mid-align (arXiv 2502.14830): weight * mean over pairs of the cross entropy of the pair's
    pivot among all pivots of the batch, with logits cosine / temperature, and with gradients to both sides.

    Args:
        model: the model, which gets a forward hook that stores the output of the layer.
        settings: weight, layer and temperature.
    """

    def __init__(self, model: Any, settings: MiddleLayer) -> None:
        self.settings, self._hidden_states = settings, torch.empty(0)
        self._hook = model.get_decoder().layers[settings.layer - 1].register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        self._hidden_states = output[0] if isinstance(output, tuple) else output

    def __call__(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        """Return the scalar loss for the last forward pass of the model."""
        loss_batch = batch.loss_batch.to(self._hidden_states.device)
        hidden_Td = self._hidden_states.flatten(0, 1).index_select(0, batch.positions)
        sums_Sd = hidden_Td.new_zeros(len(loss_batch.lengths), hidden_Td.shape[1])
        means_Sd = sums_Sd.index_add(0, loss_batch.sequence_of_token(), hidden_Td) / loss_batch.lengths[:, None]
        paired = loss_batch.paired()
        if not paired.any():
            return hidden_Td.new_zeros(())
        if self.settings.temperature is None:
            pivots_Sd = means_Sd[loss_batch.pivot[paired]].detach()
            return self.settings.weight * (1 - cosine_similarity(means_Sd[paired], pivots_Sd, dim=1)).mean()
        pivots, pivot_of_pair = loss_batch.pivot[paired].unique(return_inverse=True)
        logits = normalize(means_Sd[paired]) @ normalize(means_Sd[pivots]).T / self.settings.temperature
        return self.settings.weight * cross_entropy(logits, pivot_of_pair)

    def remove(self) -> None:
        """Remove the forward hook."""
        self._hook.remove()


class HardTokenLoss:
    """Alignment loss of the target tokens: weight * the loss with `pooling_tokens: hard`, as a second term.

    Args:
        weight: factor of the loss.
        vocabulary_weights: [V] weight of each vocabulary entry.
    """

    def __init__(self, weight: float, vocabulary_weights: Tensor) -> None:
        self.weight, self._weights_V = weight, vocabulary_weights

    def __call__(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        """Return the scalar loss."""
        matrix = vocabulary_parameter(model.get_input_embeddings())
        loss_batch = batch.loss_batch.to(matrix.device)
        tokens_Td = self._weights_V.to(matrix)[loss_batch.targets, None] * matrix[loss_batch.targets]
        # The cosine does not depend on the norm, so the sum is as good as the mean.
        sums_Sd = matrix.new_zeros(len(loss_batch.lengths), matrix.shape[1])
        sums_Sd = sums_Sd.index_add(0, loss_batch.sequence_of_token(), tokens_Td)
        paired = loss_batch.paired()
        if not paired.any():
            return matrix.new_zeros(())
        pivots_Sd = sums_Sd[loss_batch.pivot[paired]].detach()
        return self.weight * (1 - cosine_similarity(sums_Sd[paired], pivots_Sd, dim=1)).mean()


class DictionaryLoss:
    """Alignment loss on word embeddings with a dictionary: a reference for methods that align words.

    The loss is weight * mean over words of the squared distance between the input embeddings of a word and of its
    detached translation in the pivot language, divided by the mean squared norm of the latter. The embedding of a word
    is the mean over its tokens.
    """

    def __init__(self, benchmark: SyntheticBenchmark, tokenizer: PreTrainedTokenizerBase, weight: float) -> None:
        def averages(lang: str) -> Tensor:
            return word_averages(tokenizer, benchmark.languages[lang].content_words())

        others = [lang for lang in SYNTHETIC_LANGUAGES if lang != SYNTHETIC_PIVOT]
        self.weight = weight
        self._words_WV = torch.cat([averages(lang) for lang in others])
        self._pivots_WV = averages(SYNTHETIC_PIVOT).repeat(len(others), 1)

    def __call__(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        """Return the scalar loss. It does not depend on the batch."""
        matrix = vocabulary_parameter(model.get_input_embeddings())
        words_Wd = self._words_WV.to(matrix) @ matrix
        pivots_Wd = self._pivots_WV.to(matrix) @ matrix.detach()
        return self.weight * ((words_Wd - pivots_Wd) ** 2).sum(1).mean() / (pivots_Wd**2).sum(1).mean()


def shuffle_pairs(batch: MicroBatch) -> MicroBatch:
    """Pair each translation with the pivot of the next example group in the batch.

    The number of pairs stays the same, but no pair is correct.
    """
    loss_batch = batch.loss_batch
    own = torch.arange(len(loss_batch.pivot))
    translations = loss_batch.pivot != own
    pivots = loss_batch.pivot[translations].unique()  # of the groups with translations, in order
    next_pivot = torch.empty_like(own)
    next_pivot[pivots] = pivots.roll(-1)
    pivot = torch.where(translations, next_pivot[loss_batch.pivot], loss_batch.pivot)
    # A pivot may now come after its translation. The loss allows this if the whole batch is one alignment chunk.
    problem_id = torch.where(translations, loss_batch.problem_id[pivot], loss_batch.problem_id)
    return replace(batch, loss_batch=replace(loss_batch, pivot=pivot, problem_id=problem_id))
