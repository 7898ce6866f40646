import dataclasses

import pytest
import torch

from arriero.distributed.config import ParallelConfig
from arriero.distributed.parallelize import prepare
from arriero.errors import ConfigError
from arriero.model.catalogue import PUBLISHED
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.model.rope import rope_tables
from arriero.plan.cost import cost
from arriero.plan.run import plan
from arriero.train.config import DataConfig, LoopConfig, SftConfig

LARGE = PUBLISHED["llama3.1-405b"]


@pytest.mark.parametrize(
    # arXiv 2407.21783, table 4: GPUs, TP, CP, PP, DP, sequence length, rows of a batch on each DP rank
    ("gpus", "tp", "cp", "pp", "dp", "seq_len", "rows"),
    [(8192, 8, 1, 16, 64, 8192, 32), (16_384, 8, 1, 16, 128, 8192, 16), (16_384, 8, 16, 16, 8, 131_072, 16)],
)
def test_llama_3s_published_shapes_of_405b(gpus, tp, cp, pp, dp, seq_len, rows):
    parallel = ParallelConfig(tp=tp, cp=cp, pp=pp, dp_shard=dp, pp_light_ends=True)
    found = cost(LARGE, parallel, seq_len=seq_len, batch_rows=dp * rows, recompute="full")
    assert found.processes == gpus
    assert found.tokens == 2**24  # "16M tokens"
    assert found.total < 80e9 * 0.8  # an H100, with room for temporaries
    assert found.bubble == pytest.approx((pp - 1) / (rows + pp - 1))
    assert (
        found.sent["tp (activations)"] > 10 * found.sent["dp_shard and cp (weights, gradients)"]
    )  # so tp is innermost


def test_the_work_of_405bs_training_is_what_was_published():
    # 3.8e25 FLOPs on 15.6T tokens (arXiv 2407.21783, section 1)
    found = cost(LARGE, ParallelConfig(tp=8, pp=16, dp_shard=128), seq_len=8192, batch_rows=2048)
    assert found.flops * found.processes * 15.6e12 / found.tokens == pytest.approx(3.8e25, rel=0.06)


