"""Prompts that the text encoder does not get whole, and classes that it cannot tell apart, are said before training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from open_clip.tokenizer import SigLipTokenizer, SimpleTokenizer
from rich.console import Console

from fastlora.fewshot import evalrun, trainer, wording
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.runfolder import RunFolder
from pictures import make_folder

LENGTH = 12
LONG = "word " * LENGTH


@pytest.fixture(scope="module")
def loaded() -> Any:
    """Nothing but a tokenizer for 12 tokens."""
    return SimpleNamespace(tokenizer=SimpleTokenizer(context_length=LENGTH))


def said(loaded: Any, classes: list[str], *templates: str) -> list[str]:
    tokens = loaded.tokenizer([template.format(name) for name in classes for template in templates])
    return wording.remarks(loaded, templates, classes, tokens.view(len(classes), len(templates), LENGTH))


@pytest.mark.parametrize(
    ("classes", "templates", "alike"),
    [
        ([LONG + "first", LONG + "second", "dog"], ["a {}."], (1, LONG + "second", LONG + "first")),
        (["Cat", "dog", "cat", "CAT"], ["a {}."], (2, "cat", "Cat")),
        (["cat", "dog", "fox"], [LONG + "{}"], (2, "dog", "cat")),
        (["crane", "dog", "crane"], ["a {}.", "the {}."], (1, "crane", "crane")),
        (["sea  horse", "sea horse"], ["a {}."], (1, "sea horse", "sea  horse")),
    ],
    ids=["long names", "case", "long template", "one name", "spaces"],
)
def test_classes_of_the_same_tokens(loaded: Any, classes: list[str], templates: list[str], alike: tuple[int, str, str]) -> None:
    note = said(loaded, classes, *templates)[0]
    assert note.startswith("classes that cannot be told apart, because their prompts are the same tokens")
    count, other, one = alike
    assert f": {count}, the first is {wording._short(other)!r}, the same as {wording._short(one)!r}: give them" in note


def test_another_template_may_tell_them_apart(loaded: Any) -> None:
    notes = said(loaded, ["cat", "dog"], LONG + "{}", "a {}.")
    assert notes == [f"prompts cut at 12 tokens, the context length: 2, the first is {wording._short(LONG + 'cat')!r}"]


@pytest.mark.parametrize(("words", "cut"), [(LENGTH - 3, 0), (LENGTH - 2, 0), (LENGTH - 1, 1), (3 * LENGTH, 1)])
def test_a_prompt_that_just_fits_is_not_cut(loaded: Any, words: int, cut: int) -> None:
    """Twelve tokens are ten words between the two that begin and end a text."""
    notes = said(loaded, ["cat", " ".join(["dog"] * words)], "{}")
    assert [note.split(",")[0] for note in notes] == ["prompts cut at 12 tokens"] * cut
    assert not cut or "context length: 1, the first is 'dog dog" in notes[0]


def test_a_tokenizer_that_pads_with_another_number() -> None:
    def tokenizer(texts: list[str], context_length: int = LENGTH) -> Any:
        tokens = SimpleTokenizer(context_length=context_length)(texts)
        return tokens.where(tokens != 0, 1)

    other = SimpleNamespace(tokenizer=tokenizer)
    assert said(other, ["a cat", LONG], "{}")[0].startswith("prompts cut at 12 tokens")
    assert said(other, ["a cat"], "{}") == []
    assert "context_length" in SigLipTokenizer.__call__.__annotations__  # as the others take it


def test_train_and_eval_say_so_for_every_test(tmp_path: Path, model: str) -> None:
    make_folder(tmp_path / "photos", ["a", "b", "c"], images=3)
    make_folder(tmp_path / "other", ["Cat", "cat"], images=1)
    names = zip("abc", (LONG * 3 + "first", LONG * 3 + "second", "c"), strict=True)
    rows = [f"photos/{folder}/{i}.png,{name}" for folder, name in names for i in range(3)]
    table, other, out = tmp_path / "list.csv", str(tmp_path / "other"), tmp_path / "run"
    table.write_text("\n".join(["path,label", *rows]) + "\n")
    console = Console(record=True, file=io.StringIO(), width=1000)
    recipe = Recipe(model=model, pretrained=None, shots=1, iterations=1)
    trainer.run(trainer.Job(recipe, str(table), out, device="cpu", brief=True, also=(other,)), console)
    before, trained, _ = console.export_text().partition("step 1 of 1")
    assert trained and "note: classes that cannot be told apart" in before and "note: prompts cut at 24 tokens" in before
    assert f"note: {other}: classes that cannot be told apart" in before
    tested = evalrun.run(RunFolder(out), str(table), Path("data"), "cpu", None, None, console)["notes"]
    for notes in (json.loads((out / "metrics.json").read_text())["notes"], tested):
        assert [note.split(",")[0] for note in notes if "tokens" in note and other not in note] == [
            "classes that cannot be told apart", "prompts cut at 24 tokens",
        ]  # fmt: skip
