from __future__ import annotations

import numpy as np
import pytest

from pageflight.sampling.philox import philox4x32, uniforms


def words(*values: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([value], np.uint64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """From kat_vectors of the authors' Random123: a wrong round constant still looks random."""
    got = philox4x32(words(*counter), words(*key))  # type: ignore[arg-type]
    assert tuple(int(word[0]) for word in got) == expected


def test_a_number_does_not_depend_on_what_is_drawn_beside_it() -> None:
    generator = np.random.default_rng(0)
    seeds = generator.integers(0, 2**64, 200, np.uint64)
    indices = generator.integers(0, 8, 200, np.uint64)
    positions = generator.integers(0, 4096, 200, np.uint64)
    together = uniforms(seeds, indices, positions)
    alone = [uniforms(seeds[i : i + 1], indices[i : i + 1], positions[i : i + 1])[0] for i in range(200)]
    assert together.tolist() == alone


def test_seed_sequence_and_position_each_change_the_number() -> None:
    """All 64 bits of the seed count: a key cut to 32 bits made seeds 5 and 5 + 2^32 twins."""
    base = (5, 1, 100)
    others = [(6, 1, 100), (5 + 2**32, 1, 100), (5, 2, 100), (5, 1, 101)]
    columns = [np.array(column, np.uint64) for column in zip(base, *others, strict=True)]
    assert len(set(uniforms(*columns).tolist())) == 5


def test_numbers_fill_the_unit_interval_evenly() -> None:
    count = 20_000
    numbers = uniforms(np.full(count, 7, np.uint64), np.zeros(count, np.uint64), np.arange(count, dtype=np.uint64))
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    observed = np.bincount((numbers * 50).astype(np.int64), minlength=50)
    chi_square = ((observed - count / 50) ** 2 / (count / 50)).sum()
    assert chi_square < 95  # 49 degrees of freedom: beyond it with probability 1e-4
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03
