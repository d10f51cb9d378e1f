"""Whole runs with a tiny CLIP: what they leave behind, every method, broken folders, and resuming after any kind of stop."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from fastlora.config import LoRAConfig
from fastlora.fewshot import evalrun, models, trainer
from fastlora.fewshot.batches import generator
from fastlora.fewshot.errors import Interrupted, UserError
from fastlora.fewshot.loop import Loop, set_training_mode
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.runfolder import RunFolder, atomic
from fastlora.fewshot.signals import Signals
from fastlora.fewshot.trainer import Job
from pictures import make_folder, pausing, photo, train_arguments
from waiting import HANG, wait

QUIET = Console(quiet=True)
CLASSES = ("red thing", "grün", "blue_thing")
RUN_FILES = {"config.json", "split.json", "metrics.json", "history.csv", "predictions.csv", "report.html", "log"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "pictures", CLASSES, images=8)


def recipe(model: str, **changes: Any) -> Recipe:
    small = {"shots": 2, "iterations": 12, "batch_size": 4, "lr": 1e-2, "pretrained": None}
    return Recipe(**{"model": model, **small, **changes})


def run(model: str, data: Path | str, out: Path, resume: bool = False, **changes: Any) -> dict[str, Any]:
    return trainer.run(Job(recipe(model, **changes), str(data), out, device="cpu", resume=resume), QUIET)


def history(out: Path) -> list[list[str]]:
    with open(out / "history.csv", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def out(model: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 60 steps."""
    path = tmp_path_factory.mktemp("run") / "out"
    run(model, folder, path, iterations=60)
    return path


