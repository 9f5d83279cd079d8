import numpy as np
import torch

from edt_diffusion.util.rng import Purpose, image_generators, image_seed, normals, stream, uniforms


def first_words(seed: int, position: int = 0) -> tuple[int, ...]:
    return tuple(stream(seed, Purpose.NOISE, 3, position).integers(0, 2**63, 4).tolist())


def test_streams_are_philox_with_the_documented_key_and_counter():
    counter, key = np.array([0, 5, 3, 1], np.uint64), np.array([7, int(Purpose.NOISE)], np.uint64)
    expected = np.random.Generator(np.random.Philox(counter=counter, key=key)).random(8)
    np.testing.assert_array_equal(stream(7, Purpose.NOISE, 3, 5, 1).random(8), expected)


def test_every_64_bit_seed_has_a_stream_of_its_own():
    """Seeds beyond 2^53 would collide if they passed through a float64."""
    seeds = [-1, -2, -3, 2**63, 2**63 + 1, 2**64 - 4, 2**62, 2**62 + 1, 0, 1]
    assert len({first_words(seed) for seed in seeds}) == len(seeds)
    assert first_words(-1) == first_words(2**64 - 1)  # taken modulo 2^64


def test_a_draw_depends_on_its_own_position_only():
    alone = normals(1, Purpose.NOISE, 2, [4], (3,))
    among = normals(1, Purpose.NOISE, 2, [9, 4, 0], (3,))
    assert torch.equal(alone[0], among[1])
    assert uniforms(1, Purpose.TIMESTEP, 2, [4])[0] == uniforms(1, Purpose.TIMESTEP, 2, [3, 4])[1]


def test_image_seeds_are_63_bit_and_distinct():
    seeds = [image_seed(0, index) for index in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    first, second = image_generators(seeds[:2])
    assert not torch.equal(torch.randn(3, generator=first), torch.randn(3, generator=second))
