"""The report's gallery of the test images whose neighbours, by the student, differ most from the teacher's."""

from collections.abc import Sequence
from dataclasses import dataclass

from bingo.report.bags import Member, same_class
from bingo.report.inputs import Artefacts
from bingo.report.pictures import Thumbnail, thumbnail
from bingo.runtime.errors import UserError


@dataclass(frozen=True)
class Failure:
    """A test image, with its nearest train images by the teacher and by the student; their cosines to it are the teacher's."""

    image: Thumbnail
    teacher: list[Member]
    student: list[Member]

    @property
    def common_rows(self) -> set[int]:
        """The rows that both find."""
        return {member.thumbnail.row for member in self.teacher} & {member.thumbnail.row for member in self.student}


def failures(a: Artefacts) -> list[Failure]:
    """The images of reports/failures/student.json, those with the fewest common neighbours first; empty without images or teacher.

    Raises UserError if the file holds something else.
    """
    if a.images is None:
        return []
    try:
        return [
            Failure(
                thumbnail(a.images, a.listing, found["row"]),
                _neighbours(a, found["row"], found["teacher"]),
                _neighbours(a, found["row"], found["network"]),
            )
            for found in a.failures.get("images", [])
        ]
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError("reports/failures/student.json: is damaged, or of another listing; delete it and run: dvc repro") from None


def _neighbours(a: Artefacts, row: int, found: Sequence[Sequence[float]]) -> list[Member]:
    assert a.images is not None
    return [Member(thumbnail(a.images, a.listing, int(near)), cosine, same_class(a.listing, row, int(near))) for near, cosine in found]
