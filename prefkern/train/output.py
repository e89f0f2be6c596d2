"""The output folder: who may write there, and what may be removed or replaced.

A run marks its folder with prefkern_run.json: the run's own id and the names it made there. Nothing
else is ever deleted or replaced, unless --overwrite-output-dir says so: results of an earlier run
without checkpoints are moved aside, with checkpoints they are a reason to refuse. While the run
lives it holds a lock on the mark. What is half written has a name with the run's id in it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

MARK = "prefkern_run.json"
LOG, TRAINER_STATE = "log_history.jsonl", "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
OWN = re.compile(r"(checkpoint|round)-\d+|(earlier|\.prefkern)-.*")
# Names that a run may write beside its checkpoints.
NAMES = frozenset(
    {
        LOG, TRAINER_STATE, "README.md", "config.json", "generation_config.json",
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "chat_template.jinja", "processor_config.json", "preprocessor_config.json",
        "video_preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer.model",
        "curves.png", "loss.png", "margins.png", "accuracies.png", "kl.png", "logps.png",
        "ranking.png",
    }
)  # fmt: skip
# A folder is a model from the moment it has one of these: they are written last.
_LAST = ("config.json", "adapter_config.json")


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What the mark of a folder says; None where there is none that can be read."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("run"), str) else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders named checkpoint-N, oldest first; whole ones, for only such get that name."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _CHECKPOINT.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def check_writable(folder: Path, option: str = "output_dir") -> None:
    """Refuses a folder that can be seen beforehand not to take a file.

    Raises:
        ValueError: it is a file, lies below one, or may not be written.
    """
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{option} {folder}: {there} is not a folder; choose another.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {folder}: {there} cannot be written to; choose another.")


class Output:
    """The output folder of one run in the process that writes it.

    Args:
        folder: Made when missing.
        run: Id of the run that is continued; None: of a new one.
        overwrite: Remove what an earlier run made there.
        continues: Without `run`: the run that the folder is marked with goes on from its start.
    """

    def __init__(
        self,
        folder: Path,
        run: str | None = None,
        *,
        overwrite: bool = False,
        continues: bool = False,
    ) -> None:
        self.folder = folder
        self.note = ""  # what to say of an earlier run
        with writing(folder / MARK):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / MARK, os.O_RDWR | os.O_CREAT, 0o666)
            self._file: TextIO = os.fdopen(handle, "r+", encoding="utf-8")
        try:
            _lock(self._file, folder, fcntl.LOCK_EX)
            mark = read_mark(folder) or {}
            self.made = set(map(str, mark.get("made", ())))
            if overwrite:
                self._remove(mark)
                mark = {}
            elif run is None and not continues and mark:
                self._move_aside(mark)
                mark = {}
            self.run = run or mark.get("run") or secrets.token_hex(6)
            self._write(finished=False)
            self.clear_partial()
        except BaseException:
            self.close()
            raise

    def _write(self, *, finished: bool) -> None:
        text = json.dumps({"run": self.run, "finished": finished, "made": sorted(self.made)})
        with writing(self.folder / MARK):
            # in place, so that the lock stays on the file; what is written only grows
            os.pwrite(self._file.fileno(), text.encode(), 0)
            os.ftruncate(self._file.fileno(), len(text.encode()))

    def close(self) -> None:
        """Gives up the lock."""
        self._file.close()

    def will_make(self, names: Iterable[str]) -> None:
        """Notes names in the folder as this run's, before they are written."""
        if not (wanted := set(names)) <= self.made:
            self.made |= wanted
            self._write(finished=False)

    def finish(self) -> None:
        self._write(finished=True)

    def partial(self, name: str) -> Path:
        """An empty folder in which `name` is built."""
        path = self.folder / f".prefkern-{self.run}-{name}"
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.mkdir()
        return path

    def spare(self, checkpoint: Path) -> None:
        """Moves what others put into a checkpoint of this trainer to where it stays."""
        mark = read_mark(checkpoint) or {}
        own = {MARK, *mark.get("files", ())}
        inside = [p for p in checkpoint.rglob("*") if p.is_symlink() or not p.is_dir()]
        for path in inside:
            if (name := path.relative_to(checkpoint)).as_posix() in own:
                continue
            target = self.folder / f"earlier-{mark.get('run')}" / checkpoint.name / name
            while os.path.lexists(target):
                target = target.with_name(f"{target.name}~")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, target)
            print(f"{path} is no file of this trainer's and is now {target}.", file=sys.stderr)

    def aside(self, path: Path) -> None:
        """Removes a folder of this run; a kill never leaves it half there under its name."""
        self.spare(path)
        stale = self.folder / f".prefkern-{self.run}-old-{path.name}"
        if stale.is_dir():
            shutil.rmtree(stale)
        os.rename(path, stale)
        shutil.rmtree(stale)

    def clear_partial(self) -> None:
        """Removes what a killed start of this run left half written or half deleted."""
        for path in self.folder.glob(f".prefkern-{self.run}-*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)

    def checkpoints(self) -> list[Path]:
        """Those of this run, oldest first."""
        return [p for p in list_checkpoints(self.folder) if run_of(p) == self.run]

    def install(self, building: Path) -> None:
        """Moves the files of `building` into the folder. The folder is no model before the last of
        them is there.

        Raises:
            ValueError: one of the names is not this run's to replace; all stays in `building`.
        """
        names = {path.name for path in building.iterdir()}
        taken = sorted(n for n in names - self.made if os.path.lexists(self.folder / n))
        if taken:
            kept = self.folder / f"model-{self.run}"
            os.rename(building, kept)
            raise ValueError(
                f"{self.folder} holds {', '.join(taken)}, which this run did not make and does not "
                f"replace; the result is whole in {kept}."
            )
        self.will_make(names)
        last = [name for name in _LAST if name in names]
        for name in _LAST:
            if name in self.made:
                (self.folder / name).unlink(missing_ok=True)
        for name in [*sorted(names - set(last)), *last]:
            target = self.folder / name
            if target.is_dir():  # of an earlier end of this run: a second adapter's folder
                shutil.rmtree(target)
            os.replace(building / name, target)
        building.rmdir()

    def _move_aside(self, mark: dict[str, Any]) -> None:
        """Keeps the results of an earlier run in a folder of their own."""
        names = sorted(n for n in self.made if os.path.lexists(self.folder / Path(n).name))
        self.made = set()
        if names:
            target = self.folder / f"earlier-{mark['run']}"
            target.mkdir()
            for name in names:
                os.rename(self.folder / Path(name).name, target / Path(name).name)
            self.note = (
                f"the results of an earlier run in {self.folder} were moved to {target}, nothing "
                "was overwritten (--overwrite-output-dir removes them)."
            )

    def _remove(self, mark: dict[str, Any]) -> None:
        """What --overwrite-output-dir removes: what a run of this trainer made."""
        _refuse_foreign(self.folder)
        for path in reversed(list_checkpoints(self.folder)):
            self.spare(path)
            shutil.rmtree(path)
        for name in self.made:
            path = self.folder / Path(name).name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.run = str(mark.get("run", "none"))
        self.clear_partial()
        # what no mark lists may be replaced from here on, and is not removed
        self.made = {name for name in NAMES if (self.folder / name).is_file()}


def check_free(
    folder: Path,
    *,
    overwrite: bool = False,
    resume: Path | None = None,
    auto: bool = False,
    names: Iterable[str] = NAMES,
    patterns: Sequence[str] = (),
) -> None:
    """Refuses a folder that a run may not write, before anything is loaded.

    Args:
        folder: The output folder.
        overwrite: What an earlier run made may be removed.
        resume: The checkpoint that the run continues from.
        auto: The run continues whatever the folder holds of it.
        names, patterns: What the run would write there.

    Raises:
        ValueError: with what to do.
    """
    check_writable(folder)
    if not folder.is_dir():
        return
    if (folder / MARK).is_file():
        with (folder / MARK).open(encoding="utf-8") as file:
            _lock(file, folder, fcntl.LOCK_SH)
    mark = read_mark(folder)
    if resume is not None:
        _check_continued(folder, mark, resume, names)
        return
    if overwrite:
        _refuse_foreign(folder)
        return
    if auto and mark is not None and not mark.get("finished"):
        return
    found = [p.name for p in list_checkpoints(folder)]
    found += [p.name for pattern in patterns for p in sorted(folder.glob(pattern))]
    found += sorted(name for name in names if os.path.lexists(folder / name))
    if mark is not None and not auto:  # those that a run made are going to be moved aside
        found = [name for name in found if name not in mark.get("made", ())]
    if found:
        shown = ", ".join(found[:4]) + (" ..." if len(found) > 4 else "")
        kind = found[0].partition("-")[0]
        what = {"checkpoint": "checkpoints", "round": "rounds"}.get(kind, "results")
        more = "" if auto else "--resume-from-checkpoint auto to continue it, "
        raise ValueError(
            f"{folder} holds {what} of an earlier run, or files of those names ({shown}); pass "
            f"{more}--overwrite-output-dir to remove them and start afresh, or another "
            "--output-dir."
        )


def _check_continued(
    folder: Path, mark: dict[str, Any] | None, resume: Path, names: Iterable[str]
) -> None:
    """Refuses to continue a checkpoint in a folder of another run."""
    own = resume.resolve().parent == folder.resolve()
    if mark is not None and mark["run"] != run_of(resume):
        other = bool(mark.get("made")) or bool(list_checkpoints(folder))
    else:
        other = mark is None and not own and any(os.path.lexists(folder / n) for n in names)
    if other:
        raise ValueError(
            f"{folder} holds files of another run than {resume}; continue into the folder of that "
            "run, or into a new --output-dir."
        )


def _refuse_foreign(folder: Path) -> None:
    """A folder named checkpoint-N that is none of this trainer's is nobody's to remove here."""
    for path in list_checkpoints(folder):
        if path.is_symlink() or run_of(path) is None:
            raise ValueError(
                f"{path} was not written by this trainer and is not removed; move it away, or "
                "choose another --output-dir."
            )


def run_of(checkpoint: Path | None) -> str | None:
    """The id of the run that wrote a checkpoint; None: not one of this trainer's, or no
    checkpoint."""
    mark = None if checkpoint is None else read_mark(checkpoint)
    return None if mark is None else str(mark["run"])


def _lock(file: TextIO, folder: Path, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is writing to {folder}; wait for its end, or choose another --output-dir."
        ) from None
    except OSError:  # a file system without locks
        return


@contextmanager
def writing(what: Path, kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Names the file, the reason and what is left when something cannot be written.

    Raises:
        OSError: in one line; `kept` says what is whole.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        left = "" if kept is None else f"; {kept()}"
        raise OSError(f"{what} could not be written: {reason}{left}.") from error