@pytest.fixture(scope="module")
def undisturbed(model: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps that nothing stopped."""
    path = tmp_path_factory.mktemp("undisturbed") / "out"
    run(model, folder, path)
    return path


@pytest.fixture(scope="module")
def longer(model: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 100 steps of 3 images that nothing stopped."""
    path = tmp_path_factory.mktemp("longer") / "out"
    run(model, folder, path, iterations=100, batch_size=3)
    return path


class TestRun:
    def test_files(self, out: Path) -> None:
        assert {path.name for path in out.iterdir()} == RUN_FILES | {"adapter.safetensors"}

    def test_it_learns(self, out: Path) -> None:
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["accuracy"] > metrics["zero_shot_accuracy"] + 20
        losses = [float(row[1]) for row in history(out)[1:]]
        assert len(losses) == 60 and sum(losses[-10:]) < 0.5 * sum(losses[:10])
        assert metrics["training"]["final_loss"] == losses[-1]

    def test_metrics_agree_with_predictions(self, out: Path) -> None:
        metrics = json.loads((out / "metrics.json").read_text())
        with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == metrics["test_images"] == 18
        hits = sum(row["class"] == row["predicted"] for row in rows)
        assert metrics["accuracy"] == pytest.approx(100 * hits / 18, abs=1e-3)
        assert sum(map(sum, metrics["confusion"])) == 18
        assert {row["class"]: row["images"] for row in metrics["per_class"]} == {"blue thing": 6, "grün": 6, "red thing": 6}

    def test_training_and_test_images_are_apart(self, out: Path) -> None:
        split = json.loads((out / "split.json").read_text())
        with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
            tested = {row["image"] for row in csv.DictReader(file)}
        assert len(split["train"]) == 6 and not tested & set(split["train"])

    def test_tensorboard_reads_the_log(self, out: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(out / "log")).Reload()
        assert {"train/loss", "train/accuracy", "train/lr", "test/accuracy"} <= set(events.Tags()["scalars"])

    def test_config_rebuilds_the_recipe(self, out: Path, model: str) -> None:
        config = json.loads((out / "config.json").read_text())
        assert Recipe.from_dict(config["recipe"]) == recipe(model, iterations=60)
        assert config["classes"] == ["blue thing", "grün", "red thing"] and config["template"] == "a photo of a {}."

    def test_report_has_everything_in_one_file(self, out: Path) -> None:
        page = (out / "report.html").read_text(encoding="utf-8")
        assert "http://" not in page.replace("http://www.w3.org/", "") and "<script" not in page
        for piece in (
            "grün",
            "trainable parameters",
            "zero-shot",
            "training-curves",
            "What is taken for what",
            "Settings",
            "fastlora",
        ):
            assert piece in page, piece
        assert page.count("<svg") >= 1 and "nan" not in page.lower().replace("nano", "")

    def test_eval_gives_the_same_accuracy(self, out: Path, folder: Path, tmp_path: Path) -> None:
        metrics = json.loads((out / "metrics.json").read_text())
        again = evalrun.run(RunFolder(out), str(folder), Path("data"), "cpu", tmp_path / "e", None, QUIET)
        assert again["accuracy"] == metrics["accuracy"] and again["test_images"] == 18
        assert again["notes"] == ["images that the run trained on, left out: 6"]
        assert {path.name for path in (tmp_path / "e").iterdir()} == {"metrics.json", "predictions.csv", "report.html"}

    def test_eval_on_other_classes(self, out: Path, tmp_path: Path) -> None:
        other = make_folder(tmp_path / "other", ["x", "y"], 3, side=30)  # other pictures than those trained on
        assert evalrun.run(RunFolder(out), str(other), Path("data"), "cpu", None, None, QUIET)["test_images"] == 6

    def test_a_finished_run_is_left_alone(self, out: Path, model: str, folder: Path) -> None:
        before = (out / "metrics.json").stat().st_mtime_ns
        assert run(model, folder, out, resume=True, iterations=60)["training"]["steps"] == 60
        assert (out / "metrics.json").stat().st_mtime_ns == before

    def test_another_run_in_the_folder(self, out: Path, model: str, folder: Path) -> None:
        with pytest.raises(UserError, match=r"holds another run.*--resume"):
            run(model, folder, out, iterations=60)
        with pytest.raises(UserError, match=r"has recipe\.lr = 0\.01, now it is 0\.02"):
            run(model, folder, out, resume=True, iterations=60, lr=0.02)

    def test_a_damaged_adapter_is_refused(self, out: Path, folder: Path) -> None:
        adapter = out / "adapter.safetensors"
        whole = adapter.read_bytes()
        adapter.write_bytes(whole[:100])
        try:
            with pytest.raises(UserError, match=r"cannot load what .* saved"):
                evalrun.run(RunFolder(out), str(folder), Path("data"), "cpu", None, None, QUIET)
        finally:
            adapter.write_bytes(whole)


class TestMethods:
    def test_full_fine_tuning(self, model: str, folder: Path, tmp_path: Path) -> None:
        metrics = run(model, folder, tmp_path / "r", method="full", iterations=30, lr=1e-3)
        assert metrics["training"]["trainable_parameters"] > 100_000
        assert (tmp_path / "r" / "model.safetensors").is_file()
        again = evalrun.run(RunFolder(tmp_path / "r"), str(folder), Path("data"), "cpu", None, None, QUIET)
        assert again["accuracy"] == metrics["accuracy"] != metrics["zero_shot_accuracy"]

    @pytest.mark.parametrize("shots", [1, 4])
    def test_linear_probe(self, model: str, folder: Path, tmp_path: Path, shots: int) -> None:
        metrics = run(model, folder, tmp_path / "r", method="linear-probe", shots=shots)
        assert metrics["accuracy"] > 80  # tints are linearly separable in nearly any features
        assert metrics["probe_c"] > 0 and "training" not in metrics
        with pytest.raises(UserError, match="leaves no model"):
            evalrun.run(RunFolder(tmp_path / "r"), str(folder), Path("data"), "cpu", None, None, QUIET)

    def test_zero_shot(self, model: str, folder: Path, tmp_path: Path) -> None:
        metrics = run(model, folder, tmp_path / "r", method="zero-shot")
        assert metrics["accuracy"] == metrics["zero_shot_accuracy"]
        assert {path.name for path in (tmp_path / "r").iterdir()} == RUN_FILES - {"history.csv", "log"}

    @pytest.mark.parametrize("encoders", [("vision",), ("text",)])
    def test_one_encoder(self, model: str, folder: Path, tmp_path: Path, encoders: tuple[str, ...]) -> None:
        both = recipe(model)
        metrics = run(model, folder, tmp_path / "r", lora=LoRAConfig(encoders=encoders))
        losses = [float(row[1]) for row in history(tmp_path / "r")[1:]]
        assert len(set(losses)) > 6 and metrics["training"]["steps"] == both.steps

    def test_bf16(self, model: str, folder: Path, tmp_path: Path) -> None:
        metrics = run(model, folder, tmp_path / "r", precision="bf16", iterations=4)
        assert metrics["environment"]["precision"] == "bfloat16"
        losses = [float(row[1]) for row in history(tmp_path / "r")[1:]]
        # logits and loss are fp32 whatever the towers compute in: nothing is quantised to 8 bits
        assert any(loss != float(torch.tensor(loss).bfloat16()) for loss in losses)

    def test_custom_rates_and_crops(self, model: str, folder: Path, tmp_path: Path) -> None:
        run(model, folder, tmp_path / "r", crop_scale=(0.5, 0.9), flip=False, weight_decay=0.1, template="{} it is.")
        rates = [float(row[3]) for row in history(tmp_path / "r")[1:]]
        assert rates[0] == 1e-2 and rates == sorted(rates, reverse=True) and len(rates) == 12

    def test_a_loss_that_is_no_number_is_told(self, model: str, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="the loss is not a number"):
            run(model, folder, tmp_path / "r", lr=1e30)


class TestRealLifeFolders:
    def test_everything_at_once(self, model: str, tmp_path: Path) -> None:
        root = make_folder(tmp_path / "my pictures", ["Katze & Hund", "日本 犬", "few"], 8)
        cat = root / "Katze & Hund"
        (cat / "0.png").write_bytes((cat / "0.png").read_bytes()[:200])
        (cat / "1.png").write_text("not a picture")
        (cat / "notes.txt").write_text("a note")
        (root / "日本 犬" / "loop").symlink_to(root, target_is_directory=True)
        Image.fromarray(photo(20, 20, 5)).convert("RGBA").resize((20, 20)).save(cat / "alpha.png")
        Image.new("RGBA", (20, 20), (9, 9, 9, 100)).save(cat / "clear.png")
        Image.fromarray(photo(20, 20, 5)).convert("L").save(root / "few" / "grey é.jpg")
        Image.fromarray(photo(20, 20, 5)).convert("CMYK").save(root / "few" / "print.jpg")
        Image.new("RGB", (1, 1)).save(root / "few" / "dot.png")
        for i in range(2, 8):
            (root / "few" / f"{i}.png").unlink()
        metrics = run(model, root, tmp_path / "r", shots=6)
        notes = "\n".join(metrics["notes"])
        for line in (
            "links that lead nowhere or in a circle, left out: 1",
            "files that are not images, left out: 1",
            "classes with fewer than 6 training images: 1: few (4)",
            "images with transparency, laid on white: 1",
            "images in grey, converted to RGB: 1",
            "images in CMYK, converted to RGB: 1",
            "images smaller than 8 pixels, kept: 1",
            "images that cannot be read, left out: 2",
        ):
            assert line in notes, notes
        assert [row["class"] for row in metrics["per_class"]] == ["Katze & Hund", "few", "日本 犬"]
        assert metrics["train_images"] == 6 + 4 + 6 and metrics["test_images"] == 2 + 1 + 2
        assert "Katze &amp; Hund" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")

    def test_a_class_of_broken_images_is_an_error_that_names_a_file(self, model: str, tmp_path: Path) -> None:
        root = make_folder(tmp_path / "d", ["a", "b"], 3)
        for path in (root / "b").iterdir():
            path.write_text("broken")
        with pytest.raises(UserError, match=r"class 'b' has no readable training image: the first is b/\d\.png \("):
            run(model, root, tmp_path / "r")
        assert not (tmp_path / "r").exists()

    def test_no_test_image_can_be_read(self, model: str, tmp_path: Path) -> None:
        make_folder(tmp_path / "d" / "train", ["a", "b"], 3)
        root = make_folder(tmp_path / "d" / "test", ["a", "b"], 1)
        for path in root.rglob("*.png"):
            path.write_text("broken")
        with pytest.raises(UserError, match=r"no test image .* can be read, the first is test/a/0.png \("):
            run(model, tmp_path / "d", tmp_path / "r")


class TestResume:
    """Killed at any moment, a run ends bit for bit where an undisturbed one does."""

    def same(self, out: Path, undisturbed: Path) -> None:
        assert history(out) == history(undisturbed)
        ours, theirs = (load_file(path / "adapter.safetensors") for path in (out, undisturbed))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert (out / "predictions.csv").read_bytes() == (undisturbed / "predictions.csv").read_bytes()
        assert not (out / "checkpoint.pt").exists()

    @pytest.mark.parametrize("stops", [(1,), (5,), (2, 3, 11), (12,)])
    def test_stopped_by_sigterm_at_chosen_steps(
        self,
        model: str,
        folder: Path,
        tmp_path: Path,
        undisturbed: Path,
        monkeypatch: pytest.MonkeyPatch,
        stops: tuple[int, ...],
    ) -> None:
        train_step = Loop.train_step
        for stop in stops:

            def step(loop: Loop, stop: int = stop) -> None:
                train_step(loop)
                if loop.step == stop:
                    os.kill(os.getpid(), signal.SIGTERM)

            monkeypatch.setattr(Loop, "train_step", step)
            with pytest.raises(Interrupted, match=r"saved.*resume") as stopped:
                run(model, folder, tmp_path / "r", resume=stop != stops[0])
            assert stopped.value.exit_code == 143 and not (tmp_path / "r" / "metrics.json").exists()
        monkeypatch.setattr(Loop, "train_step", train_step)
        torch.manual_seed(99)  # whatever the next process's generator holds
        run(model, folder, tmp_path / "r", resume=True)
        self.same(tmp_path / "r", undisturbed)

    def test_died_between_checkpoints(
        self, model: str, folder: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train_step = Loop.train_step

        def step(loop: Loop) -> None:
            if loop.step == 8:
                raise KeyError("died")
            train_step(loop)

        monkeypatch.setattr(Loop, "train_step", step)
        job = Job(recipe(model), str(folder), tmp_path / "r", device="cpu", checkpoint_steps=3)
        with pytest.raises(KeyError):
            trainer.run(job, QUIET)
        monkeypatch.setattr(Loop, "train_step", train_step)
        run(model, folder, tmp_path / "r", resume=True)
        self.same(tmp_path / "r", undisturbed)

    def test_stopped_before_the_first_step(
        self, model: str, folder: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load = models.load

        def signalled(*arguments: Any, **options: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return load(*arguments, **options)

        monkeypatch.setattr(models, "load", signalled)
        with pytest.raises(Interrupted) as stopped:
            run(model, folder, tmp_path / "r")
        assert stopped.value.exit_code == 130
        monkeypatch.setattr(models, "load", load)
        run(model, folder, tmp_path / "r", resume=True)
        self.same(tmp_path / "r", undisturbed)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
    def test_a_process_killed_from_outside(
        self, model: str, folder: Path, tmp_path: Path, longer: Path, number: signal.Signals
    ) -> None:
        out = tmp_path / "r"
        mark = tmp_path / "paused"
        arguments = pausing(5, mark, *train_arguments(folder, out, model, "--iterations", "100", "--checkpoint-steps", "2"))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        with subprocess.Popen(
            arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=tmp_path
        ) as process:
            wait(lambda: mark.exists() or process.poll() is not None)
            process.send_signal(number)
            _, errors = process.communicate(timeout=HANG)
        assert (out / "checkpoint.pt").exists() and not (out / "metrics.json").exists(), errors
        if number == signal.SIGTERM:
            assert process.returncode == 143
            assert errors.count("\n") == 1 and "of 100 is saved" in errors and errors.rstrip().endswith("--resume")
        else:
            assert process.returncode == -signal.SIGKILL
        (out / f".metrics.json.{process.pid}.tmp").write_text("half a file")
        run(model, folder, out, resume=True, iterations=100, batch_size=3)
        self.same(out, longer)
        assert not list(out.glob(".*.tmp"))

    def test_other_images_are_refused(self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = make_folder(tmp_path / "d", ["a", "b"], 6)
        train_step = Loop.train_step

        def step(loop: Loop) -> None:
            train_step(loop)
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Loop, "train_step", step)
        with pytest.raises(Interrupted):
            run(model, root, tmp_path / "r")
        split = json.loads((tmp_path / "r" / "split.json").read_text())
        (root / split["train"][0]).unlink()
        with pytest.raises(UserError, match="are not those the run"):
            run(model, root, tmp_path / "r", resume=True)

    def test_a_damaged_checkpoint_is_told(self, model: str, folder: Path, tmp_path: Path, undisturbed: Path) -> None:
        out = tmp_path / "r"
        out.mkdir()
        (out / "config.json").write_text((undisturbed / "config.json").read_text())
        (out / "checkpoint.pt").write_bytes(b"half a checkpoint")
        with pytest.raises(UserError, match="not a readable checkpoint"):
            run(model, folder, out, resume=True)


class TestPieces:
    def test_data_of_a_step_depends_on_seed_and_step_alone(self) -> None:
        draws = [
            torch.rand(3, generator=generator(*key))
            for key in ((1, "crops", 5), (1, "crops", 5), (1, "crops", 6), (2, "crops", 5))
        ]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])

    def test_frozen_host_stays_in_eval_mode(self) -> None:
        from fastlora import patch
        from models import tiny

        host = tiny()
        patch(host)
        set_training_mode(host)
        modes = {"lora_A" in module._parameters: module.training for module in host.modules()}
        assert modes == {True: True, False: False}

    def test_atomic_leaves_the_old_file_when_writing_fails(self, tmp_path: Path) -> None:
        path = tmp_path / "x"
        path.write_text("old")
        with pytest.raises(RuntimeError), atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    def test_signals_come_back_as_they_were(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with Signals("x") as signals:
            assert signal.getsignal(signal.SIGTERM) == signals._handle
        assert signal.getsignal(signal.SIGTERM) == before


class TestStream:
    def test_a_streamed_run_is_the_run_in_memory(self, model: str, folder: Path, tmp_path: Path, undisturbed: Path) -> None:
        job = Job(recipe(model), str(folder), tmp_path / "r", device="cpu", images="stream")
        said = Console(record=True, file=io.StringIO(), width=200)
        trainer.run(job, said)
        assert "processes decode 6 training images anew at each step" in said.export_text()
        TestResume().same(tmp_path / "r", undisturbed)

    @pytest.mark.parametrize(("name", "value"), [("engine", "fast"), ("images", "disk")])
    def test_unknown_choices_are_told(self, model: str, folder: Path, tmp_path: Path, name: str, value: str) -> None:
        with pytest.raises(ValueError, match=f"unknown {name} '{value}': choose from auto, "):
            Job(recipe(model), str(folder), tmp_path / "r", **{name: value})

    def test_a_graph_without_a_gpu_runs_eagerly_and_says_so(
        self, model: str, folder: Path, tmp_path: Path, undisturbed: Path
    ) -> None:
        said = Console(record=True, file=io.StringIO(), width=200)
        metrics = trainer.run(Job(recipe(model), str(folder), tmp_path / "r", device="cpu", engine="graph"), said)
        assert "engine graph needs a CUDA device, the model is on cpu: going on with eager" in said.export_text()
        assert metrics["training"]["engine"] == "eager"
        TestResume().same(tmp_path / "r", undisturbed)
