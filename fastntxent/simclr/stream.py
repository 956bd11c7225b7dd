"""Random numbers that are a function of what they are for."""

import hashlib

import torch


def stream(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator that is a function of its arguments; different arguments give unrelated numbers."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
