"""A run knows its images by what they are: eval leaves out exactly those, and a resumed run takes no others."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastlora.fewshot import datasets, digests, evalrun, trainer
from fastlora.fewshot.datasets import Item, Lazy, Reading
from fastlora.fewshot.errors import Interrupted, UserError
from fastlora.fewshot.loop import Loop
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.runfolder import RunFolder
from fastlora.fewshot.trainer import Job
from pictures import make_folder, photo

QUIET = Console(quiet=True)
TRAINED = "images that the run trained on, left out: 4"


def recipe(model: str, **changes: Any) -> Recipe:
    small = {"shots": 2, "iterations": 2, "batch_size": 4, "lr": 1e-2, "pretrained": None}
    return Recipe(**{"model": model, **small, **changes})


def run(model: str, data: Any, out: Path, also: tuple[str, ...] = (), resume: bool = False, **changes: Any) -> dict[str, Any]:
    data = data if isinstance(data, datasets.Dataset) else str(data)
    return trainer.run(Job(recipe(model, **changes), data, out, device="cpu", brief=True, also=also, resume=resume), QUIET)


def evaluate(out: Path, data: Path | str, how: Reading | None = None) -> dict[str, Any]:
    return evalrun.run(RunFolder(out), str(data), Path("data"), "cpu", None, None, QUIET, how)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five pictures."""
    return make_folder(tmp_path_factory.mktemp("here") / "photos", ["cat", "dog"], images=5)


