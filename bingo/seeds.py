"""Counter-based randomness: every draw is a function of (seed, purpose, epoch, row, view) only.

Results therefore do not depend on the number of workers, the order of batches or a restart, and any view can be
reproduced. Shape letters: B rows of a batch, J draws for one row, N rows of the listing.
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK_ROWS = 2**15  # they stay in the cache
_ROUNDS = 4
_FEWEST_BITS = 8  # with fewer, four rounds do not draw all pairs equally often
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014) on uint64, element-wise."""
    x = x ^ (x >> np.uint64(30))
    x *= _MIX_1
    x ^= x >> np.uint64(27)
    x *= _MIX_2
    x ^= x >> np.uint64(31)
    return x


def _start(seed: int, purpose: str, epoch: int) -> np.uint64:
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def _hashes(seed: int, purpose: str, epoch: int, rows_B: ArrayLike, views_B: ArrayLike, draws: int) -> np.ndarray:
    rows_B = np.asarray(rows_B).astype(np.uint64)
    views_B = np.asarray(views_B).astype(np.uint64)  # or one for all
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        x_B = _mix(_mix(_start(seed, purpose, epoch) + rows_B * _GOLDEN) + (views_B + np.uint64(1)) * _GOLDEN)
        steps_J = np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN
        return _mix(x_B[:, None] + steps_J[None, :])


def uniforms(seed: int, purpose: str, epoch: int, rows_B: ArrayLike, views_B: ArrayLike = 0, draws: int = 1) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (B, draws): row b belongs to `rows_B[b]` and view `views_B[b]` (or one view for all)."""
    return (_hashes(seed, purpose, epoch, rows_B, views_B, draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, purpose: str, epoch: int, n: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 (n,)."""
    return np.argsort(_hashes(seed, purpose, epoch, np.arange(n), 0, 1)[:, 0], kind="stable")


def distinct(seed: int, purpose: str, epoch: int, n: int, count: int) -> np.ndarray:
    """`count` distinct numbers of 0..n-1 in ascending order, int64 (count,); all n if there are no more. The cost grows with
    `count`, not with n.

    A seeded Feistel network permutes the numbers below a power of 2; the result consists of the first values that are below n.
    """
    if count >= n:
        return np.arange(n)
    bits = max(_FEWEST_BITS, (n - 1).bit_length())
    round_R = _hashes(seed, purpose, epoch, np.zeros(1), 0, _ROUNDS)[0]
    taken: list[np.ndarray] = []
    begun, missing = 0, count
    while missing:
        end = min(2**bits, begun + max(64, min(_BLOCK_ROWS, missing * 2**bits // n)))
        images_X = _feistel(np.arange(begun, end, dtype=np.uint64), round_R, bits)
        taken.append(images_X[images_X < n][:missing])
        begun, missing = end, missing - len(taken[-1])
    short = np.uint32 if bits <= 32 else np.uint64  # sorted twice as fast
    return np.sort(np.concatenate(taken).astype(short)).astype(np.int64)


def _feistel(x: np.ndarray, round_R: np.ndarray, bits: int) -> np.ndarray:
    """A permutation of the numbers with this many bits, with a round for each number of `round_R`, an even count; each round swaps the
    halves, one of which may be a bit longer."""
    width, other = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    left, right = x >> other, x & ((np.uint64(1) << other) - np.uint64(1))
    for number in round_R:
        mixed = (right + number) * _MIX_1  # modulo 2^64
        mixed ^= mixed >> np.uint64(29)
        mixed *= _MIX_2
        mixed >>= np.uint64(64) - width
        left, right = right, left ^ mixed
        width, other = other, width
    return (left << other) | right


def torch_seed(seed: int, purpose: str, step: int = 0) -> int:
    """A seed for torch's generators: for the initial weights of a named network, or for the draws of one step."""
    return int(_start(seed, purpose, step)) % (2**63)
