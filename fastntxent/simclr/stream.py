"""Random number generators seeded by purpose."""

import hashlib

import torch


def stream(seed: int, purpose: str, index: int) -> torch.Generator:
    """Return a CPU generator whose 32-bit seed is a hash of the arguments. Different arguments give unrelated numbers,
    unless their hashes happen to be equal."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
