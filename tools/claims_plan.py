"""What tools/claims.py trains, animates and evaluates: tasks that parts share, and what is compared with what.

Nothing here runs anything. A task is a call of the launcher, or clips of one stage alone (tools/claims_animate.py); its
name is the run's name, and equal names are one task, so that claims share trainings.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from claims_animate import Job
from claims_costs import (
    DENOISING_WORD,
    GEOMETRY_SECONDS,
    ROW_SECONDS,
    START_SECONDS,
    STEP_SECONDS,
    clip_seconds,
    demo_animation,
    demo_people,
    demo_steps,
    denoising_steps,
    training_recipe,
)
from claims_names import (
    CLAIMS,
    DEMO_METRICS,
    DOMAINS,
    FACTORS,
    FRAME_METRICS,
    MAP_ERRORS,
    SCALES,
    STAGE1_METRICS,
    TRIVIAL,
)
from claims_tasks import Plan, Settings, Task, Variant, guidance_words, scaled

from dreamdance.evaluation.table import RESULT_ROW, TRUTH_ROW


def make_plan(settings: Settings, claims: Sequence[str], seeds: Sequence[int]) -> Plan:
    """The plan of some claims: claim after claim, and within a claim seed after seed; the curve has the first alone."""
    plan = Plan(settings)
    for claim in (name for name in CLAIMS if name in claims):
        for seed in seeds[:1] if claim == "curve" else seeds:
            builder = Builder(plan, claim, seed)
            plan.units[claim, seed] = [*getattr(builder, f"claim_{claim}")()]
            plan.variants[claim, seed] = builder.variants
    return plan


class Builder:
    """Adds what a claim needs for one seed. Each `claim_x` returns the tasks that its table needs."""

    def __init__(self, plan: Plan, claim: str, seed: int) -> None:
        self.plan, self.settings, self.claim, self.seed = plan, plan.settings, claim, seed
        self.out, self.variants, self._folders = plan.settings.out, list[Variant](), dict[str, str]()
        # Every training has so many times its steps, and a name of its own.
        self.factor = 1

    # Data and trainings

    def data(self) -> str:
        """The dancers to train on, and those whose held-out loss a training logs."""
        return self._dancers("claims_dancers", self.settings.training_clips)

    def people(self, *, pairs: bool = False) -> str:
        """The dancers that are judged, who decided no setting; with `pairs` each motion on another body too."""
        skip = f"dancers.skip_validation_clips={max(demo_people(), self.settings.clips)}"
        return self._dancers("claims_pairs" if pairs else "claims_people", 1, skip, *["dancers.pairs=true"] * pairs)

    def _dancers(self, name: str, training_clips: int, *words: str) -> str:
        numbers = (f"dancers.num_validation_clips={self.settings.clips}", f"dancers.num_train_clips={training_clips}")
        command = ("prepare", f"name={name}", f"output={self.out}/{name}", *numbers, *words)
        return self.plan.add(Task(name, command, seconds=30.0))

    def train(self, recipe: str, label: str, *words: str, init: str | None = None, needs: tuple[str, ...] = ()) -> str:
        """A training of this seed on the rendered dancers; `max_steps` may be among the words."""
        data, name = self.data(), f"claims_s{self.seed}_{label}{self._times}"
        given = [int(word.removeprefix("max_steps=")) for word in words if word.startswith("max_steps=")]
        steps = self.settings.steps or (given or [training_recipe(recipe).max_steps])[0]
        steps *= self.factor
        of_stage = self.settings.stage2 if recipe == "stage2" else self.settings.stage1
        before = () if init is None else (init,)
        replaced = ("max_steps=", "optimizer.warmup_steps=") if self.settings.steps else ("max_steps=",)
        command = (
            recipe,
            f"name={name}",
            f"seed={self.seed}",
            f"data.train.local={self.out}/{data}/train",
            f"data.validation.local={self.out}/{data}/validation",
            # Held-out losses and samples at the last step alone.
            f"validation.loss_every_steps={steps}",
            f"validation.sample_every_steps={steps}",
            "checkpoint.keep_last=2",
            *(word for word in words if not word.startswith(replaced)),
            f"max_steps={steps}",
            *((f"init_from={init}",) if init else ()),
            *(("optimizer.warmup_steps=0",) if self.settings.steps else ()),
            *of_stage,
        )
        frames = 3 if "data.num_frames=3" in words else 2
        seconds = START_SECONDS + steps * STEP_SECONDS[recipe] * frames / 2
        chain = "+".join([*(self.plan.tasks[one].steps for one in before), str(steps)])
        return self.plan.add(Task(name, command, (), (data, *before, *needs), seconds, chain))

    def domains(self) -> str:
        return self.train("stage1_domains", "domains")

    def geometry(self) -> str:
        return self.train("stage1_geometry", "geometry", init=self.domains())

    def temporal(self) -> str:
        return self.train("stage1_temporal", "temporal", init=self.geometry())

    def domains_longer(self) -> str:
        """As many further steps as step 2 has, on as many pictures and with its warmup, without the attention.

        The learning rate stays that of step 1: step 2's is one for a new attention alone, not for trained weights.
        """
        step2 = training_recipe("stage1_geometry")
        words = [f"optimizer.warmup_steps={step2.optimizer.warmup_steps}"]
        words += ["data.num_frames=3", f"max_steps={step2.max_steps}"]
        return self.train("stage1_domains", "domains_longer", *words, init=self.domains())

    def stage2(self, label: str = "stage2", *words: str, needs: tuple[str, ...] = ()) -> str:
        return self.train("stage2", label, *words, needs=needs)

    # Clips and tables

    def job(self, stage: str, variant: str, model: str, *words: str, data: str | None = None, **fields: Any) -> Job:
        """Clips of a model. Their folder depends on what they are alone, so that claims share them."""
        data = data or self.people()
        of_data, manifest = ("_pairs", "pairs.jsonl") if data == "claims_pairs" else ("", "manifest.jsonl")
        kind = "".join(f"_{name}_{value}" for name, value in fields.items() if name != "maps")
        kind += f"_{variant}" if any("guidance_scales" in word for word in words) or variant == "own_scales" else ""
        kind += "".join(f"_steps_{word.removeprefix(DENOISING_WORD)}" for word in words if DENOISING_WORD in word)
        self._folders[variant] = f"{self.out}/results/{model.removeprefix('claims_')}{of_data}{kind}"
        overrides = (
            f"manifest={self.out}/{data}/{manifest}",
            f"output={self._folders[variant]}",
            f"seed={self.seed}",
            f"{stage}_from={model}",
            *words,
        )
        return Job(stage, overrides, f"{self.out}/{data}/validation", **fields)

    def maps(self, *, data: str | None = None, align: str | None = None) -> tuple[str, str]:
        """Stage 1's maps of this seed, that stage 2 gets: the task and the folder."""
        label, model = "maps" if align is None else f"maps_{align}", self.temporal()
        job = self.job("geometry", label, model, data=data, **({} if align is None else {"align": align}))
        task = self.animate(f"s{self.seed}_{label}{self._times}", [job], needs=(model, data or self.people()))
        return task, self._folders[label]

    def animate(self, label: str, jobs: Sequence[Job], *, needs: Iterable[str], scales_from: str | None = None) -> str:
        clips = sum(clip_seconds(job) for job in jobs if job not in self.plan.jobs)
        self.plan.jobs |= {*jobs}
        task = Task(
            f"claims_{label}_clips",
            jobs=tuple(jobs),
            needs=tuple(dict.fromkeys(needs)),
            seconds=START_SECONDS + self.settings.clips * clips,
            scales_from=scales_from,
        )
        return self.plan.add(task)

    def evaluate(
        self,
        label: str,
        rows: Mapping[str, str],
        *,
        needs: Sequence[str],
        metrics: tuple[str, ...],
        data: str | None = None,
        truth: str | None = None,
        trivial: Collection[str] = (),
        maps_from: str | None = None,
    ) -> str:
        """One table of several results.

        Args:
            label: part of the name.
            rows: variant -> task of the model that it shows.
            needs: the tasks that make the results.
            metrics: what the CSV file gets.
            data: `claims_pairs`, or the people.
            truth: name under which the truth's own row enters the CSV file.
            trivial: names of the trivial answers that enter it too.
            maps_from: task of the model that made the results' maps, if it is another one.
        """
        name, (first, *others) = f"claims_{label}_evaluate", rows
        data = data or self.people()
        compare = {variant: self._folders[variant] for variant in others}
        words = [
            "evaluate",
            f"name={name}",
            f"results={self._folders[first]}",
            f"truth.local={self.out}/{data}/validation",
        ]
        training_set = f".local={self.out}/{self.data()}/train" if "training_mean" in trivial else "=null"
        words += [f"training_set{training_set}", f"compare={json.dumps(compare)}"]
        words += [] if "lpips_alex" in metrics else ["metrics.networks=[]"]
        seconds = START_SECONDS + ROW_SECONDS * len(rows) * self.settings.clips / 12
        map_steps = "" if maps_from is None else self.plan.tasks[maps_from].steps
        for variant, model in rows.items():
            row, steps = RESULT_ROW if variant == first else variant, self.plan.tasks[model].steps
            self.variants.append(Variant(variant, name, row, steps, metrics, map_steps=map_steps))
        self.variants += [Variant(truth, name, TRUTH_ROW, "", metrics)] if truth else []
        self.variants += [Variant(answer, name, TRIVIAL[answer], "", metrics) for answer in trivial]
        return self.plan.add(Task(name, tuple(words), (), tuple(needs), seconds))

    def stage2_table(
        self,
        models: Mapping[str, str],
        map_errors: Mapping[str, float],
        *,
        words: Mapping[str, tuple[str, ...]] | None = None,
        metrics: tuple[str, ...] = FRAME_METRICS,
        trivial: Collection[str] = ("reference_repeated",),
    ) -> list[str]:
        """Clips of several stage 2 with maps of several errors, and their table.

        Args:
            models: start of a variant's name -> its training.
            map_errors: end of a variant's name -> how much of stage 1's error its maps have.
            words: a start or an end of names -> further words for their clips.
            metrics, trivial: see `evaluate`; rows of true maps get FRAME_METRICS alone.
        """
        maps, folder = self.maps() if any(map_errors.values()) else (self.people(), None)
        jobs, rows, words = list[Job](), dict[str, str](), words or {}
        for ending, error in map_errors.items():
            for variant, model in models.items():
                name = f"{variant}{ending}"
                own = (*words.get(variant, ()), *words.get(ending, ()))
                given: dict[str, Any] = {"maps": folder if error else None, "map_error": error}
                jobs.append(self.job("animation", name, model, *own, **given))
                rows[name] = model
        clips = self.animate(self.label, jobs, needs=(self.people(), *models.values(), maps))
        made = {"maps_from": self.temporal()} if folder else {}
        table = self.evaluate(self.label, rows, needs=[clips], metrics=metrics, trivial=trivial, **made)
        # true maps that were given are no result
        of_true_maps = {f"{variant}{ending}" for ending, error in map_errors.items() if not error for variant in models}
        self.variants = [
            replace(one, metrics=FRAME_METRICS) if one.name in of_true_maps else one for one in self.variants
        ]
        return [table]

    @property
    def label(self) -> str:
        return f"{self.claim}_s{self.seed}{self._times}"

    @property
    def _times(self) -> str:
        return "" if self.factor == 1 else f"_x{self.factor}"

    # The demo and the claims

    def claim_demo(self) -> list[str]:
        """What the demo makes, and the same with true maps, at several numbers of denoising steps.

        Clips of as many steps as the demo takes are those of claim c.
        """
        errors, words = dict[str, float](), {}
        for maps, error in (("made", 1.0), ("true", 0.0)):
            for steps in denoising_steps():
                errors[f"_{maps}_{steps}"] = error
                words[f"_{maps}_{steps}"] = () if steps == demo_steps() else (f"{DENOISING_WORD}{steps}",)
        return self.stage2_table({"maps": self.stage2()}, errors, words=words, metrics=DEMO_METRICS, trivial=TRIVIAL)

    def claim_curve(self) -> list[str]:
        """What the demo makes after more steps of all its trainings: what an aim that it does not reach would take."""
        tables = list[str]()
        for self.factor in FACTORS:
            errors = {f"_made_x{self.factor}": 1.0, f"_true_x{self.factor}": 0.0}
            trivial = TRIVIAL if self.factor == FACTORS[0] else ()
            tables += self.stage2_table({"maps": self.stage2()}, errors, metrics=DEMO_METRICS, trivial=trivial)
        return tables

    def claim_c(self) -> list[str]:
        """Pose, depth and normal against each one left out (Table 3a), on true maps, which decide, and stage 1's."""
        controls = {
            "all_three": None,
            "no_pose": "depth, normal",
            "no_depth": "pose, normal",
            "no_normal": "pose, depth",
        }
        models = {
            name: self.stage2() if kept is None else self.stage2(f"stage2_{name}", f"model.controls=[{kept}]")
            for name, kept in controls.items()
        }
        return self.stage2_table(models, {"": 0.0, "_made": 1.0})

    def claim_a(self) -> list[str]:
        """Geometry attention against none, after as many steps (Fig. 8).

        They differ in more than the attention: step 2 trains the attention alone, on 1 frame x 3 domains; its rival
        trains all weights of step 1, at step 1's learning rate, on 3 frames x 1 drawn domain.
        """
        models = {"with_geometry": self.geometry(), "without_geometry": self.domains_longer(), "step_1": self.domains()}
        trivial = ["reference_repeated", "training_mean", "facing_camera"]
        return self._stage1_table(models, STAGE1_METRICS, trivial=trivial)

    def claim_f(self) -> list[str]:
        """Temporal attention against none: stage 1's own pictures.

        A frozen or blurred answer has little flicker too: the normals' error and L1 decide with it.
        """
        models = {"with_temporal": self.temporal(), "without_temporal": self.geometry()}
        return self._stage1_table(models, ("flicker", *STAGE1_METRICS), trivial=["reference_repeated", "facing_camera"])

    def _stage1_table(
        self, models: Mapping[str, str], metrics: tuple[str, ...], *, trivial: Collection[str] = ()
    ) -> list[str]:
        jobs = [self.job("geometry", variant, model) for variant, model in models.items()]
        clips = self.animate(self.label, jobs, needs=(self.people(), *models.values()))
        return [self.evaluate(self.label, models, needs=[clips], metrics=metrics, truth="truth", trivial=trivial)]

    def claim_b(self) -> list[str]:
        """Scales of Eq. 6: one for all domains, and each domain's alone; then each domain's own best one together.

        One half of the clips chooses the scales, the other half judges each domain's own against two choices of one
        scale for all: the best for normals, and the best on average over the domains.
        """
        model, data = self.temporal(), self.people()
        swept = {scaled("one", scale): dict.fromkeys(DOMAINS, scale) for scale in SCALES}
        swept |= {
            scaled(domain, scale): {**dict.fromkeys(DOMAINS, 0.0), domain: scale}
            for domain in DOMAINS
            for scale in SCALES[1:]
        }
        words = {name: [guidance_words(scales)] if any(scales.values()) else [] for name, scales in swept.items()}
        jobs = [self.job("geometry", name, model, *words[name]) for name in swept]
        clips = self.animate(self.label, jobs, needs=(data, model))
        rows = dict.fromkeys(swept, model)
        sweep = self.evaluate(self.label, rows, needs=[clips], metrics=STAGE1_METRICS)
        own = self.animate(
            f"{self.label}_own",
            [self.job("geometry", "own_scales", model)],
            needs=(data, model, sweep),
            scales_from=sweep,
        )
        measured = len(self.variants)
        table = self.evaluate(f"{self.label}_own", {"own_scales": model}, needs=[own], metrics=STAGE1_METRICS)
        del self.variants[measured:]  # on the clips that did not choose the scales
        steps = self.plan.tasks[model].steps
        self.variants.append(Variant("own_scales", table, RESULT_ROW, steps, STAGE1_METRICS, is_last_half=True))
        for chosen in ("one_best_for_normals", "one_best_on_average"):
            self.variants.append(Variant(chosen, sweep, "", steps, STAGE1_METRICS, is_last_half=True))
        return [sweep, table]

    def claim_d(self) -> list[str]:
        """The controller's geometry attention against the mean of the maps' features alone (Table 3b: a sum).

        The controller without attention has fewer weights.
        """
        models = {"attention": self.stage2(), "mean": self.stage2("stage2_mean", "model.geometry_attention=false")}
        return self.stage2_table(models, {"": 0.0, "_made": 1.0})

    def claim_e(self) -> list[str]:
        """Maps left out at random in training against all maps always, as the maps' error grows."""
        off = ("objective.frame_control_dropout=0", "objective.modality_control_dropout=0")
        models = {"robust": self.stage2(), "plain": self.stage2("stage2_plain", *off)}
        return self.stage2_table(models, MAP_ERRORS)

    def claim_g(self) -> list[str]:
        """The reference among the frames, and training on stage 1's maps, against the demo's stage 2.

        With the reference among them, stage 2 trains and animates with one frame more in each window than its rival.
        """
        frames, window = training_recipe("stage2").data.num_frames + 1, demo_animation().animation.window_frames + 1
        first = self.stage2("stage2_first", "objective.reference_first=true", f"data.num_frames={frames}")
        made = f"data.maps.local={self.out}/claims_s{self.seed}_maps"
        on_made = self.stage2("stage2_made", made, needs=(self._encoded(),))
        models = {"as_demo": self.stage2(), "reference_first": first, "trained_on_made": on_made}
        return self.stage2_table(
            models, {"": 0.0, "_made": 1.0}, words={"reference_first": (f"animation.window_frames={window}",)}
        )

    def claim_pairs(self) -> list[str]:
        """A person moved by another one's poses (5.3), with the truth; bones fitted to the person's body, or not."""
        model, data, jobs, needs = self.stage2(), self.people(pairs=True), [], list[str]()
        for align in ("bones", "none"):
            maps, folder = self.maps(data=data, align=align)
            needs.append(maps)
            given: dict[str, Any] = {"data": data, "maps": folder, "map_error": 1.0, "align": align}
            jobs.append(self.job("animation", f"align_{align}", model, **given))
        clips = self.animate(self.label, jobs, needs=(data, model, *needs))
        rows = dict.fromkeys(("align_bones", "align_none"), model)
        trivial = ("reference_repeated", "mean_colour", "facing_camera")
        known: dict[str, Any] = {"data": data, "trivial": trivial, "maps_from": self.temporal()}
        return [self.evaluate(self.label, rows, needs=[clips], metrics=DEMO_METRICS, **known)]

    def _encoded(self) -> str:
        """Stage 1's maps of the training clips."""
        data, model, name = self.data(), self.temporal(), f"claims_s{self.seed}_encode_maps"
        folders = (f"shards.local={self.out}/{data}/train", f"output={self.out}/claims_s{self.seed}_maps")
        words = ("encode_maps", f"name={name}", *folders, f"geometry_from={model}", f"seed={self.seed}")
        seconds = START_SECONDS + GEOMETRY_SECONDS * self.settings.training_clips
        return self.plan.add(Task(name, words, (), (data, model), seconds))
