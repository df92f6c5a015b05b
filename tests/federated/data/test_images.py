from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hilora.federated.data.images import ImageSet, augment, draw, prepare

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.5, 0.25, 0.2])


def random_images(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augmented(images: torch.Tensor, generator: torch.Generator, mirror: bool) -> torch.Tensor:
    height, width = images.shape[2:]
    return augment(images, draw(len(images), height, width, generator, mirror))


def test_an_image_set_has_the_length_of_its_images():
    labels = torch.tensor([0, 1, 1])
    images = ImageSet(random_images(3), labels, ("a", "b"), "toy", torch.tensor([0, -1]), ("g",))
    assert len(images) == 3
    assert len(ImageSet(random_images(0), labels[:0], (), "none")) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": random_images(3).float()}, r"float32 \[3, 3, 32, 32\], expected torch.uint8"),
        ({"images": random_images(3)[0]}, r"\[3, 32, 32\], expected torch.uint8 \[n, 3, h, w\]"),
        ({"images": random_images(3)[:, :1]}, r"\[3, 1, 32, 32\]"),
        ({"labels": torch.tensor([0, 1])}, r"labels are torch.int64 \[2\], expected torch.int64 \[3\]"),
        ({"labels": torch.tensor([0, 1, 1], dtype=torch.int32)}, "labels are torch.int32"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels range over 0 to 2, expected 0 to 1"),
        ({"labels": torch.tensor([0, -1, 1])}, "labels range over -1 to 1"),
        ({"groups": torch.tensor([0])}, r"groups are torch.int64 \[1\], expected torch.int64 \[2\]"),
        ({"groups": torch.tensor([0, 1])}, "groups range over 0 to 1, expected -1 to 0"),
        ({"groups": None}, "groups is None"),
        ({"domains": torch.tensor([0, 1])}, r"domains are torch.int64 \[2\], expected torch.int64 \[3\]"),
        ({"domains": torch.tensor([0, 1, 2])}, "domains range over 0 to 2, expected 0 to 1"),
        ({"domains": torch.tensor([0, -1, 1])}, "domains range over -1 to 1, expected 0 to 1"),
        ({"domains": None}, "domains is None: give the domain of each image too"),
    ],
)
def test_an_image_set_refuses_tensors_that_do_not_fit(change, message):
    labels, groups = torch.tensor([0, 1, 1]), torch.tensor([0, 0])
    fields = {"images": random_images(3), "labels": labels, "groups": groups, "domains": labels} | change
    with pytest.raises(ValueError, match=message):
        ImageSet(classes=("a", "b"), name="toy", group_names=("g",), domain_names=("x", "y"), **fields)


def test_prepare_only_scales_and_normalises_images_of_the_right_size():
    images = random_images(4)
    expected = (images.double() / 255 - MEAN.double().view(3, 1, 1)) / STD.double().view(3, 1, 1)
    torch.testing.assert_close(prepare(images, 32, MEAN, STD, torch.float64), expected)


@pytest.mark.parametrize("size", [8, 20, 48])
def test_prepare_resizes_as_interpolate_does(size):
    images = random_images(4)
    resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True) / 255
    expected = (resized.clamp(0, 1) - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    torch.testing.assert_close(prepare(images, size, MEAN, STD, torch.float32), expected)


def test_prepare_clamps_what_bicubic_overshoots():
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    images[..., 8:] = 255
    values = prepare(images, 40, torch.zeros(3), torch.ones(3), torch.float32)
    assert values.min() == 0
    assert values.max() == 1


def test_prepare_rounds_to_a_short_dtype_once():
    images = random_images(2)
    exact = prepare(images, 24, MEAN, STD, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(prepare(images, 24, MEAN, STD, dtype), exact.to(dtype))


def test_prepare_squares_oblong_images():
    assert prepare(random_images(2)[:, :, :20], 16, MEAN, STD, torch.float32).shape == (2, 3, 16, 16)


def test_prepare_refuses_what_is_not_an_image():
    with pytest.raises(ValueError, match=r"float32 \[1, 3, 32, 32\]"):
        prepare(random_images(1).float(), 32, MEAN, STD, torch.float32)
    with pytest.raises(ValueError, match="size is 0"):
        prepare(random_images(1), 0, MEAN, STD, torch.float32)


def test_augment_is_a_crop_of_the_padded_image_and_sometimes_its_mirror():
    images = random_images(64, 16)
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    places = set()
    for image, result in zip(padded, augmented(images, generator(), True), strict=True):
        found = [
            (y, x, flipped)
            for y in range(5)
            for x in range(5)
            for flipped in (False, True)
            if torch.equal(
                image[:, y : y + 16, x : x + 16].flip(-1) if flipped else image[:, y : y + 16, x : x + 16], result
            )
        ]
        assert len(found) == 1
        places.update(found)
    assert {y for y, _, _ in places} == {x for _, x, _ in places} == set(range(5))
    assert {flipped for _, _, flipped in places} == {False, True}


def test_augment_does_not_flip_where_mirrors_are_not_the_same():
    ramp = torch.arange(0, 64, 2, dtype=torch.uint8).expand(200, 3, 32, 32)
    slopes = augmented(ramp, generator(), False).int().diff(dim=-1)[..., 8:24]
    assert (slopes == 2).all()
    slopes = augmented(ramp, generator(), True).int().diff(dim=-1)[:, 0, 0, 12]
    assert 60 < (slopes == -2).sum() < 140


def test_augment_follows_its_generator_alone():
    images = random_images(16)
    first = augmented(images, generator(7), True)
    torch.manual_seed(123)
    assert torch.equal(first, augmented(images, generator(7), True))
    assert not torch.equal(first, augmented(images, generator(8), True))
    assert first.dtype == torch.uint8
    assert torch.equal(images, random_images(16)), "the images themselves stay as they are"


def test_augment_leaves_images_too_small_to_shift():
    images = random_images(3, 4)
    assert torch.equal(augmented(images, generator(), False), images)
    assert augmented(images[:0], generator(), True).shape == (0, 3, 4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_images():
    images = random_images(16)
    assert torch.equal(augmented(images.cuda(), generator(), True).cpu(), augmented(images, generator(), True))
    prepared = prepare(images.cuda(), 48, MEAN, STD, torch.float32)
    torch.testing.assert_close(prepared.cpu(), prepare(images, 48, MEAN, STD, torch.float32), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="generator is on cuda"):
        augmented(images, torch.Generator("cuda"), True)
