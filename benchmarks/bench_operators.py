"""What a call costs the host in a compiled graph: by its operator, and where the graph ends before it.

python benchmarks/bench_operators.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timing import interleaved, percentiles, write_report
from torch import Tensor

import cpattn
from cpattn.ops import ORDER, SCHEMAS, options_text

# Layers follow each other, each on what the last gave. The attention itself is left out: only the host's work is timed.
LAYERS, ROWS, PAGE_SIZE = 32, 4, 4
META = cpattn.build_metadata([(0, 3), (0, 1)], 1, 0)
# Operators live as long as their library.
KEPT: list[Any] = []
RESULT = torch.zeros(ROWS, 2, 8), torch.zeros(ROWS, 2)


def kernel(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, **_: Any) -> tuple[Tensor, Tensor]:
    return RESULT


def paged() -> dict[str, Any]:
    pages = torch.zeros(2, 4, PAGE_SIZE, 2, 8)
    return {"kv_cache": cpattn.PagedKV(pages[0], pages[1], torch.tensor([[1], [3]], dtype=torch.int32)), "window": 64, "scale": 0.5}


def layers(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for _ in range(LAYERS):
            x = call(x)
        return x

    # Of one code the compiler keeps all graphs together, and would look through those of the other variants in each run.
    run.__code__ = run.__code__.replace()
    return run


def direct(options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The operator as a graph calls it, without one."""
    cache = options.get("kv_cache")
    text = options_text({name: value for name, value in options.items() if name != "kv_cache"})
    operators = torch.ops.cpattn.attention
    operator = operators.default if cache is None else operators.paged
    pages = () if cache is None else (*cache.written, cache.page_table, cache.handle)

    def call(x: Tensor) -> Tensor:
        out, _ = operator(x, x, x, None, ORDER, None, text, None, None, *pages)
        return out  # type: ignore[no-any-return]

    return call


def nothing() -> Callable[[Tensor], Any]:
    """An operator with the arguments of ``attention`` that does nothing: what torch's dispatcher alone costs."""
    library = torch.library.Library("cpattn_benchmark", "DEF")  # type: ignore[no-untyped-call]
    library.define("nothing" + SCHEMAS["attention"])  # type: ignore[no-untyped-call]
    library.impl("nothing", lambda *_: RESULT, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    KEPT.append(library)
    return lambda x: torch.ops.cpattn_benchmark.nothing.default(x, x, x, None, ORDER, None, "", None, None)


def main() -> None:
    torch.set_num_threads(1)
    do_nothing, load = nothing(), os.getloadavg()[0]
    rows, x = [], torch.randn(ROWS, 2, 8)
    backend = cpattn.custom_backend(kernel, page_sizes=lambda page_size: True)
    with torch.inference_mode(), cpattn.forward_context(META, backend=backend):
        for name, options in (("keys of the call alone", {}), ("pages, a window, a scale", paged())):

            def plain(x: Tensor, options: dict[str, Any] = options) -> Tensor:
                out: Tensor = cpattn.cp_attention(x, x, x, None, **options)
                return out

            def after_nothing(x: Tensor, plain: Callable[[Tensor], Tensor] = plain) -> Tensor:
                do_nothing(x)
                return plain(x)

            variants = {
                "plain": layers(plain),
                "plain, after an operator that does nothing": layers(after_nothing),
                "operator": layers(direct(options)),
            }
            for compiler in ("eager", "inductor"):
                variants[f"operator in a graph, {compiler}"] = torch.compile(layers(plain), backend=compiler, fullgraph=True)
                variants[f"graph break, {compiler}"] = torch.compile(
                    layers(torch.compiler.disable(plain)),  # type: ignore[no-untyped-call]
                    backend=compiler,
                )
            assert all(torch.equal(run(x), variants["plain"](x)) for run in variants.values())
            times = interleaved({variant: lambda run=run: run(x) for variant, run in variants.items()}, seconds=20.0)  # type: ignore[misc]
            for variant, found in times.items():
                more = "" if variant == "plain" else f"{np.median(found - times['plain']) / LAYERS * 1e6:+.3g}"
                rows.append([name, variant, percentiles(found / LAYERS), f"{found.min() / LAYERS * 1e6:.4g}", more])
    notes = (
        f"{LAYERS} calls one after another, {ROWS} rows each, with a kernel that returns at once. Times are those of one call, with its "
        "part of entering the graph. The last column is the median of the differences from the plain calls of the same round. A graph "
        "break ends the compiled graph before each call, which then runs as the plain one. "
        f"The load average was {load:.2f} at the start, of {os.cpu_count()} cores.\n\n"
        "The operator that does nothing shows what torch's dispatcher takes to call Python, and how it slows down the Python that "
        "follows. In a graph there are, besides, the checks of sizes that torch's own compiler puts behind each call. And Python that "
        "a compiled function calls is slower: torch 2.13 leaves its hook in each call of a Python function."
    )
    header = ["call", "variant", "us", "least", "more than plain"]
    write_report("operators_cpu", "What a call costs the host in a compiled graph", header, rows, notes)


if __name__ == "__main__":
    main()
