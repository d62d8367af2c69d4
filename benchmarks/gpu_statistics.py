"""Kernels of statistics and gradients beside their floors and PyTorch: python benchmarks/gpu_statistics.py out.json

The floor is the larger of its bytes at the rate of a copy and its products at a third of the rate of the library's TF32
product, both measured in the same run. Errors are relative, against float64. Plain PyTorch computes in float64 what
`hgprompt.moments` and `hgprompt.objective` ask of it: mixtures from a float64 copy of the features, which is kept.
--rehearse: see gpu.sh.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from gpu_common import DEPTH, DEVICE, DTYPE, TOKENS, WIDTH, B, M

from gpu_common import REHEARSE, keep, median_ms  # isort: skip
from gpu_kernels import Table

from hgprompt.kernels import gram, mixture, moments

IMAGES, CLASSES, MANY, FOLDS = (5, 3, 20, 2) if REHEARSE else (2000, 100, 512, 8)
PAIRS = M * (M + 1) // 2


def random(*shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def random_rows() -> list[torch.Tensor]:
    return [random(WIDTH, M - i, WIDTH) for i in range(M)]


def error(actual: torch.Tensor | Sequence, exact: torch.Tensor | Sequence) -> float:
    """Relative error in the Frobenius norm, of several tensors the largest."""
    if not isinstance(actual, torch.Tensor):
        return max(map(error, actual, exact))
    return float((actual - exact).norm() / exact.norm())


def both(
    table: Table, name: str, ours: Callable, plain: Callable, arguments: tuple, flop: float, size: float
) -> None:  # fmt: skip
    """A row each. size: bytes that must be read and written."""
    try:
        err = error(*(function(*copy.deepcopy(arguments)) for function in (ours, plain)))
    except Exception as failure:
        table.fail(name, "ours", failure)
    else:
        table.add(name, "ours", lambda: ours(*arguments), flop, size, err)
    table.add(name, "PyTorch", lambda: plain(*arguments), flop, size)


def tf32_rate() -> float:
    """TFLOP/s of the library's TF32 product of two square matrices."""
    n = 64 if REHEARSE else 8192
    a, b = (random(n, n, dtype=torch.float32) for _ in range(2))
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return 2 * n**3 / median_ms(lambda: a @ b) / 1e9
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was


def all_moments(table: Table, images: int, dtype: torch.dtype) -> None:
    features, centre = random(M, images, WIDTH, dtype=dtype), random(M, WIDTH) / 10
    index = torch.randint(CLASSES, (images,), device=DEVICE)
    size = features.numel() * dtype.itemsize
    both(table, f"class sums, {images} images, {dtype}", moments.class_sums, moments.class_sums_reference,
         (features, centre, index, CLASSES), 0, size + 8 * M * CLASSES * WIDTH)  # fmt: skip

    def adding(function):
        def added(rows, *rest):
            function(rows, *rest)
            return rows

        return added

    both(table, f"second moments, {images} images, {dtype}", adding(moments.add_moments),
         adding(moments.add_moments_reference), ([torch.zeros_like(row) for row in random_rows()], features, centre),
         2 * PAIRS * images * WIDTH**2, size + 2 * 8 * PAIRS * WIDTH**2)  # fmt: skip


def feature_mixtures(table: Table, dtype: torch.dtype) -> None:
    weights = torch.full((M,), 1 / M, dtype=torch.float64, device=DEVICE)
    features, slope = random(M, IMAGES, WIDTH, dtype=dtype), random(IMAGES, WIDTH)
    means = features.double().mean(1)
    kept = features.double() - means[:, None]
    size = features.numel() * dtype.itemsize + 8 * slope.numel()
    both(table, f"mixture, {IMAGES} images, {dtype}", mixture.mix, lambda *_: torch.tensordot(weights, kept, dims=1),
         (features, means, weights), 0, size)  # fmt: skip
    both(table, f"its pull-back, {dtype}", mixture.pull_back_mixture,
         lambda *_: torch.mv(kept.flatten(1), slope.flatten()), (slope, features, means), 0, size)  # fmt: skip


def block_mixtures(table: Table) -> None:
    rows, weights, matrix = random_rows(), random(M), random(WIDTH, WIDTH)
    size = 8 * (PAIRS + 1) * WIDTH**2
    both(table, "mixture of blocks", mixture.assemble, mixture.assemble_reference, (rows, weights), 0, size)
    both(table, "its pull-back, of blocks", mixture.block_products, mixture.block_products_reference,
         (rows, matrix + matrix.T), 0, size)  # fmt: skip


def grams(table: Table) -> None:
    shallow = TOKENS * WIDTH
    for m, columns in ((M, shallow), (M, DEPTH * shallow), (MANY, shallow)):
        gradients = random(m, columns, dtype=torch.float32)
        both(table, f"Gram matrix of {m} × {columns}", gram.gram, gram.gram_reference, (gradients,),
             m * (m + 1) * columns, 4 * gradients.numel())  # fmt: skip
    parts = random(FOLDS, M, shallow, dtype=torch.float32)
    both(table, f"Gram matrices of {M} × {shallow}, {FOLDS} folds", gram.grams, gram.grams_reference, (parts,),
         (FOLDS + 1) * M * (M + 1) * shallow, 4 * parts.numel())  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    table = Table()
    table.record["ceilings"]["TF32 TFLOP/s"] = tf32_rate()
    table.rate = table.record["ceilings"]["TF32 TFLOP/s"] / 3  # float32 takes three products
    keep(table.record)
    for dtype in (DTYPE, torch.float32):
        for images in (B, 16 * B):  # one batch, and as many images as moments take at once
            all_moments(table, images, dtype)
        feature_mixtures(table, dtype)
    block_mixtures(table)
    grams(table)


if __name__ == "__main__":
    main()
