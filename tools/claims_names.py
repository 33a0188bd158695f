"""What the plan, the numbers and the texts of tools/claims.py call things: parts, metrics, trivial answers."""

from dreamdance.evaluation.trivial import FACING_CAMERA, MEAN_COLOUR, MEAN_OF_TRAINING, REPEATED_REFERENCE

# In the order of work: the demo's aims, the claims in the order of their weight, and what is done if time is left.
CLAIMS = ("demo", "c", "a", "b", "d", "pairs", "curve", "e", "f", "g")
# How many times as many steps as the demo's each of its trainings has, for the curve.
FACTORS = (1, 2, 4)
# Scales of Eq. 6 that are swept, of all domains together and of each alone.
SCALES = (0.0, 0.5, 1.0, 2.5)
DOMAINS = {"rgb": "l1", "normal": "angular_error_mean", "depth": "abs_rel"}
# How much of stage 1's error the maps have.
MAP_ERRORS = {"_error_0": 0.0, "_error_half": 0.5, "_error_1": 1.0, "_error_2": 2.0}
# Of maps alone: the trainings of stage 1 decide them, even where the frames are stage 2's.
METRICS_OF_MAPS = ("consistency_angle", "angular_error_mean", "abs_rel")
STAGE1_METRICS = (*METRICS_OF_MAPS, "l1")
FRAME_METRICS = ("l1_body", "psnr_body", "ssim_body", "l1", "psnr", "ssim", "lpips_alex", "grain", "grain_distance")
DEMO_METRICS = ("angular_error_mean", "abs_rel", *FRAME_METRICS)
# The trivial answers, under the names that they have in the CSV file.
TRIVIAL = {
    "reference_repeated": REPEATED_REFERENCE,
    "mean_colour": MEAN_COLOUR,
    "training_mean": MEAN_OF_TRAINING,
    "facing_camera": FACING_CAMERA,
}
# How sentences call these answers and the truth.
SPOKEN = {
    "truth": "the truth",
    "reference_repeated": "the repeated reference",
    "mean_colour": "the reference's mean colour",
    "training_mean": "the training set's mean",
    "facing_camera": "normals that face the camera",
}


def trivial_with(metric: str) -> tuple[str, ...]:
    """The trivial answers that have a metric: one has no maps, another has normals alone."""
    has = {"mean_colour": metric not in METRICS_OF_MAPS, "facing_camera": metric == "angular_error_mean"}
    return tuple(name for name in TRIVIAL if has.get(name, True))
