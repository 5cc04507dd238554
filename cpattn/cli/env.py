"""``cpattn env``: what there is on this machine, and what of cpattn works with it. It never fails, whatever is broken.

Nothing but the standard library is imported above the probes, and each probe is guarded: what it raises is its result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

# What a package's module may have been installed as, too.
_ALSO_NAMED = {"flash-attn-3": ("tokenspeed-fa3",)}
# Each package, the module whose import shows that it works, and what it is for. Importing some takes seconds, so
# those that cpattn never imports itself are not tried.
_PACKAGES = {
    "torch": ("torch", "needed"),
    "numpy": ("numpy", "needed"),
    "einops": ("einops", "needed"),
    "triton": ("triton", "backend triton, and moving rows on a GPU"),
    "flash-attn": ("flash_attn", "backend flash_attn2"),
    "flash-attn-3": ("flash_attn_interface", "backend flash_attn3"),
    "fa3-fwd": ("fa3_fwd_interface", "backend flash_attn3, another build"),
    "flash-attn-4": ("flash_attn.cute", "backend flash_attn4"),
    "matplotlib": ("matplotlib", "pictures"),
    "rich": ("rich", "colours in the terminal"),
    "transformers": (None, "the Hugging Face adapter"),
}
_DESCRIPTION = """\
Reports versions, devices and transports. For each backend it says what it can
do on this machine, and why not where it cannot. Paste it into a bug report.
It never fails: what is broken is part of the report, and the exit code is 0.
"""


def add_command(commands: Any) -> None:
    """Registers the command with the parser."""
    parser = commands.add_parser(
        "env",
        help="report versions, devices, and what each backend can do here",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=lambda options: print_report(as_json=options.json))


def guarded(probe: Callable[[], Any], otherwise: Callable[[str], Any]) -> Any:
    """What the probe returns, or ``otherwise`` of what it raised, in one line. A broken package may raise anything."""
    try:
        return probe()
    except KeyboardInterrupt:
        raise
    except BaseException as failure:
        lines = str(failure).strip().splitlines()
        return otherwise(f"{type(failure).__name__}: {lines[0]}" if lines else type(failure).__name__)


def report() -> dict[str, Any]:
    """The whole report, of JSON's own types. Never raises."""
    probes: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "devices": devices,
        "transports": transports,
        "backends": backends,
        "triton": triton_release,
        "strategies": strategies,
    }
    return {name: guarded(probe, lambda failure: {"failure": failure}) for name, probe in probes.items()}


def versions() -> dict[str, dict[str, str | None]]:
    """Each package's version (None if it is not installed), what is wrong with it, and what it is for."""
    found: dict[str, dict[str, str | None]] = {
        "cpattn": {"version": guarded(_own_version, lambda failure: None), "problem": None, "purpose": None},
        "Python": {"version": platform.python_version(), "problem": None, "purpose": f"{platform.system()} {platform.machine()}"},
    }
    for package, (module, purpose) in _PACKAGES.items():
        names = (package, *_ALSO_NAMED.get(package, ()))
        version = next(filter(None, (guarded(partial(_installed_version, name), lambda failure: None) for name in names)), None)
        problem = None
        if module is not None and (version is not None or guarded(partial(_exists, module), lambda failure: False)):
            problem = guarded(partial(_import, module), lambda failure: f"cannot be imported: {failure}")
            # What runs says more than what was installed: torch 2.13.0+cpu is not any 2.13.0.
            version = guarded(partial(_running_version, module), lambda failure: None) or version or "unknown"
        elif purpose == "needed":
            problem = f"is not installed: pip install {package}"
        found[package] = {"version": version, "problem": problem, "purpose": purpose}
    return found


def _own_version() -> str:
    from cpattn.version import __version__

    return __version__


def _installed_version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _running_version(module: str) -> str | None:
    version = getattr(sys.modules.get(module), "__version__", None)
    return None if version is None else str(version)


def _exists(module: str) -> bool:
    # This has a guard around it, as all that is imported here.
    from cpattn.installed import is_installed

    return is_installed(module)


