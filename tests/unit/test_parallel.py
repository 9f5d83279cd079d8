"""One network over several processes: what is refused, and that two processes do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import trainer_in

from edt_diffusion.training import parallel
from edt_diffusion.training.config import TrainConfig
from edt_diffusion.training.parallel import make_accelerator, refuse_unsupported
from edt_diffusion.training.state import CheckpointStore
from edt_diffusion.training.trainer import Trainer
from edt_diffusion.util.errors import UserError

HALF = "stage0", "patch_embed", "class_embedder"
# A large eps: with the usual one, Adan makes whole steps out of rounding errors where the true gradient is zero.
OPTIMIZER = {"eps": 1e-2}
# One backward pass each; the batch is that of all processes.
GRADIENTS = {
    "two passes": ({"name": "learned_variance"}, {"joint_passes": False}),
    "joint": ({"name": "learned_variance"}, {"joint_passes": True}),
    "two passes in micro-batches": ({"name": "v_prediction"}, {"joint_passes": False, "micro_batches": 2}),
    "joint in micro-batches": ({"name": "flow"}, {"joint_passes": True, "micro_batches": 2}),
}
# Whole runs of four steps.
RUNS = {
    "lora": {"finetune": {"lora": {"rank": 2}}},
    "frozen": {"finetune": {"freeze": HALF}},
    "full pass only": {"objective": {"passes": "full"}},
    "sharded lora": {"finetune": {"lora": {"rank": 2}}, "train": {"sharding": "fsdp2"}},
    "sharded frozen": {"finetune": {"freeze": HALF}, "train": {"sharding": "fsdp2"}},
}
# Runs of another backbone, without a model to start from.
MDT = {"name": "MDTv2", "patch_size": 1, "depth": 4, "hidden_size": 16, "num_heads": 2, "decode_layers": 2}
BACKBONE_RUNS = {
    "masks at the input": {"model": MDT},
    "idle side block": {"model": MDT, "objective": {"passes": "full"}},
    "sharded masks at the input": {"model": MDT, "train": {"sharding": "fsdp2"}},
    "sharded idle side block": {"model": MDT, "objective": {"passes": "full"}, "train": {"sharding": "fsdp2"}},
}
DROPOUT = {"finetune": {"lora": {"rank": 2, "dropout": 0.1}}}
# Everything that needs two processes, in one pair of them: their start takes most of the time.
WORKER = """
import os, sys, warnings
from pathlib import Path
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_parallel as t
folder, source = map(Path, sys.argv[2:])
results = {
    "gradients": {name: t.gradients_of(folder / name, *settings) for name, settings in t.GRADIENTS.items()},
    "exchanged": {micro: t.exchanged(folder / f"exchange {micro}", micro) for micro in (1, 2, 4)},
}
for name, changes in {**t.RUNS, **t.BACKBONE_RUNS}.items():
    t.run_of(folder / name, t.started_from(source, changes))
dropout = t.started_from(source, t.DROPOUT)
t.run_of(folder / "straight", dropout)
t.run_of(folder / "resumed", dropout, 2)
t.run_of(folder / "resumed", dropout)
if int(os.environ["RANK"]) == 0:
    torch.save(results, folder / "results.pt")
torch.distributed.barrier()
os._exit(0)  # gloo may abort at interpreter exit
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def away_from_zero(trainer: Trainer) -> None:
    """Move the weights from the initial zeros, behind which most gradients vanish; alike in all processes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def gradients_of(folder: Path, objective: dict, train: dict) -> dict[str, torch.Tensor]:
    """The gradients with which the optimizer makes the first step."""
    trainer = trainer_in(folder, objective=objective, train={"batch_size": 8, **train})
    away_from_zero(trainer)
    seen: dict[str, torch.Tensor] = {}

    def keep(set_to_none: bool = True) -> None:
        seen.update({name: p.grad.clone() for name, p in trainer.network.named_parameters() if p.grad is not None})

    trainer.optimizer.zero_grad = keep
    trainer.update(0, trainer.make_loader(0))
    trainer.lock.release()
    return seen


def exchanged(folder: Path, micro: int) -> tuple[int, int, int]:
    """Numbers exchanged in each of two steps of `micro` micro-batches, and the network's parameters."""
    trainer = trainer_in(folder, train={"batch_size": 8, "micro_batches": micro})
    sent: list[int] = []

    def count(_state, bucket):
        sent.append(bucket.buffer().numel())
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    trainer.parallel.model.register_comm_hook(None, count)
    loader, sums = trainer.make_loader(0), []
    for _ in range(2):
        sent.clear()
        trainer.update(trainer.step, loader)
        trainer.step += 1
        sums.append(sum(sent))
    trainer.lock.release()
    return sums[0], sums[1], sum(p.numel() for p in trainer.network.parameters())


