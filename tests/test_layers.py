"""Ternary layers: the formula, the packed twin, and modes that never destroy weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tetra.config import ModelConfig
from tetra.layers import (
    Conv2d,
    LayerNorm,
    Linear,
    PackedTernaryLinear,
    TernaryLinear,
    name_layers,
    norm_linear,
    resized,
    resized_by_product,
    set_lambda,
    train_linear,
)
from tetra.model import TetraModel

# (in, out, leading shape of the input): below, at and beyond the 128 values of a packed group.
CASES = [(1, 1, (1,)), (5, 3, (2, 4)), (127, 9, (3,)), (128, 16, (2, 1, 5)), (129, 40, (7,)), (300, 33, (1, 11))]


def codes_of(weight: Tensor) -> tuple[np.ndarray, float]:
    w = weight.detach().double().numpy()
    scale = max(float(np.abs(w).mean()), 1e-5)
    return np.clip(np.round(w / scale), -1, 1), scale


def integer_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> np.ndarray:
    """y = (x_q . W_t^T) / (a s) + bias, with exact integers and float64 scales."""
    codes, w_scale = codes_of(weight)
    values = x.detach().double().numpy()
    a = 127.0 / np.maximum(np.abs(values).max(-1, keepdims=True), 1e-5)
    x_q = np.clip(np.round(values * a), -128, 127).astype(np.int64)
    y = (x_q @ codes.astype(np.int64).T) / a * w_scale
    return y if bias is None else y + bias.detach().double().numpy()


def ternary(n_in: int, n_out: int, bias: bool = True, lam: float = 1.0) -> TernaryLinear:
    layer = TernaryLinear(n_in, n_out, bias)
    layer.lam = lam
    return layer.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n_in", "n_out", "lead"), CASES)
def test_inference_is_the_integer_formula(n_in: int, n_out: int, lead: tuple[int, ...], bias: bool) -> None:
    layer = ternary(n_in, n_out, bias)
    x = torch.randn(*lead, n_in)
    y = layer(x)
    expected = integer_linear(x, layer.weight, layer.bias)
    assert y.shape == (*lead, n_out)
    assert y.dtype == torch.float32
    # The scales are a few float32 roundings away from the exact ones.
    tolerance = 8 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=0, atol=tolerance)
    assert torch.equal(y, layer.pack()(x))


@pytest.mark.parametrize(("n_in", "n_out", "lead"), CASES)
def test_training_at_lambda_1_agrees_with_inference(n_in: int, n_out: int, lead: tuple[int, ...]) -> None:
    layer = ternary(n_in, n_out)
    x = torch.randn(*lead, n_in)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.9999])
def test_blended_forward_and_gradients(lam: float, training: bool) -> None:
    layer = TernaryLinear(30, 20).double().train(training)
    layer.lam = lam
    x = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    codes, scale = codes_of(layer.weight)
    w = layer.weight.detach().numpy()
    w_blend = torch.from_numpy(w + lam * (codes * scale - w))
    a = 127.0 / x.detach().abs().amax(-1, keepdim=True)
    x_blend = x.detach() + lam * ((x.detach() * a).round() / a - x.detach())
    torch.testing.assert_close(y, F.linear(x_blend, w_blend, layer.bias), rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    # Straight through: the gradients are those of the blended operands.
    torch.testing.assert_close(x.grad, upstream @ w_blend, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, upstream.T @ x_blend, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n_in", "n_out", "lead"), CASES)
def test_gradients_of_evaluation_are_those_of_training(
    n_in: int, n_out: int, lead: tuple[int, ...], bias: bool
) -> None:
    layer = TernaryLinear(n_in, n_out, bias)
    x = torch.randn(*lead, n_in)
    upstream = torch.randn(*lead, n_out)
    gradients = []
    for training in (True, False):
        copied, inputs = copy.deepcopy(layer).train(training), x.clone().requires_grad_()
        copied(inputs).backward(upstream)
        gradients.append([inputs.grad, *(p.grad for p in copied.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_gradients_reach_only_what_wants_them(frozen: str) -> None:
    layer = ternary(9, 4)
    x = torch.randn(3, 9).requires_grad_(frozen != "input")
    if frozen != "input":
        getattr(layer, frozen).requires_grad_(False)
    layer(x).sum().backward()
    found = {"weight": layer.weight.grad, "bias": layer.bias.grad, "input": x.grad}
    assert {name for name, grad in found.items() if grad is None} == {frozen}


def test_degenerate_inputs_and_weights() -> None:
    layer = ternary(8, 4)
    x = torch.zeros(3, 8)
    x[1] = 2.5
    y = layer(x)
    assert torch.equal(y[0], layer.bias)
    np.testing.assert_allclose(y.detach().numpy(), integer_linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer(torch.randn(2, 8)), layer.bias.expand(2, 4))
    with torch.no_grad():
        layer.weight[1] = 1.0  # one constant row among zero rows
    codes, scale = codes_of(layer.weight)
    assert layer.pack().weight_scale.item() == pytest.approx(scale)
    assert (codes[1] == 1).all()
    assert torch.equal(layer(torch.randn(2, 8))[:, 0], layer.bias[0].expand(2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_non_finite_parameters_are_refused_by_name(part: str, value: float, tiny_model: TetraModel) -> None:
    layer = tiny_model.backbone.blocks[0].mlp.up
    with torch.no_grad():
        getattr(layer, part).view(-1)[3] = value
    with pytest.raises(ValueError, match=r"layer 'backbone\.blocks\.0\.mlp\.up'.*NaN or infinite"):
        tiny_model.pack()
    with pytest.raises(ValueError, match=r"layer 'backbone\.blocks\.0\.mlp\.up'.*NaN or infinite"):
        tiny_model.eval()(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_training_refuses_non_finite_weights_by_name(value: float, lam: float, tiny_model: TetraModel) -> None:
    set_lambda(tiny_model, lam)
    with torch.no_grad():
        tiny_model.backbone.blocks[0].mlp.up.weight.view(-1)[3] = value
    with pytest.raises(ValueError, match=r"layer 'backbone\.blocks\.0\.mlp\.up'.*NaN or infinite"):
        tiny_model.train()(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("packed", [True, False])
def test_non_finite_inputs_are_refused_by_name(packed: bool, value: float) -> None:
    model = nn.Sequential(ternary(6, 4))
    name_layers(model)
    layer = model[0].pack() if packed else model[0]
    x = torch.randn(3, 6)
    x[1, 2] = value
    with pytest.raises(ValueError, match=r"layer '0': .*row 1.*NaN or infinity"):
        layer(x)


# --- the fused path ---


def layer_norm64(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    t = x.double()
    centred = t - t.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight.detach().double() + norm.bias.detach().double()


def norm_and_layer(n_in: int, n_out: int, bias: bool = True) -> tuple[LayerNorm, TernaryLinear]:
    norm = LayerNorm(n_in)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.2)
        norm.bias.normal_(0.0, 0.2)
    return norm.requires_grad_(False), ternary(n_in, n_out, bias).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("n_in", "n_out", "lead"), CASES)
def test_norm_and_layer_fused_are_the_formula(
    n_in: int, n_out: int, lead: tuple[int, ...], packed: bool, dtype: torch.dtype
) -> None:
    norm, layer = norm_and_layer(n_in, n_out)
    x, residual = torch.randn(*lead, n_in).to(dtype), torch.randn(*lead, n_out).to(dtype)
    values = layer_norm64(x, norm)
    plain = torch.from_numpy(integer_linear(values, layer.weight, layer.bias))
    # An activation at the border of two codes may fall to either: two steps of one weight are granted.
    step = values.abs().amax(-1, keepdim=True) / 127 * codes_of(layer.weight)[1]
    gelu = 0.5 * plain * (1 + torch.erf(plain / math.sqrt(2)))
    scaled = plain.clone()
    scaled[..., : n_out // 2] *= 0.125
    for options, expected in (
        ({}, plain),
        ({"gelu": True, "residual": residual}, gelu + residual.double()),
        ({"scaled_columns": n_out // 2, "column_scale": 0.125}, scaled),
    ):
        y = norm_linear(x, norm, layer.pack() if packed else layer, **options)  # type: ignore[arg-type]
        assert y.dtype == dtype
        assert y.shape == (*lead, n_out)
        error = (y.double() - expected).abs()
        assert (error <= 2.5 * step + torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["input", "norm"])
def test_the_fused_path_refuses_non_finite_values_by_name(part: str, value: float) -> None:
    norm, layer = norm_and_layer(6, 4)
    layer.layer_name = "blocks.3.up"
    x = torch.randn(2, 6)
    (x[1] if part == "input" else norm.weight.data)[2] = value
    with pytest.raises(ValueError, match=r"layer 'blocks\.3\.up': .*NaN or infinity"):
        norm_linear(x, norm, layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rest", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 64, 300])
def test_layer_norm_with_and_without_a_gradient(width: int, rest: torch.dtype, dtype: torch.dtype) -> None:
    norm, _ = norm_and_layer(width, 1)
    norm = norm.to(rest)
    x = torch.randn(3, 2, width).to(dtype)
    expected = layer_norm64(x, norm)
    for wants_gradient in (True, False):
        y = norm.requires_grad_(wants_gradient)(x)
        assert y.requires_grad == wants_gradient
        assert y.dtype == dtype
        # Composed, the parameters are rounded to the dtype of the input first.
        torch.testing.assert_close(
            y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-5 + torch.finfo(dtype).eps
        )


def test_a_layer_without_a_name_still_says_what_it_is() -> None:
    layer = ternary(6, 4)
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer 'TernaryLinear'"):
        layer.pack()


# --- training, fused and composed ---


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.usefixtures("fused_training")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lam", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("n_in", "n_out", "lead"), CASES[1:])
def test_training_fused_is_training_composed(
    n_in: int,
    n_out: int,
    lead: tuple[int, ...],
    gelu: bool,
    with_norm: bool,
    lam: float | None,
    autocast: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm, layer = norm_and_layer(n_in, n_out)
    linear = Linear(n_in, n_out) if lam is None else layer
    if isinstance(linear, TernaryLinear):
        linear.lam = lam
    pair = nn.ModuleList([norm, linear]).requires_grad_(True).train()
    upstream = torch.randn(*lead, n_out)
    results = []
    # In float32, and against it the fused path in bfloat16: both composed paths round every step.
    for backend, dtype in (("torch", torch.float32), ("auto", torch.bfloat16 if autocast else torch.float32)):
        monkeypatch.setenv("TETRA_BACKEND", backend)
        copied = copy.deepcopy(pair)
        x = torch.linspace(-2, 2.5, math.prod(lead) * n_in).reshape(*lead, n_in).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = train_linear(x, copied[1], copied[0] if with_norm else None, gelu=gelu)
        assert y.dtype == dtype
        y.backward(upstream.to(dtype))
        results.append([y, x.grad, *(p.grad for p in copied.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 4 + 2 * with_norm
    for composed, found in zip(*results, strict=True):
        assert found.shape == composed.shape
        assert relative_error(found, composed) < (3e-2 if autocast else 1e-3)


@pytest.mark.usefixtures("fused_training")
def test_training_fused_keeps_the_input_alone() -> None:
    norm, layer = norm_and_layer(96, 64)
    layer.lam = 0.5
    nn.ModuleList([norm, layer]).requires_grad_(True).train()
    x = torch.randn(10, 96, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        train_linear(x, layer, norm, gelu=True, dropout=nn.Dropout(0.1))
    ours = {t.data_ptr() for t in (x, layer.weight, norm.weight, norm.bias)}
    assert sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in ours) <= 8  # the seed


@pytest.mark.usefixtures("fused_training")
def test_dropout_of_the_fused_path_follows_the_generator() -> None:
    layer = TernaryLinear(200, 300)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(300, 200))
        layer.bias.zero_()
    layer.lam = 0.0
    x, dropout = torch.rand(50, 200) + 1.0, nn.Dropout(0.25)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return train_linear(x, layer, dropout=dropout)[:, :200].detach()

    y = draw(1)
    torch.testing.assert_close(y, torch.where(y > 0, x / 0.75, 0.0))
    assert 0.72 < float((y > 0).float().mean()) < 0.78
    assert torch.equal(draw(1), y)
    assert not torch.equal(draw(2), y)
    following = train_linear(x, layer, dropout=dropout)[:, :200].detach()
    assert not torch.equal(following, draw(2))  # the next call draws another mask
    dropout.eval()
    torch.testing.assert_close(draw(1), x)


# --- modes never destroy weights ---


ACTIONS: dict[str, Callable[[TetraModel, float], object]] = {
    "train": lambda m, _: m.train(),
    "eval": lambda m, _: m.eval(),
    "pack": lambda m, _: m.pack(),
    "pack in half": lambda m, _: m.pack(torch.float16),
    "describe": lambda m, _: m.describe(torch.rand(1, 3, 32, 32)),
    "forward": lambda m, _: m(torch.rand(2, 3, 32, 32)),
    "lambda": lambda m, x: set_lambda(m, x),
    "half copy": lambda m, _: copy.deepcopy(m).half(),
    "bfloat16 copy": lambda m, _: copy.deepcopy(m).to(torch.bfloat16).float(),
    "packed copy in train mode": lambda m, _: copy.deepcopy(m.pack()).train(),
    "freeze": lambda m, _: m.requires_grad_(False),
}


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.tuples(st.sampled_from(sorted(ACTIONS)), st.floats(0, 1)), max_size=8))
def test_modes_in_any_order_leave_the_weights_alone(actions: list[tuple[str, float]], tiny_config: ModelConfig) -> None:
    torch.manual_seed(3)
    model = TetraModel(tiny_config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.rand(2, 3, 32, 32)
    expected = model.pack()(images)
    for name, value in actions:
        ACTIONS[name](model, value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
        assert tensor.dtype == after[name].dtype
    set_lambda(model, 1.0)
    assert torch.equal(model.eval()(images), expected)


def optimise(layer: TernaryLinear, **options: object) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.3, **options)  # type: ignore[arg-type]
    layer.train()(torch.randn(5, layer.in_features)).square().sum().backward()
    optimizer.step()
    layer.eval()


def optimise_in_evaluation(layer: TernaryLinear) -> None:
    """A step without any change of mode, as when the gradient comes from elsewhere."""
    layer.weight.grad = torch.randn_like(layer.weight)
    assert layer.bias is not None
    layer.bias.grad = torch.randn_like(layer.bias)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def load_other(layer: TernaryLinear) -> None:
    layer.load_state_dict(TernaryLinear(layer.in_features, layer.out_features).state_dict())


def assign_other(layer: TernaryLinear) -> None:
    layer.load_state_dict(TernaryLinear(layer.in_features, layer.out_features).state_dict(), assign=True)


def edit_in_place(layer: TernaryLinear) -> None:
    with torch.no_grad():
        layer.weight.mul_(torch.randn_like(layer.weight))
        layer.bias.add_(1.0)


def edit_data(layer: TernaryLinear) -> None:
    layer.weight.data.mul_(torch.randn_like(layer.weight))


def edit_data_then_train(layer: TernaryLinear) -> None:
    edit_data(layer)
    layer.train()
    layer.eval()


def edit_data_then_eval(layer: TernaryLinear) -> None:
    edit_data(layer)
    layer.eval()


def swap_data_twice(layer: TernaryLinear) -> None:
    # The second tensor may lie where the first one did.
    layer.weight.data = torch.randn_like(layer.weight)
    layer.weight.data = torch.randn_like(layer.weight)


def replace_parameter(layer: TernaryLinear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def edit_bias_data(layer: TernaryLinear) -> None:
    assert layer.bias is not None
    layer.bias.data.fill_(3.0)


@pytest.mark.parametrize(
    "change",
    [
        optimise,
        lambda layer: optimise(layer, foreach=True),
        lambda layer: optimise(layer, fused=True),
        optimise_in_evaluation,
        load_other,
        assign_other,
        edit_in_place,
        edit_data,
        edit_data_then_train,
        edit_data_then_eval,
        swap_data_twice,
        replace_parameter,
        edit_bias_data,
    ],
)
@pytest.mark.parametrize("warm", [torch.no_grad, torch.inference_mode])
def test_evaluation_follows_every_change_of_the_weights(
    change: Callable[[TernaryLinear], None], warm: Callable[[], torch.autograd.grad_mode.no_grad]
) -> None:
    layer = ternary(24, 12)
    x = torch.randn(4, 24)
    with warm():
        stale = layer(x).clone()
        layer(x)
    change(layer)
    y = layer(x)
    assert not torch.equal(y, stale)
    assert torch.equal(y, layer.pack()(x))


def test_an_evaluation_of_unchanged_weights_repeats_itself() -> None:
    layer = ternary(24, 12)
    x = torch.randn(4, 24)
    first = layer(x)
    assert torch.equal(layer.train().eval()(x), first)
    assert torch.equal(layer(x), first)


def test_a_model_made_in_inference_mode_evaluates() -> None:
    with torch.inference_mode():
        layer = ternary(24, 12)
        x = torch.randn(4, 24)
        assert torch.equal(layer(x), layer.pack()(x))


def test_copies_do_not_share_what_evaluation_keeps() -> None:
    layer = ternary(24, 12)
    x = torch.randn(4, 24)
    before = layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.neg_()
    assert not torch.equal(twin(x), before)
    assert torch.equal(layer(x), before)
    assert torch.equal(twin(x), twin.pack()(x))


def test_packing_leaves_the_layer_untouched_and_shares_no_memory() -> None:
    layer = TernaryLinear(24, 12).train()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    packed = layer.pack()
    assert layer.training
    assert packed.bias is not None
    packed.bias.data.fill_(7.0)
    packed.packed.zero_()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(p.requires_grad for p in packed.parameters())


def test_state_dicts_hold_nothing_derived() -> None:
    layer = ternary(24, 12)
    layer(torch.randn(2, 24))
    assert set(layer.state_dict()) == {"weight", "bias"}
    packed = layer.pack()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in packed.state_dict().items()} == {
        "packed": (torch.uint8, (12, 32)),
        "weight_scale": (torch.float32, ()),
        "bias": (torch.float32, (12,)),
    }
    assert set(TernaryLinear(24, 12, bias=False).pack().state_dict()) == {"packed", "weight_scale"}


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: copy.deepcopy(m).half().float(),
        lambda m: nn.Sequential(m).half()[0],
    ],
)
def test_the_scale_of_a_packed_layer_stays_float32(
    cast: Callable[[PackedTernaryLinear], PackedTernaryLinear],
) -> None:
    packed = ternary(24, 12).pack()
    scale, weight = packed.weight_scale.clone(), packed.packed.clone()
    after = cast(packed)
    assert after.weight_scale.dtype == torch.float32
    assert torch.equal(after.weight_scale, scale)
    assert after.packed.dtype == torch.uint8
    assert torch.equal(after.packed, weight)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("byte", "words"), [((3, 0), "row 3 holds the illegal code 10"), ((0, 31), "after the 24th")])
def test_loading_illegal_codes_is_refused_by_name(
    assign: bool, byte: tuple[int, int], words: str, tiny_model: TetraModel
) -> None:
    """Backends read an illegal code differently, so none may ever be computed with."""
    packed = nn.ModuleDict({"up": ternary(24, 12).pack()})
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    state["up.packed"][byte] = 0b10 if byte[1] == 0 else 0b01
    with pytest.raises(ValueError, match=f"layer 'up': packed: .*{words}"):
        packed.load_state_dict(state, assign=assign)
    assert not torch.equal(packed["up"].packed, state["up.packed"])  # type: ignore[arg-type]
    model = tiny_model.pack()
    model.load_state_dict(tiny_model.pack().state_dict(), assign=assign)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_layers_compute_in_the_dtype_of_their_input(dtype: torch.dtype) -> None:
    layer = ternary(40, 16)
    packed = layer.pack()
    x = torch.randn(5, 40).to(dtype)
    y = packed(x)
    assert y.dtype == dtype
    expected = integer_linear(x, layer.weight, layer.bias)
    # One rounding to the dtype at the end, over the exact sum.
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(y.detach().double().numpy(), expected, rtol=eps, atol=1e-6)


@pytest.mark.parametrize("rest", [torch.float16, torch.bfloat16])
def test_layers_compute_in_the_dtype_of_their_input(rest: torch.dtype) -> None:
    for layer, x in (
        (Linear(6, 5), torch.randn(2, 6)),
        (Linear(6, 5, bias=False), torch.randn(2, 6)),
        (LayerNorm(6), torch.randn(2, 6)),
        (Conv2d(3, 4, kernel_size=3, padding=1), torch.randn(2, 3, 8, 8)),
    ):
        resting = copy.deepcopy(layer).to(rest)
        y = resting(x)
        assert y.dtype == torch.float32
        # The same as the layer whose float32 parameters were rounded to the rest dtype.
        assert torch.equal(y, copy.deepcopy(resting).float()(x))
        assert resting(x.to(torch.bfloat16)).dtype == torch.bfloat16
        assert next(resting.parameters()).dtype == rest


def test_set_lambda_reaches_every_ternary_layer(tiny_model: TetraModel) -> None:
    set_lambda(tiny_model, 0.25)
    layers = [m for m in tiny_model.modules() if isinstance(m, TernaryLinear)]
    assert len(layers) == 4
    assert all(m.lam == 0.25 for m in layers)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected 0 <= lambda <= 1"):
            set_lambda(tiny_model, bad)


@pytest.mark.parametrize("grid", [(3, 5), (8, 8), (4, 4), (13, 2)])
@pytest.mark.parametrize(
    "resize",
    [
        lambda x, grid: F.interpolate(x, size=grid, mode="bicubic", align_corners=False),
        lambda x, grid: F.interpolate(x, size=grid, mode="bilinear", antialias=True, align_corners=False),
        lambda x, grid: F.adaptive_avg_pool2d(x, grid),
    ],
    ids=["bicubic", "antialiased", "pooled"],
)
def test_resampling_as_a_product(resize: Callable[..., Tensor], grid: tuple[int, int]) -> None:
    """What GPUs do where a gradient is wanted, with the gradient of what everyone else does."""
    maps = torch.randn(2, 3, 8, 6, requires_grad=True)
    found, wanted = resized_by_product(maps, lambda x: resize(x, grid)), resize(maps, grid)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(y, maps, upstream)[0] for y in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert torch.equal(resized(maps, lambda x: resize(x, grid)), wanted)  # on a CPU