def _import(module: str) -> None:
    from importlib import import_module

    import_module(module)


def devices() -> list[dict[str, Any]]:
    """The CPU, and each GPU that torch can use."""
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": guarded(_processor, lambda failure: platform.machine()), "cores": os.cpu_count()}
    ]

    def gpus() -> list[dict[str, Any]]:
        import torch

        if not torch.cuda.is_available():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            return [{"device": "cuda", "problem": f"no device that torch can use; this torch is {built}"}]
        return [_gpu(number) for number in range(torch.cuda.device_count())]

    found += guarded(gpus, lambda failure: [{"device": "cuda", "problem": failure}])
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpu(number: int) -> dict[str, Any]:
    import torch

    def properties() -> dict[str, Any]:
        found = torch.cuda.get_device_properties(number)
        return {
            "device": f"cuda:{number}",
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory_gib": round(found.total_memory / 2**30, 1),
        }

    failed: dict[str, Any] = guarded(properties, lambda failure: {"device": f"cuda:{number}", "problem": failure})
    return failed


def transports() -> dict[str, dict[str, str | None]]:
    """What carries messages between ranks: version, or why it cannot."""

    def gloo() -> dict[str, str | None]:
        import torch.distributed as dist

        return {"version": "in torch", "problem": None if dist.is_available() and dist.is_gloo_available() else "this torch has none"}

    def nccl() -> dict[str, str | None]:
        import torch
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_nccl_available()):
            return {"version": None, "problem": "this torch has none: it needs a build for CUDA"}
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        return {"version": version, "problem": None if torch.cuda.is_available() else "there is no CUDA device"}

    return {
        name: guarded(probe, lambda failure: {"version": None, "problem": failure}) for name, probe in {"gloo": gloo, "nccl": nccl}.items()
    }


def backends() -> dict[str, Any]:
    """For each kind of device and each backend: whether it can be used and why not, and for which features."""
    from cpattn.cli.backend_features import backend_features

    return backend_features(guarded)


def triton_release() -> dict[str, dict[str, Any]]:
    """The two fast ways of backend triton that its release decides: whether each is used (None: not known before first use), and why."""
    import torch

    from cpattn.kernels import release

    gates = {"the attention kernel for Hopper": release.HOPPER_KERNEL, "launches by the CUDA driver": release.DIRECT_LAUNCH}
    if not torch.cuda.is_available():
        return {name: {"used": False, "why": "there is no CUDA device"} for name in gates}
    found = {name: guarded(partial(_verdict, gate), lambda failure: {"used": False, "why": failure}) for name, gate in gates.items()}
    if all(torch.cuda.get_device_capability(number) != (9, 0) for number in range(torch.cuda.device_count())):
        found["the attention kernel for Hopper"] = {"used": False, "why": "there is no GPU of compute capability 9.0"}
    return found


def _verdict(gate: Any) -> dict[str, Any]:
    found: dict[str, Any] = gate.verdict()._asdict()
    return found


def strategies() -> list[str]:
    """What ``strategy=`` takes by name."""
    from cpattn.exchange.registry import STRATEGIES

    return list(STRATEGIES)


def print_report(as_json: bool) -> int:
    """Prints the report. Returns 0."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=2, default=str))
        return 0
    # Tables are drawn by modules that need what may be broken.
    print_section = guarded(_table_printer, lambda failure: None)
    for name, section in found.items():
        if print_section is None:
            _print_lines(name, section)
        else:
            guarded(partial(print_section, name, section), partial(_print_plainly, name, section))
    return 0


def _table_printer() -> Callable[[str, Any], None]:
    from cpattn.cli.env_tables import print_section

    return print_section


def _print_plainly(name: str, section: Any, failure: str) -> None:
    print(f"\n{name}: {section} ({failure})")


def _print_lines(name: str, section: Any) -> None:
    print(f"{name}\n")
    for entry in section if isinstance(section, list) else [{"": key} | _as_dict(value) for key, value in section.items()]:
        print("  " + ", ".join(str(value) for value in entry.values() if value is not None))
    print()


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"value": value}
