"""The `encode` task: stores the latents of a folder of shards, which a training then reads instead of encoding.

The ranks share parts of a few clips each through a `WorkQueue`. A part is written whole or not at all, and a complete
folder is not changed. Pictures come from the training's own dataset, so that they are those of a training.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch, collate_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.stored_clip import ReferenceFrame, StoredClip, Window
from dreamdance.data.shards.latents import EMBEDDING, LatentRecord, LatentSettings, source_digest
from dreamdance.data.shards.tracks import Subject
from dreamdance.data.writing.shard_writer import Part, ShardFormat, write_shards
from dreamdance.models.autoencoding import encode_moments
from dreamdance.models.equal_rewrites import apply_equal_rewrites
from dreamdance.models.image_embedding import embed_images
from dreamdance.recipe.schema import EncodeRecipe
from dreamdance.runs.array_member import sharing
from dreamdance.runs.folder_lock import lock_folder
from dreamdance.runs.layout import ProgressLog
from dreamdance.runs.work_queue import WorkQueue
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.encoding.fit import autoencoder_digest, image_encoder_digest, resizing_of
from dreamdance.training.encoding.generate import MapGenerator
from dreamdance.training.encoding.verify_latents import verify_latents
from dreamdance.training.networks.sources import open_autoencoder, open_image_encoder
from dreamdance.training.objectives.output import ENCODE_CHUNK_SIZE


class Encoder:
    """The frozen networks of a stage, and the pictures of the shards in the form in which a training shows them."""

    def __init__(self, recipe: EncodeRecipe, ranks: Ranks) -> None:
        """Opens networks and shards.

        Raises:
            MissingInputError: weights are missing.
            ShardError: the shards are missing or damaged.
        """
        assert recipe.model is not None, "the rules of the recipe check it"
        is_video = recipe.stage == "stage2"
        self.recipe, self.device, self.resizing = recipe, ranks.device, resizing_of(recipe)
        self.vae = open_autoencoder(recipe.model.autoencoder, temporal=is_video, device="cpu").to(ranks.device)
        apply_equal_rewrites(self.vae)
        encoder = open_image_encoder(recipe.model.image_encoder, huge=is_video, device="cpu")
        self.image_encoder = encoder.to(ranks.device).float()
        self.domains = recipe.encoded_domains
        self.clips = ClipDataset(
            recipe.shards,
            width=recipe.width,
            height=recipe.height,
            num_frames=1,
            maps=[name for name in self.domains if name != "rgb"],
            ranks=ranks,
            cache_bytes=0,
        )

    def settings(self) -> LatentSettings:
        """What decides the content of the folder of latents."""
        return LatentSettings(
            source=source_digest(self.clips.index),
            autoencoder=autoencoder_digest(self.vae),
            image_encoder=image_encoder_digest(self.image_encoder, resizing=self.resizing),
            width=self.recipe.width,
            height=self.recipe.height,
            domains=tuple(self.domains),
            flip=self.recipe.flip,
            precision=self.recipe.precision,
            reference_moments=self.recipe.stage == "stage2",
        )

    def pictures(self, clip: StoredClip, frames: list[int], reference: ReferenceFrame, *, flip: bool) -> ClipBatch:
        """Frames and a reference of a clip as a training gets them, on the device of the networks."""
        window = Window(frames=frames, stride=1, reference=reference, flip=flip)
        return collate_clips([self.clips.cut(clip, window, (0, 0, 0))]).to(self.device)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and deviation of the latents of pictures `n 3 H W`: `n 2 c h w`."""
        return torch.stack(encode_moments(self.vae, images, chunk_size=ENCODE_CHUNK_SIZE), dim=1)

    def encode(self, sample_id: int) -> Iterator[dict[str, Any] | None]:
        """Encodes a clip; yields None after every few frames, then the columns of its sample."""
        clip = self.clips.clip(sample_id)
        record = LatentRecord(clip.frameless_head, self.recipe.precision)
        for flip in (False, True) if self.recipe.flip and clip.has_keypoints else (False,):
            found: dict[str, list[Tensor]] = {name: [] for name in self.domains}
            for start in range(0, clip.num_frames, ENCODE_CHUNK_SIZE):
                frames = list(range(start, min(start + ENCODE_CHUNK_SIZE, clip.num_frames)))
                batch = self.pictures(clip, frames, ReferenceFrame(0), flip=flip)
                for name in self.domains:
                    found[name].append(self.moments(batch.maps[name][0]).cpu())
                yield None
            for name, moments in found.items():
                record.add(name, torch.cat(moments), subject="clip", mirrored=flip)
            yield from self._encode_references(clip, record, flip=flip)
        yield record.to_sample()

    def _encode_references(self, clip: StoredClip, record: LatentRecord, *, flip: bool) -> Iterator[None]:
        """Adds latents and embeddings of a clip's stored references, or the embeddings of all its frames."""
        subject: Subject = "references" if clip.reference_positions else "clip"
        moments, embeddings = list[Tensor](), list[Tensor]()
        for number in range(len(clip.reference_positions) or clip.num_frames):
            picture = self.pictures(clip, [0], ReferenceFrame(number, subject), flip=flip).reference
            embeddings.append(embed_images(self.image_encoder, picture, resizing=self.resizing)[:, 0].cpu())
            if subject == "references":
                # Stage 1 reads their means. Stage 2 encodes noisy references itself, but denoises clean ones as frame 0
                # (`objective.reference_first`), drawn from their moments as other frames are.
                stored = 1 if self.recipe.stage == "stage1" else 2
                moments.append(self.moments(picture)[:, :stored].cpu())
            yield None
        if moments:
            record.add("rgb", torch.cat(moments), subject=subject, mirrored=flip)
        record.add(EMBEDDING, torch.cat(embeddings), subject=subject, mirrored=flip)


