"""One owner of a folder: a second one is refused by the first one's name, and whatever ends the first one frees the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock
from rich.console import Console
from torch.multiprocessing import start_processes

from fastlora.fewshot import evalrun, trainer
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.lock import Busy, check_free, owned
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.runfolder import RunFolder
from fastlora.fewshot.trainer import Job
from owning import elsewhere
from pictures import one_line, pausing, train_arguments
from waiting import HANG, wait


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def refused(folder: Path) -> str:
    """What somebody is told who wants to own `folder`; empty if it is free."""
    try:
        with owned(folder):
            return ""
    except Busy as error:
        return str(error)


def come_and_go(_: int, folder: Path) -> None:
    """One of several processes: own a folder that is not there, again and again, and be alone in it."""
    for _ in range(40):
        with contextlib.suppress(Busy), owned(folder / "a" / "b"):
            (folder / "inside").mkdir()
            (folder / "inside").rmdir()


class TestOwner:
    def test_nothing_is_left(self, tmp_path: Path) -> None:
        with owned(tmp_path / "a" / "b"):
            assert os.listdir(tmp_path / "a" / "b") == [".lock"]
        assert not list(tmp_path.iterdir())
        with contextlib.suppress(KeyError), owned(tmp_path / "a" / "b"):
            raise KeyError
        assert not list(tmp_path.iterdir())
        with owned(tmp_path / "a" / "b"):
            (tmp_path / "a" / "result").touch()
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a", "a/result"]
        (tmp_path / "mine").mkdir()
        with owned(tmp_path / "mine"):
            pass
        assert (tmp_path / "mine").is_dir()

    def test_by_another_name_it_is_the_same_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "link").symlink_to("run")
        monkeypatch.chdir(tmp_path)
        with elsewhere(tmp_path / "run") as process:
            for name in ("run", "link", "./run/../run", f"{tmp_path}/run/"):
                assert f"process {process.pid} on {os.uname().nodename} since 2" in refused(Path(name)), name
        assert not refused(Path("link"))

    def test_a_thread_of_this_process_is_refused_too(self, tmp_path: Path) -> None:
        said: list[str] = []
        with owned(tmp_path):
            with owned(tmp_path):  # what the owner calls owns it as well
                check_free(tmp_path)
            thread = threading.Thread(target=lambda: said.append(refused(tmp_path)))
            thread.start()
            thread.join()
        assert len(said) == 1 and f"process {os.getpid()} " in said[0]
        assert not refused(tmp_path)

    def test_one_of_many_gets_it_each_time(self, tmp_path: Path) -> None:
        """The folder comes and goes with its owners; never do two own it."""
        start_processes(come_and_go, (tmp_path,), nprocs=3, start_method="fork")
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
    def test_the_dead_own_nothing(self, tmp_path: Path, number: signal.Signals) -> None:
        with elsewhere(tmp_path) as process:
            process.send_signal(number)
            process.wait(HANG)
        assert (tmp_path / ".lock").exists()
        check_free(tmp_path)
        assert not refused(tmp_path) and not (tmp_path / ".lock").exists()

    def test_the_owner_of_a_folder_that_was_removed_leaves_its_new_owner_alone(self, tmp_path: Path) -> None:
        with contextlib.ExitStack() as new:
            with owned(tmp_path / "run"):
                shutil.rmtree(tmp_path / "run")
                new.enter_context(elsewhere(tmp_path / "run"))
            assert (tmp_path / "run" / ".lock").exists() and refused(tmp_path / "run")

    def test_what_cannot_be_locked_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "nowhere").symlink_to("gone")
        (tmp_path / "odd" / ".lock").mkdir(parents=True)
        for name, says in (
            ("file", "is a file, or a link that leads nowhere"),
            ("file/below", "is a file, or a link that leads nowhere"),
            ("nowhere", "is a file, or a link that leads nowhere"),
            ("odd", "cannot be locked: "),
        ):
            with pytest.raises(UserError, match=says), owned(tmp_path / name):
                pass

        def forbidden(*_: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        (tmp_path / "others").mkdir()
        (tmp_path / "others" / ".lock").touch()
        monkeypatch.setattr(FileLock, "acquire", forbidden)
        with pytest.raises(UserError, match=r"no permission to write to .*others/\.lock"), owned(tmp_path / "others"):
            pass
        check_free(tmp_path / "others")  # a reader cannot lock it, and need not


KILLED_WITHOUT_LOCKS = """
import errno, fcntl, os
from pathlib import Path
from fastlora.fewshot.lock import owned
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
with owned(Path("run")):
    os._exit(1)
