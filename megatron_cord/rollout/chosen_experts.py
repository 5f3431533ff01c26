"""The experts that an engine's routers chose, which the trainer can follow: with each response, as JSON carries it.

Legend: R rows, the tokens of prompt and response but the last one, which no pass has read; L layers, k experts a token.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from megatron_cord.errors import CordError


@dataclass(frozen=True)
class ChosenExperts:
    """Experts by row and layer.

    Attributes:
        layers: L.
        per_token: k.
        packed: the numbers [R, L, k] as little-endian int16, in base64.
    """

    layers: int
    per_token: int
    packed: str

    @classmethod
    def of(cls, experts: Tensor) -> Self:
        """Return experts [R, L, k], of any integer type."""
        _, layers, per_token = experts.shape
        numbers = experts.cpu().numpy().astype("<i2")
        return cls(layers, per_token, base64.b64encode(numbers.tobytes()).decode())

    def tensor(self) -> Tensor:
        """Return int16 [R, L, k].

        Raises:
            CordError: the text is no such list of numbers.
        """
        try:
            numbers = np.frombuffer(base64.b64decode(self.packed, validate=True), dtype="<i2")
            return torch.from_numpy(numbers.reshape(-1, self.layers, self.per_token).astype(np.int16))
        except (binascii.Error, ValueError) as error:
            raise CordError(
                f"a response's experts are not {self.per_token} numbers for each token and each of {self.layers} "
                f"layers ({error})"
            ) from None
