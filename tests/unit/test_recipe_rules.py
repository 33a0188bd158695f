"""Relations between values: each broken one is found, names the key to change, and is shown at that key."""

import pytest

from dreamdance.errors import RecipeError
from dreamdance.recipe import load_recipe

SHARED = """
max_steps: 100
batch_size: 8
micro_batch_size: 2
data:
  train: {local: data/train}
  validation: {local: data/validation}
  width: 32
  height: 48
  num_frames: 8
optimizer: {lr: 1e-4}
"""
STAGE1 = f"""task: stage1
name: one
train: temporal
model:
  unet: {{config: {{block_out_channels: [32, 64, 64]}}}}
  autoencoder: {{patch_size: 2}}
  image_encoder: {{stand_in_width: 16}}
  geometry_attention: true
  temporal_attention: true
{SHARED}"""
STAGE2 = f"""task: stage2
name: two
model:
  unet: {{config: {{block_out_channels: [32, 64]}}}}
  autoencoder: {{patch_size: 2}}
  image_encoder: {{stand_in_width: 16}}
objective: {{geometry_width: 32, geometry_height: 48}}
{SHARED}"""
PREPARE = "task: prepare\nname: three\noutput: data\n"
ANIMATE = "task: animate\nname: four\nmanifest: m.jsonl\noutput: out\nanimation_from: two\n"
DANCERS = "dancers={num_train_clips: 2, num_validation_clips: 1}"


