"""The section of params.yaml of SEED."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from bingo.params import MethodSection, Temperature, Width


class Params(MethodSection):
    """SEED (Fang et al. 2021): temperatures of the student's and the teacher's rows of similarities, the bank that both are taken
    to, and the student's head (published: as wide as the features; 2048 gives 2.3 points more)."""

    display_name: ClassVar[str] = "SEED"
    needs_teacher: ClassVar[bool] = True

    student_temperature: Temperature
    teacher_temperature: Temperature
    negatives: Literal["bank", "queue"]
    negative_rows: Annotated[int, Field(ge=1, le=10**7)]
    head_hidden: Width
