"""Assembly of a training, for the stages that run it and for the dry run that checks its parameters.

`distillation`, `baseline` and `pretraining` are the three trainings that params.yaml describes: a method, a network and a schedule.
`TrainingSetup.build` turns such a description into a method with a new student; only this module creates a `Context` for a run.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bingo import seeds
from bingo.images.images import Images
from bingo.images.loader import ViewLoader
from bingo.methods.contract import Context, Method, build_method
from bingo.nets.backbones import Backbone, build_backbone, check_images
from bingo.params import DistillParams, ImageParams, MethodSection, NetworkParams, Params, PretrainParams
from bingo.training.batches import Stored

if TYPE_CHECKING:  # a method without bags or teacher does not depend on them
    from bingo.bags.index import Bags
    from bingo.teachers.teacher import Teacher


@dataclass(frozen=True)
class TrainingSetup:
    """The description of one training in params.yaml. `place`: the section of its schedule, for messages; `image`: size and normalisation
    of the network's images; `keys`: see `Context`; `keep_best`, `student_ema`: see `Trainer`."""

    params: Params
    method: str
    section: MethodSection
    network: NetworkParams
    schedule: DistillParams | PretrainParams
    place: str
    image: ImageParams
    keys: str = "momentum"
    keep_best: bool = False
    student_ema: float = 0.0

    @property
    def reads_features(self) -> bool:
        """Whether the student is compared with the teacher's stored features."""
        return self.keys == "stored" and self.section.reads_features

    def build(
        self,
        device: torch.device,
        precision: str,
        stored: Stored | None = None,
        bags: "Bags | None" = None,
        teacher: "Teacher | None" = None,
        start: Backbone | None = None,
    ) -> Method:
        """The method with a new student, with the weights of `start` if that is given.

        Raises UserError if the student cannot be built, or does not accept images of image.crop_px.
        """
        network, seed = self.network, self.params.seed
        student = build_backbone(network.arch, network.width, network.stem, seeds.torch_seed(seed, "student"), network.options)
        check_images(student, network.arch, self.image.crop_px)
        if start is not None:
            student.load_state_dict(start.state_dict())
        context = Context(
            student=student,
            feature_width=student.feature_width,
            seed=seed,
            keys=self.keys,
            precision=precision,
            device=device,
            teacher=teacher if self.keys == "live" else None,
            keys_TVP=stored.keys_TVP if stored is not None else None,
            features_TD=stored.features_TD if stored is not None else None,
            bags=bags,
        )
        return build_method(self.method, self.section, context)

    def loader(self, images: Images, device: torch.device, teacher: "Teacher | None" = None) -> ViewLoader:
        """Random views of `images` with the training's augmentation; for live keys also the views of a teacher with a different size."""
        other = teacher.image if teacher is not None and self.keys == "live" and teacher.image != self.image else None
        return ViewLoader(images, self.image, self.schedule.augment, self.params.seed, device, teacher_image=other)


def distillation(params: Params) -> TrainingSetup:
    """The stage `distill`: the student from the teacher."""
    distill, section = params.distill, params.methods.section(params.distill.method)
    kept = distill.keep_best, distill.student_ema
    return TrainingSetup(params, distill.method, section, params.student, distill, "distill", params.image, distill.keys, *kept)


def baseline(params: Params, method: str) -> TrainingSetup:
    """The stage `baseline`: the same student with the same schedule, by a method without a teacher."""
    return TrainingSetup(params, method, params.methods.section(method), params.student, params.distill, "distill", params.image)


def pretraining(params: Params) -> TrainingSetup:
    """The stage `teacher` if teacher.source is `pretrain`: MoCo-v2 on the teacher's network."""
    pretrain = params.teacher.pretrain
    return TrainingSetup(params, "moco", pretrain.moco, params.teacher, pretrain, "teacher.pretrain", params.teacher_image)