def problems(tmp_path, text, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_recipe(path, overrides)
    except RecipeError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(("text", "words"), [(STAGE1, []), (STAGE2, []), (PREPARE, [DANCERS]), (ANIMATE, [])])
def test_the_recipes_that_the_other_tests_break_are_valid(tmp_path, text, words):
    assert problems(tmp_path, text, *words) == []


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_world_sizes_that_divide_the_batch_are_accepted_and_accumulate(tmp_path, world_size):
    path = tmp_path / "recipe.yaml"
    path.write_text(STAGE1, encoding="utf-8")
    recipe = load_recipe(path, [f"cluster.tasks_per_node={world_size}"])
    assert recipe.micro_batch_size * recipe.accumulation_steps * world_size == recipe.batch_size


def test_a_world_size_that_does_not_divide_names_those_that_do(tmp_path):
    (problem,) = problems(tmp_path, STAGE1, "cluster.tasks_per_node=3")
    assert "numbers of processes that fit: 1, 2, 4 " in problem
    assert "this recipe asks for 1 node x 3 processes" in problem


def test_nodes_count_towards_the_world_size(tmp_path):
    assert "8 processes" in problems(tmp_path, STAGE1, "cluster.nodes=2", "cluster.tasks_per_node=4")[0]


def test_a_micro_batch_that_does_not_divide_names_those_that_do(tmp_path):
    (problem,) = problems(tmp_path, STAGE1, "micro_batch_size=3")
    assert "sizes that do: 1, 2, 4, 8" in problem


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (STAGE1, ["cluster.tasks_per_node=2", "cluster.gpus_per_node=1"], "every process drives one GPU"),
        (STAGE1, ["cluster.environment={A-B: x}"], "'A-B' is not a valid name of an environment variable"),
        (STAGE1, ["data.stride=[4, 2]"], "data.stride [4, 2] is [smallest, largest]"),
        (STAGE1, ["data.filters.motion=[0.3, 0.1]"], "data.filters.motion [0.3, 0.1] is [low, high]"),
        (STAGE1, ["data.validation.local=data/train"], "are the same folder"),
        (STAGE1, ["optimizer.warmup_steps=101"], "optimizer.warmup_steps 101 is more than max_steps 100"),
        (STAGE1, ["optimizer.betas=[0.9, 1.0]"], "optimizer.betas holds 1.0"),
        (STAGE1, ["checkpoint.keep_every_steps=1500"], "is not a multiple of checkpoint.every_steps 1000"),
        (STAGE1, ["checkpoint.allow_changed=[optimizer.lrr]"], "names 'optimizer.lrr', which is not a key"),
        (STAGE1, ["model.unet.path=weights"], "model.unet needs either path or config; both are given"),
        (STAGE1, ["model.unet.config=null"], "model.unet needs either path or config; neither is given"),
        (STAGE1, ["model.autoencoder.path=weights"], "model.autoencoder needs either path or patch_size"),
        (STAGE1, ["model.image_encoder.stand_in_width=null"], "needs either path or stand_in_width; neither"),
        (STAGE1, ["model.unet.subfolder=unet"], "model.unet.subfolder is a folder under model.unet.path"),
        (STAGE1, ["data.width=36"], "data.width 36 cannot be divided by 8 (autoencoder and UNet levels)"),
        (STAGE1, ["data.height=4"], "nearest that can: 8"),
        (STAGE1, ["init_from=one"], "init_from names this run itself"),
        (STAGE1, ["init_step=5"], "init_from is not given"),
        (STAGE1, ["train=domains"], "train: domains needs model.geometry_attention: false"),
        (STAGE1, ["train=domains", "model.geometry_attention=false"], "needs model.temporal_attention: false"),
        (STAGE1, ["train=geometry"], "train: geometry needs model.temporal_attention: false"),
        (STAGE1, ["model.temporal_attention=false"], "train: temporal needs model.temporal_attention: true"),
        (STAGE1, ["model.max_frames=16", "data.num_frames=17"], "data.num_frames 17 is more than model.max_frames 16"),
        (STAGE1, ["data.num_frames=8", "validation.num_frames=12"], "longer than data.num_frames 8, on which temporal"),
        (STAGE1, ["model.max_frames=8"], "sampling.window_frames 16 is more than model.max_frames 8"),
        (STAGE1, ["data.crop_scale=[1.0,0.9]"], "data.crop_scale [1, 0.9] is [smallest, largest]; swap the two"),
        (
            STAGE1,
            ["data.crop_scale=[0.9,1.0]", "data.latents={local: latents}"],
            "data.crop_scale [0.9, 1] crops pictures, but data.latents are of whole frames; set it to [1, 1]",
        ),
        (STAGE1, ["model.pose_channels=[16]"], "model.pose_channels has 1 widths; to reach the latents' size it needs"),
        (STAGE2, ["model.controller_channels=[16, 33]"], "must end with a multiple of model.controller_head_width 64"),
        (STAGE1, ["objective.beta_start=0.5"], "objective.beta_start 0.5 must be below objective.beta_end 0.012"),
        (STAGE1, ["objective.zero_terminal_snr=true"], "use prediction_type v_prediction or sample"),
        (STAGE1, ["objective.domain_loss={rgb: 0, normal: 0, depth: 0}"], "objective.domain_loss is zero"),
        (STAGE1, ["sampling.window_overlap=16"], "sampling.window_overlap 16 must be below"),
        (STAGE2, ["sampling.window_overlap=20"], "sampling.window_overlap 20 must be below"),
        (STAGE2, ["model.controls=[]"], "must name one control or more"),
        (STAGE2, ["model.controls=[pose, pose]"], "must name one control or more, each once"),
        (STAGE2, ["model.controller_channels=[64]"], "must hold two widths or more"),
        (STAGE2, ["objective.frame_control_dropout=1.0"], "objective.frame_control_dropout is 1, but must be below"),
        (STAGE2, ["objective.both_dropout=0.95"], "together they are at most 1"),
        (
            STAGE2,
            ["objective.geometry_width=31"],
            "objective.geometry_width 31 must be a multiple of 2, the autoencoder's factor",
        ),
        (PREPARE, [], "either a section dancers or a section videos; neither is given"),
        (PREPARE, [DANCERS, "videos={folder: x}"], "both are given"),
        (PREPARE, ["videos={folder: x, clip_frames: 8}"], "videos.min_clip_frames 16 is more than"),
        (PREPARE, ["videos={folder: x, width: 8}"], "give both videos.width and videos.height, or neither"),
        (ANIMATE, ["geometry.window_overlap=16"], "geometry.window_overlap 16 must be below geometry.window_frames"),
        (ANIMATE, ["animation.window_overlap=16"], "animation.window_overlap 16 must be below"),
        (
            ANIMATE,
            ["geometry_from=one", "geometry_width=384"],
            "geometry_width x geometry_height 384x384 has another aspect ratio than",
        ),
    ],
)
def test_a_broken_relation_is_found_and_names_the_key(tmp_path, text, words, message):
    found = problems(tmp_path, text, *words)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sbatch_arguments={nodes: '4'}", "'nodes 4' is not accepted here; set cluster.nodes"),
        ("sbatch_arguments={ntasks: '8'}", "set cluster.nodes and cluster.tasks_per_node"),
        ("sbatch_arguments={ntasks_per_node: '8'}", "'ntasks-per-node 8' is not accepted here; set cluster.tasks"),
        ("sbatch_arguments={cpus-per-task: '8'}", "set cluster.cpus_per_task"),
        (
            "sbatch_arguments={gpus-per-node: '8'}",
            "asks for 8 GPUs per node, but cluster.gpus_per_node is 0",
        ),
        ("sbatch_arguments={gpus_per_node: 'h100:8'}", "set cluster.gpus_per_node to as many"),
        ("sbatch_arguments={gres: 'nvme:1,gpu:a800:4,gpu:h100'}", "gres asks for 5 GPUs per node"),
        ("sbatch_arguments={gpus: '8'}", "set cluster.gpus_per_node; for GPUs of one kind see sbatch_arguments"),
        (
            "srun_arguments=['--gpus-per-node=8']",
            "set cluster.gpus_per_node; for GPUs of one kind see sbatch_arguments",
        ),
        (
            "sbatch_arguments={gpus-per-task: '1'}",
            "leave it out and set cluster.gpus_per_node: a process finds its GPU",
        ),
        ("sbatch_arguments={gpu-bind: closest}", "leave it out and set cluster.gpus_per_node: a process finds its GPU"),
        ("sbatch_arguments={time: '60'}", "set cluster.time_minutes"),
        ("sbatch_arguments={signal: TERM@60}", "set cluster.stop_seconds"),
        ("sbatch_arguments={no-requeue: ''}", "'no-requeue' is not accepted here; set cluster.max_requeues to 0"),
        ("sbatch_arguments={open-mode: truncate}", "each start appends to the log of the previous start"),
        ("sbatch_arguments={array: 0-3}", "use --sweep"),
        ("sbatch_arguments={mem: '0'}", "leave it out, or leave out cluster.memory_gib"),
        (
            "srun_arguments=[--nodes=4]",
            "cluster.srun_arguments: 'nodes 4' is not accepted here; set cluster.nodes",
        ),
        ("srun_arguments=[-n4]", "'ntasks 4' is not accepted here; set cluster.nodes and cluster.tasks_per_node"),
        ("srun_arguments=[-c, '8']", "'cpus-per-task' is not accepted here; set cluster.cpus_per_task"),
        ("srun_arguments=[--gpus-per-task=1]", "leave it out and set cluster.gpus_per_node"),
        ("srun_arguments=[--kill-on-bad-exit=0]", "a job ends with its first process that fails"),
    ],
)
def test_slurm_options_that_contradict_the_recipe_are_refused_with_the_key_to_use(tmp_path, words, message):
    (found,) = problems(tmp_path, STAGE1, "cluster.memory_gib=64", f"cluster.{words}")
    assert message in found


