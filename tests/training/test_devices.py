"""What a stage asks of its devices is told before any data is read or anything compiles."""

from dataclasses import replace

import pytest
import tiny

from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.algorithms.online_dpo import OnlineDPOConfig
from jrlhf.config import MeshConfig, UserError
from jrlhf.models.config import MoEConfig
from jrlhf.training.stages import Checkpoint, OnPolicy

ROLLS = OnPolicy(
    start="sft", reward="larder_gold", prompts=tiny.prompts, sampling=tiny.answers, algorithm=GRPOConfig(group_size=4),
    loop=tiny.loop(2, 64),
)  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        # 64 answers, 8 shards: 2 minibatches of 32
        (GRPOConfig(group_size=4, minibatches=2, microbatches=4), ""),
        (
            GRPOConfig(group_size=4, minibatches=2, microbatches=8),
            r"algorithm\.microbatches 8: 4 rows of each \(loop\.batch_size 64, algorithm\.minibatches 2\) do not "
            r"divide over the mesh's 8 batch shards \(data 4 x fsdp 2\)\. Use a divisor of 4, or another loop\.batch",
        ),
        # 16 groups
        (GRPOConfig(group_size=4, microbatches=2, share_prompts=True), ""),
        (
            GRPOConfig(group_size=4, microbatches=4, share_prompts=True),
            r"microbatches 4: 4 groups that share a prompt of each .* Use a divisor of 2",
        ),
        # 16 pairs
        (OnlineDPOConfig(group_size=4, microbatches=2), ""),
        (OnlineDPOConfig(group_size=4, microbatches=4), r"microbatches 4: 4 rows of each .* Use a divisor of 2"),
        # A minibatch that does not divide itself: a number of updates that may be wanted, and no piece of it helps.
        (GRPOConfig(group_size=4, minibatches=16), ""),
        (GRPOConfig(group_size=4, minibatches=16, microbatches=2), r"microbatches 2: 2 rows of each .* Use 1, or"),
    ],
)  # fmt: skip
def test_rows_of_microbatches_divide_over_the_devices(algorithm, message):
    stage = replace(ROLLS, algorithm=algorithm)
    stage.validate({**tiny.experiment.stages, "rolls": stage})
    stage.check_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    if not message:
        stage.check_mesh(MeshConfig(data=4, fsdp=2))
        return
    with pytest.raises(UserError, match=message):
        stage.check_mesh(MeshConfig(data=4, fsdp=2))


TINY = tiny.experiment.stages["pretrain"].model
MIXED = replace(TINY, moe=MoEConfig(experts=6, per_token=2))


def with_model(model, **rolls):
    stages = {**tiny.experiment.stages, "rolls": replace(ROLLS, **rolls)}
    return stages | {"pretrain": replace(stages["pretrain"], model=model)}


@pytest.mark.parametrize(
    ("model", "mesh", "message"),
    [
        (TINY, MeshConfig(4, sequence=2), ""),
        (TINY, MeshConfig(1, 2, sequence=4), r"mesh\.sequence 4 x mesh\.tensor 1: model\.n_heads 2 .* by 4"),
        (TINY, MeshConfig(1, 2, 2, sequence=2), r"mesh\.sequence 2 x mesh\.tensor 2: model\.n_heads 2 .* by 4"),
        (TINY, MeshConfig(4, expert=2), r"mesh\.expert 2: no model of this experiment has experts"),
        (MIXED, MeshConfig(4, expert=2), ""),
        (MIXED, MeshConfig(2, expert=4), "mesh.expert 4: model.moe.experts 6 is not divisible"),
    ],
)  # fmt: skip
def test_heads_and_experts_divide_over_the_devices(model, mesh, message):
    stages = with_model(model)
    for name in ("pretrain", "rolls"):
        stages[name].check_mesh(mesh)
        if not message:
            stages[name].check_model(mesh, stages)
            continue
        with pytest.raises(UserError, match=message):
            stages[name].check_model(mesh, stages)


def test_a_dense_reward_model_may_stand_beside_a_policy_with_experts():
    stages = with_model(MIXED) | {"dense": tiny.experiment.stages["pretrain"]}
    stages["reward_model"] = replace(stages["reward_model"], start="dense")
    stages["reward_model"].check_model(MeshConfig(4, expert=2), stages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout_mesh": MeshConfig(4, tensor=2)}, ""),
        ({"rollout_mesh": MeshConfig(3)}, "rollout_mesh: mesh: data 3 x fsdp 1 x tensor 1 needs 3 devices"),
        ({"rollout_mesh": MeshConfig(1, sequence=4, tensor=2)}, r"rollout_mesh: mesh\.sequence 4 x"),
        ({"rollout_mesh": MeshConfig(8), "loop": tiny.loop(2, 12)}, "rollout_mesh: loop.batch_size: 12 rows"),
        ({"rollout_mesh": MeshConfig(8), "rollout_devices": 4}, "and rollout_mesh is of all devices"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_mesh_to_sample_on(change, message):
    stages, mesh = with_model(TINY, **change), MeshConfig(1, 4, 2)

    def check():
        stages["rolls"].validate(stages)
        stages["rolls"].check_mesh(mesh)
        stages["rolls"].check_model(mesh, stages)

    if not message:
        check()
        return
    with pytest.raises(UserError, match=message):
        check()


def test_a_kernel_that_the_devices_lack(monkeypatch):
    model = replace(tiny.experiment.stages["pretrain"].model, dtype="bfloat16", vocab_size=32)
    pretrain = replace(tiny.experiment.stages["pretrain"], model=replace(model, attention="splash"))
    with pytest.raises(UserError, match=r"model\.attention: splash does not run on a cpu; use auto or xla"):
        pretrain.check_mesh(MeshConfig())
    monkeypatch.setattr(
        Checkpoint, "model_config", lambda self, stages: replace(model, attention=self.attention)
    )
    with pytest.raises(UserError, match=r"model\.attention: cudnn does not run on a cpu; use auto or xla"):
        Checkpoint("here", attention="cudnn").check_mesh(MeshConfig())
    Checkpoint("here", attention="xla").check_mesh(MeshConfig())
