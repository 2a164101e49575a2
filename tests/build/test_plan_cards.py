"""Names of GPUs on the command line."""

from __future__ import annotations

import re

import pytest

from pageflight.core.errors import ConfigError
from pageflight_build.plan.cards import GIB, KNOWN, Card, Cards, parse_cards


def here() -> Card:
    return Card(name="cpu", kind="cpu", memory_bytes=GIB)


def parsed(text: str) -> Cards:
    return parse_cards(text, here)


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("2xH100-94", 2, "H100-94"),
        ("h100-80", 1, "H100-80"),
        ("L4", 1, "L4-24"),
        ("8xL40S", 8, "L40S-48"),
        ("RTX 6000 Ada", 1, "RTX-6000-Ada-48"),
        ("4xRTX-PRO-6000", 4, "RTX-PRO-6000-96"),
        ("3x1g.18gb", 3, "H200-141/1g.18gb"),
        ("H100-94/1g.12gb", 1, "H100-94/1g.12gb"),
        ("cpu", 1, "cpu"),
    ],
)
def test_cards_are_found_by_the_names_people_write(text: str, count: int, name: str) -> None:
    """L4 was taken for a prefix of L40S."""
    cards = parsed(text)
    assert (cards.count, cards.card.name) == (count, name)


def test_any_card_can_be_given_by_memory_and_bandwidth() -> None:
    """A card that came out yesterday is in no table."""
    cards = parsed("2x80GiB@3350GB/s")
    assert (cards.count, cards.card.memory_bytes, cards.card.bandwidth_bytes_s) == (2, 80 * GIB, 3350e9)
    assert parsed("cpu@1.5TB/s").card.bandwidth_bytes_s == 1.5e12
    measured = parsed("A100-80@1700GB/s").card
    assert measured.bandwidth_bytes_s == 1700e9 and measured.memory_bytes == KNOWN["A100-80"].memory_bytes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("V100", "known are .*H100-80.*1g.10gb.*cpu"),
        ("2x", "known are"),
        ("H100", "write H100-80 or H100-94"),
        ("1g.10gb", "A100-40/1g.10gb or A100-80/1g.10gb or H100-80/1g.10gb"),
        ("80GiB", "write 80GiB@3350GB/s"),
        ("0GiB@5GB/s", "'0' is no amount"),
        ("1.2.3GiB@5GB/s", "'1.2.3' is no amount"),
        ("L4@0GB/s", "'0' is no amount"),
        ("0xL4", "from 1 to 1024"),
        ("2xcpu", "one cpu"),
    ],
)
def test_what_is_no_card_is_refused_with_what_is(text: str, says: str) -> None:
    """H100 alone was planned with 80 GiB for somebody who had 94."""
    with pytest.raises(ConfigError, match=re.escape(f"gpus={text!r}") + ".*" + says):
        parsed(text)


def test_the_table_is_plausible() -> None:
    """A row with memory in GB and bandwidth in TB/s would hold everything and be slow."""
    for name, card in KNOWN.items():
        assert card.name == name and card.bandwidth_bytes_s is not None and card.bf16_flops_s is not None
        assert 50e9 < card.bandwidth_bytes_s < 10e12 and 4 * GIB < card.memory_bytes < 200 * GIB
        assert 10e12 < card.bf16_flops_s < 3e15
        assert (card.fp8_flops_s is not None) == (card.capability is not None and card.capability >= 89)
        nominal = float(re.findall(r"\d+(?=$|gb$)", name)[0])
        assert 0.85 * nominal < card.memory_bytes / GIB <= nominal
