"""Moves torch's CPU generator ahead by any count of numbers in less than a second.

The generator is MT19937: x_{k+624} = x_{k+397} ^ A·(x_k's upper bit, x_{k+1}'s lower 31), linear over GF(2).
With its characteristic polynomial p, of degree 19937, and t^N mod p = Σ c_i t^i, x_{k+N} is the sum of c_i x_{k+i}
(Haramoto et al. 2008, "Efficient jump ahead for F2-linear random number generators"). Polynomials over GF(2) are
Python integers, one bit per coefficient.
"""

from functools import cache, lru_cache

import numpy as np
import torch

WORDS, MIDDLE, UPPER_BITS, LOWER_BITS = 624, 397, 1, 31
MATRIX = 0x9908B0DF
DEGREE = WORDS * UPPER_BITS + (WORDS - 1) * LOWER_BITS

# Generator.get_state() holds: the seed, the number of words left, whether it is seeded, the next word; the words.
_HEADER_BYTES = 24
_STATE_BYTES = 5056


def generators_ahead(seed: int, start: int, step: int, count: int) -> list[torch.Generator]:
    """Generators seeded with `seed`, after start, start + step, start + 2·step, … draws of 32 bits."""
    generators = [torch.Generator().manual_seed(seed)]
    _advance(generators[0], start)
    while len(generators) < count:
        generators.append(generators[-1].clone_state())
        _advance(generators[-1], step)
    return generators


def _advance(generator: torch.Generator, numbers: int) -> None:
    """Move a freshly seeded generator ahead."""
    if numbers == 0:
        return
    state = generator.get_state()
    left, seeded = state[8:16].view(torch.int32).tolist()
    assert len(state) == _STATE_BYTES and left == 1 and seeded == 1, "torch keeps its generator in another form"
    words = state[_HEADER_BYTES : _HEADER_BYTES + 8 * WORDS].view(torch.int64).numpy()
    words[:] = _ahead(words.astype(np.uint32), numbers)
    generator.set_state(state)


def _ahead(words: np.ndarray, numbers: int) -> np.ndarray:
    """The 624 words of the state, moved ahead by `numbers` words."""
    coefficients = format(power_of_t(numbers), "b")[::-1]
    positions = np.flatnonzero(np.frombuffer(coefficients.encode(), np.uint8) == ord("1"))
    windows = np.lib.stride_tricks.sliding_window_view(_extended(words, DEGREE + WORDS), WORDS)
    return np.bitwise_xor.reduce(windows[positions], axis=0)


def _extended(words: np.ndarray, count: int) -> np.ndarray:
    x = np.empty(count, np.uint32)
    x[:WORDS] = words
    # As many at once as are independent of each other.
    step = WORDS - MIDDLE
    for start in range(WORDS, count, step):
        stop = min(start + step, count)
        first, second = x[start - WORDS : stop - WORDS], x[start - WORDS + 1 : stop - WORDS + 1]
        mixed = (first & np.uint32(0x80000000)) | (second & np.uint32(0x7FFFFFFF))
        x[start:stop] = x[start - step : stop - step] ^ (mixed >> 1) ^ (mixed & 1) * np.uint32(MATRIX)
    return x


@lru_cache(maxsize=256)
def power_of_t(exponent: int) -> int:
    """t^exponent mod p, by repeated squaring."""
    power = 1
    for bit in format(exponent, "b"):
        # A square over GF(2) spreads the bits: its digits in base 4 are those of the polynomial in base 2.
        power = _reduced(int(format(power, "b"), 4) << int(bit))
    return power


def _reduced(polynomial: int) -> int:
    lower = (1 << DEGREE) - 1
    while high := polynomial >> DEGREE:
        polynomial &= lower
        for exponent in _exponents():
            polynomial ^= high << exponent
    return polynomial


@cache
def _exponents() -> tuple[int, ...]:
    """Exponents of p without the leading one: appendix A of Matsumoto and Nishimura 1998, "Mersenne Twister"."""
    upper = _powers((1 << WORDS) ^ (1 << MIDDLE), UPPER_BITS)
    lower = _powers((1 << WORDS - 1) ^ (1 << MIDDLE - 1), LOWER_BITS)
    p = _product(upper[UPPER_BITS], lower[LOWER_BITS])
    for i in range(UPPER_BITS + LOWER_BITS):
        if MATRIX >> i & 1:
            if i < LOWER_BITS:
                p ^= _product(upper[UPPER_BITS], lower[LOWER_BITS - i - 1])
            else:
                p ^= upper[UPPER_BITS + LOWER_BITS - i - 1]
    *exponents, degree = (exponent for exponent, bit in enumerate(reversed(format(p, "b"))) if bit == "1")
    assert degree == DEGREE
    return tuple(exponents)


def _powers(polynomial: int, highest: int) -> list[int]:
    powers = [1]
    for _ in range(highest):
        powers.append(_product(powers[-1], polynomial))
    return powers


def _product(a: int, b: int) -> int:
    product = 0
    for exponent, bit in enumerate(reversed(format(b, "b"))):
        if bit == "1":
            product ^= a << exponent
    return product
