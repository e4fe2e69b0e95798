"""Semantic ids and their trie, by hand and on random digits."""

import pytest
import torch
from small_slates import catalogue

from hpgr_plugin.components.slates.semantic_ids import SemanticIds
from hpgr_plugin.errors import HpgrError

DIGITS = torch.tensor([[1, 0], [0, 2], [1, 0], [0, 0], [1, 1]])


def test_ids_are_one_to_one_and_the_index_counts_collisions() -> None:
    ids = SemanticIds(DIGITS, codebook_size=3)
    assert ids.codes.tolist() == [[1, 0, 0], [0, 2, 0], [1, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert ids.num_decoded == 3


def test_the_trie_by_hand() -> None:
    ids = SemanticIds(DIGITS, codebook_size=3)
    root = ids.below(0, torch.tensor([0]))
    assert root.digits.tolist() == [[0, 1]]
    second = ids.below(1, root.nodes)
    assert second.valid.all()
    assert second.digits.tolist() == [[[0, 2], [0, 1]]]
    last = ids.below(2, second.nodes[0, 1])
    assert last.valid.tolist() == [[True, True], [True, False]]
    assert ids.items_of(last.nodes[0], 3).tolist() == [0, 2]
    assert ids.is_choice(torch.arange(5)).tolist() == [
        [True, True, True],
        [True, True, False],
        [True, True, True],
        [True, True, False],
        [True, True, False],
    ]


@pytest.mark.parametrize("seed", range(5))
def test_every_item_is_the_leaf_of_its_own_digits(seed: int) -> None:
    ids = catalogue(200, codebook_size=5, seed=seed)
    assert len(ids.codes.unique(dim=0)) == 200
    assert sorted(ids.leaf_items.tolist()) == list(range(200))
    nodes = torch.zeros(200, dtype=torch.long)
    for level, digit in enumerate(ids.codes.unbind(1)):
        children = ids.below(level, nodes)
        found = children.valid & (children.digits == digit.unsqueeze(1))
        assert (found.sum(1) == 1).all()
        nodes = children.nodes[found]
        assert torch.equal(nodes, ids.item_nodes[:, level + 1])
    assert torch.equal(ids.items_of(nodes, ids.num_levels), torch.arange(200))


def test_without_collisions_the_index_is_not_decoded() -> None:
    ids = SemanticIds(torch.arange(10).unsqueeze(1), codebook_size=16)
    assert ids.num_levels == 2
    assert ids.num_decoded == 1
    assert ids.items_of(ids.item_nodes[:, 1], 1).tolist() == list(range(10))


def test_free_items_are_counted_by_node() -> None:
    ids = SemanticIds(DIGITS, codebook_size=3)
    excluded = torch.zeros(2, 5, dtype=torch.bool)
    excluded[0, [0, 2]] = True
    first, second, last = ids.free_items(excluded)
    assert first.tolist() == [[2, 1], [2, 3]]
    assert second.tolist() == [[1, 1, 0, 1], [1, 1, 2, 1]]
    assert last.sum(1).tolist() == [3, 5]


def test_new_items_leave_the_old_ids_as_they_are() -> None:
    ids = SemanticIds(DIGITS, codebook_size=3)
    more = ids.with_items(torch.tensor([[1, 0], [2, 2]]))
    assert torch.equal(more.codes[:5], ids.codes)
    assert more.codes[5:].tolist() == [[1, 0, 2], [2, 2, 0]]


def test_a_collapsed_tokenizer_is_refused() -> None:
    with pytest.raises(HpgrError, match="9 items share one semantic id, index_size is 8"):
        SemanticIds(torch.zeros(9, 3, dtype=torch.long), codebook_size=4, index_size=8)


def test_digits_out_of_range_are_refused() -> None:
    with pytest.raises(HpgrError, match="digits must be 0 to 1"):
        SemanticIds(DIGITS, codebook_size=2)
