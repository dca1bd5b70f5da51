"""The engine: the model's own results for one shape, and a clear no to every other."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tetra.config import ConfigError, HeadConfig, ModelConfig
from tetra.engine import Engine
from tetra.errors import ImageError
from tetra.kernels import backend, native
from tetra.model import TetraModel


@pytest.fixture(scope="module", autouse=True)
def _forget_measurements() -> Iterator[None]:
    """What engines measure of the kernels holds for the process; other tests shall not see it."""
    yield
    native.reset()


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def pixels(batch: int = 2, size: tuple[int, int] = (32, 32), dtype: torch.dtype = torch.uint8) -> Tensor:
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    return images if dtype == torch.uint8 else images / 255.0


def storages(model: torch.nn.Module) -> dict[str, int]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors}


@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("rest", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_results_are_those_of_the_model(
    device: str, dtype: torch.dtype, rest: torch.dtype, image_dtype: torch.dtype, tiny_model: TetraModel
) -> None:
    model = tiny_model.pack(rest).to(device)
    engine = Engine(model, 2, dtype=dtype, image_dtype=image_dtype).warm_up()
    model.compute_dtype = dtype
    for _ in range(3):  # replays with new images
        images = pixels(dtype=image_dtype).to(device)
        descriptors, codes = engine(images), engine.describe(images)
        assert descriptors.dtype == dtype
        assert torch.equal(descriptors, model(images))
        assert torch.equal(codes, model.describe(images))


@pytest.mark.parametrize("size", [(16, 48), (48, 32)])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_another_image_size(device: str, size: tuple[int, int], tiny_model: TetraModel) -> None:
    model = tiny_model.pack(torch.float16).to(device)
    engine = Engine(model, 1, size, dtype=torch.float32).warm_up()
    images = pixels(1, size).to(device)
    assert torch.equal(engine(images), model(images))
    assert model.image_size == (32, 32)


@pytest.mark.parametrize("kind", ["boq", "salad", "mixvpr", "gem"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_every_head(device: str, kind: Any, tiny_config: ModelConfig) -> None:
    options: dict[str, dict[str, Any]] = {
        "boq": {"channels": 32, "n_queries": 4, "n_heads": 4, "out_rows": 8},
        "salad": {"n_clusters": 3, "cluster_dim": 32, "token_dim": 64, "hidden_dim": 32},
        "mixvpr": {"out_channels": 64, "mix_depth": 1, "out_rows": 4, "grid": (3, 3)},
        "gem": {"out_dim": 256},
    }
    model = TetraModel(ModelConfig("tiny", tiny_config.backbone, HeadConfig(kind, options[kind]))).pack().to(device)
    images = pixels(2).to(device)
    engine = Engine(model, 2, dtype=torch.float32).warm_up()
    assert torch.equal(engine.describe(images), model.describe(images))
    assert torch.equal(engine(images), model(images))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_earlier_results_are_not_overwritten(device: str, tiny_model: TetraModel) -> None:
    engine = Engine(tiny_model, 2, device=device).warm_up()
    first_images = pixels().to(device)
    first = engine(first_images), engine.describe(first_images)
    kept = [t.clone() for t in first]
    engine(pixels().to(device))
    engine.describe(pixels().to(device))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_threads_may_share_an_engine(device: str, tiny_model: TetraModel) -> None:
    engine = Engine(tiny_model, 1, device=device, dtype=torch.float32).warm_up()
    batches = [pixels(1).to(device) for _ in range(12)]
    expected = [engine.describe(images) for images in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine.describe, batches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_plan_says_what_was_measured(tiny_model: TetraModel) -> None:
    engine = Engine(tiny_model, 2)
    assert engine.plan is None
    assert engine.warm_up() is engine
    plan = engine.plan
    assert json.loads(json.dumps(plan)) == plan
    assert plan["device"] == "cpu"
    assert plan["batch"] == 2
    assert plan["image_size"] == [32, 32]
    assert plan["image_dtype"] == "uint8"
    assert plan["backend"] == backend.backend_for(torch.zeros(1))
    assert plan["cuda_graph"] is False
    assert plan["threads"] == torch.get_num_threads()
    if plan["backend"] == "native" and os.environ.get("TETRA_BACKEND", "auto") == "auto":
        assert {kernel["chosen"] for kernel in plan["kernels"].values()} <= {"native", "torch"}
        assert "ternary_linear" in plan["kernels"]
    assert set(plan["measured_ms"]) == {"float32", "bfloat16"}
    assert plan["dtype"] == min(plan["measured_ms"], key=plan["measured_ms"].get)
    assert str(engine(pixels()).dtype) == f"torch.{plan['dtype']}"
    engine.warm_up()
    assert engine.plan is plan


def test_a_named_dtype_is_not_measured(tiny_model: TetraModel) -> None:
    plan = Engine(tiny_model, dtype=torch.float16).warm_up().plan
    assert plan is not None
    assert plan["dtype"] == "float16"
    assert plan["measured_ms"] == {}


@pytest.mark.parametrize("packed", [True, False])
def test_the_model_is_left_as_it_is(packed: bool, tiny_model: TetraModel) -> None:
    model = tiny_model.pack(torch.float16) if packed else tiny_model.train()
    before = {name: (t.dtype, t.clone()) for name, t in model.state_dict().items()}
    where = storages(model)
    Engine(model, 1, (16, 48), dtype=torch.bfloat16).warm_up().describe(pixels(1, (16, 48)))
    assert model.compute_dtype == torch.float32
    assert model.is_packed == packed
    assert model.training != packed
    assert model.image_size == (32, 32)
    assert storages(model) == where
    for name, tensor in model.state_dict().items():
        assert (tensor.dtype, True) == (before[name][0], torch.equal(tensor, before[name][1])), name


def test_weights_are_shared_where_they_rest_in_the_dtype_asked_for(tiny_model: TetraModel) -> None:
    for rest, dtype in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)):
        model = tiny_model.pack(rest)
        engine = Engine(model, 1, dtype=dtype).warm_up()
        assert engine._model is not None
        ours, theirs = storages(model), storages(engine._model)
        own = {name for name in ours if ours[name] != theirs[name]}
        assert {name for name in ours if ".packed" in name}.isdisjoint(own)
        assert ("head.project.weight" in own) == (rest != dtype)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_casting_the_model_leaves_the_engine_alone(device: str, tiny_model: TetraModel) -> None:
    model = tiny_model.pack().to(device)
    engine = Engine(model, 2, dtype=torch.float32).warm_up()
    images = pixels().to(device)
    expected = engine(images)
    model.rest_to(torch.float16)
    model.to("cpu")
    assert torch.equal(engine(images), expected)


@pytest.mark.parametrize("rest", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_other_weights_are_noticed(device: str, rest: torch.dtype, tiny_model: TetraModel) -> None:
    """Or an engine would see of them only those that it shares with the model."""
    model = tiny_model.pack(rest).to(device)
    engine = Engine(model, 2, dtype=torch.bfloat16).warm_up()
    images = pixels().to(device)
    engine(images)
    model.load_state_dict(TetraModel(tiny_model.config).pack(rest).state_dict())
    for call in (engine, engine.describe):
        with pytest.raises(RuntimeError, match="changed in place after warm_up"):
            call(images)
    model.compute_dtype = torch.bfloat16
    assert torch.equal(Engine(model, 2, dtype=torch.bfloat16).warm_up()(images), model(images))


def test_a_model_loaded_in_inference_mode_runs(tiny_model: TetraModel) -> None:
    """Its weights count no changes."""
    with torch.inference_mode():
        model = copy.deepcopy(tiny_model).pack()
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    images = pixels()
    assert torch.equal(Engine(model, 2, dtype=torch.float32).warm_up()(images), tiny_model.pack()(images))


def test_the_default_device_does_not_matter(tiny_model: TetraModel) -> None:
    with torch.device("meta"):
        engine = Engine(tiny_model, 2).warm_up()
    assert engine.describe(pixels()).shape == (2, 8)


def test_a_trainable_model_is_packed(tiny_model: TetraModel) -> None:
    engine = Engine(tiny_model.train(), 2, dtype=torch.float32).warm_up()
    images = pixels()
    assert torch.equal(engine.describe(images), tiny_model.pack().describe(images))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"shape \(1, 3, 32, 32\).*fixed to \(2, 3, 32, 32\)"),
        (torch.zeros(3, 3, 32, 32, dtype=torch.uint8), r"shape \(3, 3, 32, 32\).*fixed to \(2, 3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 48, dtype=torch.uint8), r"shape \(2, 3, 32, 48\).*fixed to \(2, 3, 32, 32\)"),
        (torch.zeros(2, 3, 32, dtype=torch.uint8), r"shape \(2, 3, 32\).*fixed to \(2, 3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32), "torch.float32, but this engine is fixed to torch.uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int8), "torch.int8, but this engine is fixed to torch.uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="meta"), "images are on meta, but this engine is on"),
    ],
)
def test_images_that_are_refused(device: str, images: Tensor, words: str, tiny_model: TetraModel) -> None:
    engine = Engine(tiny_model, 2, device=device, dtype=torch.float32).warm_up()
    images = images if images.is_meta else images.to(device)
    for call in (engine, engine.describe):
        with pytest.raises(ImageError, match=words):
            call(images)


def test_images_beyond_the_range_are_refused(tiny_model: TetraModel) -> None:
    engine = Engine(tiny_model, 1, image_dtype=torch.float32).warm_up()
    with pytest.raises(ImageError, match="values up to 255"):
        engine.describe(torch.full((1, 3, 32, 32), 255.0))


def test_nothing_runs_before_the_warm_up(tiny_model: TetraModel) -> None:
    engine = Engine(tiny_model, 2)
    for call in (engine, engine.describe):
        with pytest.raises(RuntimeError, match=r"call its warm_up\(\)"):
            call(pixels())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch": 0}, "batch: is 0"),
        ({"batch": 1.5}, "batch: is 1.5, wanted 1 or more"),
        ({"batch": "2"}, "batch: is '2', wanted 1 or more"),
        ({"image_size": (32,)}, r"image_size: is \(32,\), wanted \(height, width\)"),
        ({"image_size": 32}, r"image_size: is 32, wanted \(height, width\)"),
        ({"image_size": (32.5, 32)}, r"image_size: is \(32.5, 32\), wanted"),
        ({"dtype": torch.float64}, "dtype: is torch.float64, wanted one of torch.float32"),
        ({"dtype": torch.int8}, "dtype: is torch.int8"),
        ({"image_dtype": torch.float16}, "image_dtype: is torch.float16, wanted torch.uint8 or torch.float32"),
        ({"image_size": (32, 40)}, "image size 32x40"),
        ({"device": "meta"}, "device: is meta, wanted cpu or cuda"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], words: str, tiny_model: TetraModel) -> None:
    with pytest.raises(ValueError, match=words):
        Engine(tiny_model, **arguments)


def test_a_missing_gpu_is_named(tiny_model: TetraModel) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="device: is cuda, but PyTorch finds no GPU here"):
        Engine(tiny_model, device="cuda")


def test_a_model_without_a_head_is_refused(tiny_config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="has no head"):
        Engine(TetraModel(ModelConfig("bare", tiny_config.backbone)))


def test_descriptors_that_are_not_finite_are_refused(tiny_model: TetraModel) -> None:
    packed = tiny_model.pack()
    packed.head.project.bias.data[3] = torch.nan  # type: ignore[union-attr, operator]
    engine = Engine(packed, 2, dtype=torch.float32).warm_up()
    with pytest.raises(ValueError, match="descriptor 0 of the batch has NaN"):
        engine.describe(pixels())


# --- GPU ---


@pytest.mark.gpu
def test_the_plan_on_a_gpu(tiny_model: TetraModel) -> None:
    plan = Engine(tiny_model, 2, device="cuda").warm_up().plan
    assert plan is not None
    assert plan["cuda_graph"] is True
    assert plan["dtype"] == "float16"
    assert plan["device"] == f"cuda:{torch.cuda.current_device()}"
    assert json.loads(json.dumps(plan)) == plan


@pytest.mark.gpu
def test_replays_take_no_new_memory(tiny_model: TetraModel) -> None:
    engine = Engine(tiny_model, 2, device="cuda").warm_up()
    images = pixels().cuda()
    engine.describe(images)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        engine.describe(images)
        engine(images)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_calls_from_several_streams_keep_their_results(tiny_model: TetraModel) -> None:
    engine = Engine(tiny_model, 1, device="cuda", dtype=torch.float32).warm_up()
    batches = [pixels(1).cuda() for _ in range(8)]
    expected = [engine(images) for images in batches]
    torch.cuda.synchronize()
    found = []
    for images in batches:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(engine(images))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_a_gpu_without_compiled_kernels_is_refused(tiny_model: TetraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRA_BACKEND", "torch")
    with pytest.raises(RuntimeError, match="runs without compiled kernels"):
        Engine(tiny_model, device="cuda")


@pytest.mark.gpu
def test_images_of_another_device_are_refused(tiny_model: TetraModel) -> None:
    engine = Engine(tiny_model, 2, device="cuda").warm_up()
    with pytest.raises(ImageError, match="images are on cpu, but this engine is on cuda"):
        engine.describe(pixels())
