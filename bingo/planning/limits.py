"""Constraints between sections of params.yaml: which teachers, students, methods, batches and images can be combined.

Every stage checks all of them before any work and reports all errors together. Constraints that need no network are here, one function
in `_RULES` for each, and take no time. Constraints of networks (network_limits.py) are checked once on the networks themselves;
parameters that pass are remembered, so that a stage that does not use torch need not import it.
"""

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from bingo.params.arch_names import tag_mistake
from bingo.params.fields import LIBRARIES
from bingo.params.methods import MethodSection
from bingo.params.networks import place_mistakes, source_mistakes
from bingo.params.training import ScheduleParams
from bingo.params.whole import Params
from bingo.runtime.artefacts import fingerprint, read_json, write_json
from bingo.runtime.errors import UserError

if TYPE_CHECKING:
    from bingo.datasets.subset import Counts

Rule = Callable[[Params, int], Iterable[str]]
_Training = tuple[str, ScheduleParams, list[tuple[str, MethodSection]]]
_READ = {  # but no bags: networks take any
    "seed",
    "image",
    "teacher",
    "extract",
    "student",
    "distill",
    "methods",
    "baselines",
    "supervised",
    "transfer",
    "transfer_coco",
}
_MOST_REMEMBERED = 200


def check_limits(params: Params, processes: int, memory: Path | None = None, networks: bool = True) -> None:
    """Raise UserError with a line for each constraint that `params` violate when `processes` train together.

    `memory` is a JSON file of parameters whose `networks` have passed, if these are to be checked; None: always check them.
    """
    lines = rule_mistakes(params, processes)
    passed = _remembered(memory)
    values = params.model_dump(mode="json", include=_READ)
    key = fingerprint([values, processes, version("torch"), version("timm"), version("torchvision")])
    if networks and key not in passed:
        from bingo.planning.network_limits import network_mistakes  # torch and timm

        found = network_mistakes(params, processes)
        if not found and memory is not None:
            _remember(memory, [*passed, key][-_MOST_REMEMBERED:])
        lines += found
    if lines:
        raise UserError(list(dict.fromkeys(lines)))


def rule_mistakes(params: Params, processes: int) -> list[str]:
    """A line for each violated constraint among those that need no network."""
    return [line for rule in _RULES for line in rule(params, processes)]


def _remembered(memory: Path | None) -> list[str]:
    """Fingerprints of parameters that have passed; none if the file is absent or damaged, since checking again takes only seconds."""
    if memory is None or not memory.is_file():
        return []
    try:
        passed = read_json(memory)
    except UserError:
        return []
    return [key for key in passed if isinstance(key, str)] if isinstance(passed, list) else []


def _remember(memory: Path, passed: list[str]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, passed)
    except OSError:  # the next stage tries again
        return


def image_mistakes(params: Params, found: "Counts") -> list[str]:
    """A line for each error that would occur with `found`, the images of the dataset, now or only after the teacher's pass."""
    from bingo.datasets.subset import subset_mistakes  # NumPy

    lines = subset_mistakes(params.dataset, found) + batch_mistakes(params, found.drawn(params.dataset).train)
    if params.bagging.method == "label" and not found.labelled:
        lines.append("bagging.method = label: the images have no labels; set bagging.method to knn or kmeans, or sort them into classes")
    return lines


def list_mistakes(params: Params) -> list[str]:
    """A line for each missing list of labelled images."""
    lists = {f"semi_eval.splits.{name}.list_file": split.list_file for name, split in params.semi_eval.splits.items()}
    return [
        f"{key} = {path}: the file does not exist; give the path of the list, or null to draw the labels"
        for key, path in lists.items()
        if path is not None and not Path(path).is_file()
    ]


def search_mistakes(params: Params) -> list[str]:
    """A line if the package for the search for neighbours is missing."""
    if params.bagging.search != "cuvs" or all(find_spec(name) for name in ("cuvs", "pylibraft")):
        return []
    return ["bagging.search = cuvs: cuVS is not installed; pip install cuvs-cu12 or cuvs-cu13, as the driver's CUDA, or set it to ivf"]


def asked_weights(params: Params, start: str = "student.weights") -> dict[str, str | None]:
    """The settings that give external weights for the student's network, by key in params.yaml; `start` replaces the first in messages."""
    return {start: params.student.weights, "supervised": params.supervised}


def absent_weights(params: Params, start: str = "student.weights") -> list[str]:
    """A line for each missing file of weights of the student's network."""
    files = {key: value for key, value in asked_weights(params, start).items() if value and value not in LIBRARIES}
    return [
        f"{key} = {value}: the file does not exist; give the path of the weights, or {' or '.join(LIBRARIES)}, or null"
        for key, value in files.items()
        if not Path(value).exists()
    ]


