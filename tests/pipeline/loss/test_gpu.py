"""Compare the loss and the lookup on a GPU with the float64 reference on the CPU."""

from dataclasses import replace

import pytest
import torch

from pipeline.loss import LossBatch, VocabularyShard, alignment_sft_loss, embedding_lookup
from pipeline.loss.kernels import softmax_
from pipeline.loss.top_k import BLOCK, softmax_with_largest_
from tests.pipeline.loss.cases import Case, errors, reference_results, sharded_results
from tests.pipeline.loss.test_embedding import FACTOR, HIDDEN, PADDED, VOCAB, random_inputs
from tests.pipeline.loss.test_vocab_parallel import EMPTY_SEQUENCES, LAYOUTS, SETTINGS, UNEVEN, bound_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# The exponentials of the kernels have errors of up to two units in the last place.
FACTOR_OF_BOUND = 2


@pytest.fixture(autouse=True)
def exact_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def check(case: Case) -> None:
    """Assert that the errors of a case are within the bound."""
    relative = errors(case, [sharded_results(None, case)], reference_results(case))
    assert all(error <= FACTOR_OF_BOUND * bound_of(case) for error in relative.values()), relative


def check_softmax_of_sorted_logits(dtype: torch.dtype, direction: int, device: str, k: int = 0) -> None:
    """Use sorted logits, for which the reference of the exponentials has to follow the largest logit.

    With k, the softmax's kernel also has to leave the blocks with the largest logits so far, which it replaces later.
    """
    z = (torch.linspace(-150, 150, 20001, device=device) * direction).repeat(3, 1).to(dtype)
    temperature = 1.0 if k else 0.5
    scaled = z.double() / temperature
    if k:
        expected = z.sort(dim=1, descending=True, stable=True)
        (log_sum, total), values, ids = softmax_with_largest_(z, k)
        assert torch.equal(values, expected.values[:, :k]) and torch.equal(ids, expected.indices[:, :k])
    else:
        log_sum, total = softmax_(z, temperature)
    torch.testing.assert_close(log_sum.double(), scaled.logsumexp(1), rtol=1e-6, atol=0)
    p = torch.softmax(scaled, 1)
    error = (z.double() / total[:, None] - p).norm() / p.norm()
    assert error < 4 * torch.finfo(dtype).eps


def check_largest_logits(dtype: torch.dtype, columns: int, distinct: int, k: int, device: str) -> None:
    """Use rows with ties between blocks, a last block with fewer columns, and larger values beside the rows."""
    generator = torch.Generator(device).manual_seed(columns)
    buffer = torch.full((7, columns + 37), 1e4, device=device).to(dtype)
    z = buffer[:, :columns]
    z.copy_(torch.randint(-distinct, distinct, z.shape, generator=generator, device=device) / 10)
    check_selection(z, k)


def check_selection(z: torch.Tensor, k: int) -> None:
    """Compare the k largest logits with a stable sort, and each probability with that of float64."""
    expected, p = z.sort(dim=1, descending=True, stable=True), torch.softmax(z.double(), 1)
    (_, total), values, ids = softmax_with_largest_(z, k)
    # The difference of two logits, up to 100, is rounded before it is exponentiated. fp16 has steps of 6e-8 below 6e-5.
    limits = torch.finfo(z.dtype)
    tolerance = {"rtol": 4 * limits.eps + 2e-5, "atol": max(1e-30, limits.smallest_normal * limits.eps)}
    torch.testing.assert_close(z.double() / total[:, None], p, **tolerance)
    assert torch.equal(values, expected.values[:, :k])
    assert torch.equal(ids, expected.indices[:, :k])


def check_selection_after_larger_logits(dtype: torch.dtype, device: str) -> None:
    """Use a few logits that are much larger than those before them: the others of the k largest precede the rescaling.

    In the second row, 300 block maxima are equal, and a larger one follows. The blocks with the lowest ids remain.
    """
    k, columns = 6, 300 * BLOCK
    z = torch.zeros(2, columns, device=device, dtype=dtype)
    z[0] = torch.linspace(-8, 8, columns, device=device).roll(3000)
    z[0, -200:-197] = 60
    z[1, ::BLOCK] = 1
    z[1, 250 * BLOCK + 3] = 2
    check_selection(z, k)


