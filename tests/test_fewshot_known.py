"""The 11 sets of the paper: generated trees in each layout, real split files, the whole of Caltech101, what may be missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from fastlora.fewshot import datasets, sampling
from fastlora.fewshot.datasets import KNOWN, generated, known
from fastlora.fewshot.datasets.generated import Mini
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.images import Decoded, decode_training
from pictures import make_folder, shared_data

MINI = Mini(classes=3, train=2, val=1, test=1, side=16)
CALTECH = shared_data() / "caltech-101"
needs_caltech = pytest.mark.skipif(not CALTECH.is_dir(), reason="Caltech101 is not here: set FASTLORA_TEST_DATA")
SPLITS = {name: shared_data() / "splits" / (KNOWN[name].split or "none") for name in KNOWN}
REAL = [name for name, file in SPLITS.items() if file.is_file()]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every set, generated; tests that change one copy it."""
    root = tmp_path_factory.mktemp("sets")
    generated.write(root, size=MINI)
    return root


def copied(drawn: Path, root: Path, name: str, folder: str | None = None) -> Path:
    """The set `name` of `drawn` in `folder` below `root` (CoOp's name for it if None), as real images."""
    place = root / (folder or KNOWN[name].folders[0])
    shutil.copytree(drawn / KNOWN[name].folders[0], place)
    (place / known.GENERATED).unlink()
    return place


class TestLayouts:
    @pytest.mark.parametrize("name", KNOWN)
    def test_each_set_is_read_and_decoded(self, drawn: Path, name: str) -> None:
        data = datasets.load(name, drawn)
        assert data.test is not None
        val, train = (0, 9) if name == "imagenet" else (3, 6)  # ImageNet has no validation shots
        assert (len(data.classes), len(data.train), len(data.val), len(data.test)) == (3, train, val, 3)
        assert data.template == "a photo of a {}." and data.own_template == KNOWN[name].own_template
        assert data.generated and data.notes == (f"generated images in the layout of {name}, not the real ones",)
        datasets.check_training(data)
        decoded = Decoded()
        decode_training(sampling.draw(data, 1, 1).train, 512, decoded, Console(quiet=True))
        assert len(decoded.images) == 3 and not decoded.broken
        names = [item.name for role in (data.train, data.val, data.test) for item in role]
        assert len(set(names)) == len(names)

    @pytest.mark.parametrize(("name", "folder"), [(n, f) for n in KNOWN for f in KNOWN[n].folders[1:]])
    def test_folder_names_of_the_papers_code(self, drawn: Path, tmp_path: Path, name: str, folder: str) -> None:
        place = copied(drawn, tmp_path, name, folder)
        data = datasets.load(name, tmp_path)
        assert len(data.classes) == 3 and not data.generated
        assert "published are" in " ".join(data.notes)
        assert datasets.load(str(place)).classes == data.classes  # a path will do too

    def test_imagenet_without_the_folder_images(self, drawn: Path, tmp_path: Path) -> None:
        place = copied(drawn, tmp_path, "imagenet")
        for part in ("train", "val"):
            (place / "images" / part).rename(place / part)
        assert len(datasets.load("imagenet", tmp_path).train) == 9

    def test_imagenet_with_kaggles_names(self, drawn: Path, tmp_path: Path) -> None:
        place = copied(drawn, tmp_path, "imagenet")
        lines = (place / "classnames.txt").read_text().splitlines()
        (place / "classnames.txt").unlink()
        (place / "LOC_synset_mapping.txt").write_text("\n".join(f"{line}, another word" for line in lines))
        data = datasets.load("imagenet", tmp_path)
        assert data.classes == datasets.load("imagenet", drawn).classes
        assert any("LOC_synset_mapping.txt" in note for note in data.notes)

    def test_one_name_for_two_classes_of_imagenet_is_a_note(self, drawn: Path, tmp_path: Path) -> None:
        place = copied(drawn, tmp_path, "imagenet")
        ids = [line.split()[0] for line in (place / "classnames.txt").read_text().splitlines()]
        (place / "classnames.txt").write_text(
            "\n".join(f"{i} {w}" for i, w in zip(ids, ["missile", "missile", "tench"], strict=True))
        )
        data = datasets.load("imagenet", tmp_path)
        assert len(data.classes) == 3 and "names of more than one class: 1, the first is missile" in data.notes

    def test_a_folder_with_train_val_and_classnames_is_not_imagenet(self, tmp_path: Path) -> None:
        for part in ("train", "val"):
            make_folder(tmp_path / part, ["a", "b"], 2)
        (tmp_path / "classnames.txt").write_text("a\nb\n")
        assert datasets.load(str(tmp_path)).classes == ("a", "b")


