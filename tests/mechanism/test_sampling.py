"""Poisson subsampling: exactly the stated rate, independent, and the same set however it is cut."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpdist.mechanism import sampling
from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.sampling import (
    inclusion_probability,
    poisson_sample,
    shard_bounds,
    threshold,
    words,
)

KEYS = Keys(Secret.from_insecure_seed(3), b"sampling tests")
KEY = KEYS.sampling(0)
#: Seeds are fixed, so these tests never flake; a correct sampler fails one of them once in 10^5.
ALPHA = 1e-5
PINNED = [16, 17, 19, 23, 33, 51, 54, 58, 62, 64, 65, 73]


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 by the paper (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)."""
    mask = 2**64 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(p1 >> 64) ^ c[1] ^ k[0], p1 & mask, (p0 >> 64) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_words_are_philox4x64_of_the_counter() -> None:
    # The known answer of the authors' Random123 library for counter 0, key 0.
    assert philox4x64([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    # numpy increments the counter before it generates: block b of the stream is counter b + 1.
    for block in (0, 1, 319_999_999, 2**62):
        expected = philox4x64([block + 1, 0, 0, 0], [int(k) for k in KEY])
        assert [int(w) for w in words(KEY, 4 * block, 4 * block + 4)] == expected


def test_any_part_of_the_stream_is_the_slice_of_the_whole() -> None:
    whole = np.random.Philox(key=KEY).random_raw(64)
    for start in range(20):
        for stop in range(start, 40):
            part = words(KEY, start, stop)
            assert part.dtype == np.uint64
            assert np.array_equal(part, whole[start:stop])


@pytest.mark.parametrize("hosts", [1, 2, 3, 7, 80])
@pytest.mark.parametrize("size", [50, 1003, 4096])
def test_the_union_over_hosts_is_the_whole_sample(hosts: int, size: int) -> None:
    whole = poisson_sample(KEY, 0.37, 0, size)
    bounds = shard_bounds(size, hosts)
    assert bounds[0] == 0
    assert bounds[-1] == size
    assert max(np.diff(bounds)) - min(np.diff(bounds)) <= 1
    shards = [poisson_sample(KEY, 0.37, a, b) for a, b in pairwise(bounds)]
    assert np.array_equal(np.concatenate(shards), whole)
    assert 0 < len(whole) < size


@pytest.mark.parametrize("start", [0, 3, 2**20 - 1])
def test_a_sample_longer_than_a_chunk_has_no_seam(start: int) -> None:
    stop = 2 * 2**20 + 5
    expected = np.flatnonzero(words(KEY, start, stop) < np.uint64(2**62)) + start
    assert np.array_equal(poisson_sample(KEY, 0.25, start, stop), expected)


def test_a_sample_is_pinned() -> None:
    """Another generator, order of words or threshold would give resumed runs other samples."""
    assert poisson_sample(KEY, 0.1, 0, 100).tolist() == PINNED


# The rate


@pytest.mark.parametrize("q", [1.0, 0.5, 0.1, 1 / 3, 1e-4, 2**-23, 1e-9, 2**-64, 5e-20, np.nextafter(1.0, 0.0)])
def test_the_threshold_is_the_nearest_integer(q: float) -> None:
    assert abs(threshold(q) - Fraction(q) * 2**64) <= Fraction(1, 2)
    assert 1 <= threshold(q) <= 2**64
    assert (threshold(q) == 2**64) == (q == 1.0)


@given(st.floats(min_value=2**-64, max_value=1))
@settings(derandomize=True, deadline=None)
def test_the_accountant_gets_exactly_the_probability_that_is_sampled(q: float) -> None:
    assert Fraction(inclusion_probability(q)) * 2**64 == threshold(q)


def test_a_rate_below_the_grid_is_rounded_up_never_to_zero() -> None:
    assert threshold(1e-30) == 1
    assert inclusion_probability(1e-30) == 2.0**-64


@pytest.mark.parametrize("q", [0.0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_a_rate_outside_the_unit_interval_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="sampling probability"):
        threshold(q)


def test_everyone_is_sampled_at_rate_one() -> None:
    assert np.array_equal(poisson_sample(KEY, 1.0, 3, 1000), np.arange(3, 1000))


@pytest.mark.parametrize("q", [1e-4, 2**-64, 0.5, 1 / 3, float(np.nextafter(1.0, 0.0))])
def test_inclusion_changes_exactly_at_the_threshold(q: float, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = threshold(q)
    edge = [0, limit - 1, limit, min(limit + 1, 2**64 - 1), 2**64 - 1]
    monkeypatch.setattr(sampling, "words", lambda key, start, stop: np.array(edge, np.uint64))
    assert poisson_sample(KEY, q, 0, len(edge)).tolist() == [i for i, word in enumerate(edge) if word < limit]


def test_the_rate_is_not_that_of_a_float32_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 uniform below q = 1e-4 has probability 839 / 2^23, 1.6e-4 too many: such a sampler fails here."""
    q = 1e-4
    float32_limit = -(-Fraction(q) * 2**23 // 1) * 2**41
    excess = float32_limit - threshold(q)
    assert excess / threshold(q) > 1e-4
    between = [threshold(q) + int(excess * share) for share in (0.01, 0.5, 0.99)]
    assert all(np.float32((word >> 41) / 2**23) < q for word in between)  # a float32 uniform would include them
    monkeypatch.setattr(sampling, "words", lambda key, start, stop: np.array(between, np.uint64))
    assert len(poisson_sample(KEY, q, 0, 3)) == 0
    assert abs(inclusion_probability(q) / q - 1) < 1e-15


def binomial_p_value(counts: np.ndarray, n: int, p: float) -> float:
    """Chi-square p-value of observed counts against Binomial(n, p), in bins that expect at least 8."""
    edges, total, support = [], 0.0, np.arange(n + 1)
    for k, probability in zip(support, stats.binom.pmf(support, n, p) * len(counts), strict=True):
        total += probability
        if total >= 8:
            edges.append(k)
            total = 0.0
    edges[-1] = n
    assert len(edges) >= 5
    observed = np.histogram(counts, bins=[-0.5, *(e + 0.5 for e in edges)])[0]
    cumulative = np.array([0.0, *stats.binom.cdf(edges, n, p)])
    return float(stats.chisquare(observed, np.diff(cumulative) * len(counts)).pvalue)


@pytest.mark.parametrize("q", [0.02, 0.3, 0.5, 0.9])
def test_samples_are_poisson_subsamples(q: float) -> None:
    """Every example's count, every batch's size and every pair's joint count are binomial as they must be."""
    steps, size = 600, 1200
    member = np.zeros((steps, size), bool)
    for step in range(steps):
        member[step, poisson_sample(KEYS.sampling(step), q, 0, size)] = True
    assert binomial_p_value(member.sum(axis=0), steps, q) > ALPHA  # each example's inclusions over the steps
    assert binomial_p_value(member.sum(axis=1), size, q) > ALPHA  # each step's batch size: random, not constant
    # Joint inclusions have probability q^2: neighbours, words of one Philox block, other blocks, other steps.
    for gap in (1, 2, 3, 4, 5, 64):
        both = int((member[:, gap:] & member[:, :-gap]).sum())
        assert stats.binomtest(both, steps * (size - gap), q * q).pvalue > ALPHA, f"examples {gap} apart"
    for gap in (1, 2, 100):
        both = int((member[gap:] & member[:-gap]).sum())
        assert stats.binomtest(both, (steps - gap) * size, q * q).pvalue > ALPHA, f"steps {gap} apart"
    for gap in (1, 3, 4):  # and no shift of one step's stream is another's
        both = int((member[1:, gap:] & member[:-1, :-gap]).sum())
        assert stats.binomtest(both, (steps - 1) * (size - gap), q * q).pvalue > ALPHA
    chosen = np.random.default_rng(0).choice(size, 40, replace=False)
    correlation = np.corrcoef(member[:, chosen], rowvar=False)[np.triu_indices(40, 1)]
    assert np.abs(correlation).max() * np.sqrt(steps) < stats.norm.isf(ALPHA / 2 / len(correlation))


def test_small_rates_hit_as_often_as_they_should() -> None:
    q, size, steps = 1e-4, 2**21, 12
    hits = sum(len(poisson_sample(KEYS.sampling(step), q, 0, size)) for step in range(steps))
    assert stats.binomtest(hits, size * steps, q).pvalue > ALPHA


def test_the_words_are_uniform() -> None:
    w = words(KEY, 0, 2**18)
    assert stats.kstest(w.astype(np.float64) / 2.0**64, "uniform").pvalue > ALPHA
    bits = np.unpackbits(w.view(np.uint8)).reshape(len(w), 64).sum(axis=0)
    worst = np.abs(bits - len(w) / 2).max() / np.sqrt(len(w) / 4)
    assert worst < stats.norm.isf(ALPHA / 128)
