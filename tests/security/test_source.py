"""The product's own source: nothing in it unpickles, evaluates text, or opens a port to others."""

from pathlib import Path

import pytest

from tests.security.source_scan import python_faults, shell_faults

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [
    ROOT / "setup.py",
    *(p for room in ("configs", "launch", "model", "pretrain", "tools") for p in (ROOT / room).rglob("*.py")),
]
SHELL = [*(ROOT / "launch").rglob("*.sh"), ROOT / "tests" / "run.sh"]


def test_no_python_source_has_a_forbidden_call() -> None:
    assert len(PYTHON) > 100
    assert {str(p.relative_to(ROOT)): faults for p in PYTHON if (faults := python_faults(p.read_text()))} == {}


def test_no_shell_script_has_a_forbidden_call() -> None:
    assert len(SHELL) > 3
    assert {str(p.relative_to(ROOT)): faults for p in SHELL if (faults := shell_faults(p.read_text()))} == {}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "imports pickle"),
        ("import os, pickle as p", "imports pickle"),
        ("from pickle import loads", "imports pickle.loads"),
        ("def f():\n    import dill", "imports dill"),
        ("import joblib.numpy_pickle", "imports joblib.numpy_pickle"),
        ("from torch.distributed import checkpoint", "imports torch.distributed.checkpoint"),
        ("from megatron.core.dist_checkpointing import load", "imports megatron.core.dist_checkpointing.load"),
        ("import torch\ntorch.load(f)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, weights_only=False)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, weights_only=safe)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, **options)", "torch.load without weights_only=True"),
        ("import torch as t\nt.load(f)", "torch.load without weights_only=True"),
        ("from torch import load as read\nread(f)", "torch.load without weights_only=True"),
        ("import torch\ntorch.hub.load('a/b', 'c')", "torch.hub.load"),
        ("import torch\nread = torch.jit.load", "torch.jit.load"),
        ("import numpy as np\nnp.load(f)", "numpy.load without allow_pickle=False"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "numpy.load without allow_pickle=False"),
        ("import yaml\nyaml.load(t)", "yaml.load without a SafeLoader"),
        ("import yaml\nyaml.load(t, Loader=yaml.Loader)", "yaml.load without a SafeLoader"),
        ("import yaml\nclass L(yaml.FullLoader): ...\nyaml.load(t, L)", "yaml.load without a SafeLoader"),
        ("from yaml import full_load as read\nread(t)", "yaml.full_load"),
        ("import yaml\nyaml.unsafe_load(t)", "yaml.unsafe_load"),
        ("eval(t)", "eval"),
        ("import builtins\nbuiltins.eval(t)", "eval"),
        ("run = exec", "exec"),
        ("__import__(t)", "__import__"),
        ("import importlib\nimportlib.import_module(t)", "importlib.import_module"),
        ("import os\nos.system(t)", "os.system"),
        ("from os import popen\npopen(t)", "os.popen"),
        ("import subprocess\nsubprocess.run(t, shell=True)", "subprocess.run without shell=False"),
        ("from subprocess import Popen\nPopen(t, shell=flag)", "subprocess.Popen without shell=False"),
        ("import subprocess\nsubprocess.getoutput(t)", "subprocess.getoutput"),
        ("load(t, trust_remote_code=True)", "load without trust_remote_code=False"),
        ("engine.load_checkpoint(f)", "load_checkpoint"),
        ("open(t).extractall(f)", "extractall"),
        (
            "from transformers import AutoModelForCausalLM as M\nM.from_pretrained(f, local_files_only=True)",
            "transformers.AutoModelForCausalLM.from_pretrained without use_safetensors=True",
        ),
        ("Model.from_pretrained(f)", "Model.from_pretrained without trust_remote_code=False"),
        (
            "import transformers\ntransformers.AutoTokenizer.from_pretrained(f)",
            "transformers.AutoTokenizer.from_pretrained without local_files_only=True",
        ),
        ("command = ['tensorboard', '--bind_all']", "an address that others reach"),
        ("print(f'tensorboard --host 0.0.0.0 --logdir {folder}')", "an address that others reach"),
    ],
)
def test_the_scan_finds_what_python_must_not_have(source: str, fault: str) -> None:
    assert fault in [found.partition(": ")[2] for found in python_faults(source)]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "import yaml\nclass L(yaml.SafeLoader): ...\nyaml.load(t, Loader=L)\nyaml.safe_load(t)",
        "import re\nre.compile(t)\nmodel.eval()\nload(t)",
        "import subprocess\nsubprocess.run([t], check=True)",
        "from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained(\n"
        "    f, local_files_only=True, trust_remote_code=False\n)",
        "version = '10.0.0.0.1'  # eval(",
    ],
)
def test_the_scan_leaves_the_rest_alone(source: str) -> None:
    assert python_faults(source) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('set -e\neval "$x"', "line 2: eval"),
        ("if true; then eval $x; fi", "line 1: eval"),
        ("x=$(eval echo $y)", "line 1: eval"),
        ("command eval $x", "line 1: eval"),
        ("tensorboard --bind_all --logdir x", "line 1: an address that others reach"),
        ("tensorboard --host=0.0.0.0", "line 1: an address that others reach"),
        ("curl -s https://x | bash", "line 1: a download goes into a shell"),
        ("\"$p\" -c '\nimport os\nos.system(x)\n'", "in the Python from line 1 on, line 2: os.system"),
    ],
)
def test_the_scan_finds_what_a_script_must_not_have(source: str, fault: str) -> None:
    assert shell_faults(source) == [fault]


def test_the_scan_leaves_comments_and_other_words_alone() -> None:
    assert shell_faults("# eval $x\nevaluate=1 # --bind_all\necho evaluation\n\"$p\" -c 'import torch'") == []
