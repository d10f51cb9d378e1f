"""Decoding: every kind of file people have, and CLIP's own test transform."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastlora.fewshot import images
from fastlora.fewshot.crops import Normalise
from fastlora.fewshot.datasets import Item
from fastlora.fewshot.images import Decoded, EvalImages, Framing, Unreadable, decode_training, framed, open_rgb
from pictures import photo

QUIET = Console(quiet=True)


def saved(tmp_path: Path, image: Image.Image, name: str = "x.png", **options: object) -> Item:
    image.save(tmp_path / name, **options)
    return Item(0, name, tmp_path / name)


def pixels(item: Item) -> np.ndarray:
    return np.asarray(open_rgb(item)[0])


class TestModes:
    def test_plain_rgb_is_untouched(self, tmp_path: Path) -> None:
        rgb = photo(20, 30, 0)
        item = saved(tmp_path, Image.fromarray(rgb))
        assert np.array_equal(pixels(item), rgb) and open_rgb(item)[1] == set()

    def test_transparency_is_laid_on_white(self, tmp_path: Path) -> None:
        rgba = np.zeros((16, 16, 4), np.uint8)  # black, hidden by alpha
        rgba[:8] = (10, 200, 30, 255)
        item = saved(tmp_path, Image.fromarray(rgba))
        assert (pixels(item)[:8] == (10, 200, 30)).all() and (pixels(item)[8:] == 255).all()
        assert open_rgb(item)[1] == {"with transparency, laid on white"}

    def test_opaque_alpha_is_not_worth_a_line(self, tmp_path: Path) -> None:
        rgba = np.dstack([photo(16, 16, 0), np.full((16, 16), 255, np.uint8)])
        item = saved(tmp_path, Image.fromarray(rgba))
        assert np.array_equal(pixels(item), rgba[..., :3]) and open_rgb(item)[1] == set()

    def test_palette_with_a_transparent_colour(self, tmp_path: Path) -> None:
        image = Image.new("P", (16, 16), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        item = saved(tmp_path, image, "x.gif", transparency=0)
        assert (pixels(item) == 255).all()

    def test_grey(self, tmp_path: Path) -> None:
        grey = photo(16, 16, 0)[..., 0]
        item = saved(tmp_path, Image.fromarray(grey))
        assert np.array_equal(pixels(item), np.repeat(grey[..., None], 3, 2))
        assert open_rgb(item)[1] == {"in grey, converted to RGB"}

    def test_cmyk(self, tmp_path: Path) -> None:
        item = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "x.jpg", quality=95)
        assert np.abs(pixels(item).astype(int) - (255, 0, 0)).max() < 12
        assert open_rgb(item)[1] == {"in CMYK, converted to RGB"}

    def test_sixteen_bits_keep_their_contrast(self, tmp_path: Path) -> None:
        ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
        item = saved(tmp_path, Image.fromarray(ramp))
        assert pixels(item)[0, 0, 0] == 0 and pixels(item)[-1, -1, 0] == 255
        assert abs(int(pixels(item)[8, 0, 0]) - 128) <= 1

    def test_exif_orientation_is_applied(self, tmp_path: Path) -> None:
        image = Image.fromarray(photo(20, 30, 0))
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees
        item = saved(tmp_path, image, "x.jpg", exif=exif)
        assert open_rgb(item)[0].size == (20, 30)

    def test_one_pixel(self, tmp_path: Path) -> None:
        item = saved(tmp_path, Image.new("RGB", (1, 1), (1, 2, 3)))
        image, done = open_rgb(item)
        assert done == {"smaller than 8 pixels, kept"}
        assert framed(image, Framing(16)).flatten(1).unique(dim=1).tolist() == [[1], [2], [3]]


class TestBroken:
    @pytest.mark.parametrize("kind", ["text", "empty", "truncated jpeg", "truncated png", "missing"])
    def test_reason_is_given(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "x.jpg"
        if kind == "text":
            path.write_text("this is no image")
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind.startswith("truncated"):
            Image.fromarray(photo(64, 64, 0)).save(path, kind.split()[1])
            path.write_bytes(path.read_bytes()[:-600])
        with pytest.raises(Unreadable, match=r"\w"):
            open_rgb(Item(0, "x", path))

    def test_counted_with_the_first_name(self, tmp_path: Path) -> None:
        good = saved(tmp_path, Image.fromarray(photo(16, 16, 0)), "good.png")
        (tmp_path / "bad.jpg").write_text("no image")
        into = Decoded()
        decode_training([good, Item(0, "bad.jpg", tmp_path / "bad.jpg")], 512, into, QUIET)
        assert list(into.images) == ["good.png"]
        assert into.notes()[0].startswith("images that cannot be read, left out: 1, the first is bad.jpg (")


class TestTraining:
    def test_large_images_are_shrunk_once_and_said(self, tmp_path: Path) -> None:
        item = saved(tmp_path, Image.fromarray(photo(100, 200, 0)))
        into = Decoded()
        decode_training([item], 50, into, QUIET)
        assert into.images["x.png"].shape == (3, 50, 100)
        assert into.notes() == ["images shrunk to 50 pixels on the shorter side: 1"]

    def test_memory_is_told_before_it_is_taken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        item = saved(tmp_path, Image.fromarray(photo(64, 64, 0)))
        monkeypatch.setattr(images, "available_memory", lambda: 1000)
        with pytest.raises(MemoryError, match="lower --max-side, or use --images stream"):
            decode_training([item], 512, Decoded(), QUIET, "memory")

    @pytest.mark.parametrize("where", ["auto", "stream"])
    def test_what_is_streamed_has_a_size_and_no_pixels(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        item = saved(tmp_path, Image.fromarray(photo(64, 72, 0)))
        if where == "auto":
            monkeypatch.setattr(images, "available_memory", lambda: 48 * 54 * 3)  # some must be left
        into = Decoded()
        decode_training([item], 48, into, QUIET, where)
        assert into.images == {} and into.sizes == {"x.png": (48, 54)}
        assert into.notes() == ["images shrunk to 48 pixels on the shorter side: 1"]

    def test_nothing_is_decoded_twice(self, tmp_path: Path) -> None:
        item = saved(tmp_path, Image.fromarray(photo(16, 16, 0)))
        into = Decoded()
        decode_training([item], 512, into, QUIET)
        (tmp_path / "x.png").unlink()
        decode_training([item], 512, into, QUIET)
        assert into.broken == {}


class TestFraming:
    @pytest.mark.parametrize("shape", [(300, 400), (301, 200), (64, 64), (33, 47), (50, 390)])
    @pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    def test_gives_the_pixels_of_open_clips_own_transform(
        self, shape: tuple[int, int], resize_mode: str, interpolation: str
    ) -> None:
        from open_clip.transform import image_transform

        image = Image.fromarray(photo(*shape, 3))
        framing = Framing(64, resize_mode, interpolation, fill_color=100)
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        theirs = image_transform(64, False, mean, std, resize_mode, interpolation, fill_color=100)(image)
        ours = Normalise(mean, std, torch.device("cpu"))(framed(image, framing)[None])[0]
        assert torch.allclose(ours, theirs, atol=1e-6)

    def test_refuses_what_it_does_not_know(self) -> None:
        with pytest.raises(ValueError, match="unknown resize_mode 'stretch': choose from shortest, squash, longest"):
            Framing(64, "stretch")

    @pytest.mark.parametrize("shape", [(300, 400), (301, 200), (64, 64), (33, 47), (9, 500)])
    def test_equals_torchvisions_on_pillow(self, shape: tuple[int, int]) -> None:
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

        image = Image.fromarray(photo(*shape, 3))
        expected = Compose([Resize(64, InterpolationMode.BICUBIC), CenterCrop(64)])(image)
        difference = (framed(image, Framing(64)).int() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).int()).abs()
        # cutting a very long image to its middle first can shift the grid by a fraction of a pixel
        assert difference.max() == 0 if max(shape) <= 8 * min(shape) else difference.float().mean() < 8

    def test_a_stripe_takes_little_memory(self) -> None:
        assert framed(Image.new("RGB", (20000, 1), (9, 9, 9)), Framing(64)).unique().tolist() == [9]


class TestEvalImages:
    def items(self, tmp_path: Path) -> list[Item]:
        for i in range(5):
            Image.fromarray(photo(20, 20, i)).save(tmp_path / f"{i}.png")
        (tmp_path / "2.png").write_text("broken")
        return [Item(i, f"{i}.png", tmp_path / f"{i}.png") for i in range(5)]

    @pytest.mark.parametrize("keep", [True, False])
    def test_batches_in_order_without_the_broken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
        if not keep:
            monkeypatch.setattr(images, "available_memory", lambda: 0)
        test = EvalImages(self.items(tmp_path), Framing(16), QUIET)
        for _ in range(2):
            batches = list(test.batches(2))
            assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 3, 4]
            assert all(b.shape[1:] == (3, 16, 16) and b.dtype == torch.uint8 for b, _ in batches)
            assert [item.name for item in test.items] == ["0.png", "1.png", "3.png", "4.png"]
            assert list(test.decoded.broken) == ["2.png"]
