"""Pipeline parallelism: micro-batches stream through stages of layers, one forward one backward (1F1B).

Schedules are torch's (1F1B, arXiv 2006.09503; interleaved, 2104.04473). They are given the shapes that pass between
stages, which torch would otherwise infer by running the model once. Only hidden states are sent: every stage already
has the layout of each micro-batch's documents from the engine.
Price: with p processes, s stages on each and n micro-batches, the bubble is (p - 1) / (n s + p - 1) of the time; a
process holds the activations of up to p micro-batches (interleaved: more).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from arriero.distributed.mesh import Mesh
from arriero.distributed.stage import MicroBatch, StageModel

PipelineSchedule = Schedule1F1B | ScheduleGPipe | ScheduleInterleaved1F1B


class Pipeline:
    """Runs this process's stages. The schedule for the last shape is kept, one with backward and one without."""

    def __init__(self, stages: list[StageModel], mesh: Mesh) -> None:
        self.stages, self.mesh = stages, mesh
        self._kept: dict[bool, tuple[tuple[int, int], PipelineSchedule]] = {}

    def run(self, micro: Sequence[MicroBatch], backward: bool) -> None:
        """Run all micro-batches forward, and backward if asked. The objective's sums are then on the last stage."""
        tokens = torch.cat([one.batch.tokens for one in micro])
        schedule = self._schedule(len(micro), tokens.shape[1], backward)
        index = torch.arange(len(micro))
        run = schedule.step if backward else schedule.eval
        inputs = (tokens,) if self.stages[0].index == 0 else ()
        run(*inputs, index=index, target=index, return_outputs=False)

    def _schedule(self, n_micro: int, length: int, backward: bool) -> PipelineSchedule:
        key = n_micro, length
        if backward not in self._kept or self._kept[backward][0] != key:
            self._kept[backward] = key, self._new_schedule(n_micro, length, backward)
        return self._kept[backward][1]

    def _new_schedule(self, n_micro: int, length: int, backward: bool) -> PipelineSchedule:
        stages = [self._torch_stage(stage, length) for stage in self.stages]
        if len(stages) > 1:
            return ScheduleInterleaved1F1B([*stages], n_micro, loss_fn=_loss, scale_grads=False)
        kind = Schedule1F1B if backward else ScheduleGPipe
        return kind(stages[0], n_micro, loss_fn=_loss, scale_grads=False)

    def _torch_stage(self, stage: StageModel, length: int) -> PipelineStage:
        config, decoder = self.mesh.config, stage.model.model
        with torch.device("meta"):
            tokens = torch.empty(1, length, dtype=torch.long)
            hidden = torch.empty(
                1, length // config.tp, stage.model.config.dim, dtype=decoder.stream_dtype, requires_grad=True
            )
            loss = torch.empty((), requires_grad=True)
        return PipelineStage(
            stage,
            stage.index,
            config.pp * config.pp_chunks,
            self.mesh.device,
            input_args=tokens if stage.index == 0 else hidden,
            output_args=loss if stage.last else hidden,
            group=self.mesh.sub("pp").get_group(),
        )


def _loss(output: Tensor, _: Tensor) -> Tensor:
    """The last stage's output is the loss already."""
    return output
