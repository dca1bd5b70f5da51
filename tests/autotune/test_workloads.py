from __future__ import annotations

import json

import pytest

from tetra.autotune.workloads import problems
from tetra.config import BACKBONES
from tetra.kernels.ahead_of_time import ARCHITECTURES
from tetra.kernels.tunable import all_tunables


def test_every_gpu_kernel_has_problems_and_no_key_is_there_twice() -> None:
    found = problems(BACKBONES)
    assert {one.tunable for one in found} == {name for name, one in all_tunables().items() if one.on == "cuda"}
    keys = [(one.tunable, one.key) for one in found]
    assert len(set(keys)) == len(keys)
    for one in found:
        assert json.loads(json.dumps(one.sizes)) == one.sizes
        assert all_tunables()[one.tunable].space(90, one.sizes)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_runs_without_a_result_is_a_candidate(arch: int) -> None:
    for one in problems(BACKBONES):
        tunable = all_tunables()[one.tunable]
        space = tunable.space(arch, one.sizes)
        assert tunable.default(arch, 100, one.sizes) in space
        assert len(set(space)) == len(space)


def test_shapes_are_the_models() -> None:
    found = problems({"vit-b": BACKBONES["vit-b"]}, batches=(1, 8))
    products = {tuple(p.sizes[n] for n in "mnk") for p in found if p.tunable == "ternary_matmul"}
    shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    assert products == {(m, *shape) for m in (530, 8 * 530) for shape in shapes}
    maps = {p.sizes["b"] * p.sizes["n_heads"] for p in found if p.tunable == "attention"}
    assert maps == {12, 96}


def test_what_the_launcher_looks_up_is_what_was_tuned() -> None:
    """The keys of a launch at the model's sizes are among the problems'."""
    from tetra.kernels.attention import shape_key as attention_key
    from tetra.kernels.ternary_matmul import shape_key

    keys = {(one.tunable, one.key) for one in problems(BACKBONES)}
    for batch in (1, 3, 64):
        m = batch * 530
        assert ("ternary_matmul", shape_key(m, 3072, 768, "int8", "float16")) in keys
        assert ("attention", attention_key(batch, 530, 12, 64, "float16", True)) in keys
