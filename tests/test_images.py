"""Our patches, normalised on the device, are the stock processor's pixel values to the bit."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import encoded, exif
from PIL import Image as PILImage
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comatch.content import Image, as_message
from comatch.core.packing import collate
from comatch.data.images import ImageSettings, picture_key
from comatch.encoder import Encoder
from comatch.errors import ImageError, ModelError
from comatch.recipes import load_recipe

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
# Nothing to do; up; down; odd; wide; tall; one pixel; the longest there may be; half way between two sizes.
SIZES = [(56, 56), (112, 84), (30, 41), (333, 77), (14, 14), (640, 480), (101, 700), (1, 1), (2, 400), (400, 2), (42, 70), (48, 80)]


def processor(patch: int = 14, low: int = 4, high: int = 64, **options: Any) -> Qwen2VLImageProcessorPil:
    """A stock processor with limits in visual tokens."""
    made = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, **(CLIP if patch == 14 else HALF), **options)
    made.size = {"shortest_edge": low * (2 * patch) ** 2, "longest_edge": high * (2 * patch) ** 2}
    return made


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "CMYK":
        return PILImage.fromarray(pixels, "CMYK")
    return PILImage.fromarray(pixels[..., :3]).convert(mode)


def normalised(settings: ImageSettings, patches: np.ndarray) -> torch.Tensor:
    """What `Backbone.see` makes of patches."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (settings.mean, settings.std))
    pixels = torch.from_numpy(patches).reshape(-1, 3, 1, settings.patch, settings.patch).float() / 255
    return ((pixels - mean) / std).expand(-1, -1, settings.temporal, -1, -1).flatten(1)


def assert_stock(stock: Qwen2VLImageProcessorPil, image: Image, picture: PILImage.Image) -> torch.Tensor:
    """Ours of `image` equals stock of `picture`; returns the pixel values."""
    settings = ImageSettings.from_processor(stock)
    patches, grid = settings.cut(image)
    theirs = stock(images=[picture], return_tensors="pt")
    assert patches.dtype == np.uint8 and patches.shape == (grid[0] * grid[1] * grid[2], 3 * settings.patch**2)
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    assert settings.tokens(image) == len(patches) // settings.merge**2
    ours = normalised(settings, patches)
    torch.testing.assert_close(ours, theirs["pixel_values"], rtol=0, atol=0)
    return ours


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixel_values_are_stock(size: tuple[int, int], patch: int) -> None:
    picture = noise(*size)
    values = assert_stock(processor(patch), Image(picture), picture)
    other = assert_stock(processor(patch), Image(noise(*size, seed=1)), noise(*size, seed=1))
    assert (values - other).abs().max() > 0.01, "another picture must differ, or the equality says nothing"


