"""Describes how a kernel is built for one architecture, so that it can be compiled and inspected without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KernelBuild:
    """One variant of a kernel: everything that Triton's compiler needs.

    Args:
        name: unique; the name in the table of resources, such as `long_forward_d40_two_segments`.
        function: the `triton.jit` function.
        architecture: (major, minor) compute capability for which the tile was chosen.
        signature: type of every run-time argument by name, such as `*bf16` or `i32`.
        constants: value of every `tl.constexpr` argument by name.
        num_warps: warps of one program.
        num_stages: depth of the software pipeline.
        divisible_by_16: run-time arguments promised to be multiples of 16 (pointers, aligned strides).
    """

    name: str
    function: Any
    architecture: tuple[int, int]
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible_by_16: frozenset[str] = frozenset()
