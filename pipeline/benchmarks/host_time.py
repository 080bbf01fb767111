"""Measure the host time that loss, embedding lookup and ZeRO-3 take for their messages, for 8 to 1,024 ranks.

    python -m pipeline.benchmarks.host_time

One process is rank 0 of a group with torch's `fake` backend, whose collectives return at once. The layouts of the other
ranks are random. Times are of one process with one thread, in milliseconds per micro-step, and medians. The numbers of
ranks are measured in turn, several times, so that a slow phase of the machine affects all of them:

    exchange    build and read the message with the layouts of all ranks, and the routes of the lookup; in training once
                for all micro-steps of an optimizer step
    schedule    divide the target tokens into chunks and choose the head
    tables      tables of sequences and pairs, and of the target tokens of each subchunk. A GPU expands the tables of
                the target tokens, so this part of the time is the device's there.
    gather      fill the parameters of a decoder layer after a gather, which is done two or three times per micro-step
    reduce      divide the gradients of a decoder layer between the ranks, once per micro-step
                `gather_deepspeed` and `reduce_deepspeed` are DeepSpeed's own functions. The layer is tiny, so that
                copies take little time. Each gather includes DeepSpeed's list of one slice per rank.

Writes a CSV.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from torch import Tensor

from pipeline.benchmarks.common import OUTPUT, Row, machine, print_row, write_csv
from pipeline.loss import DistinctIds, LayoutExchange, LossBatch, LossSettings
from pipeline.loss import layout as layout_module
from pipeline.loss.alignment import PooledRepresentations
from pipeline.loss.chunking import BufferSizes
from pipeline.loss.head_choice import HeadSchedule, choose_head
from pipeline.loss.head_time import BYTES_ONLY
from pipeline.loss.layout import message_parts, pad_message
from pipeline.loss.subchunk_tokens import subchunk_tokens, token_tables
from pipeline.zero3.partitions import reduce_scatter_mean, wait_for_gather

RANKS = (8, 64, 128, 256, 512, 1024)
VOCAB, HIDDEN, TOKENS, SEQUENCES = 152_576, 3584, 4096, 16
LAYER = ((64, 64),) * 4 + ((128, 64),) * 3 + ((64,),) * 2  # shapes of its parameters


def random_batch(seed: int) -> tuple[LossBatch, Tensor]:
    """Return the layout of a rank with 60 % target tokens in pairs of uneven sequences, and its token ids."""
    generator = torch.Generator().manual_seed(seed)
    mean = TOKENS * 6 // 10 // SEQUENCES
    lengths = torch.randint(mean // 2, mean * 3 // 2, (SEQUENCES,), generator=generator)
    sequences = torch.arange(SEQUENCES)
    batch = LossBatch(
        targets=torch.randint(0, VOCAB, (int(lengths.sum()),), generator=generator),
        lengths=lengths,
        pivot=sequences // 2 * 2,
        problem_id=sequences // 2 + 10**6 * seed,
        language=sequences % 2,
    )
    return batch, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def timed(function: Callable[[], object], repeats: int) -> float:
    """Return the median milliseconds of processor time of a call."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        times.append((time.process_time() - begin) * 1e3)
    return round(median(times), 3)


