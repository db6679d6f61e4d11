"""The section of params.yaml of SimReg."""

from typing import ClassVar, Literal

from bingo.params import MethodSection, Width


class Params(MethodSection):
    """SimReg (Navaneet et al. 2021): regression of the teacher's unit features, or of its keys, through a head of `head_layers`
    linear layers (4, or 2 without BatchNorm and ReLU; `head_hidden` wide inside), which is thrown away afterwards."""

    display_name: ClassVar[str] = "SimReg"
    needs_teacher: ClassVar[bool] = True

    target: Literal["features", "keys"]
    head_layers: Literal[2, 4]
    head_hidden: Width

    @property
    def reads_features(self) -> bool:
        return self.target == "features"
