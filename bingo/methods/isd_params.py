"""The section of params.yaml of ISD."""

from typing import Annotated, ClassVar

from pydantic import Field

from bingo.params import MethodSection, Share, Temperature, Width


class Params(MethodSection):
    """ISD (Tejankar et al. 2021), self-distillation without a teacher. `weak_keys`: the key's view keeps the crop, turn and flip of
    distill.augment but no colours and no blur (ISD-plus). `projection_width`: width of a projector before the predictor, which
    the moving average has too; null: none, the features are compared."""

    display_name: ClassVar[str] = "ISD"
    needs_teacher: ClassVar[bool] = False

    student_temperature: Temperature
    key_temperature: Temperature
    queue_rows: Annotated[int, Field(ge=1, le=10**7)]
    key_momentum: Share
    weak_keys: bool
    projection_width: Width | None
    head_hidden: Width

    def momentum_keys(self, keys: str) -> bool:
        return True
