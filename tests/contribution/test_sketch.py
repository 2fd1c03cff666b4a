"""The sketch against its definition, and what it must preserve."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hivetrain.contribution.sketch import Sketcher, sketch_bytes, sketch_seed, sketch_vector

ROOT = Path(__file__).parents[2]
SUMS = 4093
BLOCK = 256 * SUMS
SEED = sketch_seed("run-1", 7, "0123456789abcdef" * 4)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def sketch_of(vector: torch.Tensor, seed: bytes = SEED) -> torch.Tensor:
    return Sketcher(seed, [vector.numel()]).sketch_flat(vector)


def bits(use: str, count: int) -> np.ndarray:
    """Signs of ``SEED``, one bit each, first bit first."""
    data = hashlib.shake_256(b"hivetrain/contribution/1/sketch/" + use.encode() + b"/" + SEED).digest(-(-count // 8))
    return np.array([(data[i // 8] >> (7 - i % 8) & 1) * 2 - 1 for i in range(count)], dtype=np.float64)


def test_the_sketch_is_what_its_definition_says():
    n = BLOCK + 5000
    vector = torch.zeros(n)
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:200]
    chosen[:2] = torch.tensor([0, n - 1])
    vector[chosen] = random(200)
    signs, matrix = bits("signs", 2 * BLOCK), bits("matrix", 256 * SUMS).reshape(256, SUMS)
    words = hashlib.shake_256(b"hivetrain/contribution/1/sketch/blocks/" + SEED).digest(16)
    expected = np.zeros(256)
    for j in chosen.tolist():
        block, place = divmod(j, BLOCK)
        word = int.from_bytes(words[8 * block : 8 * block + 8], "little")
        offset = word // 2 % (BLOCK // 16) * 16
        sign = (word % 2 * 2 - 1) * signs[offset + place]
        expected += float(vector[j]) * sign * matrix[:, place % SUMS] / 16
    assert relative(sketch_of(vector), torch.from_numpy(expected)) < 1e-6


def test_the_numbers_of_a_fixed_seed_never_change():
    assert SEED.hex() == "73866ad23cb9dc71324b6f0d77722ceb0ea22f79ea0ff74928a9cc787e613645"
    sketch = sketch_of(torch.sin(torch.arange(1_200_000, dtype=torch.float64)).float())
    golden = [39.1616, -32.6652, 92.3133, -72.5435, 5.9705, -57.8865]
    assert torch.allclose(sketch[:6].double(), torch.tensor(golden, dtype=torch.float64), rtol=1e-5, atol=1e-3)
    assert math.isclose(float(sketch.double().norm()), 798.4934383690049, rel_tol=1e-5)


def test_a_seed_depends_on_run_epoch_and_params():
    seeds = {sketch_seed(run, epoch, digest * 64) for run in ("a", "b") for epoch in (0, 1) for digest in "01"}
    assert len(seeds) == 8
    assert {len(seed) for seed in seeds} == {32}
    assert sketch_seed("a1", 1, "0" * 64) != sketch_seed("a", 11, "0" * 64)


def test_tensors_and_their_concatenation_have_one_sketch():
    shapes = [(700, 900), (3,), (0,), (900, 800), (1, 1), (5, 7, 11)]
    tensors = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    sketcher = Sketcher(SEED, [tensor.numel() for tensor in tensors])
    together = sketcher.sketch(tensors)
    assert together.shape == (256,)
    assert together.dtype == torch.float32
    assert relative(together, sketcher.sketch_flat(torch.cat([tensor.flatten() for tensor in tensors]))) < 1e-6


def test_the_sketch_is_linear():
    one, other = random(2_500_000, seed=1), random(2_500_000, seed=2)
    sketcher = Sketcher(SEED, [one.numel()])
    both = sketcher.sketch_flat(0.25 * one - 3 * other)
    assert relative(0.25 * sketcher.sketch_flat(one) - 3 * sketcher.sketch_flat(other), both) < 1e-6


def test_a_sum_over_many_microbatches_keeps_its_digits():
    sketcher = Sketcher(SEED, [40_000])
    vectors = [random(40_000, seed=i) for i in range(100)]
    total = torch.zeros(256)
    for vector in vectors:
        total += 8 * sketcher.sketch_flat(vector)
    assert relative(total, sketcher.sketch_flat(8 * torch.stack(vectors).double().sum(0))) < 1e-6


def test_a_missing_gradient_counts_as_zeros():
    tensors = [random(500, 300), random(2_000_000, seed=1), random(70, seed=2)]
    sketcher = Sketcher(SEED, [tensor.numel() for tensor in tensors])
    zeroed = [tensors[0], torch.zeros(2_000_000), tensors[2]]
    assert torch.equal(sketcher.sketch([tensors[0], None, tensors[2]]), sketcher.sketch(zeroed))
    assert torch.equal(sketcher.sketch([None, None, None]), torch.zeros(256))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_any_float_type_count_with_their_values(dtype):
    tensors = [random(1000, 1100).to(dtype), random(30, seed=1), random(400, seed=2).to(dtype)]
    sketcher = Sketcher(SEED, [tensor.numel() for tensor in tensors])
    assert relative(sketcher.sketch(tensors), sketcher.sketch([tensor.float() for tensor in tensors])) < 1e-6


def test_strides_do_not_count():
    tensor = random(1300, 900)
    sketcher = Sketcher(SEED, [tensor.numel()])
    assert torch.equal(sketcher.sketch([tensor.t().contiguous().t()]), sketcher.sketch([tensor]))


def test_threads_precision_settings_and_autocast_change_nothing_but_rounding():
    vector = random(2_200_000)
    sketcher = Sketcher(SEED, [vector.numel()])
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    expected = sketcher.sketch_flat(vector)
    try:
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = sketcher.sketch_flat(vector)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    assert relative(found, expected) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_sketch():
    tensors = [random(3000, 7000), random(1000, seed=1), random(900, 1000, seed=2).bfloat16()]
    sizes = [tensor.numel() for tensor in tensors]
    torch.backends.cuda.matmul.allow_tf32 = True
    found = Sketcher(SEED, sizes, "cuda").sketch([tensor.cuda() for tensor in tensors])
    assert found.device.type == "cpu"
    assert relative(found, Sketcher(SEED, sizes).sketch(tensors)) < 1e-6


@pytest.mark.parametrize("at_once", [2, 3, 16])
def test_blocks_taken_together_as_on_a_gpu_give_the_same_sketch(monkeypatch, at_once):
    tensors = [random(3 * BLOCK // 1000, 1000), random(700, seed=1), random(BLOCK, seed=2)]
    sizes = [tensor.numel() for tensor in tensors]
    one_by_one = Sketcher(SEED, sizes).sketch(tensors)
    monkeypatch.setattr("hivetrain.contribution.sketch._BLOCKS_AT_ONCE", {"cpu": at_once})
    assert relative(Sketcher(SEED, sizes).sketch(tensors), one_by_one) < 1e-6


def test_other_sizes_are_refused():
    sketcher = Sketcher(SEED, [10, 20])
    for wrong in ([random(10)], [random(10), random(21)], [random(10), None, None]):
        with pytest.raises(ValueError, match="other sizes"):
            sketcher.sketch(wrong)
    with pytest.raises(ValueError, match="30"):
        sketcher.sketch_flat(random(31))


def test_gradients_that_are_not_dense_floats_are_refused():
    sketcher = Sketcher(SEED, [16])
    for wrong in (torch.eye(4).to_sparse(), torch.ones(16, dtype=torch.int64)):
        with pytest.raises(ValueError, match="dense float"):
            sketcher.sketch([wrong])


def test_a_sketch_survives_its_bytes():
    sketch = random(256)
    assert len(sketch_bytes(sketch)) == 1024
    assert torch.equal(sketch_vector(sketch_bytes(sketch)), sketch)


def low_rank() -> torch.Tensor:
    return (random(1500, 2, seed=1).abs() @ random(2, 768, seed=2)).flatten()


def one_column() -> torch.Tensor:
    matrix = torch.zeros(600, 4096)
    matrix[:, 17] = random(600)
    return matrix.flatten()


def few_rows() -> torch.Tensor:
    matrix = torch.zeros(5000, 256)
    matrix[::500] = random(10, 256)
    return matrix.flatten()


def small_layer() -> torch.Tensor:
    vector = torch.zeros(BLOCK + 100_000)
    vector[BLOCK - 100 : BLOCK + 300] = random(400)
    return vector


STRUCTURES = {
    "random": lambda: random(1_300_000),
    "low rank": low_rank,
    "one column": one_column,
    "few embedding rows": few_rows,
    "one small layer": small_layer,
    "equal blocks": lambda: random(BLOCK).repeat(2),
    "opposite blocks": lambda: torch.cat([random(BLOCK), -random(BLOCK)]),
    "constant": lambda: torch.ones(2 * BLOCK),
    "one element": lambda: torch.nn.functional.one_hot(torch.tensor(77_777), 100_000).float(),
}


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_lengths_are_right_on_average_and_near_for_each_seed(structure):
    vector = structure()
    ratios = [
        float(sketch_of(vector, seed.to_bytes(32, "big")).double().norm() / vector.double().norm())
        for seed in range(20)
    ]
    mean_square = sum(ratio**2 for ratio in ratios) / len(ratios)
    assert abs(mean_square - 1) < 0.1  # the standard error is 0.02
    assert all(0.75 < ratio < 1.25 for ratio in ratios)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_relative_errors_of_differences_are_kept(structure):
    difference = structure()
    gradient = random(difference.numel(), seed=9) + 0.1
    difference *= 0.02 * gradient.norm() / difference.norm()
    sketcher = Sketcher(SEED, [gradient.numel()])
    found = relative(sketcher.sketch_flat(gradient + difference), sketcher.sketch_flat(gradient))
    assert 0.015 < found < 0.025


def test_equal_tensors_neither_cancel_nor_add_up():
    tensor = random(1000, 1000)
    sketcher = Sketcher(SEED, [tensor.numel()] * 4)
    for signs in ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1)):
        norm = sketcher.sketch([sign * tensor for sign in signs]).norm() / (2 * tensor.norm())
        assert 0.8 < norm < 1.2


@pytest.mark.slow
def test_the_sketch_benchmark_measures_a_model_of_ones_own():
    command = [
        "benchmarks/sketch.py",
        "--layers",
        "1",
        "--width",
        "64",
        "--batch",
        "2",
        "--block",
        "16",
        "--repeats",
        "2",
    ]
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    *_, row = (line.strip("|").split("|") for line in ended.stdout.splitlines() if line.startswith("|"))
    figures = [float(text.split()[0].rstrip("%").replace(",", "")) for text in (row[1], *row[3:])]
    assert min(figures) > 0
    assert "2 repeats" in ended.stdout