def started_from(source: Path, changes: dict) -> dict:
    """Settings with the model that is fine-tuned, where one is."""
    if "finetune" not in changes:
        return changes
    return {**changes, "finetune": {**changes["finetune"], "model": str(source)}}


def run_of(folder: Path, changes: dict, steps: int = 4, alone: bool = False) -> None:
    """A whole run with some settings; `alone` takes out those that one process cannot have."""
    train = {**changes.get("train", {}), **({"sharding": "none"} if alone else {})}
    train = {"steps": steps, "batch_size": 8, "micro_batches": 2, "save_every": 2, **train}
    trainer = trainer_in(folder, **{**changes, "optimizer": OPTIMIZER, "train": train})
    assert trainer.fit()
    trainer.accelerator.wait_for_everyone()


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and averages after four steps, and what the timestep sampler has seen."""
    groups = CheckpointStore(folder / "checkpoints").load(4).tensors
    return {f"{group}/{k}": v for group, named in groups.items() if group != "optimizer" for k, v in named.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model to be fine-tuned whose every weight matters, which is not so in a new one."""
    folder = tmp_path_factory.mktemp("source")
    trainer = trainer_in(folder / "run")
    trainer.lock.release()
    away_from_zero(trainer)
    trainer.saving.export(folder / "model", None)
    return folder / "model"


