"""The section of params.yaml of MoCo-v2."""

from typing import Annotated, ClassVar

from pydantic import Field

from bingo.params import MethodSection, Share, Temperature, Width


class Params(MethodSection):
    """MoCo-v2 (facebookresearch/moco): temperature, queue of keys, momentum of the key encoder, projection head."""

    display_name: ClassVar[str] = "MoCo-v2"
    needs_teacher: ClassVar[bool] = False

    temperature: Temperature
    queue_rows: Annotated[int, Field(ge=1, le=10**7)]
    key_momentum: Share
    head_hidden: Width
    key_width: Width

    def momentum_keys(self, keys: str) -> bool:
        return True
