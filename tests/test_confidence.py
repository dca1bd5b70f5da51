"""Thresholds that keep their promise, the second place, and spreads that tell how far off a position is."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetra.confidence import (
    Calibration,
    calibrate,
    distance_ratio,
    estimate_position,
    second_place,
    wilson_lower_bound,
)
from tetra.errors import ConfigError, TetraError

# --- thresholds ---------------------------------------------------------------------------------------------


def test_a_threshold_by_hand() -> None:
    scores = [0.1, 0.2, 0.3, 0.3, 0.4, 0.5, 0.6]
    right = [True, True, True, True, False, True, False]
    # Up to 0.3: 4 of 4; to 0.4: 4 of 5; to 0.5: 5 of 6; to 0.6: 5 of 7.
    found = {
        target: calibrate(scores, right, target_precision=target, confidence=0.5) for target in (0.7, 0.81, 0.84, 1.0)
    }
    assert {target: c.threshold for target, c in found.items()} == {0.7: 0.6, 0.81: 0.5, 0.84: 0.3, 1.0: 0.3}
    assert found[0.81].precision == found[0.81].lower_bound == pytest.approx(5 / 6)
    assert found[0.81].share_accepted == pytest.approx(6 / 7)
    assert (found[0.81].n_answers, found[0.81].n_right) == (7, 5)
    assert [found[0.84].accepts(score) for score in (0.0, 0.3, 0.3000001, math.inf, math.nan)] == [1, 1, 0, 0, 0]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=40),
    st.sampled_from([0.3, 0.6, 0.95, 1.0]),
    st.sampled_from([0.5, 0.8, 0.99]),
)
def test_the_threshold_is_the_largest_that_is_good_enough(
    answers: list[tuple[int, bool]], target: float, confidence: float
) -> None:
    scores, right = [score for score, _ in answers], [is_right for _, is_right in answers]
    good = []
    for threshold in sorted(set(scores)):
        accepted = [is_right for score, is_right in answers if score <= threshold]
        if wilson_lower_bound(sum(accepted), len(accepted), confidence) >= target:
            good.append(threshold)
    if not good or len(set(right)) < 2:
        with pytest.raises(TetraError, match=r"^calibration: "):
            calibrate(scores, right, target_precision=target, confidence=confidence)
    else:
        found = calibrate(scores, right, target_precision=target, confidence=confidence)
        assert found.threshold == good[-1]
        assert found.lower_bound >= target


def test_wilson_bound() -> None:
    # 8 of 10 at 97.5% one-sided: 0.4902 in the tables of two-sided 95% intervals (Newcombe 1998).
    assert wilson_lower_bound(8, 10, 0.975) == pytest.approx(0.4902, abs=5e-5)
    assert wilson_lower_bound([81, 15], [263, 148], 0.975) == pytest.approx([0.2553, 0.0624], abs=5e-5)
    assert wilson_lower_bound(3, 4, 0.5) == pytest.approx(0.75)
    assert wilson_lower_bound(0, 9, 0.9) == pytest.approx(0.0, abs=1e-12)


def test_the_target_is_kept_on_other_answers() -> None:
    # Scores of right and wrong answers overlap. The truth about a threshold is known: right ones are normal
    # around 0, wrong ones around 3, both with sigma 1, and two of three are right.
    rng = np.random.default_rng(1)

    def share_kept(confidence: float) -> float:
        kept = []
        for _ in range(300):
            right = rng.random(200) < 2 / 3
            scores = 10 + rng.normal(size=200) + np.where(right, 0.0, 3.0)
            threshold = calibrate(scores, right, target_precision=0.9, confidence=confidence).threshold - 10
            accepted = [2 * below(threshold), below(threshold - 3)]
            kept.append(accepted[0] / sum(accepted) >= 0.9)
        return float(np.mean(kept))

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    # The largest threshold that works here is chosen among many, which costs some of the confidence.
    assert share_kept(0.5) < 0.65 < 0.75 < share_kept(0.8) < share_kept(0.95)


ANSWERS: dict[str, Any] = {"distances": [1.0, 2.0, 3.0], "is_right": [True, True, False], "confidence": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distances": [], "is_right": []}, "no answers"),
        ({"is_right": [True, True, True]}, "all 3 answers are right"),
        ({"is_right": [False, False, False]}, "all 3 answers are wrong"),
        ({"is_right": [False, True, True]}, r"no threshold reaches a precision of 0\.95.*\(2 of 3 right\)"),
        ({"confidence": 0.9}, r"no threshold reaches .* \(2 of 2 right\)"),
        ({"distances": [1.0, math.nan, 3.0]}, "score nan"),
        ({"distances": [1.0, math.inf, 3.0]}, "score inf"),
        ({"distances": [1.0, -2.0, 3.0]}, r"score -2\.0"),
        ({"distances": [1.0, 2.0]}, "two lists of n"),
        ({"is_right": [0, 1, 2]}, "True or False"),
        ({"is_right": [0.0, 1.0, math.nan]}, "True or False"),
        ({"target_precision": 0.0}, r"target precision 0\.0"),
        ({"target_precision": 95}, "target precision 95"),
        ({"target_precision": math.nan}, "target precision nan"),
        ({"confidence": 1.0}, r"confidence 1\.0"),
        ({"confidence": 0.3}, r"confidence 0\.3"),
        ({"quantity": "cosine"}, "quantity 'cosine'"),
    ],
)
def test_what_cannot_be_calibrated(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TetraError, match=message) as caught:
        calibrate(**{**ANSWERS, **change})
    assert "\n" not in str(caught.value)


# --- calibrations on disk -----------------------------------------------------------------------------------


def made() -> Calibration:
    return calibrate(**ANSWERS, model_hash="ab" * 32, code_bytes=800, of_sequences=True)


def test_a_calibration_survives_json() -> None:
    assert Calibration.from_dict(json.loads(json.dumps(made().to_dict(), allow_nan=False))) == made()
    unbound = calibrate(**ANSWERS)
    assert Calibration.from_dict(json.loads(json.dumps(unbound.to_dict()))) == unbound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": math.nan}, "threshold nan"),
        ({"threshold": -1.0}, r"threshold -1\.0"),
        ({"threshold": "0.9"}, "threshold is '0.9', expected float"),
        ({"threshold": True}, "threshold is True"),
        ({"precision": 1.5}, "between 0 and 1"),
        ({"lower_bound": math.nan}, "between 0 and 1"),
        ({"n_right": 9}, "9 right of 3"),
        ({"n_right": 1.0}, "n_right is 1.0, expected int"),
        ({"quantity": "cosine"}, "cosine"),
        ({"of_sequences": 1}, "of_sequences is 1"),
        ({"model_hash": 7}, "model_hash is 7"),
        ({"max_distance": 3}, "unknown key 'max_distance'"),
    ],
)
def test_a_garbled_calibration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^campus.json: .*{message}"):
        Calibration.from_dict({**made().to_dict(), **change}, where="campus.json")


def test_a_calibration_with_a_key_missing_or_of_another_kind() -> None:
    values = made().to_dict()
    del values["threshold"]
    with pytest.raises(ConfigError, match="key 'threshold' is missing"):
        Calibration.from_dict(values)
    with pytest.raises(ConfigError, match="holds a list"):
        Calibration.from_dict([1])  # type: ignore[arg-type]


def test_a_calibration_is_bound_to_its_model() -> None:
    calibration = made()
    calibration.check("ab" * 32, 800)
    calibrate(**ANSWERS).check("anything", 1)
    with pytest.raises(ConfigError, match="made with the model abababababab, used with the model cdcdcdcdcdcd"):
        calibration.check("cd" * 32, 800)
    with pytest.raises(ConfigError, match="a model without a hash"):
        calibration.check(None, 800)
    with pytest.raises(ConfigError, match="codes of 800 bytes, used with 400"):
        calibration.check("ab" * 32, 400)


# --- second place and position ------------------------------------------------------------------------------


def test_second_place() -> None:
    assert second_place([3, 5, 6, 9], [True, True, False, False]) == 6
    assert second_place([3, 5, 6, 9], [False, True, True, False]) == 3  # a sequence may prefer a farther place
    assert second_place([3, 5, 6, 9], [True] * 4) == 9
    assert distance_ratio(10, 20) == pytest.approx(11 / 21)
    assert distance_ratio(0, 0) == 1.0


def test_position_by_hand() -> None:
    positions = [[0.0, 0.0], [4.0, 0.0], [100.0, 100.0], [math.nan, math.nan]]
    estimate = estimate_position(positions, [3.0, 1.0, 50.0, 9.0], [True, True, False, True], 25.0)
    assert estimate is not None
    assert estimate.position == pytest.approx((1.0, 0.0))
    assert estimate.spread_m == pytest.approx(math.sqrt((3 * 1 + 1 * 9) / 4))


def test_position_keeps_its_digits_at_utm_coordinates() -> None:
    offset = np.array([543_256.96, 4_178_906.70])
    near = estimate_position([[0.0, 0.0], [0.02, 0.0]], [1e-9, 1e-9], [True, True], 25.0)
    far = estimate_position(offset + np.array([[0.0, 0.0], [0.02, 0.0]]), [1e-9, 1e-9], [True, True], 25.0)
    assert near is not None
    assert far is not None
    assert far.position == pytest.approx(offset + near.position, abs=1e-6)
    assert far.spread_m == pytest.approx(near.spread_m, rel=1e-4) == pytest.approx(0.01, rel=1e-4)


def test_what_one_position_alone_says() -> None:
    one = estimate_position([[7.0, 8.0], [math.nan, 1.0]], [1.0, 1.0], [True, True], 25.0)
    same = estimate_position([[7.0, 8.0], [7.0, 8.0]], [1.0, 2.0], [True, True], 25.0)
    for estimate in (one, same):
        assert estimate is not None
        assert (estimate.position, estimate.spread_m) == (pytest.approx((7.0, 8.0)), 25.0)
    assert estimate_position([[math.nan, math.nan]], [1.0], [True], 25.0) is None
    assert estimate_position([[1.0, 1.0]], [1.0], [False], 25.0) is None
