"""Variants of the prediction, compared by `pipeline.benchmarks.scale`.

`full_logits` is plain ZeRO-3: full logits in memory, gradients by autograd, and vocabulary matrices gathered like all
other parameters. `one_by_one` differs from this project's step only in that DeepSpeed gathers each persistent parameter
in its own collective after the optimizer update.
"""

from dataclasses import replace
from functools import cached_property

from pipeline.loss import LossSettings
from pipeline.plan.memory import MemoryEstimate, estimate_memory
from pipeline.plan.prediction import Prediction
from pipeline.plan.step_time import StepWork
from pipeline.plan.traffic import Transfer
from pipeline.plan.workload import PlannedRun


class OneByOnePrediction(Prediction):
    """Prediction with one collective per persistent parameter."""

    @cached_property
    def work(self) -> StepWork:
        work = super().work
        return replace(work, transfers=[_one_by_one(t, self.run) for t in work.transfers])


class FullLogitsPrediction(Prediction):
    """Prediction for plain DeepSpeed ZeRO-3 with full logits."""

    @cached_property
    def memory(self) -> MemoryEstimate:
        estimate = estimate_memory(self.run)
        not_sharded = ("vocabulary gradients", "vocabulary")
        states = {name: size for name, size in estimate.states.items() if name not in not_sharded}
        shared = {name: estimate.loss[name] for name in ("activations", "gathered parameters")}
        return replace(estimate, states=states, loss=shared | _full_logits_bytes(self.run))

    @cached_property
    def work(self) -> StepWork:
        run, work = self.run, super().work
        transfers = [_one_by_one(t, run) for t in work.transfers if t.name not in ("loss", "input embeddings")]
        if run.ranks > 1:
            transfers.append(_vocabulary_transfer(run))
        target_tokens = run.micro_batch_size * run.workload.target_tokens
        product = 2.0 * run.stats.vocab_size * run.stats.hidden_size
        loss = 3 * product * run.micro_batch_tokens
        if run.config.loss.alignment_weight:
            loss += 3 * product * target_tokens
        logits_bytes = LossSettings(top_k=None).logit_passes * target_tokens * run.stats.vocab_size * run.element_size
        return StepWork(replace(work.flops, loss=loss), logits_bytes, transfers)


def _one_by_one(transfer: Transfer, run: PlannedRun) -> Transfer:
    if transfer.name != "persistent parameters":
        return transfer
    calls = len(run.persistent_sizes)
    return replace(transfer, calls=calls, hops=(run.ranks - 1) * calls)


def _vocabulary_transfer(run: PlannedRun) -> Transfer:
    """Estimate gathering the vocabulary matrices for each use and reducing their gradient once per micro-step."""
    others, steps = run.ranks - 1, run.gradient_accumulation_steps
    collectives = 5 if run.stats.tied else 3  # a tied matrix is used at both ends of the model
    received = steps * others / run.ranks * sum(run.stats.vocabulary) * run.element_size * collectives
    calls = steps * collectives
    return Transfer("vocabulary", received, calls, others * calls, "ring", "layers")


def _full_logits_bytes(run: PlannedRun) -> dict[str, int]:
    """Estimate the memory of full logits with autograd.

    Forward holds the logits, log-softmax and softmax. Backward also holds their gradients.
    """
    tokens, target_tokens = run.micro_batch_tokens, run.micro_batch_size * run.workload.target_tokens
    vocab, e = run.stats.vocab_size, run.element_size
    half = e if e < 4 else 0  # a copy in the compute dtype
    forward = tokens * vocab * e + target_tokens * vocab * (12 + half)
    backward = target_tokens * vocab * (20 + 2 * half)
    gathered = vocab * run.stats.hidden_size * e * (1 if run.stats.tied else 2) if run.ranks > 1 else 0
    return {
        "logits": round(max(forward, backward)),
        "gathered vocabulary": gathered,
        "gradient of the head": vocab * run.stats.hidden_size * e,  # complete, before it is reduced
    }
