"""Compares some stored latents with the networks that they are said to come from."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dreamdance.data.loading.stored_clip import ReferenceFrame
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.errors import UserError
from dreamdance.models.autoencoding import decode_latents, latents_from_moments
from dreamdance.recipe.sections import Shards
from dreamdance.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from dreamdance.training.encoding.encode import Encoder

logger = logging.getLogger(__name__)

# Largest difference of a stored value from the encoded one, relative to the largest value of the frame. A rounding to
# bf16 changes a value by at most 2^-9 of itself; float32 differs only between devices and sizes of batches.
LIMITS = {"fp32": 1e-3, "bf16": 2.0**-8}
# Largest loss of the decoded picture against the pixels, compared with that of latents that were not stored.
MAX_LOSS_DB = 0.5


class EncodeError(UserError):
    """Stored latents are not those of the networks."""


def verify_latents(encoder: "Encoder", output: Path, watchdog: Watchdog) -> None:
    """Encodes one frame of some clips again, decodes the stored latents, and compares both.

    Raises:
        EncodeError: they differ by more than `LIMITS` or `MAX_LOSS_DB`; the text names clip, frame and map.
        ShardError: a stored frame is damaged.
    """
    wanted = encoder.recipe.verify_samples
    stored, count = StoredClips(Shards(local=str(output))), len(encoder.clips)
    wanted = min(wanted, count)
    for number in range(wanted):
        sample_id = number * count // wanted
        clip, latents = encoder.clips.clip(sample_id), stored.latents(sample_id)
        watchdog.enter("comparing latents with their pictures", clip.clip_id)
        frame = (number * clip.num_frames) // wanted
        flip = encoder.recipe.flip and clip.has_keypoints and number % 2 == 1
        batch = encoder.pictures(clip, [frame], ReferenceFrame(0), flip=flip)
        for name in encoder.domains:
            where = f"clip '{clip.clip_id}', frame {frame}{' mirrored' if flip else ''}, {name}"
            pixels = batch.maps[name][0]
            found = latents.moments(name, [frame], mirrored=flip).to(encoder.device)
            exact = encoder.moments(pixels)
            difference = ((found - exact).abs().max() / exact.abs().max()).item()
            psnr, best = (_psnr(_decode(encoder, moments), pixels.cpu()) for moments in (found, exact))
            limit = LIMITS[encoder.recipe.precision]
            logger.info(
                "%s: stored values differ by %.1e of the largest (limit %.1e); decoded %.2f dB against the pixels, "
                "%.2f dB without storing (limit: %.1f dB less)", where, difference, limit, psnr, best, MAX_LOSS_DB,
            )  # fmt: skip
            if not difference <= limit or not psnr >= best - MAX_LOSS_DB:
                raise EncodeError(
                    f"{where}: the latents in {output} are not those of model.autoencoder: they differ by "
                    f"{difference:.1e} of the largest value (at most {limit:.1e}) and decode to {psnr:.2f} dB (at "
                    f"least {best - MAX_LOSS_DB:.2f}). Delete that folder and encode again"
                )


def _decode(encoder: "Encoder", moments: Tensor) -> Tensor:
    with torch.no_grad():
        return decode_latents(encoder.vae, latents_from_moments(encoder.vae, *moments.unbind(dim=1)))


def _psnr(found: Tensor, exact: Tensor) -> float:
    error = (found.double() - exact.double()).square().mean().clamp(min=1e-12)
    return float(-10 * error.log10())
