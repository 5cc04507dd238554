"""Writes docs/api.md from the docstrings of all public names.

python docs/make_api.py

The same input gives the same page, so a test can compare. A public name that no group has, or that has no docstring, is an
error.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")

# Which module's names stand under which heading, in reading order.
GROUPS: dict[str, tuple[str, list[str]]] = {
    "Layout": ("cpattn", ["plan", "Plan", "Chunk", "Chunks", "Request", "required_rows", "build_metadata", "CPMetadata", "Bucket"]),
    "Calls": ("cpattn", ["shard", "cp_attention", "prepare", "PreparedCall", "unshard", "forward_context", "ForwardContext", "explain"]),
    "Latents": ("cpattn", ["latent_expansion", "ExpandFunction"]),
    "KV caches": ("cpattn", ["PackedKV", "PagedKV", "Striped", "KVPool", "relayout"]),
    "Pieces of a paged call": ("cpattn", ["gather_kv", "slot_mapping", "write_kv", "attend"]),
    "Strategies and backends": ("cpattn", ["STRATEGIES", "hybrid", "two_level", "BACKENDS", "custom_backend", "RaggedRows"]),
    "A backend of one's own": ("cpattn", ["Backend", "Spans", "Keys", "AttentionOptions"]),
    "Groups": ("cpattn", ["transport", "Transport", "LoopbackGroup", "release", "check", "Communicator", "ProcessGroupCommunicator"]),
    "What calls cost": (
        "cpattn",
        ["estimate", "Estimates", "Estimate", "Problem", "MACHINES", "Machine", "LinkCosts", "KernelCosts", "measure_links"],
    ),
    "Errors": (
        "cpattn",
        [
            "CPError",
            "BatchError",
            "PlanError",
            "RankError",
            "RowCountError",
            "HeadCountError",
            "TensorMismatchError",
            "OptionError",
            "PrefixError",
            "PageTableError",
            "PoolFullError",
            "GroupError",
            "DisagreementError",
            "UnknownNameError",
            "UnsupportedError",
            "BackendError",
        ],
    ),
    "Version": ("cpattn", ["__version__"]),
    "cpattn.testing": (
        "cpattn.testing",
        [
            "oracle_attention",
            "relative_rmse",
            "rmse",
            "rmse_bound",
            "single_device_bound",
            "run_loopback",
            "ProcessRanks",
            "RankFailure",
            "SoloCommunicator",
            "check_backend",
            "BackendReport",
            "check_layout",
            "LayoutError",
            "NAMED_BATCHES",
        ],
    ),
    "cpattn.testing.strategies": (
        "cpattn.testing.strategies",
        ["batches", "lengths", "owner_rules", "chunks", "plans", "caches", "Caches", "Batch"],
    ),
    "cpattn.viz": (
        "cpattn.viz",
        [
            "draw_plan_picture",
            "draw_ring_picture",
            "draw_work_picture",
            "ring_schedule",
            "RingSchedule",
            "Stretch",
            "ring_as_text",
            "work_as_text",
        ],
    ),
    "cpattn.integrations.vllm": (
        "cpattn.integrations.vllm",
        ["register", "batch_of", "plan_of", "pages_of", "common_fields", "prefill_chunks"],
    ),
    "cpattn.integrations.transformers": (
        "cpattn.integrations.transformers",
        ["register", "context_parallel", "generate", "ContextParallel", "ContextError", "NAME"],
    ),
    "cpattn.integrations.sglang": ("cpattn.integrations.sglang", ["replace_zigzag", "KNOWN_RELEASE"]),
}

# Of classes whose objects a function makes, what users call.
CALLED = {"PreparedCall": ["__call__"]}

_HEAD = """\
# API

Made from the docstrings by `python docs/make_api.py`; edit those. The examples are doctests, which `make test` runs.