class TestGenerated:
    def test_the_same_bytes_each_time(self, drawn: Path, tmp_path: Path) -> None:
        generated.write(tmp_path, ["dtd"], MINI)
        files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
        assert len(files) == 3 * 4 + 2
        assert all((tmp_path / f).read_bytes() == (drawn / f).read_bytes() for f in files)

    def test_what_is_there_is_kept(self, tmp_path: Path) -> None:
        generated.write(tmp_path, ["dtd"], MINI)
        image = next(tmp_path.rglob("*.jpg"))
        before = image.stat().st_mtime_ns
        generated.write(tmp_path, ["dtd"], MINI)
        assert image.stat().st_mtime_ns == before
        with pytest.raises(UserError, match="holds other generated images"):
            generated.write(tmp_path, ["dtd"], Mini(classes=2))

    def test_real_images_are_never_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "dtd").mkdir()
        with pytest.raises(UserError, match="dtd holds something else"):
            generated.write(tmp_path, ["dtd"], MINI)
        assert list((tmp_path / "dtd").iterdir()) == []

    def test_files_of_the_users_by_a_name_like_ours_stay(self, tmp_path: Path) -> None:
        mine = tmp_path / f".{KNOWN['dtd'].folders[0]}.partial" / "notes.txt"
        mine.parent.mkdir()
        mine.write_text("mine")
        generated.write(tmp_path, ["dtd"], MINI)
        assert mine.read_text() == "mine"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.parent.name, KNOWN["dtd"].folders[0]])

    def test_a_write_that_was_stopped_is_begun_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(generated, "_shape", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            generated.write(tmp_path, ["dtd"], MINI)
        assert not (tmp_path / "dtd").exists()
        generated.write(tmp_path, ["dtd"], MINI)
        assert [p.name for p in tmp_path.iterdir()] == ["dtd"]


class TestMissing:
    @pytest.mark.parametrize("name", KNOWN)
    def test_no_folder_says_what_to_make(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UserError) as error:
            datasets.load(name, tmp_path)
        assert str(tmp_path / KNOWN[name].folders[0]) in str(error.value) and "--root" in str(error.value)
        assert all(piece.paths[0] in str(error.value) for piece in KNOWN[name].needs())
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("name", "piece"), [(name, piece.paths[0]) for name in KNOWN for piece in KNOWN[name].needs()], ids=lambda v: v
    )
    def test_each_missing_piece_is_named_with_its_place(self, drawn: Path, tmp_path: Path, name: str, piece: str) -> None:
        place = copied(drawn, tmp_path, name)
        gone = place / piece
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        located = known.locate(name, tmp_path)
        assert len(located.missing) == 1 and located.missing[0].endswith(f"at {gone}")
        with pytest.raises(UserError, match="is not complete: put"):
            datasets.load(name, tmp_path)

    @pytest.mark.parametrize("name", [name for name in KNOWN if name != "imagenet"])
    def test_images_that_the_lists_name_and_nobody_has(self, drawn: Path, tmp_path: Path, name: str) -> None:
        place = copied(drawn, tmp_path, name)
        for image in sorted(place.rglob("*.jpg"))[:2]:
            image.unlink()
        with pytest.raises(UserError, match=r"2 of 12 images are missing, the first is .*\.jpg: put them below"):
            datasets.load(name, tmp_path)


