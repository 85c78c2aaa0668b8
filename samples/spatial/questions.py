"""Questions about a scene, with their answers: six kinds of tasks."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from samples.spatial.scenes import PLATE, Item, Scene

ATTRIBUTES = ("size", "texture", "color", "shape")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
CLEARANCE = 0.06
"""Centres must differ by this fraction of the picture's side, or a relation is neither true nor false."""
BOX_SCALE = 1000
"""Coordinates are thousandths of the picture's sides, as Qwen2-VL writes them."""
PLURALS = {"cross": "crosses"}


@dataclass(frozen=True)
class Question:
    """One question; `target` is the object's box (x0, y0, x1, y1) in thousandths where the answer is a place."""

    task: str
    text: str
    answer: str
    target: tuple[int, int, int, int] | None = None


def thousandths(scene: Scene, item: Item) -> tuple[int, int, int, int]:
    """The item's box in thousandths of the picture's sides."""
    width, height = scene.picture.size
    x0, y0, x1, y1 = item.box
    scaled = (x0 / width, y0 / height, x1 / width, y1 / height)
    a, b, c, d = (min(round(part * BOX_SCALE), BOX_SCALE - 1) for part in scaled)
    return a, b, c, d


def words_of(item: Item, attributes: Sequence[str]) -> str:
    """The item in words, by these attributes only; `object` stands for an unnamed shape."""
    words = [getattr(item, name) for name in ATTRIBUTES[:3] if name in attributes]
    return " ".join(word for word in [*words, item.shape if "shape" in attributes else "object"] if word)


def key_of(item: Item, attributes: Sequence[str]) -> tuple[object, ...]:
    """What these attributes say of an item, and of every other that the same words fit."""
    return (item.shape == PLATE, *[(name, getattr(item, name)) for name in attributes])


@functools.cache
def shape_subsets() -> list[tuple[str, ...]]:
    """All sets of attributes, the shortest first."""
    return [chosen for n in range(1, 5) for chosen in itertools.combinations(ATTRIBUTES, n)]


def subsets(item: Item) -> list[tuple[str, ...]]:
    """Sets of attributes that can describe an item, the shortest first."""
    if item.shape == PLATE:
        return [("shape",), ("color", "shape")]
    return shape_subsets()


