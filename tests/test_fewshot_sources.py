"""Hugging Face sets, torchvision's and WebDataset tars: small ones made here, nothing is fetched."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import socket
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from torch.utils.data import ConcatDataset, Subset

from fastlora.fewshot import datasets
from fastlora.fewshot.datasets import Dataset, Item, Lazy, Reading
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.images import Decoded, decode_training, open_rgb
from pictures import make_folder, photo, tiny_clip, train_arguments

CLASSES = ("cat", "dog")
ROLES = {"train": 3, "test": 1}


def picture(role: str, label: int, i: int) -> np.ndarray:
    return photo(16, 20 + i, 1000 * (role == "test") + 10 * label + i, label)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def samples(role: str) -> list[tuple[int, np.ndarray]]:
    """Label and pixels of the images of a role, the classes by turns."""
    return [(label, picture(role, label, i)) for i in range(ROLES[role]) for label in range(2)]


def holds(data: Dataset, classes: tuple[str, ...] = CLASSES, roles: tuple[str, ...] = ("train", "test")) -> None:
    """That `data` has the pictures of `samples`, in order, whose pixels are read right."""
    assert data.classes == classes
    for role, items in zip(roles, (data.train, data.test or ()), strict=False):
        wanted = samples(role)
        assert [item.label for item in items] == [label for label, _ in wanted]
        for item, (_, pixels) in zip(items, wanted, strict=True):
            assert isinstance(item.source, Lazy) and np.array_equal(np.asarray(open_rgb(item)[0]), pixels)
    names = [item.name for item in (*data.train, *data.val, *(data.test or ()))]
    assert len(set(names)) == len(names)


class TestTars:
    def write(self, path: Path, role: str, label: Any = None, image: str = "png") -> Path:
        """A tar of the pictures of `role`; `label` makes the second file of a sample, its ending and content."""
        label = label or (lambda k: ("cls", str(k)))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for number, (k, pixels) in enumerate(samples(role)):
                for ending, content in ((image, png(pixels)), (label(k)[0], label(k)[1].encode())):
                    member = tarfile.TarInfo(f"pictures/{number:04d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return path

    def test_a_folder_whose_tars_are_named_after_their_split(self, tmp_path: Path) -> None:
        for role in ROLES:
            self.write(tmp_path / "pets" / f"pets-{role}-000.tar", role)
        (tmp_path / "pets" / "classnames.txt").write_text("cat\ndog\n")
        data = datasets.load(str(tmp_path / "pets"))
        holds(data)
        assert data.name == "pets" and data.train[0].name == "pets-train-000.tar/pictures/0000"
        found = datasets.load(str(tmp_path / "pets"), how=Reading(validation=0.3))
        assert [item.label for item in found.val] == [0, 1] and len(found.train) == 4

    def test_folders_of_splits_words_for_labels_and_a_pattern(self, tmp_path: Path) -> None:
        for role in ROLES:
            self.write(tmp_path / role / "07.tar", role, lambda k: ("json", json.dumps({"label": CLASSES[k]})))
        holds(datasets.load(str(tmp_path)))
        (tmp_path / "train" / "07.tar").rename(tmp_path / "part-07.tar")
        (tmp_path / "test" / "07.tar").rename(tmp_path / "part-08.tar")
        data = datasets.load(str(tmp_path / "part-{07..08}.tar"))
        assert (data.name, len(data.train), data.test) == ("part", 8, None)
        assert len(datasets.load(str(tmp_path / "part-{07,08}.tar")).train) == 8

    def test_lists_of_names_beside_the_tars_of_each_split(self, tmp_path: Path) -> None:
        for role in ROLES:
            self.write(tmp_path / role / "0.tar", role)
            (tmp_path / role / "classnames.txt").write_text("cat\ndog\n")
        holds(datasets.load(str(tmp_path)))
        (tmp_path / "test" / "classnames.txt").write_text("dog\ncat\n")
        with pytest.raises(UserError, match=r"test/classnames\.txt has 'dog' where .*train/classnames\.txt has 'cat'"):
            datasets.load(str(tmp_path))

    def test_endings_and_keys_of_ones_own(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.tar", "train", lambda k: ("json", json.dumps({"kind": CLASSES[k], "fold": "training"})))
        data = datasets.load(str(path), how=Reading(image_column="png", label_column="kind", split_column="fold"))
        holds(data, roles=("train",))
        with pytest.raises(UserError, match=r"pictures/0000 has no label: \.cls or \.json with label; it has png, json"):
            datasets.load(str(path))
        with pytest.raises(UserError, match=r"has no nothing .--split-column.: it has png, json"):
            datasets.load(str(path), how=Reading(label_column="kind", split_column="nothing"))
        with pytest.raises(UserError, match="lists no image"):
            datasets.load(str(path), how=Reading(image_column="jpg"))

    def test_mistakes(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.tar", "train", lambda k: ("cls", str(2 * k)))
        with pytest.raises(UserError, match="labels have a gap, 1 is never used"):
            datasets.load(str(path))
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(UserError, match=r"a\.tar is not a readable tar .*not compressed"):
            datasets.load(str(path))
        with pytest.raises(UserError, match=r"1 of 2 tars are missing, the first is .*b\.tar"):
            datasets.load(str(tmp_path / "{a,b}.tar"))
        for name in ("a.tar.gz", "https://example.org/a.tar"):
            with pytest.raises(UserError, match="give tars that are not compressed, on a disk of this machine"):
                datasets.load(name)
        with tarfile.open(tmp_path / "bad.tar", "w") as tar:
            for ending, content in (("png", b"no picture"), ("json", b"{")):
                member = tarfile.TarInfo(f"x.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        with pytest.raises(UserError, match=r"x\.json is not JSON"):
            datasets.load(str(tmp_path / "bad.tar"))

    def test_what_the_webdataset_library_writes(self, tmp_path: Path) -> None:
        webdataset = pytest.importorskip("webdataset")
        with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
            for i, (label, pixels) in enumerate(samples("train")):
                writer.write({"__key__": f"x{i}", "png": pixels, "cls": label})
        holds(datasets.load(str(tmp_path / "w.tar")), ("0", "1"), ("train",))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="Hugging Face's datasets is not installed")
class TestHuggingFace:
    def part(self, role: str, **columns: Any) -> Any:
        import datasets as hf

        labels, pixels = zip(*samples(role), strict=True)
        features = hf.Features({"picture": hf.Image(), "label": hf.ClassLabel(names=list(CLASSES))})
        return hf.Dataset.from_dict({"picture": [{"bytes": png(p)} for p in pixels], "label": labels}, features)

    def test_a_saved_set(self, tmp_path: Path) -> None:
        import datasets as hf

        hf.DatasetDict({"train": self.part("train"), "test": self.part("test"), "extra": self.part("test")}).save_to_disk(
            tmp_path / "pets"
        )
        data = datasets.load(str(tmp_path / "pets"))
        holds(data)
        assert data.name == "pets" and data.notes == ("splits that are not train, validation or test, left out: extra",)
        again = datasets.load(f"hf:{tmp_path / 'pets'}")
        assert [item.name for item in again.train] == [item.name for item in data.train]
        with pytest.raises(UserError, match=r"has no column 'photo' .--image-column.: it has picture, label"):
            datasets.load(str(tmp_path / "pets"), how=Reading(image_column="photo"))
        with pytest.raises(UserError, match="column label holds no images but ClassLabel"):
            datasets.load(str(tmp_path / "pets"), how=Reading(image_column="label"))

    def test_splits_that_number_their_classes_in_different_ways(self, tmp_path: Path) -> None:
        import datasets as hf

        def relabelled(part: Any, feature: Any, change: Any) -> Any:
            return part.map(
                lambda row: {"label": change(row["label"])}, features=hf.Features(part.features | {"label": feature})
            )

        swapped = relabelled(self.part("test"), hf.ClassLabel(names=["dog", "cat"]), lambda k: 1 - k)
        words = relabelled(self.part("test"), hf.Value("string"), lambda k: CLASSES[k])
        for name, test in (("swapped", swapped), ("words", words)):
            for first, second in (("train", "test"), ("test", "train")):
                parts = {"train": self.part("train"), "test": test}
                hf.DatasetDict({role: parts[role] for role in (first, second)}).save_to_disk(tmp_path / f"{name} {first}")
                holds(datasets.load(str(tmp_path / f"{name} {first}")))
        numbers = relabelled(self.part("test"), hf.Value("int64"), lambda k: k)
        hf.DatasetDict({"test": numbers, "train": self.part("train")}).save_to_disk(tmp_path / "numbers")
        with pytest.raises(UserError, match="test: its classes are numbers, those of another split have names"):
            datasets.load(str(tmp_path / "numbers"))

    def test_one_part_with_columns_of_its_own_and_secret_labels(self, tmp_path: Path) -> None:
        import datasets as hf

        part = hf.concatenate_datasets([self.part(role) for role in ROLES])
        roles = [role for role, count in ROLES.items() for _ in range(2 * count)]
        words = [CLASSES[k] for k in part["label"]]
        part = part.add_column("fold", roles).add_column("kind", words).with_format("torch")
        part.save_to_disk(tmp_path / "one")
        assert datasets.load(str(tmp_path / "one")).test is None
        holds(datasets.load(str(tmp_path / "one"), how=Reading(label_column="kind", split_column="fold")))
        secret = self.part("test").map(lambda row: {"label": -1})
        hf.DatasetDict({"train": self.part("train"), "test": secret}).save_to_disk(tmp_path / "secret")
        data = datasets.load(str(tmp_path / "secret"))
        assert data.test is None and data.notes == ("images without a label, left out: 2",)

    def test_a_folder_of_parquet_as_the_hub_has_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets as hf

        monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "hub").mkdir()
        for role in ROLES:
            self.part(role).to_parquet(tmp_path / "hub" / f"{role}-00000-of-00001.parquet")
        holds(datasets.load(f"hf:{tmp_path / 'hub'}"))

    def test_a_name_where_the_hub_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(*_: Any) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        for name in ("no_proxy", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        with pytest.raises(UserError, match=r"hf:cifar10 is no folder here, and .* cannot be reached .*save_to_disk") as error:
            datasets.load("hf:cifar10")
        assert "\n" not in str(error.value)

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(UserError, match=r"pip install datasets$"):
            datasets.load("hf:cifar10")


class Torch:
    """A torch Dataset as people write them; counts how often an image is asked for."""

    def __init__(self, role: str, image: Any = Image.fromarray, **more: Any) -> None:
        self.rows, self.image, self.asked = samples(role), image, 0
        self.__dict__ |= more

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        self.asked += 1
        label, pixels = self.rows[i]
        return self.image(pixels), label


class TestTorchvision:
    def test_any_dataset_of_image_and_label(self) -> None:
        train = Torch("train", targets=[0, 1] * 3, classes=list(CLASSES))
        data = datasets.from_torch("pets", train, test=Torch("test", targets=["no", "labels"]))
        assert train.asked == 3, "labels come from the list where there is one"
        holds(data)
        assert all(np.array_equal(np.asarray(open_rgb(a)[0]), np.asarray(open_rgb(b)[0])) for a, b in zip(  # workers get copies
            data.train, pickle.loads(pickle.dumps(data.train)), strict=True))  # fmt: skip
        wrong = Torch("train", targets=[1, 1] * 3)  # a list that is something else is not believed
        assert [item.label for item in datasets.from_torch("pets", wrong, classes=CLASSES).train] == [0, 1] * 3
        with pytest.raises(UserError, match=r"pets gives .'ndarray', 'int'., not .PIL image, label."):
            datasets.from_torch("pets", Torch("train", image=np.asarray))
        with pytest.raises(UserError, match="has label 1, but there are 1 class names"):
            datasets.from_torch("pets", train, classes=["cat"])

    def test_classes_are_matched_by_name(self, tmp_path: Path) -> None:
        from torchvision.datasets import ImageFolder

        for role, names in (("train", ["cat", "dog", "fox", "sea_horse"]), ("test", ["cat", "fox", "sea horse"])):
            make_folder(tmp_path / role, names, images=2)
        train, test = (ImageFolder(str(tmp_path / role)) for role in ("train", "test"))
        half = Subset(test, [1, 2, 5])
        words, some = ["cat", "cat", "fox", "fox", "sea horse", "sea horse"], ["cat", "fox", "sea horse"]
        joined = ConcatDataset([half, test])
        for data, wanted in (
            (datasets.from_torch("pets", train, test=test), words),
            (datasets.from_torch("pets", train, test=half), some),
            (datasets.from_torch("pets", Subset(train, range(8)), val=half, test=joined), some + words),
            (datasets.from_torch("pets", train, test=test, classes=["A", "B", "C", "D"]), list("AACCDD")),
        ):
            assert [data.classes[item.label] for item in data.test or ()] == wanted
        assert datasets.from_torch("pets", train, val=half, test=train).val[1].label == 2

    def test_classes_that_cannot_be_matched(self, tmp_path: Path) -> None:
        train = Torch("train", classes=["cat", "dog"])
        for test, said in (
            (Torch("test", classes=["cat", "zebra"]), "pets, test: class 'zebra' is not in the training set"),
            (Torch("test", classes=["dog"]), "pets, test has label 1, but 1 class names"),
        ):
            with pytest.raises(UserError, match=said):
                datasets.from_torch("pets", train, test=test)
        with pytest.raises(UserError, match="pets, val has class names, the training set has none: give classes"):
            datasets.from_torch("pets", Torch("train"), val=Torch("test", classes=["dog", "cat"]))
        swapped = datasets.from_torch(
            "pets", Torch("train"), test=Torch("test", classes=["dog", "cat"]), classes=["cat", "dog"]
        )
        assert [item.label for item in swapped.test or ()] == [1, 0]
        joined = ConcatDataset([train, Torch("test", classes=["dog", "cat"])])
        with pytest.raises(UserError, match="pets joins sets that number their classes in different ways"):
            datasets.from_torch("pets", joined)

    def test_by_name_with_folders_as_torchvision_has_them(self, tmp_path: Path) -> None:
        for role, count in (("train", 3), ("val", 1)):
            make_folder(tmp_path / "imagenette2" / role, ["n01440764", "n02102040"], images=count)
        for path in tmp_path.rglob("*.png"):
            Image.open(path).save(path.with_suffix(".jpeg"))
        data = datasets.load("torchvision:Imagenette", tmp_path)
        # its list of classes comes from the folders, and each class has several words
        assert data.classes == ("tench", "English springer") and len(data.train) == 6 and len(data.test or ()) == 2
        assert data.notes == ("tested on val: there is no split named test",)

    def test_by_name_with_train_true_and_false(self, tmp_path: Path) -> None:
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        import torchvision

        kind = torchvision.datasets.CIFAR10
        parts = {name: role for names, role in ((kind.train_list, "train"), (kind.test_list, "test")) for name, _ in names}
        for name, role in parts.items():
            rows = samples(role)
            pixels = [np.asarray(Image.fromarray(p).resize((32, 32))).transpose(2, 0, 1).reshape(-1) for _, p in rows]
            (folder / name).write_bytes(pickle.dumps({"data": np.stack(pixels), "labels": [k for k, _ in rows]}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
            data = datasets.load("torchvision:CIFAR10", tmp_path)
        assert data.classes == CLASSES and len(data.train) == 5 * 6 and len(data.test or ()) == 2
        assert open_rgb(data.train[0])[0].size == (32, 32)

    def test_mistakes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network here")))
        for name, said in (
            ("Flower102", "torchvision has no data set 'Flower102': did you mean Flowers102"),
            ("VisionDataset", "torchvision has no data set 'VisionDataset'"),
            ("CocoCaptions", "needs annFile: make it in Python and give it to datasets.from_torch"),
            ("EMNIST", "EMNIST has no split for training: Unknown value"),
            ("EuroSAT", r"torchvision:EuroSAT is not in .*, and cannot be downloaded: no network here"),
        ):
            with pytest.raises(UserError, match=said) as error:
                datasets.load(f"torchvision:{name}", tmp_path)
            assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="DATA torchvision:FakeData is a set of torchvision, which has no columns"):
            datasets.load("torchvision:FakeData", tmp_path, Reading(image_column="x"))


def test_lazy_images_are_decoded_into_the_store_once() -> None:
    asked = []

    def read() -> bytes:
        asked.append(1)
        return png(picture("train", 0, 0))

    into = Decoded()
    items = [Item(0, "one", Lazy(read))]
    for _ in range(3):
        decode_training(items, 64, into, Console(quiet=True))
    assert len(asked) == 2, "once for its size, once for its pixels"
    assert into.images["one"].shape == (3, 16, 20)


def test_training_does_not_depend_on_where_the_images_are_kept(fastlora: Any, tmp_path: Path) -> None:
    """Files in folders, and the same bytes in tars that worker processes read as they train: the same loss, bit for bit."""
    model = tiny_clip(tmp_path / "model")
    (tmp_path / "tars").mkdir()
    for role, count in (("train", 4), ("test", 1)):
        make_folder(tmp_path / "folders" / role, CLASSES, images=count)
        with tarfile.open(tmp_path / "tars" / f"{role}.tar", "w") as tar:
            for path in sorted((tmp_path / "folders" / role).rglob("*.png")):
                name = f"{path.parent.name}-{path.stem}"
                for ending, content in (("png", path.read_bytes()), ("cls", path.parent.name.encode())):
                    member = tarfile.TarInfo(f"{name}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    losses = []
    for name, more in (("folders", []), ("tars", ["--images", "stream"])):
        ran = fastlora(*train_arguments(tmp_path / name, tmp_path / f"run {name}", model, *more))
        assert ran.code == 0, ran
        losses.append(json.loads((tmp_path / f"run {name}" / "metrics.json").read_text())["training"]["final_loss"])
    assert losses[0] == losses[1]
