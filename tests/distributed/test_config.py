import dataclasses

import pytest

from arriero.distributed.config import ParallelConfig
from arriero.errors import ConfigError
from arriero.model.catalogue import PUBLISHED
from arriero.model.config import LlamaConfig

SHAPE = LlamaConfig(22, 5, 6, 2, 34, 106, 64, head_dim=10)


def refused(text: str):
    return pytest.raises(ConfigError, match=text)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tp": 0}, "tp is 0; it must be at least 1"),
        ({"dp_shard": 0}, "dp_shard is 0; it must be at least 1, or -1 for all that are left"),
        ({"pp_chunks": 2}, "pp_chunks is 2 but pp is 1; there is no pipeline to interleave"),
        ({"pp": 2, "reduce_every": True}, "reduce_every is on but pp is 2"),
        ({"timeout": 0}, "timeout is 0; it must be above 0 seconds"),
        ({"timeout": float("inf")}, r"timeout is inf; it must be above 0 seconds and at most 604,800 \(a week\)"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings, text):
    with refused(text):
        ParallelConfig(**settings)


def test_sharded_data_parallelism_takes_the_processes_that_are_left():
    assert ParallelConfig(tp=2, cp=3, dp_replicate=5).fitted(210).dp_shard == 7
    assert ParallelConfig().fitted(1).world == 1


def test_degrees_that_do_not_give_the_number_of_processes_are_refused():
    with refused(r"dp_replicate 1 x tp 3 x cp 1 x pp 1 is 3, but 8 processes were started, which is no multiple of it"):
        ParallelConfig(tp=3).fitted(8)
    with refused(r"dp_shard 2 x .* tp 2 .* is 4, but 8 processes were started; set dp_shard to -1, or start as many"):
        ParallelConfig(dp_shard=2, tp=2).fitted(8)


def test_layers_are_shared_out_evenly_and_in_order():
    assert ParallelConfig(pp=2).layers(5) == [range(3), range(3, 5)]
    assert ParallelConfig(pp=2, pp_chunks=2).layers(5) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert ParallelConfig().layers(7) == [range(7)]


def test_405b_gives_its_first_and_last_stage_one_layer_less_as_published():
    # 126 layers on 16 stages: arXiv 2407.21783, section 3.3.2
    sizes = [len(run) for run in ParallelConfig(pp=16, pp_light_ends=True).layers(126)]
    assert sizes == [7, *[8] * 14, 7]


def test_a_model_that_cannot_be_split_so_is_refused():
    with refused("tp 4 does not divide the model's n_kv_heads 2; each process holds an equal share of heads"):
        ParallelConfig(tp=4).check_model(SHAPE)
    with refused("tp 2 does not divide the model's vocab_size 107"):
        ParallelConfig(tp=2).check_model(dataclasses.replace(SHAPE, vocab_size=107))
    with refused(r"pp 3 x pp_chunks 2 makes 6 stages of 5 layers, and one would be empty; lower pp or pp_chunks$"):
        ParallelConfig(pp=3, pp_chunks=2).check_model(SHAPE)
    with refused("or switch pp_light_ends off"):
        ParallelConfig(pp=4, pp_light_ends=True).check_model(SHAPE)
    ParallelConfig(tp=8, pp=16, pp_light_ends=True).check_model(PUBLISHED["llama3.1-405b"])


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with refused(r"seq_len 1000 is not a multiple of 12 \(2 x cp 3 x tp 2\)"):
        ParallelConfig(cp=3, tp=2).fitted(6).check_batch(8, 1, 1000)
    with refused(r"seq_len 1001 is not a multiple of 2 \(cp 1 x tp 2\)"):
        ParallelConfig(tp=2).fitted(2).check_batch(8, 1, 1001)
    with refused("batch_rows 6 is not a multiple of micro_rows 2 x 2 data-parallel processes"):
        ParallelConfig().fitted(2).check_batch(6, 2, 64)
    with refused("batch_rows 6 gives each pipeline 3 micro-batches of 2 rows, fewer than its 4 processes"):
        ParallelConfig(pp=4).fitted(4).check_batch(6, 2, 64)
    with refused("batch_rows 5 gives each pipeline 5 micro-batches, not a multiple of pp 2, which interleaving needs"):
        ParallelConfig(pp=2, pp_chunks=2).fitted(2).check_batch(5, 1, 64)
    ParallelConfig(tp=2, cp=2, pp=2).fitted(16).check_batch(16, 2, 64)