@pytest.fixture(scope="module")
def out(model: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two pictures of each class."""
    path = tmp_path_factory.mktemp("run") / "out"
    run(model, photos, path)
    return path


def renamed(photos: Path, place: Path) -> Path:
    return Path(shutil.copytree(photos, place / "other name"))


def link(photos: Path, place: Path) -> Path:
    (place / "link").symlink_to(photos, target_is_directory=True)
    return place / "link"


def files_renamed(photos: Path, place: Path) -> Path:
    copy = Path(shutil.copytree(photos, place / "photos"))
    for path in copy.rglob("*.png"):  # 0 becomes 4: names that the run knows as those of other pictures
        path.rename(path.with_name(f"new {4 - int(path.stem)}.png"))
    for path in copy.rglob("*.png"):
        path.rename(path.with_name(path.name.removeprefix("new ")))
    return copy


def classes_renamed(photos: Path, place: Path) -> Path:
    copy = Path(shutil.copytree(photos, place / "photos"))
    (copy / "cat").rename(copy / "tabby")
    (copy / "dog").rename(copy / "cat")
    return copy


def table(photos: Path, place: Path) -> Path:
    with open(place / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((path, path.parent.name) for path in sorted(photos.rglob("*.png")))])
    return place / "list.csv"


def tars(photos: Path, place: Path) -> Path:
    with tarfile.open(place / "all.tar", "w") as tar:
        for path in sorted(photos.rglob("*.png")):
            for ending, content in (("png", path.read_bytes()), ("cls", path.parent.name.encode())):
                member = tarfile.TarInfo(f"{path.parent.name}{path.stem}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return place / "all.tar"


def published(photos: Path, place: Path) -> Path:
    shutil.copytree(photos, place / "set" / "test")
    make_folder(place / "set" / "train", ["cat", "dog"], images=1, side=40)
    return place / "set"


class TestEval:
    @pytest.mark.parametrize("moved", [renamed, link, files_renamed, classes_renamed, table, tars, published])
    def test_trained_images_are_left_out(self, out: Path, photos: Path, tmp_path: Path, moved: Any) -> None:
        metrics = evaluate(out, moved(photos, tmp_path))
        assert metrics["test_images"] == 6 and TRAINED in metrics["notes"]

    def test_a_namesake_is_tested_whole(self, out: Path, tmp_path: Path) -> None:
        data = make_folder(tmp_path / "photos", ["cat", "dog"], images=5, side=40)
        metrics = evaluate(out, data)
        assert metrics["test_images"] == 10 and not any("left out" in note for note in metrics["notes"])

    def test_nothing_is_left(self, out: Path, photos: Path, tmp_path: Path) -> None:
        for name in json.loads((out / "split.json").read_text())["train"]:
            place = tmp_path / "d" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / name, place)
        with pytest.raises(UserError, match=rf"class 'cat' has no test image .*{TRAINED}"):
            evaluate(out, tmp_path / "d")

    def test_a_run_without_digests_goes_by_names_and_says_so(self, out: Path, photos: Path, tmp_path: Path) -> None:
        old = Path(shutil.copytree(out, tmp_path / "old"))
        split = json.loads((old / "split.json").read_text())
        del split["digests"]
        (old / "split.json").write_text(json.dumps(split))
        for data, count in ((photos, 6), (renamed(photos, tmp_path), 10)):
            metrics = evaluate(old, data)
            assert metrics["test_images"] == count
            assert any(f"left out: {10 - count}; it kept no digests" in note for note in metrics["notes"])

    def test_a_run_on_images_in_memory_knows_their_files(self, model: str, photos: Path, tmp_path: Path) -> None:
        from torchvision.datasets import ImageFolder

        run(model, datasets.from_torch("mine", ImageFolder(str(photos))), tmp_path / "run")
        assert all("x" in digest for digest in json.loads((tmp_path / "run/split.json").read_text())["digests"]["train"])
        metrics = evaluate(tmp_path / "run", photos)
        assert metrics["test_images"] == 6 and TRAINED in metrics["notes"]

    def test_validation_images_are_left_out_and_told_apart(self, model: str, photos: Path, tmp_path: Path) -> None:
        run(model, photos, tmp_path / "run", reading=Reading(validation=0.2))
        metrics = evaluate(tmp_path / "run", renamed(photos, tmp_path))
        assert metrics["test_images"] == 4 and TRAINED in metrics["notes"]
        assert "images that the run drew for validation, left out: 2" in metrics["notes"]

    def test_class_names_that_only_the_run_was_given(self, model: str, photos: Path, tmp_path: Path) -> None:
        names = tmp_path / "names.txt"
        names.write_text("tabby\nwolf\n")
        run(model, photos, tmp_path / "run", reading=Reading(class_names=str(names)))
        data = renamed(photos, tmp_path)
        note = f"the run took its class names from {names}, here they are those of {data}"
        assert note in evaluate(tmp_path / "run", data)["notes"]
        for place, how in ((data, Reading(class_names=str(names))), (photos, None)):
            assert not any("class names from" in note for note in evaluate(tmp_path / "run", place, how)["notes"])

    def test_zero_shot_trains_on_nothing(self, model: str, photos: Path, tmp_path: Path) -> None:
        for role in ("train", "test"):
            shutil.copytree(photos, tmp_path / "d" / role)
        metrics = run(model, tmp_path / "d", tmp_path / "run", method="zero-shot")
        assert evaluate(tmp_path / "run", tmp_path / "d")["test_images"] == metrics["test_images"] == 10
        assert not any("trained on" in note for note in metrics["notes"])


class TestTrain:
    def test_test_images_that_are_trained_on_are_told_and_stay(self, model: str, photos: Path, tmp_path: Path) -> None:
        make_folder(tmp_path / "d" / "train", ["cat", "dog"], images=2, side=40)
        make_folder(tmp_path / "d" / "test", ["cat", "dog"], images=2, side=50)
        shutil.copy(tmp_path / "d/train/dog/1.png", tmp_path / "d/test/cat/same.png")
        metrics = run(model, tmp_path / "d", tmp_path / "run", also=(str(renamed(photos, tmp_path)),))
        note = "test images that are trained on too: 1, the first is test/cat/same.png, the same as train/dog/1.png"
        assert metrics["test_images"] == 5 and note in metrics["notes"] and len(metrics["notes"]) == 1

    def test_the_same_photo_in_two_classes_and_in_another_set(self, model: str, tmp_path: Path) -> None:
        root = make_folder(tmp_path / "d", ["cat", "dog"], images=4)
        for path in (root / "cat").iterdir():
            shutil.copy(path, root / "dog" / f"cat {path.name}")
        other = Path(shutil.copytree(root, tmp_path / "other"))
        notes = run(model, root, tmp_path / "run", also=(str(other),), shots=6)["notes"]
        assert any(note.startswith("images trained on twice: ") for note in notes)
        assert any(note.startswith("test images that are trained on too: ") for note in notes)
        assert any(note.startswith(f"{other}: images that are trained on too: ") for note in notes)

    def test_doubts_about_another_set_are_told(self, model: str, photos: Path, tmp_path: Path) -> None:
        other = make_folder(tmp_path / "other", ["1", "2"], images=2, side=40)
        notes = run(model, photos, tmp_path / "run", also=(str(other),), method="zero-shot")["notes"]
        assert notes == [f"{other}: classes without names, prompted as the numbers 1 to 2: --class-names FILE names them"]


def overwrite(name: str) -> Callable[[Path], Any]:
    return lambda d: Image.fromarray(photo(30, 30, 77)).save(d / name)


@pytest.fixture(scope="module")
def stopped(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """d/ with train and test, other/, and the run on d that was stopped at its first step."""
    place = tmp_path_factory.mktemp("stopped")
    for role, side in (("train", 24), ("test", 40)):
        make_folder(place / "d" / role, ["cat", "dog"], images=2, side=side)
    make_folder(place / "other", ["ant", "bee"], images=2, side=50)
    step = Loop.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(Loop, "train_step", lambda loop: (step(loop), os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(Interrupted):
            run(model, "d", Path("run"), also=("other",))
    return place


class TestResume:
    @pytest.fixture
    def here(self, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A copy of it, which is the current folder."""
        monkeypatch.chdir(shutil.copytree(stopped, tmp_path / "place"))
        return Path()

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (overwrite("d/train/dog/1.png"), "the images in d .* began with: train/dog/1.png has changed; put them back"),
            (overwrite("d/test/dog/0.png"), "the test images in d .* 4 then, 4 now, the first that differs is test/dog/0.png"),
            (overwrite("d/test/dog/9.png"), "4 then, 5 now, the first that differs is test/dog/9.png"),
            (lambda here: (here / "d/test/dog/1.png").unlink(), "4 then, 3 now, the first that differs is behind the last"),
            (lambda here: (here / "d/test/cat/1.png").rename(here / "d/test/dog/1a.png"), "test/dog/0.png"),
            (overwrite("other/bee/1.png"), "the images in other are not .* the first that differs is bee/1.png"),
            (
                lambda here: [(here / f"d/{r}/dog").rename(here / f"d/{r}/wolf") for r in ("train", "test")],
                "has the class 'dog'",
            ),
        ],
        ids=["training pixels", "test pixels", "one more", "one less", "another class", "another set", "class name"],
    )
    def test_what_changed_is_refused(self, model: str, here: Path, change: Any, says: str) -> None:
        config = Path("run/config.json").read_bytes()
        change(here)
        with pytest.raises(UserError, match=f"--resume: .*{says}"):
            run(model, "d", Path("run"), also=("other",), resume=True)
        assert Path("run/config.json").read_bytes() == config

    def test_a_class_that_changes_in_a_table_is_refused(self, model: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same images in the same order, but each of the other class."""
        rows = [(str(path), path.parent.name, path.parent.parent.name) for path in sorted((here / "d").rglob("*.png"))]
        other = {"cat": "dog", "dog": "cat"}
        for name, relabelled in (("a", rows), ("b", [(p, other[k] if s == "train" else k, s) for p, k, s in rows])):
            with open(f"{name}.csv", "w", newline="") as file:
                csv.writer(file).writerows([("path", "label", "split"), *relabelled])
        step = Loop.train_step
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Loop, "train_step", lambda loop: (step(loop), os.kill(os.getpid(), signal.SIGTERM)))
            run(model, "a.csv", Path("tabled"))
        Path("b.csv").rename("a.csv")
        with pytest.raises(UserError, match=r"the images in a.csv are not those .*: d/train/cat/\d.png is of another class"):
            run(model, "a.csv", Path("tabled"), resume=True)

    def test_images_that_only_moved_go_on(self, model: str, here: Path) -> None:
        for path in list((here / "d" / "test").rglob("*.png")):
            path.rename(path.with_name(f"new {path.name}"))
        (here / "d").rename(here / "e")
        assert run(model, "e", Path("run"), also=("other",), resume=True)["test_images"] == 4
        assert json.loads(Path("run/config.json").read_text())["data"] == "e"
        with pytest.raises(UserError, match="has data = 'e', now it is 'd'"):  # it is finished: other data are another run
            run(model, "d", Path("run"), resume=True)

    def test_a_checkpoint_of_an_older_version_goes_by_names(self, model: str, here: Path) -> None:
        state = torch.load("run/checkpoint.pt", weights_only=True)
        del state["extra"]["tests"], state["extra"]["split"]["digests"]
        torch.save(state, "run/checkpoint.pt")
        Path("run/split.json").write_text(json.dumps(state["extra"]["split"]))
        with pytest.raises(UserError, match="has data = 'd', now it is 'other'"):
            run(model, "other", Path("run"), resume=True)
        Path("d/train/cat/0.png").rename("d/train/cat/8.png")
        with pytest.raises(UserError, match=r"are not those the run .* is drawn instead of"):
            run(model, "d", Path("run"), resume=True)
        Path("d/train/cat/8.png").rename("d/train/cat/0.png")
        assert run(model, "d", Path("run"), resume=True)["test_images"] == 4


class TestFind:
    def test_only_files_of_a_known_size_are_read(self, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        items = [Item(0, path.name, path) for path in sorted((photos / "cat").iterdir())]
        known = digests.Digests().of(items[:1], QUIET)
        read: list[Path] = []
        whole = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or whole(path))
        found, unknown = digests.find(items, known, QUIET)
        assert found == [*known, *[None] * 4] and unknown == 0
        size = items[0].source.stat().st_size
        assert read == [item.source for item in items if item.source.stat().st_size == size]

    def test_what_comes_without_bytes_cannot_be_told_from_them(self, photos: Path) -> None:
        file = Item(0, "file", photos / "cat" / "0.png")
        image = Image.open(photos / "cat" / "0.png").convert("RGB")
        pixels = [Item(0, "array", np.asarray(image)), Item(0, "lazy", Lazy(lambda: image))]
        assert digests.find(pixels, digests.Digests().of([file], QUIET), QUIET) == ([None, None], 2)
        known = digests.Digests().of(pixels, QUIET)
        assert known[0] == known[1] and digests.find([file, *pixels], known, QUIET) == ([known[0]] * 3, 0)

    def test_what_cannot_be_read_is_none_of_them(self, tmp_path: Path) -> None:
        gone = Item(0, "gone", tmp_path / "gone.png")
        known = digests.Digests().of([gone], QUIET)
        assert known == [digests.UNREADABLE] and digests.find([gone], known, QUIET) == ([None], 0)
