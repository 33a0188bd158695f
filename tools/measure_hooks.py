"""Measures the host time that DeepSpeed's hooks take for each trainable tensor in the backward pass and in the update.

    python tools/measure_hooks.py [--tensors 1244] [--rounds 9]

The networks are 1,244 tiny tensors, as many as stage 1's first step trains, so that arithmetic takes almost no time:
what is left is the host's work for each tensor, which a GPU would wait for. Each line changes one of DeepSpeed's own
settings, from those that `training/deepspeed_config.py` generates; `plain` is torch without DeepSpeed. All take the
same steps in turn; the last column is the largest difference of a weight from those of the first line after them.
"""

import argparse
import os
import statistics
import time
from typing import Any
from unittest import mock

# Setting of `zero_optimization` -> value, by the name of the line.
VARIANTS: dict[str, dict[str, Any]] = {
    "generated": {},
    "reduce_scatter false": {"reduce_scatter": False},
    "contiguous_gradients false": {"contiguous_gradients": False},
    "bucket of a tenth": {"reduce_bucket_size": 0.1},
    "overlap_comm": {"overlap_comm": True},
    "round_robin_gradients": {"round_robin_gradients": True},
    "one all-reduce per rank": {"use_multi_rank_bucket_allreduce": False},
    "stage 1": {"stage": 1},
}


def main() -> None:
    """Runs all variants in this process, one rank, one thread, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=1244)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    import torch

    from dreamdance.runtime.process_group import process_group
    from dreamdance.runtime.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    with process_group(ranks, timeout_seconds=600):
        measured = {name: Variant(arguments.tensors, ranks, changes) for name, changes in VARIANTS.items()}
        measured["plain"] = Variant(arguments.tensors, ranks, None)
        for _ in range(arguments.rounds + 1):
            for variant in measured.values():
                variant.step()
    expected = measured["generated"].weights()
    print(f"{'':<28}{'backward':>12}{'update':>12}  us per tensor (median; CPU time)   difference")
    for name, variant in measured.items():
        backward, update = (statistics.median(seconds[1:]) * 1e6 / arguments.tensors for seconds in variant.seconds)
        difference = (variant.weights() - expected).abs().max().item()
        print(f"{name:<28}{backward:>12.1f}{update:>12.1f}{'':<37}{difference:>8.1g}")


class Variant:
    """An engine with changed settings of DeepSpeed, or plain torch if `changes` is None."""

    def __init__(self, num_tensors: int, ranks: Any, changes: dict[str, Any] | None) -> None:
        import torch

        from dreamdance.training import engine as engine_module
        from dreamdance.training.deepspeed_config import deepspeed_config

        torch.manual_seed(0)
        self.objective = _make_objective(num_tensors)
        self.seconds: list[list[float]] = [[], []]
        self.engine: Any = None
        self.optimizer: Any = None
        if changes is None:
            self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-3)
            return
        generate = deepspeed_config

        def changed(*words: Any, **named: Any) -> dict[str, Any]:
            config = generate(*words, **named)
            section = config["zero_optimization"]
            section.update(changes)
            if (share := section["reduce_bucket_size"]) < 1:
                section["reduce_bucket_size"] = 2 * round(share * named["num_trainable"] / 2)
            return config

        with mock.patch.object(engine_module, "deepspeed_config", changed):
            self.engine = engine_module.Engine(self.objective, _recipe(), ranks, deterministic=True)

    def step(self) -> None:
        """One step; notes the CPU time of its backward pass and of its update."""
        import torch

        batch = torch.ones(1)
        loss = self.engine.forward(batch).loss if self.engine else self.objective(batch).loss
        started = time.process_time()
        if self.engine:
            self.engine.backward(loss)
        else:
            loss.backward()
        between = time.process_time()
        if self.engine:
            self.engine.update(1e-3)
        else:
            torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.seconds[0].append(between - started)
        self.seconds[1].append(time.process_time() - between)

    def weights(self) -> Any:
        """All weights after the steps, flat."""
        import torch

        return torch.cat([parameter.detach().float().flatten() for parameter in self.objective.parameters()])


def _make_objective(num_tensors: int) -> Any:
    import torch

    from dreamdance.training.objectives.output import ObjectiveOutput

    class Tensors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tensors = torch.nn.ParameterList(torch.randn(4) for _ in range(num_tensors))

        def forward(self, batch: torch.Tensor) -> ObjectiveOutput:
            loss = sum((tensor * batch).square().mean() for tensor in self.tensors)
            return ObjectiveOutput(loss, loss.detach()[None], torch.zeros(3), torch.zeros(3))

    return Tensors()


def _recipe() -> Any:
    from pathlib import Path

    from dreamdance.recipe import load_recipe

    recipe = Path(__file__).parents[1] / "recipes" / "demo" / "stage1_domains.yaml"
    words = ["batch_size=1", "micro_batch_size=1", "cluster.tasks_per_node=1", "precision=bf16"]
    return load_recipe(recipe, words)


if __name__ == "__main__":
    main()
