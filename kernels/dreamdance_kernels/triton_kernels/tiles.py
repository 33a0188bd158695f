"""How a kernel cuts its work: by static tables. Nothing is tuned during training: ranks would race, graphs break."""

from dataclasses import dataclass

import torch

INTERPRETED_ARCHITECTURE = (8, 0)  # the interpreter takes the tiles of the smaller GPU


@dataclass(frozen=True)
class Tile:
    """Rows of queries and of keys that one program holds at a time, its warps, and its pipeline stages."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


def architecture_of(device: torch.device) -> tuple[int, int]:
    """The (major, minor) compute capability whose tiles a device uses, such as (9, 0) on H100 and H200.

    Capability 12.x (Blackwell in workstations) uses the tiles of 8.0: its programs have 99 KB of shared memory, as on
    8.6 and 8.9, and the same matrix instruction.
    """
    if device.type != "cuda":
        return INTERPRETED_ARCHITECTURE
    found = torch.cuda.get_device_capability(device)
    return (8, 0) if found[0] == 12 else found
