"""Audio placeholders that do not match the audio: an error that names the sample and both counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from tests.model.ranks import AUDIO_ID, MELS, WINDOW
from tests.model.test_architecture import ARCHITECTURE


@pytest.fixture(scope="module")
def model() -> Iterator[LALM]:
    yield LALM(ARCHITECTURE, initialize(ParallelConfig(), seed=0), torch.float32)
    finalize()


def batch(placeholders: list[int], features: list[int]) -> ModelInput:
    """Return samples named a, b, … with so many placeholders, and clips with so many features."""
    rows = [[1] + [AUDIO_ID] * count + [2] * (8 - count) for count in placeholders]
    frames = tuple(4 * count for count in features) if features else None
    noise = torch.randn(len(features), MELS, WINDOW) if features else None
    return ModelInput(torch.tensor(rows), noise, frames, tuple("abc"[: len(rows)]))


@pytest.mark.parametrize(
    ("placeholders", "features", "words"),
    [
        ([3, 2], [3, 1], "sample b: 2 audio placeholder tokens but 1 audio features"),
        ([3, 2], [3], "sample b: 2 audio placeholder tokens but 0 audio features"),
        (
            [3, 2, 4],
            [2, 3, 4],
            "sample a: 3 audio placeholder tokens but 5 audio features",
        ),  # right in sum, wrong in each
        ([0, 4, 4], [4, 2, 3], "sample c: 4 audio placeholder tokens but 5 audio features"),
        ([3, 0], [3, 2], "samples a, b: 2 more audio features than audio placeholder tokens"),
        ([0, 3], [], "sample b: 3 audio placeholder tokens but 0 audio features"),
    ],
)
def test_mismatches_name_the_sample(model: LALM, placeholders: list[int], features: list[int], words: str) -> None:
    """Catches audio that slips into another sample's placeholders, or an error that does not name the sample."""
    with pytest.raises(CordError) as caught:
        model(batch(placeholders, features))
    assert words in str(caught.value) and "build the prompts with" in str(caught.value)


@pytest.mark.parametrize(("placeholders", "features"), [([3, 2], [3, 2]), ([0, 6, 1], [1, 2, 3, 1]), ([0, 0], [])])
def test_matches_pass(model: LALM, placeholders: list[int], features: list[int]) -> None:
    """Catches a check that refuses several clips in a sample, or samples without any."""
    assert model(batch(placeholders, features)).shape == (9, len(placeholders), 48)
