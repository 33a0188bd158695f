"""The kernels of group normalisation; the module `group_norm` cuts the work and launches them.

Names that end in `_bias` are sums of the gradient before the activation; names that end in `_weight` are sums of its
product with the standardised input. Summed over all positions they are the gradients of bias and weight.
"""

import triton
import triton.language as tl

STAGES = tl.constexpr(3)  # tiles that load from memory while one is summed


@triton.jit
def _place(program: tl.tensor, steps: tl.tensor, channels: tl.tensor, block_channels: tl.constexpr) -> tl.tuple:
    """The program's sample (64-bit, for offsets), step along positions, and channels; channel blocks vary fastest."""
    blocks = tl.cdiv(channels, block_channels)
    step = program // blocks
    channel = (program % blocks) * block_channels + tl.arange(0, block_channels)
    return (step // steps).to(tl.int64), step % steps, channel


@triton.jit
def _load_of_group(
    first: tl.tensor, second: tl.tensor, sample: tl.tensor, channel: tl.tensor, mask: tl.tensor,
    num_groups: tl.tensor,
    group_size: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Two float32 values per group, spread to the group's channels, as a row to combine with a tile."""
    group = sample * num_groups + channel // group_size
    row = tl.load(first + group, mask=mask, other=0.0)
    return row[None, :], tl.load(second + group, mask=mask, other=0.0)[None, :]


@triton.jit
def _load_of_channel(weight: tl.tensor, bias: tl.tensor, channel: tl.tensor, mask: tl.tensor) -> tl.tuple:
    """Each channel's weight and bias in float32, as a row to combine with a tile."""
    row = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    return row[None, :], tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _undo_activation(
    gradient: tl.tensor, standardised: tl.tensor, weight: tl.tensor, bias: tl.tensor,
    activation: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The gradient before the activation."""
    if activation:
        value = standardised * weight + bias
        gate = tl.sigmoid(value)
        gradient = gradient * gate * (1.0 + value * (1.0 - gate))
    return gradient


@triton.jit(do_not_specialize=["positions", "splits", "positions_per_split"])
def sum_statistics(
    hidden_states: tl.tensor, partial_mean: tl.tensor, partial_square: tl.tensor, positions: tl.tensor,
    channels: tl.tensor, splits: tl.tensor, positions_per_split: tl.tensor,
    block_positions: tl.constexpr, block_channels: tl.constexpr,
) -> None:  # fmt: skip
    """Mean and summed squared deviation of each channel over one split (Welford), shifted by its first value."""
    sample, split, channel = _place(tl.program_id(0), splits, channels, block_channels)
    known = channel < channels
    start = split * positions_per_split
    length = tl.minimum(positions_per_split, positions - start)
    base = hidden_states + (sample * positions + start) * channels
    shift = tl.load(base + channel, mask=known, other=0.0).to(tl.float32)
    row = tl.arange(0, block_positions)
    mean = tl.zeros((block_positions, block_channels), dtype=tl.float32)
    square = tl.zeros((block_positions, block_channels), dtype=tl.float32)
    for first in tl.range(0, length, block_positions, num_stages=STAGES):
        position = first + row
        mask = (position < length)[:, None] & known[None, :]
        tile = tl.load(base + position[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        step = tl.where(mask, tile.to(tl.float32) - shift[None, :] - mean, 0.0)
        weight = 1.0 / (first // block_positions + 1)
        mean += step * weight
        square += step * step * (1.0 - weight)
    count = ((length - row + block_positions - 1) // block_positions).to(tl.float32)[:, None]  # 0 past the end
    total = tl.sum(mean * count, axis=0) / length
    spread = mean - total[None, :]
    square = tl.sum(square + spread * spread * count, axis=0)
    target = (sample * splits + split) * channels + channel
    tl.store(partial_mean + target, total + shift, mask=known)
    tl.store(partial_square + target, square, mask=known)


@triton.jit(do_not_specialize=["positions", "num_groups", "splits", "positions_per_split"])
def combine_statistics(
    partial_mean: tl.tensor, partial_square: tl.tensor, mean: tl.tensor, reciprocal_deviation: tl.tensor,
    positions: tl.tensor, channels: tl.tensor, num_groups: tl.tensor, splits: tl.tensor,
    positions_per_split: tl.tensor, eps: tl.tensor,
    group_size: tl.constexpr, max_splits: tl.constexpr, block_channels: tl.constexpr,
) -> None:  # fmt: skip
    """One group's mean, then its deviation around that mean, from the sums of its splits and channels."""
    program = tl.program_id(0)
    sample = (program // num_groups).to(tl.int64)
    base = sample * splits * channels + (program % num_groups) * group_size
    split = tl.arange(0, max_splits)
    count = tl.minimum(positions_per_split, positions - split * positions_per_split).to(tl.float32)[:, None]
    shift = tl.load(partial_mean + base)
    total = tl.zeros((max_splits, block_channels), dtype=tl.float32)
    for first in range(0, group_size, block_channels):
        channel = first + tl.arange(0, block_channels)
        mask = (split < splits)[:, None] & (channel < group_size)[None, :]
        place = base + split[:, None] * channels + channel[None, :]
        total += tl.where(mask, tl.load(partial_mean + place, mask=mask, other=0.0) - shift, 0.0) * count
    size = positions.to(tl.float32) * group_size
    centre = shift + tl.sum(total) / size
    total = tl.zeros((max_splits, block_channels), dtype=tl.float32)
    for first in range(0, group_size, block_channels):
        channel = first + tl.arange(0, block_channels)
        mask = (split < splits)[:, None] & (channel < group_size)[None, :]
        place = base + split[:, None] * channels + channel[None, :]
        step = tl.load(partial_mean + place, mask=mask, other=0.0) - centre
        square = tl.load(partial_square + place, mask=mask, other=0.0)
        total += tl.where(mask, square + step * step * count, 0.0)
    tl.store(mean + program, centre)
    tl.store(reciprocal_deviation + program, 1.0 / tl.sqrt_rn(tl.sum(total) / size + eps))


@triton.jit(do_not_specialize=["positions", "num_groups"])
def normalise(
    hidden_states: tl.tensor, mean: tl.tensor, reciprocal_deviation: tl.tensor, weight: tl.tensor, bias: tl.tensor,
    output: tl.tensor, positions: tl.tensor, channels: tl.tensor, num_groups: tl.tensor,
    group_size: tl.constexpr, activation: tl.constexpr, block_positions: tl.constexpr, block_channels: tl.constexpr,
) -> None:  # fmt: skip
    """The output: standardised, scaled and shifted by channel, with SiLU if `activation`."""
    sample, block, channel = _place(tl.program_id(0), tl.cdiv(positions, block_positions), channels, block_channels)
    known = channel < channels
    row = tl.arange(0, block_positions)
    mask = (row < positions - block * block_positions)[:, None] & known[None, :]
    base = (sample * positions + block * block_positions) * channels
    place = row[:, None] * channels + channel[None, :]
    tile = tl.load(hidden_states + base + place, mask=mask, other=0.0).to(tl.float32)
    shift, scale = _load_of_group(mean, reciprocal_deviation, sample, channel, known, num_groups, group_size)
    factor, offset = _load_of_channel(weight, bias, channel, known)
    tile = (tile - shift) * (scale * factor) + offset
    if activation:
        tile = tile / (1.0 + tl.exp(-tile))
    tl.store(output + base + place, tile.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["positions", "num_groups", "splits", "positions_per_split"])
def sum_gradients(
    grad_output: tl.tensor, hidden_states: tl.tensor, mean: tl.tensor, reciprocal_deviation: tl.tensor,
    weight: tl.tensor, bias: tl.tensor, partial_bias: tl.tensor, partial_weight: tl.tensor, positions: tl.tensor,
    channels: tl.tensor, num_groups: tl.tensor, splits: tl.tensor, positions_per_split: tl.tensor,
    group_size: tl.constexpr, activation: tl.constexpr, block_positions: tl.constexpr, block_channels: tl.constexpr,
) -> None:  # fmt: skip
    """Each channel's sums over one split of the gradient and of its product with the standardised input."""
    sample, split, channel = _place(tl.program_id(0), splits, channels, block_channels)
    known = channel < channels
    start = split * positions_per_split
    length = tl.minimum(positions_per_split, positions - start)
    base = (sample * positions + start) * channels
    shift, scale = _load_of_group(mean, reciprocal_deviation, sample, channel, known, num_groups, group_size)
    factor, offset = _load_of_channel(weight, bias, channel, known)
    row = tl.arange(0, block_positions)
    sum_bias = tl.zeros((block_positions, block_channels), dtype=tl.float32)
    sum_weight = tl.zeros((block_positions, block_channels), dtype=tl.float32)
    for first in tl.range(0, length, block_positions, num_stages=STAGES):
        position = first + row
        mask = (position < length)[:, None] & known[None, :]
        place = position[:, None] * channels + channel[None, :]
        tile = tl.load(hidden_states + base + place, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(grad_output + base + place, mask=mask, other=0.0).to(tl.float32)
        tile = (tile - shift) * scale
        gradient = _undo_activation(gradient, tile, factor, offset, activation)
        sum_bias += gradient  # 0 where masked, as the loaded gradient is
        sum_weight += gradient * tile
    target = (sample * splits + split) * channels + channel
    tl.store(partial_bias + target, tl.sum(sum_bias, axis=0), mask=known)
    tl.store(partial_weight + target, tl.sum(sum_weight, axis=0), mask=known)


@triton.jit(do_not_specialize=["positions", "num_groups", "splits"])
def combine_gradients(
    partial_bias: tl.tensor, partial_weight: tl.tensor, weight: tl.tensor, sum_bias: tl.tensor, sum_weight: tl.tensor,
    mean_gradient: tl.tensor, mean_product: tl.tensor, positions: tl.tensor, channels: tl.tensor,
    num_groups: tl.tensor, splits: tl.tensor,
    group_size: tl.constexpr, max_splits: tl.constexpr, block_channels: tl.constexpr,
) -> None:  # fmt: skip
    """One sample's sums for each channel of a group, and the group's means of these sums times the weight."""
    program = tl.program_id(0)
    sample = (program // num_groups).to(tl.int64)
    start = (program % num_groups) * group_size
    split = tl.arange(0, max_splits)
    gradient = tl.zeros((block_channels,), dtype=tl.float32)
    product = tl.zeros((block_channels,), dtype=tl.float32)
    for first in range(0, group_size, block_channels):
        channel = first + tl.arange(0, block_channels)
        known = channel < group_size
        mask = (split < splits)[:, None] & known[None, :]
        place = (sample * splits + split[:, None]) * channels + start + channel[None, :]
        channel_bias = tl.sum(tl.load(partial_bias + place, mask=mask, other=0.0), axis=0)
        channel_weight = tl.sum(tl.load(partial_weight + place, mask=mask, other=0.0), axis=0)
        scale = tl.load(weight + start + channel, mask=known, other=0.0).to(tl.float32)
        tl.store(sum_bias + sample * channels + start + channel, channel_bias, mask=known)
        tl.store(sum_weight + sample * channels + start + channel, channel_weight, mask=known)
        gradient += channel_bias * scale
        product += channel_weight * scale
    size = positions.to(tl.float32) * group_size
    tl.store(mean_gradient + program, tl.sum(gradient) / size)
    tl.store(mean_product + program, tl.sum(product) / size)


@triton.jit(do_not_specialize=["positions", "num_groups"])
def differentiate(
    grad_output: tl.tensor, hidden_states: tl.tensor, mean: tl.tensor, reciprocal_deviation: tl.tensor,
    weight: tl.tensor, bias: tl.tensor, mean_gradient: tl.tensor, mean_product: tl.tensor,
    grad_hidden_states: tl.tensor, positions: tl.tensor, channels: tl.tensor, num_groups: tl.tensor,
    group_size: tl.constexpr, activation: tl.constexpr, block_positions: tl.constexpr, block_channels: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of the input, without its parts along the group's mean and deviation."""
    sample, block, channel = _place(tl.program_id(0), tl.cdiv(positions, block_positions), channels, block_channels)
    known = channel < channels
    row = tl.arange(0, block_positions)
    mask = (row < positions - block * block_positions)[:, None] & known[None, :]
    base = (sample * positions + block * block_positions) * channels
    place = row[:, None] * channels + channel[None, :]
    tile = tl.load(hidden_states + base + place, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(grad_output + base + place, mask=mask, other=0.0).to(tl.float32)
    shift, scale = _load_of_group(mean, reciprocal_deviation, sample, channel, known, num_groups, group_size)
    factor, offset = _load_of_channel(weight, bias, channel, known)
    along_mean, along_deviation = _load_of_group(
        mean_gradient, mean_product, sample, channel, known, num_groups, group_size
    )
    tile = (tile - shift) * scale
    gradient = _undo_activation(gradient, tile, factor, offset, activation)
    gradient = (gradient * factor - along_mean - tile * along_deviation) * scale
    tl.store(grad_hidden_states + base + place, gradient.to(grad_hidden_states.dtype.element_ty), mask=mask)
