"""Counts the work of torch's operators while they run: floating-point operations, bytes moved, and operators.

Counts real tensors and fake ones alike. This module knows nothing of ours: tools load it beside an older package.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# Where an operator belongs: computed again in the backward pass is what gradient checkpointing did not keep.
Phase = Literal["encoders", "forward", "recomputation", "backward"]
PHASES: tuple[Phase, ...] = ("encoders", "forward", "recomputation", "backward")

_aten = torch.ops.aten


def _count_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _count_attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


# Formulas that torch's registry lacks. Ours for the attention of `dreamdance_kernels` are in the registry.
MORE_FORMULAS: dict[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
}
# Operators that move no data although torch does not call them views.
_WITHOUT_DATA = frozenset(
    {
        _aten._unsafe_view,
        _aten.lift_fresh,
        _aten.empty,
        _aten.empty_like,
        _aten.empty_strided,
        _aten.new_empty,
        _aten.new_empty_strided,
        _aten._local_scalar_dense,
        _aten.is_same_size,
        _aten.sym_size,
    }
)


@dataclass
class Work:
    """What the operators of one phase do.

    Attributes:
        flops: floating-point operations of products, convolutions and attention, by the dtype of their first input.
            A multiplication and an addition are two.
        num_bytes: sizes of the inputs and outputs of all operators: what they move if nothing stays in a cache.
        product_bytes: the part of `num_bytes` that belongs to the operators with `flops`.
        num_operators: operators that compute or copy; views and allocations are none.
    """

    flops: Mapping[torch.dtype, int]
    num_bytes: int = 0
    product_bytes: int = 0
    num_operators: int = 0

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def __add__(self, other: "Work") -> "Work":
        dtypes = {*self.flops, *other.flops}
        return Work(
            {dtype: self.flops.get(dtype, 0) + other.flops.get(dtype, 0) for dtype in dtypes},
            self.num_bytes + other.num_bytes,
            self.product_bytes + other.product_bytes,
            self.num_operators + other.num_operators,
        )


NO_WORK = Work({})


def count_model_flops(work: Mapping[Phase, Work]) -> int:
    """Operations that any implementation needs: without those that checkpointing repeats."""
    return sum(of_phase.total_flops for phase, of_phase in work.items() if phase != "recomputation")


class OperatorCount(TorchDispatchMode):
    """Counts, while it is entered, the work of all operators.

    Attributes:
        phase: where the next operators belong; within `"backward"`, those that run in the forward pass of a module are
            counted as `"recomputation"`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hooks = ExitStack()
        self._num_running = 0  # modules whose forward pass runs
        self.phase: Phase = "forward"
        self._flops: dict[tuple[Phase, torch.dtype], int] = defaultdict(int)
        self._sums: dict[Phase, list[int]] = defaultdict(lambda: [0, 0, 0])
        self._formulas = {**flop_registry, **MORE_FORMULAS}

    @property
    def work(self) -> dict[Phase, Work]:
        """What was counted so far."""
        return {
            phase: Work(
                {dtype: count for (of_phase, dtype), count in self._flops.items() if of_phase == phase},
                *self._sums[phase],
            )
            for phase in PHASES
        }

    def __enter__(self) -> Self:
        super().__enter__()
        self._hooks.callback(register_module_forward_pre_hook(lambda *_: self._change_running(1)).remove)
        # Also if the pass ends early: a repeated pass stops as soon as it has computed what was not kept.
        after = register_module_forward_hook(lambda *_: self._change_running(-1), always_call=True)
        self._hooks.callback(after.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        super().__exit__(*error)

    def _change_running(self, change: int) -> None:
        self._num_running += change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        # The namespace `prim` has questions to fake tensors, such as their device.
        if func.is_view or func.namespace == "prim" or operator in _WITHOUT_DATA:
            return result
        repeats = self.phase == "backward" and self._num_running > 0
        phase: Phase = "recomputation" if repeats else self.phase
        outs = {argument.name for argument in func._schema.arguments if argument.is_out}  # written, not read
        read = (args, {name: value for name, value in (kwargs or {}).items() if name not in outs})
        inputs = {id(value): value for value in tree_leaves(read) if isinstance(value, Tensor)}.values()
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        num_bytes = sum(map(_size, inputs)) + sum(map(_size, outputs))
        sums = self._sums[phase]
        sums[0] += num_bytes
        sums[2] += 1
        if (formula := self._formulas.get(operator)) is not None:
            sums[1] += num_bytes
            dtype = next(iter(inputs)).dtype
            self._flops[phase, dtype] += formula(*args, **(kwargs or {}), out_val=result)
        return result

    @contextmanager
    def of_encoders(self, *networks: nn.Module) -> Iterator[None]:
        """While entered, the forward passes of these networks' parts are counted as `"encoders"`."""
        with ExitStack() as hooks:
            for network in networks:
                for part in (network, *network.children()):  # the autoencoder's parts are called directly
                    hooks.callback(part.register_forward_pre_hook(lambda *_: self._enter("encoders")).remove)
                    hooks.callback(part.register_forward_hook(lambda *_: self._enter("forward")).remove)
            yield

    def _enter(self, phase: Phase) -> None:
        self.phase = phase


def _size(tensor: Tensor) -> int:
    """Bytes that are read or written: an expanded tensor has fewer than elements."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())
