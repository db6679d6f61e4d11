"""The section of params.yaml of CompRess."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from bingo.params import MethodSection, Share, Temperature


class Params(MethodSection):
    """CompRess (Abbasi Koohpayegani et al. 2020). `queues`: 2, the student's similarities are to a moving average of itself, without
    a head; 1, both similarities are to the teacher's queue, and the student gets one linear layer to the teacher's width."""

    display_name: ClassVar[str] = "CompRess"
    needs_teacher: ClassVar[bool] = True

    queues: Literal[1, 2]
    target: Literal["features", "keys"]
    temperature: Temperature
    queue_rows: Annotated[int, Field(ge=1, le=10**7)]
    key_momentum: Share

    @property
    def reads_features(self) -> bool:
        return self.target == "features"
