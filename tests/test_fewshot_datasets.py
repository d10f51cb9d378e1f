"""Data sets and the draw of shots: plain folders, digits, and folders as people have them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from fastlora.fewshot import datasets, sampling
from fastlora.fewshot.datasets import Dataset, Item
from fastlora.fewshot.errors import UserError
from pictures import make_folder, photo


def some(per_class: list[int], val: int = 0, test: bool = True) -> Dataset:
    """A data set of names only, `per_class` training images of each class."""
    train = tuple(Item(c, f"{c}/{i}", Path("none")) for c, n in enumerate(per_class) for i in range(n))
    held = tuple(Item(c, f"val {c}/{i}", Path("none")) for c in range(len(per_class)) for i in range(val))
    tested = tuple(Item(c, f"test {c}", Path("none")) for c in range(len(per_class)))
    return Dataset("some", tuple(f"class {c}" for c in range(len(per_class))), train, held, tested if test else None)


class TestDraw:
    def test_shots_of_each_class_without_repetition(self) -> None:
        drawn = sampling.draw(some([20, 30, 16]), 16, seed=1)
        assert Counter(item.label for item in drawn.train) == {0: 16, 1: 16, 2: 16}
        assert len({item.name for item in drawn.train}) == 48

    def test_a_seed_names_one_draw(self) -> None:
        names = [[item.name for item in sampling.draw(some([50, 50]), 4, seed).train] for seed in (1, 1, 2)]
        assert names[0] == names[1] != names[2]

    def test_validation_is_drawn_first_with_at_most_four_a_class(self) -> None:
        assert Counter(i.label for i in sampling.draw(some([50, 50], val=9), 16, 1).val) == {0: 4, 1: 4}
        assert Counter(i.label for i in sampling.draw(some([50, 50], val=9), 2, 1).val) == {0: 2, 1: 2}
        # as the paper's code, which seeds Python's generator and samples validation, then training images, class by class
        import random

        data = some([50, 50], val=9)
        rng = random.Random(7)
        val = [i for c in range(2) for i in rng.sample([v for v in data.val if v.label == c], 2)]
        train = [i for c in range(2) for i in rng.sample([t for t in data.train if t.label == c], 2)]
        drawn = sampling.draw(data, 2, seed=7)
        assert (list(drawn.val), list(drawn.train)) == (val, train)

    def test_a_small_class_gives_all_and_is_named(self) -> None:
        drawn = sampling.draw(some([20, 3]), 16, 1)
        assert Counter(item.label for item in drawn.train) == {0: 16, 1: 3}
        assert drawn.notes == ("classes with fewer than 16 training images: 1: class 1 (3)",)

    def test_without_a_test_set_the_rest_is_tested_and_none_is_in_both(self) -> None:
        data = some([20, 10, 2, 1], test=False)
        drawn = sampling.draw(data, 16, 1)
        assert Counter(item.label for item in drawn.train) == {0: 16, 1: 8, 2: 1, 3: 1}
        assert {i.name for i in drawn.train} & {i.name for i in drawn.test} == set()
        assert len(drawn.train) + len(drawn.test) == len(data.train)
        assert "classes without a test image: 1: class 3" in drawn.notes

    def test_a_broken_image_is_replaced_and_the_others_stay(self) -> None:
        data = some([20, 20])
        before = sampling.draw(data, 4, 1).train
        broken = before[1].name
        after = sampling.draw(data, 4, 1, {broken}).train
        assert len(after) == 8 and broken not in {i.name for i in after}
        assert {i.name for i in before} - {i.name for i in after} == {broken}
        assert [i.name for i in after if i.label == 1] == [i.name for i in before if i.label == 1]


class TestFolder:
    def test_classes_in_order_of_name_with_spaces_for_underscores(self, tmp_path: Path) -> None:
        data = datasets.load(str(make_folder(tmp_path / "d", ["sea_horse", "Übergröße", "a cat"], 3)))
        assert data.classes == ("a cat", "sea horse", "Übergröße")
        assert [item.label for item in data.train] == [0] * 3 + [1] * 3 + [2] * 3
        assert data.test is None and data.notes == ()

    def test_decomposed_names_are_composed(self, tmp_path: Path) -> None:
        data = datasets.load(str(make_folder(tmp_path / "d", ["cafe\u0301", "tea"], 2)))
        assert data.classes == ("café", "tea")

    @pytest.mark.parametrize("val", ["val", "valid", "Validation"])
    def test_train_test_and_val(self, tmp_path: Path, val: str) -> None:
        for part, count in (("train", 4), ("test", 2), (val, 1)):
            make_folder(tmp_path / "d" / part, ["a", "b"], count)
        data = datasets.load(str(tmp_path / "d"))
        assert data.test is not None
        assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 4)
        assert {item.name.split("/")[0] for item in data.test} == {"test"}

    def test_train_and_val_alone_is_tested_on_val_and_says_so(self, tmp_path: Path) -> None:
        for part in ("train", "val"):
            make_folder(tmp_path / "d" / part, ["a", "b"], 2)
        data = datasets.load(str(tmp_path / "d"))
        assert data.test is not None and len(data.test) == 4 and data.val == ()
        assert data.notes == ("tested on val: there is no folder named test",)

    def test_a_class_called_train_is_a_class(self, tmp_path: Path) -> None:
        assert datasets.load(str(make_folder(tmp_path / "d", ["bus", "train"], 2))).classes == ("bus", "train")

    def test_images_in_folders_of_a_class_belong_to_it(self, tmp_path: Path) -> None:
        root = make_folder(tmp_path / "d", ["a", "b"], 2)
        make_folder(root / "a", ["more"], 3)
        assert Counter(item.label for item in datasets.load(str(root)).train) == {0: 5, 1: 2}

    def test_other_files_are_counted(self, tmp_path: Path) -> None:
        root = make_folder(tmp_path / "d", ["a", "b"], 2)
        (root / "a" / "notes.txt").write_text("not an image")
        (root / "b" / "labels.csv").write_text("not an image")
        (root / "b" / ".DS_Store").write_text("hidden: not worth a line")
        assert datasets.load(str(root)).notes == ("files that are not images, left out: 2",)

    def test_circles_of_links_are_left_out_and_counted(self, tmp_path: Path) -> None:
        root = make_folder(tmp_path / "d", ["a", "b"], 2)
        (root / "a" / "up").symlink_to(root, target_is_directory=True)
        (root / "a" / "self").symlink_to(root / "a" / "self")
        (root / "again").symlink_to(root, target_is_directory=True)
        data = datasets.load(str(root))
        assert data.classes == ("a", "b") and len(data.train) == 4
        assert data.notes == ("links that lead nowhere or in a circle, left out: 3",)

    def test_links_to_images_and_folders_are_followed(self, tmp_path: Path) -> None:
        root = make_folder(tmp_path / "d", ["a"], 2)
        elsewhere = make_folder(tmp_path / "elsewhere", ["x"], 3)
        (root / "b").symlink_to(elsewhere / "x", target_is_directory=True)
        assert Counter(item.label for item in datasets.load(str(root)).train) == {0: 2, 1: 3}

    @pytest.mark.parametrize("content", ["nothing", "a text file"])
    def test_an_empty_class_folder_is_an_error_that_names_it(self, tmp_path: Path, content: str) -> None:
        root = make_folder(tmp_path / "d", ["a", "b"], 2)
        (root / "empty one").mkdir()
        if content != "nothing":
            (root / "empty one" / "x.txt").write_text("")
        with pytest.raises(UserError, match="empty one holds no image"):
            datasets.load(str(root))

    def test_two_folders_of_one_name_are_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="both mean the class 'sea horse'"):
            datasets.load(str(make_folder(tmp_path / "d", ["sea_horse", "sea horse"], 1)))

    def test_a_class_only_in_test_is_an_error(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "d" / "train", ["a", "b"], 1)
        make_folder(tmp_path / "d" / "test", ["a", "c"], 1)
        with pytest.raises(UserError, match=r"test/c has no counterpart"):
            datasets.load(str(tmp_path / "d"))

    def test_a_class_is_one_class_however_its_folder_is_written(self, tmp_path: Path) -> None:
        for role, names in (("train", ["sea_horse", "cafe\u0301", "ant"]), ("test", ["sea horse", "café", "ant"])):
            make_folder(tmp_path / "d" / role, names, 1)
        make_folder(tmp_path / "d" / "val", ["caf\u00e9", "sea_horse"], 1)
        data = datasets.load(str(tmp_path / "d"))
        assert data.classes == ("ant", "café", "sea horse") and data.test is not None
        for item in (*data.train, *data.val, *data.test):
            assert datasets.class_name(item.name.split("/")[1]) == data.classes[item.label]
        assert [item.label for item in data.test] == [0, 1, 2] and len(data.val) == 2
        make_folder(tmp_path / "d" / "test", ["sea_horse"], 1)
        with pytest.raises(UserError, match=r"'sea horse' and 'sea_horse' in .*test both mean the class 'sea horse'"):
            datasets.load(str(tmp_path / "d"))

    def test_images_without_class_folders(self, tmp_path: Path) -> None:
        Image.fromarray(photo(8, 8, 0)).save(tmp_path / "a.png")
        with pytest.raises(UserError, match="images but no class folders"):
            datasets.load(str(tmp_path))

    def test_missing_folder_and_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="does not exist"):
            datasets.load(str(tmp_path / "none"))
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="is a file, not a folder"):
            datasets.load(str(tmp_path / "file"))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
    def test_a_folder_without_permission(self, tmp_path: Path) -> None:
        root = make_folder(tmp_path / "d", ["a", "b"], 1)
        (root / "a").chmod(0)
        try:
            with pytest.raises(UserError, match="cannot read the folder"):
                datasets.load(str(root))
        finally:
            (root / "a").chmod(0o755)


def test_digits_have_a_held_out_half() -> None:
    data = datasets.load("digits")
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (898, 899)
    assert not {item.name for item in data.train} & {item.name for item in data.test}
    assert data.classes[7] == "seven" and not data.flip
    assert {item.label for item in data.train} == set(range(10))
