"""Measure by torch's profiler what alignment adds to the cross entropy on a CPU, operation by operation.

    python -m pipeline.benchmarks.loss_profile

On a shared machine, the large matrix products vary more between two calls than alignment takes. Cross entropy with and
without alignment run the same products, so only the other operations are compared. This does not hold for tied matrices
if a chunk uses half of the vocabulary or more: product 3 then has more rows with alignment, and is counted as added.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.benchmarks.loss import loss_variants
from pipeline.benchmarks.loss_baselines import LossInputs, LossShape
from pipeline.common.errors import exit_cleanly
from pipeline.loss import LossSettings

PRODUCTS = ("aten::mm", "aten::addmm_")
SOLAR, CE_ONLY, LOWER_BOUND = "solar", "solar CE", "three products"
PRINTED = 12  # number of operations to print

Operation = tuple[str, str]  # name and shapes of the arguments


def profile_call(call: Callable[[], object]) -> dict[Operation, float]:
    """Return the milliseconds of each operation of one call, without those that it calls in turn."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    events = profiler.key_averages(group_by_input_shape=True)
    return {(event.key, str(event.input_shapes)): event.self_cpu_time_total / 1000 for event in events}


def median_calls(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[Operation, float]]:
    """Profile each variant `rounds` times in turn, and return the median milliseconds of each operation."""
    found: dict[str, dict[Operation, list[float]]] = {name: defaultdict(list) for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            for operation, milliseconds in profile_call(call).items():
                found[name][operation].append(milliseconds)
    return {name: {key: statistics.median(values) for key, values in ops.items()} for name, ops in found.items()}


def added_milliseconds(solar: Mapping[Operation, float], ce_only: Mapping[Operation, float]) -> dict[str, float]:
    """Return the milliseconds that `solar` takes more, by name of the operation, largest first.

    Products that `ce_only` computes, too, are left out.
    """
    added: dict[str, float] = defaultdict(float)
    for sign, operations in ((1, solar), (-1, ce_only)):
        for operation, milliseconds in operations.items():
            if operation[0] not in PRODUCTS or operation not in ce_only:
                added[operation[0]] += sign * milliseconds
    return dict(sorted(added.items(), key=lambda item: -item[1]))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Profile the loss on a CPU with and without alignment.")
    for name, default in asdict(LossShape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    shape, device = LossShape(args.tokens, args.vocab, args.hidden, args.sequence), "cpu"
    inputs, variants = LossInputs.random(shape, torch.float32, device, LossSettings()), loss_variants(device)
    calls = {name: partial(variants[name], inputs) for name in (SOLAR, CE_ONLY, LOWER_BOUND)}
    medians = median_calls(calls, args.rounds)
    added = added_milliseconds(medians[SOLAR], medians[CE_ONLY])
    ce_only, products = (sum(medians[name].values()) for name in (CE_ONLY, LOWER_BOUND))
    print(f"three products: {products:.0f} ms on {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"CE only: {ce_only:.0f} ms, {ce_only / products:.3f} of the three products")
    print(f"alignment adds {sum(added.values()):.0f} ms: {1 + sum(added.values()) / ce_only:.3f} of CE only")
    for name, milliseconds in list(added.items())[:PRINTED]:
        print(f"{milliseconds:8.1f}  {name}")


if __name__ == "__main__":
    exit_cleanly(main)
