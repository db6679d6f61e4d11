"""The section of params.yaml of DisCo."""

from typing import Annotated, ClassVar

from pydantic import Field

from bingo.params import MethodSection, NotNegative, Share, Temperature, Width


class Params(MethodSection):
    """DisCo (Gao et al. 2022): MoCo-v2's loss and, with weight `regression_weight`, the squared distances to the teacher's keys of the
    same views. The released code sums over a GPU's 32 anchors, which is a weight of 32 on the mean."""

    display_name: ClassVar[str] = "DisCo"
    needs_teacher: ClassVar[bool] = True

    temperature: Temperature
    queue_rows: Annotated[int, Field(ge=1, le=10**7)]
    key_momentum: Share
    regression_weight: NotNegative
    head_hidden: Width

    def momentum_keys(self, keys: str) -> bool:
        return True
