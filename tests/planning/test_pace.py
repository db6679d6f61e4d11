"""The pace of a machine, from a given time of each trial."""

from pathlib import Path

import pytest
import torch

from bingo.params import load_params
from bingo.planning import pace
from bingo.planning.pace import Network, feature_width, flops_in_a_second, layer_seconds, network_flops, searched_in_a_second

LAYER = load_params(Path(__file__).parents[2] / "params.yaml").linear_eval.cached
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_seconds(monkeypatch) -> None:
    """Every trial runs once, and is said to take two seconds."""

    def seconds_of(work, *_) -> float:
        work()
        return 2.0

    monkeypatch.setattr(pace, "_seconds_of", seconds_of)


def test_flops_are_those_of_the_batch_three_times_in_training():
    network = Network("resnet10t", 0.125, "small")
    of_image = network_flops(network, 16)
    assert flops_in_a_second(network, 16, 4, CPU) == 4 * of_image / 2
    assert flops_in_a_second(network, 16, 4, CPU, training=True) == 3 * 4 * of_image / 2


@pytest.mark.parametrize("width", [64, 1280])
def test_a_search_is_a_product_of_all_queries_and_rows(monkeypatch, width):
    sizes = []
    monkeypatch.setattr(pace, "top_k", lambda queries, base, k: sizes.append((queries.shape, base.shape)))
    found = searched_in_a_second(width, CPU)
    (((queries, of_query), (rows, of_row)),) = sizes
    assert of_query == of_row == width
    assert found == 2 * queries * rows * width / 2


@pytest.mark.parametrize("classes", [2, 1000])
def test_a_layer_takes_the_seconds_of_its_epochs(monkeypatch, classes):
    of_image, of_feature = layer_seconds(LAYER, classes, CPU)
    assert (of_image, of_feature) == (2 / (2 * 2048) * LAYER.epochs, 0), "both widths took as long"
    monkeypatch.setattr(pace, "_layer_seconds", lambda width, *_: 3e-5 + 4e-6 * width)
    assert layer_seconds(LAYER, classes, CPU) == pytest.approx((3e-5, 4e-6))


@pytest.mark.parametrize(("arch", "width", "features"), [("resnet18", 0.5, 256), ("vit_tiny_patch16_224", 1.0, 192)])
def test_feature_widths(arch, width, features):
    assert feature_width(Network(arch, width, "imagenet")) == features
