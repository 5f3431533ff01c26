"""The warm-up's formulas against slow references in float64."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)


import itertools
import math

import pytest
import torch

from megatron_cord.model.adapters import build_adapter
from megatron_cord.model.architecture import AdapterArchitecture, EncoderArchitecture
from megatron_cord.model.config import LayerConfig
from megatron_cord.model.layers.transformer import encoder_config
from megatron_cord.parallel.layout import ParallelConfig
from megatron_cord.warmup.corpus import ctc_length
from megatron_cord.warmup.recognizer import (
    Recognizer,
    ctc_losses,
    expected_embeddings,
    nearest_classes,
    reading_losses,
    stack,
)
from megatron_cord.warmup.stages import scale_output
from megatron_cord.warmup.token_errors import collapse, count_errors


def brute_force(log_probs: torch.Tensor, target: list[int]) -> float:
    """Sum the probabilities of all rows of classes that CTC reads as the target; log_probs is [frames, K + 1]."""
    frames, classes = log_probs.shape
    total = 0.0
    for path in itertools.product(range(classes), repeat=frames):
        if collapse(path) == target:
            total += math.exp(sum(float(log_probs[frame, each]) for frame, each in enumerate(path)))
    return -math.log(total) / len(target)


def test_ctc_is_the_sum_over_all_alignments() -> None:
    """Catches clips that are mixed up, another blank, padding that counts, and another division by the length."""
    torch.manual_seed(0)
    tokens, targets = [4, 5, 3], [[2], [1, 1, 2], [3, 1]]
    logits = torch.randn(sum(tokens), 4, dtype=torch.float64)
    found = ctc_losses(logits, tokens, targets)
    apart = torch.split(logits.log_softmax(-1), tokens)
    wanted = [brute_force(each, target) for each, target in zip(apart, targets, strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_the_shortest_audio_that_ctc_takes() -> None:
    """Catches a bound that lets infinite losses pass, or leaves out what could be learned."""
    for target in ([1], [1, 2], [1, 1], [2, 2, 2], [1, 2, 2, 1]):
        length = ctc_length(target)
        assert ctc_losses(torch.zeros(length, 3), [length], [target]).isfinite()
        assert length == 1 or ctc_losses(torch.zeros(length - 1, 3), [length - 1], [target]).isinf()


def test_expected_embeddings_and_the_nearest() -> None:
    """Catches rows of the wrong tokens, a filler that is not the blank's, and a distance without the rows' lengths."""
    torch.manual_seed(0)
    logits, rows = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    filler = torch.randn(6, dtype=torch.float64)
    found = expected_embeddings(logits, rows, filler)
    for token in range(3):
        weights = [math.exp(float(each)) for each in logits[token]]
        wanted = weights[0] * filler + sum((weights[k + 1] * rows[k] for k in range(4)), torch.zeros(6).double())
        torch.testing.assert_close(found[token], wanted / sum(weights))
    given = torch.randn(20, 6, dtype=torch.float64)
    known = [filler, *rows]
    nearest = [min(range(5), key=lambda k: float((each - known[k]).norm())) for each in given]
    assert nearest_classes(given, rows, filler).tolist() == nearest


def test_reading_losses_are_the_cross_entropy_of_distances() -> None:
    """Catches a distance that grows with the width, a filler that is another class, and p and q exchanged."""
    torch.manual_seed(0)
    rows, filler = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    p = torch.randn(7, 5, dtype=torch.float64).softmax(-1)
    given, known = torch.randn(7, 6, dtype=torch.float64), [filler, *rows]
    found = reading_losses(given, p, rows, filler)
    for n in range(7):
        weights = [math.exp(-5.0 * sum(float(x) ** 2 for x in given[n] - each) / 6) for each in known]
        wanted = -sum(float(p[n, k]) * math.log(weights[k] / sum(weights)) for k in range(5))
        assert float(found[n]) == pytest.approx(wanted)
    # Between any two classes an embedding halfway is no nearer to one of them.
    middle = reading_losses((filler + rows[0])[None] / 2, torch.eye(5, dtype=torch.float64)[:1], rows, filler)
    other = reading_losses((filler + rows[0])[None] / 2, torch.eye(5, dtype=torch.float64)[1:2], rows, filler)
    torch.testing.assert_close(middle, other)


def test_token_errors_are_the_edit_distance() -> None:
    """Catches blanks that count, repeats that are lost between blanks, and a wrong distance."""

    def distance(a: list[int], b: list[int]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    assert collapse([0, 1, 1, 0, 1, 2, 2, 0]) == [1, 1, 2] and collapse([0, 0]) == []
    for a, b in itertools.product(itertools.product((1, 2), repeat=3), itertools.product((1, 2, 3), repeat=4)):
        found = count_errors(a, b)
        assert (found.errors, found.tokens) == (distance(list(a), list(b)), 4)
    assert count_errors([1], [None, 1]).errors == 1 and count_errors([], [1, 2]).errors == 2


@pytest.mark.parametrize(
    "arch",
    [
        AdapterArchitecture("linear"),
        AdapterArchitecture("stacking", 6, stride=2),
        AdapterArchitecture("gated_stacking", 6, stride=3, bias=False),
        AdapterArchitecture("convolution", 6, stride=2, kernel_size=3),
    ],
    ids=lambda arch: arch.kind,
)
def test_stacks_and_scales_of_every_adapter(arch: AdapterArchitecture) -> None:
    """Catches a recognizer that sees other features than the adapter's token is made of, and a scale that is not one.

    A token of an adapter that stacks may depend on no feature outside its stack.
    """
    encoder = EncoderArchitecture(8, 4, 1, 2, 4, 10)
    config = encoder_config(encoder, ParallelConfig(), torch.float32, LayerConfig("torch"))
    torch.manual_seed(0)
    adapter = build_adapter(arch, (4, 5), config, torch.device("cpu"))
    counts = [7, 4]
    tokens = [arch.num_tokens(count) for count in counts]
    features = torch.randn(sum(counts), 4)
    stacks = stack(list(torch.split(features, counts)), tokens, arch.stride)
    outputs = adapter(features, counts, tokens)
    assert stacks.shape == (sum(tokens), 4 * arch.stride) and outputs.shape == (sum(tokens), 5)
    assert torch.equal(stacks[0].view(-1, 4), features[: arch.stride])
    assert torch.equal(stacks[tokens[0]].view(-1, 4), features[7 : 7 + arch.stride])
    if arch.kind != "convolution":  # whose kernel is wider than its stride
        changed = features.clone()
        changed[: arch.stride] += 1.0
        differs = (adapter(changed, counts, tokens) != outputs).any(1)
        assert differs.tolist() == [True] + [False] * (sum(tokens) - 1)
    scale_output(adapter, 3.0)
    torch.testing.assert_close(adapter(features, counts, tokens), 3 * outputs)


def test_the_recognizer_is_drawn_from_its_seed_alone() -> None:
    """Catches ranks that begin with different weights, and logits that are no cosines with the embedding's rows."""
    torch.manual_seed(5)
    rows = torch.randn(3, 6)
    first = Recognizer(8, 4, rows, 1)
    torch.manual_seed(6)
    second, other = Recognizer(8, 4, 10 * rows, 1), Recognizer(8, 4, rows, 2)
    given = torch.randn(5, 8)
    torch.testing.assert_close(first(given), second(given))
    assert not torch.allclose(first(given), other(given)) and first(given).abs().max() <= 16
