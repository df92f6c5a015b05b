"""Images as the simulation holds them: uint8 tensors, resized and augmented in batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hilora.errors import InvalidValueError
from hilora.federated.data.stored import StoredImages, checksum


@dataclass(frozen=True)
class ImageSet:
    """A labelled set of images of one size.

    Attributes:
        images: uint8 `[n, 3, h, w]`, or images on disk, which are indexed in the same way.
        labels: int64 `[n]`, indices into `classes`.
        classes: names of the classes.
        groups: int64 `[len(classes)]`, the superclass of each class (-1: not known), or None where there are none.
        group_names: names of the superclasses; empty where there are none.
        name: what a run calls the data in its summary.
        mirrors: whether a mirrored image keeps its label, so that flips may augment it.
        domains: int64 `[n]`, the domain of each image (photo, sketch, …), or None where there are none.
        domain_names: names of the domains; empty where there are none.

    Raises:
        InvalidValueError: a tensor has another dtype or shape, or holds an index that nothing has.
    """

    images: Tensor | StoredImages
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    mirrors: bool = True
    domains: Tensor | None = None
    domain_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_images(self.images)
        _check_indices(
            "labels", self.labels, (len(self.images),), 0, len(self.classes), "one index of a class an image"
        )
        if self.groups is not None:
            what = "one index of a group name a class, or -1"
            _check_indices("groups", self.groups, (len(self.classes),), -1, len(self.group_names), what)
        elif self.group_names:
            raise InvalidValueError(
                f"group_names are {self.group_names} but groups is None: give the group of each class too"
            )
        if self.domains is not None:
            what = "one index of a domain name an image"
            _check_indices("domains", self.domains, (len(self.images),), 0, len(self.domain_names), what)
        elif self.domain_names:
            raise InvalidValueError(
                f"domain_names are {self.domain_names} but domains is None: give the domain of each image too"
            )

    def __len__(self) -> int:
        return len(self.images)

    def checksums(self) -> Tensor:
        """Of the pixels of each image at its place, int64 `[n]`, which tell sets apart; the same in memory and on disk,
        from where they are read without the images."""
        if isinstance(self.images, StoredImages):
            return self.images.checksums()
        pixels = self.images.cpu().numpy()
        sums = [checksum(image.tobytes(), number) for number, image in enumerate(pixels)]
        return torch.tensor(sums, dtype=torch.int64)

    def to(self, device: torch.device) -> ImageSet:
        """The same with its pixels where they are used, so far as there is room: on a GPU if they take at most half of
        the memory that is free there, else where they are. Those on disk stay there. Batches go over as they are
        needed."""
        if isinstance(self.images, StoredImages):
            return self
        if device.type == "cuda" and 2 * self.images.nbytes > torch.cuda.mem_get_info(device)[0]:
            return self
        return replace(self, images=self.images.to(device))


def prepare(images: Tensor, size: int, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns stored images into what a ViT takes, on the device where they are.

    Resizes (bicubic, antialiased; left out where the size is right already), scales to [0, 1] and normalises, all in
    float32 or better; rounds to `dtype` once.

    Args:
        images: uint8 `[n, 3, h, w]`.
        size: height and width of the result.
        mean: `[3]`, subtracted from the channels, which range over [0, 1].
        std: `[3]`, divides the channels.
        dtype: floating dtype of the result.

    Returns:
        `[n, 3, size, size]` in `dtype`.

    Raises:
        InvalidValueError: `images` are not uint8 `[n, 3, h, w]`, or `size` is below 1.
    """
    _check_images(images)
    if size < 1:
        raise InvalidValueError(f"size is {size}, expected at least 1 pixel")
    exact = torch.promote_types(dtype, torch.float32)
    pixels = images.to(exact)
    if images.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    mean, std = (value.to(images.device, exact).view(3, 1, 1) for value in (mean, std))
    return pixels.div_(255).clamp_(0, 1).sub_(mean).div_(std).to(dtype)


def draw(count: int, height: int, width: int, generator: torch.Generator, mirror: bool) -> Tensor:
    """What `augment` shall do to each of so many images: int64 `[count, 3]`, shifts down and right by up to an eighth
    of the side, and whether to flip; half of them are flipped, or with `mirror` False none.

    The random numbers come from the CPU, so that they are the same whatever the device.

    Raises:
        InvalidValueError: the generator is not the CPU's.
    """
    if generator.device.type != "cpu":
        raise InvalidValueError(f"generator is on {generator.device}, expected a CPU generator: torch.Generator()")
    bounds = [(-(height // 8), height // 8 + 1), (-(width // 8), width // 8 + 1), (0, 1 + mirror)]
    return torch.stack([torch.randint(*bound, (count,), generator=generator) for bound in bounds], 1)


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Shifts every image, edges reflected, and flips some, as `draw` says.

    Args:
        images: uint8 `[n, 3, h, w]`.
        draws: int64 `[n, 3]`.

    Returns:
        uint8 `[n, 3, h, w]`, a new tensor.

    Raises:
        InvalidValueError: `images` are not uint8 `[n, 3, h, w]`.
    """
    _check_images(images)
    n, _, height, width = images.shape
    down, right, flip = draws.to(images.device).unsqueeze(-1).unbind(1)  # each [n, 1]
    rows = _reflect(torch.arange(height, device=images.device) + down, height)  # [n, h]
    columns = _reflect(torch.arange(width, device=images.device) + right, width)  # [n, w]
    columns = torch.where(flip.bool(), columns.flip(1), columns)
    batch = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    channel = torch.arange(3, device=images.device).view(1, 3, 1, 1)
    return images[batch, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def _reflect(index: Tensor, length: int) -> Tensor:
    """Mirrors indices that lie past either end of `range(length)` back into it; the end itself is not repeated."""
    return length - 1 - (length - 1 - index.abs()).abs()


def _check_images(images: Tensor | StoredImages) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InvalidValueError(f"images are {images.dtype} {list(images.shape)}, expected torch.uint8 [n, 3, h, w]")


def _check_indices(name: str, values: Tensor, shape: tuple[int, ...], low: int, high: int, what: str) -> None:
    if values.dtype != torch.int64 or values.shape != shape:
        raise InvalidValueError(
            f"{name} are {values.dtype} {list(values.shape)}, expected torch.int64 {list(shape)}: {what}"
        )
    if len(values) and not low <= (extremes := values.aminmax()).min <= extremes.max < high:
        found = f"{int(extremes.min)} to {int(extremes.max)}"
        raise InvalidValueError(f"{name} range over {found}, expected {low} to {high - 1}: {what}")
