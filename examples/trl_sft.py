"""Fine-tune with TRL's SFTTrainer and the SOLAR loss, on shards of `python -m data_prep pack`. Options are SFTConfig's.

torchrun --nproc-per-node 8 examples/trl_sft.py --model MODEL --shards SHARDS --output_dir OUTPUT --learning_rate 1e-5
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from data_prep.shards.format import PackedRow, read_manifest
from pipeline.data.loader import epoch_order
from pipeline.data.micro_batch import collate
from pipeline.loss import LossSettings, alignment_sft_loss
from pipeline.models.families import head_config


@dataclass
class Arguments:
    model: str
    shards: str
    alignment_weight: float = 1.0


class SolarTrainer(SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        batch, causal_lm = inputs["batch"], self.accelerator.unwrap_model(model)
        fields = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        out = model(**fields, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        hidden = out.hidden_states[-1].flatten(0, 1)[batch.positions]
        head, embedding = causal_lm.lm_head.weight, causal_lm.get_input_embeddings().weight
        options = {
            "group": dist.group.WORLD if dist.is_initialized() else None,
            "logit_scale": self.head_config.logit_scale,
            "softcap": self.head_config.softcap,
        }
        return alignment_sft_loss(hidden, batch.loss_batch, head, embedding, self.loss_settings, **options)[0]


def main() -> None:
    arguments, config = HfArgumentParser((Arguments, SFTConfig)).parse_args_into_dataclasses()
    config.remove_unused_columns, config.dataset_kwargs = False, {"skip_prepare_dataset": True}
    config.train_sampling_strategy, config.max_length = "sequential", None
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")  # TRL computes in bf16 by default
    rows = load_dataset("parquet", data_files=f"{arguments.shards}/*.parquet", split="train").with_format("numpy")
    rows = rows.select(epoch_order(len(rows), None, config.seed, 0))  # the order of pipeline/train.py
    languages = list(read_manifest(Path(arguments.shards))["languages"])

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"batch": collate([PackedRow(**row) for row in rows], languages, tokenizer.pad_token_id)}

    trainer = SolarTrainer(model, config, collator, rows, processing_class=tokenizer)
    trainer.loss_settings = LossSettings(alignment_weight=arguments.alignment_weight)
    trainer.head_config = head_config(model)
    if trainer.head_config.bias is not None:
        sys.exit(f"error: {arguments.model}: has an LM head with a bias, which the loss does not support")
    trainer.train()


if __name__ == "__main__":
    main()
