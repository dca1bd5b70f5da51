"""Every configuration that the tuners may choose gives right values: trials on small problems, interpreted."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tetra.autotune.workloads import problems
from tetra.config import BACKBONES
from tetra.kernels.tunable import Trial, all_tunables, bucket

pytest.importorskip("triton")

ROWS = {"m": 5, "k": 200}
ATTENTION = {"b": 1, "t": 70, "n_heads": 2, "head_dim": 32}
TRAINING = {**ATTENTION, "dtype": "float16", "dropout": 0.0}
DISTILLATION = {"b": 2, "t": 40, "student_width": 48, "teacher_width": 72, "dtype": "bfloat16"}
SEARCH = {"n_queries": 3, "n_rows": 600, "n_bytes": 20, "k": 5}
PRODUCT = {"m": 20, "n": 48, "k": 256, "x": "int8", "out": "float16"}
PLAIN = {"bias": False, "gelu": False, "residual": False, "scaled": False}
BLEND = {**ROWS, "x": "float32", "y": "bfloat16", "norm": True, "gelu": True, "dropout": 0.1, "blend": True}

# One problem or more of every kernel. The sizes are small; some end within a tile.
PROBLEMS: list[tuple[str, dict[str, Any]]] = [
    ("ternary_matmul", {**PRODUCT, **PLAIN, "bias": True, "gelu": True}),
    ("ternary_matmul", {**PRODUCT, **PLAIN, "residual": True, "k": 384}),
    ("ternary_matmul", {**PRODUCT, **PLAIN, "scaled": True, "out": "bfloat16"}),
    ("ternary_matmul", {**PRODUCT, **PLAIN, "residual": True, "x": "float16"}),
    ("attention", {**ATTENTION, "dtype": "float16", "prescaled": True}),
    ("attention", {**ATTENTION, "dtype": "bfloat16", "prescaled": False}),
    *(("attention_training", {**TRAINING, "part": part}) for part in ("forward", "queries", "keys")),
    *(("attention_training", {**TRAINING, "part": part, "dropout": 0.25}) for part in ("forward", "queries", "keys")),
    *(("attention_distillation", {**DISTILLATION, "part": part}) for part in ("forward", "gradient")),
    ("sign_similarity", {"b": 9, "d": 300}),
    ("sign_gradient", {"b": 9, "d": 300, "dtype": "float32"}),
    ("sign_gradient", {"b": 16, "d": 64, "dtype": "bfloat16"}),
    ("hamming_popcount", SEARCH),
    ("hamming_planes", SEARCH),
    ("row_quantize", {**ROWS, "dtype": "float16", "norm": False, "gelu": False, "residual": False}),
    ("row_quantize", {**ROWS, "dtype": "bfloat16", "norm": True, "gelu": True, "residual": True}),
    ("layer_norm", {**ROWS, "dtype": "float32", "residual": False}),
    ("layer_norm", {**ROWS, "dtype": "float16", "residual": True}),
    ("residual_dropout", {**ROWS, "residual": "float32", "y": "bfloat16", "out": "float32"}),
    ("residual_dropout", {**ROWS, "residual": None, "y": "float32", "out": "bfloat16"}),
    ("blend_rows", {**BLEND, "part": "forward"}),
    ("blend_rows", {**BLEND, "part": "backward"}),
    ("blend_rows", {**BLEND, "part": "backward", "norm": False}),
    ("blend_weight", {"n": 5000, "x": "float32", "y": "bfloat16"}),
    ("token_loss", {"m": 5, "c": 200, "student": "bfloat16", "teacher": "float32", "part": "forward"}),
    ("token_loss", {"m": 5, "c": 200, "student": "bfloat16", "teacher": "float32", "part": "gradient"}),
    ("patches", {"b": 1, "height": 28, "width": 42, "patch_size": 14, "images": "uint8", "out": "float16"}),
    ("bits", {"rows": 3, "d": 300, "dtype": "float32", "checked": True}),
    ("bits", {"rows": 3, "d": 4200, "dtype": "float16", "checked": False}),
]
NAMES = [f"{name}-{i}" for i, (name, _) in enumerate(PROBLEMS)]


def differences(name: str, sizes: dict[str, Any], step: int) -> dict[tuple[int, ...], str | None]:
    """Of every ``step``-th configuration of the space for sm_90; in the process that interprets."""
    tunable = all_tunables()[name]
    trial = tunable.trial(sizes, torch.device("cpu"))
    expected = trial.expected()
    rows = tunable.space(90, sizes)[::step]
    return {config: trial.difference(trial.run(config), expected) for config in rows}


@pytest.mark.parametrize(("name", "sizes"), PROBLEMS, ids=NAMES)
def test_some_configurations_are_right(interpreter: Callable[..., Any], name: str, sizes: dict[str, Any]) -> None:
    found = interpreter(differences, name, sizes, 4)
    assert found
    assert {config: wrong for config, wrong in found.items() if wrong} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), PROBLEMS, ids=NAMES)
def test_every_configuration_is_right(interpreter: Callable[..., Any], name: str, sizes: dict[str, Any]) -> None:
    assert {config: wrong for config, wrong in interpreter(differences, name, sizes, 1).items() if wrong} == {}


def test_every_kernel_has_a_problem_here() -> None:
    assert {name for name, _ in PROBLEMS} == {name for name, one in all_tunables().items() if one.on == "cuda"}


@pytest.mark.parametrize(("name", "sizes"), PROBLEMS, ids=NAMES)
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_spaces_have_no_doubles_and_hold_the_default(name: str, sizes: dict[str, Any], arch: int) -> None:
    tunable = all_tunables()[name]
    space = tunable.space(arch, sizes)
    assert len(set(space)) == len(space) >= 3
    default = tunable.default(arch, 100, sizes)
    assert default in space
    assert tunable.key(sizes)
    assert tunable.works is not None
    for config in space:
        assert len(config) == len(tunable.fields)
        for work in tunable.works(arch, 100, sizes, config):
            assert work.blocks >= 1
            assert work.iterations >= 0
            assert min(work.operations, work.n_bytes) > 0


def test_keys_tell_dtypes_and_flags_apart() -> None:
    for name, sizes in PROBLEMS:
        key = all_tunables()[name].key
        for field, value in sizes.items():
            if isinstance(value, bool) and not (name == "ternary_matmul" or field == "blend"):
                assert key({**sizes, field: not value}) != key(sizes), (name, field)
            if value in ("float16", "bfloat16"):
                other = "float16" if value == "bfloat16" else "bfloat16"
                assert key({**sizes, field: other}) != key(sizes), (name, field)


def test_a_difference_is_said() -> None:
    ones = torch.ones(3)
    trial = Trial(lambda config: (ones,), lambda: (ones,), atol=(0.1,))
    assert trial.difference((ones,), (ones + 0.05,)) is None
    assert trial.difference((ones, ones), (ones,)) == "gives 2 tensors, wanted 1"
    assert trial.difference((ones[:2],), (ones,)) == "output 0 has shape (2,), wanted (3,)"
    wrong = torch.tensor([1.0, 3.0, torch.nan])
    assert trial.difference((wrong,), (ones,)) == "output 0 differs in 2 of 3 values, by up to inf"
    assert trial.difference((torch.tensor([1, 2]),), (torch.tensor([1, 5]),)) == (
        "output 0 differs in 1 of 2 values, by up to 3"
    )


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(n) for n in (0, 1, 2, 3, 530, 1024, 1025)] == [1, 1, 2, 4, 1024, 1024, 2048]


@pytest.mark.parametrize("arch", [80, 90])
def test_what_is_shown_of_code_tells_it_from_all_other(arch: int) -> None:
    """Reports, and the comparison of two commits, know code by kernel and shown configuration alone."""
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for problem in problems(BACKBONES):
        tunable = all_tunables()[problem.tunable]
        for config in tunable.space(arch, problem.sizes) if tunable.works is not None else ():
            for code in (work.specimen for work in tunable.works(arch, 108, problem.sizes, config)):  # type: ignore[misc]
                name = (code.name, code.kernel.__name__, json.dumps(code.config, sort_keys=True))
                content = [code.constants, code.options, code.signature]
                found[name].add(json.dumps(content, sort_keys=True, default=str))
    assert len(found) > 400
    assert {name for name, contents in found.items() if len(contents) > 1} == set()