def weights_mistakes(params: Params, start: str = "student.weights") -> list[str]:
    """A line for each file of weights of the student's network that is missing or does not fit; reads the files."""
    lines = absent_weights(params, start)
    for key, value in asked_weights(params, start).items():
        if value and value not in LIBRARIES and Path(value).exists():
            from bingo.teachers.weights import student_weights  # torch and timm

            try:
                student_weights(key, value, params.student, params.image)
            except UserError as error:
                lines += error.lines
    return lines


def batch_mistakes(params: Params, train_rows: int) -> list[str]:
    """A line for each batch and each size of bags that is too large for the number of train images."""
    trainings = _trainings(params)
    lines = [
        f"{name}.batch_anchors = {schedule.batch_anchors}: there are only {train_rows} train images; lower it to at most that"
        for name, schedule, _ in trainings
        if schedule.batch_anchors > train_rows
    ]
    if train_rows < 2:
        return [*lines, f"the dataset has {train_rows} train images, of which no bags can be made; add images"]
    if (key_width := params.teacher.key_width) is not None and key_width >= train_rows:
        way_out = f"set teacher.key_width to at most {train_rows - 1}, or to null"
        lines.append(f"teacher.key_width = {key_width}: of {train_rows} train images there are fewer principal components; {way_out}")
    bagging, bingo = params.bagging, params.methods.bingo
    masked = params.distill.method == "bingo" and bingo.relation == "bags" and bingo.mask_bag
    no_negatives = masked and bagging.method == "knn" and not bagging.mutual  # if all other images are members
    if no_negatives and bagging.k == train_rows - 1:
        way_out = f"set methods.bingo.mask_bag: false{f', or bagging.k to at most {train_rows - 2}' * (train_rows > 2)}"
        lines.append(f"methods.bingo.mask_bag = true: bags of bagging.k = {bagging.k} members leave no negatives; {way_out}")
    sizes = {"k": (bagging.k, train_rows - (2 if no_negatives and bagging.k >= train_rows > 2 else 1))}
    sizes |= {"clusters": (bagging.clusters, train_rows)} if bagging.method == "kmeans" else {}
    sizes |= {"lists": (bagging.lists or 1, train_rows)} if bagging.search == "ivf" else {}
    lines += [
        f"bagging.{name} = {size}: of {train_rows} train images allowed are 1 to {most}; lower it"
        for name, (size, most) in sizes.items()
        if size > most
    ]
    return list(dict.fromkeys(lines))


def _trainings(params: Params) -> list[_Training]:
    """For each training, the name of its section, its schedule, and its methods by the names of their sections."""
    sections = [(f"methods.{name}", params.methods.section(name)) for name in dict.fromkeys([params.distill.method, *params.baselines])]
    found: list[_Training] = [("distill", params.distill, sections)]
    if params.teacher.source == "pretrain":
        found.append(("teacher.pretrain", params.teacher.pretrain, [("teacher.pretrain.moco", params.teacher.pretrain.moco)]))
    return found


def _tags_choose_weights(params: Params, _: int) -> Iterator[str]:
    """A tag selects timm's weights, so it has no meaning for a network that is initialised randomly or from a file."""
    loads_student = "timm" in (params.student.weights, params.supervised)
    for name, network, loads in (("teacher", params.teacher, params.teacher.source == "timm"), ("student", params.student, loads_student)):
        if not loads and (mistake := tag_mistake(network.arch, f"set {name}.arch:")):
            key = "teacher.source" if name == "teacher" else "student.weights"
            yield f"{name}.arch = {network.arch}: {mistake}, or {key}: timm to load its weights"


def _batches_are_shared(params: Params, processes: int) -> Iterator[str]:
    for name, schedule, _ in _trainings(params):
        if schedule.batch_anchors % (parts := processes * schedule.accumulate_steps):
            nearest = parts * max(1, round(schedule.batch_anchors / parts))
            line = f"{name}.batch_anchors = {schedule.batch_anchors}: {_sharers(schedule, processes)} cannot share it equally"
            yield f"{line}; set {name}.batch_anchors: {nearest}, or another multiple"


def _groups_are_shared(params: Params, processes: int) -> Iterator[str]:
    for name, schedule, _ in _trainings(params):
        parts = processes * schedule.accumulate_steps
        if (groups := schedule.batchnorm_groups or 1) > parts and groups % parts:
            line = f"{name}.batchnorm_groups = {groups}: {_sharers(schedule, processes)} cannot share the groups equally"
            way_out = f"set {name}.batchnorm_groups to {schedule.accumulate_steps} (what a process sees at a time is one group)"
            yield f"{line}; {way_out}, or to a multiple of {parts}"


