"""Write held-out questions as a file of the task: python -m samples.lmms_eval.questions FILE --each COUNT."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from datasets import Dataset, Image

from samples.spatial.held_out import held_out


def write_questions(path: Path, each: int) -> None:
    """A Parquet file of `each` questions of every kind about as many pictures."""
    rows = []
    for example in held_out("test", each):
        data, question = io.BytesIO(), example.question
        example.picture.save(data, "PNG")
        rows.append(
            {
                "picture": {"bytes": data.getvalue(), "path": None},
                "task": question.task,
                "question": question.text,
                "answer": question.answer,
                "target": question.target and [*question.target],
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).cast_column("picture", Image()).to_parquet(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="Parquet file to write")
    parser.add_argument("--each", type=int, default=50, help="questions of each kind (default: 50)")
    arguments = parser.parse_args()
    write_questions(arguments.path, arguments.each)
