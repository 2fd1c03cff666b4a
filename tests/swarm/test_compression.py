"""Compressors: what comes out, what is owed, and that a round that failed changed nothing."""

import pytest
import torch

from hivetrain.averaging.compression import PowerSGD, make_compressor, run_alone

SHAPES = [torch.Size((24, 16)), torch.Size((16,)), torch.Size((4, 3, 2, 2))]
NUMEL = sum(shape.numel() for shape in SHAPES)


def average_of(compressors, gradients, weights, epoch):
    """Runs the stages of several peers in step, each vector replaced by the weighted mean."""
    running = [c.stages(g, epoch) for c, g in zip(compressors, gradients, strict=True)]
    vectors = [next(stages) for stages in running]
    sent = 0
    while True:
        sent += vectors[0].numel()
        mean = sum(w * v for w, v in zip(weights, vectors, strict=True)) / sum(weights)
        results, vectors = [], []
        for stages in running:
            try:
                vectors.append(stages.send(mean.clone()))
            except StopIteration as end:
                results.append(end.value)
        if results:
            assert len(results) == len(running)
            return results, sent


def gradients_of(peers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(NUMEL, generator=generator) for _ in range(peers)]


@pytest.mark.parametrize("name", ["none", "fp16", "int8"])
def test_a_plain_compressor_averages_the_gradient_itself(name):
    gradients = gradients_of(3)
    results, sent = average_of([make_compressor(name, SHAPES) for _ in range(3)], gradients, [1, 2, 3], epoch=0)
    expected = (gradients[0] + 2 * gradients[1] + 3 * gradients[2]) / 6
    assert all(torch.allclose(result, expected) for result in results)
    assert sent == NUMEL


def test_low_rank_averages_are_the_same_on_all_peers_and_smaller():
    results, sent = average_of([PowerSGD(1, SHAPES) for _ in range(3)], gradients_of(3), [1, 2, 3], epoch=7)
    assert all(torch.equal(result, results[0]) for result in results)
    assert sent == 1 * (24 + 16) + 16 + (4 + 12)  # the bias travels as it is


def test_a_low_rank_mean_comes_back_exactly():
    left, right = torch.randn(24, 2), torch.randn(2, 16)
    gradient = torch.zeros(NUMEL)
    gradient[: 24 * 16] = (left @ right).reshape(-1)
    gradient[24 * 16 : 24 * 16 + 16] = torch.arange(16.0)
    results, _ = average_of([PowerSGD(2, SHAPES) for _ in range(2)], [gradient, gradient], [1, 1], epoch=0)
    assert torch.allclose(results[0], gradient, atol=1e-4)


def test_what_compression_leaves_out_is_made_up_for_later():
    gradient, compressor = gradients_of(1)[0], PowerSGD(2, SHAPES)
    total, once = torch.zeros(NUMEL), None
    for epoch in range(40):
        result = run_alone(compressor.stages(gradient, epoch))
        compressor.commit()
        total += result
        once = result if once is None else once
    error = (total / 40 - gradient).norm() / gradient.norm()
    assert error < 0.25 * (once - gradient).norm() / gradient.norm()


def test_a_round_that_failed_leaves_no_trace_in_the_error_feedback():
    gradient, compressor, other = gradients_of(1)[0], PowerSGD(1, SHAPES), PowerSGD(1, SHAPES)
    run_alone(compressor.stages(gradient, 3))  # not committed
    assert torch.equal(run_alone(compressor.stages(gradient, 4)), run_alone(other.stages(gradient, 4)))


def test_the_error_that_is_owed_survives_a_checkpoint():
    gradient, before, after = gradients_of(1)[0], PowerSGD(1, SHAPES), PowerSGD(1, SHAPES)
    run_alone(before.stages(gradient, 0))
    before.commit()
    after.load_state_dict(before.state_dict())
    resumed = run_alone(after.stages(gradient, 1))
    assert torch.equal(resumed, run_alone(before.stages(gradient, 1)))
    assert not torch.equal(resumed, run_alone(PowerSGD(1, SHAPES).stages(gradient, 1)))


@pytest.mark.parametrize("name", ["zip", "powersgd", "powersgd(0)", "powersgd(-1)", ""])
def test_an_unknown_compression_is_refused(name):
    with pytest.raises(ValueError, match="powersgd|unknown"):
        make_compressor(name, SHAPES)
