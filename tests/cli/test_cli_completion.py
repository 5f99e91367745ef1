"""Completion as a shell asks for it: the script that ``gradsharding completion`` prints, run by a real bash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradsharding.cli.main import COMMANDS, main


def completed(words: str, cwd: Path) -> list[str]:
    """Let bash complete the last of these words by our script."""
    script = (
        'eval "$(gradsharding completion bash)"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_gradsharding_completion gradsharding; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", script, "bash", *words.split(" ")]
    run = subprocess.run(command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True, timeout=120)
    return run.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("gradsharding ", [name for rows in COMMANDS.values() for name in rows]),
        ("gradsharding de", ["demo", "deploy", "destroy"]),
        ("gradsharding aggregate --topology l", ["lambda-fl", "lifl"]),
        ("gradsharding aggregate --executor ", ["processes", "threads", "inline", "lambda:"]),
        ("gradsharding aggregate --nonfinite p", ["propagate"]),
        ("gradsharding plan --d", ["--deadline", "--detail"]),
        ("gradsharding completion ", ["bash", "zsh", "fish"]),
        ("gradsharding nonsense --x", []),
    ],
)
def test_bash_completes(tmp_path: Path, words: str, expected: list[str]) -> None:
    """Commands, options and the values of choices are completed, also of commands that are imported only when they are used."""
    assert sorted(expected) == sorted(completed(words, tmp_path))


@pytest.mark.parametrize("words", ["gradsharding aggregate a", "gradsharding aggregate -o a", "gradsharding plan --from a"])
def test_files_are_left_to_the_shell(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a file is named, the shell is asked to complete it."""
    for name, value in {"_GRADSHARDING_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="0"):
        main([])

    assert "file,a\n" == capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_asks_this_program(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each shell's script sets the variable by which click completes."""
    assert 0 == main(["completion", shell])

    assert f"_GRADSHARDING_COMPLETE={shell}_complete" in capsys.readouterr().out
