"""What a stage asks of its devices is told before any data is read or anything compiles."""

from dataclasses import replace

import pytest
import tiny

from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.algorithms.online_dpo import OnlineDPOConfig
from jrlhf.config import MeshConfig, UserError
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
