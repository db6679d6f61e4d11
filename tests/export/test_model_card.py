"""The text of the model card, with complete and with missing information. Cards of the command are tested in test_export.py."""

import pytest

from bingo.export.contract import Loading
from bingo.export.measured import ExportFigures
from bingo.export.model_card import Provenance, model_card, score_rows
from bingo.export.stored import StoredNetwork
from bingo.nets.backbones import build_backbone
from bingo.params import ImageParams

IMAGE = {"crop_px": 224, "resize_px": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
SHAPE = {"kind": "student", "arch": "resnet10t", "width": 0.125, "stem": "small"}
MADE = {"method": "bingo", "epochs": 200, "listing": "11aa", "embeddings": "22bb", "bags": "33cc"}
TEACHER = {"source": "checkpoint", "arch": "resnet50", "width": 2.0, "stem": "imagenet", "pretrained": True}
KNOWN = Provenance(
    net="student", dataset="folder", train_images=1281167, teacher=TEACHER, teacher_sha256="ab" * 32,
    bags={"method": "kmeans", "clusters": 5, "listing": "11aa", "embeddings": "22bb", "fingerprint": "33cc"},
)  # fmt: skip
SECTIONS = ["Usage", "Architecture", "Preprocessing", "Training", "Accuracy", "This file", "Licence"]


@pytest.fixture(scope="module")
def backbone():
    return build_backbone("resnet10t", 0.125, "small", seed_value=0)


@pytest.fixture
def card(backbone):
    """The card for metadata (default: MADE) and a provenance."""

    def written(provenance: Provenance, **metadata) -> str:
        network = StoredNetwork(backbone, {**SHAPE, **IMAGE, **(metadata or MADE)}, ImageParams(**IMAGE))
        size = ExportFigures([("bytes", "", "1,234")], "")
        return model_card(network, "timm", "net.safetensors", Loading("python", "import timm"), "not read back: why", provenance, size)

    return written


def rows(card: str, section: str) -> dict[str, str]:
    """First and second cell of a section's table."""
    lines = card.partition(f"## {section}\n")[2].partition("\n## ")[0].splitlines()
    return {
        cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in lines if line.startswith("| ")) if cells[1].strip()
    }


def test_every_section_occurs_once_and_in_order(card):
    text = card(KNOWN)
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == SECTIONS
    assert text.startswith("# resnet10t, trained by BINGO\n\n`net.safetensors` is a backbone without a classifier, exported to timm. ")
    assert "64 pooled features. Not read back: why.\n" in text
    assert "```python\nimport timm\n```" in text
    assert "short side resized to 256 pixels (bilinear, antialiased), then a centre crop of 224 x 224" in text
    assert "mean [0.485, 0.456, 0.406] and standard deviation [0.229, 0.224, 0.225]" in text
    assert text == card(KNOWN), "the card contains no time"
    assert text.endswith(".\n")


def test_known_settings_of_the_training_are_described(card):
    text = card(
        KNOWN, **MADE, revision="v1-3-gabc", params={"distill": {"lr": 0.06, "augment": {"crop_scale": [0.2, 1.0]}}, "bingo": {"t": 0.2}}
    )
    found = rows(text, "Training")
    assert found["method"] == "BINGO"
    assert found["epochs"] == "200"
    assert found["data"] == "folder, 1,281,167 training images"
    assert found["listing's fingerprint"] == "11aa"
    assert found["teacher"] == f"resnet50, width 2, stem imagenet, from checkpoint; sha256 {'ab' * 32}"
    assert found["bags"] == "clusters 5, method kmeans"
    assert found["parameters: distill"] == "augment.crop_scale [0.2, 1], lr 0.06"
    assert found["parameters: bingo"] == "t 0.2"
    assert found["revision"] == "v1-3-gabc"
    assert "the images (folder) and the teacher's weights (checkpoint: resnet50)" in text


def test_weights_of_the_best_epoch_name_it_and_the_probe_that_chose_it(card):
    assert "weights of epoch" not in rows(card(KNOWN), "Training")
    cell = rows(card(KNOWN, **MADE, best={"epoch": 150, "knn_10": 71.26}), "Training")["weights of epoch"]
    assert cell.startswith("150,")
    assert "k-NN, k = 10: 71.3 %" in cell


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"source": "timm", "weights": "resnet50.a1_in1k"}, "from timm (resnet50.a1_in1k); sha256"),
        ({"source": "random", "pretrained": False}, "from random, WITHOUT trained weights; sha256"),
        ({"source_sha256": "cd" * 32}, f"; sha256 of the checkpoint it came from: {'cd' * 32}"),
    ],
)
def test_the_source_of_the_teacher_is_named(card, facts, says):
    provenance = Provenance(teacher={**TEACHER, **facts}, teacher_sha256="ab" * 32)
    assert says in rows(card(provenance), "Training")["teacher"]


