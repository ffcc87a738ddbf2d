"""The order of the training rows."""

from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

__all__ = ["LengthGroupedByEpoch"]


class LengthGroupedByEpoch(LengthGroupedSampler):
    """transformers' sampler with its order a function of seed and epoch, so that a resumed epoch has the same batches.

    transformers draws the order from the global random state, which is another one after a resume, and takes the batch
    of one process; here it is that of all processes, so that the order is that of one with their batches together.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, processes: int):
        super().__init__(sampler.batch_size * processes, lengths=sampler.lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