def measure(ranks: int, repeats: int) -> Row:
    """Return the milliseconds by part on `ranks` ranks. A process group of that size must exist."""
    group = dist.group.WORLD
    exchange = LayoutExchange(group)
    batch, ids = random_batch(0)
    gathered: dict[int, Tensor] = {}

    def all_gather(message: Tensor, _: object) -> Tensor:
        """Return the messages of all ranks, which are built once for each size."""
        if len(message) not in gathered:
            parts = [message_parts([random_batch(rank)[0]], "mean", False) for rank in range(1, ranks)]
            nothing, capacity = torch.zeros(ranks, dtype=torch.int64), exchange.capacity.tolist()
            others = [pad_message(nothing, torch.cat([h, table]), tokens, capacity) for h, table, tokens in parts]
            gathered[len(message)] = torch.stack([message, *others])
        return gathered[len(message)]

    distinct = DistinctIds.of(ids)  # the loader's thread does this

    def exchanged() -> object:
        counts = distinct.counts_by_owner(VOCAB, ranks)
        layouts, requested_by = exchange.exchange([batch], "mean", torch.device("cpu"), counts[None])
        return layouts, counts.tolist(), requested_by[0].tolist()

    with mock.patch.object(layout_module, "all_gather", all_gather):
        exchange_ms = timed(exchanged, repeats)
        counts = distinct.counts_by_owner(VOCAB, ranks)
        (layout,), _ = exchange.exchange([batch], "mean", torch.device("cpu"), counts[None])
    sizes = BufferSizes(ranks, -(-VOCAB // ranks), HIDDEN, 2, False, True)
    settings = LossSettings()

    def scheduled() -> HeadSchedule:
        return choose_head(layout, sizes, settings, VOCAB, settings.top_k, BYTES_ONLY)

    chosen = scheduled()
    chunks, order = chosen.chunks, chosen.order

    def planned() -> object:
        ordered = layout.in_order(order)
        table = PooledRepresentations(ordered, chunks, 1, torch.float32, settings)
        tables = token_tables(ordered, chunks, table, "mean", torch.float32)
        return subchunk_tokens(tables, chunks, table, None)

    def planned_without_tokens() -> object:
        ordered = layout.in_order(order)
        return PooledRepresentations(ordered, chunks, 1, torch.float32, settings)

    return {
        "exchange_ms": exchange_ms,
        "schedule_ms": timed(scheduled, repeats),
        "sequence_tables_ms": timed(planned_without_tokens, repeats),
        "all_tables_ms": timed(planned, repeats),
        "head": "vocab_parallel" if chosen.vocab_parallel else "gathered",
        "subchunks": sum(len(chunk.subchunks) for chunk in chunks),
    }


def measure_layer(ranks: int, repeats: int) -> Row:
    """Return the milliseconds of ZeRO-3 for a decoder layer. A process group of that size must exist."""
    sizes = [torch.Size(shape).numel() for shape in LAYER]
    gradients, widths = [torch.ones(shape) for shape in LAYER], [-(-size // ranks) for size in sizes]
    width_of_layer = sum(widths)
    buffer = torch.zeros(ranks * width_of_layer)

    def gathered() -> AllGatherCoalescedHandle:
        parameters = [
            SimpleNamespace(
                ds_status=ZeroParamStatus.INFLIGHT,
                ds_shape=shape,
                ds_numel=size,
                ds_tensor=SimpleNamespace(ds_numel=width, dtype=buffer.dtype),
            )
            for shape, size, width in zip(LAYER, sizes, widths, strict=True)
        ]
        partitions = [buffer.narrow(0, width_of_layer * rank, width_of_layer) for rank in range(ranks)]
        return AllGatherCoalescedHandle(SimpleNamespace(wait=lambda: None), parameters, partitions, ranks)

    with mock.patch.multiple(
        "deepspeed.comm",
        get_rank=dist.get_rank,
        get_world_size=dist.get_world_size,
        reduce_scatter_fn=lambda output, tensor, group, async_op: None,
    ):
        reduce_deepspeed_ms = timed(lambda: reduce_scatter_coalesced(gradients, dist.group.WORLD), repeats)
    return {
        "gather_ms": timed(lambda: wait_for_gather(gathered()), repeats),
        "gather_deepspeed_ms": timed(lambda: AllGatherCoalescedHandle.wait(gathered()), repeats),
        "reduce_ms": timed(lambda: reduce_scatter_mean(gradients, dist.group.WORLD), repeats),
        "reduce_deepspeed_ms": reduce_deepspeed_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUTPUT / "host_time", help="output path without .csv")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=7, help="calls of each function in a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    results: dict[int, list[Row]] = {ranks: [] for ranks in args.ranks}
    for _ in range(args.rounds):
        for ranks in args.ranks:
            dist.init_process_group("fake", rank=0, world_size=ranks)
            results[ranks].append(measure(ranks, args.repeats) | measure_layer(ranks, args.repeats))
            dist.destroy_process_group()
    rows: list[Row] = []
    for ranks, rounds in results.items():
        times = {key: round(median(row[key] for row in rounds), 3) for key in rounds[0] if key.endswith("_ms")}
        rows.append({"ranks": ranks, **rounds[0], **times, "machine": machine("cpu"), "torch": torch.__version__})
        print_row(rows[-1], 11)
    write_csv(rows, args.out.with_suffix(".csv"))


if __name__ == "__main__":
    main()
