"""`tools/measure_step.py`: its contestants compute the same, and a table that was cut is continued."""

from pathlib import Path

import measure_step
import pytest
import step_contestants
import torch
from step_contestants import CONTESTANTS, GAINS, OURS, SIZES, STAGES, Contestant
from step_inputs import fill, make_batch, store_latents

from dreamdance.models.equal_rewrites import EQUAL_REWRITES
from dreamdance.training.stages.training_stage import stage_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return step_contestants.write_configs(tmp_path_factory.mktemp("networks"), SIZES["tiny"])


@pytest.mark.slow
@pytest.mark.parametrize("stage_name", STAGES)
def test_ours_and_plain_diffusers_have_equal_losses_and_gradients(stage_name: str, networks: Path) -> None:
    recipe = step_contestants.open_recipe(stage_name, "tiny", networks, Contestant(), precision="fp32")
    stage = stage_of(recipe)
    objective = stage.build(device="meta")
    trained = stage.set_trainable(objective)
    objective.to_empty(device=CPU).float()
    fill(objective)
    batch = make_batch(recipe, objective.draw(make_batch(recipe, {})))
    with torch.no_grad():
        from_latents = objective(store_latents(batch, stage.latent_names, objective)).loss
    ours = objective(batch).loss
    ours.backward()
    model, inputs = step_contestants.build_plain_model(recipe, networks, CPU)
    plain = model(inputs)
    plain.backward()
    assert plain.item() == pytest.approx(ours.item(), rel=1e-5)
    assert from_latents.item() == pytest.approx(ours.item(), rel=1e-5)
    assert 0.1 < ours.item() < 10, "predictions are not zero, and no activation explodes"
    of_ours = {name: value.grad for name, value in objective.named_parameters() if value.grad is not None}
    of_plain = {
        name.replace("class_embedding.", "domain_embedder.mlp."): value.grad
        for name, value in model.named_parameters()
        if value.grad is not None
    }
    assert sorted(of_ours) == sorted(of_plain) == trained
    difference = torch.stack([(of_plain[name] - of_ours[name]).norm() for name in trained]).norm()
    assert difference < 1e-5 * torch.stack([of_ours[name].norm() for name in trained]).norm()


def test_each_gain_is_one_difference_from_ours() -> None:
    rewrites = {one.without for one in GAINS.values()} - {"", "prepared inputs"}
    assert rewrites == EQUAL_REWRITES, "each rewrite is measured"
    for contestant in GAINS.values():
        assert (contestant.without != "") + len(contestant.overrides) == 1
        assert contestant.kind == CONTESTANTS[OURS].kind


def _row(stage: str, contestant: str, rounds: list[float], ours: list[float]) -> measure_step.Row:
    identity = {"commit": "abc", "machine": "CPU", "versions": "torch 0", "size": "tiny", "stage": stage}
    found = {"rounds": rounds, "peak_gib": 1.0, "loss": 0.5, "tf": 2.0, "operators": 7}
    return measure_step.make_row({**identity, "contestant": contestant}, found, {**found, "rounds": ours})


def test_a_table_that_was_cut_is_continued_with_what_it_lacks(tmp_path: Path) -> None:
    ours, plain, before = OURS, "plain, best settings", "ours at 5194bb1"
    rows = [_row("stage2", name, [2.0, 3.0], [1.0, 1.0]) for name in (ours, plain)]
    measure_step.write_rows(tmp_path / "steps.csv", rows)
    found = measure_step.read_rows(tmp_path / "steps.csv")
    wanted = {key: found[0][key] for key in ("commit", "machine", "versions", "size")}
    chosen = {name: CONTESTANTS[name] for name in (ours, plain, before)}
    assert measure_step.missing(found, {**wanted, "stage": "stage2"}, chosen) == [before]
    assert measure_step.missing(found, {**wanted, "stage": "stage1_domains"}, chosen) == [ours, plain, before]
    assert measure_step.missing(found, {**wanted, "commit": "def", "stage": "stage2"}, chosen) == [ours, plain, before]
    assert measure_step.groups([before]) == [[ours, before]], "ratios are to ours beside it"
    assert measure_step.groups([]) == []
    assert measure_step.groups([ours]) == [[ours]]
    assert measure_step.groups([ours, *"abcdef"]) == [[ours, *"abcd"], [ours, *"ef"]], "memory bounds a group"
    assert measure_step.of_row(found[1]) == {"rounds": [2.0, 3.0], "loss": 0.5, "tf": 2.0}


def test_a_row_has_the_ratio_of_each_round_and_its_spread() -> None:
    row = _row("stage2", "plain, best settings", [2.0, 3.0, 8.0], [1.0, 2.0, 2.0])
    assert [row[f"ratio {kind}"] for kind in ("median", "min", "max")] == ["2", "1.5", "4"]
    assert "| stage2 | plain, best settings | 3 (2 to 8) | 2 (1.5 to 4) | 1.000 | 2 | 7 | - |" in measure_step.markdown(
        [{column: row.get(column, "") for column in measure_step.COLUMNS}]
    )


def test_another_loss_than_ours_is_noticed() -> None:
    assert not measure_step.differs(1.00001, 1.0, 1e-4)
    assert measure_step.differs(1.001, 1.0, 1e-4)
    assert measure_step.differs(float("nan"), 1.0, 1e-4)


@pytest.mark.parametrize("words", [["--size", "huge"], ["--stages", "stage3"], ["--fast"], ["--only", "theirs"]])
def test_unknown_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        measure_step.main(words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_measures_in_turn_and_measures_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "plain, gradient checkpointing"
    words = ["--size", "tiny", "--stages", "stage1_geometry", "--rounds", "1", "--only", name]
    words += ["--csv", str(tmp_path / "steps.csv")]
    assert measure_step.main(words) == 0, capsys.readouterr().err
    ours, plain = rows = measure_step.read_rows(tmp_path / "steps.csv")
    assert [row["contestant"] for row in rows] == [OURS, name]
    assert float(plain["loss"]) == pytest.approx(float(ours["loss"]), rel=1e-5)
    assert float(plain["TF"]) > 1.05 * float(ours["TF"]), "it computes blocks again"
    assert len(plain["rounds"].split()) == 1
    taken = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0].strip() for line in taken] == [OURS, name]
    assert measure_step.main(words) == 0
    assert capsys.readouterr().err == ""
    assert measure_step.read_rows(tmp_path / "steps.csv") == rows
