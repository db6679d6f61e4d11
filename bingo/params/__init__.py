"""params.yaml as frozen sections: every key is required, unknown keys are errors, types are not converted, all errors are reported at once.

Values are only in params.yaml, so a changed default is a changed file that DVC sees. Nothing here imports torch, so errors are
reported in a fraction of a second, before any work starts.

    file           sections of params.yaml             read by the stages
    data.py        dataset, image                      scan; all that read images
                   extract, bagging                    extract; bag
    networks.py    teacher, student                    teacher; distill, baseline, and evaluations of the student
    known.py       what teacher.name stands for        teacher
    training.py    distill, teacher.pretrain           distill, baseline; teacher
    views.py       augment in both, and in extract     extract; teacher, distill, baseline
    methods.py     methods.NAME                        distill and baseline, of the method that they run
    evals.py       linear_eval, knn_eval, semi_eval    those of these names
                   transfer, transfer_coco             transfer_cifar, transfer_coco
    whole.py       all of them, baselines, report      baseline; report

Other files: fields.py, the types of fields; yaml_files.py and mistakes.py, from a file to values, and from their errors to lines;
arch_names.py and places.py, names of networks and paths of files.
"""

# ruff: noqa: F401 - these names are imported from here

from bingo.params.data import (
    BaggingParams,
    BicubicImageParams,
    DatasetParams,
    ExtractParams,
    ImageParams,
    image_values,
    seen_image,
)
from bingo.params.evals import (
    CachedProbeParams,
    CocoParams,
    CropProbeParams,
    CropsParams,
    CropTuneParams,
    FeatureParams,
    KnnEvalParams,
    SemiEvalParams,
    SplitParams,
    TransferParams,
    TuneParams,
)
from bingo.params.fields import Interpolation, Range, Section
from bingo.params.methods import BingoParams, MethodSection, MocoParams, display_name, method_names, method_section
from bingo.params.mistakes import mistake_lines
from bingo.params.networks import STUDENT_OPTIONS, NetworkParams, StudentParams, TeacherParams, format_names
from bingo.params.training import PLAIN_SGD, DistillParams, LrSchedule, OptimizerParams, PretrainParams, ScheduleParams
from bingo.params.views import AugmentParams
from bingo.params.whole import Params, load_params, validate
from bingo.params.yaml_files import read_yaml
