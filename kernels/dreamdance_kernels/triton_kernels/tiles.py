"""How a kernel cuts its work: from static tables, never tuned while training (ranks would race, graphs break)."""

from dataclasses import dataclass

import torch

INTERPRETED_ARCHITECTURE = (8, 0)  # the interpreter runs the smaller machine's tiles


@dataclass(frozen=True)
class Tile:
    """Rows of queries and of keys that one program holds at a time, and the warps and stages that work on them."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


def architecture_of(device: torch.device) -> tuple[int, int]:
    """(major, minor) compute capability whose tiles a device takes, such as (9, 0) on H100 and H200.

    12.x, Blackwell in workstations, takes those of 8.0: it has 99 KB of shared memory for a program, as 8.6 and 8.9
    have, and the same matrix instruction.
    """
    if device.type != "cuda":
        return INTERPRETED_ARCHITECTURE
    found = torch.cuda.get_device_capability(device)
    return (8, 0) if found[0] == 12 else found