class Asker:
    """Asks about one scene."""

    def __init__(self, scene: Scene, generator: np.random.Generator) -> None:
        self.scene, self.generator = scene, generator
        self.fitting = Counter(key_of(item, chosen) for item in scene.items for chosen in subsets(item))
        self.unique = [
            (item, found)
            for item in scene.items
            if (found := [chosen for chosen in subsets(item) if self.fitting[key_of(item, chosen)] == 1])
        ]

    def pick(self, options: Sequence[object]) -> int:
        """Index of a random option."""
        return int(self.generator.integers(len(options)))

    def described(self, without: str = "") -> tuple[Item, tuple[str, ...]] | None:
        """A random item and a description of it alone that leaves out one attribute."""
        options = [
            (item, chosen)
            for item, found in self.unique
            if not (without and item.shape == PLATE)
            for chosen in found
            if without not in chosen
        ]
        return options[self.pick(options)] if options else None

    def holds(self, item: Item, relation: str, other: Item) -> bool | None:
        """Whether a relation holds between centres; None where it is too close to call."""
        axis, sign = RELATIONS[relation]
        gap = (item.center[axis] - other.center[axis]) * sign / self.scene.picture.size[axis]
        return None if abs(gap) < CLEARANCE else gap > 0

    def attribute(self) -> Question | None:
        """What color, shape, texture or size an object has."""
        name = ("color", "shape", "texture", "size")[int(self.generator.choice(4, p=(0.35, 0.3, 0.2, 0.15)))]
        if (found := self.described(without=name)) is None:
            return None
        item, chosen = found
        what = words_of(item, chosen)
        text = {
            "color": (f"What color is the {what}?", f"Name the color of the {what}."),
            "shape": (f"What shape is the {what}?", f"What is the {what}?"),
            "texture": (f"What texture does the {what} have?", f"Name the texture of the {what}."),
            "size": (f"Is the {what} small or large?", f"What size is the {what}?"),
        }[name][self.pick((0, 1))]
        return Question("attribute", text, getattr(item, name))

    def relation(self) -> Question | None:
        """Whether one object lies left of, right of, above or below another."""
        wanted = bool(self.generator.integers(2))
        for _ in range(8):
            first, second = self.described(), self.described()
            if first is None or second is None or first[0] is second[0]:
                continue
            relation = list(RELATIONS)[self.pick(list(RELATIONS))]
            if self.holds(first[0], relation, second[0]) is wanted:
                text = f"Is the {words_of(*first)} {relation} the {words_of(*second)}?"
                return Question("relation", text, "yes" if wanted else "no")
        return None

    def counting(self) -> Question | None:
        """How many objects fit a description, numbers about equally often."""
        shapes = [item for item in self.scene.items if item.shape != PLATE]
        if not shapes:
            return None
        by_count: dict[int, list[str]] = {}
        for item in shapes:
            for chosen in subsets(item)[:10]:  # up to two words
                by_count.setdefault(self.fitting[key_of(item, chosen)], []).append(words_of(item, chosen))
        absent = f"{shapes[self.pick(shapes)].color} {shapes[self.pick(shapes)].shape}"
        if not any(absent == f"{item.color} {item.shape}" for item in shapes):
            by_count.setdefault(0, []).append(absent)
        count = sorted(by_count)[self.pick(list(by_count))]
        what = plural(by_count[count][self.pick(by_count[count])])
        text = (f"How many {what} are there?", f"Count the {what}.")[self.pick((0, 1))]
        return Question("counting", text, str(count))

    def grounding(self) -> Question | None:
        """The box of a described object."""
        if (found := self.described()) is None:
            return None
        item, chosen = found
        x0, y0, x1, y1 = box = thousandths(self.scene, item)
        what = words_of(item, chosen)
        text = (f"Find the {what}.", f"Where is the {what}?", f"Give the box of the {what}.")[self.pick((0, 1, 2))]
        return Question("grounding", text, f"<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>", box)

    def pointing(self) -> Question | None:
        """The middle of an object described by its place beside another."""
        for _ in range(8):
            anchor = self.described()
            if anchor is None:
                return None
            item = self.scene.items[self.pick(self.scene.items)]
            chosen = subsets(item)[self.pick(subsets(item))]
            relation = list(RELATIONS)[self.pick(list(RELATIONS))]
            if item is anchor[0]:
                continue
            fits = [other for other in self.scene.items if key_of(other, chosen) == key_of(item, chosen)]
            held = [self.holds(other, relation, anchor[0]) for other in fits if other is not anchor[0]]
            if held.count(True) == 1 and None not in held and self.holds(item, relation, anchor[0]):
                x0, y0, x1, y1 = box = thousandths(self.scene, item)
                answer = f"<|box_start|>({(x0 + x1) // 2},{(y0 + y1) // 2})<|box_end|>"
                text = f"Point to the {words_of(item, chosen)} {relation} the {words_of(*anchor)}."
                return Question("pointing", text, answer, box)
        return None

    def reading(self) -> Question | None:
        """The code on a plate."""
        plates = [(item, found) for item, found in self.unique if item.shape == PLATE]
        if not plates:
            return None
        item, found = plates[self.pick(plates)]
        what = words_of(item, found[self.pick(found)])
        text = (f"What does the {what} say?", f"Read the {what}.")[self.pick((0, 1))]
        return Question("reading", text, item.code)


TASKS: dict[str, Callable[[Asker], Question | None]] = {
    "attribute": Asker.attribute,
    "relation": Asker.relation,
    "counting": Asker.counting,
    "grounding": Asker.grounding,
    "pointing": Asker.pointing,
    "reading": Asker.reading,
}


def plural(words: str) -> str:
    """The words for several such objects."""
    *front, last = words.split(" ")
    return " ".join([*front, PLURALS.get(last, last + "s")])


def ask(scene: Scene, task: str, generator: np.random.Generator, asker: Asker | None = None) -> Question | None:
    """A random question of one task, or None where the scene allows none."""
    return TASKS[task](asker or Asker(scene, generator))


def is_correct(question: Question, answer: str) -> bool:
    """Whether an answer (special tokens left out) is right.

    A box counts if its intersection over union with the object's is at least 0.5, a point if it lies in the object's
    box, everything else if it is the same text.
    """
    if question.target is None:
        return answer.strip() == question.answer
    try:
        numbers = [int(part) for part in answer.replace("(", "").replace(")", "").split(",")]
    except ValueError:
        return False
    x0, y0, x1, y1 = question.target
    if question.task == "pointing":
        return len(numbers) == 2 and x0 <= numbers[0] <= x1 and y0 <= numbers[1] <= y1
    if len(numbers) != 4:
        return False
    a, b, c, d = numbers
    overlap = max(0, min(x1, c) - max(x0, a)) * max(0, min(y1, d) - max(y0, b))
    union = (x1 - x0) * (y1 - y0) + max(0, c - a) * max(0, d - b) - overlap
    return overlap >= 0.5 * union > 0
