"""A device that a run cannot train on is refused in one sentence; torch's answers are faked."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain import device_check
from pretrain.config.run import parse_config
from pretrain.device_check import check_device, refused_meeting
from pretrain.distributed import joined_processes
from pretrain.errors import ConfigError, HangError
from pretrain.planning.fitting import check_memory


class Machine:
    """Fakes what torch reports about a machine with GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.folder = monkeypatch, folder
        monkeypatch.setattr(device_check, "_DEVICE_FILES", folder)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.has(0)

    def has(self, gpus: int, *, seen: int | None = None, capability: tuple[int, int] = (9, 0)) -> None:
        """Gives the machine `gpus` GPUs, of which torch can use `seen`."""
        seen = gpus if seen is None else seen
        for number in range(gpus):
            (self.folder / f"nvidia{number}").touch()
        answers = {
            "is_available": lambda: seen > 0,
            "device_count": lambda: seen,
            "get_device_capability": lambda device=0: capability,
            "get_device_name": lambda device=0: "Tesla V100" if capability < (8, 0) else "NVIDIA H100",
        }
        for name, answer in answers.items():
            self.monkeypatch.setattr(torch.cuda, name, answer)
        self.monkeypatch.setattr(dist, "is_nccl_available", lambda: True)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def refusal(precision: str = "bf16", processes: int = 1) -> str:
    with pytest.raises(ConfigError) as refused:
        check_device(precision, processes)
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_suffices_is_let_through(machine: Machine) -> None:
    check_device("bf16", 64)  # on CPUs
    machine.has(8)
    check_device("bf16", 8)
    machine.has(1, capability=(7, 0))
    check_device("fp16", 1)


def test_more_processes_than_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert refusal(processes=4) == (
        "4 processes of this node would share 2 GPUs (CUDA_VISIBLE_DEVICES is 0,1), and NCCL takes one process a GPU: "
        "start 2 (--num_gpus, slots), or let more GPUs be seen"
    )


def test_a_gpu_that_is_named_twice(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,0")
    assert refusal() == "CUDA_VISIBLE_DEVICES is 0,1,0, which names a GPU twice: name each once"


@pytest.mark.parametrize(
    ("precision", "capability", "cure"),
    [("bf16", (7, 5), "fp16 or fp32"), ("bf16", (6, 1), "fp32"), ("fp16", (6, 1), "fp32")],
)
def test_a_precision_that_the_card_lacks(
    machine: Machine, precision: str, capability: tuple[int, int], cure: str
) -> None:
    machine.has(1, capability=capability)
    needed = {"bf16": "8.0", "fp16": "7.0"}[precision]
    assert refusal(precision) == (
        f"Tesla V100 has compute capability {capability[0]}.{capability[1]}, and {precision} needs {needed}: "
        f"set train.precision to {cure}"
    )
    check_device("fp32", 1)


def test_a_torch_without_nccl(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has(1)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert "was built without NCCL, over which GPUs exchange gradients: install a torch that has it" in refusal()


def test_a_gpu_that_torch_cannot_use(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has(1, seen=0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this machine has an NVIDIA GPU" in refusal()
    assert "(it is built for the CPU alone): mend that, or set CUDA_VISIBLE_DEVICES= to train on the CPU" in refusal()
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert "(The NVIDIA driver on your system is too old (found version 11040))" in refusal()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "(it finds no device, CUDA_VISIBLE_DEVICES is 7)" in refusal()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_device("bf16", 2)  # the user said so


def test_a_run_is_refused_before_processes_meet(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has(1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "PYTORCH_ALLOC_CONF": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="2 processes of this node would share 1 GPU "), joined_processes():
        raise AssertionError("joined")


def test_nccls_complaints_become_a_sentence() -> None:
    """NCCL's complaints come as torch hands them on: its own words, then NCCL's last error."""
    head = "NCCL error in: ProcessGroupNCCL.cpp:1, invalid usage\nncclInvalidUsage: This is a mistake.\nLast error:\n"
    twice = refused_meeting(head + "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000")
    assert isinstance(twice, ConfigError)
    assert "same GPU (Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000): give" in str(twice)
    lost = refused_meeting(head + "socketStartConnect: Connect to 10.0.0.7<41151> failed : No route to host")
    assert isinstance(lost, HangError)
    assert "NCCL could not connect the processes (socketStartConnect: Connect to 10.0.0.7" in str(lost)


@pytest.mark.parametrize("name", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_a_machines_memory_is_shared_by_its_own_processes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The number of processes comes from DeepSpeed's launcher, torchrun or OpenMPI."""
    for launcher in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(launcher, raising=False)
    config = parse_config(
        {
            "data": {"prefix": "corpus", "tokenizer": "tokenizer.model"},
            "model": {"layers": 100, "hidden": 32768, "heads": 64, "vocabulary": 50257, "parametrization": "dense"},
            "rank": {"policy": "fixed"},
            "train": {"global_batch": 512},
        }
    )
    monkeypatch.setenv(name, "4")
    with pytest.raises(ConfigError, match="of the machine's memory, shared by 4 processes, are there"):
        check_memory(config, 64)
    monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="shared by 64 processes"):
        check_memory(config, 64)


def test_a_gpu_that_is_too_small(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory decides, not the card's whole memory."""
    machine.has(1)
    config = parse_config(
        {
            "data": {"prefix": "corpus", "tokenizer": "tokenizer.model"},
            "model": {"layers": 24, "hidden": 1024, "heads": 16, "vocabulary": 50257, "parametrization": "dense"},
            "rank": {"policy": "fixed"},
            "train": {"precision": "bf16"},
        }
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * 10**9, 80 * 10**9))
    with pytest.raises(ConfigError) as refused:
        check_memory(config, 1)
    words = str(refused.value)
    assert "4.0 GB of the GPU are free (it has 80.0" in words
    assert "raise parallel.tensor" in words
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 10**9, 80 * 10**9))
    check_memory(config, 1)
