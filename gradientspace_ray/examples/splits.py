"""Where a hash puts an example: its split, and whether its finetune holds it out."""

import hashlib


def hashed_position(key: str, purpose: str = "") -> float:
    """A number in [0, 1) that the words of a key decide; keys that differ in case or spacing have the same.

    Args:
        key: such as an example's `split_key`.
        purpose: positions for one purpose say nothing about those for another.
    """
    words = " ".join(key.lower().split())
    return int.from_bytes(hashlib.sha256((purpose + words).encode()).digest()[:8], "big") / 2**64