def test_the_backbone_normalises_so(folder_of: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the vision tower is what the stock processor of the same folder makes."""
    encoder = Encoder.load(folder_of(family), recipe=load_recipe("coma").with_tokens(2))
    pictures = [noise(100, 60), noise(50, 130)]
    batch = collate([encoder.preparer.item(as_message(pictures), encoder.stage)])
    tower, given = encoder.backbone.vision_tower, []
    features = tower.forward

    def watched(pixels: torch.Tensor, grid_thw: torch.Tensor, **rest: Any) -> Any:
        given.append((pixels, grid_thw))
        return features(pixels, grid_thw, **rest)

    monkeypatch.setattr(tower, "forward", watched)
    encoder.backbone.see(batch)
    stock = Qwen2VLImageProcessorPil.from_pretrained(folder_of(family))(images=pictures, return_tensors="pt")
    assert torch.equal(given[0][0], stock["pixel_values"]) and torch.equal(given[0][1], stock["image_grid_thw"])
    ours = [normalised(encoder.images, encoder.images.cut(Image(picture))[0]) for picture in pictures]
    assert torch.equal(torch.cat(ours), given[0][0])


@pytest.mark.parametrize("limits", [(1, 1), (1, 16384), (4, 9), (256, 1024)])
def test_limits_are_stock(limits: tuple[int, int]) -> None:
    for patch, size in itertools.product((14, 16), ((60, 60), (200, 90), (31, 300))):
        picture = noise(*size)
        assert_stock(processor(patch, *limits), Image(picture), picture)


def test_every_grid_is_stock() -> None:
    """The arithmetic alone, at sizes that would take long to decode, and at every small one."""
    sizes = [*itertools.product(range(1, 60, 3), range(1, 60, 3)), (4000, 3000), (6000, 400), (28, 5600), (8000, 8000), (199, 1)]
    for patch, limits in itertools.product((14, 16), ((1, 16384), (4, 1280), (4, 6), (256, 1024))):
        stock = processor(patch, *limits)
        settings = ImageSettings.from_processor(stock)
        for width, height in sizes:
            if max(width, height) <= 200 * min(width, height):
                _, h, w = settings.grid(width, height)
                assert h * w == stock.get_number_of_image_patches(height, width, {}), (width, height, patch, limits)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_modes_are_stock(mode: str) -> None:
    picture = noise(90, 130, mode)
    assert picture.mode == mode
    assert_stock(processor(), Image(picture), picture.convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_files_are_stock(kind: str) -> None:
    data = encoded(noise(120, 70), kind)
    with PILImage.open(io.BytesIO(data)) as picture:
        assert_stock(processor(), Image(data), picture.convert("RGB"))


def test_alpha_is_laid_on_white_first() -> None:
    """The one rule in which we differ: stock drops the alpha channel and shows what hides behind it."""
    picture = noise(60, 60).convert("RGBA")
    picture.putalpha(PILImage.linear_gradient("L").resize((60, 60)))
    white = PILImage.alpha_composite(PILImage.new("RGBA", picture.size, "white"), picture).convert("RGB")
    ours = assert_stock(processor(), Image(picture), white)
    dropped = processor()(images=[picture.convert("RGB")], return_tensors="pt")["pixel_values"]
    assert (ours - dropped).abs().max() > 0.1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tokens_from_the_header_know_orientation(orientation: int) -> None:
    data = encoded(noise(140, 60), "JPEG", exif=exif(orientation))
    settings = ImageSettings.from_processor(processor())
    image = Image(data)
    patches, grid = settings.cut(image)
    assert settings.tokens(image) * 4 == len(patches)
    assert grid[1] > grid[2] if orientation > 4 else grid[1] < grid[2]


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (13, 5), (2, 400)])
def test_tiny_pictures_are_scaled_up(size: tuple[int, int]) -> None:
    settings = ImageSettings.from_processor(processor(low=4, high=1024))
    image = Image(noise(*size))
    _, h, w = settings.grid(*size)
    assert h * w * settings.patch**2 >= settings.min_pixels and min(h, w) >= settings.merge
    assert settings.tokens(image) == len(settings.cut(image)[0]) // 4 >= 4


@pytest.mark.parametrize("size", [(2, 700), (700, 2), (201, 1), (1, 201)])
def test_too_long_is_refused_with_both_sides(size: tuple[int, int]) -> None:
    settings = ImageSettings.from_processor(processor())
    with pytest.raises(ImageError, match=rf"{size[0]} x {size[1]}"):
        settings.grid(*size)
    for ask in (settings.tokens, settings.cut):
        with pytest.raises(ImageError, match="200"):
            ask(Image(noise(*size)))
    with pytest.raises(ValueError, match="200"):
        processor()(images=[noise(*size)], return_tensors="pt")
    assert settings.grid(*(min(200 * min(size), side) for side in size)), "exactly 200-fold is allowed"


@pytest.mark.parametrize(("low", "high"), [(0, 784), (-1, 784), (2000, 1000), (1, 783), (784, 0)])
def test_impossible_limits_are_refused(low: int, high: int) -> None:
    with pytest.raises(ModelError, match=rf"min_pixels={low}, max_pixels={high}.*max >= 784, one visual token"):
        ImageSettings(min_pixels=low, max_pixels=high)
    assert ImageSettings(min_pixels=784, max_pixels=784).grid(100, 30) == (1, 2, 2)


def test_limits_of_a_run_replace_the_models() -> None:
    settings = ImageSettings.from_processor(processor())
    assert settings.limited(None, None) == settings
    assert settings.limited(784, None).min_pixels == 784 and settings.limited(784, None).max_pixels == settings.max_pixels
    with pytest.raises(ModelError, match="impossible"):
        settings.limited(settings.max_pixels + 1, None)


def test_settings_are_the_processors() -> None:
    settings = ImageSettings.from_processor(processor(16, 5, 50))
    assert (settings.patch, settings.merge, settings.temporal) == (16, 2, 2)
    assert (settings.min_pixels, settings.max_pixels) == (5 * 1024, 50 * 1024)
    assert (settings.mean, settings.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    listed: dict[str, Any] = dict(settings.to_dict())
    assert ImageSettings(**listed) == settings
    stock = Qwen2VLImageProcessorPil()
    assert ImageSettings.from_processor(stock) == ImageSettings(max_pixels=stock.size["longest_edge"]), "our defaults are the stock ones"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"resample": PILImage.Resampling.BILINEAR}, "BILINEAR"),
        ({"resample": PILImage.Resampling.LANCZOS}, "LANCZOS"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.0078"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        ImageSettings.from_processor(processor(**options))


@pytest.mark.parametrize("option", ["do_resize", "do_rescale", "do_normalize"])
def test_a_processor_that_leaves_a_step_out_is_refused(option: str) -> None:
    with pytest.raises(ModelError, match=option):
        ImageSettings.from_processor(processor(**{option: False}))


def photo(width: int, height: int, **options: Any) -> bytes:
    """A smooth JPEG, as scaled decoding is meant for."""
    return encoded(noise(1 + width // 64, 1 + height // 64).resize((width, height), PILImage.Resampling.BICUBIC), "JPEG", **options)


@pytest.mark.parametrize("size", [(640, 480), (401, 1303), (1000, 90), (100, 80), (30, 20)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_draft_is_quicker_and_nearly_the_same(size: tuple[int, int], orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, data = ImageSettings.from_processor(processor(high=32)), photo(*size, exif=exif(orientation))
    quick, scales = stock.limited(None, None, draft=True), list[float]()
    resize = PILImage.Image.resize

    def noting(self: PILImage.Image, to: tuple[int, int], *rest: Any) -> PILImage.Image:
        scales.append(max(self.size) / max(size))
        return resize(self, to, *rest)

    monkeypatch.setattr(PILImage.Image, "resize", noting)
    (full, grid), (scaled, same) = stock.cut(Image(data)), quick.cut(Image(data))
    assert grid == same and np.abs(full.astype(int) - scaled).mean() < 3
    assert scales[0] == 1 and (scales[1] < 0.6) == (min(size) > 400), "half the size or less, where the result is no larger than that"
    assert (scales[1] == 1) == np.array_equal(full, scaled)


def test_draft_leaves_what_is_no_jpeg_alone_and_changes_the_fingerprint() -> None:
    settings = ImageSettings.from_processor(processor(high=32))
    quick = settings.limited(None, None, draft=True)
    data = encoded(noise(640, 480), "PNG")
    assert np.array_equal(settings.cut(Image(data))[0], quick.cut(Image(data))[0])
    assert dict(quick.to_dict()) == {**settings.to_dict(), "draft": True} and "draft" not in settings.to_dict()
    assert ImageSettings(**quick.to_dict()) == quick and quick.limited(None, None) == quick


def test_equal_pixels_have_equal_keys() -> None:
    patches, grid = ImageSettings.from_processor(processor()).cut(Image(noise(120, 60)))
    key = picture_key(patches, grid)
    assert key == picture_key(patches.copy(), grid) == picture_key(np.asfortranarray(patches), grid)
    assert key != picture_key(patches, (grid[0], grid[2], grid[1]))
    patches[3, 4] ^= 1
    assert key != picture_key(patches, grid)
