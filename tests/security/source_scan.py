"""Finds, in source text, calls that unpickle, evaluate text, hand a line to a shell, or load code with a model.

Names are followed through imports, so that `from torch import load as read` is still `torch.load`. Whoever means to
hide a call can; this is for calls written without a thought.
"""

import ast
import re
from collections.abc import Iterator

MODULES = (
    "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "runpy", "shelve",
    "megatron.core.dist_checkpointing", "torch.distributed.checkpoint", "torch.hub", "torch.package",
)  # fmt: skip
"""Not imported at all: their readers run what a file says."""

NAMES = {
    "__import__", "compile", "eval", "exec", "asyncio.create_subprocess_shell", "importlib.import_module",
    "numpy.lib.format.read_array", "os.popen", "os.system", "pandas.read_pickle", "shutil.unpack_archive",
    "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp", "torch.jit.load",
    "torch.ops.load_library", "yaml.CFullLoader", "yaml.CLoader", "yaml.CUnsafeLoader", "yaml.FullLoader",
    "yaml.Loader", "yaml.UnsafeLoader", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load",
    "yaml.unsafe_load_all",
}  # fmt: skip

METHODS = {"extractall", "load_adapter", "load_checkpoint"}
"""Names of methods of objects whose class a scan does not know: archives, transformers' and DeepSpeed's own loaders."""

_SAFE_LOADERS = {"yaml.CSafeLoader", "yaml.SafeLoader"}
_OPEN_ADDRESS = re.compile(r"--bind_all|(?<![\d.])0\.0\.0\.0(?![\d.])")
_SHELL_EVAL = re.compile(r"(?:^|[;&|({`!]|\b(?:then|do|else|command|builtin))\s*eval\b")
_DOWNLOAD_INTO_SHELL = re.compile(r"\b(?:curl|wget)\b.*\|\s*\w*sh\b")
_PYTHON_IN_SHELL = re.compile(r"(?<=-c ')[^']*(?=')")


def python_faults(source: str) -> list[str]:
    """`line N: what`, for everything in a Python source that is not allowed."""
    tree = ast.parse(source)
    scan = _Scan(tree)
    found = {(node.lineno, fault) for node in ast.walk(tree) for fault in scan.faults(node) if hasattr(node, "lineno")}
    return [f"line {line}: {fault}" for line, fault in sorted(found)]


def shell_faults(source: str) -> list[str]:
    """`line N: what`, for everything in a shell script that is not allowed. Text between `-c '` and `'` counts as
    Python."""
    found = []
    for number, line in enumerate(source.splitlines(), start=1):
        code = re.sub(r"(^|\s)#.*", "", line)
        for pattern, fault in (
            (_SHELL_EVAL, "eval"),
            (_DOWNLOAD_INTO_SHELL, "a download goes into a shell"),
            (_OPEN_ADDRESS, "an address that others reach"),
        ):
            if pattern.search(code):
                found.append(f"line {number}: {fault}")
    for inner in _PYTHON_IN_SHELL.finditer(source):
        first = source.count("\n", 0, inner.start()) + 1
        found += [f"in the Python from line {first} on, {fault}" for fault in python_faults(inner[0].strip())]
    return found


class _Scan:
    """What the names of one module stand for, and what is wrong with a part of it."""

    def __init__(self, tree: ast.Module) -> None:
        self._names: dict[str, str] = {}
        self._safe_loaders = set(_SAFE_LOADERS)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    root = alias.name.partition(".")[0]
                    self._names[alias.asname or root] = alias.name if alias.asname else root
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self._names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(self._full_name(base) in _SAFE_LOADERS for base in node.bases):
                self._safe_loaders.add(node.name)

    def faults(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (f"imports {alias.name}" for alias in node.names if _in_forbidden_module(alias.name))
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (f"imports {name}" for name in names if _in_forbidden_module(name))
        elif isinstance(node, ast.Name | ast.Attribute):
            name = "" if isinstance(node.ctx, ast.Store) else self._full_name(node)  # a field may be called `compile`
            if name in NAMES or _in_forbidden_module(name):
                yield name
        elif isinstance(node, ast.Call):
            yield from self._call_faults(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _OPEN_ADDRESS.search(node.value):
            yield "an address that others reach"

    def _full_name(self, node: ast.AST) -> str:
        """`np.load` as `numpy.load`; empty for what is no name."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id, node.id)
        if isinstance(node, ast.Attribute) and (owner := self._full_name(node.value)):
            return f"{owner}.{node.attr}".removeprefix("builtins.")
        return ""

    def _call_faults(self, call: ast.Call) -> Iterator[str]:
        name = self._full_name(call.func)
        leaf = call.func.attr if isinstance(call.func, ast.Attribute) else name
        given = {keyword.arg: keyword.value for keyword in call.keywords}

        def unless(key: str, value: bool) -> Iterator[str]:
            argument = given.get(key)
            if not (isinstance(argument, ast.Constant) and argument.value is value):
                yield f"{name or leaf} without {key}={value}"

        if leaf in METHODS:
            yield leaf
        if name == "torch.load":
            yield from unless("weights_only", True)
        if name == "numpy.load":
            yield from unless("allow_pickle", False)
        if name in ("yaml.load", "yaml.load_all"):
            loader = given.get("Loader", call.args[1] if len(call.args) > 1 else None)
            if loader is None or self._full_name(loader) not in self._safe_loaders:
                yield f"{name} without a SafeLoader"
        if "shell" in given:
            yield from unless("shell", False)
        if "trust_remote_code" in given or leaf == "from_pretrained":
            yield from unless("trust_remote_code", False)
        if leaf == "from_pretrained":
            yield from unless("local_files_only", True)
            if "Tokenizer" not in name and "Config" not in name:
                yield from unless("use_safetensors", True)


def _in_forbidden_module(name: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in MODULES)
