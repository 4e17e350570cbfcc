"""What a stage's optimiser merges with every step."""

from __future__ import annotations

from posttrain.models.load import find_model
from posttrain.models.policy import Model
from posttrain.models.stored import open_model, require_same_network
from posttrain.stages import Context, Stage, Training
from posttrain.train.online_merging import OnlineMerge, task_vectors
from posttrain.work.inputs import Start


def merged_steps(stage: Training, ctx: Context, start: Start, policy: Model) -> OnlineMerge | None:
    """The stage's online merging, None without: what the start model learnt since ``merging_base``, read before any step.

    Call it before the policy moves, or a run that goes on restores its weights.

    Raises:
        ModelError: the base is another network or has another tokenizer.
    """
    if stage.merging == "none" or stage.merging_base is None:
        return None
    stored = isinstance(stage.merging_base, Stage)
    path = str(ctx.inputs["merging_base"]) if stored else find_model(str(stage.merging_base)).path
    base = open_model(path)
    require_same_network([open_model(start.path), base])
    task = task_vectors(policy.parameters(), base, stage.merging, stage.merging_keep)
    size = sum(float(t.double().square().sum()) for t in task.values()) ** 0.5
    ctx.console.print(f"{stage.merging}: the start is {size:.3g} from {path}", highlight=False)
    return OnlineMerge(
        rule=stage.merging,
        alpha=stage.merging_alpha,
        keep=stage.merging_keep,
        task={"policy": task},
        seed=ctx.seed,
    )
