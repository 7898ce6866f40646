import pytest

from arriero.optim.schedule import lr_factor


def curve(shape, total=101, warmup=0.1, min_lr=0.1, decay=0.2):
    return [lr_factor(step, total, shape, warmup, min_lr, decay) for step in range(total)]


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_warmup_rises_linearly_to_the_peak(shape):
    assert curve(shape)[:11] == pytest.approx([(i + 1) / 11 for i in range(11)])


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_the_last_step_is_at_the_minimum(shape):
    assert curve(shape)[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(curve(shape)[10:], curve(shape)[11:], strict=False))


def test_cosine_is_halfway_at_half_time():
    assert curve("cosine", total=101, warmup=0.0)[50] == pytest.approx(0.55)


def test_wsd_holds_until_its_decay():
    values = curve("wsd", total=100, warmup=0.0)
    assert values[79] == 1 and values[81] < 1 and values[-1] == pytest.approx(0.1)


def test_a_share_of_the_steps_is_not_rounded_up_for_what_floats_add():
    assert 0.07 * 100 > 7
    assert curve("constant", total=100, warmup=0.07)[5:8] == [6 / 7, 1, 1]
    assert curve("wsd", total=100, warmup=0.0, decay=0.07)[92:95] == pytest.approx([1, 1, 0.85])


def test_a_single_step_has_a_rate():
    for shape in ("cosine", "linear", "wsd", "constant"):
        assert lr_factor(0, 1, shape, 0.0, 0.1) > 0


def test_a_warmup_of_one_or_more_is_a_number_of_steps():
    assert curve("constant", warmup=4.0)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