Shapes: `T` tokens or rows, `Hq` and `Hkv` query and key/value heads, `D` and `Dv` their head dims. A *row* is a token in a rank's
local order; [concepts](concepts.md) has the other words.
"""
_SECTIONS = ("Args:", "Returns:", "Raises:", "Attributes:", "Yields:")
_WIDTH = 100


def make_page() -> str:
    """The text of docs/api.md."""
    check_complete()
    parts = [_HEAD, "\n".join(_contents_line(title, names) for title, (_, names) in GROUPS.items()) + "\n"]
    for title, (module_name, names) in GROUPS.items():
        module = importlib.import_module(module_name)
        parts.append(f"## {title}\n")
        if title == module_name and module.__doc__:
            parts.append(_markdown(inspect.cleandoc(module.__doc__)))
        parts += [_entry(name, getattr(module, name), module) for name in names]
    return "\n".join(parts)


def check_complete() -> None:
    """Raises ValueError unless the groups name exactly what the modules call public."""
    for module_name in {module for module, _ in GROUPS.values()}:
        listed = [name for module, names in GROUPS.values() if module == module_name for name in names]
        public = importlib.import_module(module_name).__all__
        if sorted(listed) != sorted(public):
            raise ValueError(f"{module_name}: the groups of make_api.py and __all__ differ in {sorted(set(listed) ^ set(public))}")


def _contents_line(title: str, names: list[str]) -> str:
    return f"- {title}: " + ", ".join(f"[`{name}`](#{_anchor(name)})" for name in names)


def _anchor(name: str) -> str:
    """Of the name's heading, as GitHub makes it; names that differ in case alone are numbered in the order of the page."""
    names = [entry for _, names in GROUPS.values() for entry in names]
    earlier = [entry.lower() for entry in names[: names.index(name)]].count(name.lower())
    return name.lower() + (f"-{earlier}" if earlier else "")


def _entry(name: str, value: Any, module: Any) -> str:
    if inspect.isclass(value):
        return _class_entry(name, value, module)
    if inspect.isfunction(value):
        return "\n".join([f"### `{name}`\n", _signature(name, value), _documentation(name, inspect.getdoc(value))])
    return f"### `{name}`\n\n" + _documentation(name, _constant_docstring(name, module))


def _class_entry(name: str, value: type, module: Any) -> str:
    parts = [f"### `{name}`\n"]
    if value.__name__ != name and value.__name__ in module.__all__:
        return "\n".join([*parts, _inline(f"Another name of :class:`{value.__name__}`.") + "\n"])
    if issubclass(value, Exception):
        return "\n".join([*parts, _documentation(name, value.__doc__)])
    if not inspect.isabstract(value) and name not in CALLED:
        parts.append(_signature(name, value))
    parts.append(_documentation(name, inspect.cleandoc(value.__doc__ or "")))
    for member_name, member in _members(value).items():
        function = inspect.unwrap(member.__func__) if isinstance(member, classmethod) else getattr(member, "func", member)
        function = member.fget if isinstance(member, property) else function
        # What is a field's default is no method.
        hidden = member_name.startswith("_") and member_name != "__call__"
        if hidden or not inspect.isfunction(function) or member_name in getattr(value, "__dataclass_fields__", {}):
            continue
        heading = f"#### `{name}.{member_name}`\n"
        shown = "" if function is not member and not isinstance(member, classmethod) else _signature(member_name, function)
        parts += [heading, shown] if shown else [heading]
        parts.append(_documentation(f"{name}.{member_name}", inspect.getdoc(function)))
    return "\n".join(parts)


def _members(value: type) -> dict[str, Any]:
    """Its own and those of the classes of cpattn that it is made from and that have no entry; of what is made by a function alone, what
    its users call."""
    if value.__name__ in CALLED:
        return {name: vars(value)[name] for name in CALLED[value.__name__]}
    public = {name for _, names in GROUPS.values() for name in names}
    classes = [base for base in value.__mro__ if base.__module__.startswith("cpattn") and (base is value or base.__name__ not in public)]
    members: dict[str, Any] = {}
    for base in classes:
        members |= {name: member for name, member in vars(base).items() if name not in members and (base is value or name != "__call__")}
    return members


