"""bingo init: write a params.yaml that suits a folder of images; in an empty folder, also create a workspace.

bingo init ~/photos --teacher dinov2-s --minutes 30
"""

import os
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bingo.cli.recipe import FOLDER, PARAMS, seen_from_workspace, write_params
from bingo.cli.shipped import in_git, workspace_here
from bingo.params.places import located
from bingo.pipeline.commands import from_here
from bingo.runtime.errors import printable

if TYPE_CHECKING:
    from bingo.params import CachedProbeParams
    from bingo.planning.first_params import ChosenTeacher, Network, Plan
    from bingo.planning.look import Look

CPU_MINUTES, GPU_MINUTES = 30, 480
LONG_SECONDS = 60  # of a network's part of the run, from which a cheaper network is worth a thought
DEFAULT_TEACHER = "dinov2-s"


def main(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="Images: train/CLASS and val/CLASS, CLASS alone, or a flat folder; tar shards; a saved dataset."
        ),
    ],
    teacher: Annotated[str | None, typer.Option(help="A name listed by `bingo teachers`, or the file of its weights.")] = None,
    student: Annotated[str | None, typer.Option(help="A network of timm, or torchvision/NAME; by default a ResNet-18.")] = None,
    student_weights: Annotated[
        str | None, typer.Option(help="The student's initial weights: timm, torchvision or a file; by default random.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A file of the teacher's weights.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=1, help="Time limit for the whole run on this machine; by default 30 on a CPU, 480 on a GPU.")
    ] = None,
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Follow links that lead out of FOLDER.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report what would be chosen, and write nothing.")] = False,
) -> None:
    """Look at a folder of images, choose every setting for it, and write params.yaml."""
    from bingo.params import read_yaml, validate
    from bingo.runtime.progress import progress_bar

    with workspace_here(from_here("FOLDER", Path(folder)), keep=not dry_run) as is_new:
        params = read_yaml(PARAMS)
        validate(params, str(PARAMS))
        if not dry_run and not is_new:
            _refuse_uncommitted()

        from bingo.pipeline.run import pick_device  # these load torch, which takes seconds
        from bingo.planning.first_params import fit, least_minutes, measure_pace, split_counts
        from bingo.planning.look import look_at
        from bingo.planning.recipes import lay_over

        load = os.getloadavg()[0]
        device, cores = pick_device(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        look = look_at(str(from_here("FOLDER", Path(folder))), follow_links)
        chosen, network = _teacher(teacher, checkpoint, look, device.type), _student(student, student_weights, look)
        budget = minutes or (CPU_MINUTES if device.type == "cpu" else GPU_MINUTES)
        with progress_bar("measuring this machine"):
            pace = measure_pace(look, network, chosen, device, cores, _layer(params, look))
        plan = fit(look, chosen, network, pace, budget)
        changes = _changes(folder, look, plan, chosen, device.type == "cuda", student_weights is not None)
        changes["dataset"]["follow_links"] = follow_links
        changes["student"]["weights"] = _start(student_weights)
        changes["image"] |= _normalisation(student_weights, network)
        lay_over(params, changes)
        _check_params(params, folder)
        if not dry_run:
            write_params(changes, params)
        least = partial(least_minutes, look, chosen, network, pace)
        way_out = f"give --minutes {least(plan.train_images)}{_cheaper(plan, chosen, network)}"
        lines = [
            *_seen_lines(folder, look),
            *_choice_lines(look, plan, chosen, student_weights, least(split_counts(look)[0])),
            *_cost_lines(plan, budget, device.type, cores, load, way_out),
            "nothing is written: --dry-run" if dry_run else _next_line(is_new),
        ]
        typer.echo("\n".join(lines))


def _changes(folder: str, look: "Look", plan: "Plan", teacher: "ChosenTeacher", on_gpu: bool, started: bool) -> dict[str, Any]:
    """The parameters to change: those of the recipe for images of this size, and those that the plan sets."""
    from bingo.pipeline.launch import expected_processes
    from bingo.planning.first_params import overlay
    from bingo.planning.recipes import lay_over

    changes = _recipe(look)
    lay_over(changes, overlay(look, plan, teacher, seen_from_workspace(folder), on_gpu, expected_processes(), started))
    changes["dataset"]["source"] = look.source
    return changes


def _recipe(look: "Look") -> dict[str, Any]:
    """The overlay of the recipe for images of this size."""
    from bingo.planning.first_params import SMALL_PX
    from bingo.planning.recipes import read_recipe

    return read_recipe(FOLDER, "parts/small-photographs" if look.short_px[1] <= SMALL_PX else "parts/photographs").overlay


def _layer(params: dict[str, Any], look: "Look") -> "CachedProbeParams":
    """The settings of the linear layers that will be trained on stored features."""
    from bingo.params import CachedProbeParams

    return CachedProbeParams(**params["linear_eval"]["cached"] | _recipe(look)["linear_eval"]["cached"])


def _start(weights: str | None) -> str | None:
    """`student.weights` for --student-weights: None, a library, or a file as seen from the workspace."""
    from bingo.params.fields import LIBRARIES

    return weights if weights in (None, *LIBRARIES) else seen_from_workspace(weights)


def _check_params(params: dict[str, Any], folder: str) -> None:
    """Raises UserError if the new parameters are invalid, or need more than this machine has."""
    from bingo.params import validate
    from bingo.params.networks import place_mistakes
    from bingo.pipeline.launch import expected_processes
    from bingo.planning.limits import check_limits, weights_mistakes
    from bingo.runtime.errors import UserError

    new, start = validate(params, f"{PARAMS} for {printable(folder)}"), "--student-weights"
    if mistakes := [*place_mistakes(start, new.student.weights, new.student), *weights_mistakes(new, start)]:
        raise UserError(mistakes)
    check_limits(new, expected_processes())


def _next_line(is_new: bool) -> str:
    """What is written, and what comes next."""
    if not is_new:
        return "params.yaml is written; next: dvc repro (to undo, and before another bingo init: git checkout params.yaml)"
    later = "" if in_git() else "; dvc exp run also needs git: git init, dvc config --unset core.no_scm, git add -A, git commit"
    return f"this folder is now a workspace, with the code that its stages run, and params.yaml is written; next: dvc repro{later}"


def _refuse_uncommitted() -> None:
    """Raises UserError where params.yaml has changes that writing it would lose."""
    from bingo.runtime.errors import UserError

    command = ["git", "status", "--porcelain", "--ignored", "--", str(PARAMS)]
    try:
        status = subprocess.run(command, capture_output=True, text=True, check=False)
        state, reason = status.stdout[:2], printable(status.stderr.partition("\n")[0])
    except FileNotFoundError:
        state, reason = "", "git is not installed"
    if reason:
        problem = f"its values could not be restored ({reason})"
        way_out = "make git status work here, with params.yaml committed" if in_git() else "git init, git add params.yaml, git commit"
    elif state in ("??", "!!"):
        problem, way_out = "is not under git, so its values could not be restored", "git add --force params.yaml, and commit it"
    elif state:
        problem, way_out = "has changes that are not committed", "commit them, or drop them: git checkout HEAD params.yaml"
    else:
        return
    raise UserError(f"params.yaml: {problem}; {way_out} (bingo init --dry-run only reports)")


def _teacher(name: str | None, checkpoint: Path | None, look: "Look", device_type: str) -> "ChosenTeacher":
    """The teacher given by its name or by its file's name; by default DINOv2, or for small images on a CPU a teacher to be pretrained.
    Raises UserError for a file without weights; whether they are those of this teacher is checked by `recipe check` and the stage."""
    from bingo.params.known import known_names, known_teacher
    from bingo.planning.first_params import SMALL_PX, ChosenTeacher, Network
    from bingo.runtime.errors import UserError, near_matches

    if name is None and checkpoint is None and look.short_px[1] <= SMALL_PX and device_type == "cpu":
        return ChosenTeacher(None)
    names, option = known_names(), "--checkpoint"
    if name is not None and name not in names and checkpoint is None and from_here("--teacher", Path(name)).is_file():
        checkpoint, name, option = Path(name), None, "--teacher"
    if checkpoint:
        _check_weights(option, checkpoint)
    if name is None:
        name = _whose_file(checkpoint.name) if checkpoint else DEFAULT_TEACHER
    if name not in names:
        raise UserError(f"--teacher = {name}: no known teacher and no file has this name{near_matches(name, names)}; see: bingo teachers")
    known = known_teacher(name)
    file = seen_from_workspace(str(checkpoint)) if checkpoint else None
    read = file or known.place
    if read and not Path(located(read)).is_file():
        raise UserError(f"--teacher = {name}: its weights are not in {read}; {known.way_in('give it as --checkpoint')}")
    network = Network(known.teacher.arch.partition(".")[0], known.teacher.width, known.teacher.stem)
    return ChosenTeacher(name, network, file, known.image.crop_px, known.gflop, known.parameters_m, known.key_width)


def _check_weights(option: str, path: Path) -> None:
    """Raises UserError, which names the option, for a file that is absent, unreadable or without weights."""
    from bingo.runtime.errors import UserError
    from bingo.teachers.reading.foreign import read_checkpoint, states_in

    try:
        if not states_in(read_checkpoint(from_here(option, path), option)[0]):
            raise UserError(f"{path}: contains no tensors by name; give a file of weights, such as a state dict")
    except UserError as error:
        raise UserError([line if line.startswith(option) else f"{option}: {line}" for line in error.lines]) from None


def _whose_file(file_name: str) -> str:
    """The known teacher whose weights are published under this file name. Raises UserError if there is none or more than one."""
    from bingo.params.known import known_names, known_teacher
    from bingo.runtime.errors import UserError

    published = {name: Path(known_teacher(name).file or known_teacher(name).weights).name for name in known_names()}
    found = [name for name, published_name in published.items() if published_name == file_name]
    if len(found) != 1:
        problem = f"several teachers have a file of this name ({', '.join(found)})" if found else "no known teacher has a file of this name"
        way_out = "give the name of the teacher whose weights it contains: --teacher NAME --checkpoint FILE, see: bingo teachers"
        raise UserError(f"{file_name}: {problem}; {way_out}")
    return found[0]


def _student(arch: str | None, weights: str | None, look: "Look") -> "Network | None":
    """The given student, or the one in a file of weights of an earlier run; with other weights, the network has its standard width and
    stem. Raises UserError for a network that does not exist, and for a file without weights."""
    from bingo.nets.checkpoint import own_metadata
    from bingo.params.arch_names import arch_mistake, tag_mistake
    from bingo.params.fields import LIBRARIES
    from bingo.planning.first_params import Network, stem_for
    from bingo.runtime.errors import UserError

    if arch is not None:
        tag = None if weights == "timm" else tag_mistake(arch, "give --student")
        if mistake := tag or arch_mistake(arch, "give --student"):
            raise UserError(f"--student = {arch}: {mistake}")
    if weights is None:
        return Network(arch, 1.0, stem_for(arch, look)) if arch else None
    if weights not in LIBRARIES:
        _check_weights("--student-weights", Path(weights))
    former = own_metadata(from_here("--student-weights", Path(weights))) or {}
    if arch in (None, former.get("arch")) and {"arch", "width", "stem"} <= former.keys():
        return Network(former["arch"], former["width"], former["stem"])
    return Network(arch or ("torchvision/resnet18" if weights == "torchvision" else "resnet18"), 1.0, "imagenet")


def _normalisation(weights: str | None, network: "Network | None") -> dict[str, list[float]]:
    """Mean and std with which the student's weights were trained, from their own file or from timm."""
    import timm

    from bingo.nets.checkpoint import own_metadata

    if weights is None or network is None:
        return {}
    former, cfg = own_metadata(from_here("--student-weights", Path(weights))), timm.get_pretrained_cfg(network.arch)
    found = former or (vars(cfg) if cfg else {})
    return {name: list(found[name]) for name in ("mean", "std") if name in found}


def _seen_lines(folder: str, look: "Look") -> list[str]:
    """Lines on the content of the folder."""
    names = printable(", ".join(look.classes[:3]))
    classes = f"{len(look.classes):,} class{'es'[: 2 * (len(look.classes) > 1)]} ({names}{', ...' if len(look.classes) > 3 else ''})"
    labels = classes if look.classes else "no labels"
    gray = f", {look.gray} of them grey" if look.gray else ""
    least, median, most = look.short_px
    source = "" if look.source == "folder" else f" ({look.source})"
    lines = [f"{printable(folder)}{source}: {look.train:,} train and {look.test:,} test images, {labels}", *look.remarks]
    opened = look.sampled - len(look.unreadable)
    lines.append(f"short side: median {median} px, from {least} to {most}, of {opened} images that were opened{gray}")
    if look.unreadable:
        shown = ", ".join(map(printable, look.unreadable[:3]))
        lines.append(f"unreadable: {len(look.unreadable)} of {look.sampled} ({shown}); such files are left out and counted")
    return lines


def _choice_lines(look: "Look", plan: "Plan", teacher: "ChosenTeacher", weights: str | None, minutes_for_all: int) -> list[str]:
    """Lines on what was chosen and why; `minutes_for_all` is the time limit for which all images fit."""
    from bingo.params.known import known_names, known_teacher
    from bingo.planning.first_params import PRETRAINED, SMALL_PX, split_counts

    student, (train, test) = plan.student, split_counts(look)
    lines = []
    if not test:
        lines.append(f"test images: none, because {train} images are too few to hold some out")
    elif not look.test:
        lines.append(f"test images: {plan.test_images:,} of the train images are held out, because there is no test split")
    drawn = [("train", plan.train_images, train), ("test", plan.test_images, test)] if look.test else [("train", plan.train_images, train)]
    for split, count, of in drawn:
        if count < of:
            lines.append(f"{split} images: {count:,} of {of:,} are drawn, to shorten the run; for all, give --minutes {minutes_for_all}")
    if teacher.name is None:
        network = f"{PRETRAINED.arch} x {PRETRAINED.width:g}"
        lines.append(f"teacher: {network}, pretrained with MoCo-v2 on these images; for published teachers, see: bingo teachers")
    else:
        known = known_teacher(teacher.name)
        held = teacher.checkpoint or known.place or f"{known.address}, downloaded once"
        licence = known.licence or "licence not known"
        lines.append(f"teacher: {teacher.name} at {plan.teacher_px} px ({known.title}; {licence}); weights: {held}")
        if not (teacher.checkpoint or known.on_disk) and (others := [name for name in known_names() if known_teacher(name).on_disk]):
            lines.append(f"without network access, give --teacher with weights that are on this disk: {' or '.join(others)}")
    kept = "kept in memory" if look.short_px[1] <= SMALL_PX else "decoded on every access"
    start = f", starting from {printable(weights)}" if weights else ""
    lines.append(f"student: {student.arch} x {student.width:g} at {plan.crop_px} px{start}; images are {kept}")
    narrowed = teacher.narrowed_for(plan.train_images)
    keys = f", {narrowed} principal components of keys of width {teacher.key_width}" if teacher.name and narrowed else ""
    lines.append(f"training: BINGO's expected terms, one view of one image for each anchor, crops of at least half of the image{keys}")
    lines.append(f"length: {plan.epochs} epochs, {plan.views} stored view{'s'[: plan.views > 1]} of each image")
    if test and not look.classes:
        lines.append("evaluation: agreement with the teacher on the test images, because there are no labels")
    return lines


def _cheaper(plan: "Plan", teacher: "ChosenTeacher", student: "Network | None") -> str:
    """What else would make the run shorter: another network in place of one that takes more than a minute."""
    others = []
    if plan.seconds["teacher"] > LONG_SECONDS:
        kind = "a published teacher, which is not trained here" if teacher.name is None else "a smaller teacher"
        others.append(f", or choose {kind} (see: bingo teachers)")
    if student is not None and plan.seconds["student"] + plan.seconds["evaluations"] > LONG_SECONDS:
        others.append(", or choose a smaller --student")
    return "".join(others)


def _cost_lines(plan: "Plan", budget: float, device_type: str, cores: int, load: float, way_out: str) -> list[str]:
    """Lines on the time of the run on this machine, whose load average was `load`; `way_out` is what to do if it is too long."""
    machine = f"{cores} CPU core{'s'[: cores > 1]}" if device_type == "cpu" else "one GPU"
    minutes = {part: seconds / 60 for part, seconds in plan.seconds.items()}
    minutes["starting the stages"] = plan.minutes - sum(minutes.values())
    parts = ", ".join(f"{part} {taken:.1f}" for part, taken in minutes.items())
    busy = load > cores / 2
    when = "under the present load" if busy else "if otherwise idle"
    lines = [f"time: about {plan.minutes:.{int(plan.minutes < 10)}f} min on {machine} {when}, estimated by a short trial ({parts})"]
    if round(plan.minutes, int(plan.minutes < 10)) > budget:
        lines.append(f"warning: this is the shortest run, but takes more than --minutes {budget:g}; {way_out}")
    if busy:
        others = f"other programs are running (load average {load:.1f} on {cores} core{'s'[: cores > 1]})"
        lines.append(
            f"warning: {others} and slowed the trial, on which the time and the settings depend; if that changes, run bingo init again"
        )
    return lines
