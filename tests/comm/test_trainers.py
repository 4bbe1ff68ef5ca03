"""States that are made before there is a process group, and know no names: what trainers do with a hook of torch's."""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from training import backward, gradients, network, same_everywhere

from pykernels import comm
from pykernels.bench.zoo import torchvision_models


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_torchrun_does(rank: int, world: int, port: int) -> None:
    """No process group, and what an environment tells a trainer that makes one."""
    dist.destroy_process_group()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def package(name: str) -> Any:
    """A trainer's package, if it is installed; most import torchvision where they find it, which may not load."""
    if importlib.util.find_spec("torchvision") is not None:
        torchvision_models()
    return pytest.importorskip(name)


# ---- by hand ----

STATES = {
    "int8": comm.Int8State(None),
    "onebit": comm.OneBitState(None),
    "topk": comm.TopKState(None, ratio=0.1),
    "powersgd": comm.PowerSGDState(None, start_step=2),
    "fp32": comm.Fp32State(None),
    "auto": comm.AutoState(None, candidates=("int8",)),
}
OPTIONS: dict[str, dict[str, Any]] = {"topk": {"ratio": 0.1}, "powersgd": {"start_step": 2}}


def made_early(rank: int, states: dict[str, comm.CommState], level: comm.TwoLevelState) -> dict[str, bool]:
    """Whether a state that was made (and pickled) elsewhere averages to the bits of a registered one."""
    answers = {}
    for codec, state in {**states, "two levels": level}.items():
        early, late = (DDP(network(), bucket_cap_mb=0.03) for _ in range(2))
        early.register_comm_hook(state, comm.int8_hook)
        if codec == "two levels":
            comm.register(late, "int8", ranks_per_host=1)
        elif codec == "auto":
            comm.register(late, "int8")
        else:
            comm.register(late, codec, **OPTIONS.get(codec, {}))
        same = True
        for step in range(4):  # after the first, DDP makes other buckets of the same parameters
            for model in (early, late):
                model.zero_grad()
                backward(model, rank, step)
            same &= all(torch.equal(a, b) for a, b in zip(gradients(early), gradients(late), strict=True))
        answers[codec] = same and state.stats().steps == 4
    return answers


def test_a_state_made_before_the_process_group_is_as_good_as_a_registered_one() -> None:
    assert not dist.is_initialized()
    for answers in run_ranks(2, made_early, STATES, comm.TwoLevelState(None, codec="int8", ranks_per_host=1)):
        assert answers == dict.fromkeys(answers, True)


def test_what_needs_a_process_group_says_so() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        _ = comm.Int8State(None).world
    with pytest.raises(RuntimeError, match="named_parameters"):
        comm.Int8State(None).state_dict()


def test_a_state_is_pickled_before_it_is_used() -> None:
    state = pickle.loads(pickle.dumps(comm.Int4State(None, block=64, stochastic=True)))
    assert (state.block, state.stochastic, state.stats().steps) == (64, True, 0)


# ---- PyTorch Lightning ----


def lightning(rank: int, port: int) -> tuple[bool, int, float]:
    """Whether ranks agree after training, the steps that went through the hook, and how many times fewer bytes."""
    package("pytorch_lightning")
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.overrides.distributed import _register_ddp_comm_hook
    from pytorch_lightning.strategies import DDPStrategy

    class OnCpusToo(DDPStrategy):
        """Lightning registers hooks on GPUs alone; here its own function is called on a CPU."""

        def _register_ddp_hooks(self) -> None:
            _register_ddp_comm_hook(self.model, self._ddp_comm_state, self._ddp_comm_hook, self._ddp_comm_wrapper)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05)

    as_torchrun_does(rank, 2, port)
    state = comm.Int8State(None)
    strategy = OnCpusToo(process_group_backend="gloo", ddp_comm_state=state, ddp_comm_hook=comm.int8_hook)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, enable_model_summary=False, **quiet
    )
    module = Module()
    torch.manual_seed(rank)
    data = torch.utils.data.TensorDataset(torch.randn(64, 50), torch.randint(0, 10, (64,)))
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    alike = same_everywhere([p.detach() for p in module.parameters()])
    return alike, state.stats().steps, state.stats().ratio


def test_pytorch_lightning() -> None:
    package("pytorch_lightning")
    for alike, steps, ratio in run_ranks(2, lightning, free_port()):
        assert alike and steps == 4 and ratio > 3


# ---- Accelerate, and the Trainer of Hugging Face's transformers, which is made of it ----


def accelerated(rank: int, port: int) -> tuple[bool, int, float]:
    package("accelerate")
    from accelerate import Accelerator

    as_torchrun_does(rank, 2, port)
    state, net = comm.Int8State(None), network()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.05))
    model.register_comm_hook(state, comm.int8_hook)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()
    stats = state.stats()
    return same_everywhere(gradients(model)), stats.steps, stats.ratio


def test_accelerate() -> None:
    package("accelerate")
    for alike, steps, ratio in run_ranks(2, accelerated, free_port()):
        assert alike and steps == 3 and ratio > 3


def hugging_face(rank: int, port: int, folder: str) -> tuple[bool, int, float]:
    package("transformers")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": nn.functional.cross_entropy(self.net(x), labels)}

    class Compress(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.handle = comm.register(trainer.model_wrapped, "int8")

    as_torchrun_does(rank, 2, port)
    torch.manual_seed(0)
    data = [{"x": torch.randn(50), "labels": torch.tensor(i % 10)} for i in range(64)]
    options: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(
        folder, use_cpu=True, per_device_train_batch_size=8, num_train_epochs=1, logging_strategy="no", **options
    )
    compress = Compress()
    trainer = Trainer(model=Net(), args=arguments, train_dataset=data, callbacks=[compress])
    trainer.train()
    stats = compress.handle.stats()
    return same_everywhere([p.detach() for p in trainer.model.parameters()]), stats.steps, stats.ratio


def test_the_trainer_of_transformers(tmp_path: Any) -> None:
    package("accelerate")
    package("transformers")
    for alike, steps, ratio in run_ranks(2, hugging_face, free_port(), str(tmp_path)):
        assert alike and steps == 4 and ratio > 3
