"""A learner whose whole state is a text, for what is said about checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill_system.learner import FileRecord, describe_file, find_alterations


class TextSaver:
    """Implements run.checkpoints.Saver.

    writing: a save is done only when it is waited for. failure: what the next finish_save raises.
    """

    def __init__(self, text: str = "", *, writing: bool = False) -> None:
        self.text = text
        self.writing = writing
        self.failure: Exception | None = None
        self._saving: tuple[Path, str] | None = None

    def start_save(self, folder: Path) -> None:
        assert self._saving is None, "a save is finished before the next begins"
        self._saving = folder, self.text

    def finish_save(self, *, wait: bool) -> dict[str, FileRecord] | None:
        assert self._saving is not None, "no save was begun"
        if self.failure is not None:
            raise self.failure
        if self.writing and not wait:
            return None
        (folder, text), self._saving = self._saving, None
        path = folder / "model" / "weights"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return {"model/weights": describe_file(path)}

    def find_alterations(self, folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
        return find_alterations(folder, files)

    def load(self, folder: Path) -> None:
        self.text = (folder / "model" / "weights").read_text()
