"""How scripts end: the code, and one line for what the user can mend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.config import InputError, run_script

ROOT = Path(__file__).resolve().parents[2]


def ending(error: BaseException | None, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, standard error) of a script whose `main` raises `error`."""

    def main() -> None:
        if error:
            raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err


def test_scripts_end_with_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])
    assert ending(None, capsys) == (0, "")
    assert ending(InputError("the thing is wrong; do this."), capsys) == (2, "train.py: error: the thing is wrong; do this.\n")
    code, shown = ending(PermissionError(13, "Permission denied", "/their/file"), capsys)
    assert code == 2
    assert "error: /their/file: Permission denied; check the name" in shown
    code, shown = ending(OSError(28, "No space left on device", "/full/file"), capsys)
    assert (code, shown.count("\n")) == (1, 1)
    assert "/full/file" in shown
    assert ending(KeyboardInterrupt(), capsys)[0] == 130
    with pytest.raises(PermissionError):  # a bug, or the user's system: the traceback is the message
        run_script(lambda: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))


def test_scripts_name_their_rank_among_several(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert ending(InputError("wrong."), capsys)[1] == "train.py [rank 1]: error: wrong.\n"


def test_a_misspelt_flag_of_train_exits_with_2_and_one_line(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, ROOT / "train.py", "--modle", "X"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("train.py: error: unknown argument '--modle'; did you mean ")
    assert "'--model'" in line
    assert not list(tmp_path.iterdir())
