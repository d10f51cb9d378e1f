"""Class names and prompts in files, a validation split held out, and both as part of what a run is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from fastlora.fewshot import datasets, trainer
from fastlora.fewshot.datasets import Dataset, Item, Reading, words
from fastlora.fewshot.datasets.held_out import hold_out
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.sweep.grid import parse
from pictures import make_folder


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("words") / "pictures", ["a_b", "c"], images=6)


class TestClassNames:
    @pytest.mark.parametrize(
        "text",
        ["sea horse\ncat\n", "\ufeffsea_horse\r\n\r\n  cat  \r\n", "c\tcat\na_b\tsea horse\n"],
        ids=["lines", "bom", "pairs"],
    )
    def test_names_of_ones_own(self, folder: Path, tmp_path: Path, text: str) -> None:
        how = Reading(class_names=str(write(tmp_path / "names.txt", text)))
        assert datasets.load(str(folder), how=how).classes == ("sea horse", "cat")

    def test_names_end_the_note_that_there_are_none(self, folder: Path, tmp_path: Path) -> None:
        table = write(folder.parent / "list.csv", "path,label\n" + "".join(f"pictures/{k}/{i}.png,{n}\n" for n, k in
                      enumerate(("a_b", "c")) for i in range(2)))  # fmt: skip
        assert len(datasets.load(str(table)).notes) == 1
        named = datasets.load(str(table), how=Reading(class_names=str(write(tmp_path / "n.txt", "1\tcat\n0\tsea horse"))))
        assert (named.classes, named.notes) == (("sea horse", "cat"), ())

    @pytest.mark.parametrize(
        ("labels", "how"),
        [
            ([str(i) for i in range(1, 13)], "natural order: '1' is 'name 1', … '12' is 'name 12'"),
            ([str(i) for i in range(12)], "natural order: '0' is 'name 1', … '11' is 'name 12'"),
            ([f"n-{i}" for i in range(98, 110)], "natural order: 'n-98' is 'name 1', … 'n-109' is 'name 12'"),
            (["9", "010", "11"], "natural order: '9' is 'name 1', … '11' is 'name 3'"),
            ([f"{i:02d}" for i in range(1, 13)], "order of the labels: '01' is 'name 1', … '12' is 'name 12'"),
            (["Zebra", "ant", "bee 2"], "order of the labels: 'Zebra' is 'name 1', … 'bee 2' is 'name 3'"),
        ],
    )
    def test_names_in_the_order_of_numbers(self, tmp_path: Path, labels: list[str], how: str) -> None:
        """Whatever order the folders lie in, line k names the k-th label; items and their numbers stay as they are."""
        root = make_folder(tmp_path / "d", labels, images=1)
        names = write(tmp_path / "names.txt", "".join(f"name_{k}\n" for k in range(1, len(labels) + 1)))
        plain, named = datasets.load(str(root)), datasets.load(str(root), how=Reading(class_names=str(names)))
        found = {item.name.split("/")[0]: named.classes[item.label] for item in named.train}
        assert found == {label: f"name {k}" for k, label in enumerate(labels, 1)}
        assert named.train == plain.train and how in named.notes[-1]

    @pytest.mark.parametrize(
        ("labels", "pair"),
        [
            (["DC-10", "DC-3", "Spitfire"], "'DC-10' and 'DC-3'"),
            (["10", "2", "background"], "'10' and '2'"),
            (["1", "10", "2", "02"], "'02' and '1'"),
            (["10.5", "2.5"], "'10.5' and '2.5'"),
        ],
    )
    def test_an_order_that_is_not_plain_is_refused(self, tmp_path: Path, labels: list[str], pair: str) -> None:
        root = make_folder(tmp_path / "d", labels, images=1)
        names = write(tmp_path / "names.txt", "".join(f"name {k}\n" for k in range(len(labels))))
        with pytest.raises(UserError, match=f"{pair} can be put in two orders: write lines of label, tab, name"):
            datasets.load(str(root), how=Reading(class_names=str(names)))
        write(names, "".join(f"{label}\tname {label}\n" for label in labels))
        named = datasets.load(str(root), how=Reading(class_names=str(names)))
        assert all(named.classes[item.label] == f"name {item.name.split('/')[0]}" for item in named.train)

    def test_lists_of_labels_that_have_an_order_of_their_own(self, tmp_path: Path) -> None:
        """A table's numbers count from 0; a set of torch numbers its classes as it likes."""
        make_folder(tmp_path / "p", ["x"], images=12)
        table = write(tmp_path / "list.csv", "path,label\n" + "".join(f"p/x/{i}.png,{i}\n" for i in range(12)))
        names = write(tmp_path / "names.txt", "".join(f"name {k}\n" for k in range(12)))
        named = datasets.load(str(table), how=Reading(class_names=str(names)))
        assert all(named.classes[item.label] == f"name {Path(item.name).stem}" for item in named.train)
        assert named.notes == ("names by the order of the labels: '0' is 'name 0', … '11' is 'name 11'",)
        assert words.lines_of(("wolf", "ant 10", "ant 2"), names) == [0, 1, 2]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (b"one\n", "holds 1 class names, pictures has 2 classes"),
            (b"one\ntwo\nthree\n", "holds 3 class names, pictures has 2 classes"),
            (b"cat\n\nCat\n cat\n", "holds 3 class names"),
            (b"a_cat\na cat\n", "two lines of .* both mean the class 'a cat': rename one"),
            (b"c\tcat\nd\tdog\n", "has no line for class 'a b' of pictures"),
            (b"c\tcat\na_b\n", r"expected a label, a tab and a class name, .* got 'a_b'"),
            (b"c\tcat\tdog\na_b\tx\n", "expected a label, a tab"),
            (b"c\tcat\na_b\tx\na b\ty\n", "gives two names to one label"),
            (b"\n \n", "is empty: it should hold class names, one a line"),
            (b"caf\xe9\nx\n", r"is not UTF-8 text .line 1, byte 0xe9.: save it as UTF-8"),
        ],
    )
    def test_mistakes(self, folder: Path, tmp_path: Path, text: bytes, said: str) -> None:
        with pytest.raises(UserError, match=said) as error:
            datasets.load(str(folder), how=Reading(class_names=str(write(tmp_path / "names.txt", text))))
        assert "\n" not in str(error.value)

    def test_no_such_file(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"cannot read nowhere\.txt: No such file"):
            datasets.load(str(folder), how=Reading(class_names="nowhere.txt"))


