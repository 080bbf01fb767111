"""`--dry_run`: what a run would be, from its recipe, shards and model configuration alone; no weights, no GPU."""

from typing import Any

from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from rich.console import Console
from rich.table import Table

from pipeline.model import meta_model, vocabulary_parameter
from pipeline.prepare import Prepared, describe


def dry_run(prepared: Prepared, ds: dict[str, Any], ranks: int, ranks_per_node: int) -> None:
    """Print parameter counts, tokens and pairs per step, steps, and ZeRO-3 memory per rank."""
    prepared.model_config.vocab_size = prepared.padded_size
    model = meta_model(prepared.model_config)
    total = sum(p.numel() for p in model.parameters())
    ends = [vocabulary_parameter(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    vocabulary = {id(weight): weight.numel() for weight in ends}
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    zero = ds["zero_optimization"]
    cpu, device, _ = estimate_zero3_model_states_mem_needs(
        total,
        largest,
        num_gpus_per_node=ranks_per_node,
        num_nodes=max(1, ranks // ranks_per_node),
        cpu_offload=zero.get("offload_optimizer", {}).get("device") == "cpu",
        cpu_offload_params=zero.get("offload_param", {}).get("device") == "cpu",
    )
    table = Table(title=f"dry run: {prepared.config.output_dir}", show_header=False)
    table.add_row("model", f"{prepared.model_config.model_type}, {total:,} parameters")
    table.add_row("  of which vocabulary", f"{sum(vocabulary.values()):,} ({prepared.padded_size:,} rows)")
    table.add_row("ranks", f"{ranks} ({prepared.padded_size // ranks:,} vocabulary rows each)")
    for key, value in describe(prepared, ranks).items():
        table.add_row(key, f"{value:,}")
    table.add_row("model states per rank (DeepSpeed's estimate)", f"{device / 2**30:.2f} GiB")
    table.add_row("CPU memory per node (DeepSpeed's estimate)", f"{cpu / 2**30:.2f} GiB")
    Console().print(table)
