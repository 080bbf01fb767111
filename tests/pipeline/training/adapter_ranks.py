"""Train recipes one after the other on the ranks of this process group, and print the losses. Not a test."""

import json
import sys

import torch

from pipeline.common import distributed
from pipeline.config.recipe import load_config
from pipeline.data.micro_batch import local_normalizers
from pipeline.loss import LossNormalizers
from pipeline.training.loop import train_step
from pipeline.training.preflight import prepare_run
from pipeline.training.schedules import alignment_weight, learning_rate
from pipeline.training.start import setup_engine
from pipeline.training.state import TrainState
from pipeline.zero3.process_group import start_process_group


def run_rank(recipes: list[str]) -> None:
    """Train each recipe to its last step without checkpoints. Rank 0 prints a JSON line for each."""
    torch.set_num_threads(1)
    start_process_group()
    for recipe in recipes:
        run = prepare_run(load_config(recipe, []), distributed.rank(), distributed.world_size())
        engine, state, records = setup_engine(run), TrainState(), []
        for step in range(run.max_steps):
            micro_batches = run.loader.next()
            local = local_normalizers(micro_batches)
            normalizers = LossNormalizers(*distributed.all_reduce_sum([local.tokens, local.pairs], engine.device))
            engine.set_learning_rate(learning_rate(run.config.training, step, run.max_steps))
            weight = alignment_weight(run.config.loss, step, run.max_steps)
            results = train_step(engine, micro_batches, weight, normalizers, state)
            records.append([sum(float(result.loss.detach()) for result in results), engine.grad_norm()])
        engine.ds_engine.destroy()
        if distributed.is_main_process():
            print(json.dumps({"recipe": recipe, "records": records}), flush=True)
    distributed.shut_down()


if __name__ == "__main__":
    run_rank(sys.argv[1:])
