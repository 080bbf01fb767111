"""What arms of the experiment add beside the SOLAR loss: a rival term, an oracle, and a control with wrong pairs.

Shape letters: T supervised positions, S sequences, d hidden size, N words.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.micro_batch import MicroBatch
from pipeline.experiments.world import LANGUAGES, PIVOT, World
from pipeline.models.families import vocabulary_parameter


class MiddleLayer:
    """weight x mean over pairs of 1 - cosine between mean hidden states [d] after a layer, the pivot's detached."""

    def __init__(self, model: Any, weight: float, layer: int) -> None:
        self.weight, self.states = weight, torch.empty(0)
        self._hook = model.get_decoder().layers[layer - 1].register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        self.states = output[0] if isinstance(output, tuple) else output

    def __call__(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        """Of the forward pass just done."""
        loss_batch = batch.loss_batch.to(self.states.device)
        selected = self.states.flatten(0, 1).index_select(0, batch.positions)
        sums = selected.new_zeros(len(loss_batch.lengths), selected.shape[1])
        means = sums.index_add(0, loss_batch.sequence_of_token(), selected) / loss_batch.lengths[:, None]
        paired = loss_batch.paired()
        if not paired.any():
            return selected.new_zeros(())
        pivots = means[loss_batch.pivot[paired]].detach()
        return self.weight * (1 - cosine_similarity(means[paired], pivots, dim=1)).mean()

    def remove(self) -> None:
        self._hook.remove()


class Dictionary:
    """weight x mean over words of the squared distance of input embeddings to the pivot word's, relative to its norm.

    An oracle: it is told which word translates which, and bounds what aligning words can do.
    """

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerBase, weight: float) -> None:
        def ids(code: str) -> Tensor:
            return torch.tensor(tokenizer.convert_tokens_to_ids(list(world.languages[code].content_words())))

        others = [code for code in LANGUAGES if code != PIVOT]
        self.weight = weight
        self.words = torch.cat([ids(code) for code in others])
        self.pivots = ids(PIVOT).repeat(len(others))

    def __call__(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        matrix = vocabulary_parameter(model.get_input_embeddings())
        words, pivots = matrix[self.words.to(matrix.device)], matrix[self.pivots.to(matrix.device)].detach()
        return self.weight * ((words - pivots) ** 2).sum(1).mean() / (pivots**2).sum(1).mean()


def shuffle_pairs(batch: MicroBatch) -> MicroBatch:
    """Each translation's pivot becomes that of the next problem in the batch: as many pairs, none of them right."""
    loss_batch = batch.loss_batch
    own = torch.arange(len(loss_batch.pivot))
    translations = loss_batch.pivot != own
    pivots = loss_batch.pivot[translations].unique()  # of groups that have translations, in order
    following = torch.empty_like(own)
    following[pivots] = pivots.roll(-1)
    moved = torch.where(translations, following[loss_batch.pivot], loss_batch.pivot)
    # A pivot may now stand after its translation, which is well where the whole batch is one block of the loss.
    problem_id = torch.where(translations, loss_batch.problem_id[moved], loss_batch.problem_id)
    return replace(batch, loss_batch=replace(loss_batch, pivot=moved, problem_id=problem_id))
