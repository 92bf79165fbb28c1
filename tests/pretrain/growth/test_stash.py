"""The stash copies a device's fragments in few pieces; the tests copy from host memory, which is the same code."""

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.format import Fragment
from pretrain.growth.stash import host_copies, host_copy, staying_and_leaving


def _fragments() -> tuple[list[Fragment], dict[tuple[str, str], Tensor]]:
    """Fragments of two flat tensors, with gaps and an empty one, and one fragment with a tensor of its own."""
    fragments, whole = [], {}
    for key in ("master", "exp_avg"):
        flat = torch.randn(200, generator=torch.Generator().manual_seed(len(key)))
        places = (("first", 3, 40), ("second", 43, 0), ("third", 43, 16), ("fourth", 64, 100))
        for name, place, length in places:
            fragments.append(Fragment(name, key, 1000 + place, flat.narrow(0, place, length)))
            whole[name, key] = flat[place : place + length].clone()
    alone = torch.arange(5.0)
    fragments.append(Fragment("alone", "master", 0, alone))
    whole["alone", "master"] = alone.clone()
    return fragments, whole


@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_pieces_of_copies_make_up_every_fragment(chunk: int) -> None:
    fragments, whole = _fragments()
    starts = {(fragment.name, fragment.key): fragment.start for fragment in fragments}
    copies = list(host_copies(fragments, 4 * chunk, 0.0))
    for fragment in fragments:
        fragment.values.fill_(torch.nan)  # copies must not change with the originals
    for place, expected in whole.items():
        pieces = [copy for copy in copies if (copy.name, copy.key) == place]
        assert torch.equal(torch.cat([torch.empty(0), *(piece.values for piece in pieces)]), expected)
        at = starts[place]
        for piece in pieces:
            assert piece.start == at
            at += len(piece.values)
    storages = {copy.values.untyped_storage().data_ptr() for copy in copies}
    range_copied = 161  # from the first fragment of a flat tensor to the last one's end
    assert len(storages) == 2 * -(-range_copied // chunk) + 1


def test_a_copy_is_as_large_as_what_it_copies() -> None:
    view = torch.arange(100.0)[10:20]
    copy = host_copy(view)
    assert torch.equal(copy, view)
    assert copy.untyped_storage().nbytes() == 40


@pytest.mark.parametrize(("spare_bytes", "staying"), [(-1.0, 0), (799.0, 1), (800.0, 4), (1599.0, 5), (1620.0, 9)])
def test_flat_tensors_stay_where_they_fit_as_a_whole(spare_bytes: float, staying: int) -> None:
    """Two flat tensors of 800 bytes with four fragments each, and one of 20 bytes."""
    fragments, _ = _fragments()
    stay, leave = staying_and_leaving(fragments, spare_bytes)
    assert (len(stay), len(leave)) == (staying, 9 - staying)
    storages = [{fragment.values.untyped_storage().data_ptr() for fragment in part} for part in (stay, leave)]
    assert not storages[0] & storages[1]
