"""Draws every picture of results anew, from the tables beside them. No GPU is needed, but matplotlib is.

PYTHONPATH=. python benchmarks/draw_all.py [--results FOLDER] [--only NAME ...]

Each picture says in its metadata which tables it was drawn from, and their digest: a test finds one that is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import bench_attention
import bench_layer
import bench_partitions
import bench_peers
import cache_memory
import choosing_model
import first_token
import speedup
import trace_layer
from peers import report
from peers.ours import ON_GPUS
from peers.variants import all_variants
from scaling.published import draw_published

RESULTS = Path(__file__).parent / "results"


class Figure(NamedTuple):
    """Pictures that are drawn together.

    Attributes:
        pictures: their names, without the suffix.
        tables: the names of the CSV files that they come from.
        draw: takes the folder of both.
    """

    pictures: list[str]
    tables: list[str]
    draw: Callable[[Path], None]

    def digest(self, results: Path) -> str:
        tables = b"".join((results / f"{table}.csv").read_bytes() for table in self.tables)
        return f"{', '.join(self.tables)}: sha256 {hashlib.sha256(tables).hexdigest()}"


def draw_peers(results: Path) -> None:
    variants = all_variants("cuda", ON_GPUS)
    path = results / "peers_2_gpus"
    report.draw(path, report.read(path), bench_peers.BATCHES, lambda name: variants[name].beside if name in variants else "")


def _draw_engine(table: str, results: Path) -> None:
    first_token.draw(results / table)


DOCUMENTS = "scaling_4_h200_documents_published"
_PEERS = ("eager", "eager_exposed", "graph", "graph_exposed", "speedup")
FIGURES = [
    Figure(["attention_gpu"], ["attention_gpu"], bench_attention.draw),
    Figure(["layer_gpu"], ["layer_gpu"], bench_layer.draw),
    Figure(["trace_2_gpus"], ["trace_2_gpus"], lambda results: trace_layer.draw(results / "trace_2_gpus")),
    Figure(
        ["partitions_2_gpus_by_length"],
        ["partitions_2_gpus_by_length"],
        lambda results: bench_partitions.draw(results / "partitions_2_gpus_by_length", 2),
    ),
    Figure([f"peers_2_gpus_{kind}" for kind in _PEERS], ["peers_2_gpus"], draw_peers),
    Figure(["speedup"], ["peers_2_gpus", "peers_4_gpus"], speedup.draw),
    Figure([DOCUMENTS], [DOCUMENTS], lambda results: draw_published(results / DOCUMENTS)),
    Figure(["cache_memory"], ["cache_memory"], cache_memory.draw),
    Figure(["choosing_model"], ["choosing_model"], choosing_model.draw),
    *(
        Figure([table.stem], [table.stem], partial(_draw_engine, f"{table.stem}.csv"))
        for table in sorted(RESULTS.glob("nano_vllm_*_gpus.csv"))
    ),
]


def sign(picture: Path, digest: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Tables", digest)
    with Image.open(picture) as image:
        image.save(picture, pnginfo=info, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="pictures; all that are drawn together with one are drawn")
    options = parser.parse_args()
    for figure in FIGURES:
        if options.only and not set(options.only) & set(figure.pictures):
            continue
        figure.draw(options.results)
        for name in figure.pictures:
            sign(options.results / f"{name}.png", figure.digest(options.results))
            print(f"{name}.png, from {', '.join(f'{table}.csv' for table in figure.tables)}")


if __name__ == "__main__":
    main()
