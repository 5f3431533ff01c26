"""The recognizer: which tokens of the language model are spoken, by connectionist temporal classification (CTC).

CTC is Graves et al. 2006. The output layer is the language model's own word embedding: a frame's logit of a token is
the cosine of the network's output and the token's row, scaled. So the recognizer's probabilities p say at once which
embedding the language model is to be given in the place of a frame: the expected one, Σ p(token) E(token), in which the
blank stands for a filler.

Simplification: only tokens that occur in the transcripts are told apart.
Legend: C clips, N tokens of audio of all clips, D width of the encoder, S stride of the adapter, K tokens that are told
apart, H width of the language model. Class 0 is the blank, class k + 1 the token k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss, gelu, normalize, pad
from torch.nn.utils.rnn import pad_sequence

_SCALE = 16.0  # of the cosines at the start: sharp enough to tell thousands of tokens apart, flat enough to learn
#: nats a mean squared distance: between two rows, some 2 apart, 10 nats lie, so the expected embedding of a sure
#: recognizer is read as surely
_SHARPNESS = 5.0


def stack(states: Sequence[Tensor], tokens: Sequence[int], stride: int) -> Tensor:
    """Return what the adapter makes its tokens of, float32 [N, S · D]: features side by side, zeros in the last stack.

    Args:
        states: [features, D] of each of C clips.
        tokens: of each clip.
        stride: S, features a token.
    """
    whole = [
        pad(each.float(), (0, 0, 0, count * stride - len(each))) for each, count in zip(states, tokens, strict=True)
    ]
    return torch.cat(whole).reshape(sum(tokens), -1)


class Recognizer(nn.Module):
    """LayerNorm, one hidden layer with GELU, cosines with the rows of the word embedding.

    Args:
        width: S · D.
        hidden: of its hidden layer.
        rows: float32 [K, H], of the word embedding.
        seed: of its weights.
    """

    def __init__(self, width: int, hidden: int, rows: Tensor, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.LayerNorm(width)
            self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, rows.shape[1])
            self.blank = nn.Parameter(torch.randn(1, rows.shape[1]))
        self.bias = nn.Parameter(torch.zeros(len(rows) + 1))
        self.scale = nn.Parameter(torch.tensor(1.0))  # of _SCALE
        self.register_buffer("directions", normalize(rows, dim=-1), persistent=False)
        self.directions: Tensor

    def forward(self, stacks: Tensor) -> Tensor:
        """Map [N, S · D] to logits [N, K + 1]."""
        hidden = self.linear2(gelu(self.linear1(self.norm(stacks))))
        classes = torch.cat([normalize(self.blank, dim=-1), self.directions])
        cosines = normalize(hidden.float(), dim=-1) @ classes.T
        return self.scale * _SCALE * cosines.float() + self.bias


def ctc_losses(logits: Tensor, tokens: Sequence[int], targets: Sequence[Sequence[int]]) -> Tensor:
    """Return -log p(transcript) / length of the transcript for each clip, [C].

    Args:
        logits: [N, K + 1].
        tokens: of audio, of each clip.
        targets: classes of each clip's transcript, without blanks; no longer than `ctc_length` allows.
    """
    lengths = torch.tensor([len(target) for target in targets])
    padded = pad_sequence(list(torch.split(logits.log_softmax(-1), list(tokens))))  # [longest, C, K + 1]
    joined = torch.tensor([each for target in targets for each in target], device=logits.device)
    losses = ctc_loss(padded, joined, torch.tensor(list(tokens)), lengths, blank=0, reduction="none")
    return losses / lengths.to(losses.device)


def expected_embeddings(logits: Tensor, rows: Tensor, filler: Tensor) -> Tensor:
    """Return Σ p(token) E(token) + p(blank) filler for each token of audio, [N, H].

    Args:
        logits: [N, K + 1].
        rows: E, [K, H].
        filler: [H].
    """
    probabilities = logits.softmax(-1)
    return probabilities @ torch.cat([filler[None], rows])


def nearest_classes(embeddings: Tensor, rows: Tensor, filler: Tensor) -> Tensor:
    """Return the class whose embedding is nearest to each row of [N, H]: 0 for the filler; int64 [N]."""
    known = torch.cat([filler[None], rows])
    return (known.square().sum(-1) - 2 * embeddings @ known.T).argmin(-1)


def reading_losses(embeddings: Tensor, probabilities: Tensor, rows: Tensor, filler: Tensor) -> Tensor:
    """Return -Σ p(class) log q(class), where q are the classes as embeddings are read, for each of them, [N].

    log q is, up to a constant, the mean squared distance to the class's embedding, times -_SHARPNESS: q's largest is
    the class of `nearest_classes`.

    Args:
        embeddings: [N, H], in units of the rows' root mean square.
        probabilities: p, [N, K + 1].
        rows: [K, H].
        filler: [H].
    """
    known = torch.cat([filler[None], rows])
    # The square of the embedding itself is the same for all classes.
    distances = (known.square().sum(-1) - 2 * embeddings @ known.T) / known.shape[1]
    return -(probabilities * (-_SHARPNESS * distances).log_softmax(-1)).sum(-1)
