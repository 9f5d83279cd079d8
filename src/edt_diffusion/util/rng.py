"""Counter-based random streams: every draw is a pure function of what it is for.

Training draws are keyed by `(seed, purpose, step, position in the global batch, pass)`, sampling draws by
`(seed, image index)`. No stream is shared and none is advanced by a neighbour, so results do not depend on the
number of processes, of loader workers, on the batch order, or on what was drawn before an interruption.

The generator is Philox-4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): key and counter are
given directly, so two different keys never overlap.
"""

import enum

import numpy as np
import torch

_WORD = (1 << 64) - 1


class Purpose(enum.IntEnum):
    """What a draw is for; part of the key, so that streams of different purposes are independent."""

    TIMESTEP = 1
    NOISE = 2
    LABEL_DROP = 3
    MASK_RATIO = 4
    MASK = 5
    ORDER = 6
    FLIP = 7
    LATENT = 8
    CROP = 9
    INITIAL_LATENT = 10
    SAMPLER_NOISE = 11
    VALIDATION = 12
    MODULE = 13  # what a module draws from torch's own generator, such as dropout
    BOOTSTRAP = 14  # resamples of an evaluation
    SUBSET = 15  # subsets of an evaluation's samples
    JUDGE = 16  # what the training of a judge draws
    LABEL = 17  # random labels of an evaluation's samples


def stream(seed: int, purpose: Purpose, step: int = 0, position: int = 0, pass_index: int = 0) -> np.random.Generator:
    """Return the generator of one draw.

    Args:
        seed: the run's seed, any integer (taken modulo 2**64).
        purpose: what is drawn.
        step: optimizer step, or epoch for data order.
        position: index of the sample in the *global* batch (over processes and micro-batches), or image index.
        pass_index: which forward pass of the step (0 = full input, 1 = masked input).

    Returns:
        A `numpy.random.Generator` whose bits depend on the five arguments only.
    """
    # As unsigned words: numpy makes float64, and so rounds, of a list in which large and small integers meet.
    counter = np.array([0, position & _WORD, step & _WORD, pass_index & _WORD], dtype=np.uint64)
    key = np.array([seed & _WORD, int(purpose)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def normals(
    seed: int, purpose: Purpose, step: int, positions: list[int], shape: tuple[int, ...], pass_index: int = 0
) -> torch.Tensor:
    """Standard normal float32 tensor of shape `(len(positions), *shape)`, one independent stream per position."""
    out = np.empty((len(positions), *shape), dtype=np.float32)
    for row, position in enumerate(positions):
        stream(seed, purpose, step, position, pass_index).standard_normal(dtype=np.float32, out=out[row])
    return torch.from_numpy(out)


def uniforms(seed: int, purpose: Purpose, step: int, positions: list[int], pass_index: int = 0) -> np.ndarray:
    """Float64 array of shape `(len(positions),)`, one uniform draw in [0, 1) per position."""
    return np.array([stream(seed, purpose, step, p, pass_index).random() for p in positions], dtype=np.float64)


def image_generators(seeds: list[int], device: str = "cpu") -> list[torch.Generator]:
    """One `torch.Generator` per image, seeded by that image's own seed (rule: an image depends on its seed only)."""
    return [torch.Generator(device).manual_seed(int(seed) & 0x7FFF_FFFF_FFFF_FFFF) for seed in seeds]


def image_seed(seed: int, index: int) -> int:
    """Seed of image number `index` of a job started with `seed`: a 63-bit integer, without collisions in practice."""
    return int(stream(seed, Purpose.INITIAL_LATENT, position=index).integers(0, 1 << 63))