class TestBadSplits:
    def split(self, root: Path, **roles: list[list[object]]) -> str:
        folder = root / "caltech-101"
        make_folder(folder / "101_ObjectCategories", ["a", "b"], 2)
        rows = {"train": [["a/0.png", 0, "big_cat"], ["b/0.png", 1, "b"]], "val": [], "test": [["a/1.png", 0, "big_cat"]]}
        (folder / "split_zhou_Caltech101.json").write_text(json.dumps(rows | roles))
        return "caltech101"

    def test_underscores_become_spaces(self, tmp_path: Path) -> None:
        data = datasets.load(self.split(tmp_path), tmp_path)
        assert data.classes == ("big cat", "b")
        assert [item.name for item in data.train] == ["a/0.png", "b/0.png"]

    @pytest.mark.parametrize(
        ("rows", "says"),
        [
            ([["a/9.png", 0, "big_cat"], ["b/0.png", 1, "b"]], "1 of 3 images are missing, the first is .*a/9.png"),
            ([["a/0.png", 0, "big_cat"], ["b/0.png", 2, "b"]], "labels are not 0 to 1, 1 is missing"),
            ([["a/0.png", 0, "other"], ["b/0.png", 1, "b"]], "is both"),
            ([["a/0.png", 0]], "not a split file"),
            ([["a/0.png", 0, "big_cat"], ["b/0.png", 1, "big cat"]], "labels 0 and 1 .* both mean the class 'big cat'"),
            ([["a/0.png", 0, "big_cat"]], "has 1 classes: give it at least two"),
            ([["a/0.png", "zero", "big_cat"]], "not a split file"),
        ],
        ids=["missing image", "gap in labels", "two names", "short row", "one name twice", "one class", "label is a word"],
    )
    def test_named_in_one_line(self, tmp_path: Path, rows: list[list[object]], says: str) -> None:
        with pytest.raises(UserError, match=says) as error:
            datasets.load(self.split(tmp_path, train=rows), tmp_path)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe\x00", b'{"train": []}'], ids=repr)
    def test_no_split_at_all(self, tmp_path: Path, content: bytes) -> None:
        self.split(tmp_path)
        (tmp_path / "caltech-101" / "split_zhou_Caltech101.json").write_bytes(content)
        with pytest.raises(UserError, match=r"is not a split file of CoOp's layout"):
            datasets.load("caltech101", tmp_path)

    def test_a_class_without_test_images(self, tmp_path: Path) -> None:
        data = datasets.load(self.split(tmp_path), tmp_path)
        with pytest.raises(UserError, match="class 'b' has no test image"):
            datasets.check_training(data)

    def test_a_class_without_training_images(self, tmp_path: Path) -> None:
        rows: list[list[object]] = [["a/0.png", 0, "big_cat"]]
        tested: list[list[object]] = [["a/1.png", 0, "big_cat"], ["b/1.png", 1, "b"]]
        data = datasets.load(self.split(tmp_path, train=rows, test=tested), tmp_path)
        with pytest.raises(UserError, match="class 'b' has no training image"):
            datasets.check_training(data)

    @pytest.mark.parametrize(
        ("file", "text", "says"),
        [
            ("variants.txt", "", "is empty: it should hold class names"),
            ("images_variant_test.txt", "000005 707-320\n", "line 1: '707-320' is no line of"),
            ("images_variant_train.txt", "000005\n", "line 1: '' is no line of"),
        ],
    )
    def test_aircraft(self, drawn: Path, tmp_path: Path, file: str, text: str, says: str) -> None:
        (copied(drawn, tmp_path, "fgvc_aircraft") / file).write_text(text)
        with pytest.raises(UserError, match=says):
            datasets.load("fgvc_aircraft", tmp_path)

    def test_imagenet(self, drawn: Path, tmp_path: Path) -> None:
        place = copied(drawn, tmp_path, "imagenet")
        names = (place / "classnames.txt").read_text()
        (place / "classnames.txt").write_text("tench\n" + names)
        with pytest.raises(
            UserError, match=r"line 1: expected a new WordNet id and a class name \(n01440764 tench\), got 'tench'"
        ):
            datasets.load("imagenet", tmp_path)
        (place / "classnames.txt").write_text("\n".join(names.splitlines()[1:]))
        with pytest.raises(UserError, match="n10000000 has no name in"):
            datasets.load("imagenet", tmp_path)
        (place / "classnames.txt").write_text(names)
        for folder in (place / "images" / "val").iterdir():
            for image in folder.iterdir():
                image.rename(place / "images" / "val" / f"{folder.name}{image.name}")
            folder.rmdir()
        with pytest.raises(UserError, match="val holds no class folder: sort its images"):
            datasets.load("imagenet", tmp_path)


class TestReal:
    @needs_caltech
    @pytest.mark.parametrize("by", ["name and root", "path"])
    def test_caltech101_is_complete(self, by: str) -> None:
        data = datasets.load("caltech101", CALTECH.parent) if by == "name and root" else datasets.load(str(CALTECH))
        assert data.test is not None
        assert (len(data.classes), len(data.train), len(data.val), len(data.test)) == (100, 4128, 1649, 2465)
        assert data.classes[:3] == ("face", "leopard", "motorbike") and data.template == "a photo of a {}."
        assert data.notes == () and not data.generated
        datasets.check_training(data)

    @pytest.mark.skipif(not REAL, reason="no split files of CoOp here: set FASTLORA_TEST_DATA")
    def test_split_files_of_coop(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each is read whole; only that its images are there is taken for granted."""
        monkeypatch.setattr("os.path.isfile", lambda path: True)
        for name in REAL:
            place = tmp_path / KNOWN[name].folders[0]
            for piece in KNOWN[name].needs()[1:]:
                (place / piece.paths[0]).mkdir(parents=True)
            shutil.copy(SPLITS[name], place)
            data = datasets.load(name, tmp_path)
            assert data.test is not None
            assert len(data.classes) == KNOWN[name].classes and data.notes == (), name
            assert (len(data.train), len(data.val), len(data.test)) == KNOWN[name].sizes, name
            assert not any("_" in c for c in data.classes), name
            datasets.check_training(data)
            assert len(sampling.draw(data, 16, 1).train) == 16 * len(data.classes), name
            below = {Path(str(item.source)).relative_to(place).parts[0] for item in data.train}
            assert below == {"cars_train" if name == "stanford_cars" else KNOWN[name].images}, name
        assert len(REAL) == 6
