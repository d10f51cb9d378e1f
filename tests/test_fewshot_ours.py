"""What fastlora wrote into the folder of images is no class, however deep it lies; what others wrote may be one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastlora.fewshot import datasets
from fastlora.fewshot.errors import UserError
from pictures import make_folder, photo, train_arguments

LEFT_OUT = "folders of runs, left out: {}"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """run/, stopped/, eval/, sweep/ and begun/, as fastlora leaves them, each with a picture that a user put there."""
    import sys

    from fastlora import cli

    place = tmp_path_factory.mktemp("written")
    data = make_folder(place / "data", ["a", "b"], images=4)

    def fastlora(*arguments: str) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(sys, "argv", ["fastlora", *arguments])
            cli.main()
        assert left.value.code == 0

    small = ["--model", model, "--pretrained", "none", "--shots", "1", "--iterations", "1", "--device", "cpu"]
    fastlora("train", str(data), "--out", str(place / "run"), *small)
    fastlora("eval", str(place / "run"), str(data), "--out", str(place / "eval"))
    fastlora("sweep", "--data", str(data), "--out", str(place / "sweep"), *small[:-2], "--device", "cpu")
    (place / "stopped").mkdir()
    shutil.copy(place / "run" / "config.json", place / "stopped")
    (place / "begun").mkdir()
    (place / "begun" / ".lock").write_text("process 1")
    for name in ("run", "eval", "sweep", "stopped"):
        Image.fromarray(photo(16, 16, 0)).save(place / name / "shots.png")
    return place


@pytest.mark.parametrize("name", ["run", "stopped", "eval", "sweep", "begun"])
class TestOurs:
    def test_beside_the_classes(self, written: Path, tmp_path: Path, name: str) -> None:
        root = make_folder(tmp_path / "d", ["a", "b"], images=2)
        shutil.copytree(written / name, root / "anything")
        data = datasets.load(str(root))
        assert (data.classes, len(data.train), data.notes) == (("a", "b"), 4, (LEFT_OUT.format(1),))

    @pytest.mark.parametrize("tested", ["val", "test"])
    def test_beside_and_among_the_splits(self, written: Path, tmp_path: Path, name: str, tested: str) -> None:
        for role in ("train", tested):
            make_folder(tmp_path / "d" / role, ["a", "b"], images=2)
        shutil.copytree(written / name, tmp_path / "d" / ("test" if tested == "val" else "run"))  # as a split is called
        shutil.copytree(written / name, tmp_path / "d" / "train" / "run")
        shutil.copytree(written / name, tmp_path / "d" / tested / "run")
        data = datasets.load(str(tmp_path / "d"))
        assert data.classes == ("a", "b") and len(data.train) == 4 and len(data.test or ()) == 4
        assert LEFT_OUT.format(3) in data.notes

    def test_inside_a_class_and_in_a_folder_of_its_own(self, written: Path, tmp_path: Path, name: str) -> None:
        root = make_folder(tmp_path / "d", ["a", "b"], images=2)
        shutil.copytree(written / name, root / "a" / "more" / "run")
        for number in range(2):
            shutil.copytree(written / name, root / "runs" / "night" / str(number))
        data = datasets.load(str(root))
        assert (data.classes, len(data.train), data.notes) == (("a", "b"), 4, (LEFT_OUT.format(2),))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("config.json", {"recipe": {"flour": 1}}),
        ("config.json", {"architectures": ["CLIPModel"]}),
        ("metrics.json", {"method": "by hand", "accuracy": 1}),
        ("rows.jsonl", {"path": "0.png"}),
        ("config.json", []),
    ],
)
def test_a_strangers_folder_is_a_class(tmp_path: Path, file: str, says: Any) -> None:
    root = make_folder(tmp_path / "d", ["a", "b"], images=2)
    (root / "b" / file).write_text(json.dumps(says))
    assert datasets.load(str(root)).classes == ("a", "b")
    make_folder(root / "a", ["more"], images=1)
    (root / "a" / "more" / file).write_text(json.dumps(says))
    assert len(datasets.load(str(root)).train) == 5


def test_an_empty_class_is_still_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", ["a", "b"], images=2)
    (root / "c" / "deeper").mkdir(parents=True)
    with pytest.raises(UserError, match="c holds no image: add some, or remove the folder"):
        datasets.load(str(root))


def test_a_run_in_the_folder_of_images_goes_on_and_is_tested(
    fastlora: Any, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "d", ["a", "b"], images=4)
    monkeypatch.chdir(tmp_path / "d")
    arguments = train_arguments(".", Path("run1"), model)
    assert fastlora(*arguments).code == 0
    Path("run1/metrics.json").unlink()  # as if it had been stopped
    ran = fastlora(*arguments, "--resume")
    assert ran.code == 0 and LEFT_OUT.format(1) in ran.out, ran
    ran = fastlora("eval", "run1", ".", "--out", "tested")
    assert ran.code == 0 and LEFT_OUT.format(1) in ran.out and fastlora("data", ".").code == 0