class TestPrompts:
    def test_given_as_words_as_files_or_both(self, tmp_path: Path) -> None:
        file = write(tmp_path / "prompts.txt", "# mine\na {}.\n\n  a drawing of a {}.\n")
        assert words.prompts("a {}") == ("a {}",)
        assert words.prompts([str(file), "one {}"]) == ("a {}.", "a drawing of a {}.", "one {}")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a {}\na photo\n", "line 2: a template holds {} once, where the class name goes, got 'a photo'"),
            ("{} and {}\n", "line 1: a template holds {} once"),
            ("a {c}\n", "line 1: a template holds {} once"),
            ("a {}\n# x\na {}\n", "line 3: 'a {}' stands there twice"),
            ("# nothing\n", "holds no template: write one a line"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(UserError, match=said):
            words.prompts(str(write(tmp_path / "prompts.txt", text)))

    def test_coops_own(self, folder: Path) -> None:
        from fastlora.fewshot.recipe import prompts_for

        assert words.prompts(["own"]) == words.prompts("own") == ("own",)
        recipe = Recipe(template="own")
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert prompts_for("own", "a {}", "{} texture.") == ("{} texture.",) and prompts_for("own", "a {}", None) == ("a {}",)
        assert prompts_for(None, "a {}", "{} texture.") == ("a {}",) and prompts_for(("b {}",), "a {}", None) == ("b {}",)
        assert parse({"data": "dtd", "template": "own"}).runs[0].recipe.template == "own"

    def test_neither_a_prompt_nor_a_file(self) -> None:
        with pytest.raises(UserError, match="or name a file of such lines, got 'a photo'"):
            words.prompts("a photo")


class TestHeldOut:
    def some(self, per_class: list[int], test: bool = True, val: int = 0) -> Dataset:
        train = tuple(Item(c, f"{c}/{i}", Path("x")) for c, n in enumerate(per_class) for i in range(n))
        held = tuple(Item(0, f"val {i}", Path("x")) for i in range(val))
        return Dataset("some", tuple("abcd"[: len(per_class)]), train, held, train[:1] if test else None)

    def test_a_share_of_each_class_and_always_the_same(self) -> None:
        split = hold_out(self.some([20, 3, 1]), 0.25)
        assert Counter(item.label for item in split.val) == {0: 5, 1: 1}
        assert Counter(item.label for item in split.train) == {0: 15, 1: 2, 2: 1}
        assert not {i.name for i in split.train} & {i.name for i in split.val}
        assert split.notes[0] == "held out for validation: 6 of 24 training images" and "too few" in split.notes[1]
        other = hold_out(self.some([20, 9]), 0.25)
        assert [i.name for i in other.val if i.label == 0] == [i.name for i in split.val if i.label == 0]

    def test_one_is_left_to_train_on_and_one_to_test_on(self) -> None:
        assert Counter(item.label for item in hold_out(self.some([3, 2], test=False), 0.9).val) == {0: 1}

    def test_a_set_with_a_validation_split_keeps_it(self) -> None:
        kept = hold_out(self.some([5], val=2), 0.5)
        assert len(kept.val) == 2 and len(kept.train) == 5 and "not used: it has a validation split of 2" in kept.notes[0]

    @pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
    def test_other_shares_are_refused(self, share: float) -> None:
        with pytest.raises(ValueError, match="validation must be a share"):
            Reading(validation=share)


class TestIdentity:
    def test_a_run_keeps_its_reading_and_resume_refuses_another(self, folder: Path, tmp_path: Path) -> None:
        names, out = write(tmp_path / "names.txt", "sea horse\ncat\n"), tmp_path / "run"
        recipe = Recipe(
            model="mini", pretrained=None, method="linear-probe", shots=2,
            reading=Reading(class_names=str(names), validation=0.3),
        )  # fmt: skip
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
        trainer.run(trainer.Job(recipe, str(folder), out, device="cpu", brief=True), Console(quiet=True))
        config = json.loads((out / "config.json").read_text())
        assert config["classes"] == ["sea horse", "cat"] and config["recipe"]["reading"]["validation"] == 0.3
        assert len(json.loads((out / "split.json").read_text())["val"]) == 4
        (out / "metrics.json").unlink()  # as if it had been stopped
        with pytest.raises(UserError, match=r"has recipe\.reading\.validation = 0\.3, now it is 0\.0"):
            other = Recipe(model="mini", pretrained=None, method="linear-probe", shots=2, reading=Reading(str(names)))
            trainer.run(trainer.Job(other, str(folder), out, device="cpu", resume=True), Console(quiet=True))
        write(names, "sea horse\ntiger\n")
        with pytest.raises(UserError, match="has the class 'cat' where there is 'tiger' now"):
            trainer.run(trainer.Job(recipe, str(folder), out, device="cpu", resume=True), Console(quiet=True))

    def test_a_data_set_of_python_is_trained_on(self, folder: Path, tmp_path: Path) -> None:
        from torchvision.datasets import ImageFolder

        data = datasets.from_torch("mine", ImageFolder(str(folder)))
        assert data.classes == ("a b", "c") and data.test is None
        recipe = Recipe(model="mini", pretrained=None, method="linear-probe", shots=2)
        metrics = trainer.run(trainer.Job(recipe, data, tmp_path / "run", device="cpu", brief=True), Console(quiet=True))
        assert metrics["test_images"] == 8
        assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == "mine"
        with pytest.raises(UserError, match="data set mine is read already"):
            trainer.Job(Recipe(reading=Reading(validation=0.1)), data, tmp_path / "other")

    def test_a_grid_knows_them(self, tmp_path: Path) -> None:
        file = write(tmp_path / "prompts.txt", "a {}.\nthe {}.\n")
        grid = {"data": "x.csv", "shots": 1, "seeds": 1, "label_column": "species, Latin", "validation": [0, 0.2]}
        runs = parse(grid | {"template": ["a photo of a {}.", str(file)]}).runs
        assert {run.recipe.template for run in runs} == {"a photo of a {}.", ("a {}.", "the {}.")}
        assert {run.recipe.reading.validation for run in runs} == {0, 0.2}
        assert {run.recipe.reading.label_column for run in runs} == {"species, Latin"}
        assert len({run.name for run in runs}) == 4
        plain = parse({"data": "x.csv", "shots": 1, "seeds": 1}).runs[0]
        assert plain.name not in {run.name for run in runs} and plain.recipe == Recipe(shots=1)
        with pytest.raises(UserError, match="validation must be a share"):
            parse({"data": "x.csv", "validation": 2})