def encode(recipe: EncodeRecipe, run_folder: Path) -> None:
    """Stores the latents of all clips of a recipe's shards, or the maps that a trained stage 1 makes of them.

    Args:
        recipe: shards, networks, sizes and the output folder.
        run_folder: the folder for the progress log and the work queue.

    Raises:
        MissingInputError: weights, or the run or export of stage 1, are missing.
        ShardError: the shards are missing or damaged, or `output` has content of other shards, networks or settings.
        EncodeError: stored latents differ from the networks' (`verify_samples`).
        LostWorkerError: another rank gives no sign.
    """
    ranks, output = Ranks.from_environment(), Path(recipe.output)
    progress = ProgressLog(run_folder, ranks)
    # The main rank locks the folder for all ranks. The others wait for the queue, which the main rank opens afterwards.
    with ExitStack() as held:
        if ranks.is_main:
            held.enter_context(lock_folder(output, key="output", sharing=sharing(run_folder)))
        queue = held.enter_context(WorkQueue(ranks, limits=recipe.cluster, run_folder=run_folder))
        queue.watchdog.enter("loading the networks", recipe.name)
        maker: Encoder | MapGenerator
        if recipe.geometry_from is None:
            maker = encoder = Encoder(recipe, ranks)
            make: Callable[[int], Iterator[dict[str, Any] | None]] = encoder.encode
        else:
            maker = generator = MapGenerator(recipe, run_folder, ranks)
            make = generator.generate
        count, size = len(maker.clips), recipe.clips_per_part
        parts = [
            Part(f"{start:07d}", partial(_make_range, make, range(start, min(start + size, count))))
            for start in range(0, count, size)
        ]
        write_shards(
            output,
            parts,
            settings={**maker.settings().to_json(), "clips_per_part": size},
            shard_format=ShardFormat(shard_size_mib=recipe.shard_size_mib),
            queue=queue,
            on_part=lambda done, total: progress.write(done=done, total=total, unit="parts"),
        )
        if isinstance(maker, Encoder):
            queue.once("verify", partial(verify_latents, maker, output, queue.watchdog))


def _make_range(
    make: Callable[[int], Iterator[dict[str, Any] | None]], sample_ids: range
) -> Iterator[dict[str, Any] | None]:
    for sample_id in sample_ids:
        yield from make(sample_id)
