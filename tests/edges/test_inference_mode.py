"""Pages that were made under torch.inference_mode() are read anywhere, and written within that mode alone."""

from __future__ import annotations

import pytest
import torch

import cpattn


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("latent", [False, True], ids=["", "v in k"])
def test_attend_reads_them_outside_of_the_mode(backend: str, latent: bool) -> None:
    def made() -> tuple[cpattn.PagedKV, cpattn.CPMetadata]:
        generator = torch.Generator().manual_seed(0)
        pages, values = torch.randn(2, 6, 4, 2, 16, generator=generator)
        table = torch.tensor([[4, 0, 3], [2, 5, 5]], dtype=torch.int32)
        return cpattn.PagedKV(pages, None if latent else values, table), cpattn.build_metadata([(6, 5), (3, 2)], 1, 0)

    q = torch.randn(7, 4, 16)
    v_dim = 8 if latent else None
    with torch.inference_mode():
        cache, meta = made()
    assert cache.k_pages.is_inference()
    plain = cpattn.attend(q, *made(), v_dim=v_dim, backend=backend)
    for check in (False, True):
        out = cpattn.attend(q, cache, meta, v_dim=v_dim, backend=backend, check=check)
        assert torch.equal(out, plain)
        # It is no tensor of that mode itself: a model may go on with it.
        assert not out.is_inference()
    with pytest.raises(cpattn.PageTableError, match=r"made under torch.inference_mode\(\), and cannot be written outside of it"):
        cpattn.write_kv(torch.zeros(1, 2, 16), None if latent else torch.zeros(1, 2, 16), cache, torch.tensor([1]))