def _constant_docstring(name: str, module: Any) -> str | None:
    """The string after ``name = ...`` in the module that defines it."""
    tree = ast.parse(inspect.getsource(module))
    # What is imported when asked for stands below an "if TYPE_CHECKING".
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return _constant_docstring(name, importlib.import_module(str(node.module)))
    for line, after in pairwise(tree.body):
        targets = line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
        defines = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if defines and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return inspect.cleandoc(str(after.value.value))
    return None


def _signature(name: str, value: Any) -> str:
    """A code block with the signature, one parameter a line where it is long."""
    signature = inspect.signature(value)
    parameters, keyword_only = [], False
    for parameter in signature.parameters.values():
        # What a call takes as **unknown it takes to refuse it.
        if parameter.name in ("self", "cls", "unknown"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parameters.append("*")
            keyword_only = True
        text = f"{'*' * (parameter.kind is parameter.VAR_POSITIONAL)}{'**' * (parameter.kind is parameter.VAR_KEYWORD)}{parameter.name}"
        if parameter.annotation is not parameter.empty:
            text += f": {_annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f"{' = ' if ':' in text else '='}{_default(parameter.default)}"
        parameters.append(text)
    returns = (
        ""
        if inspect.isclass(value) or signature.return_annotation is signature.empty
        else f" -> {_annotation(signature.return_annotation)}"
    )
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) > _WIDTH:
        line = f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returns}"
    return f"```text\n{line}\n```\n"


def _annotation(annotation: Any) -> str:
    annotation = getattr(annotation, "__forward_arg__", annotation)
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(cpattn\.[a-z_.]+|typing|collections\.abc)\.(?=[A-Za-z])", "", text.strip("\"'"))


def _default(value: Any) -> str:
    """As repr, in an order that does not change from run to run, and without addresses."""
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
    if "<" in repr(value):
        return "..."
    return repr(value)


def _documentation(name: str, docstring: str | None) -> str:
    if not docstring:
        raise ValueError(f"{name} has no docstring")
    return _markdown(inspect.cleandoc(docstring))


def _markdown(docstring: str) -> str:
    """Docstring to Markdown: sections become lists, examples code blocks."""
    lines: list[str] = []
    section, example = "", False
    for line in [*docstring.splitlines(), ""]:
        if example and not line.strip():
            lines += ["```", ""]
            example = False
        elif example:
            lines.append(line)
        elif line.startswith(">>>"):
            lines += ["```pycon", line]
            example = True
        elif line in _SECTIONS:
            lines += [f"**{line[:-1]}**", ""]
            section = line
        elif section and line.startswith("    ") and not line.startswith("     "):
            item = re.match(r"    ((?:``)?[\w, *\[\]+]+(?:``[^:]*``)?(?:``)?): (.*)", line)
            if item and section not in ("Returns:", "Yields:"):
                lines.append(f"- `{item[1].replace('`', '')}`: {_inline(item[2])}")
            else:
                lines.append(_inline(line.strip()))
        elif section and line.strip():
            lines.append(f"  {_inline(line.strip())}")
        else:
            if not line.strip():
                section = ""
            lines.append(_inline(line))
    text = "\n".join(lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _inline(line: str) -> str:
    """References and code, as Markdown has them."""
    line = re.sub(r":(?:func|class|meth|data|mod|attr):`~?([^`]*)`", lambda found: _reference(found[1]), line)
    # Two colons announce the indented code block that follows, which Markdown knows by its indent.
    line = re.sub(r"^::$", "", re.sub(r"(?<=.)::$", ":", line))
    return line.replace("``", "`")


def _reference(target: str) -> str:
    name = target.removeprefix("cpattn.")
    known = {entry for _, names in GROUPS.values() for entry in names}
    return f"[`{name}`](#{_anchor(name)})" if name in known else f"`{target}`"


if __name__ == "__main__":
    PAGE.write_text(make_page())
