"""Batches that pass from one process to another: the same bits in the same order, and no memory left."""

import multiprocessing
import os

import pytest
import torch
from support.recipes import without

from dreamdance.data.loading.batch import ClipBatch, ClipSample, collate_clips
from dreamdance.data.loading.shared_memory import PackedBatch, SharedSlots


def random_batch(seed: int, *, frames: int = 2) -> ClipBatch:
    generator = torch.Generator().manual_seed(seed)

    def images(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    return ClipBatch(
        maps={
            # as it comes from pictures: channels last in memory
            "rgb": images(1, frames, 5, 7, 3).permute(0, 1, 4, 2, 3),
            "pose": images(1, frames, 3, 5, 7),
            "depth": images(1, frames, 3, 5, 7)[..., ::2],
        },
        reference=images(1, 3, 5, 7),
        fps=torch.tensor([8.0]),
        keys=torch.tensor([[seed, 2**40, 3]]),
        clip_ids=[f"clip {seed}"],
    )


def assert_same(one: ClipBatch, other: ClipBatch) -> None:
    for name in ("rgb", "pose", "depth", "reference", "fps", "keys"):
        first, second = one.tensors[name], other.tensors[name]
        assert first.dtype == second.dtype
        assert torch.equal(first, second), name
    assert list(one.maps) == list(other.maps) == ["rgb", "pose", "depth"]
    assert one.clip_ids == other.clip_ids


def write_three(slots: SharedSlots, connection: multiprocessing.connection.Connection) -> None:
    for number in range(3):
        connection.send(slots.write(random_batch(number), slot=number % 2))
        connection.recv()


def test_batches_of_another_process_arrive_bit_for_bit_and_stay_valid_after_their_slots():
    context = multiprocessing.get_context("forkserver")
    slots, (ours, theirs) = SharedSlots(2), context.Pipe()
    process = context.Process(target=write_three, args=(slots, theirs))
    process.start()
    batches = []
    for _ in range(3):
        assert ours.poll(60)
        batches.append(slots.read(ours.recv(), pin=False))
        ours.send(None)
    process.join(60)
    slots.close()
    for number, batch in enumerate(batches):  # the third used the slot of the first
        assert_same(batch, random_batch(number))
    assert batches[0].rgb.stride() == random_batch(0).rgb.stride()


def test_a_written_batch_can_be_read_from_its_description_alone():
    slots = SharedSlots(1)
    packed = slots.write(random_batch(0), slot=0)
    assert isinstance(packed, PackedBatch)
    assert_same(slots.read(packed, pin=False), random_batch(0))
    slots.close()


def test_a_slot_made_for_stored_depths_has_room_for_a_batch_of_floats_in_three_channels():
    """As when the drawn domains of the first batch are all depth, and those of a later one depth and normal."""
    first, later = (
        [ClipSample({"target": image}, torch.empty(0), 8.0, (0, 0, 0), "clip") for image in images]
        for images in (
            [torch.zeros(2, 1, 6, 4, dtype=torch.uint16)] * 2,
            [torch.ones(2, 1, 6, 4), torch.full((2, 3, 6, 4), 255, dtype=torch.uint8)],
        )
    )
    slots = SharedSlots(2)
    slots.write(collate_clips(first), slot=0)
    packed = slots.write(collate_clips(later), slot=1)
    assert torch.equal(slots.read(packed, pin=False).maps["target"], torch.ones(2, 2, 3, 6, 4))
    slots.close()


def test_a_batch_larger_than_its_slot_is_refused():
    slots = SharedSlots(2)
    slots.write(random_batch(0), slot=0)
    with pytest.raises(AssertionError, match="micro batches differ in size"):
        slots.write(random_batch(1, frames=40), slot=0)
    smaller = without(random_batch(2), "depth")
    assert list(slots.read(slots.write(smaller, slot=1), pin=False).maps) == ["rgb", "pose"]
    slots.close()


def test_slots_that_are_closed_leave_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        slots = SharedSlots(2)
        slots.read(slots.write(random_batch(number), slot=1), pin=False)
        slots.close()
    assert len(os.listdir("/proc/self/fd")) == before
