"""Glyphs: an image set that needs no download, drawn from the fonts that come with matplotlib.

A class is a character and a superclass is a script: five scripts of ten characters for the clients, and other scripts
(Latin, Greek, Cyrillic, …) to pretrain on, without the characters that look like a client's. An image is a character in
a random face of DejaVu, bent and moved, with its neighbours in the line peeking in, dark on light in random colours,
blurred and grainy. The clients' scripts also differ in what they are written on: each has paper with stripes of its
own direction and width, the pretraining scripts plain paper. So groups of clients differ in images as much as in
labels, and a backbone that has never seen stripes has something to learn from the clients of one script.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from hilora.errors import InvalidValueError, ResourceError
from hilora.federated.data.images import ImageSet

SIZE = 32


@dataclass(frozen=True)
class Script:
    """Characters on paper with stripes at `angle` degrees, so many `stripes` across an image (0: plain paper)."""

    name: str
    characters: str
    angle: float = 0.0
    stripes: float = 0.0


# Scripts next to each other in direction differ in width, so that all are about equally far apart.
CLIENT_SCRIPTS = (
    Script("armenian", "բդթժխծճմջշ", 0, 3.5),
    Script("georgian", "ბდლნფქშჯვყ", 36, 7.0),
    Script("hebrew", "אבגהטלצקפע", 72, 3.5),
    Script("arabic", "ثجخشضطعقكي", 108, 7.0),
    Script("lao", "ກຂຄງຍທຜພສຈ", 144, 5.0),
)
PRETRAINING_SCRIPTS = (
    Script("latin", "3457acefhijkrtvwxyzAEGHKLMPQRTUYþßæøƀɖɚɠɣɧɯɰɱɲɶɷɸɹɺɾʁʇʉʍʎʐʔʕʬ"),
    Script("greek", "αβζμνξπςφΣΦϞϠϰϬϧϦ"),
    Script("cyrillic", "джийцъыьюяѢѣѤѦѨѪѬѮѰѵѶѸѺѼѾҐҒҖҘҚҞҠҢҤҦҨҪҲҴҸҼҾӁӃӅӈӋӍӑӒӔӖӗӚӞӟӠӮӴӶӸӺЛШ"),
    Script("tifinagh", "ⴰⴻⴼⴽⴾⴿⵂⵃⵄⵆⵈⵋⵌⵐⵒⵖⵗⵘⵚⵛⵜⵣⵤ"),
    Script("nko", "ߌߏߐߑߒߔߕߖߗߘߜߝߞߟߡߢߤߥ"),
    Script("old italic", "𐌂𐌄𐌊𐌋𐌌𐌍𐌎𐌐𐌔𐌕𐌖𐌙𐌛𐌝"),
    Script("syllabics", "ᐂᐅᐊᐏᐒᐕᐚᐢᐨᐫᐬᐮᐺᑈᑕᑖᑚᑞᑡᑢᑤᑬᑯᑰᑴᑸᑹᑻᑽᒀᒉᒏᒓᒝᒢᒣᒫᒬᒲᒴᒺᓀᓂᓅᓉᓍᓐᓓᓚᓛᓞᓡᓥᓭᓮᓰᓵᓸᓻᔂᔃᔐᔕᔘᔜᔡᔦᔫᔭᔰᔵᔹᕅᕒᕙᕴᕿᖀᖃᖅᖌᖎᖓᖠᖥ"),
)


def load_glyphs(seed: int = 0, train_per_class: int = 200, test_per_class: int = 50) -> tuple[ImageSet, ImageSet]:
    """The clients' images: 50 characters of five scripts.

    Args:
        seed: of all that is random in the images; the same seed gives the same images.
        train_per_class: training images of each character.
        test_per_class: test images of each character, drawn apart from the training images.

    Returns:
        The training and the test set: images uint8 `[n, 3, 32, 32]`, labels int64 `[n]` in order, groups = scripts.

    Raises:
        InvalidValueError: if a number of images is not positive.
        ResourceError: if matplotlib came without its fonts.
    """
    return _draw("glyphs", CLIENT_SCRIPTS, seed, (train_per_class, test_per_class))


def pretraining_glyphs(
    seed: int = 0, train_per_class: int = 100, test_per_class: int = 10
) -> tuple[ImageSet, ImageSet]:
    """Images of the characters that no client has, to pretrain a backbone on; as `load_glyphs` otherwise."""
    return _draw("pretraining-glyphs", PRETRAINING_SCRIPTS, seed, (train_per_class, test_per_class))


def _draw(name: str, scripts: tuple[Script, ...], seed: int, per_class: tuple[int, int]) -> tuple[ImageSet, ImageSet]:
    """A training and a test set of so many images of each character."""
    if min(per_class) < 1:
        raise InvalidValueError(f"images per class must be positive, got {per_class}")
    counts = torch.tensor([len(script.characters) for script in scripts])

    def draw(split: int) -> ImageSet:
        generator = torch.Generator().manual_seed(2 * seed + split)
        return ImageSet(
            images=torch.cat([_draw_script(script, per_class[split], generator) for script in scripts]),
            labels=torch.arange(int(counts.sum())).repeat_interleave(per_class[split]),
            classes=tuple(character for script in scripts for character in script.characters),
            groups=torch.arange(len(scripts)).repeat_interleave(counts),
            group_names=tuple(script.name for script in scripts),
            name=name,
            mirrors=False,
        )

    return draw(0), draw(1)


def _draw_script(script: Script, per_class: int, generator: torch.Generator) -> Tensor:
    """`per_class` images of each character of a script, character by character: uint8 `[n, 3, SIZE, SIZE]`."""
    masks, faces = _masks(script.characters)  # [v, SIZE, SIZE], [characters]
    n = len(script.characters) * per_class

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    # The character and, in half of the images each, a neighbour to its left and right.
    first = F.pad(faces.cumsum(0), (1, 0))[:-1]
    variant = first.repeat_interleave(per_class) + (uniform(0, 1) * faces.repeat_interleave(per_class)).long()
    neighbours = torch.randint(len(masks), (2, n), generator=generator)
    grid = _bent_grid(uniform)  # [n, SIZE, SIZE, 2]
    ink = F.grid_sample(masks[variant][:, None], grid, align_corners=False)
    for side, neighbour in zip((-1, 1), neighbours, strict=True):
        shift = torch.stack([side * uniform(1.9, 2.4), uniform(-0.3, 0.3)], -1)[:, None, None]
        drawn = F.grid_sample(masks[neighbour][:, None], grid - shift, align_corners=False)
        ink = torch.maximum(ink, drawn * (uniform(0, 1, 1, 1, 1) < 0.5))
    ink = ink + uniform(0, 1, 1, 1, 1) * (F.avg_pool2d(ink, 3, 1, 1) - ink)  # out of focus

    # Dark on light, stripes on the paper, grain on all.
    colour, paper = uniform(0.0, 0.45, 3, 1, 1), uniform(0.55, 1.0, 3, 1, 1)
    if script.stripes:
        angle = torch.deg2rad(torch.tensor(script.angle))
        y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        phase = script.stripes * (x * angle.cos() + y * angle.sin()) / SIZE + uniform(0, 1, 1, 1)
        paper = paper + (uniform(0.2, 0.5, 1, 1) * torch.sin(2 * torch.pi * phase))[:, None]
    image = paper + ink * (colour - paper)
    image = image + uniform(0.02, 0.12, 1, 1, 1) * torch.randn(image.shape, generator=generator)
    return (image * 255).round().clamp(0, 255).to(torch.uint8)


def _bent_grid(uniform: Callable[..., Tensor]) -> Tensor:
    """Where each pixel looks in a mask, for `F.grid_sample`: turned, scaled, slanted, shifted and bent at random."""
    turn, slant = uniform(-0.2, 0.2), uniform(-0.25, 0.25)
    scale, stretch = uniform(0.6, 0.85), uniform(-0.15, 0.15).exp()
    cos, sin = turn.cos(), turn.sin()
    affine = torch.stack(
        [
            torch.stack([cos, sin + slant, uniform(-0.15, 0.15)], -1) / (scale * stretch)[:, None],
            torch.stack([-sin, cos, uniform(-0.15, 0.15)], -1) / (scale / stretch)[:, None],
        ],
        1,
    )  # [n, 2, 3]
    bend = F.interpolate(uniform(-0.12, 0.12, 2, 4, 4), SIZE, mode="bicubic", align_corners=True)
    grid: Tensor = F.affine_grid(affine, [len(affine), 1, SIZE, SIZE], align_corners=False) + bend.movedim(1, -1)
    return grid


@lru_cache
def _masks(characters: str) -> tuple[Tensor, Tensor]:
    """Each character in each face that has it, as large as fits: float `[v, SIZE, SIZE]` in [0, 1]; faces of each."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    faces = [
        (FT2Font(str(path)).get_charmap(), ImageFont.truetype(path, 2 * SIZE, layout_engine=ImageFont.Layout.BASIC))
        for path in sorted(folder.glob("DejaVu*.ttf"))
    ]
    masks = [
        [_mask(character, font) for charmap, font in faces if ord(character) in charmap] for character in characters
    ]
    counts = torch.tensor([len(of_one) for of_one in masks])
    if counts.min() == 0:
        missing = characters[int(counts.argmin())]
        raise ResourceError(f"no DejaVu font in {folder} has {missing!r}: install matplotlib from PyPI, with its fonts")
    return torch.stack([mask for of_one in masks for mask in of_one]), counts


def _mask(character: str, font: ImageFont.FreeTypeFont) -> Tensor:
    canvas = Image.new("L", (6 * SIZE, 6 * SIZE))
    ImageDraw.Draw(canvas).text((3 * SIZE, 3 * SIZE), character, font=font, fill=255, anchor="mm")
    glyph = canvas.crop(canvas.getbbox())
    scale = SIZE / max(glyph.size)
    glyph = glyph.resize(
        (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))), Image.Resampling.BOX
    )
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(glyph, ((SIZE - glyph.width) // 2, (SIZE - glyph.height) // 2))
    return torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(SIZE, SIZE) / 255
