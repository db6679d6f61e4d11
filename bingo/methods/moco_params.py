"""The section of params.yaml of MoCo-v2."""

from typing import ClassVar

from bingo.params import Count, Positive, Section, Share


class Params(Section):
    """MoCo-v2 (facebookresearch/moco): temperature, queue of keys, momentum of the key encoder, projection head."""

    needs_teacher: ClassVar[bool] = False

    temperature: Positive
    queue_rows: Count
    key_momentum: Share
    head_hidden: Count
    key_width: Count
