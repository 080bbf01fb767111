"""Fine-tune with FSDP2 (`fully_shard`) and the SOLAR loss, on shards of `python -m data_prep pack`.

torchrun --nproc-per-node 8 examples/fsdp2.py --model MODEL --shards SHARDS --steps 100 --rows_per_rank 1
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from data_prep.shards.format import ShardSet
from pipeline.data.loader import BatchSplit, Loader
from pipeline.loss import LossSettings, alignment_sft_loss
from pipeline.models.families import head_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows_per_rank", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dist.init_process_group()
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    # In bf16, the weights would not change by updates of this size.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    operations = head_config(model)
    if operations.bias is not None:
        parser.error(f"{args.model}: has an LM head with a bias, which the loss does not support")
    tied = operations.tied
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model, mesh=mesh)  # includes the input embedding
    if not tied:
        fully_shard(model.lm_head, mesh=mesh)  # never gathered, because its forward never runs

    shards = ShardSet.open(Path(args.shards))
    split = BatchSplit(args.rows_per_rank * mesh.size(), args.rows_per_rank, mesh.get_rank(), mesh.size())
    loader = Loader(shards, split, args.seed, shards.manifest["tokenizer"]["pad_token_id"])
    embedding = model.get_input_embeddings().weight
    head = embedding if tied else model.lm_head.weight
    trained = [*model.model.parameters(), *([] if tied else [head])]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    for step in range(args.steps):
        (batch,) = (micro_batch.to(device) for micro_batch in loader.next())
        hidden = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)[0]
        loss, _ = alignment_sft_loss(
            hidden.flatten(0, 1)[batch.positions],
            batch.loss_batch,
            head,
            embedding,
            LossSettings(),
            languages=len(loader.languages),
            logit_scale=operations.logit_scale,
            softcap=operations.softcap,
            group=mesh.get_group(),
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if mesh.get_rank() == 0:
            print(f"step {step + 1} loss {loss.item():.7f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