def check_selection_from_nonfinite_logits(device: str) -> None:
    """Use logits that are not finite: the columns must be valid indices, and the loss NaN, which stops the training."""
    z = torch.randn(5, 3000, device=device)
    z[0], z[1], z[2, 2000:], z[3, 7], z[4, 7] = torch.nan, -torch.inf, torch.nan, torch.nan, torch.inf
    (log_sum, _), _, ids = softmax_with_largest_(z, 6)
    assert bool(((ids >= 0) & (ids < z.shape[1])).all())
    assert bool(log_sum.isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("rows", [4, 100])
@pytest.mark.parametrize("name", SETTINGS)
def test_gpu_loss_settings(name: str, rows: int, dtype: torch.dtype) -> None:
    check(Case(UNEVEN[:1], SETTINGS[name], tied=False, dtype=dtype, device="cuda").with_rows(rows))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_loss_layouts(layout: str) -> None:
    check(Case(LAYOUTS[layout][:1], device="cuda"))


@pytest.mark.parametrize(
    "extra",
    [
        {"centered": True},
        {"vocabulary_weights": True},
        {"ce_weights": True},
        {"bias": True, "logit_scale": 0.25},
        {"softcap": 3.0, "logit_scale": 2.0},
        {"vocab_size": 9001, "padded_size": 9001},
    ],
    ids=lambda extra: " ".join(extra),
)
def test_gpu_loss_families_and_weights(extra: dict[str, object]) -> None:
    case = Case(EMPTY_SEQUENCES[:1], tied=False, device="cuda", **extra)  # type: ignore[arg-type]
    check(case.with_rows(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gpu_loss_half_precision_no_worse_than_dense(dtype: torch.dtype) -> None:
    sharded, dense = {}, {}
    for seed in range(5):
        case = Case(UNEVEN[:1], tied=False, dtype=dtype, vocab_size=301, padded_size=301, hidden_size=32, seed=seed)
        expected = reference_results(case)
        for total, part in (
            (sharded, sharded_results(None, replace(case, device="cuda"))),
            (dense, reference_results(case, dtype)),
        ):
            for name, error in errors(case, [part], expected).items():
                total[name] = total.get(name, 0.0) + error / 5
    assert all(sharded[name] <= 1.1 * dense[name] + 1e-4 for name in sharded), (sharded, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("k", [0, 1, 20, 64])
def test_gpu_softmax_of_sorted_logits(k: int, dtype: torch.dtype, direction: int) -> None:
    check_softmax_of_sorted_logits(dtype, direction, "cuda", k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [20 * BLOCK, 1187, 5000, 151936, 262208])
@pytest.mark.parametrize("distinct", [1, 3, 100_000])
def test_gpu_largest_logits_equal_stable_sort(dtype: torch.dtype, columns: int, distinct: int) -> None:
    for k in (1, 20, 64) if columns >= 64 * BLOCK else (1, 20):
        check_largest_logits(dtype, columns, distinct, k, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_selection_after_larger_logits(dtype: torch.dtype) -> None:
    check_selection_after_larger_logits(dtype, "cuda")


def test_gpu_selection_from_nonfinite_logits() -> None:
    check_selection_from_nonfinite_logits("cuda")


def test_gpu_loss_is_deterministic() -> None:
    lengths = ((tuple([300, 500, 200]), (700, 44)),)
    case = Case(lengths, vocab_size=5000, padded_size=5000, hidden_size=64, dtype=torch.bfloat16, device="cuda")
    first, second = sharded_results(None, case.with_rows(900)), sharded_results(None, case.with_rows(900))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_loss_on_another_gpu_than_the_current_one() -> None:
    losses = []
    for device in ("cuda:0", "cuda:1"):
        generator = torch.Generator().manual_seed(0)
        hidden, matrix = (torch.randn(n, 64, generator=generator).to(device) for n in (9, 5000))
        batch = LossBatch(*map(torch.tensor, ([1] * 9, [5, 4], [0, 0], [0, 0], [0, 1])))
        losses.append(alignment_sft_loss(hidden, batch, matrix, matrix)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_gpu_embedding_lookup() -> None:
    table, (ids,), (grad,) = random_inputs([(300, 20)])
    ids = ids.cuda()
    grads = []
    for _ in range(2):
        weight = table.float().cuda()
        shard = VocabularyShard(weight, 0, torch.zeros_like(weight))
        rows = embedding_lookup(ids, shard, PADDED, None, FACTOR)
        assert torch.equal(rows, weight[ids])
        rows.backward(grad.float().cuda())
        grads.append(shard.grad)
    assert grads[0] is not None and grads[1] is not None and torch.equal(grads[0], grads[1])
    expected = torch.zeros(VOCAB, HIDDEN).double()
    expected.index_add_(0, ids.flatten().cpu(), grad.view(-1, HIDDEN), alpha=FACTOR)
    torch.testing.assert_close(grads[0].cpu().double(), expected, rtol=1e-5, atol=1e-5)
