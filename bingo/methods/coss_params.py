"""The section of params.yaml of CoSS."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from bingo.params import MethodSection, Temperature, Width


class Params(MethodSection):
    """CoSS (Singh and Wang 2024): the student's outputs are like the teacher's image by image and feature by feature.

    An anchor brings `companions` of its bag's listed members into the batch. Both temperatures divide both terms, as released: they set
    the size of the gradients and nothing else.
    """

    display_name: ClassVar[str] = "CoSS"
    needs_teacher: ClassVar[bool] = True

    target: Literal["features", "keys"]
    companions: Annotated[int, Field(ge=0, le=1000)]
    teacher_temperature: Temperature
    student_temperature: Temperature
    head_hidden: Width

    @property
    def reads_features(self) -> bool:
        return self.target == "features"