"""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    with owned(tmp_path / "run"):
        thread = threading.Thread(target=lambda: said.append(refused(tmp_path / "run")))
        thread.start()
        thread.join()
        check_free(tmp_path / "run")
    assert f"process {os.getpid()} " in said[0] and f"remove {tmp_path}/run/.lock-soft" in said[0]
    assert not list(tmp_path.iterdir())
    subprocess.run([sys.executable, "-c", KILLED_WITHOUT_LOCKS], cwd=tmp_path, check=False)
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", ".lock-soft"]
    assert not refused(tmp_path / "run")  # that process is dead


QUIET = Console(quiet=True)


def small(model: str, folder: Path, out: Path, **more: Any) -> Job:
    recipe = Recipe(model=model, pretrained=None, shots=1, iterations=2, batch_size=2)
    return Job(recipe, str(folder), out, device="cpu", **more)


@pytest.fixture(scope="module")
def finished(model: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    trainer.run(small(model, folder, out), QUIET)
    return out


class Running(NamedTuple):
    """A training in another process, held still in the middle."""

    out: Path
    process: subprocess.Popen[str]


@pytest.fixture(scope="class")
def running(model: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    base = tmp_path_factory.mktemp("running")
    out, mark, pipe = base / "run", base / "paused", subprocess.PIPE
    arguments = pausing(3, mark, *train_arguments(folder, out, model, "--checkpoint-steps", "1"))
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=base) as process:
        wait(lambda: mark.exists() or process.poll() is not None)
        yield Running(out, process)
        _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0 and not (out / ".lock").exists(), errors


class TestARunAtWork:
    """Whatever wants to write to it, or to read what is not there yet, is refused by name and touches nothing."""

    @pytest.mark.parametrize("what", ["same", "another seed", "resume", "link", "relative", "eval into", "eval of", "merge"])
    def test_is_left_alone(
        self,
        fastlora: Any,
        running: Running,
        finished: Path,
        folder: Path,
        model: str,
        tmp_path: Path,
        monkeypatch: Any,
        what: str,
    ) -> None:
        out = str(running.out)
        (tmp_path / "link").symlink_to(out)
        monkeypatch.chdir(running.out.parent)
        arguments = {
            "same": train_arguments(folder, running.out, model),
            "another seed": train_arguments(folder, running.out, model, "--seed", "5"),
            "resume": train_arguments(folder, running.out, model, "--checkpoint-steps", "1", "--resume"),
            "link": train_arguments(folder, tmp_path / "link", model, "--resume"),
            "relative": train_arguments(folder, Path("run"), model, "--resume"),
            "eval into": ["eval", str(finished), str(folder), "--out", out],
            "eval of": ["eval", out, str(folder)],
            "merge": ["merge", out, "--out", str(tmp_path / "m.safetensors")],
        }
        before = contents(running.out)
        one_line(fastlora(*arguments[what]), f"process {running.process.pid} on {os.uname().nodename} since ")
        assert contents(running.out) == before and not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_before_it_wrote_anything_is_begun_anew(
    model: str, folder: Path, tmp_path: Path, resume: bool
) -> None:
    with elsewhere(tmp_path / "run") as process:
        process.kill()
    assert os.listdir(tmp_path / "run") == [".lock"]
    trainer.run(small(model, folder, tmp_path / "run", resume=resume), QUIET)
    assert not (tmp_path / "run" / ".lock").exists() and (tmp_path / "run" / "metrics.json").exists()


def test_what_was_written_between_the_look_and_the_lock_is_seen(
    model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run that begins and ends while this one starts."""
    choose = trainer.choose_device

    def meanwhile(name: str) -> Any:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("{}")
        return choose(name)

    monkeypatch.setattr(trainer, "choose_device", meanwhile)
    with pytest.raises(UserError, match="holds another run"):
        trainer.run(small(model, folder, tmp_path / "run"), QUIET)
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_a_finished_run_is_read_without_a_lock(
    finished: Path, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a folder that may only be read."""
    want = json.loads((finished / "metrics.json").read_text())

    def written(*_: Any, **__: Any) -> Any:
        raise AssertionError("a reader wrote")

    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "mkdir", written)
    monkeypatch.setattr(FileLock, "acquire", written)
    assert trainer.run(small(model, folder, finished, resume=True), QUIET) == want
    assert evalrun.run(RunFolder(finished), str(folder), Path("data"), "cpu", None, None, QUIET)["accuracy"] == want["accuracy"]


class TestFilesOfTheUsers:
    NAMES = ("split.json", "checkpoint.pt", "adapter.safetensors", "metrics.json", "history.csv", "predictions.csv",
             "report.html", "log/notes", "config.json")  # fmt: skip

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("resume", [False, True])
    def test_are_not_overwritten(self, model: str, folder: Path, tmp_path: Path, name: str, resume: bool) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        before = contents(tmp_path)
        says = rf"holds another (run|result or files of yours \({name.partition('/')[0]}\))|is not the config"
        with pytest.raises(UserError, match=says):
            trainer.run(small(model, folder, tmp_path, resume=resume), QUIET)
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("name", NAMES)
    def test_are_not_overwritten_by_a_test(
        self, fastlora: Any, finished: Path, folder: Path, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        before = contents(tmp_path)
        one_line(fastlora("eval", str(finished), str(folder), "--out", str(tmp_path)), name.partition("/")[0])
        assert contents(tmp_path) == before

    def test_lie_beside_a_run_untouched(self, model: str, folder: Path, tmp_path: Path) -> None:
        names = (".notes.tmp", ".notes.txt.12.tmp", ".metrics.json.tmp", ".metrics.json.old.tmp", "notes.txt", "error.txt")
        for name in names:
            (tmp_path / name).write_text("mine")
        (tmp_path / ".metrics.json.12.tmp").write_text("half of a run's")
        trainer.run(small(model, folder, tmp_path), QUIET)
        assert [name for name in names if (tmp_path / name).read_text() != "mine"] == []
        assert not (tmp_path / ".metrics.json.12.tmp").exists()


def test_a_failed_start_leaves_nothing(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        trainer.run(small(model, tmp_path / "no", tmp_path / "some" / "where" / "run"), QUIET)
    assert not list(tmp_path.iterdir())
