"""What the loader's processes are handed. Light to import: each of them does."""

from data.batches import BatchRequest
from trainer.step_plan import StepPlanner


class RankRequests:
    """What one rank needs for a step: its contiguous part of the global batch. Picklable, for the loader's processes."""

    def __init__(self, planner: StepPlanner, rank: int, world_size: int) -> None:
        self._planner, self._rank, self._world_size = planner, rank, world_size

    def __call__(self, step: int) -> BatchRequest:
        plan = self._planner.plan(step)
        count = plan.phase.batch_size // self._world_size
        first = plan.position + self._rank * count
        refs = self._planner.refs(first, count)
        return BatchRequest(step, first, refs, plan.phase.resolution, self._planner.shape(plan))
