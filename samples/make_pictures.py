"""Draw the pictures of this repository: samples/pictures/scene-*.png, and the default set of ivc-calibrate.

python -m samples.make_pictures
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from samples.spatial.questions import TASKS, Asker
from samples.spatial.scenes import draw_scene

ROOT = Path(__file__).parent.parent
STREAM = 3  # training and held-out questions draw from others
SCENES = ((11, 448, 336), (23, 336, 420), (5, 420, 308))
EXAMPLES = 24


def main() -> None:
    """Draw them all."""
    for number, (seed, width, height) in enumerate(SCENES, 1):
        scene = draw_scene(np.random.default_rng([STREAM, seed]), width, height)
        scene.picture.save(ROOT / "samples" / "pictures" / f"scene-{number}.png", optimize=True)
    folder = ROOT / "calibration"
    folder.mkdir(exist_ok=True)
    prompts: list[dict[str, str]] = []
    trial = 0
    while len(prompts) < EXAMPLES:
        generator = np.random.default_rng([STREAM, 1, trial])
        trial += 1
        scene = draw_scene(generator)
        question = list(TASKS.values())[len(prompts) % len(TASKS)](Asker(scene, generator))
        if question is not None:
            name = f"{len(prompts) + 1:02}.jpg"
            scene.picture.save(folder / name, quality=88)
            prompts.append({"picture": name, "prompt": question.text})
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
