"""Auxiliary losses and batch transforms of the variants: middle-layer baseline, dictionary oracle, shuffled pairs.

Shape letters: T target tokens, S sequences, d hidden size, W words.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.micro_batch import MicroBatch
from pipeline.experiments.synthetic_benchmark import SYNTHETIC_LANGUAGES, SYNTHETIC_PIVOT, SyntheticBenchmark
from pipeline.models.families import vocabulary_parameter


class MiddleLayerLoss:
    """Alignment loss on the mean hidden states of a layer: weight * mean over pairs of (1 - cosine).

    Pivots are detached.

    Args:
        model: the model, which gets a forward hook that stores the output of the layer.
        weight: factor of the loss.
        layer: number of the layer, counted from 1.
    """

    def __init__(self, model: Any, weight: float, layer: int) -> None:
        self.weight, self._hidden_states = weight, torch.empty(0)
        self._hook = model.get_decoder().layers[layer - 1].register_forward_hook(self._keep)

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
        pivots = means_Sd[loss_batch.pivot[paired]].detach()
        return self.weight * (1 - cosine_similarity(means_Sd[paired], pivots, dim=1)).mean()

    def remove(self) -> None:
        """Remove the forward hook."""
        self._hook.remove()


class DictionaryLoss:
    """Alignment loss on word embeddings with a dictionary: an upper bound for methods that align words.

    The loss is weight * mean over words of the squared distance between the input embeddings of a word and of its
    detached translation in the pivot language, divided by the mean squared norm of the latter.
    """

    def __init__(self, benchmark: SyntheticBenchmark, tokenizer: PreTrainedTokenizerBase, weight: float) -> None:
        def word_ids(lang: str) -> Tensor:
            return torch.tensor(tokenizer.convert_tokens_to_ids(list(benchmark.languages[lang].content_words())))

        others = [lang for lang in SYNTHETIC_LANGUAGES if lang != SYNTHETIC_PIVOT]
        self.weight = weight
        self._words_W = torch.cat([word_ids(lang) for lang in others])
        self._pivots_W = word_ids(SYNTHETIC_PIVOT).repeat(len(others))

    def __call__(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        """Return the scalar loss. It does not depend on the batch."""
        matrix = vocabulary_parameter(model.get_input_embeddings())
        words_Wd = matrix[self._words_W.to(matrix.device)]
        pivots_Wd = matrix[self._pivots_W.to(matrix.device)].detach()
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