def test_slurm_options_without_a_key_are_accepted(tmp_path):
    words = ["cluster.sbatch_arguments={mem: '0', exclusive: '', mail-type: END, gres: 'nvme:1', nodelist: a}"]
    words.append("cluster.srun_arguments=[--cpu-bind=none, -l, --mpi=none]")
    assert problems(tmp_path, STAGE1, *words) == []


def test_a_broken_relation_is_shown_at_the_line_of_its_key(tmp_path):
    (problem,) = problems(tmp_path, STAGE1.replace("width: 32", "width: 33"))
    line = STAGE1.splitlines().index("  width: 32") + 1
    assert f"recipe.yaml:{line}: data.width 33" in problem


def test_all_broken_relations_are_reported_at_once(tmp_path):
    words = ["data.stride=[4, 2]", "optimizer.warmup_steps=101", "data.width=33", "init_step=5"]
    assert len(problems(tmp_path, STAGE1, *words)) == 4


def test_stage_1_without_geometry_attention_is_a_recipe(tmp_path):
    assert problems(tmp_path, STAGE1, "model.geometry_attention=false") == []


PREPARE = "task: prepare\nname: p\noutput: data\nvideos: {folder: videos, annotators: {}}\n"


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("videos.folder=~/videos", "write /home/someone/videos (for a folder of that name: ./~/videos)"),
        ("output=~", "write /home/someone (for a folder of that name: ./~)"),
        ("videos.folder=$HOME/videos", "write /home/someone/videos"),
        ("videos.list=/data/${HERE}/ids.txt", "write /data/tonight/ids.txt"),
        ("videos.annotators.weights=$NOWHERE/weights", "write the whole path"),
    ],
)
def test_a_path_that_a_shell_would_expand_is_refused_with_the_path_to_write(tmp_path, monkeypatch, word, advice):
    """C7: the recipe of a run is its text, which must name the same files for every user and machine."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("HERE", "tonight")
    monkeypatch.delenv("NOWHERE", raising=False)
    (found,) = problems(tmp_path, PREPARE, word)
    key, _, value = word.partition("=")
    assert f"{key} is {value!r}: recipes expand neither ~ nor variables" in found
    assert found.endswith(advice)


@pytest.mark.parametrize(
    "word",
    [
        *("videos.folder=./~/videos", "videos.folder=a~b/c", "videos.folder=~backup", "output=data/price_in_$"),
        "cluster.setup=['source ~/env/bin/activate', 'cd $SLURM_SUBMIT_DIR']",
    ],
)
def test_names_with_such_characters_and_lines_for_the_shell_are_accepted(tmp_path, word):
    assert problems(tmp_path, PREPARE, word) == []