def test_a_small_case_worked_by_hand():
    shape = LlamaConfig(8, 4, 4, 2, 20, 30, 64)  # a block: 8*2*(8+4) + 3*8*20 + 2*8 = 688; a table 240
    found = cost(shape, ParallelConfig(tp=2, pp=2, dp_shard=2, dp_replicate=2), seq_len=16, batch_rows=12)
    last = 2 * 688 + 240 + 8  # the last of two stages holds the norm too
    assert found.micro_batches == 3
    assert found.memory["weights, fp32"] == 4 * last // 2 // 2
    assert found.memory["AdamW's moments, fp32"] == 8 * last // 2 // 2
    assert found.memory["weights gathered or cast, bf16"] == 2 * last // 2
    assert found.memory["gradients not yet reduced, fp32"] == 4 * last // 2
    kept = 2 * 8 + (4 * 8 + 16 + 3 * 20) // 2  # a token and block
    assert found.memory["activations"] == 2 * 16 * kept * 2 * 2  # 2 bytes, 16 tokens, 2 blocks, 2 micro-batches
    assert found.sent["tp (activations)"] == 3 * 2 * 2 * 4 * (2 * 16 * 8) // 2  # micro, blocks, passes, collectives
    assert found.sent["pp (hidden states)"] == 3 * 2 * (2 * 16 * 8) // 2
    assert found.sent["dp_shard and cp (weights, gradients)"] == (2 + 4) * last // 2 // 2
    assert found.sent["dp_replicate (gradients)"] == 2 * (4 * last // 2 // 2) // 2
    assert "cp (keys and values)" not in found.sent
    assert "pp (gradients of tied embeddings)" not in found.sent
    assert found.bubble == 1 / 4


def test_a_tied_matrix_lies_at_both_ends_of_a_pipeline_and_its_gradient_is_exchanged():
    shape = LlamaConfig(8, 4, 4, 2, 20, 30, 64, tied_embeddings=True)
    found = cost(shape, ParallelConfig(tp=2, pp=2, dp_shard=2, dp_replicate=2), seq_len=16, batch_rows=12)
    assert found.memory["weights, fp32"] == 4 * (2 * 688 + 240 + 8) // 2 // 2  # as if it were not tied
    assert found.sent["pp (gradients of tied embeddings)"] == 4 * 240 // 2 // 2


def test_interleaving_makes_the_bubble_smaller_and_each_saving_saves():
    base = dict(seq_len=8192, batch_rows=128, micro_rows=1)
    shape = PUBLISHED["llama3.1-70b"]
    plain = cost(shape, ParallelConfig(tp=8, pp=4, dp_shard=2), **base)
    interleaved = cost(shape, ParallelConfig(tp=8, pp=4, dp_shard=2, pp_chunks=4), **base)
    assert interleaved.bubble < plain.bubble / 3
    assert interleaved.memory["activations"] > plain.memory["activations"]
    kept = [cost(shape, ParallelConfig(tp=8, pp=4, dp_shard=2), **base, recompute=r) for r in ("selective", "full")]
    assert kept[1].total < kept[0].total < plain.total
    waiting, reducing = (cost(shape, ParallelConfig(dp_shard=64, reduce_every=r), **base) for r in (False, True))
    assert reducing.total < waiting.total / 2
    assert sum(reducing.sent.values()) > sum(waiting.sent.values())


@pytest.mark.parametrize(("optimizer", "bytes_"), [("adamw", 8), ("adamw8bit", 2 + 8 / 256), ("muon", 4)])
def test_what_saves_memory_is_counted_as_it_is_saved(optimizer, bytes_):
    shape = LlamaConfig(8, 4, 4, 2, 20, 30, 64)  # as above: 4 blocks of 688, two tables of 240, a norm of 8
    blocks, ends = 4 * 688, 488
    settings = dict(seq_len=16, batch_rows=1, optimizer=optimizer)
    plain = cost(shape, ParallelConfig(dp_shard=1), **settings)
    moments = next(size for part, size in plain.memory.items() if "moments" in part)
    assert moments == pytest.approx(bytes_ * blocks + (8 if optimizer == "muon" else bytes_) * ends, abs=1)
    at_once = cost(shape, ParallelConfig(dp_shard=1), **settings, in_backward=True)
    assert plain.total - at_once.total == 4 * (blocks + ends - 688)
    offloaded = cost(shape, ParallelConfig(dp_shard=1, cpu_offload=True), **settings)
    assert sum(offloaded.host.values()) == 8 * (blocks + ends) + moments
    assert offloaded.host.keys() & offloaded.memory.keys() == set() and plain.host == {}


def test_a_plan_with_degrees_is_that_of_each_process():
    loop, data = LoopConfig(batch_rows=2048, recompute="full"), DataConfig(seq_len=8192)
    parallel = ParallelConfig(tp=8, pp=16, dp_shard=64)
    config = SftConfig(model="llama3.1-405b", method="full", loop=loop, data=data, parallel=parallel)
    assert plan(config) == cost(LARGE, parallel, seq_len=8192, batch_rows=2048, recompute="full")
    assert plan(dataclasses.replace(config, parallel=ParallelConfig(tp=8, pp=16))).processes == 128
    with pytest.raises(ConfigError, match="the plan of a split counts the training of all weights; add --method full"):
        plan(dataclasses.replace(config, method="lora"))


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(ConfigError, match="tp 16 does not divide the model's n_kv_heads 8"):
        cost(LARGE, ParallelConfig(tp=16, dp_shard=1), seq_len=8192, batch_rows=8)


@pytest.mark.slow
def test_compiled_blocks_keep_as_much_for_the_backward_pass_as_is_counted():
    shape, tokens = LlamaConfig(512, 1, 8, 2, 1792, 1000, 2048), 1024
    model = prepare(Llama(shape).init_weights(seed=0).set_compute_dtype(torch.float32), compile=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    cos, sin = rope_tables(shape, torch.arange(tokens)[None])
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    x = torch.randn(1, tokens, shape.dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.layers[0](x, cos, sin, bounds, 0, None)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 4 / tokens
    counted = cost(shape, ParallelConfig(dp_shard=1), seq_len=tokens, batch_rows=1).memory["activations"] / 2 / tokens
    assert measured == pytest.approx(counted, rel=0.1)
