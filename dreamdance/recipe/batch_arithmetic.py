"""How a batch is divided (C8): batch_size = micro_batch_size x accumulation steps x processes."""

from dreamdance.errors import RecipeError


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro batches per optimizer step on each process, so that a step always sees `batch_size` samples.

    Raises:
        RecipeError: the batch cannot be divided in this way; the text names the values that work.
    """
    steps, rest = divmod(batch_size, micro_batch_size * world_size)
    if steps > 0 and rest == 0:
        return steps
    if batch_size % micro_batch_size:
        raise RecipeError(
            f"micro_batch_size {micro_batch_size} does not divide batch_size {batch_size}; sizes that do: "
            f"{_divisors(batch_size)}"
        )
    raise RecipeError(
        f"batch_size {batch_size} is not micro_batch_size {micro_batch_size} x accumulation x {world_size} processes; "
        f"numbers of processes that fit: {_divisors(batch_size // micro_batch_size)} (change cluster.nodes, "
        "cluster.tasks_per_node or micro_batch_size; batch_size changes the result)"
    )


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
