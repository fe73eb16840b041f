"""The built-in networks are the published ones: parameters, FLOPs, shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_frame.bench.flops import count_flops, forward_flops, training_flops
from torch_frame.bench.models import MODELS, InvertedResidual, build

# torchvision's documentation of the models' weights, 2026-11-27: parameters, and "GFLOPS", which are 1e9 multiply-adds.
PUBLISHED = {
    "vgg16": (138_357_544, 15.47),
    "resnet18": (11_689_512, 1.81),
    "resnet50": (25_557_032, 4.09),
    "resnet101": (44_549_160, 7.80),
    "resnet152": (60_192_808, 11.51),
    "mobilenet_v2": (3_504_872, 0.30),
}


def test_every_network_of_1_7_is_there() -> None:
    assert set(MODELS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    num_parameters, giga_multiply_adds = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    multiply_adds = forward_flops(model, (1, 3, 224, 224)) / 2e9
    assert round(multiply_adds, 2) == pytest.approx(giga_multiply_adds, abs=0.0101)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_batch_becomes_scores_and_trains(name: str) -> None:
    model = build(name, num_classes=7)
    images = torch.randn(2, 3, 64, 64)
    scores = model(images)
    assert scores.shape == (2, 7)
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model_type is 'resnet34'; it has to be one of 'vgg16', 'resnet18'"):
        build("resnet34")


def test_inverted_residuals_add_their_input_only_if_the_shape_is_the_same() -> None:
    assert InvertedResidual(8, 8, 1, 6).adds_input
    assert not InvertedResidual(8, 8, 2, 6).adds_input
    assert not InvertedResidual(8, 16, 1, 6).adds_input


# ---------------------------------------------------------------- FLOPs by hand


def test_flops_of_a_convolution_are_those_counted_by_hand() -> None:
    model = nn.Conv2d(3, 8, 5, stride=2, padding=2, groups=1)
    # 2 operations for each of 3 x 5 x 5 weights, at 4 x 8 x 16 x 16 places
    assert forward_flops(model, (4, 3, 32, 32)) == 2 * 3 * 5 * 5 * 4 * 8 * 16 * 16


def test_flops_of_a_depthwise_convolution_see_one_channel_a_filter() -> None:
    model = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    assert forward_flops(model, (2, 6, 10, 10)) == 2 * 3 * 3 * 2 * 6 * 10 * 10


def test_backward_has_a_gradient_of_the_weights_and_one_of_the_inputs_but_the_first_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    first, second = 2 * 3 * 8 * 64, 2 * 8 * 4 * 64  # of 8 x 8 places
    assert training_flops(model, (1, 3, 8, 8)) == 2 * first + 3 * second


def test_flops_of_a_linear_layer_and_its_backward() -> None:
    layer = nn.Linear(5, 7)
    inputs = torch.randn(3, 5, requires_grad=True)
    assert count_flops(lambda: layer(inputs).sum().backward()) == 3 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_counts_on_the_cpu_too(device: str) -> None:
    query = torch.randn(2, 3, 16, 8, device=device, requires_grad=True)

    def forward() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, query, query)

    product = 2 * 2 * 3 * 16 * 16 * 8  # queries by keys, or scores by values
    assert count_flops(forward) == 2 * product
    # backward: 4 products; a fused kernel makes the scores once more
    assert count_flops(lambda: forward().sum().backward()) == {"cpu": 2 + 5, "meta": 2 + 4}[device] * product


def test_attention_layers_count_the_same_without_gradients() -> None:
    """torch's fast path for them is one kernel, of which its counter knows nothing."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    attention, inputs = layer.self_attn, torch.randn(1, 4, 8)
    for work in (lambda: layer(inputs), lambda: attention(inputs, inputs, inputs, need_weights=False)):
        with_gradients = count_flops(work)
        with torch.no_grad():
            assert count_flops(work) == with_gradients > 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_inference_mode_counts_as_well() -> None:
    with torch.inference_mode():
        assert forward_flops(nn.Linear(4, 4), (1, 3, 2, 4)) == 2 * 4 * 4 * 6