def _sharers(schedule: ScheduleParams, processes: int) -> str:
    parts = schedule.accumulate_steps
    return f"{processes} processes" if parts == 1 else f"{processes} processes with accumulate_steps = {parts}"


def _parts_have_groups(params: Params, _: int) -> Iterator[str]:
    """A loss over the images of a group is that of the whole batch only if groups are configured, and parts do not divide them."""
    for name, schedule, sections in _trainings(params):
        for section_name, section in sections:
            if section.compares_images and (parts := schedule.accumulate_steps) > 1 and schedule.batchnorm_groups is None:
                line = f"{name}.accumulate_steps = {parts}: {section_name} compares each feature over all images of a BatchNorm group"
                yield f"{line}; set {name}.batchnorm_groups: {parts}, or a multiple of it, or {name}.accumulate_steps: 1"


def _queues_hold_a_batch(params: Params, _: int) -> Iterator[str]:
    """A queue that is smaller than one push would lose keys that were never used as negatives."""
    for _name, schedule, sections in _trainings(params):
        for section_name, section in sections:
            queued = getattr(section, "negatives", None) == "queue" or getattr(section, "small_crops", 0)
            key = "negative_rows" if queued else "queue_rows"
            rows = getattr(section, key, None)
            pushed = schedule.batch_anchors * (2 if getattr(section, "queue_push", "") == "anchor_and_member" else 1)
            if rows is not None and rows < pushed:
                line = f"{section_name}.{key} = {rows}: a step pushes {pushed} keys"
                yield f"{line}; set {section_name}.{key}: {pushed} or more, or lower batch_anchors"


def _bags_list_companions(params: Params, processes: int) -> Iterator[str]:
    coss = params.methods.coss
    if params.distill.method != "coss":
        return
    if coss.companions > params.bagging.k:
        line = f"methods.coss.companions = {coss.companions}: bags list {params.bagging.k} members"
        yield f"{line}; set bagging.k: {coss.companions}, or lower it"
    if not coss.companions and params.distill.batch_anchors <= processes * params.distill.accumulate_steps:
        line = f"distill.batch_anchors = {params.distill.batch_anchors}: methods.coss compares each feature over the images of a process"
        yield f"{line}; set distill.batch_anchors to {2 * processes} or more, or methods.coss.companions to 1 or more"


def _warmup_leaves_epochs(params: Params, _: int) -> Iterator[str]:
    bingo, epochs = params.methods.bingo, params.distill.epochs
    if params.distill.method == "bingo" and bingo.relation == "bags" and bingo.pair_weights[1] and bingo.inter_warmup_epochs >= epochs:
        line = f"methods.bingo.inter_warmup_epochs = {bingo.inter_warmup_epochs}: with distill.epochs = {epochs} no bag would be trained on"
        yield f"{line}; set methods.bingo.inter_warmup_epochs: {epochs - 1} or less, or methods.bingo.relation: none"


def _views_fit_the_pack(params: Params, _: int) -> Iterator[str]:
    """A view larger than the packed photographs would be enlarged, where the originals may have the pixels."""
    pack_px, own, seed = params.dataset.pack_px, params.teacher.image, params.methods.seed
    sides = {"image.resize_px": params.image.resize_px}
    sides |= {} if own.crop_px is None and own.resize_px is None else {"teacher.image.resize_px": params.teacher_image.resize_px}
    sides |= {"knn_eval.resize_px": params.knn_eval.resize_px or 0}
    sides |= {"methods.seed.small_crop_px": seed.small_crop_px} if params.distill.method == "seed" and seed.small_crops else {}
    for key, side_px in sides.items():
        if pack_px and side_px > pack_px:
            way_out = f"set dataset.pack_px to {side_px} or more, or to null, or lower {key}"
            yield f"{key} = {side_px}: the packed photographs have a short side of dataset.pack_px = {pack_px}; {way_out}"


_RULES: tuple[Rule, ...] = (
    lambda params, _: source_mistakes(params.teacher),
    lambda params, _: [line for key, value in asked_weights(params).items() for line in place_mistakes(key, value, params.student)],
    _tags_choose_weights,
    _batches_are_shared,
    _groups_are_shared,
    _parts_have_groups,
    _queues_hold_a_batch,
    _bags_list_companions,
    _warmup_leaves_epochs,
    _views_fit_the_pack,
)
