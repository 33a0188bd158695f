"""`optimizer.lr_scales`: which parameters a name stands for, what is refused, and the engine's groups."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from support.recipes import tiny_stage1_recipe

from dreamdance.errors import RecipeError
from dreamdance.runtime.process_group import process_group
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.engine import Engine
from dreamdance.training.parameter_groups import REST, group_names
from dreamdance.training.planning.plan import make_plan
from dreamdance.training.stages.training_stage import stage_of

TRAINABLE = ["unet.conv_in.weight", "unet.up.0.weight", "unet.up.1.weight", "pose_encoder.conv.weight"]


def test_the_longest_name_counts_and_the_rest_comes_first():
    groups = group_names(TRAINABLE, [], {"unet": 0.5, "unet.up.1": 2.0})
    assert groups == {REST: [TRAINABLE[3]], "unet": TRAINABLE[:2], "unet.up.1": [TRAINABLE[2]]}
    assert next(iter(groups)) == REST


def test_without_scales_there_is_one_group_in_the_old_order():
    assert group_names(TRAINABLE, [], {}) == {REST: TRAINABLE}


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ({"unet.domain_embeder": 10.0}, "'unet.domain_embeder': there is no such part"),
        ({"un": 10.0}, "'un': there is no such part"),
        ({"reference_unet": 10.0}, "'reference_unet': it does not train in this recipe"),
        ({"unet.up": 2.0, "unet.up.0": 2.0, "unet.up.1": 2.0}, "'unet.up': longer names"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused_with_those_that_are_accepted(scales, reason):
    with pytest.raises(RecipeError) as refused:
        group_names(TRAINABLE, ["reference_unet.conv_in.weight"], scales)
    assert f"optimizer.lr_scales names {reason}" in str(refused.value)
    assert "unet, unet.conv_in, unet.up, pose_encoder, pose_encoder.conv," in str(refused.value)


def test_a_dry_run_refuses_what_the_training_would():
    recipe = tiny_stage1_recipe("geometry", {"optimizer.lr_scales": {"pose_encoder": 2.0}})
    with pytest.raises(RecipeError, match=r"'pose_encoder': it does not train"):
        make_plan(stage_of(recipe))


class Output(NamedTuple):
    loss: torch.Tensor


class Lines(torch.nn.Module):
    """An objective of three parts of different sizes; the group of the second is smaller than an alignment."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.third = (torch.nn.Linear(size, 1) for size in (7, 1, 4))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, batch: torch.Tensor) -> Output:
        outputs = [part(batch[: part.in_features]) for part in (self.first, self.second, self.third)]
        return Output(torch.stack(outputs).square().sum())


@pytest.fixture
def group() -> Iterator[None]:
    with process_group(Ranks(), timeout_seconds=60):
        yield


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_each_group_takes_adamw_s_steps_at_its_own_rate(zero_stage):
    scales = {"second": 10.0, "first.bias": 0.1}
    changes = {"sharding.zero_stage": zero_stage, "batch_size": 1, "micro_batch_size": 1}
    changes |= {"optimizer.lr_scales": scales, "optimizer.gradient_clipping": 0.0}
    engine = Engine(Lines(), tiny_stage1_recipe(changes=changes), Ranks(), deterministic=True)
    plain = Lines()
    rates = {"first.weight": 1.0, "first.bias": 0.1, "second.weight": 10.0, "second.bias": 10.0}
    optimizer = torch.optim.AdamW(
        [{"params": [value], "lr": 0.01 * rates.get(name, 1.0)} for name, value in plain.named_parameters()],
        weight_decay=0.01,
    )
    for step in range(3):
        batch = torch.linspace(-1, 1 + step, 7)
        engine.backward(engine.forward(batch).loss)
        assert engine.update(0.01).applied
        optimizer.zero_grad()
        plain(batch).loss.backward()
        optimizer.step()
    assert engine.scaled_rates == pytest.approx({"second": 0.1, "first.bias": 0.001})
    expected = dict(plain.named_parameters())
    gathered = dict(engine.gather_parameters(engine.masters))
    assert gathered.keys() == expected.keys()
    for name, value in gathered.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)
        torch.testing.assert_close(engine.trainable[name], expected[name], rtol=1e-6, atol=0)
    pieces = {fragment.name: fragment.of(engine.masters).numel() for fragment in engine.fragments()}
    assert pieces == {name: value.numel() for name, value in expected.items()}
