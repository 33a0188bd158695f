"""What the claims of tools/claims.py are in numbers: which rows are compared, in which metric, and what decides."""

from dataclasses import dataclass

from claims_names import DOMAINS, MAP_ERRORS, trivial_with

TITLES = {
    "demo": "(demo) the demo's aims",
    "curve": "(curve) the demo after more steps of training",
    "c": "(c) pose, depth and normal, and each one left out (Table 3a)",
    "a": "(a) geometry attention: agreement of normals and depth (Fig. 8)",
    "b": "(b) multi-domain guidance (Eq. 6)",
    "d": "(d) the controller's geometry attention (Table 3b)",
    "pairs": "(pairs) fitted bones, across identities (5.3)",
    "e": "(e) robust conditioning, by the maps' error",
    "f": "(f) temporal attention: flicker of stage 1's own pictures",
    "g": "(g) reference first, training on stage 1's maps",
}
# Which comparisons decide; the others are marked "also".
DECIDES = {
    "c": "the comparisons on true maps decide; those on stage 1's maps are marked 'also'",
    "a": (
        "the agreement of normals and depth decides: a gain says nothing of how far both are from the truth, which "
        "stands beside it; the normals' own error is marked 'also'"
    ),
    "b": (
        "one half of the clips chooses all scales, the other half judges them; the normals' error against the one "
        "scale that is best for normals decides"
    ),
    "d": "the comparison on true maps decides; the one on stage 1's maps is marked 'also'",
    "pairs": (
        "the one comparison decides, and it is about the fitting of bones alone; how good frames across identities are "
        "is said by the trivial answers beside it"
    ),
    "f": (
        "the flicker decides, which is that of the background in stage 1's own pictures, and Eq. 2 drops these: stage "
        "2 gets the maps alone. A frozen or blurred answer has little flicker too (see the repeated reference), so "
        "that the normals' angle and the pictures' L1 decide with it"
    ),
    "e": "maps with stage 1's own error decide; other errors are marked 'also'",
    "g": "each of the two decides",
}
# What a table shows beside the metric of its comparisons.
SHOWN = {
    **dict.fromkeys(
        ("demo", "curve", "pairs"),
        (
            "angular_error_mean",
            "abs_rel",
            "l1",
            "l1_body",
            "psnr_body",
            "ssim_body",
            "lpips_alex",
            "grain",
            "grain_distance",
        ),
    ),
    **dict.fromkeys("cdeg", ("l1_body", "psnr_body", "ssim_body", "l1", "lpips_alex")),
    **dict.fromkeys("ab", ("consistency_angle", "angular_error_mean", "abs_rel", "l1")),
    "f": ("flicker", "angular_error_mean", "abs_rel", "l1"),
}


@dataclass(frozen=True)
class Comparison:
    """A claim in numbers: `own` is better than `other` in `metric`.

    Attributes:
        claim: its letter.
        own, other: variants.
        metric: a key of `table.json`.
        says: completes the sentence.
        is_extra: an "also", which does not decide.
        goes_on: whether the training of `own` goes on where that of `other` ends; otherwise both have equal steps.
        beside: variants that need no model, or the truth, beside which the better of both is put.
        order: how its place is said, where it is better than one of them and where it is not.
    """

    claim: str
    own: str
    other: str
    metric: str
    says: str
    is_extra: bool = False
    goes_on: bool = False
    beside: tuple[str, ...] = ()
    order: tuple[str, str] = ("is better than", "is no better than")


_OWN_SCALES = "a guidance scale for each domain lowers"
_FOR_NORMALS = "the one scale for all domains that is best for normals"
_ON_AVERAGE = "the one scale for all domains that is best on average over the domains"
_TRAININGS_OF_A = (
    "(step 2 trains the attention alone, at a learning rate of its own, on 1 frame x 3 domains; its rival trains all "
    "weights of step 1 for as many steps, at step 1's learning rate with step 2's warmup, on 3 frames x 1 drawn domain)"
)
_WITHOUT_TEMPORAL = "(its rival is the same model before step 3, without temporal attention)"
COMPARISONS = (
    *(
        Comparison("c", f"all_three{ending}", f"no_{left_out}{ending}", "l1_body",
                   f"stage 2 with pose, depth and normal beats stage 2 without {left_out}, on {maps}", bool(ending))
        for ending, maps in (("", "true maps"), ("_made", "stage 1's maps"))
        for left_out in ("pose", "depth", "normal")
    ),
    Comparison("a", "with_geometry", "without_geometry", "consistency_angle",
               f"geometry attention brings normals and depth into agreement {_TRAININGS_OF_A}",
               beside=("truth", *trivial_with("consistency_angle")),
               order=("has maps that agree more than", "has maps that agree less than")),
    Comparison("a", "with_geometry", "without_geometry", "angular_error_mean",
               "geometry attention lowers the normals' error, after the same trainings", True,
               beside=trivial_with("angular_error_mean")),
    Comparison("b", "own_scales", "one_best_for_normals", "angular_error_mean",
               f"{_OWN_SCALES} the normals' error against {_FOR_NORMALS}"),
    Comparison("b", "own_scales", "one_best_on_average", "angular_error_mean",
               f"{_OWN_SCALES} the normals' error against {_ON_AVERAGE}", True),
    *(
        Comparison("b", "own_scales", "one_best_on_average", metric,
                   f"{_OWN_SCALES} the {domain} error against {_ON_AVERAGE}", True)
        for domain, metric in DOMAINS.items() if domain != "normal"
    ),
    *(
        Comparison("d", f"attention{ending}", f"mean{ending}", "l1_body",
                   "the controller's geometry attention beats the mean of the maps' features alone (the paper's sum; "
                   f"without attention the controller has fewer weights), on {maps}", bool(ending))
        for ending, maps in (("", "true maps"), ("_made", "stage 1's maps"))
    ),
    Comparison("f", "with_temporal", "without_temporal", "flicker",
               "temporal attention lowers the flicker of the background in stage 1's own pictures, which Eq. 2 drops "
               f"{_WITHOUT_TEMPORAL}", goes_on=True),
    *(
        Comparison("f", "with_temporal", "without_temporal", metric,
                   f"temporal attention lowers {name} too, a guard against frozen and blurred answers", goes_on=True)
        for metric, name in (("angular_error_mean", "the normals' error"), ("l1", "the L1 of these pictures"))
    ),
    *(
        Comparison("e", f"robust{ending}", f"plain{ending}", "l1_body",
                   f"robust conditioning helps with maps of {error:g} times stage 1's error", error != 1.0)
        for ending, error in MAP_ERRORS.items()
    ),
    Comparison("g", "reference_first", "as_demo", "l1_body",
               "the reference among the frames helps, on true maps (with it a window has one frame more)"),
    Comparison("g", "trained_on_made_made", "as_demo_made", "l1_body",
               "training on stage 1's maps helps on stage 1's maps"),
    Comparison("pairs", "align_bones", "align_none", "l1_body",
               "fitting the driving bones to the reference's body helps when another person drives",
               beside=("reference_repeated", "mean_colour")),
)  # fmt: skip
