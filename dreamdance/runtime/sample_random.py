"""Random numbers that depend on the sample, not on the process.

Window, crop, reference frame, timestep, noise and dropouts of a sample are keyed by (seed, epoch, sample id), so that
the number of ranks, the number of data workers and restarts do not change the training samples (contract C8).
"""

from collections.abc import Sequence
from hashlib import blake2b

import torch


def sample_generator(key: Sequence[int], purpose: str) -> torch.Generator:
    """Returns a new CPU generator for one sample and one purpose.

    torch's CPU generator keeps 32 bits of its seed: among a million samples about a hundred pairs draw the same numbers
    by chance, which does no harm. No code may rely on all generators being different.

    Args:
        key: (seed, epoch, sample id).
        purpose: what is drawn, e.g. `"noise"`. The draws for different purposes of one sample are independent.
    """
    words = [*(str(int(part)) for part in key), purpose]
    digest = blake2b("/".join(words).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