@pytest.fixture(scope="module")
def two(tmp_path_factory, source) -> Path:
    """What two processes have done."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "worker.py"
    script.write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*launcher, str(Path(__file__).parent), str(folder), str(source)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


# ---- two processes ----


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENTS)
def test_two_processes_with_half_the_batch_give_the_gradients_of_one(tmp_path, two, name):
    objective, train = GRADIENTS[name]
    one = gradients_of(tmp_path, objective, {**train, "micro_batches": 1})
    other = torch.load(two / "results.pt")["gradients"][name]
    assert one.keys() == other.keys()
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    assert largest > 0.01
    assert sum(bool(gradient.any()) for gradient in one.values()) == len(one) > 50  # every parameter has its say
    worst = max(float((other[name] - one[name]).abs().max()) for name in one)
    assert worst <= 1e-6 * largest


@pytest.mark.slow
def test_gradients_are_exchanged_once_a_step_however_many_micro_batches(two):
    for first, second, parameters in torch.load(two / "results.pt")["exchanged"].values():
        assert first == second == parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_with_a_part_of_the_parameters_are_those_of_one_process(tmp_path, two, source, name):
    changes = started_from(source, RUNS[name])
    run_of(tmp_path / "one", changes, alone=True)
    one, other = saved(tmp_path / "one"), saved(two / name)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    untrained = trainer_in(tmp_path / "new", **changes | {"train": {}})
    untrained.lock.release()
    start, parameters = untrained.network.state_dict(), dict(untrained.network.named_parameters())
    frozen = [key for key, p in parameters.items() if not p.requires_grad]
    assert (len(frozen) > 5) == ("finetune" in changes)
    assert [key for key in frozen if not torch.equal(other[f"model/{key}"], start[key])] == []
    assert not any(f"ema/{key}" in other for key in frozen)
    moved = {key for key in parameters if not torch.equal(other[f"model/{key}"], start[key])}
    # Untrained, a model's blocks do nothing at first: only of one that is fine-tuned all that can move does.
    assert moved == parameters.keys() - frozen or "finetune" not in changes


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONE_RUNS)
def test_runs_of_mdt_are_those_of_one_process(tmp_path, two, name):
    run_of(tmp_path / "one", BACKBONE_RUNS[name], alone=True)
    one, other = saved(tmp_path / "one"), saved(two / name)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    guesses = [key for key in one if key.startswith("ema/") and ("mask_token" in key or ".block." in key)]
    assert bool(guesses) == ("idle" not in name)  # frozen parameters have no average


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded lora", "lora"])
def test_low_rank_adapters_of_two_processes_are_exported_merged(tmp_path, two, source, name):
    run_of(tmp_path / "one", started_from(source, RUNS[name]), alone=True)
    file = Path("model", "transformer", "diffusion_pytorch_model.safetensors")
    one, other = load_file(tmp_path / "one" / file), load_file(two / name / file)
    assert one.keys() == other.keys()
    assert not any("lora" in key for key in other)
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-5)
    assert (two / name / "model" / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_low_rank_adapters_with_dropout_in_two_processes_resume_bitwise(two):
    straight, resumed = saved(two / "straight"), saved(two / "resumed")
    assert straight.keys() == resumed.keys()
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
    plain = saved(two / "lora")  # and the dropout does something
    assert any(not torch.equal(straight[key], plain[key]) for key in plain if ".lora_" in key)


# ---- what is refused ----


@pytest.mark.parametrize("value", ["1", "true", "Yes"])
@pytest.mark.parametrize(
    ("variable", "remedy"),
    [
        ("ACCELERATE_USE_FSDP", "set train.sharding=fsdp2"),
        ("ACCELERATE_USE_DEEPSPEED", "name its configuration with train.deepspeed=FILE"),
    ],
)
def test_backends_asked_for_in_the_environment(monkeypatch, variable, remedy, value):
    monkeypatch.setenv(variable, value)
    for act in (refuse_unsupported, make_accelerator):
        with pytest.raises(UserError, match=remedy):
            act(TrainConfig())
    monkeypatch.setenv(variable, "false")
    refuse_unsupported(TrainConfig())


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({"sharding": "fsdp2"}, "1", "needs at least two processes, this is one: start the run with torchrun"),
        ({"sharding": "fsdp2", "compile": True}, "2", "fsdp2 with train.compile=true is not supported"),
        ({"sharding": "fsdp2", "deepspeed": "x.json"}, "2", "train.deepspeed and train.sharding were both given"),
    ],
)
def test_combinations_that_no_backend_has(monkeypatch, settings, processes, message):
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(UserError, match=message):
        refuse_unsupported(TrainConfig(**settings))


def test_half_precision_needs_a_gpu_and_is_not_sharded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train.mixed_precision=fp16 needs a GPU .*: use bf16 or no"):
        refuse_unsupported(TrainConfig(mixed_precision="fp16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refuse_unsupported(TrainConfig(mixed_precision="fp16"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"fsdp2 with train.mixed_precision=fp16 is not supported"):
        refuse_unsupported(TrainConfig(mixed_precision="fp16", sharding="fsdp2"))


def test_processes_that_do_not_find_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # and no address to meet at, as if launched by hand
    monkeypatch.setattr(parallel, "Accelerator", lambda **_: type("One", (), {"num_processes": 1})())
    with pytest.raises(UserError, match="2 processes were launched, but accelerate joins 1: start the run with torch"):
        make_accelerator(TrainConfig())


def test_deepspeed_files_that_cannot_be_used(monkeypatch, tmp_path):
    file = tmp_path / "ds.json"

    def refused() -> str:
        with pytest.raises(UserError) as told:
            refuse_unsupported(TrainConfig(deepspeed=str(file)))
        assert "\n" not in str(told.value)
        return str(told.value)

    assert f"train.deepspeed={file} cannot be read (No such file or directory)" in refused()
    file.write_text('{"zero_optimization": ')
    assert f"train.deepspeed={file} is not valid JSON: Expecting value" in refused()
    file.write_text("[]")
    assert "holds no JSON object" in refused()
    file.write_text("{}")
    monkeypatch.setattr(parallel, "find_spec", lambda _name: None)
    assert refused().endswith("needs DeepSpeed: pip install deepspeed, or leave it out")
    monkeypatch.setattr(parallel, "find_spec", lambda name: name == "deepspeed")
    refuse_unsupported(TrainConfig(deepspeed=str(file)))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # asked for twice is asked for once
    refuse_unsupported(TrainConfig(deepspeed=str(file)))


def test_one_python_process_may_train_at_several_precisions():
    single, half, again = (make_accelerator(TrainConfig(mixed_precision=name)) for name in ("no", "bf16", "no"))
    assert [each.mixed_precision for each in (single, half, again)] == ["no", "bf16", "no"]
    product = torch.ones(2, 2)
    for accelerator, dtype in ((half, torch.bfloat16), (single, torch.float32)):
        with accelerator.autocast():
            assert (product @ product).dtype == dtype
