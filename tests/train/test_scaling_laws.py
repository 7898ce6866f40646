"""Laws against what their authors say of them, fits against laws they were made from, plans against paper."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from arriero import cli
from arriero.errors import ConfigError, DataError
from arriero.train.scaling.budget import PEAKS, THIS, make_plan, peak_of
from arriero.train.scaling.fit import Runs, at_bounds, budgets_of, fit, fit_loss, fit_power, interval
from arriero.train.scaling.laws import PUBLISHED_LAWS, LossLaw, PowerLaw, suggested_batch, suggested_lr
from arriero.train.scaling.run_fit import read_runs

LAW = LossLaw(floor=1.83, a=479.0, alpha=0.353, b=2081.0, beta=0.367)
BUDGETS = (1e18, 1e19, 1e20, 1e21)


SMALL, LARGE = (1 / 500, 1 / 100), (12, 60)  # models all on one side of the best, as shares of it


def measured(
    noise: float,
    seed: int = 0,
    sizes: int = 7,
    law: LossLaw = LAW,
    aside: dict[float, tuple[float, float]] | None = None,
) -> Runs:
    """A sweep of models 5 times smaller to 3 times larger than the best (`aside`: of those budgets other shares of it),
    with noise in the log of the loss."""
    rng = np.random.default_rng(seed)
    rows = []
    for flops in BUDGETS:
        for params in law.params(flops) * np.geomspace(*(aside or {}).get(flops, (1 / 5, 3)), sizes):
            tokens = flops / (6 * params)
            rows.append((flops, params, tokens, law.loss(params, tokens) * math.exp(noise * rng.normal())))
    return Runs(*np.array(rows).T)


# -- published laws ----------------------------------------------------------------------------------------------


def test_llama_3s_law_gives_its_tokens_and_nearly_its_size() -> None:
    law = PUBLISHED_LAWS["llama3"]
    assert law.tokens(3.8e25) == pytest.approx(16.55e12, rel=0.02)  # constants of three digits
    assert law.params(3.8e25) == pytest.approx(402e9, rel=0.04)  # 6 N D of its answer is 3.99e25 itself
    rounded_in_the_text = PowerLaw(0.29, 0.53)
    assert rounded_in_the_text.tokens(3.8e25) < 0.7 * 16.55e12


def test_chinchillas_data_ask_for_about_twenty_tokens_a_parameter_at_its_budget() -> None:
    law = PUBLISHED_LAWS["chinchilla"]
    flops = 5.76e23
    assert law.tokens(flops) / law.params(flops) == pytest.approx(20, rel=0.1)
    assert law.params(flops) == pytest.approx(70e9, rel=0.05)
    printed = PUBLISHED_LAWS["chinchilla-2022"]  # the constants in the paper contradict its text
    assert printed.tokens(flops) / printed.params(flops) > 80


@pytest.mark.parametrize("name", PUBLISHED_LAWS)
def test_size_and_tokens_spend_the_budget(name: str) -> None:
    law = PUBLISHED_LAWS[name]
    for flops in (1e13, 7e19, 3.8e25):
        assert 6 * law.params(flops) * law.tokens(flops) == pytest.approx(flops, rel=1e-12)


def test_the_closed_form_of_the_best_size_is_where_no_other_size_does_better() -> None:
    for flops in (1e17, 1e21):
        sizes = LAW.params(flops) * np.geomspace(0.5, 2, 10_001)
        losses = [LAW.loss(n, flops / (6 * n)) for n in sizes]
        assert sizes[int(np.argmin(losses))] == pytest.approx(LAW.params(flops), rel=2e-4)


def test_rate_and_batch_are_near_those_of_published_runs() -> None:
    # Llama 1 7B: 1T tokens, 3e-4, 4M tokens a batch; DeepSeek's own 7B: 2T tokens, 4.2e-4, 2304 rows of 4096.
    flops = 6 * 6.9e9 * 2e12
    assert suggested_lr(flops) == pytest.approx(4.2e-4, rel=0.3)
    assert suggested_batch(flops) == pytest.approx(2304 * 4096, rel=1.0)
    assert suggested_lr(1e14) == pytest.approx(0.3118 * 10**-1.75)
    assert suggested_lr(1e10) == 6e-3


# -- fits --------------------------------------------------------------------------------------------------------


def test_the_parametric_fit_recovers_the_law_that_made_the_losses() -> None:
    found = fit_loss(measured(noise=0.0))
    for name in ("floor", "a", "alpha", "b", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(LAW, name), rel=1e-6), name


def test_one_wild_run_hardly_moves_the_parametric_fit() -> None:
    runs = measured(noise=0.0)
    runs.loss[11] *= 1.3
    assert fit_loss(runs).alpha == pytest.approx(LAW.alpha, rel=0.03)  # Huber's loss; least squares misses by far more


def test_the_isoflop_law_recovers_losses_that_are_parabolas() -> None:
    truth = PowerLaw(3.7, 0.513)
    rows = []
    for flops in BUDGETS:
        for params in truth.params(flops) * np.geomspace(1 / 5, 3, 7):
            loss = 3 - 0.05 * math.log10(flops) + 0.071 * math.log(params / truth.params(flops)) ** 2
            rows.append((flops, params, flops / (6 * params), loss))
    found = fit(Runs(*np.array(rows).T), resamples=3)
    assert found.power.exponent == pytest.approx(truth.exponent, rel=1e-9)
    assert found.power.coefficient == pytest.approx(truth.coefficient, rel=1e-6)
    for minimum in found.minima:
        assert minimum.params == pytest.approx(truth.params(minimum.flops), rel=1e-9)
        assert minimum.curvature == pytest.approx(0.071, rel=1e-9)
        assert minimum.loss == pytest.approx(3 - 0.05 * math.log10(minimum.flops), rel=1e-9)
        assert minimum.inside


def test_with_noise_the_truth_lies_in_the_intervals_and_they_are_of_use() -> None:
    exact = fit(measured(noise=0.0), resamples=1)
    found = fit(measured(noise=0.002, seed=3, sizes=11), resamples=150)
    low, high = interval([law.exponent for law in found.powers])
    assert low < exact.power.exponent < high
    assert high - low < 0.1
    for name in ("floor", "alpha", "beta"):
        low, high = interval([getattr(law, name) for law in found.losses])
        assert low < getattr(LAW, name) < high, name
        assert high - low < 0.3 * getattr(LAW, name), name


def test_six_models_a_budget_with_their_minimum_at_the_edge_are_enough_for_intervals() -> None:
    # Measured: stdlib and prose, a vocabulary of 512; the best size lies between the first two or three of each budget.
    sizes = [29_792, 131_392, 409_248, 853_120, 1_414_560, 1_869_504]
    losses = {
        3e12: [3.3347, 2.9289, 3.6610, 4.2433, 4.5339, 4.8047],
        5.5e12: [3.2403, 2.8188, 3.2362, 3.8793, 4.1831, 4.4311],
        1e13: [3.2222, 2.7386, 2.7325, 3.3274, 3.8147, 4.0665],
    }
    rows = [(c, n, c / (6 * n), loss) for c, of in losses.items() for n, loss in zip(sizes, of, strict=True)]
    found = fit(Runs(*np.array(rows).T), resamples=25)
    assert found.discarded < 5
    assert all(minimum.inside for minimum in found.minima)
    low, high = interval([law.exponent for law in found.powers])
    assert low < found.power.exponent < high


def test_the_same_seed_gives_the_same_intervals() -> None:
    first, second, other = (fit(measured(0.002), resamples=5, seed=seed) for seed in (7, 7, 8))
    assert first.summary() == second.summary() != other.summary()


def test_two_budgets_are_joined_by_the_line_through_them() -> None:
    found = fit(measured(noise=0.0).take(np.arange(14)), resamples=2)
    law = fit_power(found.minima)
    for minimum in found.minima:
        assert law.params(minimum.flops) == pytest.approx(minimum.params, rel=1e-9)


def test_a_minimum_beyond_the_models_that_were_run_is_marked() -> None:
    runs = measured(noise=0.0)
    kept = np.flatnonzero((runs.flops > 1e18) | (runs.params < 0.8 * LAW.params(1e18)))
    found = fit(runs.take(kept), resamples=2)
    assert [minimum.inside for minimum in found.minima] == [False, True, True, True]


def test_runs_that_determine_no_law_are_refused_with_what_is_missing() -> None:
    runs = measured(noise=0.0)
    with pytest.raises(DataError, match=r"7 runs of 1 budget; a law needs at least two budgets: let the sweep finish"):
        fit(runs.take(np.arange(7)))
    with pytest.raises(DataError, match=r"budget 1e\+19: models of 3 sizes; a parabola needs at least 4"):
        fit(runs.take(np.arange(10)))


@pytest.mark.parametrize(
    ("shares", "advice"),
    [
        (SMALL, "fall towards the larger ones; add larger models with a lower --tokens-per-param"),
        (LARGE, "fall towards the smaller ones; add smaller models with a higher --tokens-per-param"),
    ],
)
def test_a_budget_without_a_minimum_is_left_out_of_the_isoflop_law_only(
    shares: tuple[float, float], advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs = measured(noise=0.001, aside={1e19: shares})
    others = runs.take(np.flatnonzero(runs.flops != 1e19))
    found, without = fit(runs, resamples=7), fit(others, resamples=7)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("budget 1e+19 is left out of the isoFLOP law: its losses have no minimum near")
    assert advice in caplog.messages[0]
    assert found.power == without.power
    assert found.powers[0] == without.powers[0]  # drawn over the budgets that count
    assert len(found.powers) == len(found.losses) == 7 and not found.discarded and not found.refused
    assert found.loss == fit_loss(runs) != without.loss
    assert found.summary()["left_out"] == [1e19]
    assert [minimum["flops"] for minimum in found.summary()["minima"]] == [1e18, 1e20, 1e21]


def test_resamples_that_lose_the_minima_leave_the_parametric_law() -> None:
    found = fit(measured(noise=0.05, seed=5, sizes=5), resamples=12)
    assert all(minimum.found for minimum in found.minima)
    assert "of 12 resamples some budget's losses had no minimum: the runs do not say where it is" in found.refused
    assert found.powers == [] and "power_law" not in found.summary() and found.discarded > 6
    assert len(found.losses) == 12 and found.loss.alpha > 0


def test_losses_upside_down_give_no_law_of_either_kind() -> None:
    runs = measured(noise=0.0)
    found = fit(Runs(runs.flops, runs.params, runs.tokens, 5 - runs.loss), resamples=3)
    assert found.refused.startswith(
        "no isoFLOP law: the losses of 0 of 4 budgets have a minimum near the models' sizes"
    )
    assert {"power_law", "loss_law"}.isdisjoint(found.summary())


def test_without_any_law_the_command_ends_in_an_error_after_all_that_can_be_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = measured(noise=0.0)
    write_runs(tmp_path / "runs.jsonl", Runs(runs.flops, runs.params, runs.tokens, 5 - runs.loss))
    assert cli.main(["scaling", "fit", str(tmp_path), "--resamples", "3"]) == 2
    shown = capsys.readouterr()
    assert "the best model of each budget" in shown.out and "no isoFLOP law" in shown.err
    assert (tmp_path / "fit.png").is_file()


def write_runs(path: Path, runs: Runs, with_flops: bool = True) -> None:
    with open(path, "w") as file:
        for flops, params, tokens, loss in zip(runs.flops, runs.params, runs.tokens, runs.loss, strict=True):
            record = {"params": params, "tokens": tokens, "loss": loss} | ({"flops": flops} if with_flops else {})
            file.write(json.dumps(record) + "\n")


def test_losses_from_elsewhere_are_read_and_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "losses.jsonl"
    write_runs(file, measured(0.0), with_flops=False)
    assert tuple(read_runs(file).budgets) == BUDGETS
    file.write_text(file.read_text().rstrip("\n"))  # the last line counts as it is
    assert len(read_runs(file).loss) == 28
    with open(file, "a") as lines:
        lines.write('\n{"params": 7, "tokens": 11, "loss": null}\n')
    with pytest.raises(DataError, match=r"losses\.jsonl, line 29: loss is None; it must be a number above 0"):
        read_runs(file)
    for broken, message in (("oops", "row 1 of .*: broken JSON"), ("[1]", "expected a JSON object"), ("", "losses")):
        file.write_text(broken)
        with pytest.raises(DataError, match=message):
            read_runs(file)
    file.write_text('{"params": "a", "tokens": 1, "loss": 1}')
    with pytest.raises(DataError, match=r"losses\.jsonl, line 1: params is 'a'; it must be a number above 0"):
        read_runs(file)
    with pytest.raises(DataError, match=r"no such file; `arriero scaling sweep --out .*none` writes it"):
        read_runs(tmp_path / "none")


def rounded(batch: float, noise: float = 0.0) -> Runs:
    """The sweep with tokens in whole batches, as a trainer counts them, and 6 N D of those."""
    runs = measured(noise)
    tokens = np.round(runs.tokens / batch) * batch
    losses = np.array([LAW.loss(n, d) for n, d in zip(runs.params, tokens, strict=True)])
    return Runs(6 * runs.params * tokens, runs.params, tokens, losses)


@pytest.mark.parametrize("with_flops", [True, False])
@pytest.mark.parametrize("batch", [2e5, 1e7])
def test_budgets_that_differ_by_whole_batches_are_one(
    tmp_path: Path, batch: float, with_flops: bool, caplog: pytest.LogCaptureFixture
) -> None:
    runs = rounded(batch)
    assert len(np.unique(runs.flops)) > 20
    file = tmp_path / "losses.jsonl"
    write_runs(file, runs, with_flops)
    found = read_runs(file)
    assert [int((found.flops == flops).sum()) for flops in found.budgets] == [7] * 4
    assert found.budgets == pytest.approx(BUDGETS, rel=0.01)
    assert (
        f"{file}: 28 runs are taken for 4 budgets: runs are of one budget where the FLOPs of each lie within 3% of the"
        in caplog.text
    )
    law = fit(found, resamples=2)
    assert law.power.exponent == pytest.approx(fit(measured(0.0), resamples=2).power.exponent, abs=0.005)


def test_near_budgets_follow_a_stated_rule() -> None:
    assert budgets_of(np.array([3e18, 1e18, 1.02e18, 1.01e18])).tolist() == [3e18, 1.01e18, 1.01e18, 1.01e18]
    assert budgets_of(np.array([1e18, 1.04e18])).tolist() == [1e18, 1.04e18]
    assert budgets_of(np.array([1.2345678912345e18] * 3)).tolist() == [1.2345678912345e18] * 3
    with pytest.raises(DataError, match=r"of 20 runs go from 1e\+18 to 1\.46e\+18 without a gap .*; give the FLOPs"):
        budgets_of(1e18 * 1.02 ** np.arange(20))
    runs = measured(0.0)
    apart = Runs(runs.flops * np.tile([1, 1.04, 1.08, 1.13, 1.17, 1.2, 1.3], 4), runs.params, runs.tokens, runs.loss)
    with pytest.raises(DataError, match=r"budget 1e\+18: models of 1 size; .* \(runs are of one budget where"):
        fit(apart)


def test_a_law_that_ends_at_a_bound_of_its_search_says_so(caplog: pytest.LogCaptureFixture) -> None:
    law = LossLaw(floor=1e-12, a=479.0, alpha=0.353, b=2081.0, beta=0.367)  # the runs ask for no floor at all
    assert at_bounds(LAW) == [] and fit(measured(0.0), resamples=2).at_bounds == []
    runs = measured(0.0, law=law)
    found = fit(Runs(runs.flops, runs.params, runs.tokens, runs.loss * (runs.params**-0.01)), resamples=2)
    assert found.at_bounds == ["floor"] == found.summary()["at_bounds"]
    assert "the parametric law's floor ends at the bound of its search: the runs do not determine it" in caplog.text
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(found.view())
    text = console.export_text()
    assert "floor !" in text and "! at the bound of its search" in text


# -- plans -------------------------------------------------------------------------------------------------------


def test_a_plan_is_arithmetic_that_paper_can_check() -> None:
    plan = make_plan(
        "chinchilla", flops=5.76e23, device="a100", devices=1024, mfu=0.5, price=2.0, batch_tokens=4_000_000
    )
    assert plan.seconds == pytest.approx(5.76e23 / (1024 * 312e12 * 0.5))
    assert plan.cost == pytest.approx(2.0 * 1024 * plan.seconds / 3600)
    assert plan.steps == round(plan.tokens / 4e6)
    assert plan.nearest_shape == "llama3-70b"
    assert plan.loss == pytest.approx(1.97, abs=0.01)
    assert json.loads(plan.json())["tokens_per_parameter"] == pytest.approx(18.4, abs=0.1)


def test_a_budget_of_time_or_of_money_is_one_of_compute() -> None:
    on = dict(device="h100", devices=8, mfu=0.4, price=3.0)
    by_time = make_plan("llama3", hours=5, **on)
    assert by_time.flops == pytest.approx(5 * 3600 * 8 * 989e12 * 0.4)
    assert by_time.cost == pytest.approx(5 * 8 * 3.0)
    assert make_plan("llama3", cost=120, **on).flops == pytest.approx(by_time.flops)


def test_this_machine_is_measured() -> None:
    assert 1e9 < peak_of(THIS) < 1e15
    assert all(7e13 < peak < 3e15 for peak in PEAKS.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give the budget as one of --flops, --hours or --cost"),
        ({"flops": 1e20, "hours": 3}, "give the budget as one of --flops, --hours or --cost"),
        ({"cost": 100}, "cost 100 is a budget only with a price; give --price, per device-hour"),
        ({"flops": -1e20}, r"flops is -1e\+20; it must be above 0"),
        ({"flops": 1e20, "mfu": 40}, r"mfu is 40; it is a share of the peak, in \(0, 1\]"),
        ({"flops": 1e20, "devices": 0}, "devices is 0; it must be at least 1"),
        ({"flops": 1e20, "device": "h10"}, r"device 'h10' is unknown; did you mean 'h100'.* \(known: this, a100"),
        ({"flops": 1e20, "law": "chinchila"}, r"chinchila: neither a published law .*; did you mean 'chinchilla'"),
    ],
)
def test_a_plan_refuses_what_it_cannot_use(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan(**({"law": "llama3", "device": "h100"} | arguments))  # type: ignore[arg-type]


def test_fit_and_plan_on_the_command_line_end_in_files_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(tmp_path / "runs.jsonl", measured(0.001))
    with pytest.raises(ConfigError, match=r"nor a sweep with a fit\.json; run: arriero scaling fit "):
        make_plan(str(tmp_path), flops=1e22, device="h100")
    assert cli.main(["scaling", "fit", str(tmp_path), "--resamples", "20"]) == 0
    shown = capsys.readouterr().out
    assert "the best model of each budget" in shown and "N grows as C to the" in shown
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["scaling", "plan", str(tmp_path), "--flops", "1e22", "--device", "h100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    low, high = plan["params_interval"]
    assert low < plan["params"] < high
    assert plan["params"] == pytest.approx(LAW.params(1e22), rel=0.2)
    assert plan["loss"] == pytest.approx(LAW.loss(plan["params"], plan["tokens"]), rel=0.01)
    assert cli.main(["scaling", "plan", str(tmp_path), "--flops", "1e22", "--device", "h100"]) == 0
    assert "95% interval" in capsys.readouterr().out
    (tmp_path / "fit.json").write_text("{}")
    assert cli.main(["scaling", "plan", str(tmp_path), "--flops", "1e22"]) == 2
    assert "not what `arriero scaling fit` writes" in capsys.readouterr().err


def test_a_sweep_with_one_minimum_ends_in_an_error_after_all_that_can_be_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    refusal = (
        "arriero: no isoFLOP law: the losses of 1 of 4 budgets have a minimum near the models' sizes, and a law needs "
        "at least 2; run more --sizes, over a larger --spread, around other --tokens-per-param, or with more --seeds\n"
    )
    write_runs(tmp_path / "runs.jsonl", measured(0.001, aside={1e18: SMALL, 1e20: LARGE, 1e21: LARGE}))
    assert cli.main(["scaling", "fit", str(tmp_path), "--resamples", "20"]) == 2
    shown = capsys.readouterr()
    assert shown.err.endswith(refusal)
    assert [message.split(" is left")[0] for message in caplog.messages] == [
        "budget 1e+18",
        "budget 1e+20",
        "budget 1e+21",
    ]
    assert "the best model of each budget" in shown.out and "+ no minimum: the run of lowest loss" in shown.out
    assert "N grows as C to the" in shown.out and "nan" not in shown.out and "plan with it" not in shown.out
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "fit.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert written["left_out"] == [1e18, 1e20, 1e21] and [m["flops"] for m in written["minima"]] == [1e19]
    assert "power_law" not in written and written["resamples"]["power_law"] == []
    assert written["loss_law"]["alpha"]["value"] == pytest.approx(LAW.alpha, rel=0.03)
    assert f"arriero: {written['refused']}\n" == refusal
    assert cli.main(["scaling", "fit", str(tmp_path), "--resamples", "20", "--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {name: value for name, value in written.items() if name != "resamples"}
    assert shown.err.endswith(refusal)
    assert cli.main(["scaling", "plan", str(tmp_path), "--flops", "1e22", "--device", "h100"]) == 2
    assert f"{tmp_path / 'fit.json'}: no isoFLOP law: the losses of 1 of 4 budgets" in capsys.readouterr().err


def test_the_picture_has_the_losses_of_a_budget_without_a_minimum() -> None:
    from io import BytesIO

    from matplotlib import colormaps
    from matplotlib.image import imread

    from arriero.train.scaling.plot import fit_png

    found = fit(measured(0.0, aside={1e19: SMALL, 1e20: LARGE, 1e21: LARGE}), resamples=2)
    pixels = imread(BytesIO(fit_png(found)))[:, :, :3]
    for budget, shade in enumerate(colormaps["viridis"](np.linspace(0.1, 0.85, 4))):
        marks = (np.abs(pixels - shade[:3]).max(-1) < 0.01).any(0)
        pieces = np.count_nonzero(np.diff(marks.astype(int)) == 1)
        if budget == 0:
            assert pieces < 7  # a line through the points
        else:
            assert pieces >= 7  # points only


def test_the_picture_shows_every_budget_and_both_laws(tmp_path: Path) -> None:
    from matplotlib.image import imread

    from arriero.train.scaling.plot import fit_png

    (tmp_path / "fit.png").write_bytes(fit_png(fit(measured(0.002), resamples=20)))
    pixels = imread(tmp_path / "fit.png")[:, :, :3]
    half = pixels.shape[1] // 2
    marks = (np.abs(pixels - np.array([0xC4, 0x62, 0x2D]) / 255).max(-1) < 0.01).any(0)
    for side in (marks[:half], marks[half:]):
        assert np.count_nonzero(np.diff(side.astype(int)) == 1) >= 4  # a minimum for each budget
