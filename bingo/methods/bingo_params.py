"""The section of params.yaml of BINGO: the switches of the paper, of its released code and of its ablations."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from bingo.params import MethodSection, NotNegative, Positive, Share, Temperature, Whole, Width


class Params(MethodSection):
    """BINGO's switches.

    terms: `paper` (intra + inter against the anchor's key), `symmetric` (also against the member's own key, as released), `symmetric_mix`
    (also the CutMix pair, as released). pair_weights: weights of (own key, other's key) after `inter_warmup_epochs`; before, (1, 0).
    relation: `none` leaves out every term with a bag member. negatives: rows of the whole `bank` of stored keys, or a `queue`.
    """

    display_name: ClassVar[str] = "BINGO"
    needs_teacher: ClassVar[bool] = True

    terms: Literal["paper", "symmetric", "symmetric_mix"]
    relation: Literal["bags", "none"]
    pair_weights: Annotated[list[NotNegative], Field(min_length=2, max_length=2)]
    inter_warmup_epochs: Whole
    view_coupling: Literal["independent", "same"]
    temperature: Temperature
    negatives: Literal["bank", "queue"]
    negative_rows: Annotated[int, Field(ge=1, le=10**7)]
    mask_bag: bool
    queue_push: Literal["anchor", "anchor_and_member"]
    teacher_batchnorm: Literal["eval", "batch"]
    key_momentum: Share
    cutmix_alpha: Positive
    head_hidden: Width
    key_width: Width

    def momentum_keys(self, keys: str) -> bool:
        return keys == "momentum"

    @model_validator(mode="after")
    def _something_is_weighed(self) -> Self:
        if not sum(self.pair_weights):
            raise ValueError("pair_weights: both are 0, so nothing would be learnt; set one above 0")
        return self
