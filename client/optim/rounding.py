"""Rounding to bf16 at random, from a counter: any element's bits can be had without the others'.

Owns Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch,
and seeds. Promises the numbers that `triton.language.randint(seed, index)` gives.
"""

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LONG = 0xFFFFFFFFFFFFFFFF
_INFINITY_BITS = 0x7F800000


def seed_of(seed: int, ordinal: int, step: int, offset: int = 0) -> int:
    """A seed of 64 bits, never 0, for one parameter in one step.

    Args:
        seed: The optimizer's.
        ordinal: The parameter's place in the optimizer.
        step: Of this parameter.
        offset: First element of this rank's part, so that ranks do not round alike.
    """
    mixed = 0
    for number in (seed, ordinal, step, offset):
        mixed = _mixed((mixed ^ number) + 0x9E3779B97F4A7C15 & _LONG)
    return mixed or 1


def _mixed(x: int) -> int:
    """The finalizer of splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _LONG
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _LONG
    return x ^ x >> 31


def random_words(count: int, seed: int, device: torch.device) -> torch.Tensor:
    """The first word of Philox for counters 0 to count - 1, in int64."""
    counter = [torch.arange(count, dtype=torch.int64, device=device)]
    counter += [torch.zeros_like(counter[0]) for _ in range(3)]
    keys = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(_ROUNDS):
        first, second = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
        counter = [
            (second >> 32 & _WORD) ^ counter[1] ^ keys[0],
            second & _WORD,
            (first >> 32 & _WORD) ^ counter[3] ^ keys[1],
            first & _WORD,
        ]
        keys = [key + weyl & _WORD for key, weyl in zip(keys, _WEYL, strict=True)]
    return counter[0]


def stochastic(values: torch.Tensor, seed: int) -> torch.Tensor:
    """fp32 rounded to bf16, up or down with the probability that makes the mean right."""
    bits = values.view(torch.int32)
    noise = random_words(values.numel(), seed, values.device).reshape(values.shape) & 0xFFFF
    finite = (bits & _INFINITY_BITS) != _INFINITY_BITS
    raised = torch.where(finite, bits + noise.int(), bits)
    kept = (raised & -0x10000).view(torch.float32)
    return torch.where(kept.isnan(), values, kept).bfloat16()
