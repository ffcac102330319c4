"""The arrows of the architecture: who may import whom, who opens files, who knows SQLite and vLLM.

Every rule is a function from parsed modules to a list of violations, so each one is also shown to find a
violation in a small made-up module.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "kv_agent"
MAX_LINES = 400

# Part of the package -> other parts it may import. A part is the first name below `kv_agent`.
BASE = {"chunks", "config", "errors"}
PLUGIN_NEEDS = BASE | {"kv", "storage", "retrieval"}
ENGINES_NEED = PLUGIN_NEEDS | {"vllm_plugin"}
USER_LAYER_NEEDS = ENGINES_NEED | {"engines", "prompting", "planning"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "chunks": {"errors"},
    "chunking": set(),
    "machine": set(),
    "config": {"chunks", "errors"},
    "kv": BASE,
    "storage": BASE | {"kv", "machine"},
    "retrieval": BASE | {"kv"},
    "vllm_plugin": PLUGIN_NEEDS | {"chunking", "machine"},
    "engines": ENGINES_NEED,
    "prompting": BASE,
    "planning": BASE,
    "recognition": BASE | {"chunking", "planning"},
    "repair": BASE | {"planning"},
    "placing": ENGINES_NEED | {"engines", "planning", "prompting", "recognition", "repair"},
    "searching": BASE | {"retrieval", "storage"},
    "printing": set(),
    "quotas": BASE | {"storage", "printing"},
    "pending": BASE,
    "manager": USER_LAYER_NEEDS | {"pending", "placing", "searching"},
    "memories": BASE | {"engines", "searching", "storage"},
    # Either makes the other: AgentMemory(base_url=...) is a RemoteMemory, as Path() is a PosixPath.
    "memory": USER_LAYER_NEEDS | {"manager", "memories", "placing", "remote", "searching"},
    "remote": BASE | {"engines", "memories", "memory", "placing", "searching", "storage"},
    "keys": BASE | {"printing", "serving"},
    "serve": BASE | {"engines", "keys", "printing"},
    "agents": USER_LAYER_NEEDS | {"manager", "memory"},
    "serving": USER_LAYER_NEEDS | {"placing", "manager", "memories", "memory", "searching"},
    "vllm_plugin.endpoints": ENGINES_NEED
    | {"engines", "serving"},  # a module by its full name, unlike its part
}
TOP = {"__init__", "__main__", "cli"}  # nothing below imports these

# Patterns of modules that may import a library (`*` also matches dots).
ONLY_IN = {
    "vllm": [
        "kv_agent.vllm_plugin.register",
        "kv_agent.vllm_plugin.connector",
        "kv_agent.vllm_plugin.endpoints",
        "kv_agent.vllm_plugin.metrics",
        "kv_agent.engines.vllm*",
    ],
    "sqlite3": ["kv_agent.storage.catalog", "kv_agent.storage.connection", "kv_agent.storage.schema"],
}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FILE_CALLS = {
    "open", "fdopen", "mkstemp", "memmap", "fromfile", "tofile", "safe_open", "save_file", "load_file",
    "read_bytes", "read_text", "write_bytes", "write_text",
    "NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    name: str
    source: str
    is_package: bool = False

    @property
    def part(self) -> str:
        names = self.name.split(".")
        return names[1] if len(names) > 1 else "__init__"

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)


def modules_below(root: Path) -> Iterator[Module]:
    for path in sorted((root / PACKAGE).rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        is_package = names[-1] == "__init__"
        name = ".".join(names[:-1] if is_package else names)
        yield Module(name=name, source=path.read_text(encoding="utf-8"), is_package=is_package)


def imported_names(module: Module) -> Iterator[str]:
    """Dotted names of everything imported anywhere in the module, also by name at run time."""
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                prefix = base or ""
                if level:
                    parents = module.name.split(".")
                    parents = parents[: len(parents) - level + module.is_package]
                    prefix = ".".join([*parents, prefix] if prefix else parents)
                yield from (f"{prefix}.{alias.name}" for alias in names)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if _last_name(func) in (
                "import_module",
                "__import__",
            ):
                yield name


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def wrong_arrows(modules: Iterable[Module]) -> list[str]:
    wrong = []
    for module in modules:
        if module.part in TOP:
            continue
        full_name = module.name.removeprefix(f"{PACKAGE}.")
        allowed = MAY_IMPORT.get(full_name, MAY_IMPORT.get(module.part))
        if allowed is None:
            wrong.append(f"{module.name}: add {module.part!r} to MAY_IMPORT")
            continue
        for name in imported_names(module):
            package, _, rest = name.partition(".")
            target = rest.split(".")[0] or "__init__"
            if package == PACKAGE and target not in allowed | {module.part}:
                wrong.append(f"{module.name} imports {name}")
    return wrong


def wrong_libraries(modules: Iterable[Module]) -> list[str]:
    return [
        f"{module.name} imports {name}"
        for module in modules
        for name in imported_names(module)
        if (allowed := ONLY_IN.get(name.split(".")[0])) is not None
        and not any(fnmatchcase(module.name, pattern) for pattern in allowed)
    ]


def unpickling(modules: Iterable[Module]) -> list[str]:
    wrong = []
    for module in modules:
        wrong.extend(
            f"{module.name} imports {name}"
            for name in imported_names(module)
            if name.split(".")[0] in UNPICKLERS or name in ("torch.load", "torch.save", "numpy.load")
        )
        for node in ast.walk(module.tree):
            match node:
                case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save" as attr):
                    wrong.append(f"{module.name}:{node.lineno} uses torch.{attr}")
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    wrong.append(f"{module.name}:{node.lineno} allows pickle")
    return wrong


def _opens_file(call: ast.Call) -> bool:
    if _last_name(call.func) not in FILE_CALLS:
        return False
    match call.func:
        case ast.Attribute(attr="open", value=ast.Name(id=receiver)) if receiver[0].isupper():
            return receiver == "Path"  # Catalog.open() is a constructor of ours
        case ast.Attribute(value=receiver):
            return _last_name(receiver).strip("_") not in ("blobs", "catalog")  # asking whoever may
    return True


def files_opened_in_storage(modules: Iterable[Module]) -> list[str]:
    return [
        f"{module.name}:{node.lineno} calls {_last_name(node.func)}"
        for module in modules
        if module.part == "storage" and module.name != "kv_agent.storage.blobs"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and _opens_file(node)
    ]


def too_long(modules: Iterable[Module]) -> list[str]:
    return [
        f"{module.name}: {num_lines} lines"
        for module in modules
        if (num_lines := len(module.source.splitlines())) > MAX_LINES
    ]


def named_utils(modules: Iterable[Module]) -> list[str]:
    return [module.name for module in modules if {"utils", "util"} & set(module.name.split("."))]


RULES: list[Callable[[Iterable[Module]], list[str]]] = [
    wrong_arrows,
    wrong_libraries,
    unpickling,
    files_opened_in_storage,
    too_long,
    named_utils,
]


@pytest.fixture(scope="module")
def package() -> list[Module]:
    return list(modules_below(ROOT))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_follows_rule(rule: Callable[[Iterable[Module]], list[str]], package: list[Module]) -> None:
    assert {"kv_agent.chunks", "kv_agent.config", "kv_agent.errors"} <= {module.name for module in package}
    assert rule(package) == []


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (wrong_arrows, "kv_agent.errors", "from kv_agent.chunks import Scope"),
        (wrong_arrows, "kv_agent.chunks", "import kv_agent.config"),
        (wrong_arrows, "kv_agent.kv.rope", "from kv_agent.storage import store"),
        (wrong_arrows, "kv_agent.storage.store", "from kv_agent.retrieval.index import Index"),
        (wrong_arrows, "kv_agent.retrieval.index", "from ..storage import catalog"),
        (wrong_arrows, "kv_agent.retrieval.index", "from kv_agent import storage"),
        (wrong_arrows, "kv_agent.retrieval.index", "def f():\n    import kv_agent.storage.store"),
        (wrong_arrows, "kv_agent.vllm_plugin.worker", "from kv_agent.engines.base import Engine"),
        (wrong_arrows, "kv_agent.vllm_plugin.worker", "from kv_agent.serving.server import MemoryServer"),
        (wrong_arrows, "kv_agent.memory", "from kv_agent.serving.errors import RequestError"),
        (wrong_arrows, "kv_agent.engines.base", "from kv_agent import AgentMemory"),
        (wrong_arrows, "kv_agent.memory", "from kv_agent.agents import AgentManager"),
        (wrong_arrows, "kv_agent.planning", "from kv_agent.manager import CacheManager"),
        (wrong_arrows, "kv_agent.agents", "from kv_agent.cli import main"),
        (wrong_arrows, "kv_agent.surprise", "x = 1"),
        (wrong_libraries, "kv_agent.vllm_plugin.worker", "def f():\n    from vllm import LLM"),
        (wrong_libraries, "kv_agent.memory", "import vllm.config as c"),
        (wrong_libraries, "kv_agent.memory", "import importlib\nimportlib.import_module('vllm.v1')"),
        (wrong_libraries, "kv_agent.storage.store", "import sqlite3"),
        (unpickling, "kv_agent.storage.blob_content", "import pickle"),
        (unpickling, "kv_agent.storage.blob_content", "import torch\ntorch.load('x', weights_only=True)"),
        (unpickling, "kv_agent.storage.blob_content", "from torch import load"),
        (unpickling, "kv_agent.storage.blob_content", "np.frombuffer(b, allow_pickle=True)"),
        (files_opened_in_storage, "kv_agent.storage.store", "with open('x') as f: pass"),
        (files_opened_in_storage, "kv_agent.storage.store", "Path('x').read_bytes()"),
        (files_opened_in_storage, "kv_agent.storage.store", "path.open('rb')"),
        (files_opened_in_storage, "kv_agent.storage.store", "os.open(path, 0)"),
        (too_long, "kv_agent.memory", "x = 1\n" * (MAX_LINES + 1)),
        (named_utils, "kv_agent.storage.utils", ""),
    ],
)
def test_rule_finds_violation(rule: Callable[[Iterable[Module]], list[str]], name: str, source: str) -> None:
    assert len(rule([Module(name=name, source=source)])) == 1


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (wrong_arrows, "kv_agent.vllm_plugin.worker", "from kv_agent.storage.store import LocalStore"),
        (wrong_arrows, "kv_agent.storage.store", "from .blobs import Blobs"),
        (wrong_arrows, "kv_agent.cli", "from kv_agent import AgentMemory"),
        (wrong_arrows, "kv_agent.vllm_plugin.endpoints", "from kv_agent.serving.server import MemoryServer"),
        (wrong_libraries, "kv_agent.engines.vllm_local", "import vllm"),
        (wrong_libraries, "kv_agent.memory", "from kv_agent.engines.vllm_local import Engine"),
        (files_opened_in_storage, "kv_agent.storage.blobs", "open('x')"),
        (files_opened_in_storage, "kv_agent.storage.store", "self._blobs.read_bytes(name)"),
        (files_opened_in_storage, "kv_agent.storage.store", "Catalog.open(path)"),
        (too_long, "kv_agent.memory", "x = 1\n" * MAX_LINES),
    ],
)
def test_rule_allows(rule: Callable[[Iterable[Module]], list[str]], name: str, source: str) -> None:
    assert rule([Module(name=name, source=source)]) == []


def test_importing_package_does_not_import_vllm() -> None:
    code = "import sys, kv_agent; print(*(m for m in sys.modules if m.split('.')[0] == 'vllm'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