@pytest.mark.parametrize(
    ("latencies", "says"),
    [
        ([("8", "7.9"), ("90", "100.5")], "slower there than the float32 network at batch 32;"),
        ([("8", "9"), ("90", "1e+02")], "slower there than the float32 network at batch 1 and batch 32;"),
        ([("8", "8"), ("9", "8.99")], None),
        ([("", "8"), ("", "9")], None),  # only a float32 file was measured
    ],
)
def test_a_file_that_was_measured_to_be_slower_is_called_slower(backbone, latencies, says):
    measured = [(f"latency at batch {batch}, ms", *both) for batch, both in zip((1, 32), latencies, strict=True)]
    network = StoredNetwork(backbone, {**SHAPE, **IMAGE, **MADE}, ImageParams(**IMAGE))
    card = model_card(network, "onnx", "net.onnx", Loading("python", ""), "read", KNOWN, ExportFigures(measured, "a machine"))
    assert says in card if says else "slower" not in card


def test_unknown_facts_are_not_claimed(card):
    text = card(Provenance())
    found = rows(text, "Training")
    assert {found[name] for name in ("data", "teacher", "bags")} == {"not known: it is no longer in this workspace"}
    assert "Not measured in this workspace." in text
    assert "They are derived from the images and the teacher's weights and may inherit their terms." in text


@pytest.mark.parametrize("metadata", [{"method": "moco", "listing": "11aa", "epochs": 3}, {"method": "moco", "embeddings": "22bb"}])
def test_the_card_of_a_method_without_teacher_names_none(card, metadata):
    text = card(KNOWN, **metadata)
    found = rows(text, "Training")
    assert found["teacher"] == "none: MoCo-v2 needs none"
    assert "bags" not in found
    assert "They are derived from the images (folder) and may inherit their terms." in text


def test_an_unknown_method_is_assumed_to_have_a_teacher(card):
    found = rows(card(KNOWN, method="of 2031", embeddings="22bb"), "Training")
    assert found["method"] == "of 2031"
    assert found["teacher"].startswith("resnet50")


def test_special_characters_in_names_do_not_break_the_table(card):
    found = card(Provenance(dataset="a|b\nc", train_images=1))
    assert "| data | a\\|b c, 1 training images |" in found


# ---- figures


def test_figures_are_rows_of_measures_and_columns_of_networks(card):
    linear = {"cached": {"student": {"top1_last": 64.0, "top5_last": 85.7}, "teacher": {"top1_last": 71.1, "top5_last": 90.0}}}
    knn = {"student": {"knn_200": 57.5, "knn_10": 60.25}, "untrained": {"knn_10": 3.125}, "moco": {"knn_10": 1.0}}
    text = card(Provenance(net="student", scores=score_rows(linear, knn)))
    assert text.partition("## Accuracy\n\n")[2].partition("\n\n")[0].splitlines() == [
        "| percent of the test images | this network | teacher | the same network untrained |",
        "| --- | ---: | ---: | ---: |",
        "| linear layer on stored features, top-1 | 64.00 | 71.10 |  |",
        "| linear layer on stored features, top-5 | 85.70 | 90.00 |  |",
        "| k-NN, k = 10 | 60.25 |  | 3.12 |",
        "| k-NN, k = 200 | 57.50 |  |  |",
    ]


def test_measures_are_in_the_order_of_k_then_plain_weighted_agreement():
    keys = ["agreement_10", "agreement_1", "knn_200", "knn_20_weighted", "knn_5"]
    names = [name for name, _ in score_rows({}, {"student": dict.fromkeys(keys, 1.0), "teacher": {"knn_20": 4.0}})]
    agreement = [f"agreement with the teacher, k = {k}" for k in (1, 10)]
    assert names[-6:] == ["k-NN, k = 5", "k-NN, k = 20", "k-NN, k = 200", "k-NN, k = 20, weighted votes", *agreement]


def test_another_network_does_not_get_the_students_figures(card):
    text = card(Provenance(net="", scores=score_rows({}, {"student": {"knn_10": 60.0}})))
    assert "Not measured in this workspace." in text
    assert "60.00" not in text
