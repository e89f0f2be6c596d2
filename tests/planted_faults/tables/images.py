"""Faults of the trainer's way with pictures: (name, file, old text, new text, tests ...)."""

from __future__ import annotations

from rows import TESTS, TRAIN, Row, of

IMAGES = f"{TESTS}recipes/test_images.py"
MUTANTS: list[Row] = [
    *of(
        f"{TRAIN}data/vision.py",
        IMAGES,
        ("own.get(place, shared)", "shared"),
        ("images = [[picture.open() for picture in own] for own in pictures]",
         "images = [[pictures[0][0].open() for picture in own] for own in pictures]"),
        ("if count != len(pictures):", "if False:"),
        ("if self._places(response) or self._stray(response):", "if False:"),
        ("if row.prompts is not None or own:", "if row.prompts is not None:"),
    ),
    *of(
        f"{TRAIN}data/pictures.py",
        IMAGES,
        ("if _digest(data) != self.digest:", "if False:"),
        ("path = folder / name", "path = Path(name)"),
    ),
    *of(f"{TRAIN}data/load.py", IMAGES, ("digest.update(picture.digest)", "pass")),
    *of(f"{TRAIN}data/encode.py", IMAGES, ("if same and np.array_equal", "if False and np.array_equal")),
    *of(f"{TRAIN}forward.py", IMAGES, ("given |= batch.inputs", "given |= {}")),
    *of(f"{TRAIN}pairing.py", IMAGES, ("    if changed:", "    if False:")),
    *of(f"{TRAIN}recipes/images.py", IMAGES, ("def save_final(", "def save_last(")),
]  # fmt: skip
