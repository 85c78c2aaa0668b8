"""What the task's file calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image

from samples.spatial.questions import Question, is_correct


def pictures(document: dict[str, Any]) -> list[PIL.Image.Image]:
    """The picture that a question is about."""
    return [document["picture"].convert("RGB")]


def score(document: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Whether the answer is right, among all and among questions of its kind."""
    target = document["target"] and (*document["target"],)
    question = Question(document["task"], document["question"], document["answer"], target)
    right = float(is_correct(question, answers[0]))
    return {"accuracy": right, question.task: right}
