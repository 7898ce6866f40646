import json

import pytest

from arriero.train.guard import WARM, SpikeGuard


def usual(step):
    return 3.0 + 0.1 * (-1) ** step, 0.5 + 0.05 * (-1) ** (step // 2)


def warmed(deviations=6.0):
    guard = SpikeGuard(deviations)
    assert not any(guard.is_spike(*usual(step)) for step in range(2 * WARM))
    return guard


@pytest.mark.parametrize("loss, grad_norm", [(4.0, 0.5), (3.0, 1.0)])
def test_a_loss_or_gradient_norm_far_above_the_usual_is_a_spike(loss, grad_norm):
    guard = warmed()
    assert guard.is_spike(loss, grad_norm)
    assert not guard.is_spike(3.0, 0.5)


def test_nothing_is_a_spike_before_anything_is_usual_or_when_switched_off():
    guard = SpikeGuard(6.0)
    assert not any(guard.is_spike(loss, 1.0) for loss in (1.0, 1.0, 50.0))
    assert not warmed(0.0).is_spike(1e9, 1e9)


def test_a_lasting_change_is_accepted():
    guard = warmed()
    verdicts = [guard.is_spike(5.0, 0.5) for _ in range(300)]
    assert verdicts[0] and not any(verdicts[200:])


def test_the_state_survives_json():
    guard = warmed()
    again = SpikeGuard(6.0, json.loads(json.dumps(guard.state)))
    for step in range(20):
        assert guard.is_spike(*usual(step)) == again.is_spike(*usual(step))
        assert guard.state == again.state
