"""The page docs/parameters.md, from the schema (what is allowed) and params.yaml (shipped values and remarks).

python -m docs.tools.parameters > docs/parameters.md
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bingo.params import AugmentParams, load_params
from bingo.params.views import named_views
from bingo.planning.recipes import as_text

PARAMS = Path(__file__).parents[2] / "params.yaml"
HEAD = """# Parameters

All settings in `params.yaml`, with their default values. Units are in the names (`_px`, `_epochs`, `_images`, `_rows`). Missing and
unknown keys are errors. This page is generated: `python -m docs.tools.parameters > docs/parameters.md`.
"""
VIEWS = """
## Views

{}

`augment: photographs` selects a set of numbers by its name; `augment: {{name: photographs, flip_p: 0.0}}` changes some of them, and a
section with all numbers needs no name. The sets and their sources are in `bingo/params/views.yaml`; a change there reruns the stages that
have an `augment`.
"""
# Remarks on keys without one in params.yaml, by the name of the key, or by the last part of the section's name and that of the key.
SAID = {
    "seed": "seed of every random choice",
    "placement_scale": "digits: smallest and largest side of a digit, as a share of the canvas",
    "placement_degrees": "digits: largest rotation",
    "crop_px": "side of a view",
    "resize_px": "short side to which an image is resized before the centre view is cropped; null: as in section image",
    "image.resize_px": "short side to which an image is resized before the centre view is cropped",
    "mean": "mean of each channel (red, green, blue), for pixels from 0 to 1",
    "std": "standard deviation of each channel",
    "interpolation": "interpolation for resizing the centre view",
    "key_whiten": "true: the components are scaled to equal variance",
    "epochs": "passes over the train images",
    "drop_epochs": "epochs, counted from 0, at whose start lr is multiplied by drop_factor; []: constant; null: a cosine",
    "drop_factor": "see drop_epochs",
    "hold_epochs": "epochs with constant lr before a cosine",
    "batch_anchors": "images per step, on all GPUs together",
    "accumulate_steps": "as in teacher.pretrain",
    "batchnorm_groups": "as in teacher.pretrain",
    "lr": "largest learning rate",
    "lr_warmup_epochs": "epochs in which the learning rate rises from 0 to lr",
    "lr_warmup_steps": "steps in which the learning rate rises from a thousandth of lr",
    "optimizer": "as in teacher.pretrain",
    "betas": "as in teacher.pretrain",
    "decay_norms_and_biases": "as in teacher.pretrain",
    "clip_grad_norm": "as in teacher.pretrain",
    "sgd_momentum": "momentum of SGD and LARS",
    "weight_decay": "weight decay, on all weights unless decay_norms_and_biases is false",
    "cached.weight_decay": "weight decay",
    "crops.weight_decay": "weight decay",
    "transfer_coco.sgd_momentum": "momentum of SGD",
    "transfer_coco.weight_decay": "weight decay, on all weights except those of normalisation layers",
    "queue_rows": "number of keys in the queue",
    "key_momentum": "momentum of the moving average of the student",
    "moco.key_momentum": "momentum of the moving average of the network",
    "head_hidden": "width of the hidden layer of the projection head",
    "temperature": "divides cosines before the softmax",
    "key_width": "width of the keys",
    "views": "random views of each train image whose keys are stored; 0: none",
    "batch_images": "images per batch",
    "finetune.batch_images": "images per step, on all GPUs together",
    "linear.batch_images": "images per step, on all GPUs together",
    "chunk_rows": "images in a file of the store, and the most that are computed again after a kill",
    "precision": "fp32 | bf16 | auto: bf16 if the hardware supports it",
    "compile": "as in teacher.pretrain; null: not compiled",
    "augment": "the random views, as in teacher.pretrain",
    "k": "number of members of a bag",
    "knn_eval.k": "numbers of neighbours that vote",
    "agreement_k": "numbers of neighbours that are compared with the teacher's; []: none",
    "clusters": "kmeans: number of clusters",
    "iterations": "kmeans: number of iterations",
    "lists": "ivf: number of lists; null: 4 times the square root of the number of train images",
    "probes": "ivf: lists that are searched for each image",
    "arch": "as in teacher",
    "width": "as in teacher",
    "stem": "as in teacher",
    "factory": "as in teacher",
    "probe_every_epochs": "as in teacher.pretrain",
    "init_std": "standard deviation of the layer's initial weights; null: torch's default",
    "crop_scale": "smallest and largest share of the image's area in a train crop",
    "flip_p": "probability of a flip",
    "nets": "student, ema, names of baselines, untrained, start, or supervised",
    "final_lr": "learning rate at the end of a cosine",
    "train_images": "folder of the train images",
    "train_annotations": "file of their annotations",
    "val_images": "folder of the validation images",
    "val_annotations": "file of their annotations",
    "max_side_px": "largest long side",
    "test_min_side_px": "short side in evaluation",
    "nesterov": "Nesterov's momentum",
    "protocols": "a linear layer on enlarged images, a linear layer on images of their own size, fine-tuning of the whole network",
    "trunk_lr": "learning rate of the backbone",
    "head_lr": "learning rate of the linear layer",
    "gallery_anchors": "number of bags shown",
    "published": "published figures, as NAME: TEXT, printed next to the measured ones",
    "queue_push": "whose keys enter the queue after a step",
    "cutmix_alpha": "symmetric_mix: the anchor's share of the area is drawn from Beta(alpha, alpha)",
    "queues": "2: the student has its own queue | 1: both use the teacher's",
    "target": "output of the teacher with which the student is compared",
    "companions": "number of members of each anchor's bag that are added to the batch",
    "teacher_temperature": "divides the teacher's cosines",
    "student_temperature": "divides the student's cosines",
    "coss.teacher_temperature": "divides the loss",
    "coss.student_temperature": "also divides the loss",
    "key_temperature": "divides the moving average's cosines",
    "regression_weight": "weight of the squared distances to the teacher's keys",
    "teacher_batchnorm": "for live keys: eval | batch (statistics of the batch, as released)",
    "weak_keys": "true: the key's view has neither colour jitter nor blur",
    "projection_width": "width of a projector before the predictor; null: no projector",
    "negatives": "bank: drawn from all stored keys | queue: the most recent keys",
    "negative_rows": "largest number of negatives",
    "small_crops": "number of additional small crops of each image, for live keys; 0: none",
    "small_crop_px": "side of a small crop",
    "small_crop_scale": "smallest and largest share of the image's area in a small crop",
    "head_layers": "number of linear layers of the head",
}
Remarks = dict[str, str]
TINY, HUGE = 1e-9, 1e7  # bounds of the schema beyond any sensible value


def page() -> str:
    """The whole page: a heading and a table for each section, in the order of the file."""
    notes, remarks = read_remarks(PARAMS.read_text())
    return HEAD + "".join([*_sections("", load_params(PARAMS), notes, remarks), *_views()])


def read_remarks(text: str) -> tuple[Remarks, Remarks]:
    """The remarks of params.yaml: notes by section, and what is said of one key (which may be a section) by its dotted name.

    They stand at the head of a section, `# key  text`; a line that starts further in continues the one before; others are notes.
    """
    keys = [(len(line) - len(line.lstrip()), line.strip()) for line in text.splitlines() if line.strip()]
    notes: Remarks = {}
    remarks: Remarks = {}
    path: list[str] = []
    last = (notes, "")
    for indent, line in keys:
        path = path[: indent // 2]
        section = ".".join(path)
        if not line.startswith("#"):
            path.append(line.partition(":")[0])
        elif (found := re.match(r"# (\w+)(?:  +|: )(.*)", line)) and f"{'  ' * (indent // 2)}{found[1]}:" in text:
            last = (remarks, f"{section}.{found[1]}".lstrip("."))
            remarks[last[1]] = found[2]
        elif line.startswith("#   "):
            last[0][last[1]] += f" {line[1:].strip()}"
        else:
            last = (notes, section)
            notes[section] = f"{notes[section]}. {line[2:]}" if section in notes else line[2:]
    return notes, remarks


def _sections(name: str, section: BaseModel, notes: Remarks, remarks: Remarks) -> Iterator[str]:
    schema, values = type(section).model_json_schema(), {key: getattr(section, key) for key in type(section).model_fields}
    leaves = {key: value for key, value in values.items() if not isinstance(value, BaseModel) or isinstance(value, AugmentParams)}
    if name:
        yield f"\n{'#' * min(4, 2 + name.count('.'))} {name}\n"
        yield f"\n{' '.join(schema['description'].split())}\n" if "description" in schema else ""
    for note in (remarks.get(name), notes.get(name)) if name else ():
        yield f"\n{_plain(note)}.\n" if note else ""
    if leaves:
        yield "\n| key | default | allowed | |\n|---|---|---|---|\n"
    for key, value in leaves.items():
        dotted = f"{name}.{key}".lstrip(".")
        remark = remarks.get(dotted) or SAID.get(".".join(dotted.split(".")[-2:])) or SAID.get(key, "")
        if isinstance(value, AugmentParams):
            yield f"| `{key}` | `{value.name}` | a name, or a section, see [Views](#views) | {_plain(remark)} |\n"
        else:
            yield f"| `{key}` | `{as_text(value)}` | {allowed(schema['properties'][key], schema.get('$defs', {}))} | {_plain(remark)} |\n"
    for key, value in values.items():
        if key not in leaves:
            yield from _sections(f"{name}.{key}".lstrip("."), value, notes, remarks)


def _views() -> Iterator[str]:
    """The numbers of each named set, one column for a set."""
    schema, sets = AugmentParams.model_json_schema(), named_views()
    yield VIEWS.format(" ".join(schema["description"].split()))
    yield f"\n| key | allowed | {' | '.join(f'`{name}`' for name in sets)} |\n|---|---|{'---|' * len(sets)}\n"
    for key in sets["photographs"]:
        yield f"| `{key}` | {allowed(schema['properties'][key], {})} | {' | '.join(as_text(numbers[key]) for numbers in sets.values())} |\n"


def allowed(field: Any, defs: Any) -> str:
    """The values that a field's JSON schema allows, in words."""
    field = defs[field["$ref"].rpartition("/")[2]] if "$ref" in field else field
    if "anyOf" in field:
        return " or ".join(allowed(choice, defs) for choice in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{as_text(value)}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "array":
        count = f"{field['minItems']} of: " if field.get("minItems") == field.get("maxItems", 0) else "list of: "
        return count + allowed(field.get("items", {}), defs)
    if kind in ("integer", "number"):
        return f"{'whole number' if kind == 'integer' else 'number'}{_bounds(field)}"
    return {"null": "`null`", "string": "text", "boolean": "`true`, `false`", "object": "names with values"}.get(str(kind), "a section")


def _bounds(field: Any) -> str:
    """Limits in words, except those that only guard against typing errors."""
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum", field.get("exclusiveMaximum"))
    texts = [f"above {low:g}" if "exclusiveMinimum" in field else f"from {low:g}"] if low is not None else []
    texts = ["above 0"] if low == TINY else texts
    texts += [f"below {high:g}" if "exclusiveMaximum" in field else f"to {high:g}"] if high is not None and high < HUGE else []
    return f" {' '.join(texts)}" if texts else ""


def _plain(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*")


if __name__ == "__main__":
    print(page(), end="")
